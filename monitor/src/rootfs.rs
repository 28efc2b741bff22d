//! The file system a container sees, put together in its own mount namespace.
//!
//! ```text
//! root attached over "/" (with hooks: over the bundle's rootfs) ─> mounts ─> devices, links
//!   ─> console ─> hooks ─> volumes, masked, read-only paths ─> root read-only
//!   ─> pivot_root(".", ".") ─> old root detached
//! ```
//!
//! What comes from outside arrives as detached mounts; what is mounted here is
//! made with fsopen. Targets are found by [`Root`], attached to by descriptor.
//! The old root stays until all is mounted: the kernel lets a user namespace
//! mount procfs only while a whole one is in sight.
//!
//! Source: OCI runtime-spec, config-linux.md; pivot_root(2), "pivot_root(".",
//! ".")"; CVE-2019-19921 and CVE-2023-27561 (/proc as a link), CVE-2025-31133
//! (masks), CVE-2025-52565 (console).

use crate::beneath::{self, Root};
use crate::status::{Failed, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use berth_sys::mount::{self, Change, Propagation, attr};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// File systems that the rest relies on being what and where they seem: no
/// symbolic link may lead to their mount point.
const TRUSTED: [&str; 5] = ["proc", "sysfs", "devpts", "cgroup", "cgroup2"];

/// Puts the root over "/" of a new mount namespace and everything into it,
/// short of the console, the masks and the change of root.
pub fn assemble(launch: &proto::Launch, fds: &[OwnedFd]) -> Result<OwnedFd, Failed> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(c"/", private).step("make mounts private", "/")?;

    let rootfs = fd(fds, Some(launch.rootfs_fd), "rootfs")?;
    let change = Change {
        propagation: Some(Propagation::Private),
        ..Change::default()
    };
    mount::set_attr(rootfs, change, true).step("mount_setattr", "rootfs")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Nothing has to be there for "/"; hooks are told of a bundle, and look for it in there.
    let place = match &launch.hooks {
        Some(hooks) => format!("{}/rootfs", hooks.bundle),
        None => "/".to_owned(),
    };
    let old = rustix::fs::open(&place, flags, Mode::empty()).step("open", &place)?;
    mount::attach(rootfs, &old).step("attach rootfs", &place)?;
    let rootfs = rootfs
        .try_clone_to_owned()
        .map_err(|_| Failed::invalid("dup", "rootfs"))?;

    let root = Root(rootfs.as_fd());
    for step in &launch.mounts {
        match mount_one(root, step, fds, &launch.mount_label) {
            Err(_) if step.optional => {}
            other => other?,
        }
    }
    for device in &launch.devices {
        make_device(root, launch, device)?;
    }
    for link in &launch.symlinks {
        make_symlink(root, launch, link)?;
    }
    Ok(rootfs)
}

/// The directory that a node or link at `path` is to be made in, and its name.
///
/// The daemon leaves out what would be in a mount of the host's by its path; a
/// symbolic link of the image's could still lead there. So it has to be on the
/// very mount that its path says: the deepest one that the path is below, and
/// that one found through no link.
fn parent_of<'a>(
    root: Root<'_>,
    launch: &proto::Launch,
    path: &'a str,
) -> Result<(OwnedFd, &'a str), Errno> {
    let parent = Path::new(path).parent().ok_or(Errno::INVAL)?;
    let targets = launch.mounts.iter().map(|step| step.target.as_str());
    let above = targets.filter(|target| parent.starts_with(target));
    let Some(target) = above.max_by_key(|target| Path::new(target).components().count()) else {
        return root.parent_of_own(path);
    };
    let below = Path::new(path).strip_prefix(target).ok();
    let below = below.and_then(Path::to_str).ok_or(Errno::INVAL)?;
    let mounted = root.find_plain(target)?;
    Root(mounted.as_fd()).parent_of_own(below)
}

