//! User namespaces that owners are mapped with: the pod's own mapping for its
//! root file systems, a volume's own for that volume.
//!
//! The kernel takes a mapping for a mount only from a user namespace that has
//! it. The pod's own is held by its monitor; the daemon makes further ones with
//! equal maps when it needs them, so that a volume may have any mapping, and no
//! monitor has to answer for a mount to be made. Each is made by a
//! `berth-monitor --user-namespace` that ends at once: the descriptor keeps it.
//!
//! Source: mount_setattr(2), "ID-mapped mounts"; user_namespaces(7); KEP-127.

use crate::monitor::Program;
use crate::pod_spec::{IdMapping, UserNamespace};
use berth_sys::mount::{self, Change};
use berth_sys::namespace::{self, Kind};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Namespaces kept for the next start with the same maps: one per pod that
/// starts containers just now is enough, and each takes a little of the kernel's
/// memory.
const MOST_KEPT: usize = 32;

/// The first kernel whose overlayfs takes layers with mapped owners.
const OLDEST_KERNEL: (u32, u32) = (5, 19);

/// Why owners cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// The helper could not be started.
    #[error("cannot start {program} to make a user namespace")]
    Spawn {
        /// The monitor's program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel makes none, or no more.
    #[error("the kernel makes no user namespace: {said}")]
    Refused {
        /// What the helper said.
        said: String,
    },
    /// The maps were refused.
    #[error("cannot {attempt} of a user namespace")]
    Map {
        /// "write uid_map", "open the namespace".
        attempt: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel cannot do it at all.
    #[error("Linux {release} is too old: user namespaces for pods need 5.19")]
    OldKernel {
        /// Its version.
        release: String,
    },
    /// The file system cannot.
    #[error("the file system of {path} cannot show owners mapped")]
    FileSystem {
        /// A directory on it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How IDs inside are IDs of the host: CRI's ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// Users.
    pub uids: Vec<IdMapping>,
    /// Groups.
    pub gids: Vec<IdMapping>,
}

impl From<&UserNamespace> for Mapping {
    fn from(user: &UserNamespace) -> Self {
        Self {
            uids: user.uids.clone(),
            gids: user.gids.clone(),
        }
    }
}

impl Mapping {
    /// What a user inside is on the host; `None` for one without a range.
    pub fn uid(&self, inside: u32) -> Option<u32> {
        outside(&self.uids, inside)
    }

    /// What a group inside is on the host; `None` for one without a range.
    pub fn gid(&self, inside: u32) -> Option<u32> {
        outside(&self.gids, inside)
    }
}

fn outside(ranges: &[IdMapping], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inside.checked_sub(range.container_id)?;
        (offset < range.length).then(|| range.host_id.checked_add(offset))?
    })
}

/// The text of a uid_map or gid_map file.
fn map_text(ranges: &[IdMapping]) -> String {
    let mut text = String::new();
    for range in ranges {
        let (inside, outside) = (range.container_id, range.host_id);
        let _ = writeln!(text, "{inside} {outside} {}", range.length);
    }
    text
}

/// A user namespace, and its maps.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Whoever has this keeps the namespace.
    pub namespace: Arc<OwnedFd>,
    /// Its maps.
    pub mapping: Mapping,
}

/// Makes user namespaces, and keeps some.
#[derive(Debug, Default)]
pub struct UserNamespaces {
    /// The last used at the end.
    kept: Mutex<Vec<Mapped>>,
}

impl UserNamespaces {
    /// One with these maps. Blocks for the start of a process, unless one like it
    /// was asked for lately.
    ///
    /// # Errors
    /// The kernel's; maps that overlap are refused by it.
    pub fn of(&self, program: &Program, mapping: &Mapping) -> Result<Mapped, UserNamespaceError> {
        let mut kept = crate::operation::lock(&self.kept);
        let at = kept.iter().position(|mapped| mapped.mapping == *mapping);
        let found = match at {
            Some(at) => kept.remove(at),
            None => {
                drop(kept);
                let made = Mapped {
                    namespace: Arc::new(make(program, mapping)?),
                    mapping: mapping.clone(),
                };
                kept = crate::operation::lock(&self.kept);
                made
            }
        };
        if kept.len() >= MOST_KEPT {
            kept.remove(0);
        }
        kept.push(found.clone());
        Ok(found)
    }

    /// Whether pods with user namespaces can run here, their images and writable
    /// layers being below `dir`: tried, on a copy of that mount.
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self, program: &Program, dir: &Path) -> Result<(), UserNamespaceError> {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        if kernel_version(&release).is_none_or(|version| version < OLDEST_KERNEL) {
            return Err(UserNamespaceError::OldKernel {
                release: release.into_owned(),
            });
        }
        let range = IdMapping {
            container_id: 0,
            host_id: 65_536,
            length: 65_536,
        };
        let mapping = Mapping {
            uids: vec![range],
            gids: vec![range],
        };
        let namespace = make(program, &mapping)?;
        let tried = mount::clone_tree(dir, false).and_then(|copy| {
            let change = Change {
                idmap: Some(namespace.as_fd()),
                ..Change::default()
            };
            mount::set_attr(&copy, change, false)
        });
        tried.map_err(|source| UserNamespaceError::FileSystem {
            path: dir.to_owned(),
            source: source.into(),
        })
    }
}

/// "6.1.0-18-amd64": major and minor.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn make(program: &Program, mapping: &Mapping) -> Result<OwnedFd, UserNamespaceError> {
    let refuse = |source| UserNamespaceError::Spawn {
        program: program.path().to_owned(),
        source,
    };
    let mut command = program.command();
    command
        .arg("--user-namespace")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = Helper(command.spawn().map_err(refuse)?);
    let mut word = Vec::new();
    if let Some(stdout) = &mut child.0.stdout {
        // It says one byte, or ends.
        stdout.take(1).read_to_end(&mut word).map_err(refuse)?;
    }
    if word != b"r" {
        let mut said = String::new();
        if let Some(stderr) = &mut child.0.stderr {
            let _ = stderr.take(1024).read_to_string(&mut said);
        }
        let said = said.trim().to_owned();
        return Err(UserNamespaceError::Refused { said });
    }
    let pid = child.0.id();
    let write = |name: &str, ranges| fs::write(format!("/proc/{pid}/{name}"), map_text(ranges));
    let failed = |attempt| move |source| UserNamespaceError::Map { attempt, source };
    write("gid_map", &mapping.gids).map_err(failed("write the gid_map"))?;
    write("uid_map", &mapping.uids).map_err(failed("write the uid_map"))?;
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    namespace::open(pid, Kind::User)
        .map_err(|errno| failed("open the file")(io::Error::from(errno)))
}

/// Ends with its standard input.
struct Helper(std::process::Child);

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: IdMapping = IdMapping {
        container_id: 0,
        host_id: 1000,
        length: 10,
    };

    #[test]
    fn ids_inside_are_ids_of_the_host() {
        let mapping = Mapping {
            uids: vec![RANGE],
            gids: Vec::new(),
        };
        assert_eq!(mapping.uid(0), Some(1000));
        assert_eq!(mapping.uid(9), Some(1009));
        assert_eq!(mapping.uid(10), None);
        assert_eq!(mapping.gid(0), None);
        assert_eq!(map_text(&mapping.uids), "0 1000 10\n");
    }

    #[test]
    fn versions_of_kernels_are_compared_as_numbers() {
        for (release, version) in [
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.19.0", Some((5, 19))),
            ("6.18", Some((6, 18))),
            ("nonsense", None),
            ("", None),
        ] {
            assert_eq!(kernel_version(release), version, "{release}");
        }
    }
}
