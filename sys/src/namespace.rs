//! Joining, leaving and keeping namespaces.
//!
//! Source: setns(2) (by pidfd since Linux 5.8), unshare(2), namespaces(7).

use crate::{Errno, Result, check, clone::flag};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A kind of namespace a descriptor can stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Process IDs; joined by children only.
    Pid,
    /// User IDs.
    User,
}

impl Kind {
    /// The name in /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Net => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Pid => "pid",
            Kind::User => "user",
        }
    }
}

/// A descriptor of a namespace of process `pid`, as /proc of this mount
/// namespace numbers it; 0 means this process.
///
/// # Errors
/// ENOENT when there is no such process.
pub fn open(pid: i32, kind: Kind) -> Result<OwnedFd> {
    let of = if pid == 0 {
        "self".to_owned()
    } else {
        pid.to_string()
    };
    let path = format!("/proc/{of}/ns/{}", kind.name());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Joins the namespace behind `namespace`, which must be of that kind.
///
/// # Errors
/// EINVAL where it is of another kind; EPERM.
pub fn join(namespace: impl AsFd, kind: Kind) -> Result<()> {
    let kind = match kind {
        Kind::Net => LinkNameSpaceType::Network,
        Kind::Ipc => LinkNameSpaceType::InterProcessCommunication,
        Kind::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        Kind::Pid => LinkNameSpaceType::ProcessID,
        Kind::User => LinkNameSpaceType::User,
    };
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))
}

/// Joins namespaces ([`flag`] bits) of the process behind `pidfd`, all or none.
/// With NEWNS root and working directory become that namespace's root.
///
/// # Errors
/// EINVAL when its user namespace is this one already; ESRCH when it has ended.
pub fn join_process(pidfd: impl AsFd, namespaces: u64) -> Result<()> {
    let bits = u32::try_from(namespaces).map_err(|_| Errno::INVAL)?;
    rustix::thread::move_into_thread_name_spaces(
        pidfd.as_fd(),
        ThreadNameSpaceType::from_bits_retain(bits),
    )
}

/// Makes new namespaces ([`flag`] bits) for this process.
///
/// # Errors
/// EINVAL for other bits; EPERM.
pub fn unshare(namespaces: u64) -> Result<()> {
    const ALLOWED: u64 = flag::NEWNS
        | flag::NEWCGROUP
        | flag::NEWUTS
        | flag::NEWIPC
        | flag::NEWUSER
        | flag::NEWPID
        | flag::NEWNET;
    if namespaces & !ALLOWED != 0 {
        return Err(Errno::INVAL);
    }
    // SAFETY: takes an integer. CLONE_FILES is not among the bits, so no
    // descriptor means something else afterwards.
    check(unsafe { libc::unshare(namespaces as libc::c_int) }.into()).map(drop)
}

/// Keeps a namespace alive by binding it onto an existing file.
///
/// # Errors
/// ENOENT when the file is not there; EINVAL where its mount point cannot hold
/// it (an `nsfs` file of a mount namespace).
pub fn pin(namespace: impl AsFd, path: &Path) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let target = rustix::fs::open(path, flags, Mode::empty())?;
    let mount = crate::mount::clone_tree_at(namespace, false)?;
    crate::mount::attach(mount, target)
}
