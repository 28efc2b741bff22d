//! The logger: one process per container that reads what it writes, keeps its
//! CRI log file, and passes streams on to attached clients.
//!
//! ```text
//! opens the file, opens the gate ──> reads and writes ── Finish ──> drains ─> Drained ─> ends
//!
//! block:  pipe ─> lines ─> file                 a disk that takes nothing: reading stops
//! drop:   pipe ─> lines ─> queue ─> thread ─> file     a full queue: lines are dropped
//! ```
//!
//! It is a process of its own so that a log disk that hangs stops this
//! container's output and nothing else. It outlives a killed monitor: it ends
//! when the container has closed both streams.
//!
//! What was read is written in order of reading. Under `block` no line is lost:
//! what the disk refuses waits, and so does the container once its pipe is full.
//! A read takes all there is, up to 128 KiB, and its lines are one write.

pub mod clients;
pub mod counts;
pub mod file;
pub mod order;
pub mod queue;
pub mod tap;

use crate::line::Stream;
use crate::status::Failed;
use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use clients::Clients;
use counts::Counts;
use file::{Flushed, LogFile};
use order::{Heard, Order, Word};
use proto::log_policy::OnFull;
use queue::{Queue, RETRY};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tap::Tap;

/// Longest line where the request says nothing, in bytes. Source: containerd's
/// `max_container_log_line_size`, which clients are used to.
pub const DEFAULT_LINE_BYTES: usize = 16 << 10;

/// Longest line a request can ask for: it is held in memory.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// How long after the container's end a process that still holds its streams
/// is waited for.
pub const DRAIN: Duration = Duration::from_secs(2);

/// How long after the container's end a full disk, and clients that have not
/// taken everything, are waited for. The exit is told before that.
const LINGER: Duration = Duration::from_secs(30);

/// What is read at once, in bytes: little for a quiet container, as much as
/// does not leave the processor's cache for a busy one.
const QUIET_BYTES: usize = 8 << 10;
const BUSY_BYTES: usize = 128 << 10;

/// A full pipe, in bytes. Source: pipe(7), 16 pages.
const PIPE_BYTES: usize = 64 << 10;

/// What a busy container's pipe is made to hold, so that it and its logger do
/// not wake each other for every 64 KiB. Source: pipe(7), the default of
/// /proc/sys/fs/pipe-max-size.
const BUSY_PIPE_BYTES: usize = 1 << 20;

/// After what time without a line a busy container counts as quiet: its pipe
/// and buffers are made small again, as large pipes count towards what the
/// node's root may have (pipe-user-pages-soft).
const QUIET: Duration = Duration::from_secs(5);

/// How often the writing thread is asked whether it has finished.
const ASK: Duration = Duration::from_millis(5);

/// What a logger works on.
pub struct Logger {
    /// The container's.
    pub container_id: String,
    /// The log file; empty for none.
    pub path: String,
    /// Longest line in bytes.
    pub line_bytes: usize,
    /// What is done when the log cannot be written, and how much it may have.
    pub policy: proto::LogPolicy,
    /// To the monitor: [`Order`]s from it, [`Word`]s to it.
    pub control: OwnedFd,
    /// Written to, and closed, once the file is open.
    pub gate: OwnedFd,
    /// Where [`Counts`] are published.
    pub page: OwnedFd,
    /// The read ends of stdout and stderr; none where a console comes later.
    pub streams: Vec<(Stream, OwnedFd)>,
    /// The write end of stdin, where the container has one.
    pub stdin: Option<OwnedFd>,
    /// stdin ends with the first client that had it.
    pub stdin_once: bool,
    /// A console comes later.
    pub console: bool,
    /// What clients send goes to the console.
    pub console_stdin: bool,
}

struct Source {
    fd: OwnedFd,
    stream: Stream,
    /// `None` where there is no log.
    tap: Option<Tap>,
}

impl Source {
    fn index(&self) -> usize {
        match self.stream {
            Stream::Stdout => 0,
            Stream::Stderr => 1,
        }
    }
}

/// Where lines go.
enum Sink {
    /// Straight to the file; the container waits for it.
    Block(LogFile),
    /// By way of a thread; lines are dropped when it does not keep up.
    Drop(Queue),
}

/// Bytes a second.
struct Rate {
    per_second: u64,
    /// What may be read now; below 0 after a large read.
    left: f64,
    at: Instant,
}

