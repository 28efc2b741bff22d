//! What on a host keeps the built-in network from working though it is all there:
//! routes that lead pods' addresses elsewhere, and firewalls that drop what is
//! forwarded. Looks, changes nothing.
//!
//! Source: proc_pid_net(5), `route` and `ipv6_route`; libnftables-json(5).

use crate::address::IpNet;
use crate::nftables::{self, NftError};
use crate::process::{self, ProcessError};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

/// Longest that listing a ruleset may take: kube-proxy's have tens of thousands of lines.
const LIST_DEADLINE: Duration = Duration::from_secs(10);

/// A route of the host that pods' addresses are in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Where it leads to.
    pub route: IpNet,
    /// By which interface.
    pub interface: String,
    /// The pods' subnet.
    pub subnet: IpNet,
}

/// Routes, other than default ones and the bridge's own, that overlap with
/// `subnets`: what is there would not be reached from pods, or pods not from the host.
pub fn overlaps(bridge: &str, subnets: &[IpNet]) -> Vec<Overlap> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut routes = parse_routes4(&read("/proc/net/route"));
    routes.extend(parse_routes6(&read("/proc/net/ipv6_route")));
    find_overlaps(&routes, bridge, subnets)
}

fn find_overlaps(routes: &[(IpNet, String)], bridge: &str, subnets: &[IpNet]) -> Vec<Overlap> {
    let mut found = Vec::new();
    for (route, interface) in routes {
        if route.prefix() == 0 || interface == bridge || interface == "lo" {
            continue;
        }
        let meets = |subnet: &&IpNet| {
            subnet.contains(route.network().address()) || route.contains(subnet.network().address())
        };
        if let Some(subnet) = subnets.iter().find(meets) {
            found.push(Overlap {
                route: *route,
                interface: interface.clone(),
                subnet: *subnet,
            });
        }
    }
    found
}

/// Interface, destination, gateway, flags, three numbers, mask; addresses as the
/// machine has them in memory.
fn parse_routes4(text: &str) -> Vec<(IpNet, String)> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let interface = words.next()?.to_owned();
        let number = |word: &str| u32::from_str_radix(word, 16).ok();
        let destination = number(words.next()?)?;
        let mask = number(words.nth(5)?)?;
        let address = IpAddr::V4(Ipv4Addr::from(destination.to_ne_bytes()));
        let prefix = u8::try_from(mask.count_ones()).ok()?;
        Some((IpNet::new(address, prefix)?, interface))
    };
    text.lines().skip(1).filter_map(line).collect()
}

/// Destination, its prefix length, eight columns more, the last the interface.
fn parse_routes6(text: &str) -> Vec<(IpNet, String)> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let address = Ipv6Addr::from(u128::from_str_radix(words.first()?, 16).ok()?);
        let prefix = u8::from_str_radix(words.get(1)?, 16).ok()?;
        Some((
            IpNet::new(address.into(), prefix)?,
            (*words.last()?).to_owned(),
        ))
    };
    text.lines().filter_map(line).collect()
}

/// Chains that drop what is forwarded, unless one of their rules lets it through,
/// in tables that nowhere name the bridge or a subnet: "ip filter FORWARD".
///
/// # Errors
/// Where there is no `nft`, or it fails.
pub fn closed_chains(bridge: &str, subnets: &[IpNet]) -> Result<Vec<String>, NftError> {
    let chains = list(&["-j", "list", "chains"])?;
    let mut closed = Vec::new();
    for (family, table, chain) in dropping(&chains) {
        let rules = list(&["list", "table", &family, &table])?;
        let known = subnets.iter().map(|subnet| subnet.network().to_string());
        if !known
            .chain([bridge.into()])
            .any(|name| rules.contains(&name))
        {
            closed.push(format!("{family} {table} {chain}"));
        }
    }
    Ok(closed)
}

/// Family, table and name of the forwarding chains whose policy is to drop.
fn dropping(chains: &str) -> Vec<(String, String, String)> {
    let chains: Value = serde_json::from_str(chains).unwrap_or_default();
    let objects = chains["nftables"].as_array().into_iter().flatten();
    objects
        .filter_map(|object| {
            let chain = &object["chain"];
            let text = |key: &str| chain[key].as_str().map(str::to_owned);
            let routed = matches!(chain["family"].as_str(), Some("ip" | "ip6" | "inet"));
            (routed && chain["hook"] == "forward" && chain["policy"] == "drop")
                .then(|| Some((text("family")?, text("table")?, text("name")?)))?
        })
        .collect()
}

fn list(arguments: &[&str]) -> Result<String, NftError> {
    let mut command = Command::new(nftables::find()?);
    command.args(arguments).env_clear();
    let done = process::run(&mut command, &[], LIST_DEADLINE);
    match done {
        Ok(done) if done.status.success() => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        Ok(done) => Err(NftError::Refused {
            table: arguments.join(" "),
            message: String::from_utf8_lossy(&done.stderr).trim().to_owned(),
        }),
        // More than is read: a table that large is a cluster's, which lets pods through.
        Err(ProcessError::TooMuch { .. }) => Ok(String::new()),
        Err(error) => Err(NftError::Run(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn routes_are_read_as_proc_has_them() {
        let v4 = parse_routes4(
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
             eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
             vpn0\t0000BB0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\nbroken\n",
        );
        if cfg!(target_endian = "little") {
            assert_eq!(
                v4,
                [
                    (net("0.0.0.0/0"), "eth0".to_owned()),
                    (net("10.187.0.0/16"), "vpn0".to_owned())
                ]
            );
        }
        let v6 = parse_routes6(
            "fd770000000000000000000000000000 40 00000000000000000000000000000000 00 \
             00000000000000000000000000000000 00000100 00000001 00000000 00000001 berth0\nbroken\n",
        );
        assert_eq!(v6, [(net("fd77::/64"), "berth0".to_owned())]);
    }

    #[test]
    fn what_overlaps_is_found_either_way_around() {
        let routes = [
            ("0.0.0.0/0", "eth0"),
            ("10.0.0.0/8", "vpn0"),
            ("10.187.3.0/24", "docker0"),
            ("10.187.0.0/16", "berth0"),
            ("10.188.0.0/16", "eth1"),
            ("fd00::/8", "wg0"),
        ];
        let routes = routes.map(|(route, interface)| (net(route), interface.to_owned()));
        let subnets = [net("10.187.0.0/16"), net("fd77::/64")];
        let found = find_overlaps(&routes, "berth0", &subnets);
        let found: Vec<&str> = found.iter().map(|one| &*one.interface).collect();
        assert_eq!(found, ["vpn0", "docker0", "wg0"]);
    }

    #[test]
    fn chains_that_drop_what_is_forwarded_are_found() {
        let chains = r#"{"nftables":[{"metainfo":{"version":"1"}},
            {"chain":{"family":"ip","table":"filter","name":"FORWARD","type":"filter","hook":"forward","prio":0,"policy":"drop"}},
            {"chain":{"family":"ip","table":"filter","name":"INPUT","type":"filter","hook":"input","prio":0,"policy":"drop"}},
            {"chain":{"family":"inet","table":"x","name":"f","type":"filter","hook":"forward","prio":0,"policy":"accept"}},
            {"chain":{"family":"bridge","table":"x","name":"f","type":"filter","hook":"forward","prio":0,"policy":"drop"}}]}"#;
        let found = dropping(chains);
        assert_eq!(
            found,
            [("ip".into(), "filter".into(), "FORWARD".into())] as [(String, String, String); 1]
        );
        assert!(dropping("").is_empty() && dropping("[1]").is_empty());
    }
}
