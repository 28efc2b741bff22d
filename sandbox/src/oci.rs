//! The OCI runtime spec of a container: what the kubelet asked for, what the
//! image says and what this host gives, merged into one document.
//!
//! The spec is what other runtimes are started with and what plugins may change
//! before [`crate::launch`] turns it into the monitor's Launch. Nothing here
//! touches the kernel but reading what devices there are.
//!
//! Mounts stand in this order:
//!
//! ```text
//! /proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup     unless a CRI mount is at or above it
//! /dev/shm /etc/resolv.conf /etc/hostname /etc/hosts      unless a CRI mount is at it ┐ by depth,
//! the CRI mounts                                          the last of equal targets   ┘ stable
//! ```
//!
//! Source: OCI runtime-spec, `config.md` and `config-linux.md`; CRI
//! `ContainerConfig` and `LinuxContainerSecurityContext`.

mod devices;
mod mounts;
mod process;

pub(crate) use mounts::target as mount_target;
pub(crate) use mounts::volume_directories;
pub(crate) use process::capability_set;

use crate::capability::{CapSet, UnknownCapability};
use crate::cgroup::{DeviceKind, DeviceRule};
use crate::container_spec::{ContainerSpec, Resources};
use crate::id::{ContainerId, PodId};
use crate::image::ContainerImage;
use crate::pod_files::PodFiles;
use crate::pod_spec::{IdMapping, PidMode, PodSpec};
use crate::selinux::Labels;
use crate::user::Identity;
use oci_spec::runtime as oci;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;

/// The version of the runtime spec that what we write follows.
pub(crate) const OCI_VERSION: &str = "1.2.0";

