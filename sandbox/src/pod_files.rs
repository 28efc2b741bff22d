//! Files that all containers of a pod share: who it is called, whom it asks for
//! names, and its shared memory.
//!
//! ```text
//! DIR/resolv.conf   from the pod's DNS settings, else a copy of the host's
//! DIR/hostname      the pod's host name and a newline
//! DIR/hosts         only used where the kubelet mounts none of its own
//! DIR/shm           a tmpfs, unless the pod shares the host's IPC namespace
//! ```
//!
//! All of it is gone after a reboot, and may be made again over what is there.

use crate::pod_spec::{Dns, Namespace, PodSpec};
use crate::selinux::relabel::label_file;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Size of the pod's shared memory. Source: what containerd, CRI-O and Docker give.
const SHM_BYTES: u64 = 64 << 20;

/// Most of a host's file that is copied: a resolv.conf is some hundred bytes.
const MOST_COPIED: u64 = 1 << 20;

/// Longest host name in bytes. Source: RFC 1123 section 2.1, a label's 63; the
/// kernel takes 64.
const LONGEST_HOSTNAME: usize = 63;

const HOSTS: &str = "\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
";

/// Why a pod's files could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum PodFilesError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the host's is too large to be what it should be.
    #[error("{path} is larger than {MOST_COPIED} bytes")]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// A file or directory could not be made.
    #[error("cannot write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The shared memory could not be mounted.
    #[error("cannot mount the pod's shared memory at {path}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// Something stayed behind.
    #[error("cannot remove {path}")]
    Remove {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A DNS setting that would put further lines into resolv.conf.
    #[error("{text:?} is no DNS server, search domain or option")]
    BadDns {
        /// As given.
        text: String,
    },
}

/// Where a pod's files are on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFiles {
    /// For /etc/resolv.conf.
    pub resolv_conf: PathBuf,
    /// For /etc/hostname.
    pub hostname: PathBuf,
    /// For /etc/hosts.
    pub hosts: PathBuf,
    /// For /dev/shm: the pod's own, or the host's.
    pub shm: PathBuf,
    /// What the pod is called.
    pub hostname_text: String,
}

/// Where the files of a pod below `dir` are, made or not.
pub fn at(dir: &Path, spec: &PodSpec) -> PodFiles {
    PodFiles {
        resolv_conf: dir.join("resolv.conf"),
        hostname: dir.join("hostname"),
        hosts: dir.join("hosts"),
        shm: match spec.namespaces.ipc {
            Namespace::Pod => dir.join("shm"),
            Namespace::Node => "/dev/shm".into(),
        },
        hostname_text: hostname(spec),
    }
}

/// Makes the files of a pod below `dir`, an existing directory that only root
/// can reach. `label` is the SELinux label of what containers see of it; "" for
/// none. What is there already is made anew; shared memory that is mounted
/// stays as it is.
///
/// # Errors
/// The file system's; what has been made then is left to [`remove`].
pub fn make(
    dir: &Path,
    spec: &PodSpec,
    host_resolv: &Path,
    label: &str,
) -> Result<PodFiles, PodFilesError> {
    let files = at(dir, spec);
    let resolv = match spec.dns.as_ref().map(resolv_conf).transpose()? {
        Some(text) if !text.is_empty() => text.into_bytes(),
        // No setting at all means the host's, as for the peers.
        _ => copy(host_resolv)?,
    };
    let hosts = match spec.namespaces.network {
        Namespace::Pod => HOSTS.into(),
        Namespace::Node => copy(Path::new("/etc/hosts"))?,
    };
    write(&files.resolv_conf, &resolv)?;
    write(
        &files.hostname,
        format!("{}\n", files.hostname_text).as_bytes(),
    )?;
    write(&files.hosts, &hosts)?;
    if !label.is_empty() {
        for path in [&files.resolv_conf, &files.hostname, &files.hosts] {
            label_file(path, label).map_err(|errno| PodFilesError::Write {
                path: path.clone(),
                source: errno.into(),
            })?;
        }
    }
    if spec.namespaces.ipc == Namespace::Pod {
        mount_shm(&files.shm, spec, label)?;
    }
    Ok(files)
}

