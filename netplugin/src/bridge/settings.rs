//! How the built-in network is made, and what is asked of and given by it.

use crate::address::IpNet;
use crate::bandwidth::Bandwidth;
use crate::network::PortMapping;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where pods get their addresses unless told otherwise: a /16 that none of the
/// usual networks takes by default.
///
/// Source: the defaults of Docker (172.17.0.0/16 and on), podman (10.88), CRI-O's
/// example (10.85), flannel (10.244), Calico (192.168), k3s (10.42, 10.43),
/// kubeadm's services (10.96.0.0/12), Weave (10.32.0.0/12), AKS (10.224, 10.0).
pub const DEFAULT_IPV4: &str = "10.187.0.0/16";

/// How the built-in network is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The bridge's name, at most 15 bytes.
    pub bridge: String,
    /// Where pods get IPv4 addresses from; the first is the gateway's.
    pub ipv4: Option<IpNet>,
    /// Where pods get IPv6 addresses from; the first is the gateway's.
    pub ipv6: Option<IpNet>,
    /// Bytes; `None` takes that of the interface with the default route.
    pub mtu: Option<u32>,
    /// Whether what pods send to elsewhere leaves with the host's address.
    pub masquerade: bool,
    /// Where pods send to with their own address all the same: other nodes' pods.
    pub no_masquerade: Vec<IpNet>,
    /// Whether the bridge gives a pod its own packets back: what reaching
    /// oneself by a service needs where bridged packets pass iptables.
    pub hairpin: bool,
    /// Where leases and host ports are kept: DIR/lib/network.
    pub state_dir: PathBuf,
}

impl Settings {
    /// The defaults, with everything kept below `state_dir`.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            bridge: "berth0".into(),
            ipv4: DEFAULT_IPV4.parse().ok(),
            ipv6: None,
            mtu: None,
            masquerade: true,
            no_masquerade: Vec::new(),
            hairpin: true,
            state_dir,
        }
    }
}

/// What is wanted for an interface of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Attach<'a> {
    /// The pod's (or for the plugin the container's) ID.
    pub id: &'a str,
    /// The pod as a person knows it, for conflicts of host ports.
    pub name: &'a str,
    /// The pod's network namespace.
    pub netns: &'a Path,
    /// The interface's name in the pod, "eth0".
    pub ifname: &'a str,
    /// Host ports.
    pub port_mappings: &'a [PortMapping],
    /// How fast it may be.
    pub bandwidth: Bandwidth,
}

/// An interface a pod has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses with their subnets' prefixes, IPv4 first.
    pub ips: Vec<IpNet>,
    /// The gateway for each of `ips`.
    pub gateways: Vec<IpAddr>,
    /// Its MAC, as "0a:be:0a:bb:00:02".
    pub mac: String,
    /// Its name in the pod.
    pub ifname: String,
    /// The other end, on the bridge.
    pub host_ifname: String,
    /// The other end's MAC.
    pub host_mac: String,
    /// The bridge.
    pub bridge: String,
    /// Bytes.
    pub mtu: u32,
}
