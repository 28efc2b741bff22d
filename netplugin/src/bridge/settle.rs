//! Waiting for what the kernel puts off to a worker of its own once a link or an address
//! has been made: microseconds, and milliseconds on a busy machine. A packet that comes
//! before is dropped; a neighbour's question for an IPv6 address is repeated a second later.

use super::error::NetError;
use crate::netlink::{Request, Socket, parse_route};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// How long the kernel may take. Late, it loses the pod its first packet, and no more.
const DEADLINE: Duration = Duration::from_millis(100);

/// Between two looks.
const PAUSE: Duration = Duration::from_micros(100);

/// Waits until packets pass at `links`. Looking at one makes the kernel turn it on at once
/// (rtnl_getlink() in Linux 6.8 and later).
pub(super) fn until_running<const N: usize>(
    socket: &mut Socket,
    links: [LinkMessage; N],
) -> Result<(), NetError> {
    const WHAT: &str = "look whether the pod's link is up";
    let ask = links.map(|link| Request::route(WHAT, 0, RouteNetlinkMessage::GetLink(link)));
    until(|| {
        let mut running = true;
        for answer in socket.run(&ask)? {
            if let RouteNetlinkMessage::NewLink(link) = parse_route(WHAT, &answer)? {
                running &= link.header.flags.contains(LinkFlags::Running);
            }
        }
        Ok(running)
    })
}

/// Waits until neighbours who ask for one of `addresses` of the link `index` are heard: its
/// solicited-node groups are joined. IPv4 asks by broadcast, which is always heard.
/// Source: RFC 4861, section 7.2.1; addrconf_dad_work() in Linux.
pub(super) fn until_answering(
    socket: &mut Socket,
    index: u32,
    addresses: impl Iterator<Item = IpAddr>,
) -> Result<(), NetError> {
    let wanted: Vec<Ipv6Addr> = addresses
        .filter_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => Some(solicited_node(v6)),
        })
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    until(|| {
        let joined = groups(socket, index)?;
        Ok(wanted.iter().all(|group| joined.contains(group)))
    })
}

/// The group that the owner of `address` listens to. Source: RFC 4291, section 2.7.1.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// The IPv6 groups that the link `index` has joined.
fn groups(socket: &mut Socket, index: u32) -> Result<Vec<Ipv6Addr>, NetError> {
    const RTM_GETMULTICAST: u16 = 58;
    const IFA_MULTICAST: u16 = 7;
    const AF_INET6: u8 = 10;
    /// family u8 | prefix u8 | flags u8 | scope u8 | index u32. Source: linux/if_addr.h.
    const IFADDRMSG_BYTES: usize = 8;
    let mut ask = vec![AF_INET6, 0, 0, 0];
    ask.extend(index.to_ne_bytes());
    let ask = Request::raw(
        "look which groups a link has joined",
        RTM_GETMULTICAST,
        0,
        ask,
    );
    let mut joined = Vec::new();
    socket.each(&ask, |_, payload| {
        let Some((header, rest)) = payload.split_first_chunk::<IFADDRMSG_BYTES>() else {
            return;
        };
        if header[4..] != index.to_ne_bytes() {
            return;
        }
        let found = crate::netlink::attributes(rest).find(|(kind, _)| *kind == IFA_MULTICAST);
        if let Some(group) = found.and_then(|(_, value)| value.first_chunk::<16>()) {
            joined.push(Ipv6Addr::from(*group));
        }
    })?;
    Ok(joined)
}

fn until(mut done: impl FnMut() -> Result<bool, NetError>) -> Result<(), NetError> {
    let deadline = Instant::now() + DEADLINE;
    while !done()? && Instant::now() < deadline {
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_an_address_ends_in_its_last_three_bytes() {
        // The example of RFC 4291, section 2.7.1.
        let address = "4037::01:800:200e:8c6c".parse().unwrap();
        let group: Ipv6Addr = "ff02::1:ff0e:8c6c".parse().unwrap();
        assert_eq!(solicited_node(address), group);
    }
}
