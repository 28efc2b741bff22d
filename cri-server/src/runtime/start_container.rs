//! StartContainer: the first process runs, and the log file is there.

use super::find;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// Starting what runs is not an error: a retry may come after the first call's success.
pub async fn start_container(
    daemon: Arc<Daemon>,
    request: cri::StartContainerRequest,
) -> Result<cri::StartContainerResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    daemon
        .sandboxes
        .start_container(&id)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::StartContainerResponse {})
}