/// Takes a pod's files away again. Succeeds where they are gone.
///
/// # Errors
/// The first of what could not be removed, after everything has been tried.
pub fn remove(dir: &Path) -> Result<(), PodFilesError> {
    let shm = dir.join("shm");
    let failed = |path: &Path, source| PodFilesError::Remove {
        path: path.to_owned(),
        source,
    };
    let mut failures = Vec::new();
    // A mount may have been stacked on another by who was killed in between.
    loop {
        match rustix::mount::unmount(&shm, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => break,
            Err(errno) => {
                failures.push(failed(&shm, errno.into()));
                break;
            }
        }
    }
    let mut check = |path: &Path, result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => failures.push(failed(path, error)),
        _ => {}
    };
    check(&shm, fs::remove_dir(&shm));
    for name in ["resolv.conf", "hostname", "hosts"] {
        let path = dir.join(name);
        check(&path, fs::remove_file(&path));
    }
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// What the pod is called: as asked for, else the host's name on the host's
/// network, else as much of the pod's name as a host name may hold.
pub fn hostname(spec: &PodSpec) -> String {
    if !spec.hostname.is_empty() {
        return spec.hostname.clone();
    }
    if spec.namespaces.network == Namespace::Node {
        let host = rustix::system::uname();
        return host.nodename().to_string_lossy().into_owned();
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let name = spec
        .name
        .name
        .chars()
        .map(|c| if fits(c) { c } else { '-' });
    // All of it is ASCII by now, so characters are bytes.
    let name: String = name.take(LONGEST_HOSTNAME).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() {
        "pod".into()
    } else {
        name.into()
    }
}

/// The text of a resolv.conf; empty where nothing is set.
///
/// Source: resolv.conf(5).
fn resolv_conf(dns: &Dns) -> Result<String, PodFilesError> {
    let words = |words: &[String]| {
        let bad = |word: &&String| {
            word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control())
        };
        match words.iter().find(bad) {
            Some(word) => Err(PodFilesError::BadDns {
                text: word.chars().take(200).collect(),
            }),
            None => Ok(words.join(" ")),
        }
    };
    let mut text = String::new();
    let searches = words(&dns.searches)?;
    if !searches.is_empty() {
        text += &format!("search {searches}\n");
    }
    words(&dns.servers)?;
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    let options = words(&dns.options)?;
    if !options.is_empty() {
        text += &format!("options {options}\n");
    }
    Ok(text)
}

/// A small file of the host's; one that is missing is empty.
fn copy(path: &Path) -> Result<Vec<u8>, PodFilesError> {
    let failed = |source| PodFilesError::Read {
        path: path.to_owned(),
        source,
    };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MOST_COPIED + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MOST_COPIED {
        return Err(PodFilesError::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(bytes)
}

/// Readable for every user of the container, whatever the daemon's umask.
fn write(path: &Path, bytes: &[u8]) -> Result<(), PodFilesError> {
    let failed = |source| PodFilesError::Write {
        path: path.to_owned(),
        source,
    };
    fs::write(path, bytes).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(failed)
}

fn mount_shm(path: &Path, spec: &PodSpec, label: &str) -> Result<(), PodFilesError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(PodFilesError::Write {
                path: path.to_owned(),
                source: error,
            });
        }
        _ => {}
    }
    let failed = |source| PodFilesError::Mount {
        path: path.to_owned(),
        source,
    };
    if is_mounted(path).map_err(failed)? {
        return Ok(());
    }
    let mut options = format!("mode=1777,size={SHM_BYTES}");
    let root = |ids: &[crate::pod_spec::IdMapping]| {
        ids.iter().find(|m| m.container_id == 0).map(|m| m.host_id)
    };
    let user = spec.namespaces.user.as_ref();
    if let Some((Some(uid), Some(gid))) = user.map(|user| (root(&user.uids), root(&user.gids))) {
        options += &format!(",uid={uid},gid={gid}");
    }
    if !label.is_empty() {
        // In quotes, as mount(8) has it: a label has commas in it.
        options += &format!(",context=\"{label}\"");
    }
    let options = std::ffi::CString::new(options).map_err(|_| failed(Errno::INVAL))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("shm", path, "tmpfs", flags, options.as_c_str()).map_err(failed)?;
    rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE).map_err(failed)
}

