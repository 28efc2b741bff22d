//! A pod's veth pair: one end on the bridge, the other the pod's interface.

use super::error::NetError;
use super::link::{self, default_route, find_link, new_address, new_link};
use super::name::{alias, host_ifname, ifb_ifname};
use super::settings::{Attach, Settings};
use super::{LOOPBACK_INDEX, settle, shaping, uplink};
use crate::address::IpNet;
use crate::netlink::{Request, Socket};
use crate::{netns, sysctl};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoPortKind, InfoVeth, LinkAttribute,
    LinkMessage,
};
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use rustix::io::Errno;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// A pair as it is to be.
pub(super) struct Pair<'a> {
    pub settings: &'a Settings,
    pub request: &'a Attach<'a>,
    pub owner: &'a str,
    /// The bridge's.
    pub index: u32,
    pub mtu: u32,
    /// The pod's.
    pub mac: &'a [u8; 6],
    /// The other end's. Given, because one that the kernel made up is changed
    /// by systemd-udevd meanwhile (`MACAddressPolicy=persistent`).
    pub host_mac: &'a [u8; 6],
    pub nets: &'a [IpNet],
    pub gateways: &'a [IpAddr],
}

impl Pair<'_> {
    /// Makes it, instead of one that a crash left or an earlier call made.
    pub fn make(&self) -> Result<(), NetError> {
        let path = self.request.netns;
        let failed = |source| NetError::Netns {
            path: path.into(),
            source,
        };
        let netns = File::open(path).map_err(failed)?;
        let host = host_ifname(self.owner);
        let requests = [
            new_link(
                "make the veth pair",
                NLM_F_CREATE | NLM_F_EXCL,
                self.veth(&host, &netns),
            ),
            new_link("set up the host's end", 0, self.host_end(&host)),
            new_link(
                "bring the host's end up",
                0,
                LinkUnspec::new_with_name(&host).up().build(),
            ),
        ];
        let mut socket = Socket::route()?;
        match socket.run(&requests) {
            Ok(_) => {}
            Err(error) if error.errno() == Some(Errno::EXIST) => {
                link::delete(&[host.clone(), ifb_ifname(self.owner)])?;
                socket.run(&requests).map_err(|error| match error.errno() {
                    Some(Errno::EXIST) => NetError::IfnameTaken {
                        ifname: self.request.ifname.into(),
                    },
                    _ => error.into(),
                })?;
            }
            Err(error) => return Err(error.into()),
        }
        if !self.request.bandwidth.is_none() {
            let alias = alias(&self.settings.state_dir, self.owner);
            let ifb = ifb_ifname(self.owner);
            shaping::limit(&mut socket, &host, &ifb, &alias, self)?;
        }
        netns::run_in(netns.as_fd(), || self.pod_end()).map_err(failed)??;
        let port = LinkUnspec::new_with_name(&host).build();
        let bridge = LinkUnspec::new_with_index(self.index).build();
        settle::until_running(&mut socket, [port, bridge])
    }

    fn veth(&self, host: &str, netns: &File) -> LinkMessage {
        // Born in the pod's namespace: an interface that is moved costs twice.
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(self.request.ifname)
            .mtu(self.mtu)
            .address(self.mac.to_vec())
            .setns_by_fd(netns.as_raw_fd())
            .build();
        LinkVeth::new(host, self.request.ifname)
            .mtu(self.mtu)
            .address(self.host_mac.to_vec())
            .controller(self.index)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build()
    }

    /// Alias, hairpin, and no IPv6 address of its own: it only passes on.
    fn host_end(&self, host: &str) -> LinkMessage {
        let mut message = LinkMessageBuilder::<LinkBridgePort>::default()
            .set_port_kind(InfoPortKind::Bridge)
            .name(host)
            .alias(alias(&self.settings.state_dir, self.owner))
            .hairpin(self.settings.hairpin)
            .build();
        message
            .attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
        message
    }

    /// Sets up the pod's end; runs in the pod's namespace.
    fn pod_end(&self) -> Result<(), NetError> {
        let ifname = self.request.ifname;
        let mut socket = Socket::route()?;
        let link = find_link(&mut socket, ifname)?.ok_or_else(|| NetError::IfnameTaken {
            ifname: ifname.into(),
        })?;
        let index = link.header.index;
        // Neighbours are pods: none of them is a router.
        uplink::ignore_router_advertisements(ifname)?;
        if self.nets.iter().any(|net| !net.is_ipv4()) {
            let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{ifname}/accept_dad"));
            sysctl::write(&path, "0").map_err(|source| NetError::Sysctl { path, source })?;
        }
        let mut requests = vec![up("bring the pod's loopback up", LOOPBACK_INDEX)];
        for net in self.nets {
            requests.push(new_address(
                "give the pod its address",
                index,
                net.address(),
                net.prefix(),
            ));
        }
        requests.push(up("bring the pod's end up", index));
        requests.extend(
            self.gateways
                .iter()
                .map(|gateway| default_route(index, *gateway)),
        );
        socket.run(&requests)?;
        settle::until_running(&mut socket, [LinkUnspec::new_with_index(index).build()])?;
        settle::until_answering(&mut socket, index, self.nets.iter().map(IpNet::address))
    }
}

/// Cuts the host's end off: down first, then off the bridge.
pub(super) fn take_off(owner: &str) -> Result<(), NetError> {
    let host = host_ifname(owner);
    let down = LinkUnspec::new_with_name(&host).down().build();
    let off = LinkUnspec::new_with_name(&host).nocontroller().build();
    Socket::route()?.run(&[
        new_link("bring the host's end down", 0, down).or(Errno::NODEV),
        new_link("take the host's end off the bridge", 0, off).or(Errno::NODEV),
        link::deletion(&ifb_ifname(owner)),
    ])?;
    Ok(())
}

/// Brings the loopback of the namespace at `netns` up.
///
/// # Errors
/// `Netns`, or what the kernel says.
pub fn bring_loopback_up(netns: &Path) -> Result<(), NetError> {
    in_netns(netns, || {
        Socket::route()?.run(&[up("bring the pod's loopback up", LOOPBACK_INDEX)])
    })??;
    Ok(())
}

pub(super) fn in_netns<T: Send>(
    netns: &Path,
    work: impl FnOnce() -> T + Send,
) -> Result<T, NetError> {
    netns::run_at(netns, work).map_err(|source| NetError::Netns {
        path: netns.into(),
        source,
    })
}

fn up(what: &'static str, index: u32) -> Request {
    let message = LinkMessageBuilder::<LinkUnspec>::new()
        .index(index)
        .up()
        .build();
    new_link(what, 0, message)
}
