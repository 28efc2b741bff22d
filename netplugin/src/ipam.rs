//! Who has which address.
//!
//! ```text
//! DIR/leases/10.187.0.7    one record per address: the pod that has it
//! DIR/leases/.lock         "<generation> <last IPv4 given> <last IPv6 given>\n", padded
//! ```
//!
//! A lease's file is there, whole, before its address is given: by rename, so it
//! outlives a killed daemon. It is not synced: no pod outlives a power cut, so a
//! lease that one loses is an address that is free, one that it brings back is
//! taken by [`Ipam::gc`], and so is one that it tore. The file's name is the
//! address: one that cannot be read still keeps its address from others, until
//! [`Ipam::gc`] is told that all of the node's pods are known and frees it.
//! The lock file makes it safe for several processes; its generation tells each
//! of them when what it knows is old. Addresses are given in turn, so that one
//! just freed is the last to be given again.

use crate::address::{IpNet, from_number, to_number};
use berth_store::atomic_file::{self, Durability};
use berth_store::{Record, RecordError, crash, record};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Bytes of the lock file: its text, padded so that a rewrite never leaves a tail.
const LOCK_BYTES: usize = 128;

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The subnet has no address that pods could have.
    #[error(
        "the subnet {0} is too small for pods: the gateway and one pod need a /30 (IPv6: /126)"
    )]
    TooSmall(IpNet),
    /// All are given away.
    #[error("no free address in {subnet}: all {capacity} are in use")]
    Exhausted {
        /// Where addresses come from.
        subnet: IpNet,
        /// How many pods it has room for.
        capacity: u128,
    },
    /// The directory or the lock.
    #[error("cannot {action} {path}")]
    Io {
        /// "read", "lock".
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A lease could not be written or removed.
    #[error("cannot keep the lease on {address}")]
    Lease {
        /// Whose lease.
        address: IpAddr,
        /// Why not.
        source: RecordError,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lease {
    /// The pod, or for the plugin the container ID and the interface.
    owner: String,
}

impl Record for Lease {
    const KIND: &'static str = "lease";
    const VERSION: u32 = 1;
}

/// The addresses of a node's pods.
#[derive(Debug)]
pub struct Ipam {
    dir: PathBuf,
    subnets: Vec<IpNet>,
    known: Mutex<Known>,
}

/// What was on disk at `generation`.
#[derive(Debug, Default)]
struct Known {
    generation: Option<u64>,
    /// The owner is `None` where the lease cannot be read.
    leases: BTreeMap<IpAddr, Option<String>>,
    last: Vec<Option<IpAddr>>,
}

/// The lock, held; the file is unlocked as it is closed.
struct Locked {
    file: File,
    path: PathBuf,
}

impl Ipam {
    /// The leases in `dir` on addresses of `subnets`, at most one subnet per family.
    ///
    /// # Errors
    /// `TooSmall`, and `Io` where the directory cannot be made.
    pub fn open(dir: &Path, subnets: &[IpNet]) -> Result<Self, IpamError> {
        for subnet in subnets {
            if capacity(subnet) < 1 {
                return Err(IpamError::TooSmall(*subnet));
            }
        }
        std::fs::create_dir_all(dir).map_err(|source| IpamError::Io {
            action: "make",
            path: dir.into(),
            source,
        })?;
        let subnets = subnets.iter().map(IpNet::network).collect();
        Ok(Self {
            dir: dir.into(),
            subnets,
            known: Mutex::default(),
        })
    }

    /// The gateway of `subnet`: its first address, which no pod gets.
    pub fn gateway(subnet: &IpNet) -> IpAddr {
        from_number(subnet.first() + 1, subnet.is_ipv4())
    }

    /// An address of each subnet for `owner`, in the subnets' order; those it
    /// has already, if it has them.
    ///
    /// # Errors
    /// `Exhausted`; else what the disk says. Nothing new is kept then.
    pub fn acquire(&self, owner: &str) -> Result<Vec<IpAddr>, IpamError> {
        self.locked(|known, lock| {
            let mut given = Vec::new();
            let mut fresh = Vec::new();
            let result = (0..self.subnets.len()).try_for_each(|at| {
                let subnet = self.subnets[at];
                let has = known.leases.iter().find_map(|(address, by)| {
                    (by.as_deref() == Some(owner) && subnet.contains(*address)).then_some(*address)
                });
                if let Some(address) = has {
                    given.push(address);
                    return Ok(());
                }
                let address = next_free(&subnet, known, at)?;
                // Marked as changed first: a crash in between costs others a reading.
                known.last[at] = Some(address);
                lock.write(known)?;
                let lease = Lease {
                    owner: owner.into(),
                };
                // Known before it is tried: a failed write may still have left the file.
                known.leases.insert(address, Some(owner.into()));
                fresh.push(address);
                record::save(&self.path(address), &lease, Durability::ProcessEnd)
                    .map_err(|source| IpamError::Lease { address, source })?;
                given.push(address);
                Ok(())
            });
            if let Err(error) = result {
                for address in fresh {
                    // What cannot be removed stays known, so that release and gc find it.
                    let _ = self.free(known, address);
                }
                return Err(error);
            }
            crash::point("network-leased");
            Ok(given)
        })
    }

    /// The addresses that `owner` has; none when it has none.
    ///
    /// # Errors
    /// `Io` where the leases cannot be read.
    pub fn of(&self, owner: &str) -> Result<Vec<IpAddr>, IpamError> {
        self.locked(|known, _| Ok(owned(known, |by| by == Some(owner))))
    }

    /// Frees what `owner` has; nothing is fine too. The addresses freed.
    ///
    /// # Errors
    /// `Lease` for one that could not be freed; the others are.
    pub fn release(&self, owner: &str) -> Result<Vec<IpAddr>, IpamError> {
        self.remove(|by| by == Some(owner))
    }

    /// Frees what belongs to owners that `live` does not know, and addresses
    /// whose lease cannot be read. What was freed, with its owner where known.
    ///
    /// # Errors
    /// `Lease` for one that could not be freed; the others are.
    pub fn gc(
        &self,
        live: impl Fn(&str) -> bool,
    ) -> Result<Vec<(IpAddr, Option<String>)>, IpamError> {
        let dead = |by: Option<&str>| !by.is_some_and(&live);
        let before = self.all()?;
        let freed = self.remove(dead)?;
        Ok(before
            .into_iter()
            .filter(|(address, _)| freed.contains(address))
            .collect())
    }

    /// Every lease there is; the owner is `None` where it cannot be read.
    ///
    /// # Errors
    /// `Io` where the leases cannot be read.
    pub fn all(&self) -> Result<BTreeMap<IpAddr, Option<String>>, IpamError> {
        self.locked(|known, _| Ok(known.leases.clone()))
    }

    fn remove(&self, which: impl Fn(Option<&str>) -> bool) -> Result<Vec<IpAddr>, IpamError> {
        self.locked(|known, lock| {
            let addresses = owned(known, which);
            if addresses.is_empty() {
                return Ok(addresses);
            }
            lock.write(known)?;
            let mut failure = Ok(());
            let mut freed = Vec::new();
            for address in addresses {
                match self.free(known, address) {
                    Ok(()) => freed.push(address),
                    Err(error) => failure = Err(error),
                }
            }
            failure.map(|()| freed)
        })
    }

    fn free(&self, known: &mut Known, address: IpAddr) -> Result<(), IpamError> {
        // A lease that a power cut brings back is one gc takes: no fsync needed.
        record::remove(&self.path(address), Durability::ProcessEnd)
            .map_err(|source| IpamError::Lease { address, source })?;
        known.leases.remove(&address);
        Ok(())
    }

    fn path(&self, address: IpAddr) -> PathBuf {
        self.dir.join(address.to_string())
    }

    /// Runs `work` with no other thread or process about, and what it knows up to date.
    fn locked<T>(
        &self,
        work: impl FnOnce(&mut Known, &Locked) -> Result<T, IpamError>,
    ) -> Result<T, IpamError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(".lock");
        let error = |action, source| IpamError::Io {
            action,
            path: path.clone(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| error("open", source))?;
        while let Err(errno) = flock(&file, FlockOperation::LockExclusive) {
            if errno != rustix::io::Errno::INTR {
                return Err(error("lock", errno.into()));
            }
        }
        let lock = Locked { file, path };
        let (generation, last) = lock.read()?;
        if known.generation != Some(generation) {
            known.leases = self.read_leases()?;
            known.generation = Some(generation);
            known.last = self
                .subnets
                .iter()
                .map(|subnet| last.iter().copied().find(|last| subnet.contains(*last)))
                .collect();
        }
        work(&mut known, &lock)
    }

    fn read_leases(&self) -> Result<BTreeMap<IpAddr, Option<String>>, IpamError> {
        let error = |source| IpamError::Io {
            action: "read",
            path: self.dir.clone(),
            source,
        };
        let mut leases = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if atomic_file::is_temporary(name) {
                // Of a writer that died: whoever writes now holds the lock we hold.
                let _ = std::fs::remove_file(self.dir.join(name));
                continue;
            }
            let Ok(address) = name.parse::<IpAddr>() else {
                continue;
            };
            let owner = match record::load::<Lease>(&self.dir.join(name)) {
                Ok(lease) => Some(lease.owner),
                Err(error) if error.is_absent() => continue,
                Err(error) => {
                    tracing::warn!(
                        %address,
                        error = &error as &dyn std::error::Error,
                        "a lease cannot be read; its address stays reserved"
                    );
                    None
                }
            };
            leases.insert(address, owner);
        }
        Ok(leases)
    }
}

impl Locked {
    /// Generation and the addresses given last; zero and none for what cannot be read.
    fn read(&self) -> Result<(u64, Vec<IpAddr>), IpamError> {
        let mut bytes = [0; LOCK_BYTES];
        let length = self
            .file
            .read_at(&mut bytes, 0)
            .map_err(|source| self.error("read", source))?;
        let text = std::str::from_utf8(&bytes[..length]).unwrap_or_default();
        let mut words = text.split_ascii_whitespace();
        let generation = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        Ok((
            generation,
            words.filter_map(|word| word.parse().ok()).collect(),
        ))
    }

    /// Says that something changes, before it does.
    fn write(&self, known: &mut Known) -> Result<(), IpamError> {
        let generation = known.generation.unwrap_or(0) + 1;
        let mut text = generation.to_string();
        for last in known.last.iter().flatten() {
            text.push_str(&format!(" {last}"));
        }
        let line = format!("{text:<width$}\n", width = LOCK_BYTES - 1);
        // Not trusted until it is written: a failure makes the next call read all again.
        known.generation = None;
        self.file
            .write_all_at(line.as_bytes(), 0)
            .map_err(|source| self.error("write", source))?;
        known.generation = Some(generation);
        Ok(())
    }

    fn error(&self, action: &'static str, source: io::Error) -> IpamError {
        IpamError::Io {
            action,
            path: self.path.clone(),
            source,
        }
    }
}

fn owned(known: &Known, which: impl Fn(Option<&str>) -> bool) -> Vec<IpAddr> {
    let matching = known.leases.iter().filter(|(_, by)| which(by.as_deref()));
    matching.map(|(address, _)| *address).collect()
}

/// First and last number a pod may have: not the network's own address (in IPv6
/// the routers' anycast), not the gateway, not IPv4's broadcast.
fn pods(subnet: &IpNet) -> (u128, u128) {
    (
        subnet.first().saturating_add(2),
        subnet.last().saturating_sub(u128::from(subnet.is_ipv4())),
    )
}

/// How many pods `subnet` has room for.
fn capacity(subnet: &IpNet) -> u128 {
    let (first, last) = pods(subnet);
    last.checked_sub(first)
        .map_or(0, |more| more.saturating_add(1))
}

/// The first free address after the one given last, round and round.
fn next_free(subnet: &IpNet, known: &Known, at: usize) -> Result<IpAddr, IpamError> {
    let (first, last) = pods(subnet);
    let start = match known.last[at].map(to_number) {
        Some(given) if (first..last).contains(&given) => given + 1,
        _ => first,
    };
    let free = |from: u128, to: u128| {
        (from..=to)
            .map(|number| from_number(number, subnet.is_ipv4()))
            .find(|address| !known.leases.contains_key(address))
    };
    free(start, last)
        .or_else(|| free(first, start))
        .ok_or_else(|| IpamError::Exhausted {
            subnet: *subnet,
            capacity: capacity(subnet),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, HashMap};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn open(dir: &Path, subnets: &[&str]) -> Ipam {
        let subnets: Vec<IpNet> = subnets.iter().map(|text| net(text)).collect();
        Ipam::open(dir, &subnets).unwrap()
    }

    #[test]
    fn a_24_has_room_for_253_pods_and_the_254th_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = open(dir.path(), &["10.1.2.0/24"]);
        let given: BTreeSet<IpAddr> = (0..253)
            .flat_map(|pod| ipam.acquire(&format!("pod{pod}")).unwrap())
            .collect();
        assert_eq!(given.len(), 253);
        assert!(!given.contains(&Ipam::gateway(&net("10.1.2.0/24"))));
        let error = ipam.acquire("one more").unwrap_err();
        assert_eq!(
            error.to_string(),
            "no free address in 10.1.2.0/24: all 253 are in use"
        );
        ipam.release("pod7").unwrap();
        assert_eq!(
            ipam.acquire("one more").unwrap(),
            ["10.1.2.9".parse::<IpAddr>().unwrap()]
        );
    }

    #[test]
    fn a_failed_family_frees_the_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = open(dir.path(), &["fd00::/64", "10.1.2.0/30"]);
        assert_eq!(ipam.acquire("a").unwrap().len(), 2);
        ipam.acquire("b").unwrap_err();
        assert_eq!(ipam.of("b").unwrap(), Vec::<IpAddr>::new());
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            3,
            "two leases, one lock"
        );
    }

    #[test]
    fn too_small_a_subnet_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
            assert!(matches!(
                Ipam::open(dir.path(), &[net(bad)]),
                Err(IpamError::TooSmall(_))
            ));
        }
        for good in ["10.0.0.0/30", "fd00::/126", "0.0.0.0/0", "::/0"] {
            open(dir.path(), &[good]).acquire(good).unwrap();
        }
    }

    #[test]
    fn a_freed_address_is_the_last_to_be_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = open(dir.path(), &["10.1.2.0/29"]);
        let first = ipam.acquire("a").unwrap();
        ipam.release("a").unwrap();
        for pod in 0..4 {
            assert_ne!(ipam.acquire(&format!("{pod}")).unwrap(), first);
        }
        assert_eq!(ipam.acquire("last").unwrap(), first);
        ipam.release("0").unwrap();
        let again = open(dir.path(), &["10.1.2.0/29"]);
        again.release("1").unwrap();
        assert_eq!(
            again.acquire("x").unwrap(),
            ["10.1.2.3".parse::<IpAddr>().unwrap()]
        );
    }

    #[test]
    fn a_damaged_lease_keeps_its_address_until_gc() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = open(dir.path(), &["10.1.2.0/30"]);
        let address = ipam.acquire("a").unwrap()[0];
        std::fs::write(dir.path().join(address.to_string()), "garbage").unwrap();
        std::fs::write(dir.path().join(".10.1.2.3.tmp"), "half").unwrap();
        let again = open(dir.path(), &["10.1.2.0/30"]);
        again.acquire("b").unwrap_err();
        assert!(again.release("a").unwrap().is_empty());
        assert_eq!(again.gc(|_| true).unwrap(), [(address, None)]);
        again.acquire("b").unwrap();
        assert!(!dir.path().join(".10.1.2.3.tmp").exists());
    }

    #[test]
    fn threads_and_processes_never_get_the_same_address() {
        let dir = tempfile::tempdir().unwrap();
        let two = [
            open(dir.path(), &["10.1.0.0/22"]),
            open(dir.path(), &["10.1.0.0/22"]),
        ];
        let all: Vec<IpAddr> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    let ipam = &two[thread % 2];
                    scope.spawn(move || {
                        let mut kept = Vec::new();
                        for pod in 0..40 {
                            let owner = format!("{thread}-{pod}");
                            let address = ipam.acquire(&owner).unwrap()[0];
                            if pod % 3 == 0 {
                                ipam.release(&owner).unwrap();
                            } else {
                                kept.push(address);
                            }
                        }
                        kept
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(two[0].all().unwrap(), two[1].all().unwrap());
        assert_eq!(two[0].all().unwrap().len(), all.len());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Acquire(u8),
        Release(u8),
        Gc(u8),
        Reopen,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn it_does_as_the_model_does(steps in prop::collection::vec(
            prop_oneof![
                4 => (0..20u8).prop_map(Step::Acquire),
                3 => (0..20u8).prop_map(Step::Release),
                1 => (0..20u8).prop_map(Step::Gc),
                1 => Just(Step::Reopen),
            ], 1..60))
        {
            let dir = tempfile::tempdir().unwrap();
            let subnets = ["10.9.8.0/28", "fd00::/124"];
            let mut ipam = open(dir.path(), &subnets);
            let mut model: HashMap<u8, Vec<IpAddr>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Acquire(pod) => match ipam.acquire(&pod.to_string()) {
                        Ok(given) => match model.get(&pod) {
                            Some(has) => prop_assert_eq!(has, &given),
                            None => {
                                prop_assert!(!model.values().flatten().any(|one| given.contains(one)));
                                model.insert(pod, given);
                            }
                        },
                        Err(IpamError::Exhausted { .. }) => prop_assert_eq!(model.len(), 13),
                        Err(other) => panic!("{other}"),
                    },
                    Step::Release(pod) => {
                        let freed = ipam.release(&pod.to_string()).unwrap();
                        prop_assert_eq!(freed, model.remove(&pod).unwrap_or_default());
                    }
                    Step::Gc(below) => {
                        ipam.gc(|pod| pod.parse::<u8>().unwrap() >= below).unwrap();
                        model.retain(|pod, _| *pod >= below);
                    }
                    Step::Reopen => ipam = open(dir.path(), &subnets),
                }
                let leases: BTreeMap<IpAddr, Option<String>> = model.iter()
                    .flat_map(|(pod, ips)| ips.iter().map(|ip| (*ip, Some(pod.to_string()))))
                    .collect();
                prop_assert_eq!(ipam.all().unwrap(), leases);
            }
        }
    }
}
