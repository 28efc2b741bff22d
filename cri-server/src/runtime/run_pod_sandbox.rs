//! RunPodSandbox: a pod that is READY when the answer goes out.

use crate::convert;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// A repeated call with the same metadata joins the running one.
pub async fn run_pod_sandbox(
    daemon: Arc<Daemon>,
    request: cri::RunPodSandboxRequest,
) -> Result<cri::RunPodSandboxResponse, Status> {
    let spec = convert::pod_spec(&request, &daemon.facts)?;
    let id = daemon
        .sandboxes
        .run_pod(spec)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::RunPodSandboxResponse {
        pod_sandbox_id: id.to_string(),
    })
}