/// The descriptor a request refers to.
pub fn fd<'a>(
    fds: &'a [OwnedFd],
    index: Option<u32>,
    what: &str,
) -> Result<BorrowedFd<'a>, Failed> {
    index
        .and_then(|index| fds.get(index as usize))
        .map(AsFd::as_fd)
        .ok_or_else(|| Failed::new("find descriptor", what, Errno::BADF))
}

/// File systems whose files all get the container's label. Those of the kernel
/// have labels of their own.
///
/// Source: what runc and crun label.
const LABELLED: [&str; 2] = ["tmpfs", "devpts"];

fn mount_one(
    root: Root<'_>,
    step: &proto::MountStep,
    fds: &[OwnedFd],
    label: &str,
) -> Result<(), Failed> {
    let target = &step.target;
    let onto = match step.file {
        true => root.make_file(target),
        false => root.make_dir(target).map(drop).and_then(|()| {
            let plain = step.fd.is_none() && TRUSTED.contains(&step.fs_type.as_str());
            if plain {
                root.find_plain(target)
            } else {
                root.find(target)
            }
        }),
    }
    .step("prepare mount point", target)?;
    let made;
    let mounted = if step.fd.is_some() {
        fd(fds, step.fd, target)?
    } else {
        let attrs = mount_attrs(step.flags)
            .ok_or_else(|| Failed::invalid("mount flags", target.as_str()))?;
        let of_all = match LABELLED.contains(&step.fs_type.as_str()) {
            true => label,
            false => "",
        };
        made = mount::new_labelled_fs(&step.fs_type, &step.source, &step.options, of_all, attrs)
            .step(&format!("mount {}", step.fs_type), target)?;
        if step.fs_type == "mqueue" && !label.is_empty() {
            // One instance for all mounts of an IPC namespace: it takes no option.
            label_root(&made, label).step("label", target)?;
        }
        made.as_fd()
    };
    mount::attach(mounted, onto).step("attach mount", target)?;
    if step.propagation != 0 {
        let recursive = step.propagation & libc::MS_REC != 0;
        let propagation = match step.propagation & !libc::MS_REC {
            libc::MS_PRIVATE => Propagation::Private,
            libc::MS_SLAVE => Propagation::Slave,
            libc::MS_SHARED => Propagation::Shared,
            _ => return Err(Failed::invalid("mount propagation", target.as_str())),
        };
        let change = Change {
            propagation: Some(propagation),
            ..Change::default()
        };
        mount::set_attr(mounted, change, recursive).step("mount propagation", target)?;
    }
    Ok(())
}

/// Gives the root of a file system a label; one that cannot have any goes without,
/// as can one that belongs to a user namespace.
fn label_root(mount: &OwnedFd, label: &str) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(mount, c".", flags, Mode::empty())?;
    let flags = rustix::fs::XattrFlags::empty();
    match rustix::fs::fsetxattr(&root, c"security.selinux", label.as_bytes(), flags) {
        Err(Errno::OPNOTSUPP | Errno::PERM) => Ok(()),
        other => other,
    }
}

/// MS_* of mount(2) as MOUNT_ATTR_*; `None` for one that has none.
fn mount_attrs(flags: u64) -> Option<u64> {
    const PAIRS: [(u64, u64); 9] = [
        (libc::MS_RDONLY, attr::RDONLY),
        (libc::MS_NOSUID, attr::NOSUID),
        (libc::MS_NODEV, attr::NODEV),
        (libc::MS_NOEXEC, attr::NOEXEC),
        (libc::MS_NOATIME, attr::NOATIME),
        (libc::MS_NODIRATIME, attr::NODIRATIME),
        (libc::MS_STRICTATIME, attr::STRICTATIME),
        (256, attr::NOSYMFOLLOW), // MS_NOSYMFOLLOW
        (libc::MS_RELATIME, 0),   // the default
    ];
    let mut attrs = 0;
    let mut rest = flags;
    for (from, to) in PAIRS {
        if rest & from != 0 {
            attrs |= to;
            rest &= !from;
        }
    }
    (rest == 0).then_some(attrs)
}