/// All state of a running logger.
struct Running {
    path: String,
    line_bytes: usize,
    control: Option<OwnedFd>,
    page: OwnedFd,
    sources: Vec<Source>,
    console_stdin: bool,
    clients: Clients,
    sink: Sink,
    rate: Option<Rate>,
    counts: Counts,
    published: Counts,
    input: Vec<u8>,
    lines: Vec<u8>,
    busy: bool,
    last_read: Instant,
    /// When the disk refused last.
    last_stuck: Instant,
    /// When the container ended.
    finish: Option<Instant>,
    /// When everything was read, and after that, written.
    closing: Option<Instant>,
    drained: bool,
}

impl Logger {
    /// Runs until the container's streams have ended. The exit code.
    pub fn run(self) -> i32 {
        let mut running = match self.open() {
            Ok(running) => running,
            Err(code) => return code,
        };
        while !running.is_over() {
            running.turn();
        }
        running.account();
        0
    }

    fn open(self) -> Result<Running, i32> {
        let refuse = |failed| {
            let _ = Word::Failed(0, failed).send(&self.control);
            1
        };
        let opened = LogFile::open(&self.path, self.policy.file_bytes).and_then(|file| {
            if self.policy.on_full() == OnFull::Block {
                return Ok(Sink::Block(file));
            }
            let control = self.control.try_clone();
            let control = control.map_err(|_| Failed::new("dup", "control", Errno::MFILE))?;
            Ok(Sink::Drop(Queue::start(file, control)?))
        });
        let sink = opened.map_err(refuse)?;
        if rustix::io::write(&self.gate, b"1").is_err() {
            return Err(1);
        }
        let now = Instant::now();
        let mut running = Running {
            path: self.path,
            line_bytes: self.line_bytes,
            control: Some(self.control),
            page: self.page,
            sources: Vec::new(),
            console_stdin: self.console_stdin,
            clients: Clients::new(self.container_id, self.stdin, self.stdin_once),
            sink,
            rate: match self.policy.bytes_per_second {
                0 => None,
                per_second => Some(Rate {
                    per_second,
                    left: per_second as f64,
                    at: now,
                }),
            },
            counts: Counts::default(),
            published: Counts::default(),
            input: vec![0; QUIET_BYTES],
            lines: Vec::new(),
            busy: false,
            last_read: now,
            last_stuck: now,
            finish: None,
            closing: None,
            drained: false,
        };
        if self.console {
            // It has no second stream.
            running.clients.end(1);
        }
        for (stream, fd) in self.streams {
            running.add(stream, fd);
        }
        Ok(running)
    }
}

impl Running {
    fn add(&mut self, stream: Stream, fd: OwnedFd) {
        let tap = (!self.path.is_empty()).then(|| Tap::new(stream, self.line_bytes));
        self.sources.push(Source { fd, stream, tap });
    }

    fn turn(&mut self) {
        let ready = self.wait();
        let now = Instant::now();
        self.clients.work(now);
        self.read(&ready);
        if let Sink::Block(file) = &mut self.sink
            && file.flush() == Flushed::Stuck
        {
            self.last_stuck = now;
        }
        self.become_quiet(now);
        self.end_late_sources(now);
        if self.counts != self.published {
            self.counts.publish(&self.page);
            self.published = self.counts;
        }
        for detached in self.clients.gone() {
            self.say(&Word::Detached(detached));
        }
        self.obey();
        self.close(now);
    }

