//! RemovePodSandbox: the sandbox goes, its containers first.

use super::find;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::error::Kind;
use std::sync::Arc;
use tonic::Status;

/// A sandbox that is gone counts as removed.
pub async fn remove_pod_sandbox(
    daemon: Arc<Daemon>,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, Status> {
    let id = find::pod(&daemon.sandboxes.view(), &request.pod_sandbox_id)?;
    match daemon.sandboxes.remove_pod(&id).await {
        Err(error) if error.kind() != Kind::PodNotFound => Err(rpc::status(&error)),
        Ok(()) | Err(_) => Ok(cri::RemovePodSandboxResponse {}),
    }
}
