//! PodSandboxStatus, with its containers' statuses and, verbose, what `crictl
//! inspectp` prints.

use super::find;
use crate::convert::answer;
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::pod::PodRecord;
use serde_json::json;
use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::Status;

/// NOT_FOUND when there is no such sandbox.
pub fn pod_sandbox_status(
    daemon: &Daemon,
    request: &cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, Status> {
    let view = daemon.sandboxes.view();
    let pod = find::pod_record(&view, &request.pod_sandbox_id)?;
    let mut containers: Vec<_> = view
        .containers_of(&pod.id)
        .filter(|container| container.state.is_listed())
        .map(|container| answer::container_status(container))
        .collect();
    containers.sort_by_key(|container| container.created_at);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(cri::PodSandboxStatusResponse {
        status: Some(answer::pod_status(&pod)),
        info: if request.verbose {
            info(daemon, &pod)
        } else {
            HashMap::new()
        },
        containers_statuses: containers,
        timestamp: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
    })
}

fn info(daemon: &Daemon, pod: &PodRecord) -> HashMap<String, String> {
    let network = |part: &str| pod.network.as_ref().and_then(|network| network.get(part));
    let info = json!({
        "state": pod.state,
        "message": pod.message,
        "runDirectory": daemon.places.run.join("sandboxes").join(pod.id.as_str()),
        "cgroup": pod.cgroup,
        "ips": pod.ips,
        "cniResult": network("result"),
        "network": network("list"),
        "runtimeHandler": pod.spec.runtime_handler,
        "bootId": pod.boot_id,
        "config": pod.spec,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}
