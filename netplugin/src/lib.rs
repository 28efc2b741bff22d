//! The network of pods: a bridge of Berth's own, and every CNI plugin.
//!
//! [`Network`] is what the rest of Berth uses: it attaches a pod's network
//! namespace, says what addresses it got, and takes it all back. Which way it
//! goes is decided by the CNI configuration directory at each call: a conflist
//! there means its plugins, none means the built-in [`bridge::Bridge`].
//!
//! Everything blocks; async callers enter it by `spawn_blocking`. "The host" is
//! the network namespace of the calling process, whichever that is.
#![forbid(unsafe_code)]

pub mod address;
pub mod attached;
pub mod bandwidth;
pub mod bridge;
pub mod client;
pub mod conf;
pub mod conntrack;
mod gate;
pub mod hostport;
pub mod ipam;
pub mod netlink;
pub mod netns;
pub mod network;
pub mod nftables;
pub mod offer;
pub mod plugin;
pub mod pod_cidr;
pub mod preflight;
pub mod process;
mod readiness;
mod repair;
pub mod result;
pub mod runtime_config;
pub mod spec;
pub mod sysctl;
pub mod template;

pub use address::IpNet;
pub use network::{
    AttachRequest, AttachResult, Collected, DetachRequest, Dns, Mode, Network, NetworkError,
    NetworkSettings, NetworkStatus, Pod, PortMapping, Primary, Protocol,
};

/// Where a test can make the process die (`berth_store::crash`), in order: the
/// address is leased; the veth pair is there; the host ports are recorded; the
/// link is off again; CNI's ADD is recorded, is through; CNI's DEL is through.
pub const CRASH_POINTS: [&str; 7] = [
    "network-leased",
    "network-linked",
    "network-hostports-recorded",
    "network-unlinked",
    "network-add-recorded",
    "network-added",
    "network-deleted",
];
