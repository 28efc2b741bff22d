//! What things are called: owners of leases, links on the host, MACs.

use crate::address::to_number;
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::path::Path;

/// Longest name of an interface in bytes. Source: IFNAMSIZ in linux/if.h.
const MAX_IFNAME_BYTES: usize = 15;

/// What leases, links and host ports are known by.
pub(super) fn owner(id: &str, ifname: &str) -> String {
    format!("{id}/{ifname}")
}

/// The name of the host's end: short enough for an interface, the same each time.
pub(super) fn host_ifname(owner: &str) -> String {
    format!("bv{}", &hex::encode(Sha256::digest(owner))[..12])
}

/// The name of the device that limits what the pod sends, where there is one.
pub(super) fn ifb_ifname(owner: &str) -> String {
    format!("bi{}", &host_ifname(owner)[2..])
}

/// What marks a link as made with the state in `state_dir`, and whose it is:
/// another instance's links are not ours to collect.
pub(super) fn alias(state_dir: &Path, owner: &str) -> String {
    let state = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
    format!("berth {} {owner}", &hex::encode(state)[..12])
}

/// What the kernel takes. Source: dev_valid_name() in Linux.
pub(super) fn is_ifname(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= MAX_IFNAME_BYTES
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
}

/// A locally administered unicast MAC made of the first address: 0a:be and its
/// last four bytes.
pub(super) fn mac_of(ips: &[IpAddr]) -> Vec<u8> {
    let number = ips.first().map_or(0, |ip| to_number(*ip));
    // For IPv4 the whole address; for IPv6 as many of the low bits as there is room for.
    [&[0x0a, 0xbe], &(number as u32).to_be_bytes()[..]].concat()
}

/// The MAC of the other end of the pair of the pod with `mac`.
pub(super) fn host_mac(mac: &[u8]) -> Vec<u8> {
    let mut mac = mac.to_vec();
    if let Some(first) = mac.first_mut() {
        // Another locally administered one.
        *first ^= 0x04;
    }
    mac
}

pub(super) fn spell_mac(mac: &[u8]) -> String {
    mac.iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_local_and_follow_the_address() {
        let mac = mac_of(&["10.187.0.2".parse().unwrap()]);
        assert_eq!(spell_mac(&mac), "0a:be:0a:bb:00:02");
        let host = host_mac(&mac);
        assert_eq!(spell_mac(&host), "0e:be:0a:bb:00:02");
        for mac in [mac, host] {
            assert_eq!(mac[0] & 3, 2, "locally administered, not multicast");
        }
        let v6 = mac_of(&["fd00::1:2".parse().unwrap()]);
        assert_eq!(spell_mac(&v6), "0a:be:00:01:00:02");
    }

    #[test]
    fn names_of_interfaces_are_what_the_kernel_takes() {
        for good in ["eth0", "a", "net-1.100", "fifteen-bytes-x"] {
            assert!(is_ifname(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "sixteen-bytes-xx",
            "a:b",
            "a%d",
        ] {
            assert!(!is_ifname(bad), "{bad}");
        }
        let owner = owner(&"f".repeat(64), "eth0");
        assert!(is_ifname(&host_ifname(&owner)) && is_ifname(&ifb_ifname(&owner)));
        assert_ne!(host_ifname(&owner), ifb_ifname(&owner));
    }
}
