//! ListPodSandbox and StreamPodSandboxes, from the snapshot: they never wait for anything.

use super::chunks::{Pieces, pieces};
use crate::convert::{answer, filter};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;

/// Newest first.
pub fn list_pod_sandbox(
    daemon: &Daemon,
    request: cri::ListPodSandboxRequest,
) -> cri::ListPodSandboxResponse {
    cri::ListPodSandboxResponse {
        items: list(daemon, request.filter),
    }
}

/// The same in pieces.
pub fn stream_pod_sandboxes(
    daemon: &Daemon,
    request: cri::StreamPodSandboxesRequest,
) -> Pieces<cri::StreamPodSandboxesResponse> {
    pieces(list(daemon, request.filter), |pod_sandboxes| {
        cri::StreamPodSandboxesResponse { pod_sandboxes }
    })
}

fn list(daemon: &Daemon, wanted: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
    let wanted = wanted.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut items: Vec<_> = view
        .pods()
        .filter(|pod| pod.state.is_listed() && filter::pod(&wanted, pod))
        .map(|pod| answer::pod(pod))
        .collect();
    items.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    items
}