/// Says in words what EXDEV does not.
fn astray(stage: &str, path: &str, errno: Errno) -> Failed {
    match errno {
        Errno::XDEV => Failed::new(
            &format!("{stage} through a link onto another mount:"),
            path,
            errno,
        ),
        other => Failed::new(stage, path, other),
    }
}

fn make_device(
    root: Root<'_>,
    launch: &proto::Launch,
    device: &proto::DeviceNode,
) -> Result<(), Failed> {
    let path = &device.path;
    let (parent, name) =
        parent_of(root, launch, path).map_err(|errno| astray("make device", path, errno))?;
    let kind = FileType::from_raw_mode(device.kind);
    if !matches!(
        kind,
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo
    ) {
        return Err(Failed::invalid("make device", path.as_str()));
    }
    let mode = Mode::from_raw_mode(device.mode & 0o7777);
    let number = rustix::fs::makedev(device.major, device.minor);
    match rustix::fs::mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .step("make device", path)?;
            let same = FileType::from_raw_mode(stat.st_mode) == kind
                && (kind == FileType::Fifo || stat.st_rdev == number);
            return if same {
                Ok(())
            } else {
                Err(Failed::new("make device", path, Errno::EXIST))
            };
        }
        Err(error) => return Err(Failed::new("make device", path, error)),
    }
    let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(
        &parent,
        name,
        Some(owner.0),
        Some(owner.1),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .step("chown device", path)
}

fn make_symlink(
    root: Root<'_>,
    launch: &proto::Launch,
    link: &proto::Symlink,
) -> Result<(), Failed> {
    let path = &link.path;
    let (parent, name) =
        parent_of(root, launch, path).map_err(|errno| astray("make link", path, errno))?;
    match rustix::fs::symlinkat(link.target.as_str(), &parent, name) {
        Err(Errno::EXIST) => {
            let there =
                rustix::fs::readlinkat(&parent, name, Vec::new()).step("make link", path)?;
            if there.to_bytes() == link.target.as_bytes() {
                return Ok(());
            }
            Err(Failed::new("make link", path, Errno::EXIST))
        }
        other => other.step("make link", path),
    }
}

/// A terminal from the container's own devpts: master and slave, the slave
/// bound onto /dev/console by its descriptor.
pub fn console(root: Root<'_>) -> Result<(OwnedFd, OwnedFd), Failed> {
    let master = root.new_terminal().step("open terminal", "/dev/pts/ptmx")?;
    let slave = berth_sys::pty::slave_of(&master).step("open terminal", "/dev/pts/ptmx")?;
    let onto = root
        .make_file("/dev/console")
        .step("bind console", "/dev/console")?;
    let bound = mount::clone_tree_at(&slave, false).step("bind console", "/dev/console")?;
    mount::attach(bound, onto).step("bind console", "/dev/console")?;
    Ok((master, slave))
}

