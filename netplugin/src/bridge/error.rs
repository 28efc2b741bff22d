//! Why the built-in network failed a pod.

use crate::hostport::HostPortError;
use crate::ipam::IpamError;
use crate::netlink::NetlinkError;
use crate::nftables::NftError;
use std::io;
use std::path::PathBuf;

/// Why the built-in network failed a pod.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The settings cannot work.
    #[error("the bridge's setting {setting} {why}")]
    Settings {
        /// Which one.
        setting: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The name belongs to something else.
    #[error("the interface {name} exists and is no bridge")]
    NotABridge {
        /// Its name.
        name: String,
    },
    /// A name that no interface can have.
    #[error("{name:?} cannot be an interface's name")]
    BadIfname {
        /// The name.
        name: String,
    },
    /// The pod's namespace cannot be used.
    #[error("cannot enter the network namespace {path}")]
    Netns {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pod already has an interface of that name from elsewhere.
    #[error("the pod already has an interface {ifname}")]
    IfnameTaken {
        /// The name.
        ifname: String,
    },
    /// What CHECK found.
    #[error("the attachment of {id} is not as it was made: {why}")]
    Changed {
        /// Whose.
        id: String,
        /// The first difference.
        why: String,
    },
    /// A kernel setting.
    #[error("cannot set {path}")]
    Sysctl {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel lacks what limits need: tbf, ifb, u32, mirred.
    #[error("this kernel cannot limit the pod's bandwidth")]
    NoShaping(#[source] NetlinkError),
    /// Links, addresses, routes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Addresses.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// Host ports, and the rules.
    #[error(transparent)]
    HostPorts(#[from] HostPortError),
    /// The tool the rules need.
    #[error(transparent)]
    Nft(#[from] NftError),
}
