//! Descriptors: which of them stay open, and unix sockets at paths longer than
//! the kernel's 108 bytes.

use crate::{Errno, Result, check};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// The kernel's (none are known for these arguments).
pub fn close_on_exec_from(first: u32) -> Result<()> {
    // SAFETY: only sets flags; no descriptor changes hands.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result).map(drop)
}

/// The path by which this process can open or bind beneath an open directory.
pub fn proc_path(dir: impl AsFd, name: &str) -> String {
    format!("/proc/self/fd/{}/{name}", dir.as_fd().as_raw_fd())
}

fn stream(non_blocking: bool) -> Result<OwnedFd> {
    let mut flags = SocketFlags::CLOEXEC;
    if non_blocking {
        flags |= SocketFlags::NONBLOCK;
    }
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A listening unix stream socket called `name` in the directory `dir`, which
/// may be deeper than a socket address can say.
///
/// # Errors
/// EADDRINUSE when the name exists, whatever it is; EINVAL for a name with a
/// slash; ENAMETOOLONG.
pub fn listen_at(dir: impl AsFd, name: &str, backlog: i32, non_blocking: bool) -> Result<OwnedFd> {
    let socket = stream(non_blocking)?;
    rustix::net::bind(&socket, &address(dir, name)?)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// Connects to the unix stream socket called `name` in the directory `dir`.
/// The socket is blocking.
///
/// # Errors
/// ENOENT when there is none, ECONNREFUSED when nobody listens any more.
pub fn connect_at(dir: impl AsFd, name: &str) -> Result<OwnedFd> {
    let socket = stream(false)?;
    rustix::net::connect(&socket, &address(dir, name)?)?;
    Ok(socket)
}

fn address(dir: impl AsFd, name: &str) -> Result<SocketAddrUnix> {
    if name.is_empty() || name.contains('/') {
        return Err(Errno::INVAL);
    }
    SocketAddrUnix::new(proc_path(dir, name))
}

/// Closes every descriptor but `keep`; numbers that are not open are fine.
/// Only for [`crate::process::child`], which sees to it that nothing closed
/// here is used or dropped later.
pub(crate) fn close_all_but(keep: &mut [RawFd]) -> Result<()> {
    keep.sort_unstable();
    let mut first: u32 = 0;
    for &fd in keep.iter() {
        let Ok(fd) = u32::try_from(fd) else { continue };
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> Result<()> {
    // SAFETY: closes numbers this process no longer uses, by the contract of
    // the only caller; see there. No memory is involved.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    check(result).map(drop)
}

/// Takes over the descriptor `fd` this process was started with. Of 0 to 2,
/// which std uses, it takes a copy from 3 on.
///
/// # Errors
/// EBADF when it is not open.
pub fn inherited(fd: RawFd) -> Result<OwnedFd> {
    if (0..=2).contains(&fd) {
        // SAFETY: only makes a new descriptor, or says that the old one is not open.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        check(copy.into())?;
        // SAFETY: just made, so open and owned by nobody else.
        return Ok(unsafe { OwnedFd::from_raw_fd(copy) });
    }
    // SAFETY: F_SETFD only sets a flag, and says whether the number is open.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }.into())?;
    // SAFETY: open, as the call above has shown. Ownership: the number comes
    // from the parent through exec, so nothing in this process owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes `number` (0 to 2) a copy of `fd` that survives exec.
///
/// # Errors
/// The kernel's.
pub fn install_stdio(fd: impl AsFd, number: RawFd) -> Result<()> {
    if !(0..=2).contains(&number) {
        return Err(Errno::BADF);
    }
    // SAFETY: 0 to 2 are shared by convention: std never owns them as OwnedFd,
    // and replacing what is behind them is what every daemon does.
    check(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), number) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn a_socket_can_lie_deeper_than_an_address_is_long() {
        let base = std::env::temp_dir().join(format!("berth-sys-{}", std::process::id()));
        let deep = base.join("x".repeat(100)).join("y".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&deep, flags, Mode::empty()).unwrap();
        assert_eq!(connect_at(&dir, "s").unwrap_err(), Errno::NOENT);
        let listener = listen_at(&dir, "s", 1, false).unwrap();
        connect_at(&dir, "s").unwrap();
        assert_eq!(
            listen_at(&dir, "s", 1, false).unwrap_err(),
            Errno::ADDRINUSE
        );
        drop(listener);
        assert_eq!(connect_at(&dir, "s").unwrap_err(), Errno::CONNREFUSED);
        assert_eq!(connect_at(&dir, "../s").unwrap_err(), Errno::INVAL);
        std::fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_standard_descriptor_is_copied_and_one_that_is_not_open_refused() {
        assert!(inherited(2).unwrap().as_raw_fd() > 2);
        assert_eq!(inherited(9999).unwrap_err(), Errno::BADF);
        assert_eq!(inherited(-1).unwrap_err(), Errno::BADF);
    }
}
