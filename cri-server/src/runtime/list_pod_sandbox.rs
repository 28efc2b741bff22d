//! ListPodSandbox, from the snapshot: it never waits for anything.

use crate::convert::{answer, filter};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;

/// Newest first.
pub fn list_pod_sandbox(
    daemon: &Daemon,
    request: cri::ListPodSandboxRequest,
) -> cri::ListPodSandboxResponse {
    let wanted = request.filter.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut items: Vec<_> = view
        .pods()
        .filter(|pod| pod.state.is_listed() && filter::pod(&wanted, pod))
        .map(|pod| answer::pod(pod))
        .collect();
    items.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    cri::ListPodSandboxResponse { items }
}
