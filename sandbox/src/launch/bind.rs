//! Binds: a path of the host as a detached mount.

use super::options::Options;
use super::{LaunchError, Planner, text};
use berth_proto::monitor_v1::MountStep;
use berth_sys::Errno;
use berth_sys::mount::{self, Change, Propagation};
use oci_spec::runtime::Mount;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// PROC_SUPER_MAGIC. Source: linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;

/// This thread's: threads may be in mount namespaces of their own.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

impl Planner {
    pub(super) fn bind(
        &mut self,
        mount: &Mount,
        options: &Options,
        recursive: bool,
    ) -> Result<(), LaunchError> {
        let target = mount.destination();
        if let Some(option) = options.data.first() {
            return Err(LaunchError::BadOption {
                target: target.clone(),
                option: option.clone(),
            });
        }
        let fd = match self.prepared.remove(target) {
            Some(fd) => Bound {
                fd,
                path: target,
                target,
            },
            None => {
                let path = mount.source().as_deref();
                let path = path.ok_or(LaunchError::Incomplete {
                    part: "source of a bind mount",
                })?;
                let opened = match self.opened.remove(target) {
                    Some(opened) => opened,
                    None => open(path, target)?,
                };
                check_propagation(&opened, path, options.propagation)?;
                if target == Path::new("/proc") {
                    check_procfs(&opened, path)?;
                }
                let bound = Opened {
                    fd: opened,
                    path,
                    target,
                };
                bound.detach(recursive)?
            }
        };
        let user_namespace = match options.idmap {
            None => None,
            Some(_) => Some(self.user_namespace(mount)?),
        };
        let file = fd.is_file()?;
        fd.change(options, file, user_namespace.as_deref())?;
        let propagation = if self.passes_on {
            options.propagation_bits()
        } else {
            0
        };
        let index = self.fds.push(fd.fd)?;
        self.steps.push(MountStep {
            target: text("a mount's target", target)?,
            fd: Some(index),
            file,
            propagation,
            ..MountStep::default()
        });
        Ok(())
    }

    /// One with the mount's own maps, or the pod's where it has none.
    fn user_namespace(&self, mount: &Mount) -> Result<Arc<OwnedFd>, LaunchError> {
        let own = super::mapping(mount.uid_mappings(), mount.gid_mappings());
        let wanted = own.as_ref().or(self.mapping.as_ref());
        let mut known = self.user_namespaces.iter();
        let found = known.find(|mapped| Some(&mapped.mapping) == wanted);
        found
            .map(|mapped| mapped.namespace.clone())
            .ok_or_else(|| LaunchError::NoUserNamespace {
                target: mount.destination().clone(),
            })
    }

    /// Binds the directory `path` of the host at `target`, with `options`.
    pub(super) fn bind_directory(
        &mut self,
        path: &Path,
        target: &Path,
        options: &Options,
        recursive: bool,
    ) -> Result<(), LaunchError> {
        let opened = Opened {
            fd: open_existing(path, target)?,
            path,
            target,
        };
        let fd = opened.detach(recursive)?;
        fd.change(options, false, None)?;
        let index = self.fds.push(fd.fd)?;
        self.steps.push(MountStep {
            target: text("a mount's target", target)?,
            fd: Some(index),
            ..MountStep::default()
        });
        Ok(())
    }
}

/// A place on the host that links have led to, once.
struct Opened<'a> {
    fd: OwnedFd,
    path: &'a Path,
    target: &'a Path,
}

/// A detached mount.
struct Bound<'a> {
    fd: OwnedFd,
    path: &'a Path,
    target: &'a Path,
}

impl<'a> Opened<'a> {
    fn detach(self, recursive: bool) -> Result<Bound<'a>, LaunchError> {
        let Opened { fd, path, target } = self;
        let fd = mount::clone_tree_at(&fd, recursive)
            .map_err(|source| failed("copy the mount of", path, target, source))?;
        Ok(Bound { fd, path, target })
    }
}

