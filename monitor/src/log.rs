//! The logger: one process per container that reads what it writes and keeps
//! its CRI log file.
//!
//! opens the file ── tells the monitor, opens the gate ──> reads and writes ── Finish ──> drains ──> ends
//!
//! It is a process of its own so that a log disk that hangs stops this
//! container's output and nothing else. It outlives a killed monitor: it ends
//! when the container has closed both streams.
//!
//! A line the disk refuses is lost and the container goes on; a line that was
//! cut short by a full disk is ended before the next one begins.

use crate::line::{Splitter, Stream};
use crate::status::{self, Failed, Heard, Note, Step};
use berth_sys::Errno;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Longest line where the request says nothing, in bytes. Source: containerd's
/// `max_container_log_line_size`, which clients are used to.
pub const DEFAULT_LINE_BYTES: usize = 16 << 10;

/// Longest line a request can ask for: it is held in memory.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// How long after the container's end a process that still holds its streams
/// is waited for.
pub const DRAIN: Duration = Duration::from_secs(2);

/// Most that is read at once, in bytes.
const READ_BYTES: usize = 32 << 10;

/// What a logger works on.
pub struct Logger {
    /// The log file.
    pub path: String,
    /// Longest line in bytes.
    pub line_bytes: usize,
    /// To the monitor: [`Note`]s both ways.
    pub control: OwnedFd,
    /// Written to, and closed, once the file is open.
    pub gate: OwnedFd,
    /// The read ends of stdout and stderr; none where a console comes later.
    pub streams: Vec<(Stream, OwnedFd)>,
}

struct Source {
    fd: OwnedFd,
    splitter: Splitter,
}

/// The file, and whether its last line is whole.
struct Output {
    file: OwnedFd,
    torn: bool,
}

impl Logger {
    /// Runs until the container's streams have ended. The exit code.
    pub fn run(self) -> i32 {
        let opened = open(&self.path);
        let mut output = match opened {
            Ok(file) => Output { file, torn: false },
            Err(failed) => {
                let _ = status::send(&self.control, &Note::Failed(failed));
                return 1;
            }
        };
        if rustix::io::write(&self.gate, b"1").is_err() {
            return 1;
        }
        drop(self.gate);

        let limit = self.line_bytes;
        let mut sources: Vec<Source> = self
            .streams
            .into_iter()
            .map(|(stream, fd)| Source {
                fd,
                splitter: Splitter::new(stream, limit),
            })
            .collect();
        let mut control = Some(self.control);
        let mut deadline: Option<Instant> = None;
        let mut input = vec![0; READ_BYTES];
        let mut lines = Vec::new();
        loop {
            let end_now = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if (sources.is_empty() && (deadline.is_some() || control.is_none())) || end_now {
                break;
            }
            wait(&sources, control.as_ref(), deadline);
            // In order of reading, one read each, so that neither stream starves.
            sources.retain_mut(|source| read(source, &mut input, &mut lines));
            output.write(&mut lines);
            let Some(socket) = &control else { continue };
            match status::receive(socket) {
                Heard::Note(Note::Console(fd)) => {
                    let _ = rustix::io::ioctl_fionbio(&fd, true);
                    sources.push(Source {
                        fd,
                        splitter: Splitter::new(Stream::Stdout, limit),
                    });
                }
                Heard::Note(Note::Reopen) => {
                    // All lines so far are written, the next go to the new file.
                    let answer = match open(&self.path) {
                        Ok(file) => {
                            output = Output { file, torn: false };
                            Note::Opened
                        }
                        Err(failed) => Note::Failed(failed),
                    };
                    let _ = status::send(socket, &answer);
                }
                Heard::Note(Note::Finish) => deadline = Some(Instant::now() + DRAIN),
                Heard::Note(_) | Heard::Nothing => {}
                Heard::End => control = None,
            }
        }
        for source in &mut sources {
            source.splitter.finish(now(), &mut lines);
        }
        output.write(&mut lines);
        0
    }
}

/// Opens the log for appending. A symbolic link is not followed, and what is
/// not a regular file (a FIFO would block) is refused.
fn open(path: &str) -> Result<OwnedFd, Failed> {
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640)).step("open log", path)?;
    let stat = rustix::fs::fstat(&file).step("open log", path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Failed::invalid("open log", path));
    }
    Ok(file)
}

/// Waits until there is something to do.
fn wait(sources: &[Source], control: Option<&OwnedFd>, deadline: Option<Instant>) {
    let mut fds: Vec<PollFd<'_>> = sources
        .iter()
        .map(|source| PollFd::new(&source.fd, PollFlags::IN))
        .collect();
    fds.extend(control.map(|fd| PollFd::new(fd, PollFlags::IN)));
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    // An interrupted wait is only a round more.
    let _ = rustix::event::poll(&mut fds, timeout.as_ref());
}

/// Takes one read's worth; false when the stream has ended.
fn read(source: &mut Source, input: &mut [u8], lines: &mut Vec<u8>) -> bool {
    match rustix::io::read(&source.fd, &mut *input) {
        Ok(0) => {}
        Ok(count) => {
            source.splitter.feed(&input[..count], now(), lines);
            return true;
        }
        Err(Errno::AGAIN | Errno::INTR) => return true,
        // EIO: the last process has closed the terminal.
        Err(_) => {}
    }
    source.splitter.finish(now(), lines);
    false
}

impl Output {
    /// Writes and clears `lines`.
    fn write(&mut self, lines: &mut Vec<u8>) {
        if self.torn && !lines.is_empty() {
            self.torn = !matches!(rustix::io::write(&self.file, b"\n"), Ok(1));
        }
        let mut rest = &lines[..];
        while !self.torn && !rest.is_empty() {
            match rustix::io::write(&self.file, rest) {
                Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                _ => {
                    // Full or broken: these lines are lost, and where one was
                    // cut its end is missing.
                    let written = lines.len() - rest.len();
                    self.torn = written > 0 && lines[written - 1] != b'\n';
                    break;
                }
            }
        }
        lines.clear();
        // One burst must not be kept for good.
        lines.shrink_to(READ_BYTES);
    }
}

fn now() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        assert!(open(&path("a")).is_ok());
        std::os::unix::fs::symlink(path("a"), path("link")).unwrap();
        assert_eq!(
            open(&path("link")).unwrap_err().errno,
            Errno::LOOP.raw_os_error()
        );
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(open(&path("fifo")).is_err());
        let missing = open(&path("no/such")).unwrap_err();
        assert_eq!((missing.stage.as_str(), missing.errno), ("open log", 2));
    }

    #[test]
    fn a_line_cut_by_a_full_disk_is_ended_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut output = Output {
            file: open(path.to_str().unwrap()).unwrap(),
            torn: true,
        };
        output.write(&mut b"next\n".to_vec());
        assert_eq!(std::fs::read(&path).unwrap(), b"\nnext\n");
    }
}
