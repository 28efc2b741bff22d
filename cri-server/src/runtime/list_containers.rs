//! ListContainers, from the snapshot: it never waits for anything.

use crate::convert::{answer, filter};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;

/// Newest first.
pub fn list_containers(
    daemon: &Daemon,
    request: cri::ListContainersRequest,
) -> cri::ListContainersResponse {
    let wanted = request.filter.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut containers: Vec<_> = view
        .containers()
        .filter(|container| container.state.is_listed() && filter::container(&wanted, container))
        .map(|container| answer::container(container))
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    cri::ListContainersResponse { containers }
}
