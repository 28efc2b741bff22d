//! UpdateRuntimeConfig: the kubelet says which addresses the node's pods have.

use crate::convert::{Field, Refused, field::Quoted};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use std::net::IpAddr;

/// Kept for `crictl info` and logged: CNI plugins and the built-in network get
/// their subnets from their own configuration.
pub fn update_runtime_config(
    daemon: &Daemon,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<cri::UpdateRuntimeConfigResponse, Refused> {
    let network = request
        .runtime_config
        .and_then(|config| config.network_config);
    let cidr = network.map(|network| network.pod_cidr).unwrap_or_default();
    check(&cidr)?;
    if !cidr.is_empty() && daemon.set_pod_cidr(cidr.clone()) != cidr {
        tracing::info!(pod_cidr = %cidr, "the kubelet named this node's pod network");
    }
    Ok(cri::UpdateRuntimeConfigResponse {})
}

/// One subnet, or one of each family with a comma between.
fn check(cidr: &str) -> Result<(), Refused> {
    let subnet = |text: &str| {
        let (address, bits) = text.split_once('/')?;
        let most = match address.parse().ok()? {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        bits.parse::<u8>().ok().filter(|bits| *bits <= most)
    };
    if cidr.is_empty() || cidr.split(',').all(|part| subnet(part).is_some()) {
        return Ok(());
    }
    let field = Field::root("runtime_config.network_config.pod_cidr");
    Err(field.invalid(format!("{} is not a subnet", Quoted(cidr))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_network_is_one_subnet_or_one_of_each_family() {
        for good in ["", "10.244.1.0/24", "10.244.1.0/24,fd00::/64"] {
            check(good).expect(good);
        }
        for bad in ["10.244.1.0", "10.244.1.0/33", "x", ",", "10.0.0.0/8,"] {
            check(bad).expect_err(bad);
        }
    }
}
