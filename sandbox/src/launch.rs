//! From an OCI runtime spec to what a pod's monitor is told.
//!
//! Whatever names a path of the host is opened here, once, and travels as a
//! detached mount: the monitor's child only attaches it, so no path of a
//! container is ever followed by the host, nor one of the host by a container.
//! File systems of the container's own are left to that child, which is in the
//! right namespaces.
//!
//! ```text
//! bind       open O_PATH ─> detached copy ─> flags, propagation, idmap ─> descriptor
//! cgroup v1  a small tmpfs of names, and over each name the container's cgroup, bound
//! the rest   type, flags and options, as mount(8) has them
//! ```
//!
//! All of it blocks, also for as long as a hung file system does: run it where
//! only that thread waits.
//!
//! Source: proto/protos/monitor_v1.proto; open_tree(2), mount_setattr(2).

mod bind;
mod cgroup;
mod devices;
mod options;

pub use bind::open as open_source;

use crate::oci::{Rlimit, capability_set};
use crate::pod_spec::IdMapping;
use crate::user_namespace::{Mapped, Mapping};
use berth_proto::monitor_v1::{self as proto, MountStep};
use berth_sys::Errno;
use berth_sys::mount::{self, Change};
use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxNamespaceType, Spec};
use options::Options;
use rustix::fs::FileType;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most descriptors with one Launch; a few less than the kernel passes in one
/// message (`monitor_v1::MAX_FDS`), for what the connection itself adds.
const MOST_FDS: usize = 250;

