//! Status: whether pods can run here, and what the handlers can do.

use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::handler::BUILT_IN;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use tonic::Status;

/// RuntimeReady is true whenever there is an answer; NetworkReady is what the
/// network says at this moment.
pub async fn status(
    daemon: Arc<Daemon>,
    request: cri::StatusRequest,
) -> Result<cri::StatusResponse, Status> {
    let asked = daemon.clone();
    let verbose = request.verbose;
    let look = move || {
        let info = if verbose {
            info(&asked)
        } else {
            HashMap::new()
        };
        (asked.network.status(), info)
    };
    let (network, info) = tokio::task::spawn_blocking(look)
        .await
        .map_err(|_| Status::internal("asking for the network's status broke off"))?;
    let condition = |kind: &str, status, reason: &str, message: &str| cri::RuntimeCondition {
        r#type: kind.to_owned(),
        status,
        reason: reason.to_owned(),
        message: message.to_owned(),
    };
    let conditions = vec![
        condition("RuntimeReady", true, "", ""),
        condition(
            "NetworkReady",
            network.ready,
            &network.reason,
            &network.message,
        ),
    ];
    let user_namespaces = daemon.sandboxes.user_namespaces_missing().is_none();
    let handler = |name: &str, recursive_read_only_mounts, user_namespaces| cri::RuntimeHandler {
        name: name.to_owned(),
        features: Some(cri::RuntimeHandlerFeatures {
            recursive_read_only_mounts,
            user_namespaces,
        }),
    };
    let built_in = BUILT_IN
        .iter()
        .map(|name| handler(name, true, user_namespaces));
    let runtimes = daemon.facts.handlers.oci_runtimes();
    let foreign = runtimes.map(|(name, runtime)| {
        let can = runtime.features;
        let users = user_namespaces && can.user_namespaces;
        handler(name, can.recursive_read_only_mounts, users)
    });
    Ok(cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        info,
        runtime_handlers: built_in.chain(foreign).collect(),
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: user_namespaces,
            mount_options: true,
        }),
    })
}

/// What `crictl info` prints.
fn info(daemon: &Daemon) -> HashMap<String, String> {
    let cgroups = daemon.sandboxes.cgroups();
    let mut config = daemon.config.to_json();
    // Where things really are; "stateDir" is the name critest looks for.
    config["stateDir"] = json!(daemon.places.run);
    config["rootDir"] = json!(daemon.places.lib);
    config["socketPath"] = json!(daemon.places.socket);
    config["certsDirs"] = json!(daemon.places.certs_d);
    config["cniConfDir"] = json!(daemon.places.cni_conf_dir);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let pod_cidr = daemon.network.pod_cidr();
    let pod_cidr: Vec<String> = pod_cidr.iter().map(ToString::to_string).collect();
    let versions = json!({
        "berth": env!("CARGO_PKG_VERSION"),
        "cri": "v1",
        "kernel": kernel.trim(),
        "cgroup": format!("{:?}", cgroups.version()),
        "cgroupDriver": format!("{:?}", cgroups.driver()),
    });
    HashMap::from([
        ("config".to_owned(), config.to_string()),
        ("versions".to_owned(), versions.to_string()),
        ("podCIDR".to_owned(), pod_cidr.join(",")),
        ("network".to_owned(), daemon.network.info().to_string()),
    ])
}
