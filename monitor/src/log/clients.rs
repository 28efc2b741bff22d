//! Attached clients: what the container writes goes to all of them, what they
//! send goes to the container.
//!
//! A client that does not keep up makes the container wait, as a terminal
//! does, so that nothing is missing from what it sees. That has a bound: one
//! that takes less than [`TAKEN_BYTES`] in [`PATIENCE`] while it is waited for
//! is dropped. The log has each line before any client has.

use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use proto::detached::Reason;
use rustix::event::{PollFd, PollFlags};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Clients of one container at a time.
const MAX_CLIENTS: usize = 32;

/// Bytes that may wait for a client before the container waits for it.
const BACKLOG_BYTES: usize = 64 << 10;

/// Most bytes kept for a client once the container has ended, when nothing waits
/// for it any more: a full pipe, and some.
const MOST_BYTES: usize = 4 << 20;

/// How long the container waits for a client that takes next to nothing.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a client has to take in that time, in bytes: a slow line's 13 KiB/s.
const TAKEN_BYTES: usize = 64 << 10;

/// Input taken from a client at once, in bytes.
const INPUT_BYTES: usize = 16 << 10;

/// All clients of a container, and its stdin.
#[derive(Debug)]
pub struct Clients {
    container_id: String,
    list: Vec<Client>,
    stdin: Input,
    /// Streams that have ended: stdout, stderr.
    ended: [bool; 2],
    gone: Vec<proto::Detached>,
}

#[derive(Debug)]
struct Client {
    id: String,
    stdin: Option<OwnedFd>,
    outputs: [Option<Output>; 2],
    /// An output ended because the container's stream did.
    over: bool,
}

/// One pipe to a client.
#[derive(Debug)]
struct Output {
    pipe: OwnedFd,
    backlog: Vec<u8>,
    sent: usize,
    /// Since when it is waited for, and what it has taken since.
    waited: Option<(Instant, usize)>,
}

/// The way to the container's stdin or terminal.
#[derive(Debug, Default)]
struct Input {
    to: Option<OwnedFd>,
    waiting: Vec<u8>,
    sent: usize,
    /// It is a terminal, which has no end.
    terminal: bool,
    /// It ends with the first client that had it.
    once: bool,
    /// Its end, once what waits is sent.
    closing: bool,
}

impl Clients {
    /// Nobody yet. `stdin` is the container's, where it is a pipe and wanted;
    /// `once`: it ends with the first client that had it.
    pub fn new(container_id: String, stdin: Option<OwnedFd>, once: bool) -> Clients {
        if let Some(stdin) = &stdin {
            let _ = rustix::io::ioctl_fionbio(stdin, true);
        }
        Clients {
            container_id,
            list: Vec::new(),
            stdin: Input {
                to: stdin,
                once,
                ..Input::default()
            },
            ended: [false; 2],
            gone: Vec::new(),
        }
    }

    /// What clients send goes to this terminal, which does not block.
    pub fn set_terminal(&mut self, console: OwnedFd) {
        self.stdin.to = Some(console);
        self.stdin.terminal = true;
    }

    /// Adds a client.
    ///
    /// # Errors
    /// EAGAIN when there are too many, EBADF when a descriptor is missing.
    pub fn attach(&mut self, attach: &proto::Attach, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        if self.list.len() >= MAX_CLIENTS {
            return Err(Errno::AGAIN);
        }
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let mut take = |index: Option<u32>| match index {
            None => Ok(None),
            Some(index) => match fds.get_mut(index as usize).and_then(Option::take) {
                None => Err(Errno::BADF),
                Some(fd) => rustix::io::ioctl_fionbio(&fd, true).map(|()| Some(fd)),
            },
        };
        let stdin = take(attach.stdin_fd)?;
        let stdout = take(attach.stdout_fd)?;
        let stderr = take(attach.stderr_fd)?;
        self.list.push(Client {
            id: attach.attach_id.clone(),
            stdin,
            outputs: [stdout, stderr].map(|pipe| pipe.map(Output::new)),
            over: false,
        });
        self.settle();
        Ok(())
    }

