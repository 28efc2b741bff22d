//! The host's way out: its MTU, and that it stays while the host forwards.

use super::LOOPBACK_INDEX;
use super::error::NetError;
use super::link::{is_device, list_links, mtu_in, name_in};
use crate::netlink::{NetlinkError, Request, Socket, parse_route};
use crate::sysctl;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

/// MTU where no interface has the default route: Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// MTU of the interface with the best default route, IPv4 before IPv6.
pub(super) fn uplink_mtu(socket: &mut Socket) -> Result<u32, NetlinkError> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let routes = list_routes(socket, family)?;
        let Some(index) = best_default(&routes) else {
            continue;
        };
        let links = list_links(socket)?;
        let uplink = links.iter().find(|link| link.header.index == index);
        if let Some(mtu) = uplink.and_then(mtu_in) {
            return Ok(mtu);
        }
    }
    Ok(DEFAULT_MTU)
}

fn list_routes(
    socket: &mut Socket,
    family: AddressFamily,
) -> Result<Vec<RouteMessage>, NetlinkError> {
    const WHAT: &str = "list routes";
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    let ask = Request::route(WHAT, 0, RouteNetlinkMessage::GetRoute(message));
    let mut routes = Vec::new();
    for answer in socket.list(&ask)? {
        // Routes of kinds that are not understood are not the one looked for.
        if let Ok(RouteNetlinkMessage::NewRoute(route)) = parse_route(WHAT, &answer) {
            routes.push(route);
        }
    }
    Ok(routes)
}

/// The interface of the default route with the lowest metric.
fn best_default(routes: &[RouteMessage]) -> Option<u32> {
    let default = |route: &&RouteMessage| {
        route.header.destination_prefix_length == 0
            && route.header.table == rtnetlink::packet_route::route::RouteHeader::RT_TABLE_MAIN
            && !route.attributes.iter().any(|attribute| {
                matches!(
                    attribute,
                    RouteAttribute::Destination(RouteAddress::Other(_))
                )
            })
    };
    let metric = |route: &RouteMessage| {
        route
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            })
    };
    let interface = |route: &RouteMessage| {
        route
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })
    };
    routes
        .iter()
        .filter(default)
        .filter_map(|route| Some((metric(route).unwrap_or(0), interface(route)?)))
        .min()
        .map(|(_, index)| index)
}

/// A host that forwards no longer listens to router advertisements where
/// `accept_ra` is 1, and would lose its own default route: on the ways out it becomes 2.
///
/// Ways out are devices, what is made of devices (VLANs, bonds, teams), and whatever an
/// advertisement has already given a default route. Nothing else: who is behind a bridge
/// or a veth pair is a container, and one that the host listens to gets the host's traffic
/// (CVE-2020-10749, CVE-2020-13401). So the default of links to come stays as it is, too.
///
/// Source: Documentation/networking/ip-sysctl.rst in Linux, `accept_ra`.
pub(super) fn keep_router_advertisements(socket: &mut Socket) -> Result<(), NetError> {
    const FORWARDING: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
    if std::fs::read_to_string(FORWARDING).is_ok_and(|value| value.trim_end() == "1") {
        return Ok(());
    }
    let routers = advertised(&list_routes(socket, AddressFamily::Inet6)?);
    for link in list_links(socket)? {
        let Some(name) = name_in(&link) else { continue };
        let index = link.header.index;
        if index == LOOPBACK_INDEX || !(is_device(&link) || routers.contains(&index)) {
            continue;
        }
        let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"));
        // An interface that went meanwhile needs nothing.
        if std::fs::read_to_string(&path).is_ok_and(|value| value.trim_end() == "1") {
            sysctl::write(&path, "2").map_err(|source| NetError::Sysctl { path, source })?;
        }
    }
    Ok(())
}

/// Interfaces that router advertisements gave a default route.
fn advertised(routes: &[RouteMessage]) -> BTreeSet<u32> {
    let of_router = |route: &&RouteMessage| {
        route.header.destination_prefix_length == 0 && route.header.protocol == RouteProtocol::Ra
    };
    let interface = |route: &RouteMessage| {
        let mut each = route.attributes.iter();
        each.find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
    };
    routes
        .iter()
        .filter(of_router)
        .filter_map(interface)
        .collect()
}

/// Stops a link of pods from taking what a pod says for a router's word, with or without
/// IPv6 addresses of its own: a link-local one is enough.
pub(super) fn ignore_router_advertisements(ifname: &str) -> Result<(), NetError> {
    let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{ifname}/accept_ra"));
    match sysctl::write(&path, "0") {
        // The kernel is without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| NetError::Sysctl { path, source }),
    }
}