    /// Waits until there is something to do; which sources are ready.
    fn wait(&mut self) -> Vec<bool> {
        let reading = self.is_reading();
        let timeout = self.deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut fds = Vec::with_capacity(4);
        let mut sources = 0;
        if reading {
            sources = self.sources.len();
            let all = self.sources.iter();
            fds.extend(all.map(|source| PollFd::new(&source.fd, PollFlags::IN)));
        }
        fds.extend(
            self.control
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::IN)),
        );
        self.clients.poll(&mut fds);
        // An interrupted wait is only a round more.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        let ready = fds.iter().take(sources);
        ready.map(|fd| !fd.revents().is_empty()).collect()
    }

    /// False while the container has to wait: for the disk, a client, its budget.
    fn is_reading(&mut self) -> bool {
        let Sink::Block(file) = &self.sink else {
            return self.finish.is_some() || !self.clients.is_full();
        };
        if !file.is_flushed() {
            return false;
        }
        // What is left of one that has ended is not held back.
        let within = self.rate.as_mut().is_none_or(Rate::allows);
        self.finish.is_some() || (within && !self.clients.is_full())
    }

    /// When to look again, whatever happens.
    fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let disk = match &self.sink {
            Sink::Block(file) if !file.is_flushed() => Some(now + RETRY),
            Sink::Drop(_) if self.closing.is_some() && !self.drained => Some(now + ASK),
            Sink::Block(_) | Sink::Drop(_) => None,
        };
        let rate = match (&self.sink, &self.rate) {
            (Sink::Block(_), Some(rate)) => rate.wait().map(|wait| now + wait),
            _ => None,
        };
        let quiet = self.busy.then(|| self.last_read + QUIET);
        let finish = self.finish.map(|at| at.max(self.last_stuck) + DRAIN);
        let finish = finish.filter(|at| !self.sources.is_empty() && *at > now);
        let closing = self.closing.map(|at| at + self.linger());
        let all = [disk, rate, quiet, finish, closing, self.clients.deadline()];
        all.into_iter().flatten().min()
    }

    /// One read of each source that is ready, so that neither starves.
    fn read(&mut self, ready: &[bool]) {
        let mut sources = std::mem::take(&mut self.sources);
        let mut at = 0;
        sources.retain_mut(|source| {
            at += 1;
            let is_ready = ready.get(at - 1).copied().unwrap_or(false);
            !is_ready || !self.is_reading() || self.read_one(source)
        });
        // One may have come meanwhile.
        sources.append(&mut self.sources);
        self.sources = sources;
    }

    /// False when it has ended.
    fn read_one(&mut self, source: &mut Source) -> bool {
        let count = match rustix::io::read(&source.fd, &mut self.input) {
            Ok(count) if count > 0 => count,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            // EIO: the last process has closed the terminal.
            Ok(_) | Err(_) => {
                self.end(source);
                return false;
            }
        };
        self.last_read = Instant::now();
        if let Some(rate) = &mut self.rate {
            rate.spend(count);
        }
        if let Some(tap) = &mut source.tap {
            let room = match &self.sink {
                Sink::Block(_) => true,
                Sink::Drop(queue) => {
                    let within = self.rate.as_mut().is_none_or(Rate::allows);
                    within && queue.has_room()
                }
            };
            let read = &self.input[..count];
            tap.feed(read, room, now(), &mut self.lines, &mut self.counts);
            self.put();
        }
        self.clients.pass_on(source.index(), &self.input[..count]);
        if count == self.input.len() && count < BUSY_BYTES {
            self.busy = true;
            self.input.resize((count * 4).min(BUSY_BYTES), 0);
        }
        if count >= PIPE_BYTES {
            // Where it is no pipe, or root has too many, it stays as it is.
            let _ = rustix::pipe::fcntl_setpipe_size(&source.fd, BUSY_PIPE_BYTES);
        }
        true
    }

    fn end(&mut self, source: &mut Source) {
        if let Some(tap) = &mut source.tap {
            tap.finish(now(), &mut self.lines, &mut self.counts);
            self.put();
        }
        self.clients.end(source.index());
    }

    /// Hands the lines there are to the sink.
    fn put(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        match &mut self.sink {
            Sink::Block(file) => {
                file.add(&mut self.lines);
                file.flush();
            }
            Sink::Drop(queue) => {
                queue.add(&self.lines);
                self.lines.clear();
            }
        }
    }

    fn become_quiet(&mut self, now: Instant) {
        if !self.busy || now < self.last_read + QUIET {
            return;
        }
        self.busy = false;
        self.input = vec![0; QUIET_BYTES];
        self.lines = Vec::new();
        if let Sink::Block(file) = &mut self.sink {
            file.shrink();
        }
        for source in &self.sources {
            let _ = rustix::pipe::fcntl_setpipe_size(&source.fd, PIPE_BYTES);
        }
    }

    /// Ends what others still hold open after the container's end.
    fn end_late_sources(&mut self, now: Instant) {
        let Some(finish) = self.finish else { return };
        // While the disk refuses nothing is read.
        let read_since = finish.max(self.last_stuck);
        let forgotten = self.control.is_none();
        if now >= finish + LINGER || now >= read_since + DRAIN || forgotten {
            for mut source in std::mem::take(&mut self.sources) {
                self.end(&mut source);
            }
        }
    }

    /// Does what the monitor says.
    fn obey(&mut self) {
        loop {
            let Some(socket) = &self.control else { return };
            match Order::receive(socket) {
                Heard::Nothing => return,
                Heard::End => self.control = None,
                Heard::Said(Order::Finish) => self.finish = Some(Instant::now()),
                Heard::Said(Order::Console(fd)) => {
                    let _ = rustix::io::ioctl_fionbio(&fd, true);
                    if self.console_stdin
                        && let Ok(copy) = fd.try_clone()
                    {
                        self.clients.set_terminal(copy);
                    }
                    self.add(Stream::Stdout, fd);
                }
                Heard::Said(Order::Reopen(number)) => match &mut self.sink {
                    // What was read so far is in the old file, as far as its
                    // disk took it; everything else goes to the new one.
                    Sink::Block(file) => {
                        let word = match file.reopen() {
                            Ok(()) => Word::Done(number),
                            Err(failed) => Word::Failed(number, failed),
                        };
                        self.say(&word);
                    }
                    Sink::Drop(queue) => queue.reopen(number),
                },
                Heard::Said(Order::Attach(number, attach, fds)) => {
                    let word = match self.clients.attach(&attach, fds) {
                        Ok(()) => Word::Done(number),
                        Err(errno) => {
                            Word::Failed(number, Failed::new("attach", attach.attach_id, errno))
                        }
                    };
                    self.say(&word);
                }
            }
        }
    }

    fn say(&self, word: &Word) {
        if let Some(socket) = &self.control {
            let _ = word.send(socket);
        }
    }

    /// Once everything is read: says so when it is written too.
    fn close(&mut self, now: Instant) {
        let read = self.sources.is_empty();
        if !read || self.drained || !(self.finish.is_some() || self.control.is_none()) {
            return;
        }
        let since = *self.closing.get_or_insert(now);
        let written = match &mut self.sink {
            Sink::Block(file) => file.flush() == Flushed::All,
            Sink::Drop(queue) => {
                queue.close();
                queue.is_over()
            }
        };
        // Once the container is forgotten nobody looks for its last lines.
        let forgotten = self.finish.is_some() && self.control.is_none();
        if !written && !forgotten && now < since + LINGER {
            return;
        }
        if let Sink::Drop(queue) = &self.sink {
            queue.give_up();
        }
        self.drained = true;
        self.closing = Some(now);
        self.account();
        self.say(&Word::Drained);
    }

    /// How long clients have for the rest; less once the container is forgotten.
    fn linger(&self) -> Duration {
        match self.control {
            Some(_) => LINGER,
            None => clients::PATIENCE,
        }
    }

    fn is_over(&self) -> bool {
        let late = |since: Instant| Instant::now() >= since + self.linger();
        self.drained && (self.clients.is_empty() || self.closing.is_some_and(late))
    }

    /// What was counted as logged and could not be written was dropped.
    fn account(&mut self) {
        match &mut self.sink {
            Sink::Block(file) => {
                let (lines, bytes) = tap::count(&file.give_up());
                self.counts.lose(lines, bytes);
                self.counts.publish(&self.page);
            }
            Sink::Drop(queue) => {
                let (lines, bytes) = queue.lost();
                let mut counts = self.counts;
                counts.lose(lines, bytes);
                counts.publish(&self.page);
            }
        }
        self.published = self.counts;
    }
}

impl Rate {
    fn allows(&mut self) -> bool {
        let now = Instant::now();
        let more = now.duration_since(self.at).as_secs_f64() * self.per_second as f64;
        // A second's worth may come at once.
        self.left = (self.left + more).min(self.per_second as f64);
        self.at = now;
        self.left > 0.0
    }

    fn spend(&mut self, bytes: usize) {
        self.left -= bytes as f64;
    }

    /// How long until more may be read; `None` when it may be now.
    fn wait(&self) -> Option<Duration> {
        (self.left <= 0.0).then(|| {
            let seconds = (1.0 - self.left) / self.per_second as f64;
            Duration::from_secs_f64(seconds.clamp(0.001, 3600.0))
        })
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
    fn a_rate_is_kept_on_average() {
        let mut rate = Rate {
            per_second: 1000,
            left: 1000.0,
            at: Instant::now(),
        };
        assert!(rate.allows() && rate.wait().is_none());
        rate.spend(3000);
        assert!(!rate.allows());
        let wait = rate.wait().unwrap();
        assert!(wait > Duration::from_millis(1900) && wait < Duration::from_millis(2100));
        rate.at -= Duration::from_secs(3);
        assert!(rate.allows());
        assert!(rate.left <= 1000.0);
    }
}
