//! ExecSync: a command in a running container, its output and exit code.

use super::{Inner, Sandboxes, blocking, internal};
use crate::container::{ContainerRecord, ContainerState};
use crate::error::{Kind, Result, SandboxError};
use crate::launch;
use crate::monitor::Monitor;
use crate::operation::lock;
use berth_proto::monitor_v1::{self, reply, request};
use rustix::pipe::PipeFlags;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

/// Most bytes of output kept, both streams together: the kubelet takes messages
/// of 16 MiB, and 64 KiB of that are left to everything else.
const OUTPUT_BYTES: usize = (16 << 20) - (64 << 10);

/// How long output may still come once the command has ended, when something it
/// left behind holds its pipes.
const DRAIN: Duration = Duration::from_millis(500);

/// How long a killed command may take to be reported as ended.
const KILLED: Duration = Duration::from_secs(5);

/// What a command left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// As a shell says it: 128 + signal where a signal ended it.
    pub exit_code: i32,
}

impl Sandboxes {
    /// Runs `command` in a running container, as the container's own first
    /// process would run. Output past 16 MiB is discarded.
    ///
    /// # Errors
    /// `DeadlineExceeded` once `timeout` has passed, the command is killed then;
    /// `WrongState` when the container does not run; `Missing` when the image
    /// has no such program.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let container = self.0.container(id)?;
        let me = self.0.clone();
        let work = async move { me.exec_sync(&container, command, timeout).await };
        tokio::spawn(work)
            .await
            .map_err(internal("the exec broke off"))?
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Kills an exec whose caller is gone.
struct Armed<'a> {
    monitor: &'a Monitor,
    exec_id: &'a str,
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.monitor.forget_exec(self.exec_id);
    }
}

impl Inner {
    async fn exec_sync(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        if !matches!(container.state, ContainerState::Running { .. }) {
            let text = format!("container {} does not run", container.id);
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        let monitor = self.monitor(&container.pod)?;
        let process = self.exec_process(container, command).await?;
        let pipe = || {
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(internal("no pipe for the output"))
        };
        let (stdout, stdout_end) = pipe()?;
        let (stderr, stderr_end) = pipe()?;
        let exec_id = format!("sync-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let message = monitor_v1::Exec {
            container_id: container.id.to_string(),
            exec_id: exec_id.clone(),
            process: Some(process),
            cgroup: container
                .cgroup
                .as_ref()
                .map(crate::cgroup::Cgroup::for_monitor),
            stdin_fd: None,
            stdout_fd: Some(0),
            stderr_fd: Some(1),
        };
        let ended = monitor.expect_exec(&exec_id);
        let _armed = Armed {
            monitor: &monitor,
            exec_id: &exec_id,
        };
        let ends = vec![stdout_end, stderr_end];
        let started = monitor
            .ask(request::Body::Exec(message), ends)
            .await
            .map_err(|error| super::start_container::launch_error(error, "cannot exec"))?;
        if !matches!(started.0, reply::Body::Started(_)) {
            return Err(SandboxError::new(
                Kind::Internal,
                "the monitor's answer does not fit",
            ));
        }

        let left = Arc::new(AtomicUsize::new(OUTPUT_BYTES));
        let outputs = [collect(stdout, left.clone()), collect(stderr, left)];
        let deadline = async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        let mut ended = ended;
        let exited = tokio::select! {
            exited = &mut ended => exited,
            () = deadline => {
                let kill = monitor_v1::Signal {
                    container_id: container.id.to_string(),
                    exec_id: exec_id.clone(),
                    signal: super::teardown::libc_sigkill(),
                };
                let _ = monitor.tell(request::Body::Signal(kill), Vec::new()).await;
                let _ = tokio::time::timeout(KILLED, &mut ended).await;
                let seconds = timeout.unwrap_or_default().as_secs_f64();
                let text = format!("the command did not end within {seconds} s and was killed");
                return Err(SandboxError::new(Kind::DeadlineExceeded, text));
            }
        };
        let exited = exited.map_err(internal("the monitor went away during the exec"))?;
        let [stdout, stderr] = finish(outputs).await;
        Ok(ExecOutput {
            stdout,
            stderr,
            exit_code: exited.exit_code,
        })
    }

    async fn exec_process(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        command: Vec<String>,
    ) -> Result<monitor_v1::Process> {
        let (me, container) = (self.clone(), container.clone());
        blocking(move || {
            let (spec, raw_env) = me.runtime_spec(&container)?;
            let seccomp = me.seccomp_filter(&container, &spec)?;
            let (program, flags) = seccomp
                .as_deref()
                .map_or((&[][..], 0), |filter| (&filter.program[..], filter.flags));
            let mut process = launch::process(&spec, &raw_env, program)
                .map_err(internal("cannot say how the command is to run"))?;
            process.argv = command.into_iter().map(String::into_bytes).collect();
            process.tty = false;
            process.seccomp_flags = flags;
            Ok(process)
        })
        .await
    }
}

/// A pipe being read to its end by a task of its own.
struct Output {
    task: tokio::task::JoinHandle<()>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

/// Both outputs: whole at their ends, or what there is once [`DRAIN`] has passed.
async fn finish(outputs: [Output; 2]) -> [Vec<u8>; 2] {
    let until = tokio::time::Instant::now() + DRAIN;
    let mut whole = [Vec::new(), Vec::new()];
    for (whole, mut output) in whole.iter_mut().zip(outputs) {
        if tokio::time::timeout_at(until, &mut output.task)
            .await
            .is_err()
        {
            output.task.abort();
        }
        *whole = std::mem::take(&mut *lock(&output.bytes));
    }
    whole
}

/// Reads a pipe to its end, keeping what `left` allows.
fn collect(fd: OwnedFd, left: Arc<AtomicUsize>) -> Output {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let kept = bytes.clone();
    let task = tokio::spawn(async move {
        let Ok(mut reader) = pipe::Receiver::from_owned_fd(fd) else {
            return;
        };
        let mut chunk = vec![0u8; 32 << 10];
        loop {
            match reader.read(&mut chunk).await {
                Ok(0) | Err(_) => return,
                Ok(read) => {
                    let allowed = take(&left, read);
                    lock(&kept).extend_from_slice(&chunk[..allowed]);
                }
            }
        }
    });
    Output { task, bytes }
}

/// How many of `wanted` bytes the budget still has; they are taken from it.
fn take(left: &AtomicUsize, wanted: usize) -> usize {
    let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        Some(left.saturating_sub(wanted))
    });
    before.unwrap_or(0).min(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_shared_and_never_overdrawn() {
        let left = AtomicUsize::new(10);
        assert_eq!([take(&left, 6), take(&left, 6), take(&left, 1)], [6, 4, 0]);
    }
}
