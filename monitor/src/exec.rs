//! A further process in a running container, from clone to execve.
//!
//! ```text
//! (the monitor joins the PID namespace for its children, clones, goes back)
//!   ─> session ─> cgroups v1 ─> all of init's namespaces by its pidfd ─> streams or terminal
//!   ─> limits, user, capabilities ─> filter ─> execve
//! ```
//!
//! From the moment the namespaces are joined the container can see this
//! process. It cannot look into it: it is not dumpable, and holds nothing but
//! its own streams and the socket that execve closes.

use crate::become_program::{self, Prepared};
use crate::beneath::Root;
use crate::init;
use crate::status::{self, Failed, Note, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::clone::flag;
use berth_sys::{Errno, namespace, process};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// What the child works with.
pub struct Exec<'a> {
    /// The request.
    pub exec: &'a proto::Exec,
    /// What came with it.
    pub fds: &'a [OwnedFd],
    /// The container's init.
    pub init: &'a OwnedFd,
    /// The container is in the pod's user namespace.
    pub join_user: bool,
    /// To the monitor.
    pub status: &'a OwnedFd,
}

impl Exec<'_> {
    /// The descriptors the child keeps.
    pub fn keep(&self) -> Vec<RawFd> {
        let mut keep: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        keep.extend([self.init.as_raw_fd(), self.status.as_raw_fd()]);
        keep
    }

    /// Everything up to execve; the exit code when that was not reached.
    pub fn run(&self) -> i32 {
        process::reset_signals();
        let failed = match self.set_up() {
            Ok((wanted, prepared)) => {
                become_program::become_program(wanted, &prepared, self.status.as_fd(), || Ok(()))
            }
            Err(failed) => failed,
        };
        init::report(self.status.as_fd(), &failed);
        1
    }

    fn set_up(&self) -> Result<(&proto::Process, Prepared), Failed> {
        let exec = self.exec;
        let wanted = exec
            .process
            .as_ref()
            .ok_or_else(|| Failed::invalid("exec", "no process is given"))?;
        rustix::process::setsid().step("setsid", "")?;
        if let Some(cgroup) = &exec.cgroup {
            become_program::enter_cgroups(&cgroup.tasks_files)?;
        }
        let prepared = become_program::prepare(wanted)?;
        become_program::before_user_namespace(wanted, self.fds)?;

        let mut namespaces =
            flag::NEWNS | flag::NEWNET | flag::NEWIPC | flag::NEWUTS | flag::NEWCGROUP;
        if self.join_user {
            namespaces |= flag::NEWUSER;
        }
        namespace::join_process(self.init, namespaces)
            .step("join namespaces", &exec.container_id)?;
        if self.join_user {
            init::become_root()?;
        }
        become_program::own_keyring(&exec.container_id)?;
        // Joining the mount namespace has made its root ours.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(c"/", flags, Mode::empty()).step("open", "/")?;
        let root = Root(root.as_fd());

        if wanted.tty {
            let master = root.new_terminal().step("open terminal", "/dev/pts/ptmx")?;
            let slave = berth_sys::pty::slave_of(&master).step("open terminal", "/dev/pts/ptmx")?;
            status::send(self.status, &Note::Console(master)).step("report", "terminal")?;
            become_program::install_terminal(wanted, &slave)?;
            return Ok((wanted, prepared));
        }
        let stream = |index: Option<u32>, name: &str| match index {
            None => Ok(None),
            Some(index) => match self.fds.get(index as usize) {
                Some(fd) => Ok(Some(fd)),
                None => Err(Failed::new("find descriptor", name, Errno::BADF)),
            },
        };
        let streams = [
            stream(exec.stdin_fd, "stdin")?,
            stream(exec.stdout_fd, "stdout")?,
            stream(exec.stderr_fd, "stderr")?,
        ];
        init::install_streams(root, streams)?;
        Ok((wanted, prepared))
    }
}
