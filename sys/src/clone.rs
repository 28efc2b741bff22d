//! Making a child process with namespaces and a cgroup of its own.
//!
//! The child is a copy of the caller, as after fork(2), and goes on in the
//! same code; it must end by [`crate::process::exit`] or exec.
//!
//! Only a process with one thread may do this: in the child of a threaded one
//! a lock (the allocator's, for one) may be held by a thread that is not
//! there. [`fork`] looks and refuses.
//!
//! Source: clone(2); `CLONE_INTO_CGROUP` Linux 5.7.

use crate::{Errno, Result, check};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `CLONE_NEW*` bits as used here and in the monitor's protocol.
pub mod flag {
    /// A mount namespace.
    pub const NEWNS: u64 = libc::CLONE_NEWNS as u64;
    /// A cgroup namespace.
    pub const NEWCGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
    /// A UTS namespace (host name).
    pub const NEWUTS: u64 = libc::CLONE_NEWUTS as u64;
    /// An IPC namespace.
    pub const NEWIPC: u64 = libc::CLONE_NEWIPC as u64;
    /// A user namespace.
    pub const NEWUSER: u64 = libc::CLONE_NEWUSER as u64;
    /// A PID namespace.
    pub const NEWPID: u64 = libc::CLONE_NEWPID as u64;
    /// A network namespace.
    pub const NEWNET: u64 = libc::CLONE_NEWNET as u64;
}

const NAMESPACES: u64 = flag::NEWNS
    | flag::NEWCGROUP
    | flag::NEWUTS
    | flag::NEWIPC
    | flag::NEWUSER
    | flag::NEWPID
    | flag::NEWNET;

/// What the child gets of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// [`flag`] bits; others are refused with EINVAL.
    pub namespaces: u64,
    /// A cgroup v2 directory the child starts in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The caller's parent becomes the child's parent too.
    pub sibling: bool,
}

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Forked {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// The child, in the caller's PID namespace.
        pid: i32,
        /// The same, for good.
        pidfd: OwnedFd,
    },
}

/// `struct clone_args`, the size with `cgroup`. Source: linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Makes a child; returns in both.
///
/// # Errors
/// EDEADLK where the caller has more than one thread (or /proc does not show
/// it); EINVAL for unknown flags; else clone3's own.
pub fn fork(options: Options<'_>) -> Result<Forked> {
    if options.namespaces & !NAMESPACES != 0 {
        return Err(Errno::INVAL);
    }
    if thread_count()? != 1 {
        return Err(Errno::DEADLK);
    }
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: options.namespaces | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        // With CLONE_PARENT the kernel takes the caller's own and wants none.
        exit_signal: if options.sibling {
            0
        } else {
            libc::SIGCHLD as u64
        },
        ..CloneArgs::default()
    };
    if options.sibling {
        args.flags |= libc::CLONE_PARENT as u64;
    }
    if let Some(cgroup) = options.cgroup {
        args.flags |= 0x2_0000_0000; // CLONE_INTO_CGROUP
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` has the layout and size given and outlives the call, as
    // does `pidfd`, to which the kernel writes in the parent. Neither CLONE_VM
    // nor CLONE_FILES is ever set (NAMESPACES holds neither), so the child has
    // memory and descriptors of its own and, with a stack of 0, goes on with a
    // copy of this stack. The caller has one thread, so no lock in the copied
    // memory is held by a thread the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    let pid = check(pid)?;
    if pid == 0 {
        return Ok(Forked::Child);
    }
    // SAFETY: clone3 has succeeded with CLONE_PIDFD, so `pidfd` is a new open
    // descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Forked::Parent {
        pid: pid as i32,
        pidfd,
    })
}

/// Threads of this process: its task directory has a link for each besides
/// "." and "..".
fn thread_count() -> Result<u64> {
    let stat = rustix::fs::stat(c"/proc/self/task")?;
    Ok((stat.st_nlink as u64).saturating_sub(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threaded_process_cannot_fork() {
        // The test harness itself has a second thread; this one makes it certain.
        let (_keep, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        assert_eq!(fork(Options::default()).unwrap_err(), Errno::DEADLK);
        drop(_keep);
        let _ = thread.join();
    }

    #[test]
    fn only_namespace_flags_are_taken() {
        let shared_memory = Options {
            namespaces: libc::CLONE_VM as u64,
            ..Options::default()
        };
        assert_eq!(fork(shared_memory).unwrap_err(), Errno::INVAL);
    }
}
