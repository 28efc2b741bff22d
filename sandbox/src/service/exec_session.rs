//! Exec: a further process in a running container, with streams of its own.
//!
//! ```text
//! exec_session ──> running ── ends: wait() says how
//!                     └── the session is dropped: killed
//! ```
//!
//! The process is the monitor's child; its streams are pipes whose other ends
//! are here, or a pseudo terminal whose master is. Nothing of it survives the
//! daemon: the monitor kills it when the connection ends.

use super::{Inner, Sandboxes, blocking, internal};
use crate::container::{ContainerRecord, ContainerState};
use crate::error::{Kind, Result, SandboxError};
use crate::launch;
use crate::monitor::{Monitor, MonitorError};
use berth_proto::monitor_v1::{self, reply, request};
use futures_util::FutureExt as _;
use futures_util::future::Shared;
use rustix::pipe::PipeFlags;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

/// What a stream's pipe is to hold, in bytes, where the kernel lets us. Large
/// copies through exec take a fourth of the wake-ups of the default's 64 KiB;
/// it counts towards pipe-user-pages-soft only while the exec runs.
const PIPE_BYTES: usize = 256 << 10;

/// A process to be run in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// On a terminal of its own; `stdin`, `stdout` and `stderr` then say nothing.
    pub tty: bool,
    /// It is sent input; without, it reads /dev/null.
    pub stdin: bool,
    /// Its output is wanted; without, it goes to /dev/null.
    pub stdout: bool,
    /// Its error output is wanted; without, it goes to /dev/null.
    pub stderr: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecExit {
    /// As a shell says it: 128 + signal where a signal ended it.
    pub code: i32,
    /// The signal that ended it, 0 for none.
    pub signal: i32,
}

/// A process that runs in a container. Dropping this kills its process group.
///
/// The descriptors are to be taken; they are close-on-exec and blocking.
pub struct ExecSession {
    /// The pipe to its stdin; closing it is the end of its input.
    pub stdin: Option<OwnedFd>,
    /// The pipe from its stdout.
    pub stdout: Option<OwnedFd>,
    /// The pipe from its stderr.
    pub stderr: Option<OwnedFd>,
    /// The master of its terminal. Reading it fails with EIO once everybody has
    /// closed the other side.
    pub tty: Option<OwnedFd>,
    control: ExecControl,
}

/// What can be done to a running exec; cheap to clone, keeps nothing alive.
#[derive(Clone)]
pub struct ExecControl {
    monitor: Arc<Monitor>,
    container_id: String,
    exec_id: String,
    ended: Shared<oneshot::Receiver<monitor_v1::Exited>>,
}

impl ExecSession {
    /// To resize, signal and wait from elsewhere; the process still ends with
    /// the session.
    pub fn control(&self) -> ExecControl {
        self.control.clone()
    }

    /// As [`ExecControl::resize`].
    ///
    /// # Errors
    /// As there.
    pub async fn resize(&self, width: u32, height: u32) -> Result<()> {
        self.control.resize(width, height).await
    }

    /// As [`ExecControl::wait`].
    ///
    /// # Errors
    /// As there.
    pub async fn wait(&self) -> Result<ExecExit> {
        self.control.wait().await
    }
}

impl Drop for ExecSession {
    fn drop(&mut self) {
        if self.control.has_ended() {
            return;
        }
        let control = self.control.clone();
        // Without a runtime this process is ending, and the monitor does it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { control.kill().await });
        }
    }
}

impl ExecControl {
    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// `Invalid` where it has no terminal; `WrongState` when the process has ended.
    pub async fn resize(&self, width: u32, height: u32) -> Result<()> {
        let resize = monitor_v1::ResizeTty {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            width,
            height,
        };
        super::attach::resize_tty(&self.monitor, resize).await
    }

    /// Waits for the end of the process; its children may live on. Dropping
    /// the future changes nothing.
    ///
    /// # Errors
    /// `Internal` when the monitor went away, and the process with it.
    pub async fn wait(&self) -> Result<ExecExit> {
        let exited = self.ended.clone().await;
        let exited = exited.map_err(internal("the monitor went away during the exec"))?;
        Ok(ExecExit {
            code: exited.exit_code,
            signal: exited.signal,
        })
    }

    /// True once the process has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.clone().now_or_never().is_some()
    }

    /// Kills the whole process group. What has ended counts as killed.
    pub async fn kill(&self) {
        let kill = monitor_v1::Signal {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            signal: super::teardown::libc_sigkill(),
        };
        // It fails when the process has ended, or the monitor, which comes to that.
        let _ = self
            .monitor
            .tell(request::Body::Signal(kill), Vec::new())
            .await;
    }
}

