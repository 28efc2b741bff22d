//! Running a program that may hang, babble or die.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a program may write to each of its outputs: CNI results are kilobytes,
/// and one that writes without end must not cost the node its memory.
pub const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// What a program that ended left behind.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

/// Why there is nothing to go by.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It did not start.
    #[error("cannot start {program}")]
    Start {
        /// Its path.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was killed at its deadline.
    #[error("{program} did not end within {deadline:?} and was killed")]
    Deadline {
        /// Its path.
        program: String,
        /// How long it had.
        deadline: Duration,
    },
    /// It was killed for writing too much.
    #[error("{program} wrote more than {MAX_OUTPUT_BYTES} bytes and was killed")]
    TooMuch {
        /// Its path.
        program: String,
    },
    /// Its pipes or its end could not be watched.
    #[error("cannot watch {program}")]
    Watch {
        /// Its path.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Runs `command` with `input` on its standard input, in a process group of its
/// own that is killed as a whole when it takes longer than `deadline` or writes
/// more than [`MAX_OUTPUT_BYTES`].
///
/// # Errors
/// When there is no exit status, or the output is not whole.
pub fn run(
    command: &mut Command,
    input: &[u8],
    deadline: Duration,
) -> Result<Finished, ProcessError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let started = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut group = match started {
        Ok(child) => Group(child),
        Err(source) => return Err(ProcessError::Start { program, source }),
    };
    watch(&mut group.0, input, deadline).map_err(|why| match why {
        Why::Deadline => ProcessError::Deadline { program, deadline },
        Why::TooMuch => ProcessError::TooMuch { program },
        Why::Kernel(source) => ProcessError::Watch { program, source },
    })
}

/// A process group that ends with its owner.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // Also after a good end: what it left in the background would hold locks and pipes.
        // The leader is not reaped yet, so the number is still this group's.
        if let Some(leader) = Pid::from_raw(self.0.id() as i32) {
            let _ = kill_process_group(leader, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

enum Why {
    Deadline,
    TooMuch,
    Kernel(io::Error),
}

impl From<Errno> for Why {
    fn from(errno: Errno) -> Self {
        Why::Kernel(errno.into())
    }
}

fn watch(child: &mut Child, input: &[u8], deadline: Duration) -> Result<Finished, Why> {
    let end = Instant::now() + deadline;
    let pid = Pid::from_raw(child.id() as i32)
        .ok_or_else(|| Why::Kernel(io::Error::other("process number 0")))?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let mut stdin = child.stdin.take().map(OwnedFd::from);
    let mut stdout = Stream::new(child.stdout.take().map(OwnedFd::from));
    let mut stderr = Stream::new(child.stderr.take().map(OwnedFd::from));
    for fd in stdin.iter().chain(&stdout.fd).chain(&stderr.fd) {
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    }
    let mut input = input;
    if input.is_empty() {
        stdin = None;
    }
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Why::Deadline);
        }
        let over = {
            let mut fds = vec![PollFd::new(&ended, PollFlags::IN)];
            fds.extend(stdin.iter().map(|fd| PollFd::new(fd, PollFlags::OUT)));
            for fd in stdout.fd.iter().chain(&stderr.fd) {
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            !fds[0].revents().is_empty()
        };
        if let Some(fd) = &stdin {
            match rustix::io::write(fd, input) {
                Ok(written) => input = &input[written..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                // It does not want to know: its own business.
                Err(_) => input = &[],
            }
            if input.is_empty() {
                stdin = None;
            }
        }
        stdout.read()?;
        stderr.read()?;
        if over {
            // What it wrote before it ended has been read: the pipes were read after the end
            // was seen, and a process it left behind is not waited for.
            stdout.read()?;
            stderr.read()?;
            return Ok(Finished {
                status: child_status(pid)?,
                stdout: stdout.bytes,
                stderr: stderr.bytes,
            });
        }
    }
}

/// How the process ended; it is not reaped, so that its number stays its own.
fn child_status(pid: Pid) -> Result<ExitStatus, Why> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::os::unix::process::ExitStatusExt;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = loop {
        match waitid(WaitId::Pid(pid), options) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let raw = match status
        .as_ref()
        .map(|status| (status.exit_status(), status.terminating_signal()))
    {
        Some((Some(code), _)) => code << 8,
        Some((None, Some(signal))) => signal,
        _ => return Err(Why::Kernel(io::Error::other("no exit status"))),
    };
    Ok(ExitStatus::from_raw(raw))
}

struct Stream {
    fd: Option<OwnedFd>,
    bytes: Vec<u8>,
}

impl Stream {
    fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            bytes: Vec::new(),
        }
    }

    /// Takes all that is there now.
    fn read(&mut self) -> Result<(), Why> {
        let mut chunk = [0; 16 << 10];
        while let Some(fd) = &self.fd {
            match rustix::io::read(fd.as_fd(), &mut chunk) {
                Ok(0) => self.fd = None,
                Ok(length) => {
                    self.bytes.extend_from_slice(&chunk[..length]);
                    if self.bytes.len() > MAX_OUTPUT_BYTES {
                        return Err(Why::TooMuch);
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &[u8], deadline: Duration) -> Result<Finished, ProcessError> {
        run(
            Command::new("/bin/sh").args(["-c", script]),
            input,
            deadline,
        )
    }

    #[test]
    fn what_goes_in_and_comes_out_is_whole() {
        let input = vec![b'x'; 300_000];
        let done = sh(
            "cat; echo oops >&2; exit 3",
            &input,
            Duration::from_secs(20),
        )
        .unwrap();
        assert_eq!(done.stdout.len(), 300_000);
        assert_eq!(done.stderr, b"oops\n");
        assert_eq!(done.status.code(), Some(3));
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let started = Instant::now();
        let error = sh("sleep 1000 | sleep 1000", b"", Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, ProcessError::Deadline { .. }));
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_babbles_is_killed() {
        let error = sh("yes", b"", Duration::from_secs(20)).unwrap_err();
        assert!(matches!(error, ProcessError::TooMuch { .. }));
    }

    #[test]
    fn what_is_left_in_the_background_is_not_waited_for() {
        let done = sh(
            "sleep 1000 & echo done; kill -9 $$",
            b"ignored",
            Duration::from_secs(20),
        );
        let done = done.unwrap();
        assert_eq!(done.stdout, b"done\n");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&done.status),
            Some(9)
        );
    }
}
