//! ReopenContainerLog: lines go to a new file once the kubelet has renamed the old one.

use super::find;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// FAILED_PRECONDITION when the container does not run.
pub async fn reopen_container_log(
    daemon: Arc<Daemon>,
    request: cri::ReopenContainerLogRequest,
) -> Result<cri::ReopenContainerLogResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    daemon
        .sandboxes
        .reopen_log(&id)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::ReopenContainerLogResponse {})
}