/// Why no spec can be made of what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// Neither the image nor the container says what to run.
    #[error("no command: neither the image nor the container names one")]
    NoCommand,
    /// execve(2) could not pass it on.
    #[error("{what} holds a NUL byte")]
    NulByte {
        /// What it was found in.
        what: String,
    },
    /// An environment variable without a name, or with '=' in it.
    #[error("{name:?} is not the name of an environment variable")]
    BadEnvName {
        /// As given.
        name: String,
    },
    /// More than can be handed to the monitor.
    #[error("{count} mounts are more than a container can have ({})", mounts::MOST)]
    TooManyMounts {
        /// How many were asked for.
        count: usize,
    },
    /// A mount point that cannot be one.
    #[error("nothing can be mounted at {target:?}: {why}")]
    BadTarget {
        /// As given.
        target: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The CRI contract of `recursive_read_only` is broken.
    #[error("the mount at {target:?} is to be recursively read-only and {why}")]
    BadRecursiveReadonly {
        /// As given.
        target: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A mount option that CRI does not have.
    #[error("the mount at {target:?} has the unknown option {option:?}")]
    BadOption {
        /// As given.
        target: String,
        /// The option.
        option: String,
    },
    /// An image volume whose content the caller did not prepare.
    #[error("the image {image:?} for {target:?} is not mounted")]
    ImageNotMounted {
        /// The image asked for.
        image: String,
        /// Where it was to be.
        target: String,
    },
    /// A device that cannot be looked at.
    #[error("cannot look at the device {path}")]
    Device {
        /// On the host.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// What was asked for as a device is something else.
    #[error("{path} is neither a device nor a directory of devices")]
    NotADevice {
        /// On the host.
        path: PathBuf,
    },
    /// A directory of devices without end.
    #[error("{path} holds more than {} devices", devices::MOST)]
    TooManyDevices {
        /// On the host.
        path: PathBuf,
    },
    /// Not letters of "rwm".
    #[error("{permissions:?} are not permissions of the device {path}: letters of \"rwm\" are")]
    BadDevicePermissions {
        /// On the host.
        path: PathBuf,
        /// As given.
        permissions: String,
    },
    /// A part of the spec that the library finds incomplete.
    #[error("the spec cannot be put together")]
    Spec(#[from] oci_spec::OciSpecError),
    /// A name that is no capability.
    #[error(transparent)]
    Capability(#[from] UnknownCapability),
    /// An AppArmor profile, and the host has no AppArmor.
    #[error("the AppArmor profile {profile:?} is asked for, and this host has no AppArmor")]
    NoAppArmor {
        /// The profile's name.
        profile: String,
    },
    /// The container is to share a namespace that the caller does not have.
    #[error("the container is to join the {kind} namespace of {of}, which is not there")]
    NoNamespace {
        /// "pid".
        kind: &'static str,
        /// Whose.
        of: String,
    },
}

/// What a container gets that nobody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Soft and hard limits of resources.
    pub rlimits: BTreeMap<Rlimit, (u64, u64)>,
    /// What can be given at all; a privileged container has all of it.
    pub capabilities: CapSet,
    /// What a container has that asks for nothing.
    pub usual_capabilities: CapSet,
    /// By dotted name, of namespaces that the pod has of its own; its own take precedence.
    pub sysctls: BTreeMap<String, String>,
    /// What /etc/localtime is, on the host; `None` for the image's.
    pub localtime: Option<PathBuf>,
    /// Whether devices belong to the container's user; else to whom they belong on the host.
    pub devices_of_user: bool,
    /// Whether a container without privileges may write to its own cgroup (v2 only).
    pub writable_cgroup: bool,
    /// Whether directories are made that the image calls volumes.
    pub volume_directories: bool,
    /// The first process's umask.
    pub umask: u32,
    /// NAME and value; the image's and the container's own take precedence.
    pub env: Vec<(String, String)>,
    /// Whether the host has AppArmor.
    pub apparmor: bool,
    /// The AppArmor profile of who asks for the runtime's default; `None` where
    /// there is none, who asks for it is unconfined then.
    pub apparmor_profile: Option<String>,
    /// The lowest oom_score_adj that this host lets the daemon set: what is
    /// asked for below is raised to it. -1000 with CAP_SYS_RESOURCE.
    pub least_oom_score_adj: i32,
}

impl Default for Defaults {
    /// Source of nofile: systemd's default for services, which is what
    /// containers have had since the peers stopped raising it.
    fn default() -> Self {
        Self {
            rlimits: BTreeMap::from([(Rlimit::Nofile, (1024, 524_288))]),
            capabilities: CapSet::up_to(40),
            usual_capabilities: CapSet::defaults(),
            sysctls: BTreeMap::new(),
            localtime: None,
            devices_of_user: false,
            writable_cgroup: false,
            volume_directories: true,
            umask: 0o022,
            env: Vec::new(),
            apparmor: false,
            apparmor_profile: None,
            least_oom_score_adj: -1000,
        }
    }
}

impl Defaults {
    /// The same, with what this process may not set cut down to what it may:
    /// without CAP_SYS_RESOURCE no hard limit can be above its own and no
    /// oom_score_adj below its own.
    pub fn within_host_limits(mut self) -> Self {
        // Whoever cannot read its own status runs without /proc: nothing works there.
        let held = CapSet::of_this_process().unwrap_or(CapSet::EMPTY);
        self.capabilities = self.capabilities.intersection(held);
        use rustix::thread::{CapabilitySet, capabilities};
        let raises = capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE));
        if raises {
            return self;
        }
        for (kind, (soft, hard)) in &mut self.rlimits {
            if let Some(most) = rustix::process::getrlimit(kind.of_this_process()).maximum {
                *hard = most.min(*hard);
                *soft = (*soft).min(*hard);
            }
        }
        // Lowering is refused below the least value ever set with the capability,
        // which cannot be read; the present one is never below it.
        let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok();
        let own = own.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        self.least_oom_score_adj = self.least_oom_score_adj.max(own);
        self
    }
}

/// A limit of setrlimit(2), numbered as the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Rlimit {
    Cpu = 0,
    Fsize = 1,
    Data = 2,
    Stack = 3,
    Core = 4,
    Rss = 5,
    Nproc = 6,
    Nofile = 7,
    Memlock = 8,
    As = 9,
    Locks = 10,
    Sigpending = 11,
    Msgqueue = 12,
    Nice = 13,
    Rtprio = 14,
    Rttime = 15,
}

impl Rlimit {
    const ALL: [Rlimit; 16] = [
        Rlimit::Cpu,
        Rlimit::Fsize,
        Rlimit::Data,
        Rlimit::Stack,
        Rlimit::Core,
        Rlimit::Rss,
        Rlimit::Nproc,
        Rlimit::Nofile,
        Rlimit::Memlock,
        Rlimit::As,
        Rlimit::Locks,
        Rlimit::Sigpending,
        Rlimit::Msgqueue,
        Rlimit::Nice,
        Rlimit::Rtprio,
        Rlimit::Rttime,
    ];

