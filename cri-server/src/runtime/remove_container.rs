//! RemoveContainer: the container goes, killed first where it still runs.

use super::find;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::error::Kind;
use std::sync::Arc;
use tonic::Status;

/// A container that is gone counts as removed.
pub async fn remove_container(
    daemon: Arc<Daemon>,
    request: cri::RemoveContainerRequest,
) -> Result<cri::RemoveContainerResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    match daemon.sandboxes.remove_container(&id).await {
        Err(error) if error.kind() != Kind::ContainerNotFound => Err(rpc::status(&error)),
        Ok(()) | Err(_) => Ok(cri::RemoveContainerResponse {}),
    }
}
