//! StopContainer: the stop signal, the grace period, then SIGKILL.

use super::find;
use crate::convert::Field;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::error::Kind;
use std::sync::Arc;
use tonic::Status;

/// A container that is gone counts as stopped.
pub async fn stop_container(
    daemon: Arc<Daemon>,
    request: cri::StopContainerRequest,
) -> Result<cri::StopContainerResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    let grace = rpc::seconds(&Field::root("timeout"), request.timeout)?;
    match daemon.sandboxes.stop_container(&id, grace).await {
        Err(error) if error.kind() != Kind::ContainerNotFound => Err(rpc::status(&error)),
        Ok(()) | Err(_) => Ok(cri::StopContainerResponse {}),
    }
}