    /// By the name it has in a config: "nofile", "RLIMIT_NOFILE". `None` for
    /// what Linux does not have.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let name = name.strip_prefix("rlimit_").unwrap_or(&name);
        Self::ALL
            .into_iter()
            .find(|kind| format!("{kind:?}").eq_ignore_ascii_case(name))
    }

    fn oci(self) -> oci::PosixRlimitType {
        use oci::PosixRlimitType as T;
        match self {
            Rlimit::Cpu => T::RlimitCpu,
            Rlimit::Fsize => T::RlimitFsize,
            Rlimit::Data => T::RlimitData,
            Rlimit::Stack => T::RlimitStack,
            Rlimit::Core => T::RlimitCore,
            Rlimit::Rss => T::RlimitRss,
            Rlimit::Nproc => T::RlimitNproc,
            Rlimit::Nofile => T::RlimitNofile,
            Rlimit::Memlock => T::RlimitMemlock,
            Rlimit::As => T::RlimitAs,
            Rlimit::Locks => T::RlimitLocks,
            Rlimit::Sigpending => T::RlimitSigpending,
            Rlimit::Msgqueue => T::RlimitMsgqueue,
            Rlimit::Nice => T::RlimitNice,
            Rlimit::Rtprio => T::RlimitRtprio,
            Rlimit::Rttime => T::RlimitRttime,
        }
    }

    /// The kernel's number of an OCI limit.
    pub(crate) fn number(kind: oci::PosixRlimitType) -> u32 {
        let found = Self::ALL.into_iter().find(|known| known.oci() == kind);
        // Both lists are Linux's sixteen; a test goes through them.
        found.map_or(u32::MAX, |known| known as u32)
    }

    fn of_this_process(self) -> rustix::process::Resource {
        use rustix::process::Resource as R;
        match self {
            Rlimit::Cpu => R::Cpu,
            Rlimit::Fsize => R::Fsize,
            Rlimit::Data => R::Data,
            Rlimit::Stack => R::Stack,
            Rlimit::Core => R::Core,
            Rlimit::Rss => R::Rss,
            Rlimit::Nproc => R::Nproc,
            Rlimit::Nofile => R::Nofile,
            Rlimit::Memlock => R::Memlock,
            Rlimit::As => R::As,
            Rlimit::Locks => R::Locks,
            Rlimit::Sigpending => R::Sigpending,
            Rlimit::Msgqueue => R::Msgqueue,
            Rlimit::Nice => R::Nice,
            Rlimit::Rtprio => R::Rtprio,
            Rlimit::Rttime => R::Rttime,
        }
    }
}

/// Paths of the namespaces that the container joins. `None` is the host's, but
/// for `pid`: there [`PidMode::Container`] makes a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// The pod's.
    pub network: Option<PathBuf>,
    /// The pod's.
    pub ipc: Option<PathBuf>,
    /// The pod's; a pod on the host's network has the host's.
    pub uts: Option<PathBuf>,
    /// The pod's, or that of the target container.
    pub pid: Option<PathBuf>,
    /// The pod's.
    pub user: Option<PathBuf>,
}

/// Everything a spec is made of.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The pod's ID.
    pub pod_id: &'a PodId,
    /// The container's ID.
    pub container_id: &'a ContainerId,
    /// The pod as asked for.
    pub pod: &'a PodSpec,
    /// The container as asked for.
    pub container: &'a ContainerSpec,
    /// What it runs.
    pub image: &'a ContainerImage,
    /// Who it runs as.
    pub identity: &'a Identity,
    /// The files that all containers of the pod share.
    pub files: &'a PodFiles,
    /// What it joins.
    pub namespaces: &'a Namespaces,
    /// Below the hierarchies' mount points: "/kubepods/podX/berth-ID".
    pub cgroup_path: &'a str,
    /// Where the content of image volumes is on the host, by container path.
    pub image_volumes: &'a BTreeMap<String, PathBuf>,
    /// Its SELinux labels, where the node has any.
    pub selinux: Option<&'a Labels>,
    /// What nobody asked for.
    pub defaults: &'a Defaults,
    /// Whether a privileged container has the host's devices.
    pub host_devices: bool,
}

