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

use crate::address::{IpNet, to_number};
use crate::conntrack::{self, Which};
use crate::hostport::{HostPortError, HostPorts};
use crate::ipam::{Ipam, IpamError};
use crate::netlink::{NetlinkError, Request, Socket, parse_route};
use crate::network::PortMapping;
use crate::nftables::{self, NftError, Table};
use crate::{netns, sysctl};
use berth_store::crash;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    AddressMessageBuilder, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth,
    RouteMessageBuilder,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where pods get their addresses unless told otherwise: a /16 that none of the
/// usual networks takes by default.
///
/// Source: the defaults of Docker (172.17.0.0/16 and on), podman (10.88), CRI-O's
/// example (10.85), flannel (10.244), Calico (192.168), k3s (10.42, 10.43),
/// kubeadm's services (10.96.0.0/12), Weave (10.32.0.0/12), AKS (10.224, 10.0).
pub const DEFAULT_IPV4: &str = "10.187.0.0/16";

/// MTU where no interface has the default route: Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// Longest name of an interface in bytes. Source: IFNAMSIZ in linux/if.h.
const MAX_IFNAME_BYTES: usize = 15;

/// How the built-in network is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The bridge's name, at most 15 bytes.
    pub bridge: String,
    /// Where pods get IPv4 addresses from; the first is the gateway's.
    pub ipv4: Option<IpNet>,
    /// Where pods get IPv6 addresses from; the first is the gateway's.
    pub ipv6: Option<IpNet>,
    /// Bytes; `None` takes that of the interface with the default route.
    pub mtu: Option<u32>,
    /// Whether what pods send to elsewhere leaves with the host's address.
    pub masquerade: bool,
    /// Whether the bridge gives a pod its own packets back: what reaching
    /// oneself by a service needs where bridged packets pass iptables.
    pub hairpin: bool,
    /// Where leases and host ports are kept: DIR/lib/network.
    pub state_dir: PathBuf,
}

impl Settings {
    /// The defaults, with everything kept below `state_dir`.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            bridge: "berth0".into(),
            ipv4: DEFAULT_IPV4.parse().ok(),
            ipv6: None,
            mtu: None,
            masquerade: true,
            hairpin: true,
            state_dir,
        }
    }
}

/// What is wanted for an interface of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Attach<'a> {
    /// The pod's (or for the plugin the container's) ID.
    pub id: &'a str,
    /// The pod as a person knows it, for conflicts of host ports.
    pub name: &'a str,
    /// The pod's network namespace.
    pub netns: &'a Path,
    /// The interface's name in the pod, "eth0".
    pub ifname: &'a str,
    /// Host ports.
    pub port_mappings: &'a [PortMapping],
}