    /// Passes on what the container wrote to stream 0 (stdout) or 1 (stderr).
    pub fn pass_on(&mut self, stream: usize, bytes: &[u8]) {
        for client in &mut self.list {
            if let Some(output) = &mut client.outputs[stream]
                && output.push(bytes).is_err()
            {
                client.outputs[stream] = None;
            }
        }
        self.settle();
    }

    /// The container has ended a stream.
    pub fn end(&mut self, stream: usize) {
        self.ended[stream] = true;
        self.settle();
    }

    /// There is nobody, and no input on its way.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty() && self.stdin.waiting.is_empty()
    }

    /// The container has to wait for one of them.
    pub fn is_full(&self) -> bool {
        self.outputs().any(Output::is_full)
    }

    /// When the longest waited for is to be looked at again.
    pub fn deadline(&self) -> Option<Instant> {
        let waited = self.outputs().filter_map(|output| output.waited);
        waited.map(|(since, _)| since + PATIENCE).min()
    }

    fn outputs(&self) -> impl Iterator<Item = &Output> {
        let outputs = self.list.iter().flat_map(|client| &client.outputs);
        outputs.flatten()
    }

    /// What is to be waited for on their behalf.
    pub fn poll<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        if let Some(to) = &self.stdin.to
            && !self.stdin.waiting.is_empty()
        {
            fds.push(PollFd::new(to, PollFlags::OUT));
        }
        for client in &self.list {
            for output in client.outputs.iter().flatten() {
                // A closed pipe is told whatever is asked for.
                let flags = match output.backlog.is_empty() {
                    true => PollFlags::empty(),
                    false => PollFlags::OUT,
                };
                fds.push(PollFd::new(&output.pipe, flags));
            }
            if let Some(stdin) = &client.stdin
                && self.stdin.waiting.is_empty()
            {
                fds.push(PollFd::new(stdin, PollFlags::IN));
            }
        }
    }

    /// Moves what can be moved, both ways.
    pub fn work(&mut self, now: Instant) {
        if self.list.is_empty() && self.stdin.waiting.is_empty() {
            return;
        }
        self.stdin.flush();
        for client in &mut self.list {
            for slot in &mut client.outputs {
                let Some(output) = slot else { continue };
                if output.flush().is_err() || output.is_hung_up() {
                    *slot = None;
                } else if output.is_late(now) {
                    self.gone
                        .push(detached(&self.container_id, &client.id, Reason::TooSlow));
                    client.id.clear();
                    break;
                }
            }
        }
        // The loser of its patience loses everything.
        self.list.retain(|client| !client.id.is_empty());
        self.take_input();
        self.settle();
    }

    fn take_input(&mut self) {
        let mut buffer = [0; INPUT_BYTES];
        for client in &mut self.list {
            if !self.stdin.waiting.is_empty() {
                break;
            }
            let Some(from) = &client.stdin else { continue };
            match rustix::io::read(from, &mut buffer) {
                Ok(count) if count > 0 => self.stdin.push(&buffer[..count]),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(_) | Err(_) => {
                    client.stdin = None;
                    self.stdin.left();
                }
            }
        }
    }

    /// Lets go of what has ended.
    fn settle(&mut self) {
        if self.ended == [true; 2] {
            self.stdin.close();
        }
        for client in &mut self.list {
            if self.stdin.to.is_none() {
                client.stdin = None;
            }
            for (slot, ended) in client.outputs.iter_mut().zip(self.ended) {
                if ended
                    && slot
                        .as_ref()
                        .is_some_and(|output| output.backlog.is_empty())
                {
                    *slot = None;
                    client.over = true;
                }
            }
            let outputs_over = client.outputs.iter().all(Option::is_none);
            if outputs_over && client.over {
                client.stdin = None;
            }
            if outputs_over && client.stdin.is_none() {
                let reason = match client.over || self.ended == [true; 2] {
                    true => Reason::Ended,
                    false => Reason::HungUp,
                };
                self.gone
                    .push(detached(&self.container_id, &client.id, reason));
                client.id.clear();
            }
        }
        self.list.retain(|client| !client.id.is_empty());
    }

    /// Who has gone since this was asked last.
    pub fn gone(&mut self) -> Vec<proto::Detached> {
        std::mem::take(&mut self.gone)
    }
}

