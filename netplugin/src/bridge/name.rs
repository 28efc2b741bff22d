//! What things are called: owners of leases, links on the host, MACs.

use crate::address::to_number;
use sha2::{Digest, Sha256};
use std::net::{IpAddr, Ipv6Addr};
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
pub(super) fn mac_of(ips: &[IpAddr]) -> [u8; 6] {
    let number = ips.first().map_or(0, |ip| to_number(*ip));
    // For IPv4 the whole address; for IPv6 as many of the low bits as there is room for.
    let [c, d, e, f] = (number as u32).to_be_bytes();
    [0x0a, 0xbe, c, d, e, f]
}

/// The MAC of the other end of the pair of the pod with `mac`.
pub(super) fn host_mac(mac: &[u8; 6]) -> [u8; 6] {
    let [first, rest @ ..] = *mac;
    let [b, c, d, e, f] = rest;
    // Another locally administered one.
    [first ^ 0x04, b, c, d, e, f]
}

/// The link-local address of whoever has `mac`. Source: RFC 4291, appendix A (modified EUI-64).
pub(super) fn link_local(mac: &[u8; 6]) -> IpAddr {
    let [a, b, c, d, e, f] = *mac;
    let universal = a ^ 0x02;
    Ipv6Addr::from([
        0xfe, 0x80, 0, 0, 0, 0, 0, 0, universal, b, c, 0xff, 0xfe, d, e, f,
    ])
    .into()
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
    fn a_link_local_address_is_what_the_kernel_makes_of_the_mac() {
        // The example of RFC 4291, appendix A.
        let mac = [0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        assert_eq!(link_local(&mac).to_string(), "fe80::3656:78ff:fe9a:bcde");
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