/// Links every container expects below /dev.
///
/// Source: OCI runtime-spec, `runtime-linux.md`, "Dev symbolic links".
const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Why a spec cannot be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A part of the spec that must be there.
    #[error("the spec has no {part}")]
    Incomplete {
        /// Which.
        part: &'static str,
    },
    /// The monitor's messages are text here, and this is none.
    #[error("{what} is not UTF-8: {}", value.display())]
    NotText {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: PathBuf,
    },
    /// A mount's source cannot be reached.
    #[error("cannot open {path}, to be mounted at {target}")]
    Source {
        /// On the host.
        path: PathBuf,
        /// In the container.
        target: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// A mount's source was missing and could not be made.
    #[error("cannot make the directory {path}, to be mounted at {target}")]
    MakeSource {
        /// On the host.
        path: PathBuf,
        /// In the container.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mount could not be copied or changed.
    #[error("cannot {attempt} {path}, to be mounted at {target}")]
    Mount {
        /// "copy the mount", "set the flags of".
        attempt: &'static str,
        /// On the host.
        path: PathBuf,
        /// In the container.
        target: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// Mounts are to be passed on, and the host does not pass them on.
    #[error("{path} is to be mounted with {wanted} propagation, and is not on a {needed} mount")]
    NotPropagated {
        /// On the host.
        path: PathBuf,
        /// What was asked for.
        wanted: &'static str,
        /// What it takes.
        needed: &'static str,
    },
    /// Something else is to be put where processes look for the kernel.
    #[error("{path} cannot be mounted at /proc: it is no procfs")]
    NotProc {
        /// On the host.
        path: PathBuf,
    },
    /// The host's list of mounts cannot be read.
    #[error("cannot read {path}")]
    Mountinfo {
        /// The file.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A mount option that means nothing here.
    #[error("the mount at {target} has the unknown option {option:?}")]
    BadOption {
        /// In the container.
        target: PathBuf,
        /// The option.
        option: String,
    },
    /// A device node could not be made or found.
    #[error("cannot give the container the device {path}")]
    Device {
        /// In the container.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// Owners are to be mapped, and there is no user namespace to map them with.
    #[error("the mount at {target} maps owners, and no user namespace was made for that")]
    NoUserNamespace {
        /// In the container.
        target: PathBuf,
    },
    /// The container's cgroup is not where it should be.
    #[error("{path} is not a cgroup beneath {cgroup:?}")]
    Cgroup {
        /// On the host.
        path: PathBuf,
        /// The spec's cgroup path.
        cgroup: PathBuf,
    },
    /// The names of a container's cgroups could not be laid out.
    #[error("cannot make the directory of cgroups: {attempt}")]
    CgroupDirectory {
        /// What was tried.
        attempt: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// More mounts of the host than can be sent.
    #[error("the container has more than {MOST_FDS} mounts of files and directories of the host")]
    TooManyMounts,
    /// A device that is no device.
    #[error("the device {path} has a type or number that Linux does not have")]
    BadDevice {
        /// In the container.
        path: PathBuf,
    },
}

/// What a launch needs beyond the spec.
#[derive(Debug)]
pub struct Extra {
    /// The container's ID.
    pub container_id: String,
    /// Where its processes go.
    pub cgroup: proto::Cgroup,
    /// The root, as a detached mount.
    pub rootfs: OwnedFd,
    /// The environment as bytes, as [`crate::oci::build`] gave it.
    pub raw_env: Vec<Vec<u8>>,
    /// The seccomp filter, an array of `struct sock_filter`; empty for none.
    pub seccomp: Arc<[u8]>,
    /// Absolute path of the CRI log; empty for none.
    pub log_path: PathBuf,
    /// Longest log line in bytes before it is split.
    pub log_line_bytes: u32,
    /// Whether stdin stays open for attach.
    pub stdin: bool,
    /// Whether it is closed after the first attach.
    pub stdin_once: bool,
    /// Absolute path of the exit record.
    pub exit_record: PathBuf,
    /// Join the pod's network namespace.
    pub join_net: bool,
    /// Join the pod's IPC namespace.
    pub join_ipc: bool,
    /// Join the pod's UTS namespace.
    pub join_uts: bool,
    /// Join the pod's PID namespace.
    pub join_pid: bool,
    /// Join the pod's user namespace.
    pub join_user: bool,
    /// Join the PID namespace of this container instead; empty for none.
    pub target_container_id: String,
    /// Directories to be there, besides those that something is mounted at; they
    /// stay writable when the root is read-only.
    pub directories: Vec<String>,
    /// User namespaces for the mounts that map owners, by their maps: see
    /// [`mappings`].
    pub user_namespaces: Vec<Mapped>,
    /// Detached mounts to be used instead of the source of the bind mount at
    /// that target: image volumes.
    pub prepared: BTreeMap<PathBuf, OwnedFd>,
    /// Sources of bind mounts that are open already, by target: see [`open_source`].
    pub opened: BTreeMap<PathBuf, OwnedFd>,
}

/// The descriptors of a message, by index.
#[derive(Debug, Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn push(&mut self, fd: OwnedFd) -> Result<u32, LaunchError> {
        if self.0.len() >= MOST_FDS {
            return Err(LaunchError::TooManyMounts);
        }
        self.0.push(fd);
        u32::try_from(self.0.len() - 1).map_err(|_| LaunchError::TooManyMounts)
    }
}

/// The monitor's Launch and the descriptors it refers to by index.
///
/// # Errors
/// The spec is incomplete or asks for what cannot be had; the message names the
/// mount. Descriptors made so far are closed again, missing source directories
/// that were made stay.
pub fn plan(spec: &Spec, extra: Extra) -> Result<(proto::Launch, Vec<OwnedFd>), LaunchError> {
    let linux = spec
        .linux()
        .as_ref()
        .ok_or(LaunchError::Incomplete { part: "linux" })?;
    let root = spec
        .root()
        .as_ref()
        .ok_or(LaunchError::Incomplete { part: "root" })?;
    let process = process(spec, &extra.raw_env, &extra.seccomp)?;
    let own = |typ| {
        let each = linux.namespaces().iter().flatten();
        each.filter(|n| n.path().is_none()).any(|n| n.typ() == typ)
    };

    let mut planner = Planner {
        fds: Fds::default(),
        steps: Vec::new(),
        cgroup: extra.cgroup,
        cgroup_path: linux.cgroups_path().clone().unwrap_or_default(),
        own_cgroup_namespace: own(LinuxNamespaceType::Cgroup),
        user_namespaces: extra.user_namespaces,
        mapping: mapping(linux.uid_mappings(), linux.gid_mappings()),
        prepared: extra.prepared,
        opened: extra.opened,
        label: linux.mount_label().clone().unwrap_or_default(),
        passes_on: false,
    };
    let rootfs_fd = planner.fds.push(extra.rootfs)?;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let parsed: Vec<Options> = mounts.iter().map(Options::parse).collect();
    planner.passes_on = parsed.iter().any(Options::shares);

    // Nodes and links are never made in what belongs to the host.
    let of_the_host = |path: &Path| {
        let mut bound = mounts
            .iter()
            .zip(&parsed)
            .filter(|(_, options)| options.bind.is_some());
        bound.any(|(mount, _)| path.starts_with(mount.destination()))
    };
    let devices = linux
        .devices()
        .iter()
        .flatten()
        .filter(|d| !of_the_host(d.path()));
    let mut devices: Vec<_> = devices.map(device).collect::<Result<_, _>>()?;
    for (mount, options) in mounts.iter().zip(&parsed) {
        planner.mount(mount, options, &mut devices)?;
    }
    if planner.mapping.is_some() {
        let fifo = |node: &proto::DeviceNode| node.kind == FileType::Fifo.as_raw_mode();
        let (fifos, nodes) = devices.into_iter().partition(fifo);
        devices = fifos;
        planner.bind_nodes(nodes)?;
    }
    let links = LINKS
        .iter()
        .filter(|(path, _)| !of_the_host(Path::new(path)));
    let masked_paths = linux.masked_paths().clone().unwrap_or_default();
    let null_fd = match masked_paths.is_empty() {
        true => None,
        false => Some(planner.null()?),
    };

    let launch = proto::Launch {
        oci_runtime: None,
        hooks: None,
        container_id: extra.container_id,
        process: Some(process),
        new_pid: own(LinuxNamespaceType::Pid),
        new_cgroup: planner.own_cgroup_namespace,
        join_net: extra.join_net,
        join_ipc: extra.join_ipc,
        join_uts: extra.join_uts,
        join_pid: extra.join_pid,
        join_user: extra.join_user,
        target_container_id: extra.target_container_id,
        rootfs_fd,
        rootfs_readonly: root.readonly().unwrap_or(false),
        mounts: planner.steps,
        devices,
        symlinks: links
            .map(|&(path, target)| proto::Symlink {
                path: path.into(),
                target: target.into(),
            })
            .collect(),
        null_fd,
        masked_paths,
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        log_path: text("the log path", &extra.log_path)?,
        stdin: extra.stdin,
        stdin_once: extra.stdin_once,
        log_line_bytes: extra.log_line_bytes,
        exit_record: text("the exit record", &extra.exit_record)?,
        hostname: String::new(),
        sysctls: sysctls(linux.sysctl().as_ref()),
        cgroup: Some(planner.cgroup),
        writable_directories: extra.directories.clone(),
        directories: extra.directories,
        mount_label: planner.label,
        // The node's, not the spec's: the caller's to add.
        log_policy: None,
    };
    Ok((launch, planner.fds.0))
}

/// How the spec's process stands, for the container's init; an exec replaces
/// `argv`, `tty` and what else it has of its own.
///
/// `raw_env` is the environment as bytes: what of it still reads like the
/// spec's is taken from there, the rest from the spec, which plugins may have
/// changed.
///
/// # Errors
/// The spec has no process or no arguments, or its directory is not UTF-8.
pub fn process(
    spec: &Spec,
    raw_env: &[Vec<u8>],
    seccomp: &[u8],
) -> Result<proto::Process, LaunchError> {
    let process = spec
        .process()
        .as_ref()
        .ok_or(LaunchError::Incomplete { part: "process" })?;
    let argv = process.args().as_deref().unwrap_or_default();
    if argv.is_empty() {
        return Err(LaunchError::Incomplete {
            part: "process.args",
        });
    }
    let user = process.user();
    let sets = process.capabilities();
    let bits = |set: fn(&oci::LinuxCapabilities) -> &Option<oci::Capabilities>| {
        capability_set(sets.as_ref().and_then(|sets| set(sets).as_ref())).bits()
    };
    let size = process.console_size().unwrap_or_default();
    let cells = |n: u64| u32::try_from(n).unwrap_or(0);
    Ok(proto::Process {
        argv: argv
            .iter()
            .map(|argument| argument.clone().into_bytes())
            .collect(),
        env: environment(process.env().as_deref().unwrap_or_default(), raw_env),
        cwd: text("the working directory", process.cwd())?,
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        cap_bounding: bits(oci::LinuxCapabilities::bounding),
        cap_effective: bits(oci::LinuxCapabilities::effective),
        cap_permitted: bits(oci::LinuxCapabilities::permitted),
        cap_inheritable: bits(oci::LinuxCapabilities::inheritable),
        cap_ambient: bits(oci::LinuxCapabilities::ambient),
        no_new_privs: process.no_new_privileges().unwrap_or(false),
        seccomp: seccomp.to_vec(),
        seccomp_flags: 0,
        rlimits: process.rlimits().iter().flatten().map(rlimit).collect(),
        oom_score_adj: process.oom_score_adj(),
        umask: user.umask(),
        apparmor_profile: process.apparmor_profile().clone().unwrap_or_default(),
        selinux_label: process.selinux_label().clone().unwrap_or_default(),
        tty: process.terminal().unwrap_or(false),
        tty_width: cells(size.width()),
        tty_height: cells(size.height()),
        stream_owner: stream_owner(spec, user),
    })
}

/// The mappings that the mounts of a spec name, each once, for
/// [`Extra::user_namespaces`].
pub fn mappings(spec: &Spec) -> Vec<Mapping> {
    let mounts = spec.mounts().iter().flatten();
    let mut all: Vec<_> = mounts
        .filter_map(|mount| mapping(mount.uid_mappings(), mount.gid_mappings()))
        .collect();
    all.sort();
    all.dedup();
    all
}

/// `None` where neither is given.
pub(crate) fn mapping(
    uids: &Option<Vec<oci::LinuxIdMapping>>,
    gids: &Option<Vec<oci::LinuxIdMapping>>,
) -> Option<Mapping> {
    let ranges = |given: &Option<Vec<oci::LinuxIdMapping>>| {
        let each = given.iter().flatten();
        each.map(|range| IdMapping {
            container_id: range.container_id(),
            host_id: range.host_id(),
            length: range.size(),
        })
        .collect::<Vec<_>>()
    };
    let mapping = Mapping {
        uids: ranges(uids),
        gids: ranges(gids),
    };
    (!mapping.uids.is_empty() || !mapping.gids.is_empty()).then_some(mapping)
}

/// What the process's IDs are on the host, where they are others there.
pub(crate) fn stream_owner(spec: &Spec, user: &oci::User) -> Option<proto::Owner> {
    let linux = spec.linux().as_ref()?;
    let mapping = mapping(linux.uid_mappings(), linux.gid_mappings())?;
    Some(proto::Owner {
        uid: mapping.uid(user.uid())?,
        gid: mapping.gid(user.gid())?,
    })
}

fn rlimit(limit: &oci::PosixRlimit) -> proto::Rlimit {
    proto::Rlimit {
        resource: Rlimit::number(limit.typ()),
        soft: limit.soft(),
        hard: limit.hard(),
    }
}

fn environment(spec: &[String], raw: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let by_text: HashMap<_, _> = raw
        .iter()
        .map(|entry| (String::from_utf8_lossy(entry), entry))
        .collect();
    let bytes = |entry: &String| match by_text.get(entry.as_str()) {
        Some(raw) => (*raw).clone(),
        None => entry.clone().into_bytes(),
    };
    spec.iter().map(bytes).collect()
}

fn text(what: &'static str, path: &Path) -> Result<String, LaunchError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| LaunchError::NotText {
        what,
        value: path.to_owned(),
    })
}

/// Dotted names as paths; in names with slashes a dot is part of a name.
fn sysctls(sysctls: Option<&HashMap<String, String>>) -> Vec<proto::Sysctl> {
    let path = |name: &str| match name.contains('/') {
        true => name.to_owned(),
        false => name.replace('.', "/"),
    };
    let each = sysctls.into_iter().flatten();
    let mut all: Vec<_> = each
        .map(|(name, value)| proto::Sysctl {
            path: path(name),
            value: value.clone(),
        })
        .collect();
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

fn device(device: &oci::LinuxDevice) -> Result<proto::DeviceNode, LaunchError> {
    let bad = || LaunchError::BadDevice {
        path: device.path().clone(),
    };
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(bad()),
    };
    Ok(proto::DeviceNode {
        path: text("the device", device.path())?,
        kind: kind.as_raw_mode(),
        major: u32::try_from(device.major()).map_err(|_| bad())?,
        minor: u32::try_from(device.minor()).map_err(|_| bad())?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// Steps and descriptors as they come together.
struct Planner {
    fds: Fds,
    steps: Vec<MountStep>,
    cgroup: proto::Cgroup,
    /// The container's cgroup below the hierarchies' mount points.
    cgroup_path: PathBuf,
    own_cgroup_namespace: bool,
    user_namespaces: Vec<Mapped>,
    /// The pod's own, where it has a user namespace.
    mapping: Option<Mapping>,
    prepared: BTreeMap<PathBuf, OwnedFd>,
    opened: BTreeMap<PathBuf, OwnedFd>,
    /// SELinux label of what is mounted for the container; empty for none.
    label: String,
    /// Whether a mount of this container passes mounts on to the host: what is
    /// attached below it then becomes shared, and has to be told again.
    passes_on: bool,
}

impl Planner {
    fn mount(
        &mut self,
        mount: &oci::Mount,
        options: &Options,
        devices: &mut Vec<proto::DeviceNode>,
    ) -> Result<(), LaunchError> {
        let typ = mount.typ().as_deref().unwrap_or_default();
        match (options.bind, typ) {
            (Some(recursive), _) => self.bind(mount, options, recursive),
            (None, "") => Err(LaunchError::Incomplete {
                part: "type of a mount",
            }),
            (None, "cgroup") => self.cgroup(mount, options),
            (None, "tmpfs") if mount.destination() == Path::new("/dev") => {
                match self.mapping.clone() {
                    Some(mapping) => self.dev(mount, options, &mapping, devices),
                    None => self.file_system(mount, options, typ),
                }
            }
            (None, _) => self.file_system(mount, options, typ),
        }
    }

    /// A file system that the monitor mounts in the container's namespaces.
    fn file_system(
        &mut self,
        mount: &oci::Mount,
        options: &Options,
        typ: &str,
    ) -> Result<(), LaunchError> {
        let source = mount.source().as_deref().unwrap_or(Path::new(typ));
        self.steps.push(MountStep {
            target: text("a mount's target", mount.destination())?,
            fs_type: typ.to_owned(),
            source: text("a mount's source", source)?,
            options: options.data.join(","),
            flags: options.flags(),
            propagation: options.propagation_bits(),
            // Kernels are built without message queues.
            optional: typ == "mqueue",
            ..MountStep::default()
        });
        Ok(())
    }

    /// A detached mount of the host's /dev/null, to hide files under.
    fn null(&mut self) -> Result<u32, LaunchError> {
        let path = Path::new("/dev/null");
        let failed = |source| LaunchError::Mount {
            attempt: "copy the mount of",
            path: path.to_owned(),
            target: "a masked file".into(),
            source,
        };
        let null = mount::clone_tree(path, false).map_err(failed)?;
        let change = Change {
            propagation: Some(mount::Propagation::Private),
            ..Change::default()
        };
        mount::set_attr(&null, change, false).map_err(failed)?;
        self.fds.push(null)
    }
}

#[cfg(test)]
mod tests;
