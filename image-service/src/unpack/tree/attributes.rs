//! Owners, modes, times and extended attributes.

use super::super::UnpackError;
use super::super::archive::{Entry, MAX_XATTR_BYTES, Time};
use super::super::shown;
use rustix::fs::{Dev, FileType, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// What overlayfs hides a name of lower layers with: a character device of this number.
pub(super) const WHITEOUT_DEVICE: Dev = 0;
const OPAQUE: &str = "trusted.overlay.opaque";

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(super) fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == WHITEOUT_DEVICE
}

/// Whether overlayfs hides what lower layers have in `directory`.
pub(crate) fn is_opaque(directory: &OwnedFd) -> Result<bool, Errno> {
    let mut value = [0u8; 8];
    match rustix::fs::fgetxattr(directory, OPAQUE, &mut value) {
        Ok(count) => Ok(value[..count] == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn set_opaque(directory: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

/// Attributes that may come from an image. The rest would steer overlayfs
/// (`trusted.overlay.`), or claim what only this host can know (`security.`
/// labels and signatures).
fn is_allowed_xattr(name: &[u8]) -> bool {
    (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        || name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}

pub(super) fn set_xattr(
    entry: &Entry,
    name: &[u8],
    set: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), UnpackError> {
    if !is_allowed_xattr(name) {
        tracing::debug!(
            entry = shown(&entry.path),
            name = shown(name),
            "xattr left out"
        );
        return Ok(());
    }
    match set() {
        Ok(()) => Ok(()),
        // A file system without user attributes still runs images that have some.
        Err(Errno::OPNOTSUPP) if name != b"security.capability" => Ok(()),
        Err(source) => Err(UnpackError::Entry {
            action: "set an attribute of",
            entry: shown(&entry.path),
            source,
        }),
    }
}

/// Owner, mode and xattrs, in the order that loses none of them.
pub(super) fn copy_attributes(from: impl AsFd, to: impl AsFd, stat: &Stat) -> Result<(), Errno> {
    let (from, to) = (from.as_fd(), to.as_fd());
    rustix::fs::fchown(to, Some(uid(stat.st_uid)), Some(gid(stat.st_gid)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    // Source: linux/limits.h, XATTR_LIST_MAX.
    let mut names = vec![0u8; 64 << 10];
    let count = match rustix::fs::flistxattr(from, &mut names) {
        Ok(count) => count,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut value = vec![0u8; MAX_XATTR_BYTES];
    for name in names[..count].split(|&b| b == 0) {
        if is_allowed_xattr(name) {
            let count = rustix::fs::fgetxattr(from, name, &mut value)?;
            rustix::fs::fsetxattr(to, name, &value[..count], XattrFlags::empty())?;
        }
    }
    Ok(())
}

pub(super) fn uid(raw: u32) -> Uid {
    Uid::from_raw(raw)
}

pub(super) fn gid(raw: u32) -> Gid {
    Gid::from_raw(raw)
}

pub(super) fn device(entry: &Entry) -> Dev {
    rustix::fs::makedev(entry.device.0, entry.device.1)
}

pub(super) fn modified(stat: &Stat) -> Time {
    Time {
        seconds: stat.st_mtime,
        nanoseconds: stat.st_mtime_nsec as u32,
    }
}

/// Access time as well, so that two unpackings of a layer are equal.
pub(super) fn timestamps(time: Time) -> Timestamps {
    let at = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    Timestamps {
        last_access: at,
        last_modification: at,
    }
}

pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The process's umask; all bits where it cannot be read, which costs a
/// system call per file and nothing else.
pub(super) fn umask() -> u32 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| parse_umask(&status))
        .unwrap_or(0o777)
}

/// `Umask` of proc_pid_status(5), an octal number.
fn parse_umask(status: &str) -> Option<u32> {
    let text = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(text.trim(), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_umask_is_octal() {
        assert_eq!(
            parse_umask("Name:\tx\nUmask:\t0022\nState:\tR\n"),
            Some(0o22)
        );
        assert_eq!(parse_umask("Name:\tx\n"), None);
    }
}