/// An interface a pod has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Its addresses with their subnets' prefixes, IPv4 first.
    pub ips: Vec<IpNet>,
    /// The gateway for each of `ips`.
    pub gateways: Vec<IpAddr>,
    /// Its MAC, as "0a:be:0a:bb:00:02".
    pub mac: String,
    /// Its name in the pod.
    pub ifname: String,
    /// The other end, on the bridge.
    pub host_ifname: String,
    /// The other end's MAC.
    pub host_mac: String,
    /// The bridge.
    pub bridge: String,
    /// Bytes.
    pub mtu: u32,
}

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
        let table = Table::new(&settings.bridge, &subnets, settings.masquerade);
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
        let result = std::thread::scope(|scope| {
            let synced = scope.spawn(|| self.ipam.sync(&ips));
            let attachment = self.connect(request, made, &ips)?;
            crash::point("network-linked");
            self.ports
                .add(&owner, request.name, &ips, request.port_mappings)?;
            match synced.join() {
                Ok(synced) => synced?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
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
        let off = self.take_off(&host_ifname(&owner));
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
        delete_links(&[host_ifname(&owner(id, ifname))])
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
        let has = in_netns(netns, || addresses_of(ifname))??;
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
            let name = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                });
            let owner = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfAlias(alias) => alias.strip_prefix(&prefix),
                    _ => None,
                });
            if let (Some(name), Some(owner)) = (name, owner)
                && !is_live(owner)
            {
                links.push(name.clone());
                dead.push(owner.into());
            }
        }
        let links = delete_links(&links);
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
            None => uplink_mtu(&mut socket)?,
        };
        // Down until its settings are made.
        let create = LinkBridge::new(name)
            .mtu(mtu)
            .address(mac_of(&self.gateways()))
            .down()
            .build();
        let create = new_link("make the bridge", NLM_F_CREATE | NLM_F_EXCL, create);
        socket.run(&[create.or(Errno::EXIST)])?;
        let link = find_link(&mut socket, name)?
            .filter(is_bridge)
            .ok_or_else(|| NetError::NotABridge { name: name.clone() })?;
        let index = link.header.index;
        if self.settings.ipv6.is_some() {
            // Looking for a pod takes a link-local address that is past its detection: the
            // first pod's packets would wait two seconds for that.
            let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"));
            sysctl::write(&path, "0").map_err(|source| NetError::Sysctl { path, source })?;
        }
        let mut requests: Vec<Request> = self
            .subnets
            .iter()
            .map(|subnet| {
                let what = "give the bridge its address";
                new_address(what, index, Ipam::gateway(subnet), subnet.prefix()).or(Errno::EXIST)
            })
            .collect();
        let up = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .mtu(mtu)
            .up()
            .build();
        requests.push(new_link("bring the bridge up", 0, up));
        socket.run(&requests)?;
        self.allow_forwarding()?;
        let made = Made { index, mtu };
        *known = Some(made);
        Ok(made)
    }

    fn gateways(&self) -> Vec<IpAddr> {
        self.subnets.iter().map(Ipam::gateway).collect()
    }

    fn allow_forwarding(&self) -> Result<(), NetError> {
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
            keep_router_advertisements()?;
            set("/proc/sys/net/ipv6/conf/all/forwarding".into(), "1")?;
        }
        Ok(())
    }

    /// Makes the veth pair and sets up both ends.
    fn connect(
        &self,
        request: &Attach<'_>,
        made: Made,
        ips: &[IpAddr],
    ) -> Result<Attachment, NetError> {
        let owner = owner(request.id, request.ifname);
        let host = host_ifname(&owner);
        let mac = mac_of(ips);
        let netns = File::open(request.netns).map_err(|source| NetError::Netns {
            path: request.netns.into(),
            source,
        })?;
        let pair = self.veth(request, made, &host, &mac, &netns);
        let alias = alias(&self.settings.state_dir, &owner);
        let requests = [
            new_link("make the veth pair", NLM_F_CREATE | NLM_F_EXCL, pair),
            new_link(
                "set up the host's end",
                0,
                host_end(&host, &alias, self.settings.hairpin),
            ),
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
                // An attachment of the same name that a crash left, or a repeated one.
                delete_links(std::slice::from_ref(&host))?;
                socket.run(&requests).map_err(|error| match error.errno() {
                    Some(Errno::EXIST) => NetError::IfnameTaken {
                        ifname: request.ifname.into(),
                    },
                    _ => error.into(),
                })?;
            }
            Err(error) => return Err(error.into()),
        }
        let nets: Vec<IpNet> = ips.iter().filter_map(|ip| self.with_prefix(*ip)).collect();
        let gateways = self.gateways();
        netns::run_in(netns.as_fd(), || pod_end(request.ifname, &nets, &gateways)).map_err(
            |source| NetError::Netns {
                path: request.netns.into(),
                source,
            },
        )??;
        let host_mac = find_link(&mut socket, &host)?.as_ref().and_then(mac_in);
        Ok(Attachment {
            ips: nets,
            gateways,
            mac: spell_mac(&mac),
            ifname: request.ifname.into(),
            host_mac: host_mac.map(|mac| spell_mac(&mac)).unwrap_or_default(),
            host_ifname: host,
            bridge: self.settings.bridge.clone(),
            mtu: made.mtu,
        })
    }

    fn with_prefix(&self, ip: IpAddr) -> Option<IpNet> {
        let subnet = self.subnets.iter().find(|subnet| subnet.contains(ip))?;
        IpNet::new(ip, subnet.prefix())
    }

    fn veth(
        &self,
        request: &Attach<'_>,
        made: Made,
        host: &str,
        mac: &[u8],
        netns: &File,
    ) -> LinkMessage {
        // Born in the pod's namespace: an interface that is moved costs twice.
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(request.ifname)
            .mtu(made.mtu)
            .address(mac.to_vec())
            .setns_by_fd(netns.as_raw_fd())
            .build();
        LinkVeth::new(host, request.ifname)
            .mtu(made.mtu)
            .controller(made.index)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build()
    }

    /// Cuts the host's end off: down first, then off the bridge.
    fn take_off(&self, host: &str) -> Result<(), NetError> {
        let down = LinkUnspec::new_with_name(host).down().build();
        let off = LinkUnspec::new_with_name(host).nocontroller().build();
        Socket::route()?.run(&[
            new_link("bring the host's end down", 0, down).or(Errno::NODEV),
            new_link("take the host's end off the bridge", 0, off).or(Errno::NODEV),
        ])?;
        Ok(())
    }
}

/// What leases, links and host ports are known by.
fn owner(id: &str, ifname: &str) -> String {
    format!("{id}/{ifname}")
}

/// The name of the host's end: short enough for an interface, the same each time.
fn host_ifname(owner: &str) -> String {
    format!("bv{}", &hex::encode(Sha256::digest(owner))[..12])
}

/// What marks a link as made with the state in `state_dir`, and whose it is:
/// another instance's links are not ours to collect.
fn alias(state_dir: &Path, owner: &str) -> String {
    let state = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
    format!("berth {} {owner}", &hex::encode(state)[..12])
}

/// What the kernel takes. Source: dev_valid_name() in Linux.
fn is_ifname(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= MAX_IFNAME_BYTES
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'))
}

