//! Ports of the host that lead to pods.
//!
//! ```text
//! DIR/hostports/<hash of the owner>    one record per pod that has any
//! DIR/hostports/.lock                  held by whoever changes one
//! ```
//!
//! The record is there before its elements are in the table's maps and goes
//! after them, so it always says what has to be taken out. The maps are made
//! from the records whenever the table itself has to be made again.
//!
//! A port is reached from outside, from the host by any address of its own (in
//! IPv4 also 127.0.0.1: `route_localnet` is set on the bridge alone, and the
//! table drops what comes from there to or from 127.0.0.0/8), and from pods.

use crate::conntrack::{self, Which};
use crate::netlink::NetlinkError;
use crate::network::{PortMapping, Protocol};
use crate::nftables::{Element, NftError, Table, number, word};
use crate::sysctl;
use berth_store::atomic_file::{Durability, is_temporary};
use berth_store::{Record, RecordError, crash, record};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Why a host port leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum HostPortError {
    /// Two pods want it.
    #[error("host port {port} is in use by pod {holder}")]
    Conflict {
        /// As "80/tcp" or "192.0.2.1:80/tcp".
        port: String,
        /// The other pod.
        holder: String,
    },
    /// The mapping has no sense.
    #[error("host port {port} {why}")]
    Invalid {
        /// As in `Conflict`.
        port: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The rules.
    #[error("cannot change the rules of the host ports")]
    Rules(#[source] NftError),
    /// The directory or its lock.
    #[error("cannot {action} {path}")]
    Io {
        /// "read", "lock".
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The record of a pod's ports.
    #[error("cannot keep the host ports of {owner}")]
    Record {
        /// Whose.
        owner: String,
        /// Why not.
        source: RecordError,
    },
    /// Old connections still go where they went.
    #[error("cannot make connections forget their way")]
    Connections(#[source] NetlinkError),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ports {
    owner: String,
    /// The pod as a person knows it.
    name: String,
    ips: Vec<IpAddr>,
    mappings: Vec<PortMapping>,
}

impl Record for Ports {
    const KIND: &'static str = "hostports";
    const VERSION: u32 = 1;
}

/// The host ports of a bridge's pods, and the table they are in.
#[derive(Debug)]
pub struct HostPorts {
    dir: PathBuf,
    bridge: String,
    table: Table,
}

/// All that is recorded, while the lock is held.
struct Records {
    good: Vec<Ports>,
    damaged: Vec<PathBuf>,
    /// Unlocked as it is closed.
    _lock: File,
}

impl HostPorts {
    /// The host ports recorded in `dir`.
    ///
    /// # Errors
    /// `Io` where it cannot be made.
    pub fn open(dir: &Path, bridge: &str, table: Table) -> Result<Self, HostPortError> {
        std::fs::create_dir_all(dir).map_err(|source| HostPortError::Io {
            action: "make",
            path: dir.into(),
            source,
        })?;
        Ok(Self {
            dir: dir.into(),
            bridge: bridge.into(),
            table,
        })
    }

    /// The table's name, in the family inet.
    pub fn table_name(&self) -> &str {
        self.table.name()
    }

    /// Makes sure of the table; what takes 20 microseconds when it is there.
    ///
    /// # Errors
    /// `Rules`, and what the records' directory gives.
    pub fn ensure_table(&self) -> Result<(), HostPortError> {
        if self.table.is_current().map_err(HostPortError::Rules)? {
            return Ok(());
        }
        let records = self.lock()?;
        // Whoever had the lock may have written it.
        if self.table.is_current().map_err(HostPortError::Rules)? {
            return Ok(());
        }
        self.table
            .replace(&elements(&records.good))
            .map_err(HostPortError::Rules)
    }

    /// Whether the table is gone, or another one than it should be, though
    /// something needs it: masquerading, a pod's host ports, or that the bridge
    /// takes addresses of 127.0.0.0/8, as it does since the first host port.
    ///
    /// # Errors
    /// `Rules`, and what the records' directory gives.
    pub fn lacks_table(&self, masquerade: bool) -> Result<bool, HostPortError> {
        if self.table.is_current().map_err(HostPortError::Rules)? {
            return Ok(false);
        }
        Ok(masquerade || self.route_localnet() || self.any()?)
    }

    fn any(&self) -> Result<bool, HostPortError> {
        let entries = std::fs::read_dir(&self.dir).map_err(|source| HostPortError::Io {
            action: "read",
            path: self.dir.clone(),
            source,
        })?;
        let mut names = entries.flatten().map(|entry| entry.file_name());
        Ok(names.any(|name| !name.as_encoded_bytes().starts_with(b".")))
    }

    fn route_localnet_path(&self) -> PathBuf {
        format!("/proc/sys/net/ipv4/conf/{}/route_localnet", self.bridge).into()
    }

    fn route_localnet(&self) -> bool {
        std::fs::read_to_string(self.route_localnet_path()).is_ok_and(|text| text.trim() == "1")
    }

    /// Leads `mappings` to the pod `owner` at `ips`, instead of what it had
    /// before. `name` is what a person calls the pod.
    ///
    /// # Errors
    /// `Conflict` and `Invalid` before anything is changed; with any other the
    /// pod has no host ports.
    pub fn add(
        &self,
        owner: &str,
        name: &str,
        ips: &[IpAddr],
        mappings: &[PortMapping],
    ) -> Result<(), HostPortError> {
        if mappings.is_empty() {
            return self.remove(owner);
        }
        let records = self.lock()?;
        let others = records.good.iter().filter(|ports| ports.owner != owner);
        check(ips, mappings, others)?;
        let ports = Ports {
            owner: owner.into(),
            name: name.into(),
            ips: ips.into(),
            mappings: mappings.into(),
        };
        let path = self.path(owner);
        // Rules do not outlive the kernel, so neither need the record.
        record::save(&path, &ports, Durability::ProcessEnd).map_err(|source| {
            HostPortError::Record {
                owner: owner.into(),
                source,
            }
        })?;
        crash::point("network-hostports-recorded");
        let old: Vec<Ports> = records
            .good
            .iter()
            .filter(|ports| ports.owner == owner)
            .cloned()
            .collect();
        let added = self
            .put(&records, &old, &ports)
            .map_err(HostPortError::Rules);
        if added.is_err() {
            // In one transaction: none of the elements is there, so the record may go.
            let _ = record::remove(&path, Durability::ProcessEnd);
            return added;
        }
        if ips.iter().any(IpAddr::is_ipv4) {
            let path = self.route_localnet_path();
            sysctl::write(&path, "1").map_err(|source| HostPortError::Io {
                action: "write",
                path,
                source,
            })?;
        }
        let udp = mappings
            .iter()
            .filter(|mapping| mapping.protocol == Protocol::Udp);
        let stale: Vec<Which> = udp
            .map(|mapping| Which::To {
                protocol: number(Protocol::Udp),
                port: mapping.host_port,
            })
            .collect();
        conntrack::forget(&stale).map_err(HostPortError::Connections)
    }

    fn put(&self, records: &Records, old: &[Ports], new: &Ports) -> Result<(), NftError> {
        let new = elements(std::slice::from_ref(new));
        if self.table.is_current()? {
            return self.table.change(&elements(old), &new);
        }
        let mut all = elements(records.good.iter().filter(|ports| !old.contains(ports)));
        all.extend(new);
        self.table.replace(&all)
    }

    /// Takes back what leads to `owner`; nothing is fine too.
    ///
    /// # Errors
    /// With any the record stays, so that it can be tried again.
    pub fn remove(&self, owner: &str) -> Result<(), HostPortError> {
        if !self.path(owner).exists() {
            return Ok(());
        }
        let records = self.lock()?;
        let Some(ports) = records.good.iter().find(|ports| ports.owner == owner) else {
            // Gone meanwhile, or damaged: gc's business.
            return Ok(());
        };
        let gone = elements(std::slice::from_ref(ports));
        // Without the table there is nothing to take out.
        if self.table.is_current().map_err(HostPortError::Rules)? {
            self.table
                .change(&gone, &[])
                .map_err(HostPortError::Rules)?;
        }
        record::remove(&self.path(owner), Durability::ProcessEnd).map_err(|source| {
            HostPortError::Record {
                owner: owner.into(),
                source,
            }
        })
    }

    /// Takes back what leads to owners that `live` does not know, and what is
    /// not known to lead anywhere. The owners.
    ///
    /// # Errors
    /// All are tried; the last failure.
    pub fn gc(&self, live: impl Fn(&str) -> bool) -> Result<Vec<String>, HostPortError> {
        let dead: Vec<String> = {
            let records = self.lock()?;
            if !records.damaged.is_empty() {
                self.table
                    .replace(&elements(&records.good))
                    .map_err(HostPortError::Rules)?;
                for path in &records.damaged {
                    record::remove(path, Durability::ProcessEnd).map_err(|source| {
                        HostPortError::Record {
                            owner: path.display().to_string(),
                            source,
                        }
                    })?;
                }
            }
            let owners = records.good.into_iter().map(|ports| ports.owner);
            owners.filter(|owner| !live(owner)).collect()
        };
        let mut failure = Ok(());
        for owner in &dead {
            if let Err(error) = self.remove(owner) {
                failure = Err(error);
            }
        }
        failure.map(|()| dead)
    }

    fn path(&self, owner: &str) -> PathBuf {
        self.dir.join(&hex::encode(Sha256::digest(owner))[..32])
    }

    fn lock(&self) -> Result<Records, HostPortError> {
        let error = |action, path: &Path| {
            let path = path.to_owned();
            move |source| HostPortError::Io {
                action,
                path,
                source,
            }
        };
        let path = self.dir.join(".lock");
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(error("open", &path))?;
        while let Err(errno) = flock(&lock, FlockOperation::LockExclusive) {
            if errno != rustix::io::Errno::INTR {
                return Err(error("lock", &path)(errno.into()));
            }
        }
        let mut records = Records {
            good: Vec::new(),
            damaged: Vec::new(),
            _lock: lock,
        };
        for entry in std::fs::read_dir(&self.dir).map_err(error("read", &self.dir))? {
            let path = entry.map_err(error("read", &self.dir))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            if is_temporary(name) {
                let _ = std::fs::remove_file(&path);
            }
            if name.starts_with('.') {
                continue;
            }
            match record::load::<Ports>(&path) {
                Ok(ports) => records.good.push(ports),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "host ports of a pod cannot be read"
                    );
                    records.damaged.push(path);
                }
            }
        }
        Ok(records)
    }
}

/// An address that stands for all of its family.
fn specific(mapping: &PortMapping) -> Option<IpAddr> {
    mapping.host_ip.filter(|ip| !ip.is_unspecified())
}

/// True when the mapping speaks of IPv4, or IPv6 with `ipv4` false.
fn of_family(mapping: &PortMapping, ipv4: bool) -> bool {
    mapping.host_ip.is_none_or(|ip| ip.is_ipv4() == ipv4)
}

/// True when a packet could be meant for both.
fn collide(a: &PortMapping, b: &PortMapping) -> bool {
    let place = match (specific(a), specific(b)) {
        (Some(one), Some(other)) => one == other,
        _ => [true, false]
            .iter()
            .any(|ipv4| of_family(a, *ipv4) && of_family(b, *ipv4)),
    };
    place && a.protocol == b.protocol && a.host_port == b.host_port
}

fn check<'a>(
    ips: &[IpAddr],
    mappings: &[PortMapping],
    others: impl Iterator<Item = &'a Ports>,
) -> Result<(), HostPortError> {
    for (at, mapping) in mappings.iter().enumerate() {
        let invalid = |why| {
            Err(HostPortError::Invalid {
                port: spell(mapping),
                why,
            })
        };
        if mapping.host_port == 0 || mapping.container_port == 0 {
            return invalid("and its container port must be 1 to 65535");
        }
        if !ips.iter().any(|ip| of_family(mapping, ip.is_ipv4())) {
            return invalid("is of a family that the pod has no address of");
        }
        // The same line twice is harmless; two ways for one port are not.
        if mappings[..at]
            .iter()
            .any(|before| collide(before, mapping) && before != mapping)
        {
            return invalid("is asked for twice by the pod itself");
        }
    }
    for other in others {
        for taken in &other.mappings {
            if let Some(wanted) = mappings.iter().find(|mapping| collide(mapping, taken)) {
                return Err(HostPortError::Conflict {
                    port: spell(wanted),
                    holder: other.name.clone(),
                });
            }
        }
    }
    Ok(())
}

fn spell(mapping: &PortMapping) -> String {
    let port = format!("{}/{}", mapping.host_port, word(mapping.protocol));
    match specific(mapping) {
        Some(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        Some(ip) => format!("{ip}:{port}"),
        None => port,
    }
}

fn elements<'a>(all: impl IntoIterator<Item = &'a Ports>) -> Vec<Element> {
    let mut elements = Vec::new();
    for ports in all {
        for mapping in &ports.mappings {
            for ipv4 in [true, false] {
                let target = ports.ips.iter().find(|ip| ip.is_ipv4() == ipv4);
                let Some(target) = target.filter(|_| of_family(mapping, ipv4)) else {
                    continue;
                };
                elements.push(Element {
                    host_ip: specific(mapping),
                    protocol: mapping.protocol,
                    host_port: mapping.host_port,
                    target: *target,
                    target_port: mapping.container_port,
                });
            }
        }
    }
    elements.sort();
    elements.dedup();
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: Option<&str>, protocol: Protocol) -> PortMapping {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol,
            host_ip,
        }
    }

    #[test]
    fn mappings_collide_where_a_packet_could_be_meant_for_both() {
        use Protocol::{Tcp, Udp};
        for (a, b, expected) in [
            (None, None, true),
            (None, Some("192.0.2.1"), true),
            (Some("0.0.0.0"), Some("192.0.2.1"), true),
            (Some("::"), Some("192.0.2.1"), false),
            (Some("::"), Some("0.0.0.0"), false),
            (Some("::"), None, true),
            (Some("192.0.2.2"), Some("192.0.2.1"), false),
            (Some("192.0.2.1"), Some("192.0.2.1"), true),
        ] {
            assert_eq!(
                collide(&mapping(a, Tcp), &mapping(b, Tcp)),
                expected,
                "{a:?} {b:?}"
            );
            assert_eq!(
                collide(&mapping(b, Tcp), &mapping(a, Tcp)),
                expected,
                "{b:?} {a:?}"
            );
            assert!(!collide(&mapping(a, Tcp), &mapping(b, Udp)));
        }
    }

    #[test]
    fn each_family_of_the_pod_gets_its_element() {
        let ports = |host_ip| Ports {
            owner: "a".into(),
            name: "a".into(),
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            mappings: vec![mapping(host_ip, Protocol::Sctp)],
        };
        let lines = |host_ip| -> Vec<String> {
            let each = |element: Element| format!("{} {}", element.map(), element.text());
            elements(&[ports(host_ip)]).into_iter().map(each).collect()
        };
        assert_eq!(
            lines(None),
            [
                "anyports4 sctp . 8080 : 10.0.0.2 . 80",
                "anyports6 sctp . 8080 : fd00::2 . 80"
            ]
        );
        assert_eq!(lines(Some("::")), ["anyports6 sctp . 8080 : fd00::2 . 80"]);
        assert_eq!(
            lines(Some("192.0.2.1")),
            ["hostports4 192.0.2.1 . sctp . 8080 : 10.0.0.2 . 80"]
        );
    }
}
