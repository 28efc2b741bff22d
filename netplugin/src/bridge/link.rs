//! Requests about links, addresses and routes, and what the kernel answers.

use super::error::NetError;
use crate::netlink::{NetlinkError, Request, Socket, parse_route};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use rustix::io::Errno;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) fn new_link(what: &'static str, flags: u16, message: LinkMessage) -> Request {
    Request::route(what, flags, RouteNetlinkMessage::NewLink(message))
}

pub(super) fn new_address(what: &'static str, index: u32, address: IpAddr, prefix: u8) -> Request {
    let mut message: AddressMessage = match address {
        IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(index)
            .address(v4, prefix)
            .build(),
        IpAddr::V6(v6) => AddressMessageBuilder::<Ipv6Addr>::new()
            .index(index)
            .address(v6, prefix)
            .build(),
    };
    // Leases make sure that nobody else has it; detection would hold it back for a second,
    // and fail where the bridge gives a pod its own packets back.
    message
        .attributes
        .push(AddressAttribute::Flags(AddressFlags::Nodad));
    Request::route(
        what,
        NLM_F_CREATE | NLM_F_EXCL,
        RouteNetlinkMessage::NewAddress(message),
    )
}

pub(super) fn default_route(index: u32, gateway: IpAddr) -> Request {
    let message = match gateway {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(index)
            .gateway(v4)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
            .output_interface(index)
            .gateway(v6)
            .build(),
    };
    Request::route(
        "add the pod's default route",
        NLM_F_CREATE | NLM_F_EXCL,
        RouteNetlinkMessage::NewRoute(message),
    )
}

pub(super) fn find_link(
    socket: &mut Socket,
    name: &str,
) -> Result<Option<LinkMessage>, NetlinkError> {
    const WHAT: &str = "look for a link";
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
    let ask = Request::route(WHAT, 0, RouteNetlinkMessage::GetLink(message)).or(Errno::NODEV);
    match socket.run(&[ask])?.first() {
        None => Ok(None),
        Some(answer) => match parse_route(WHAT, answer)? {
            RouteNetlinkMessage::NewLink(link) => Ok(Some(link)),
            _ => Err(NetlinkError::Answer { what: WHAT }),
        },
    }
}

pub(super) fn list_links(socket: &mut Socket) -> Result<Vec<LinkMessage>, NetlinkError> {
    const WHAT: &str = "list links";
    let ask = Request::route(
        WHAT,
        0,
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    );
    let mut links = Vec::new();
    for answer in socket.list(&ask)? {
        if let RouteNetlinkMessage::NewLink(link) = parse_route(WHAT, &answer)? {
            links.push(link);
        }
    }
    Ok(links)
}

/// Destroys what is there of them.
pub(super) fn delete(names: &[String]) -> Result<(), NetError> {
    let mut socket = Socket::route()?;
    for batch in names.chunks(64) {
        let requests: Vec<Request> = batch.iter().map(|name| deletion(name)).collect();
        socket.run(&requests)?;
    }
    Ok(())
}

pub(super) fn deletion(name: &str) -> Request {
    let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_name(name).build());
    Request::route("remove a link", 0, message).or(Errno::NODEV)
}

pub(super) fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

/// A device of the machine's, or what is made of such: nobody gives a container's link these.
pub(super) fn is_device(link: &LinkMessage) -> bool {
    let mut infos = link
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
    let kind = infos.find_map(|infos| {
        infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        })
    });
    // The kernel names a kind for what it has made up.
    kind.is_none_or(|kind| matches!(kind, InfoKind::Vlan | InfoKind::Bond | InfoKind::Team))
}

pub(super) fn name_in(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

pub(super) fn alias_in(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfAlias(alias) => Some(alias.as_str()),
            _ => None,
        })
}

pub(super) fn mtu_in(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
}

pub(super) fn addresses_of(ifname: &str) -> Result<Vec<IpAddr>, NetlinkError> {
    const WHAT: &str = "list addresses";
    let mut socket = Socket::route()?;
    let Some(link) = find_link(&mut socket, ifname)? else {
        return Ok(Vec::new());
    };
    let ask = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut addresses = Vec::new();
    for answer in socket.list(&Request::route(WHAT, 0, ask))? {
        if let RouteNetlinkMessage::NewAddress(message) = parse_route(WHAT, &answer)?
            && message.header.index == link.header.index
        {
            addresses.extend(
                message
                    .attributes
                    .iter()
                    .filter_map(|attribute| match attribute {
                        AddressAttribute::Address(ip) => Some(*ip),
                        _ => None,
                    }),
            );
        }
    }
    Ok(addresses)
}