/// A spec and what it cannot hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Built {
    /// Complete but for seccomp, which is compiled apart.
    pub spec: oci::Spec,
    /// `process.env` as bytes, NAME=value: a spec is JSON, an environment need
    /// not be text. Same length and order as in the spec.
    pub raw_env: Vec<Vec<u8>>,
    /// Capabilities asked for by name that this host cannot give: the container
    /// goes without.
    pub unavailable: CapSet,
}

/// The spec of one container.
///
/// # Errors
/// What was asked for contradicts itself, or names what this host does not have.
pub fn build(input: &Input<'_>) -> Result<Built, OciError> {
    let process::Built {
        process,
        raw_env,
        unavailable,
    } = process::build(input)?;
    let mut spec = oci::Spec::default();
    let mut root = oci::Root::default();
    root.set_path("rootfs".into());
    root.set_readonly(Some(input.container.security.readonly_rootfs));
    let mounts = mounts::build(input)?;
    let linux = linux(input, &mounts)?;
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_process(Some(process))
        // Without a UTS namespace of the pod's there is nothing to set it in.
        .set_hostname(
            input
                .namespaces
                .uts
                .is_some()
                .then(|| input.files.hostname_text.clone()),
        )
        .set_mounts(Some(mounts))
        .set_annotations(Some(annotations(input.pod_id, input.pod, input.container)))
        .set_linux(Some(linux));
    Ok(Built {
        spec,
        raw_env,
        unavailable,
    })
}

/// The capabilities that a spec's process can ever have.
pub(crate) fn bounding_set(spec: &oci::Spec) -> CapSet {
    let process = spec.process().as_ref();
    let held = process.and_then(|process| process.capabilities().as_ref());
    capability_set(held.and_then(|sets| sets.bounding().as_ref()))
}

/// The device rules that a spec asks for, in order; later ones override earlier
/// ones.
pub fn device_rules(spec: &oci::Spec) -> Vec<DeviceRule> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_ref());
    rules
        .into_iter()
        .flatten()
        .filter_map(rule_from_oci)
        .collect()
}

fn rule_from_oci(rule: &oci::LinuxDeviceCgroup) -> Option<DeviceRule> {
    let kind = match rule.typ().unwrap_or_default() {
        oci::LinuxDeviceType::A => DeviceKind::All,
        oci::LinuxDeviceType::B => DeviceKind::Block,
        oci::LinuxDeviceType::C | oci::LinuxDeviceType::U => DeviceKind::Char,
        // No cgroup has an opinion about pipes.
        oci::LinuxDeviceType::P => return None,
    };
    // Negative stands for every one.
    let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
    Some(DeviceRule {
        allow: rule.allow(),
        kind,
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: rule
            .access()
            .clone()
            .filter(|a| !a.is_empty())
            .unwrap_or_else(|| "rwm".into()),
    })
}

fn rule_to_oci(rule: &DeviceRule) -> oci::LinuxDeviceCgroup {
    let mut out = oci::LinuxDeviceCgroup::default();
    out.set_allow(rule.allow)
        .set_typ(Some(match rule.kind {
            DeviceKind::All => oci::LinuxDeviceType::A,
            DeviceKind::Block => oci::LinuxDeviceType::B,
            DeviceKind::Char => oci::LinuxDeviceType::C,
        }))
        .set_major(rule.major.map(i64::from))
        .set_minor(rule.minor.map(i64::from))
        .set_access(Some(rule.access.clone()));
    out
}

fn linux(input: &Input<'_>, mounts: &[oci::Mount]) -> Result<oci::Linux, OciError> {
    let security = &input.container.security;
    let identity = input.identity;
    let of_user = input.defaults.devices_of_user;
    let owner = of_user.then_some((identity.uid, identity.gid));
    let (devices, rules) = devices::build(input.container, input.host_devices, owner)?;
    let mut resources = resources(&input.container.resources);
    resources.set_devices(Some(rules.iter().map(rule_to_oci).collect()));
    let mut linux = oci::Linux::default();
    linux
        .set_cgroups_path(Some(input.cgroup_path.into()))
        .set_namespaces(Some(namespaces(input)?))
        .set_resources(Some(resources))
        .set_devices(Some(devices))
        .set_rootfs_propagation(mounts::rootfs_propagation(mounts))
        .set_masked_paths(None)
        .set_readonly_paths(None);
    // What hides parts of /proc from a container would hide them from one that
    // may do everything anyway.
    if !security.privileged {
        linux
            .set_masked_paths(Some(security.masked_paths.clone()))
            .set_readonly_paths(Some(security.readonly_paths.clone()));
    }
    if let Some(labels) = input.selinux {
        linux.set_mount_label(some(&labels.mount));
    }
    if let Some(user) = &input.pod.namespaces.user {
        linux
            .set_uid_mappings(Some(id_mappings(&user.uids)?))
            .set_gid_mappings(Some(id_mappings(&user.gids)?));
    }
    Ok(linux)
}

