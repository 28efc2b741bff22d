//! The built-in network: a bridge with the gateway's addresses, and for each
//! pod a veth pair whose other end is the pod's interface.
//!
//! add:  bridge and table are there ── leases ── veth pair ── addresses and routes ── host ports
//! del:  link down and off the bridge ── host ports ── tracked connections ── leases
//!
//! The lease comes first and goes last, so whatever a crash leaves is found by
//! its owner or by [`Bridge::gc`]. A pod's MAC is made of its address: who
//! knew the address's last owner knows the right MAC for its next one. The veth
//! pair itself goes with the pod's namespace or with [`Bridge::remove_link`].

mod error;
mod link;
mod name;
mod settings;
mod settle;
mod shaping;
mod uplink;
mod veth;

pub use error::NetError;
pub use settings::{Attach, Attachment, DEFAULT_IPV4, Settings};
pub use veth::bring_loopback_up;

use crate::address::IpNet;
use crate::conntrack::{self, Which};
use crate::hostport::HostPorts;
use crate::ipam::Ipam;
use crate::netlink::{Request, Socket};
use crate::nftables::{self, Table};
use crate::sysctl;
use berth_store::crash;
use link::{addresses_of, find_link, is_bridge, list_links, new_address, new_link};
use name::{
    alias, host_ifname, host_mac, ifb_ifname, is_ifname, link_local, mac_of, owner, spell_mac,
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};
use rustix::io::Errno;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Every namespace's loopback has it. Source: LOOPBACK_IFINDEX in Linux.
pub(crate) const LOOPBACK_INDEX: u32 = 1;

/// The built-in network.
#[derive(Debug)]
pub struct Bridge {
    settings: Settings,
    subnets: Vec<IpNet>,
    ipam: Ipam,
    ports: HostPorts,
    /// The bridge as this process made sure of it.
    made: Mutex<Option<Made>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Made {
    index: u32,
    mtu: u32,
}

impl Bridge {
    /// The network of `settings`. Only directories are made; the bridge comes
    /// with the first pod.
    ///
    /// # Errors
    /// `Settings`, and directories that cannot be made.
    pub fn open(settings: Settings) -> Result<Self, NetError> {
        let bad = |setting, why: String| Err(NetError::Settings { setting, why });
        if !is_ifname(&settings.bridge) {
            return bad(
                "bridge",
                format!("cannot be an interface's name: {:?}", settings.bridge),
            );
        }
        if let Some(net) = settings.ipv4.filter(|net| !net.is_ipv4()) {
            return bad("ipv4", format!("is {net}, an IPv6 network"));
        }
        if let Some(net) = settings.ipv6.filter(IpNet::is_ipv4) {
            return bad("ipv6", format!("is {net}, an IPv4 network"));
        }
        let subnets: Vec<IpNet> = settings
            .ipv4
            .iter()
            .chain(&settings.ipv6)
            .map(IpNet::network)
            .collect();
        if subnets.is_empty() {
            return bad(
                "ipv4",
                "and ipv6 are both absent, so pods would have no address".into(),
            );
        }
        let ipam = Ipam::open(&settings.state_dir.join("leases"), &subnets)?;
        let table = Table::new(
            &settings.bridge,
            &subnets,
            settings.masquerade.then_some(&settings.no_masquerade),
        );
        let ports = HostPorts::open(
            &settings.state_dir.join("hostports"),
            &settings.bridge,
            table,
        )?;
        Ok(Self {
            settings,
            subnets,
            ipam,
            ports,
            made: Mutex::default(),
        })
    }

    /// Whether pods can be attached: what they need beside the kernel is there.
    ///
    /// # Errors
    /// `Nft` where masquerading is wanted and there is no tool for it.
    pub fn ready(&self) -> Result<(), NetError> {
        if self.settings.masquerade {
            nftables::find()?;
        }
        Ok(())
    }