fn detached(container_id: &str, attach_id: &str, reason: Reason) -> proto::Detached {
    proto::Detached {
        container_id: container_id.to_owned(),
        attach_id: attach_id.to_owned(),
        reason: reason.into(),
    }
}

impl Output {
    fn new(pipe: OwnedFd) -> Output {
        Output {
            pipe,
            backlog: Vec::new(),
            sent: 0,
            waited: None,
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let mut rest = bytes;
        if self.backlog.is_empty() {
            let sent = write_some(&self.pipe, rest)?;
            rest = &rest[sent..];
        }
        if self.backlog.len() + rest.len() > MOST_BYTES {
            return Err(Errno::NOBUFS);
        }
        self.backlog.extend_from_slice(rest);
        self.watch(0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Errno> {
        if self.backlog.is_empty() {
            return Ok(());
        }
        let count = write_some(&self.pipe, &self.backlog[self.sent..])?;
        self.sent += count;
        if self.sent == self.backlog.len() {
            self.backlog = Vec::new();
            self.sent = 0;
        }
        self.watch(count);
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.backlog.len() - self.sent > BACKLOG_BYTES
    }

    /// Begins, goes on with or ends waiting for it.
    fn watch(&mut self, taken: usize) {
        self.waited = match (self.is_full(), self.waited) {
            (false, _) => None,
            (true, None) => Some((Instant::now(), 0)),
            (true, Some((since, before))) => Some((since, before + taken)),
        };
    }

    /// True when patience with it is over; begins anew when it has taken enough.
    fn is_late(&mut self, now: Instant) -> bool {
        match self.waited {
            Some((since, taken)) if now >= since + PATIENCE => {
                self.waited = Some((now, 0));
                taken < TAKEN_BYTES
            }
            _ => false,
        }
    }

    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.pipe, PollFlags::empty())];
        let none = rustix::event::Timespec::default();
        let ready = rustix::event::poll(&mut fds, Some(&none)).is_ok_and(|count| count > 0);
        ready
            && fds[0]
                .revents()
                .intersects(PollFlags::ERR | PollFlags::NVAL)
    }
}

impl Input {
    fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
        self.flush();
    }

    fn flush(&mut self) {
        let Some(to) = &self.to else {
            self.waiting.clear();
            self.sent = 0;
            return;
        };
        if !self.waiting.is_empty() {
            match write_some(to, &self.waiting[self.sent..]) {
                Ok(count) => self.sent += count,
                // The container has closed it.
                Err(_) => return self.close(),
            }
            if self.sent < self.waiting.len() {
                return;
            }
            self.waiting = Vec::new();
            self.sent = 0;
        }
        if self.closing {
            self.close();
        }
    }

    /// A client that had it has gone.
    fn left(&mut self) {
        if self.once && !self.terminal {
            self.closing = true;
            self.flush();
        }
    }

    fn close(&mut self) {
        self.to = None;
        self.waiting = Vec::new();
        self.sent = 0;
    }
}

/// Writes what there is room for.
fn write_some(to: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    let mut sent = 0;
    while sent < bytes.len() {
        match rustix::io::write(to, &bytes[sent..]) {
            Ok(0) | Err(Errno::AGAIN) => break,
            Ok(count) => sent += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}