impl Sandboxes {
    /// Runs a process in a running container as the container's own first
    /// process would run: user, capabilities, filter, limits, cgroup. In a pod
    /// whose handler is an OCI runtime that one runs it.
    ///
    /// A caller that drops the future leaves nothing running.
    ///
    /// # Errors
    /// `ContainerNotFound`; `WrongState` when it does not run; `Missing` when
    /// there is no such program in it.
    pub async fn exec_session(&self, id: &str, exec: ExecRequest) -> Result<ExecSession> {
        let container = self.0.container(id)?;
        let me = self.0.clone();
        // Half a frame to the monitor would be the end of the connection.
        let work = async move { me.exec_session(&container, exec).await };
        tokio::spawn(work)
            .await
            .map_err(internal("the exec broke off"))?
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Inner {
    async fn exec_session(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        exec: ExecRequest,
    ) -> Result<ExecSession> {
        if !matches!(container.state, ContainerState::Running { .. }) {
            let text = format!("container {} does not run", container.id);
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        let monitor = self.monitor(&container.pod)?;
        let streams = if exec.tty {
            Streams::default()
        } else {
            Streams::make(exec.stdin, exec.stdout, exec.stderr)?
        };
        let pod = self.pod(container.pod.as_str())?;
        let oci_runtime = self.runtime_for_monitor(&pod.spec, container, &monitor)?;
        let foreign = oci_runtime.is_some();
        let (process, oci_process) = self.exec_process(container, exec, foreign).await?;
        // Unlike any of an earlier daemon's whose execs are still ending.
        let exec_id = format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let tty = process.tty;
        let message = monitor_v1::Exec {
            container_id: container.id.to_string(),
            exec_id: exec_id.clone(),
            process: Some(process),
            cgroup: container
                .cgroup
                .as_ref()
                .map(crate::cgroup::Cgroup::for_monitor),
            stdin_fd: streams.index[0],
            stdout_fd: streams.index[1],
            stderr_fd: streams.index[2],
            oci_runtime,
            oci_process,
        };
        let ended = monitor.expect_exec(&exec_id).shared();
        let [stdin, stdout, stderr] = streams.ours;
        let mut session = ExecSession {
            stdin,
            stdout,
            stderr,
            tty: None,
            control: ExecControl {
                monitor: monitor.clone(),
                container_id: container.id.to_string(),
                exec_id,
                ended,
            },
        };
        let asked = monitor.ask(request::Body::Exec(message), streams.theirs);
        let (answer, fds) = asked.await.map_err(|error| {
            if matches!(error, MonitorError::Refused { .. }) {
                // It never began: nothing is to be killed.
                monitor.forget_exec(&session.control.exec_id);
            }
            super::start_container::launch_error(error, "cannot exec", container.selinux.as_ref())
        })?;
        let misfit = || SandboxError::new(Kind::Internal, "the monitor's answer does not fit");
        if !matches!(answer, reply::Body::Started(_)) {
            return Err(misfit());
        }
        if tty {
            // The pidfd comes after it.
            session.tty = Some(fds.into_iter().next().ok_or_else(misfit)?);
        }
        Ok(session)
    }

    async fn exec_process(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        exec: ExecRequest,
        foreign: bool,
    ) -> Result<(monitor_v1::Process, String)> {
        let (me, container) = (self.clone(), container.clone());
        blocking(move || {
            let (spec, raw_env) = me.runtime_spec(&container)?;
            let oci_process = match foreign {
                true => super::foreign::exec_process(&spec, &exec.command, exec.tty)?,
                false => String::new(),
            };
            let seccomp = me.seccomp_filter(&container, &spec)?;
            let (program, flags) = seccomp
                .as_deref()
                .map_or((&[][..], 0), |filter| (&filter.program[..], filter.flags));
            let mut process = launch::process(&spec, &raw_env, program)
                .map_err(internal("cannot say how the command is to run"))?;
            process.argv = exec.command.into_iter().map(String::into_bytes).collect();
            process.tty = exec.tty;
            process.seccomp_flags = flags;
            Ok((process, oci_process))
        })
        .await
    }
}

/// Pipes for stdin, stdout, stderr: our ends, the monitor's, and where in
/// those each is.
#[derive(Default)]
pub(super) struct Streams {
    pub(super) ours: [Option<OwnedFd>; 3],
    pub(super) theirs: Vec<OwnedFd>,
    pub(super) index: [Option<u32>; 3],
}

impl Streams {
    /// Makes those that are wanted.
    pub(super) fn make(stdin: bool, stdout: bool, stderr: bool) -> Result<Self> {
        let mut streams = Self::default();
        for (at, wanted) in [stdin, stdout, stderr].into_iter().enumerate() {
            if !wanted {
                continue;
            }
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
                .map_err(internal("no pipe for the streams"))?;
            // Past the user's share it stays as it is.
            let _ = rustix::pipe::fcntl_setpipe_size(&read, PIPE_BYTES);
            let (ours, theirs) = if at == 0 {
                (write, read)
            } else {
                (read, write)
            };
            streams.ours[at] = Some(ours);
            streams.index[at] = u32::try_from(streams.theirs.len()).ok();
            streams.theirs.push(theirs);
        }
        Ok(streams)
    }
}