    /// Whether the bridge is there and its rules, which it needs, are not: somebody
    /// flushed the host's. Takes some 40 microseconds, and waits for nobody.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn lacks_rules(&self) -> Result<bool, NetError> {
        let bridge = find_link(&mut Socket::route()?, &self.settings.bridge)?;
        Ok(bridge.is_some_and(|link| is_bridge(&link))
            && self.ports.lacks_table(self.settings.masquerade)?)
    }

    /// Writes the rules again, with the host ports of the pods there are. Takes
    /// some ten milliseconds, longer where others hold nftables.
    ///
    /// # Errors
    /// What keeps them from being written.
    pub fn write_rules(&self) -> Result<(), NetError> {
        Ok(self.ports.ensure_table()?)
    }

    /// Gives a pod an interface. Asked again for the same one it is made anew,
    /// with the same addresses.
    ///
    /// # Errors
    /// Whatever is in the way; nothing is left behind then.
    pub fn add(&self, request: &Attach<'_>) -> Result<Attachment, NetError> {
        if !is_ifname(request.ifname) {
            return Err(NetError::BadIfname {
                name: request.ifname.into(),
            });
        }
        let made = self.ensure()?;
        if self.settings.masquerade {
            self.ports.ensure_table()?;
        }
        let owner = owner(request.id, request.ifname);
        let ips = self.ipam.acquire(&owner)?;
        let result = self
            .connect(request, &owner, made, &ips)
            .and_then(|attachment| {
                crash::point("network-linked");
                self.ports
                    .add(&owner, request.name, &ips, request.port_mappings)?;
                Ok(attachment)
            });
        result.inspect_err(|_| {
            let undone = self
                .remove_link(request.id, request.ifname)
                .and_then(|()| self.del(request.id, request.ifname));
            if let Err(error) = undone {
                tracing::warn!(
                    pod = request.id,
                    error = &error as &dyn std::error::Error,
                    "a failed attachment left something for gc"
                );
            }
        })
    }

    /// Takes a pod's interface back: its link is down and off the bridge, its
    /// host ports lead nowhere, its connections are forgotten and its addresses
    /// free. What is gone is fine. The veth pair, cut off, stays until the pod's
    /// namespace goes or [`Bridge::remove_link`] is called.
    ///
    /// # Errors
    /// The first failure; all steps are tried but freeing the addresses, which
    /// waits until the link is off.
    pub fn del(&self, id: &str, ifname: &str) -> Result<(), NetError> {
        let owner = owner(id, ifname);
        let off = veth::take_off(&owner);
        let ports = self.ports.remove(&owner);
        let forgotten = self.forget(&self.ipam.of(&owner)?);
        crash::point("network-unlinked");
        off?;
        ports?;
        forgotten?;
        self.ipam.release(&owner)?;
        Ok(())
    }