/// Hides the masked paths and makes the read-only ones so.
pub fn restrict(root: Root<'_>, launch: &proto::Launch, fds: &[OwnedFd]) -> Result<(), Failed> {
    let read_only = Change {
        set: attr::RDONLY,
        ..Change::default()
    };
    if launch.rootfs_readonly {
        for path in &launch.writable_directories {
            keep_writable(root, path)?;
        }
    }
    for path in &launch.readonly_paths {
        let Some(target) = existing(root, path)? else {
            continue;
        };
        let copy = mount::clone_tree_at(&target, true).step("make read-only", path)?;
        mount::set_attr(&copy, read_only, true).step("make read-only", path)?;
        mount::attach(copy, target).step("make read-only", path)?;
    }

    let null = match launch.null_fd {
        Some(_) => {
            let null = fd(fds, launch.null_fd, "null")?;
            if !beneath::is_null(null).step("mask", "null")? {
                return Err(Failed::invalid("mask", "the descriptor is not /dev/null"));
            }
            // Devices can be written on a read-only mount, but the mode and
            // owner of the host's /dev/null cannot be changed through it.
            let change = Change {
                set: attr::RDONLY | attr::NOSUID | attr::NOEXEC,
                ..Change::default()
            };
            mount::set_attr(null, change, false).step("mask", "null")?;
            Some(null)
        }
        None => None,
    };
    let mut null_attached = false;
    let mut empty: Option<OwnedFd> = None;
    for path in &launch.masked_paths {
        let Some(target) = existing(root, path)? else {
            continue;
        };
        let kind = rustix::fs::fstat(&target).step("mask", path)?.st_mode;
        if FileType::from_raw_mode(kind) == FileType::Directory {
            // One empty file system; kernels before 6.15 copy a mount only
            // once it is attached.
            if let Some(first) = &empty {
                let copy = mount::clone_tree_at(first, false).step("mask", path)?;
                mount::attach(copy, target).step("mask", path)?;
                continue;
            }
            let attrs = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
            let options = "mode=0755,nr_blocks=1,nr_inodes=1";
            let label = &launch.mount_label;
            let made = mount::new_labelled_fs("tmpfs", "tmpfs", options, label, attrs)
                .step("mask", path)?;
            mount::attach(&made, target).step("mask", path)?;
            empty = Some(made);
        } else {
            let null = null.ok_or_else(|| Failed::new("find descriptor", "null", Errno::BADF))?;
            if null_attached {
                let copy = mount::clone_tree_at(null, false).step("mask", path)?;
                mount::attach(copy, target).step("mask", path)?;
            } else {
                mount::attach(null, target).step("mask", path)?;
                null_attached = true;
            }
        }
    }
    if launch.rootfs_readonly {
        mount::set_attr(root.0, read_only, false).step("make read-only", "/")?;
    }
    Ok(())
}

/// Puts a mount of its own over a directory of the root file system, which stays
/// writable when the root's own mount becomes read-only: same files, same owners,
/// and what is written is in the container's layer as everything else.
///
/// The path is the image's, so a stranger's: what is not a directory, or is another
/// mount's, is passed over.
fn keep_writable(root: Root<'_>, path: &str) -> Result<(), Failed> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let target = match root.open(path, flags, ResolveFlags::NO_XDEV) {
        Ok(target) => target,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::ACCESS) => {
            return Ok(());
        }
        Err(error) => return Err(Failed::new("keep writable", path, error)),
    };
    let stat = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).step("keep writable", path);
    let (found, whole) = (stat(target.as_fd())?, stat(root.0)?);
    // A link that leads to the root itself: that is to be read-only.
    if (found.st_dev, found.st_ino) == (whole.st_dev, whole.st_ino) {
        return Ok(());
    }
    let copy = mount::clone_tree_at(&target, true).step("keep writable", path)?;
    mount::attach(copy, target).step("keep writable", path)
}

/// What is at `path`, if anything is.
fn existing(root: Root<'_>, path: &str) -> Result<Option<OwnedFd>, Failed> {
    match root.find(path) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(Failed::new("find", path, error)),
    }
}

/// Makes `root` the root and lets go of everything else.
pub fn enter(root: Root<'_>) -> Result<(), Failed> {
    rustix::process::fchdir(root.0).step("fchdir", "rootfs")?;
    // Both names the same: the old root ends up stacked over the new one, where
    // it is detached. Nothing in the container has to exist for it.
    rustix::process::pivot_root(c".", c".").step("pivot_root", "rootfs")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).step("detach the old root", "/")?;
    rustix::process::chdir(c"/").step("chdir", "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_flags_are_translated_or_refused() {
        assert_eq!(mount_attrs(0), Some(0));
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_RELATIME;
        assert_eq!(mount_attrs(flags), Some(attr::NOSUID | attr::NODEV));
        assert_eq!(mount_attrs(libc::MS_BIND), None);
    }
}
