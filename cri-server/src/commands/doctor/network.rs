//! Whether something on the host is in the built-in network's way.

use super::{Finding, Node};
use crate::rpc::chain;
use berth_netplugin::{IpNet, preflight};

const SUBJECT: &str = "pod network";

/// Routes and firewalls. What a CNI configuration names has its own ways.
pub fn built_in(node: &Node<'_>) -> Vec<Finding> {
    let bridge = &node.config.network.bridge;
    let subnets = node.config.network.subnets.iter();
    // Checked when the configuration was read.
    let subnets: Vec<IpNet> = subnets.filter_map(|net| net.parse().ok()).collect();
    let mut findings = Vec::new();
    for overlap in preflight::overlaps(bridge, &subnets) {
        let found = format!(
            "the route to {} by {} overlaps with the pods' {}",
            overlap.route, overlap.interface, overlap.subnet
        );
        let advice = "set network.subnets to something that is free here";
        findings.push(Finding::warning(SUBJECT, found, advice));
    }
    match preflight::closed_chains(bridge, &subnets) {
        Ok(closed) => findings.extend(closed.into_iter().map(|chain| {
            let found = format!("the nftables chain {chain} drops what is forwarded");
            let advice = format!("let through what comes in or goes out by {bridge}");
            Finding::warning(SUBJECT, found, advice)
        })),
        // That there is none is told apart.
        Err(berth_netplugin::nftables::NftError::Missing) => {}
        Err(error) => {
            let advice = "run `nft list ruleset`: pods' traffic needs it to work";
            findings.push(Finding::warning(SUBJECT, chain(&error), advice));
        }
    }
    if findings.is_empty() {
        let found = "no route and no firewall of this host is in its way";
        findings.push(Finding::good(SUBJECT, found));
    }
    findings
}
