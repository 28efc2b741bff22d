//! ExecSync: a command in a running container, its output and exit code.

use super::Sandboxes;
use super::exec_session::{ExecRequest, ExecSession};
use crate::error::{Kind, Result, SandboxError};
use crate::operation::lock;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// process would run. Output past 16 MiB is discarded. A caller that drops
    /// the future leaves nothing running.
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
        let exec = ExecRequest {
            command,
            tty: false,
            stdin: false,
            stdout: true,
            stderr: true,
        };
        run(self.exec_session(id, exec).await?, timeout).await
    }
}

/// Waits for the command to its end or to the deadline.
async fn run(mut session: ExecSession, timeout: Option<Duration>) -> Result<ExecOutput> {
    let left = Arc::new(AtomicUsize::new(OUTPUT_BYTES));
    let streams = [session.stdout.take(), session.stderr.take()];
    let outputs = streams.map(|fd| collect(fd, left.clone()));
    let deadline = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let exited = tokio::select! {
        exited = session.wait() => exited?,
        () = deadline => {
            let control = session.control();
            control.kill().await;
            let _ = tokio::time::timeout(KILLED, control.wait()).await;
            let seconds = timeout.unwrap_or_default().as_secs_f64();
            let text = format!("the command did not end within {seconds} s and was killed");
            return Err(SandboxError::new(Kind::DeadlineExceeded, text));
        }
    };
    let [stdout, stderr] = finish(outputs).await;
    Ok(ExecOutput {
        stdout,
        stderr,
        exit_code: exited.code,
    })
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
fn collect(fd: Option<OwnedFd>, left: Arc<AtomicUsize>) -> Output {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let kept = bytes.clone();
    let task = tokio::spawn(async move {
        let Some(Ok(mut reader)) = fd.map(pipe::Receiver::from_owned_fd) else {
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
