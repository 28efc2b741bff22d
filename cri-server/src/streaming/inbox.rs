//! What has come for one stream and was not taken yet.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How much may wait in one stream before its connection is read no further, in bytes.
/// Kubernetes' clients know no windows, so this is what keeps memory bounded.
pub const INBOX_BYTES: usize = 1 << 20;

/// Pieces shorter than this are copied together: one that is kept as it came keeps the
/// whole buffer it was read into.
const COPIED_BELOW: usize = 16 << 10;

/// The stream was broken off; what had come before is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has broken the stream off")]
pub struct Broken;

/// Bytes for one stream. One task puts them in, one takes them out.
#[derive(Default)]
pub struct Inbox {
    state: Mutex<State>,
    readable: Notify,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Bytes>,
    /// Short pieces, after all chunks.
    tail: BytesMut,
    bytes: usize,
    end: Option<End>,
    /// Nobody will read: what comes is forgotten.
    discard: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Orderly,
    Broken,
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts bytes in; false where they were forgotten at once.
    pub fn push(&self, bytes: Bytes) -> bool {
        let mut state = self.state();
        if state.discard || state.end.is_some() {
            return false;
        }
        state.bytes += bytes.len();
        if bytes.len() < COPIED_BELOW {
            state.tail.extend_from_slice(&bytes);
            if state.tail.len() >= COPIED_BELOW {
                let tail = state.tail.split().freeze();
                state.chunks.push_back(tail);
            }
        } else {
            if !state.tail.is_empty() {
                let tail = state.tail.split().freeze();
                state.chunks.push_back(tail);
            }
            state.chunks.push_back(bytes);
        }
        drop(state);
        self.readable.notify_one();
        true
    }

    /// Whether as much waits here as may.
    pub fn is_full(&self) -> bool {
        self.state().bytes >= INBOX_BYTES
    }

    /// No more will come.
    pub fn end(&self) {
        self.state().end.get_or_insert(End::Orderly);
        self.readable.notify_one();
    }

    /// No more will come, and what waits is lost. Gives how much that was.
    pub fn break_off(&self) -> usize {
        let mut state = self.state();
        if state.end == Some(End::Orderly) && state.bytes == 0 {
            return 0;
        }
        state.end = Some(End::Broken);
        let lost = state.forget();
        drop(state);
        self.readable.notify_one();
        lost
    }

    /// Forgets what waits and what will come. Gives how much was waiting.
    pub fn discard(&self) -> usize {
        let mut state = self.state();
        state.discard = true;
        state.forget()
    }

    /// What came next; `None` at the orderly end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The stream was broken off.
    pub async fn read(&self) -> Result<Option<Bytes>, Broken> {
        loop {
            let readable = self.readable.notified();
            {
                let mut state = self.state();
                let tail = |state: &mut State| {
                    (!state.tail.is_empty()).then(|| state.tail.split().freeze())
                };
                if let Some(bytes) = state.chunks.pop_front().or_else(|| tail(&mut state)) {
                    state.bytes -= bytes.len();
                    return Ok(Some(bytes));
                }
                match state.end {
                    Some(End::Orderly) => return Ok(None),
                    Some(End::Broken) => return Err(Broken),
                    None => {}
                }
            }
            readable.await;
        }
    }
}

impl State {
    fn forget(&mut self) -> usize {
        self.chunks.clear();
        self.tail = BytesMut::new();
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_out_in_order_whatever_their_sizes() {
        let inbox = Inbox::default();
        let mut expected = Vec::new();
        for (round, size) in [1, 20_000, 3, 16_384, 16_383, 5].into_iter().enumerate() {
            let piece = vec![round as u8; size];
            expected.extend_from_slice(&piece);
            assert!(inbox.push(piece.into()));
        }
        inbox.end();
        assert!(!inbox.push(Bytes::from_static(b"late")));
        let mut got = Vec::new();
        while let Some(bytes) = inbox.read().await.unwrap() {
            got.extend_from_slice(&bytes);
        }
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_broken_stream_says_so_and_forgets() {
        let inbox = Inbox::default();
        inbox.push(vec![0; INBOX_BYTES].into());
        assert!(inbox.is_full());
        assert_eq!(inbox.break_off(), INBOX_BYTES);
        assert!(!inbox.is_full());
        assert_eq!(inbox.read().await, Err(Broken));
    }

    #[tokio::test]
    async fn what_nobody_wants_is_not_kept() {
        let inbox = Inbox::default();
        inbox.push(Bytes::from_static(b"abc"));
        assert_eq!(inbox.discard(), 3);
        assert!(!inbox.push(Bytes::from_static(b"def")));
        inbox.end();
        assert_eq!(inbox.read().await, Ok(None));
    }
}
