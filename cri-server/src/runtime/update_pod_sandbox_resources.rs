//! UpdatePodSandboxResources: what the kubelet has set the pod's own cgroup to.
//!
//! The cgroup is the kubelet's and is not touched: the record says what it was
//! told, for whatever is told of pods' resources.

use super::find;
use crate::convert::{Field, resources};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// What is not given stays as it is.
pub async fn update_pod_sandbox_resources(
    daemon: Arc<Daemon>,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
    let pod = find::pod_record(&daemon.sandboxes.view(), &request.pod_sandbox_id)?;
    let parse = |name: &'static str, given: &Option<cri::LinuxContainerResources>| {
        given
            .as_ref()
            .map(|given| resources::resources(&Field::root(name), given))
            .transpose()
    };
    let overhead = parse("overhead", &request.overhead)?;
    let limits = parse("resources", &request.resources)?;
    daemon
        .sandboxes
        .update_pod_resources(pod.id.as_str(), overhead, limits)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::UpdatePodSandboxResourcesResponse {})
}
