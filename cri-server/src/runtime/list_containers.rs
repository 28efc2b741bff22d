//! ListContainers and StreamContainers, from the snapshot: they never wait for anything.

use super::chunks::{Pieces, pieces};
use crate::convert::{answer, filter};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;

/// Newest first.
pub fn list_containers(
    daemon: &Daemon,
    request: cri::ListContainersRequest,
) -> cri::ListContainersResponse {
    cri::ListContainersResponse {
        containers: list(daemon, request.filter),
    }
}

/// The same in pieces.
pub fn stream_containers(
    daemon: &Daemon,
    request: cri::StreamContainersRequest,
) -> Pieces<cri::StreamContainersResponse> {
    pieces(list(daemon, request.filter), |containers| {
        cri::StreamContainersResponse { containers }
    })
}

fn list(daemon: &Daemon, wanted: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
    let wanted = wanted.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut containers: Vec<_> = view
        .containers()
        .filter(|container| container.state.is_listed() && filter::container(&wanted, container))
        .map(|container| answer::container(container))
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    containers
}