/// A locally administered unicast MAC made of the first address: 0a:be and its
/// last four bytes.
fn mac_of(ips: &[IpAddr]) -> Vec<u8> {
    let number = ips.first().map_or(0, |ip| to_number(*ip));
    // For IPv4 the whole address; for IPv6 as many of the low bits as there is room for.
    [&[0x0a, 0xbe], &(number as u32).to_be_bytes()[..]].concat()
}

fn spell_mac(mac: &[u8]) -> String {
    mac.iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

fn new_link(what: &'static str, flags: u16, message: LinkMessage) -> Request {
    Request::route(what, flags, RouteNetlinkMessage::NewLink(message))
}

fn new_address(what: &'static str, index: u32, address: IpAddr, prefix: u8) -> Request {
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

fn default_route(index: u32, gateway: IpAddr) -> Request {
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

/// Alias, hairpin, and no IPv6 address of its own: it only passes on.
fn host_end(host: &str, alias: &str, hairpin: bool) -> LinkMessage {
    let mut message = LinkMessageBuilder::<LinkBridgePort>::default()
        .set_port_kind(rtnetlink::packet_route::link::InfoPortKind::Bridge)
        .name(host)
        .alias(alias)
        .hairpin(hairpin)
        .build();
    message
        .attributes
        .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
        )]));
    message
}

/// Sets up the pod's end; runs in the pod's namespace.
fn pod_end(ifname: &str, nets: &[IpNet], gateways: &[IpAddr]) -> Result<(), NetError> {
    let mut socket = Socket::route()?;
    let link = find_link(&mut socket, ifname)?.ok_or_else(|| NetError::IfnameTaken {
        ifname: ifname.into(),
    })?;
    let index = link.header.index;
    if nets.iter().any(|net| !net.is_ipv4()) {
        // Neighbours are pods: none of them is a router.
        for (file, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
            let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{ifname}/{file}"));
            sysctl::write(&path, value).map_err(|source| NetError::Sysctl { path, source })?;
        }
    }
    let up = |what, index| {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .up()
            .build();
        new_link(what, 0, message)
    };
    let mut requests = vec![up("bring the pod's loopback up", LOOPBACK_INDEX)];
    for net in nets {
        requests.push(new_address(
            "give the pod its address",
            index,
            net.address(),
            net.prefix(),
        ));
    }
    requests.push(up("bring the pod's end up", index));
    requests.extend(
        gateways
            .iter()
            .map(|gateway| default_route(index, *gateway)),
    );
    socket.run(&requests)?;
    Ok(())
}

/// Every namespace's loopback has it. Source: LOOPBACK_IFINDEX in Linux.
pub(crate) const LOOPBACK_INDEX: u32 = 1;

/// Brings the loopback of the namespace at `netns` up.
///
/// # Errors
/// `Netns`, or what the kernel says.
pub fn bring_loopback_up(netns: &Path) -> Result<(), NetError> {
    in_netns(netns, || {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(LOOPBACK_INDEX)
            .up()
            .build();
        Socket::route()?.run(&[new_link("bring the pod's loopback up", 0, message)])
    })??;
    Ok(())
}

fn in_netns<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    netns::run_at(netns, work).map_err(|source| NetError::Netns {
        path: netns.into(),
        source,
    })
}

fn find_link(socket: &mut Socket, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
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

fn list_links(socket: &mut Socket) -> Result<Vec<LinkMessage>, NetlinkError> {
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

fn delete_links(names: &[String]) -> Result<(), NetError> {
    let delete = |name: &String| {
        let message = RouteNetlinkMessage::DelLink(LinkUnspec::new_with_name(name).build());
        Request::route("remove a link", 0, message).or(Errno::NODEV)
    };
    let mut socket = Socket::route()?;
    for batch in names.chunks(64) {
        socket.run(&batch.iter().map(delete).collect::<Vec<_>>())?;
    }
    Ok(())
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

fn mac_in(link: &LinkMessage) -> Option<Vec<u8>> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => Some(mac.clone()),
            _ => None,
        })
}

fn addresses_of(ifname: &str) -> Result<Vec<IpAddr>, NetlinkError> {
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

/// MTU of the interface with the best default route, IPv4 before IPv6.
fn uplink_mtu(socket: &mut Socket) -> Result<u32, NetlinkError> {
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
        let mtu = uplink.and_then(|link| {
            link.attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Mtu(mtu) => Some(*mtu),
                    _ => None,
                })
        });
        if let Some(mtu) = mtu {
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
fn keep_router_advertisements() -> Result<(), NetError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_local_and_follow_the_address() {
        let mac = mac_of(&["10.187.0.2".parse().unwrap()]);
        assert_eq!(spell_mac(&mac), "0a:be:0a:bb:00:02");
        assert_eq!(mac[0] & 3, 2, "locally administered, not multicast");
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
        assert!(is_ifname(&host_ifname(&owner(&"f".repeat(64), "eth0"))));
    }

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
