//! The built-in network.

use crate::address::IpNet;
use std::path::PathBuf;

/// How the built-in network is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The bridge's name, at most 15 bytes.
    pub bridge: String,
    /// Where pods get IPv4 addresses from.
    pub ipv4: Option<IpNet>,
    /// Where pods get IPv6 addresses from.
    pub ipv6: Option<IpNet>,
    /// Bytes; `None` takes that of the interface with the default route.
    pub mtu: Option<u32>,
    /// Whether what pods send to elsewhere leaves with the host's address.
    pub masquerade: bool,
    /// Whether a pod can reach itself over the bridge.
    pub hairpin: bool,
    /// Where leases and host ports are kept: DIR/lib/network.
    pub state_dir: PathBuf,
}

impl Settings {
    /// The defaults, with everything kept below `state_dir`.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            bridge: "berth0".into(),
            ipv4: IpNet::new([10, 187, 0, 0].into(), 16),
            ipv6: None,
            mtu: None,
            masquerade: true,
            hairpin: true,
            state_dir,
        }
    }
}
