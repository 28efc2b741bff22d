//! Long lists in pieces (KEP-5825).
//!
//! Every piece is from one snapshot, so nothing is in two of them and nothing is
//! left out. A piece is far below the longest message a client takes, and has at
//! least one item; an empty list is a stream without a message.

use prost::Message;
use tonic::Status;

/// Bytes in a message after which the next one begins. Source: gRPC's own bound
/// for clients that set none is 4 MiB.
const PIECE_BYTES: usize = 1 << 20;

/// What a streaming list answers with.
pub type Pieces<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

/// Messages made by `wrap` of as many items as fit.
pub fn pieces<I: Message, T>(items: Vec<I>, wrap: impl Fn(Vec<I>) -> T) -> Pieces<T> {
    let mut messages = Vec::new();
    let mut piece = Vec::new();
    let mut bytes = 0;
    for item in items {
        // With its tag and length.
        let length = item.encoded_len() + 6;
        if !piece.is_empty() && bytes + length > PIECE_BYTES {
            messages.push(Ok(wrap(std::mem::take(&mut piece))));
            bytes = 0;
        }
        bytes += length;
        piece.push(item);
    }
    if !piece.is_empty() {
        messages.push(Ok(wrap(piece)));
    }
    tokio_stream::iter(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_proto::runtime_v1 as cri;
    use tokio_stream::StreamExt as _;

    fn sandbox(id: usize, annotation_bytes: usize) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.to_string(),
            annotations: [("a".to_owned(), "x".repeat(annotation_bytes))].into(),
            ..Default::default()
        }
    }

    async fn sizes(items: Vec<cri::PodSandbox>) -> (Vec<String>, Vec<usize>) {
        let wrap = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        let messages: Vec<_> = pieces(items, wrap).map(Result::unwrap).collect().await;
        let ids = messages
            .iter()
            .flat_map(|m| m.pod_sandboxes.iter().map(|pod| pod.id.clone()))
            .collect();
        assert!(messages.iter().all(|m| !m.pod_sandboxes.is_empty()));
        (ids, messages.iter().map(Message::encoded_len).collect())
    }

    #[tokio::test]
    async fn everything_comes_once_in_order_and_in_small_pieces() {
        let items: Vec<_> = (0..50).map(|id| sandbox(id, 100 << 10)).collect();
        let (ids, sizes) = sizes(items).await;
        assert_eq!(ids, (0..50).map(|id| id.to_string()).collect::<Vec<_>>());
        assert!(sizes.len() >= 5, "{sizes:?}");
        assert!(sizes.iter().all(|size| *size <= PIECE_BYTES), "{sizes:?}");
    }

    #[tokio::test]
    async fn a_large_item_is_a_piece_of_its_own_and_nothing_is_no_piece() {
        let items = vec![sandbox(0, 1), sandbox(1, 2 << 20), sandbox(2, 1)];
        assert_eq!(sizes(items).await.1.len(), 3);
        assert!(sizes(Vec::new()).await.1.is_empty());
    }
}
