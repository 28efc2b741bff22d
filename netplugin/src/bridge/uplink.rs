//! The host's way out: its MTU, and that it stays while the host forwards.

use super::error::NetError;
use super::link::{list_links, mtu_in};
use crate::netlink::{NetlinkError, Request, Socket, parse_route};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::path::{Path, PathBuf};

/// MTU where no interface has the default route: Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// MTU of the interface with the best default route, IPv4 before IPv6.
pub(super) fn uplink_mtu(socket: &mut Socket) -> Result<u32, NetlinkError> {
    const WHAT: &str = "list routes";
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
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
/// `accept_ra` is 1, and would lose its own default route: there it becomes 2.
///
/// Source: Documentation/networking/ip-sysctl.rst in Linux, `accept_ra`.
pub(super) fn keep_router_advertisements() -> Result<(), NetError> {
    const FORWARDING: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
    if std::fs::read_to_string(FORWARDING).is_ok_and(|value| value.trim_end() == "1") {
        return Ok(());
    }
    let dir = PathBuf::from("/proc/sys/net/ipv6/conf");
    let error = |path: &Path, source| NetError::Sysctl {
        path: path.into(),
        source,
    };
    for entry in std::fs::read_dir(&dir).map_err(|source| error(&dir, source))? {
        let path = entry
            .map_err(|source| error(&dir, source))?
            .path()
            .join("accept_ra");
        // An interface that went meanwhile needs nothing.
        if std::fs::read_to_string(&path).is_ok_and(|value| value.trim_end() == "1") {
            std::fs::write(&path, "2").map_err(|source| error(&path, source))?;
        }
    }
    Ok(())
}
