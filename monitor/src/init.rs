//! A container's init, from clone to execve.
//!
//! ```text
//! (clone: PID namespace, cgroup v2) ─> session ─> cgroups v1 ─> user, net, ipc, uts
//!   ─> mount and cgroup namespaces ─> root file system ─> console ─> pivot
//!   ─> streams ─> limits, user, capabilities ─> gate: the log is open ─> filter ─> execve
//! ```
//!
//! Runs in the child of a process with one thread, so it may allocate. The
//! descriptors of the monitor are closed before anything of the container is
//! looked at; /proc is only used while it is the host's.

use crate::become_program::{self, Prepared};
use crate::beneath::Root;
use crate::rootfs;
use crate::status::{self, Failed, Note, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::clone::flag;
use berth_sys::namespace::{self, Kind};
use berth_sys::{Errno, process};
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// The pod's namespaces, as far as it has any of its own.
#[derive(Default)]
pub struct PodNamespaces {
    /// Owns the others.
    pub user: Option<OwnedFd>,
    /// Network.
    pub net: Option<OwnedFd>,
    /// IPC.
    pub ipc: Option<OwnedFd>,
    /// Host name.
    pub uts: Option<OwnedFd>,
    /// Process IDs, where the pod's containers share them.
    pub pid: Option<OwnedFd>,
}

impl PodNamespaces {
    /// Those there are, by descriptor.
    pub fn held(&self) -> Vec<proto::HeldNamespace> {
        let all = [
            (Kind::User, &self.user),
            (Kind::Net, &self.net),
            (Kind::Ipc, &self.ipc),
            (Kind::Uts, &self.uts),
            (Kind::Pid, &self.pid),
        ];
        let held = all
            .into_iter()
            .filter_map(|(kind, fd)| Some((kind, fd.as_ref()?)));
        held.map(|(kind, fd)| proto::HeldNamespace {
            kind: kind.name().to_owned(),
            fd: fd.as_raw_fd(),
        })
        .collect()
    }
}

/// What the child works with, besides the request.
pub struct Init<'a> {
    /// The request.
    pub launch: &'a proto::Launch,
    /// What came with it.
    pub fds: &'a [OwnedFd],
    /// The pod's namespaces.
    pub pod: &'a PodNamespaces,
    /// To the monitor.
    pub status: &'a OwnedFd,
    /// One byte comes here once the log is open; `None` without a log.
    pub gate: Option<&'a OwnedFd>,
    /// stdin, stdout, stderr; `None` for the container's /dev/null.
    pub streams: [Option<&'a OwnedFd>; 3],
}

impl Init<'_> {
    /// The descriptors the child keeps.
    pub fn keep(&self) -> Vec<RawFd> {
        let pod = [&self.pod.user, &self.pod.net, &self.pod.ipc, &self.pod.uts];
        let mut keep: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        keep.extend(pod.into_iter().flatten().map(AsRawFd::as_raw_fd));
        keep.extend(self.streams.iter().flatten().map(|fd| fd.as_raw_fd()));
        keep.extend(self.gate.map(AsRawFd::as_raw_fd));
        keep.push(self.status.as_raw_fd());
        keep
    }

    /// Everything up to execve; the exit code when that was not reached.
    pub fn run(&self) -> i32 {
        process::reset_signals();
        let failed = match self.set_up() {
            Ok(prepared) => {
                let wanted = wanted(self.launch);
                become_program::become_program(wanted, &prepared, self.status.as_fd(), || {
                    self.pass_gate()
                })
            }
            Err(failed) => failed,
        };
        report(self.status.as_fd(), &failed);
        1
    }

    fn set_up(&self) -> Result<Prepared, Failed> {
        let launch = self.launch;
        let wanted = wanted(launch);
        rustix::process::setsid().step("setsid", "")?;
        if let Some(cgroup) = &launch.cgroup {
            become_program::enter_cgroups(&cgroup.tasks_files)?;
        }
        let prepared = become_program::prepare(wanted)?;
        self.before_user_namespace()?;
        self.join_pod()?;
        become_program::own_keyring(&launch.container_id)?;
        write_sysctls(
            &launch.sysctls,
            launch.join_net,
            launch.join_ipc,
            launch.join_uts,
        )?;

        // Modes are what the request says, not what a mask leaves of them.
        rustix::process::umask(Mode::empty());
        let cgroup = if launch.new_cgroup {
            flag::NEWCGROUP
        } else {
            0
        };
        namespace::unshare(flag::NEWNS | cgroup).step("unshare", "mount namespace")?;
        let rootfs = rootfs::assemble(launch, self.fds)?;
        let root = Root(rootfs.as_fd());
        let console = if wanted.tty {
            Some(rootfs::console(root)?)
        } else {
            None
        };
        for directory in &launch.directories {
            let _ = root.make_dir(directory);
        }
        if !wanted.cwd.is_empty() {
            // One that cannot be made is reported when it is entered.
            let _ = root.make_dir(&wanted.cwd);
        }
        rootfs::restrict(root, launch, self.fds)?;
        rootfs::enter(root)?;

        if let Some((master, slave)) = console {
            status::send(self.status, &Note::Console(master)).step("report", "console")?;
            become_program::install_terminal(wanted, &slave)?;
        } else {
            install_streams(root, self.streams)?;
        }
        Ok(prepared)
    }

    /// What has to be done before the pod's user namespace is joined; again after
    /// that it does nothing.
    pub fn before_user_namespace(&self) -> Result<(), Failed> {
        let streams = self.streams.iter().copied().flatten();
        become_program::before_user_namespace(wanted(self.launch), streams)
    }

    fn join_pod(&self) -> Result<(), Failed> {
        let launch = self.launch;
        let missing = |kind: Kind| {
            Failed::new(
                "join namespace",
                format!("the pod has no {} namespace", kind.name()),
                Errno::NOENT,
            )
        };
        let pod = self.pod;
        let joins = [
            (launch.join_user, &pod.user, Kind::User),
            (launch.join_net, &pod.net, Kind::Net),
            (launch.join_ipc, &pod.ipc, Kind::Ipc),
            (launch.join_uts, &pod.uts, Kind::Uts),
        ];
        for (join, namespace, kind) in joins {
            if !join {
                continue;
            }
            let namespace = namespace.as_ref().ok_or_else(|| missing(kind))?;
            // Joined already by the helper that made the PID namespace.
            if kind == Kind::User && launch.new_pid {
                become_root()?;
                continue;
            }
            namespace::join(namespace, kind).step("join namespace", kind.name())?;
            if kind == Kind::User {
                become_root()?;
            }
        }
        Ok(())
    }

    /// Waits until the log file is open.
    fn pass_gate(&self) -> Result<(), Failed> {
        let Some(gate) = self.gate else { return Ok(()) };
        let mut byte = [0];
        loop {
            match rustix::io::read(gate, &mut byte) {
                Ok(1) => return Ok(()),
                Err(Errno::INTR) => {}
                // The logger has told the monitor why.
                _ => return Err(Failed::new("open log", &self.launch.log_path, Errno::IO)),
            }
        }
    }
}

