//! Mounts as file descriptors: made detached, changed, attached by descriptor.
//! No path of a container is ever followed by its name.
//!
//! open_tree / new_fs ──> detached mount ── set_attr ──> ... ── attach ──> in a mount namespace
//!
//! Source: open_tree(2), move_mount(2), mount_setattr(2) (Linux 5.12), fsopen(2).

use crate::{Errno, Result, check};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// `MOUNT_ATTR_*` bits. Source: linux/mount.h.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = 0x1;
    /// Set-user-ID bits do nothing.
    pub const NOSUID: u64 = 0x2;
    /// Devices do nothing.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// The field of the access time settings.
    pub const ATIME: u64 = 0x70;
    /// Access times are not updated.
    pub const NOATIME: u64 = 0x10;
    /// Access times are always updated.
    pub const STRICTATIME: u64 = 0x20;
    /// Access times of directories are not updated.
    pub const NODIRATIME: u64 = 0x80;
    /// Maps owners through a user namespace.
    pub const IDMAP: u64 = 0x10_0000;
    /// Symbolic links on it are not followed.
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// How mounts below a mount are passed on to its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// To and from nobody.
    Private,
    /// From its master only.
    Slave,
    /// Both ways.
    Shared,
}

/// What [`set_attr`] changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change<'a> {
    /// [`attr`] bits to set.
    pub set: u64,
    /// [`attr`] bits to clear.
    pub clear: u64,
    /// The new propagation, if it changes.
    pub propagation: Option<Propagation>,
    /// The user namespace whose mapping the mount takes on; it must still be detached.
    pub idmap: Option<BorrowedFd<'a>>,
}

/// `struct mount_attr`. Source: linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// A detached copy of the mount at `path` (symbolic links are followed), with
/// everything mounted below it when `recursive`.
///
/// # Errors
/// The kernel's.
pub fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd> {
    rustix::mount::open_tree(CWD, path, tree_flags(recursive))
}

/// A detached copy of the mount that `at` was opened on, with `at` as its root.
///
/// # Errors
/// EINVAL where `at` is on a detached mount and the kernel is older than 6.15,
/// or on a mount of another namespace.
pub fn clone_tree_at(at: impl AsFd, recursive: bool) -> Result<OwnedFd> {
    rustix::mount::open_tree(
        at,
        c"",
        tree_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH,
    )
}

fn tree_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags | OpenTreeFlags::AT_RECURSIVE
    } else {
        flags
    }
}

/// Changes a mount, and with `recursive` all below it: all or none of them.
///
/// # Errors
/// EINVAL where the file system cannot be idmapped or already is; EPERM for
/// flags a user namespace has locked.
pub fn set_attr(mount: impl AsFd, change: Change<'_>, recursive: bool) -> Result<()> {
    let idmap = if change.idmap.is_some() {
        attr::IDMAP
    } else {
        0
    };
    let clears_atime = change.set & attr::ATIME != 0;
    let request = MountAttr {
        set: change.set | idmap,
        // The kernel wants the whole field cleared when one of its values is set.
        clear: change.clear | if clears_atime { attr::ATIME } else { 0 },
        propagation: match change.propagation {
            None => 0,
            Some(Propagation::Private) => libc::MS_PRIVATE,
            Some(Propagation::Slave) => libc::MS_SLAVE,
            Some(Propagation::Shared) => libc::MS_SHARED,
        },
        userns: change.idmap.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, `request` is a struct mount_attr of the
    // size given, both live through the call, and the kernel only reads them.
    // The descriptors are borrowed, so they are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const request,
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop)
}

/// Attaches a detached mount (or moves an attached one) onto what `onto` was
/// opened on. Afterwards `mount` refers to the attached mount.
///
/// # Errors
/// ENOTDIR when one is a directory and the other is not; EINVAL where `onto` is
/// not in this mount namespace.
pub fn attach(mount: impl AsFd, onto: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", onto, c"", flags)
}

/// A detached mount of a new instance of a file system.
///
/// `options` are mount(8) data options, separated by commas: "mode=755,size=64k".
///
/// # Errors
/// ENODEV for a file system the kernel does not have; EINVAL for an option it
/// does not know; EPERM where a user namespace may not mount it.
pub fn new_fs(fs_type: &str, source: &str, options: &str, attrs: u64) -> Result<OwnedFd> {
    new_labelled_fs(fs_type, source, options, "", attrs)
}

/// As [`new_fs`], with one SELinux label for every file on it; "" for none.
///
/// # Errors
/// Those of [`new_fs`]; EINVAL for a label that the kernel does not know, and
/// where there is no SELinux.
pub fn new_labelled_fs(
    fs_type: &str,
    source: &str,
    options: &str,
    label: &str,
    attrs: u64,
) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if !source.is_empty() {
        rustix::mount::fsconfig_set_string(context.as_fd(), "source", source)?;
    }
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some((key, value)) => {
                rustix::mount::fsconfig_set_string(context.as_fd(), key, value)?;
            }
            None => rustix::mount::fsconfig_set_flag(context.as_fd(), option)?,
        }
    }
    // Apart from the others: a label has commas in it.
    if !label.is_empty() {
        rustix::mount::fsconfig_set_string(context.as_fd(), "context", label)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    // An unknown bit must reach the kernel and be refused there.
    let attrs = u32::try_from(attrs).map_err(|_| Errno::INVAL)?;
    rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attrs),
    )
}

/// Detaches what is mounted at `path` at once; busy users keep it to themselves.
/// A symbolic link as last component is not followed.
///
/// # Errors
/// EINVAL when nothing is mounted there.
pub fn detach(path: &Path) -> Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    fn write(mount: &OwnedFd, name: &str) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        rustix::fs::openat(mount, name, flags, Mode::from_raw_mode(0o644)).map(drop)
    }

    #[test]
    fn a_detached_tmpfs_can_be_made_read_only() {
        let mount = new_fs("tmpfs", "tmpfs", "mode=755,size=64k", attr::NODEV).unwrap();
        write(&mount, "a").unwrap();
        let read_only = Change {
            set: attr::RDONLY,
            ..Change::default()
        };
        set_attr(&mount, read_only, true).unwrap();
        assert_eq!(write(&mount, "b"), Err(Errno::ROFS));
    }

    #[test]
    fn a_clone_is_independent_of_the_mount_it_came_from() {
        let clone = clone_tree(Path::new("/dev/null"), false).unwrap();
        let stat = rustix::fs::fstat(&clone).unwrap();
        assert_eq!(
            (
                rustix::fs::major(stat.st_rdev),
                rustix::fs::minor(stat.st_rdev)
            ),
            (1, 3)
        );
        let private = Change {
            propagation: Some(Propagation::Private),
            ..Change::default()
        };
        set_attr(&clone, private, false).unwrap();
    }

    #[test]
    fn unknown_file_systems_options_and_flags_are_refused() {
        assert_eq!(new_fs("no-such-fs", "", "", 0).unwrap_err(), Errno::NODEV);
        assert_eq!(
            new_fs("tmpfs", "", "no-such-option=1", 0).unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(new_fs("tmpfs", "", "", 1 << 40).unwrap_err(), Errno::INVAL);
    }
}