fn id_mappings(mappings: &[IdMapping]) -> Result<Vec<oci::LinuxIdMapping>, oci_spec::OciSpecError> {
    mappings
        .iter()
        .map(|mapping| {
            oci::LinuxIdMappingBuilder::default()
                .container_id(mapping.container_id)
                .host_id(mapping.host_id)
                .size(mapping.length)
                .build()
        })
        .collect()
}

fn namespaces(input: &Input<'_>) -> Result<Vec<oci::LinuxNamespace>, OciError> {
    use oci::LinuxNamespaceType as T;
    let make = |typ, path: Option<PathBuf>| {
        let mut namespace = oci::LinuxNamespace::default();
        namespace.set_typ(typ).set_path(path);
        namespace
    };
    let joined = input.namespaces;
    let missing = |of: &str| OciError::NoNamespace {
        kind: "pid",
        of: of.to_owned(),
    };
    let mut out = vec![make(T::Mount, None)];
    match &input.container.security.pid {
        PidMode::Container => out.push(make(T::Pid, None)),
        PidMode::Node => {}
        PidMode::Pod => {
            let path = joined.pid.clone().ok_or_else(|| missing("the pod"))?;
            out.push(make(T::Pid, Some(path)));
        }
        PidMode::Target(id) => {
            let path = joined.pid.clone().ok_or_else(|| missing(id))?;
            out.push(make(T::Pid, Some(path)));
        }
    }
    for (typ, path) in [
        (T::Network, &joined.network),
        (T::Ipc, &joined.ipc),
        (T::Uts, &joined.uts),
        (T::User, &joined.user),
    ] {
        out.extend(path.clone().map(|path| make(typ, Some(path))));
    }
    // A privileged container is to see and manage the host's cgroups.
    if !input.container.security.privileged {
        out.push(make(T::Cgroup, None));
    }
    Ok(out)
}

/// For other runtimes and plugins; `crate::cgroup` applies the limits itself.
fn resources(asked: &Resources) -> oci::LinuxResources {
    let mut out = oci::LinuxResources::default();
    limit(&mut out, asked);
    out
}

/// Puts limits in the place of those there are; devices stay.
pub(crate) fn limit(out: &mut oci::LinuxResources, asked: &Resources) {
    let mut cpu = oci::LinuxCpu::default();
    cpu.set_shares(asked.cpu_shares)
        .set_quota(asked.cpu_quota)
        .set_period(asked.cpu_period)
        .set_cpus(some(&asked.cpuset_cpus))
        .set_mems(some(&asked.cpuset_mems));
    let mut memory = oci::LinuxMemory::default();
    memory
        .set_limit(asked.memory_limit_bytes)
        .set_swap(asked.memory_swap_limit_bytes);
    out.set_cpu(Some(cpu)).set_memory(Some(memory));
    if let Some(limit) = asked.pids_limit {
        let mut pids = oci::LinuxPids::default();
        pids.set_limit(limit);
        out.set_pids(Some(pids));
    }
    let pages = asked.hugepages.iter().map(|page| {
        let mut limit = oci::LinuxHugepageLimit::default();
        limit
            .set_page_size(page.page_size.clone())
            .set_limit(i64::try_from(page.limit_bytes).unwrap_or(i64::MAX));
        limit
    });
    out.set_hugepage_limits(Some(pages.collect()));
    if !asked.unified.is_empty() {
        out.set_unified(Some(asked.unified.clone().into_iter().collect()));
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// What tools of other runtimes look for.
///
/// Source: containerd, `pkg/cri/annotations`: the names only.
pub(crate) fn annotations(
    pod_id: &PodId,
    pod: &PodSpec,
    container: &ContainerSpec,
) -> HashMap<String, String> {
    let pod = &pod.name;
    [
        ("container-type", "container"),
        ("sandbox-id", pod_id.as_str()),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("container-name", &container.name.name),
        ("image-name", &container.image.image),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value.to_owned()))
    .collect()
}

#[cfg(test)]
pub(crate) mod tests;
