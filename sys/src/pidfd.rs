//! Processes by descriptor: a pid can be used again by another process, a
//! pidfd never is.
//!
//! Source: pidfd_open(2) (Linux 5.3); `PIDFD_GET_INFO` and `PIDFD_INFO_EXIT`
//! in linux/pidfd.h (6.13, 6.15).

use crate::{Errno, Result, check};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It called exit with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Ended {
    /// As wait(2) packs it.
    pub fn from_wait_status(status: i32) -> Ended {
        if libc::WIFSIGNALED(status) {
            Ended::Signal(libc::WTERMSIG(status))
        } else {
            Ended::Code(libc::WEXITSTATUS(status))
        }
    }

    /// As a shell says it: the code, or 128 and the signal.
    pub fn exit_code(self) -> i32 {
        match self {
            Ended::Code(code) => code,
            Ended::Signal(signal) => 128 + signal,
        }
    }

    /// The signal, 0 for none.
    pub fn signal(self) -> i32 {
        match self {
            Ended::Code(_) => 0,
            Ended::Signal(signal) => signal,
        }
    }
}

/// A descriptor for `pid`. Who may be somebody else by now is for the caller
/// to check afterwards (start time, cgroup, being its parent).
///
/// # Errors
/// ESRCH when there is no such process, EINVAL for a pid below 1.
pub fn open(pid: i32) -> Result<OwnedFd> {
    // rustix asserts where this refuses.
    let pid = (pid > 0)
        .then(|| Pid::from_raw(pid))
        .flatten()
        .ok_or(Errno::INVAL)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
}

/// Sends signal number `signal` (0 only checks), real-time ones included.
///
/// # Errors
/// ESRCH when the process has ended, EINVAL for a signal there is not.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> Result<()> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: integers and a null siginfo, which the kernel then makes itself.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            null,
            0,
        )
    };
    check(result).map(drop)
}

/// Reaps a child that has ended; `None` while it runs.
///
/// # Errors
/// ECHILD when it is not a child of this process.
pub fn try_wait(pidfd: impl AsFd) -> Result<Option<Ended>> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options)?;
    Ok(status.map(|status| match status.exit_status() {
        Some(code) => Ended::Code(code),
        None => Ended::Signal(status.terminating_signal().unwrap_or(libc::SIGKILL)),
    }))
}

/// `struct pidfd_info`, first published size. Source: linux/pidfd.h.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ids: [u32; 8],
    exit_code: i32,
}

const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// How a process ended that need not be a child and may be reaped already.
/// `None` while it is not reaped, or where the kernel cannot say (before 6.15).
///
/// The descriptor must have been open when the process ended.
pub fn exit_of(pidfd: impl AsFd) -> Option<Ended> {
    const _: () = assert!(size_of::<PidfdInfo>() == 64);
    // _IOWR(0xFF, 11, struct pidfd_info) of 64 bytes.
    const PIDFD_GET_INFO: libc::c_ulong = (3 << 30) | (64 << 16) | (0xff << 8) | 11;
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the request's number carries the size of the structure behind
    // the pointer, which is exclusively ours; the kernel writes no more.
    let result = unsafe {
        libc::ioctl(
            pidfd.as_fd().as_raw_fd(),
            PIDFD_GET_INFO as _,
            &raw mut info,
        )
    };
    (result == 0 && info.mask & PIDFD_INFO_EXIT != 0)
        .then(|| Ended::from_wait_status(info.exit_code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags};
    use std::process::Command;

    #[test]
    fn a_killed_child_is_seen_to_be_killed() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pidfd = open(child.id() as i32).unwrap();
        assert_eq!(try_wait(&pidfd).unwrap(), None);
        assert_eq!(exit_of(&pidfd), None);
        send_signal(&pidfd, libc::SIGTERM).unwrap();
        rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGTERM)
        );
        assert_eq!(send_signal(&pidfd, 0), Err(Errno::SRCH));
        // Only kernels from 6.15 on know; none may say anything else.
        assert!([None, Some(Ended::Signal(libc::SIGTERM))].contains(&exit_of(&pidfd)));
    }

    #[test]
    fn a_pid_that_is_none_is_refused() {
        assert_eq!(open(0).unwrap_err(), Errno::INVAL);
        assert_eq!(open(-1).unwrap_err(), Errno::INVAL);
        assert_eq!(open(i32::MAX).unwrap_err(), Errno::SRCH);
    }
}