/// The request's process; an empty one has no argv and is refused for that.
fn wanted(launch: &proto::Launch) -> &proto::Process {
    static NONE: std::sync::OnceLock<proto::Process> = std::sync::OnceLock::new();
    launch
        .process
        .as_ref()
        .unwrap_or_else(|| NONE.get_or_init(proto::Process::default))
}

/// User and group 0 of the user namespace just joined.
pub fn become_root() -> Result<(), Failed> {
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("setgid", "0")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("setuid", "0")
}

/// Tells the monitor, by write(2): that one every filter allows.
pub fn report(status: BorrowedFd<'_>, failed: &Failed) {
    let _ = rustix::io::write(status, &status::encode_failed(failed));
}

/// Puts the streams on 0, 1, 2; one that is not given is the container's null.
pub fn install_streams(root: Root<'_>, streams: [Option<&OwnedFd>; 3]) -> Result<(), Failed> {
    let mut null = None;
    for (number, stream) in streams.into_iter().enumerate() {
        let fd = match stream {
            Some(fd) => fd,
            None => {
                if null.is_none() {
                    null = Some(root.null()?);
                }
                match &null {
                    Some(fd) => fd,
                    None => continue,
                }
            }
        };
        berth_sys::fd::install_stdio(fd, number as RawFd).step("dup2", number.to_string())?;
    }
    Ok(())
}

/// Writes sysctls of namespaces this process has joined; one that is not among
/// them would be the host's and is refused.
pub fn write_sysctls(
    sysctls: &[proto::Sysctl],
    net: bool,
    ipc: bool,
    uts: bool,
) -> Result<(), Failed> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let dir = crate::beneath::proc_dir("/proc/sys").step("open", "/proc/sys")?;
    for sysctl in sysctls {
        let path = &sysctl.path;
        let own = match sysctl_kind(path) {
            Some(Kind::Net) => net,
            Some(Kind::Ipc) => ipc,
            Some(Kind::Uts) => uts,
            _ => false,
        };
        if !own {
            return Err(Failed::new("sysctl", path, Errno::PERM));
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&dir, path.as_str(), flags, Mode::empty(), resolve)
            .step("sysctl", path)?;
        rustix::io::write(&file, sysctl.value.as_bytes()).step("sysctl", path)?;
    }
    Ok(())
}

/// Which namespace a sysctl belongs to; `None` for the host's, and for what is
/// no plain path. Source: Kubernetes, "Using sysctls", namespaced sysctls.
fn sysctl_kind(path: &str) -> Option<Kind> {
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return None;
    }
    const IPC: [&str; 12] = [
        "kernel/auto_msgmni",
        "kernel/msg_next_id",
        "kernel/sem_next_id",
        "kernel/shm_next_id",
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    if path.starts_with("net/") {
        Some(Kind::Net)
    } else if path.starts_with("fs/mqueue/") || IPC.contains(&path) {
        Some(Kind::Ipc)
    } else if path == "kernel/domainname" {
        Some(Kind::Uts)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_of_the_host_and_path_tricks_have_no_namespace() {
        assert_eq!(
            sysctl_kind("net/ipv4/ip_unprivileged_port_start"),
            Some(Kind::Net)
        );
        assert_eq!(sysctl_kind("kernel/shmmax"), Some(Kind::Ipc));
        for path in [
            "kernel/core_pattern",
            "net/../kernel/core_pattern",
            "/net/x",
            "net//x",
            "",
        ] {
            assert_eq!(sysctl_kind(path), None, "{path}");
        }
    }
}