/// Whether `path` itself is where something is mounted.
///
/// Source: statx(2), STATX_ATTR_MOUNT_ROOT, Linux 5.8.
fn is_mounted(path: &Path) -> Result<bool, Errno> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_spec::{PodName, PodNamespaces, PodSecurity};
    use std::collections::BTreeMap;

    fn spec(name: &str) -> PodSpec {
        PodSpec {
            name: PodName {
                name: name.into(),
                namespace: "default".into(),
                uid: "uid".into(),
                attempt: 0,
            },
            hostname: String::new(),
            log_directory: PathBuf::new(),
            dns: None,
            port_mappings: Vec::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            cgroup_parent: String::new(),
            sysctls: BTreeMap::new(),
            namespaces: PodNamespaces::default(),
            overhead: None,
            resources: None,
            security: PodSecurity::default(),
            runtime_handler: String::new(),
        }
    }

    /// A pod's directory that gives its mount back however the test ends.
    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let removed = remove(self.0.path());
            if !std::thread::panicking() {
                removed.unwrap();
            }
        }
    }

    #[test]
    fn a_pod_is_called_what_was_asked_or_by_its_name() {
        let mut asked = spec("web");
        asked.hostname = "front".into();
        assert_eq!(hostname(&asked), "front");
        assert_eq!(hostname(&spec("web")), "web");
        assert_eq!(hostname(&spec("My_Pod")), "My-Pod");
        assert_eq!(
            hostname(&spec(&format!("{}-tail", "a".repeat(62)))),
            "a".repeat(62)
        );
        assert_eq!(hostname(&spec(&"ä".repeat(70))), "pod");
        let mut host = spec("web");
        host.namespaces.network = Namespace::Node;
        let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(hostname(&host), own.trim());
    }

    #[test]
    fn resolv_conf_holds_what_was_set() {
        let list = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect::<Vec<_>>();
        let dns = Dns {
            servers: list(&["10.0.0.10", "fd00::a"]),
            searches: list(&["a.svc", "svc"]),
            options: list(&["ndots:5"]),
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&Dns::default()).unwrap(), "");
        let bad = Dns {
            searches: list(&["a\nnameserver 6.6.6.6"]),
            ..Dns::default()
        };
        resolv_conf(&bad).unwrap_err();
    }

    #[test]
    fn files_are_made_twice_and_removed_twice() {
        let dir = Dir::new();
        let host = dir.0.path().join("host-resolv");
        fs::write(&host, "nameserver 192.0.2.1\n").unwrap();
        let first = make(dir.0.path(), &spec("web"), &host, "").unwrap();
        fs::write(first.shm.join("kept"), "x").unwrap();
        let files = make(dir.0.path(), &spec("web"), &host, "").unwrap();
        assert_eq!(files, first);
        assert_eq!(
            fs::read_to_string(&files.resolv_conf).unwrap(),
            "nameserver 192.0.2.1\n"
        );
        assert_eq!(fs::read_to_string(&files.hostname).unwrap(), "web\n");
        assert!(
            fs::read_to_string(&files.hosts)
                .unwrap()
                .starts_with("127.0.0.1\tlocalhost\n")
        );
        assert_eq!(
            fs::metadata(&files.hostname).unwrap().permissions().mode() & 0o777,
            0o644
        );

        assert!(is_mounted(&files.shm).unwrap());
        assert!(files.shm.join("kept").exists(), "mounted once");
        assert_eq!(
            fs::metadata(&files.shm).unwrap().permissions().mode() & 0o7777,
            0o1777
        );
        let stat = rustix::fs::statvfs(&files.shm).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, SHM_BYTES);
        use rustix::fs::StatVfsMountFlags as F;
        // What rustix has no name for: ST_NODEV, ST_NOEXEC. Source: statvfs(3).
        assert!(stat.f_flag.contains(F::NOSUID));
        assert_eq!(stat.f_flag.bits() & 0b1100, 0b1100);

        remove(dir.0.path()).unwrap();
        assert!(!files.shm.exists() && !files.hosts.exists());
        remove(dir.0.path()).unwrap();
    }

    #[test]
    fn a_pod_in_the_hosts_ipc_namespace_has_the_hosts_shared_memory() {
        let dir = Dir::new();
        let mut spec = spec("web");
        spec.namespaces.ipc = Namespace::Node;
        let files = make(
            dir.0.path(),
            &spec,
            Path::new("/nonexistent/resolv.conf"),
            "",
        )
        .unwrap();
        assert_eq!(files.shm, Path::new("/dev/shm"));
        assert_eq!(fs::read(&files.resolv_conf).unwrap(), b"");
        assert!(!dir.0.path().join("shm").exists());
    }
}
