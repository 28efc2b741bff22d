//! ContainerStatus, with what `crictl inspect` prints when asked for more.

use super::find;
use crate::convert::answer;
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::ContainerRecord;
use serde_json::{Value, json};
use std::collections::HashMap;
use tonic::Status;

/// NOT_FOUND when there is no such container.
pub async fn container_status(
    daemon: &Daemon,
    request: &cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, Status> {
    let container = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    Ok(cri::ContainerStatusResponse {
        status: Some(answer::container_status(&container)),
        info: if request.verbose {
            let sandboxes = daemon.sandboxes.clone();
            let id = container.id.to_string();
            let spec = tokio::task::spawn_blocking(move || sandboxes.runtime_spec(&id)).await;
            let spec = spec.ok().and_then(Result::ok);
            info(&container, spec.unwrap_or_default())
        } else {
            HashMap::new()
        },
    })
}

fn info(container: &ContainerRecord, runtime_spec: Value) -> HashMap<String, String> {
    let info = json!({
        "sandboxID": container.pod,
        "pid": container.state.pid().unwrap_or(0),
        "state": container.state,
        "message": container.message,
        "image": container.image.id,
        "imageRef": container.image.repo_digest,
        "cgroup": container.cgroup,
        "logPath": container.log_path,
        "config": config(container),
        "runtimeSpec": runtime_spec,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

/// The container as asked for, but for the values of its environment: they may be
/// secrets, and support bundles carry this text around.
fn config(container: &ContainerRecord) -> Value {
    let mut config = json!(container.spec);
    if let Some(Value::Array(env)) = config.get_mut("env") {
        for variable in env {
            variable["value"] = "[redacted]".into();
        }
    }
    config
}
