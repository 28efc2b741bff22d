//! UpdateRuntimeConfig: the kubelet says which addresses the node's pods have.

use crate::convert::{Field, Refused, field::Quoted};
use crate::daemon::Daemon;
use crate::rpc::chain;
use berth_netplugin::IpNet;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// Kept over restarts, shown by `crictl info`, offered to CNI plugins that ask for
/// address ranges, and what a configured CNI template is made with. The built-in
/// network gets its subnets from its own configuration.
pub async fn update_runtime_config(
    daemon: Arc<Daemon>,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<cri::UpdateRuntimeConfigResponse, Status> {
    let network = request
        .runtime_config
        .and_then(|config| config.network_config);
    let cidr = network.map(|network| network.pod_cidr).unwrap_or_default();
    let subnets = parse(&cidr)?;
    if !subnets.is_empty() && daemon.network.pod_cidr() != subnets {
        tracing::info!(pod_cidr = %cidr, "the kubelet named this node's pod network");
    }
    let set = tokio::task::spawn_blocking(move || match subnets.is_empty() {
        true => Ok(()),
        false => daemon.network.set_pod_cidr(&subnets),
    });
    set.await
        .map_err(|_| Status::internal("taking note of the pod network broke off"))?
        .map_err(|error| Status::internal(chain(&error)))?;
    Ok(cri::UpdateRuntimeConfigResponse {})
}

/// One subnet, or one of each family with a comma between.
fn parse(cidr: &str) -> Result<Vec<IpNet>, Refused> {
    if cidr.is_empty() {
        return Ok(Vec::new());
    }
    let subnets = cidr.split(',').map(|part| part.trim().parse::<IpNet>());
    subnets
        .map(|subnet| subnet.map(|subnet| subnet.network()))
        .collect::<Result<_, _>>()
        .map_err(|_| {
            let field = Field::root("runtime_config.network_config.pod_cidr");
            field.invalid(format!("{} is not a subnet", Quoted(cidr)))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_network_is_one_subnet_or_one_of_each_family() {
        for good in ["", "10.244.1.0/24", "10.244.1.0/24,fd00::/64"] {
            parse(good).expect(good);
        }
        for bad in ["10.244.1.0", "10.244.1.0/33", "x", ",", "10.0.0.0/8,"] {
            parse(bad).expect_err(bad);
        }
    }
}