    /// Destroys the pod's veth pair; what is gone is fine. Takes the kernel
    /// some milliseconds.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_link(&self, id: &str, ifname: &str) -> Result<(), NetError> {
        let owner = owner(id, ifname);
        link::delete(&[host_ifname(&owner), ifb_ifname(&owner)])
    }

    /// Compares what a pod has with what it was given.
    ///
    /// # Errors
    /// `Changed` with the first difference.
    pub fn check(&self, id: &str, ifname: &str, netns: &Path) -> Result<(), NetError> {
        let changed = |why: String| NetError::Changed { id: id.into(), why };
        let owner = owner(id, ifname);
        let ips = self.ipam.of(&owner)?;
        if ips.len() != self.subnets.len() {
            return Err(changed(format!(
                "{} of {} leases",
                ips.len(),
                self.subnets.len()
            )));
        }
        let mut socket = Socket::route()?;
        let bridge = find_link(&mut socket, &self.settings.bridge)?
            .ok_or_else(|| changed(format!("there is no bridge {}", self.settings.bridge)))?;
        let host = host_ifname(&owner);
        let link = find_link(&mut socket, &host)?
            .ok_or_else(|| changed(format!("there is no link {host}")))?;
        if !link
            .attributes
            .contains(&LinkAttribute::Controller(bridge.header.index))
        {
            return Err(changed(format!("{host} is not on the bridge")));
        }
        if !link.header.flags.contains(LinkFlags::Up) {
            return Err(changed(format!("{host} is down")));
        }
        let has = veth::in_netns(netns, || addresses_of(ifname))??;
        match ips.iter().find(|ip| !has.contains(ip)) {
            Some(ip) => Err(changed(format!("{ifname} lacks {ip}"))),
            None => Ok(()),
        }
    }

    /// Takes back what belongs to interfaces that `live` (by ID and interface)
    /// does not know: links, host ports, leases; also leases that cannot be
    /// read. Whose it was.
    ///
    /// # Errors
    /// The last failure; all are tried.
    pub fn gc(&self, live: impl Fn(&str, &str) -> bool) -> Result<Vec<String>, NetError> {
        let is_live = |owner: &str| {
            owner
                .rsplit_once('/')
                .is_some_and(|(id, ifname)| live(id, ifname))
        };
        let mut dead: Vec<String> = Vec::new();
        let mut links = Vec::new();
        let prefix = alias(&self.settings.state_dir, "");
        for link in list_links(&mut Socket::route()?)? {
            let name = link::name_in(&link);
            let owner = link::alias_in(&link).and_then(|alias| alias.strip_prefix(&prefix));
            if let (Some(name), Some(owner)) = (name, owner)
                && !is_live(owner)
            {
                links.push(name.to_owned());
                dead.push(owner.into());
            }
        }
        let links = link::delete(&links);
        let ports = self.ports.gc(is_live);
        let leased = self.ipam.all()?;
        let lost = leased
            .iter()
            .filter(|(_, owner)| !owner.as_deref().is_some_and(is_live));
        let lost: Vec<IpAddr> = lost.map(|(ip, _)| *ip).collect();
        let forgotten = self.forget(&lost);
        links?;
        dead.extend(ports?);
        forgotten?;
        for (ip, owner) in self.ipam.gc(is_live)? {
            dead.push(owner.unwrap_or_else(|| ip.to_string()));
        }
        dead.sort();
        dead.dedup();
        Ok(dead)
    }

    /// What a person would look for on the host: the table's name.
    pub fn table(&self) -> &str {
        self.ports.table_name()
    }

    fn forget(&self, ips: &[IpAddr]) -> Result<(), NetError> {
        let which: Vec<Which> = ips.iter().copied().map(Which::Of).collect();
        conntrack::forget(&which)?;
        Ok(())
    }

    /// The bridge, made if it is not there; 20 microseconds if it is.
    fn ensure(&self) -> Result<Made, NetError> {
        let mut known = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let mut socket = Socket::route()?;
        let name = &self.settings.bridge;
        if let Some(link) = find_link(&mut socket, name)? {
            let up = link.header.flags.contains(LinkFlags::Up);
            if let Some(made) = known.filter(|made| made.index == link.header.index && up) {
                return Ok(made);
            }
        }
        *known = None;
        let mtu = match self.settings.mtu {
            Some(mtu) => mtu,
            None => uplink::uplink_mtu(&mut socket)?,
        };
        // Down until its settings are made.
        let mac = mac_of(&self.gateways());
        let create = LinkBridge::new(name)
            .mtu(mtu)
            .address(mac.to_vec())
            .down()
            .build();
        let create = new_link("make the bridge", NLM_F_CREATE | NLM_F_EXCL, create);
        socket.run(&[create.or(Errno::EXIST)])?;
        let link = find_link(&mut socket, name)?
            .filter(is_bridge)
            .ok_or_else(|| NetError::NotABridge { name: name.clone() })?;
        let index = link.header.index;
        uplink::ignore_router_advertisements(name)?;
        let mut requests: Vec<Request> = self
            .subnets
            .iter()
            .map(|subnet| {
                let what = "give the bridge its address";
                new_address(what, index, Ipam::gateway(subnet), subnet.prefix()).or(Errno::EXIST)
            })
            .collect();
        if self.settings.ipv6.is_some() {
            // Looking for a pod takes a link-local address that is past its detection. The
            // kernel would make this one only when the first pod is there, and its packets
            // would wait two seconds.
            let what = "give the bridge its link-local address";
            requests.push(new_address(what, index, link_local(&mac), 64).or(Errno::EXIST));
        }
        let up = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .mtu(mtu)
            .up()
            .build();
        requests.push(new_link("bring the bridge up", 0, up));
        socket.run(&requests)?;
        settle::until_answering(&mut socket, index, self.gateways().into_iter())?;
        self.allow_forwarding(&mut socket)?;
        let made = Made { index, mtu };
        *known = Some(made);
        Ok(made)
    }

    fn gateways(&self) -> Vec<IpAddr> {
        self.subnets.iter().map(Ipam::gateway).collect()
    }

    fn allow_forwarding(&self, socket: &mut Socket) -> Result<(), NetError> {
        let set = |path: PathBuf, value: &str| {
            sysctl::write(&path, value).map_err(|source| NetError::Sysctl { path, source })
        };
        if self.settings.ipv4.is_some() {
            set("/proc/sys/net/ipv4/ip_forward".into(), "1")?;
            // A pod that reaches itself by a host port is not to be told of a shorter way.
            let redirects = format!(
                "/proc/sys/net/ipv4/conf/{}/send_redirects",
                self.settings.bridge
            );
            set(redirects.into(), "0")?;
        }
        if self.settings.ipv6.is_some() {
            uplink::keep_router_advertisements(socket)?;
            set("/proc/sys/net/ipv6/conf/all/forwarding".into(), "1")?;
        }
        Ok(())
    }

    /// Makes the veth pair and sets up both ends.
    fn connect(
        &self,
        request: &Attach<'_>,
        owner: &str,
        made: Made,
        ips: &[IpAddr],
    ) -> Result<Attachment, NetError> {
        let mac = mac_of(ips);
        let host_mac = host_mac(&mac);
        let nets: Vec<IpNet> = ips.iter().filter_map(|ip| self.with_prefix(*ip)).collect();
        let gateways = self.gateways();
        veth::Pair {
            settings: &self.settings,
            request,
            owner,
            index: made.index,
            mtu: made.mtu,
            mac: &mac,
            host_mac: &host_mac,
            nets: &nets,
            gateways: &gateways,
        }
        .make()?;
        Ok(Attachment {
            ips: nets,
            gateways,
            mac: spell_mac(&mac),
            ifname: request.ifname.into(),
            host_mac: spell_mac(&host_mac),
            host_ifname: host_ifname(owner),
            bridge: self.settings.bridge.clone(),
            mtu: made.mtu,
        })
    }

    fn with_prefix(&self, ip: IpAddr) -> Option<IpNet> {
        let subnet = self.subnets.iter().find(|subnet| subnet.contains(ip))?;
        IpNet::new(ip, subnet.prefix())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let with = |change: fn(&mut Settings)| {
            let mut settings = Settings::new(dir.path().into());
            change(&mut settings);
            Bridge::open(settings).unwrap_err().to_string()
        };
        assert!(with(|settings| settings.bridge = "a/b".into()).contains("bridge"));
        assert!(with(|settings| settings.ipv4 = None).contains("both absent"));
        assert!(with(|settings| settings.ipv4 = "fd00::/64".parse().ok()).contains("IPv6"));
        assert!(with(|settings| settings.ipv6 = DEFAULT_IPV4.parse().ok()).contains("IPv4"));
    }
}