impl Bound<'_> {
    fn failed(&self, attempt: &'static str, source: Errno) -> LaunchError {
        failed(attempt, self.path, self.target, source)
    }

    /// Whether it is mounted over a file: anything but a directory.
    fn is_file(&self) -> Result<bool, LaunchError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|e| self.failed("look at", e))?;
        Ok(FileType::from_raw_mode(stat.st_mode) != FileType::Directory)
    }

    fn change(
        &self,
        options: &Options,
        file: bool,
        user_namespace: Option<&OwnedFd>,
    ) -> Result<(), LaunchError> {
        let (propagation, below) = options.propagation.unwrap_or((Propagation::Private, true));
        let set = |change, recursive| {
            mount::set_attr(&self.fd, change, recursive)
                .map_err(|e| self.failed("set the flags of", e))
        };
        // What is said of all mounts below goes in one call, which the kernel
        // does for all of them or none; nothing is mounted below a file.
        let everywhere = if file {
            options.set | options.set_below
        } else {
            options.set_below
        };
        let propagation_below = below.then_some(propagation);
        set(
            Change {
                set: everywhere,
                propagation: propagation_below,
                ..Change::default()
            },
            true,
        )?;
        let rest = Change {
            set: options.set & !everywhere,
            propagation: (!below).then_some(propagation),
            ..Change::default()
        };
        if rest.set != 0 || rest.propagation.is_some() {
            set(rest, false)?;
        }
        if let (Some(namespace), Some(below)) = (user_namespace, options.idmap) {
            let change = Change {
                idmap: Some(namespace.as_fd()),
                ..Change::default()
            };
            let mapped = match mount::set_attr(&self.fd, change, below) {
                // Something mounted below cannot be mapped: then it shows the owners it has.
                Err(Errno::INVAL) if below => mount::set_attr(&self.fd, change, false),
                other => other,
            };
            mapped.map_err(|e| self.failed("map the owners of", e))?;
        }
        Ok(())
    }
}

fn failed(attempt: &'static str, path: &Path, target: &Path, source: Errno) -> LaunchError {
    LaunchError::Mount {
        attempt,
        path: path.to_owned(),
        target: target.to_owned(),
        source,
    }
}

/// Opens a mount's source, with O_PATH; one that is missing becomes a directory, as
/// with containerd (CRI says nothing, and pods rely on it).
///
/// # Errors
/// It is not there and cannot be made.
pub fn open(path: &Path, target: &Path) -> Result<OwnedFd, LaunchError> {
    match open_existing(path, target) {
        Err(LaunchError::Source {
            source: Errno::NOENT,
            ..
        }) => {
            fs::create_dir_all(path).map_err(|source| LaunchError::MakeSource {
                path: path.to_owned(),
                target: target.to_owned(),
                source,
            })?;
            open_existing(path, target)
        }
        other => other,
    }
}

fn open_existing(path: &Path, target: &Path) -> Result<OwnedFd, LaunchError> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|source| {
        LaunchError::Source {
            path: path.to_owned(),
            target: target.to_owned(),
            source,
        }
    })
}

fn check_procfs(opened: &OwnedFd, path: &Path) -> Result<(), LaunchError> {
    let target = Path::new("/proc");
    let stat =
        rustix::fs::fstatfs(opened).map_err(|source| failed("look at", path, target, source))?;
    if u64::try_from(stat.f_type) == Ok(PROC_MAGIC) {
        Ok(())
    } else {
        Err(LaunchError::NotProc {
            path: path.to_owned(),
        })
    }
}

/// Slaves need somebody to follow and peers somebody to share with; without,
/// the mounts that the pod waits for would never come.
fn check_propagation(
    opened: &OwnedFd,
    path: &Path,
    propagation: Option<(Propagation, bool)>,
) -> Result<(), LaunchError> {
    let (wanted, needed, fits): (_, _, fn(&str) -> bool) = match propagation {
        None | Some((Propagation::Private, _)) => return Ok(()),
        Some((Propagation::Slave, _)) => ("host-to-container", "shared or slave", |field| {
            field.starts_with("shared:") || field.starts_with("master:")
        }),
        Some((Propagation::Shared, _)) => ("bidirectional", "shared", |field| {
            field.starts_with("shared:")
        }),
    };
    let stat = rustix::fs::statx(opened, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|source| failed("look at", path, path, source))?;
    let mountinfo = fs::read_to_string(MOUNTINFO).map_err(|source| LaunchError::Mountinfo {
        path: MOUNTINFO,
        source,
    })?;
    if optional_fields(&mountinfo, stat.stx_mnt_id).any(fits) {
        Ok(())
    } else {
        Err(LaunchError::NotPropagated {
            path: path.to_owned(),
            wanted,
            needed,
        })
    }
}

/// The optional fields of the mount `id`: "shared:1", "master:2".
///
/// Source: proc_pid_mountinfo(5).
fn optional_fields(mountinfo: &str, id: u64) -> impl Iterator<Item = &str> {
    let of_it =
        move |line: &&str| line.split(' ').next().and_then(|first| first.parse().ok()) == Some(id);
    let line = mountinfo.lines().find(of_it).unwrap_or_default();
    line.split(' ').skip(6).take_while(|field| *field != "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_fields_are_those_before_the_hyphen() {
        let text = "\
            21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            22 21 0:5 / /a rw shared:2 master:1 - tmpfs shared:9 rw\n\
            23 21 0:6 / /b rw - tmpfs tmpfs rw\n";
        let fields = |id| optional_fields(text, id).collect::<Vec<_>>();
        assert_eq!(fields(21), ["shared:1"]);
        assert_eq!(fields(22), ["shared:2", "master:1"]);
        assert_eq!(fields(23), [""; 0]);
        assert_eq!(fields(24), [""; 0]);
    }
}
