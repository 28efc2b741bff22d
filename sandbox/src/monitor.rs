//! The daemon's side of a pod's monitor: spawning it, asking it, hearing from it.
//!
//! The daemon binds the socket and hands the listening end to the monitor as
//! descriptor 3, so there is no moment at which the monitor runs and cannot be
//! reached, and a later daemon finds it by path. The framing and the messages
//! are described in `proto/protos/monitor_v1.proto`.

use crate::operation::lock;
use berth_proto::monitor_v1::{self, MAX_FDS, MAX_FRAME_BYTES, reply, request};
use prost::Message as _;
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

/// Longest wait for an answer that needs no disk and no file system but the
/// container's own: a monitor that does not answer by then is not well.
const ANSWER: Duration = Duration::from_secs(60);

/// Why a monitor could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The program could not be started.
    #[error("cannot start the monitor {program}")]
    Spawn {
        /// The program's path.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its socket could not be made or reached.
    #[error("cannot reach the monitor at {socket}")]
    Unreachable {
        /// The socket's path.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection ended before the answer came.
    #[error("the monitor went away")]
    Lost,
    /// No answer in time.
    #[error("the monitor did not answer within {} s", ANSWER.as_secs())]
    Silent,
    /// The monitor tried and failed.
    #[error("{stage} {detail}: {}", errno_text(*errno))]
    Refused {
        /// The step.
        stage: String,
        /// errno, or 0.
        errno: i32,
        /// The object.
        detail: String,
        /// What was named does not exist there.
        not_found: bool,
    },
    /// An answer of another kind than asked for.
    #[error("the monitor gave an answer that does not fit")]
    Unexpected,
    /// More than a frame may hold.
    #[error("the request is too large: {bytes} bytes, {fds} descriptors")]
    TooLarge {
        /// Bytes of the message.
        bytes: usize,
        /// Descriptors with it.
        fds: usize,
    },
}

fn errno_text(errno: i32) -> String {
    if errno == 0 { "refused".into() } else { io::Error::from_raw_os_error(errno).to_string() }
}

/// An answer and the descriptors that came with it.
pub type Answer = (reply::Body, Vec<OwnedFd>);

/// What a monitor says unasked.
#[derive(Debug)]
pub enum Event {
    /// A container's first process has ended; its record is durable.
    Exited(monitor_v1::Exited),
    /// The connection is gone.
    Lost,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;
type Execs = Arc<Mutex<HashMap<String, oneshot::Sender<monitor_v1::Exited>>>>;

/// A connection to one pod's monitor.
pub struct Monitor {
    stream: Arc<UnixStream>,
    writing: tokio::sync::Mutex<()>,
    next: AtomicU64,
    waiting: Waiting,
    execs: Execs,
    lost: watch::Receiver<bool>,
    reader: tokio::task::JoinHandle<()>,
    /// What the monitor said of itself.
    pub hello: monitor_v1::HelloReply,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// The monitor's program file, behind a read-only mount of its own.
///
/// A container that gets hold of /proc/PID/exe of a process of the monitor's can
/// reach the file only through that mount, and so not write to it
/// (CVE-2019-5736).
pub struct Program {
    path: PathBuf,
    held: OwnedFd,
}

impl Program {
    /// Opens the program at `path`.
    ///
    /// # Errors
    /// `Spawn` when it is not there or cannot be mounted apart.
    pub fn open(path: &Path) -> Result<Self, MonitorError> {
        let refuse = |source| MonitorError::Spawn { program: path.into(), source };
        let held = berth_sys::mount::read_only_clone(path).map_err(refuse)?;
        Ok(Self { path: path.into(), held })
    }
}

/// Binds the socket `dir`/monitor.sock and starts the monitor of a pod on it.
///
/// Blocking. The process is waited for by a thread of its own, so it never
/// stays a zombie; it does not end with the daemon.
///
/// # Errors
/// `Unreachable` when the socket cannot be bound, `Spawn` when the program
/// cannot be started.
pub fn spawn(program: &Program, pod: &str, dir: &Path, line_bytes: u32) -> Result<(), MonitorError> {
    let socket = dir.join("monitor.sock");
    let listener = listen(dir).map_err(|source| MonitorError::Unreachable { socket, source })?;
    let refuse = |source| MonitorError::Spawn { program: program.path.clone(), source };
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("monitor.log"))
        .map_err(refuse)?;
    // Neither a hook between fork and exec nor a shared environment: this is a
    // posix_spawn. The descriptor's number is read before it is closed on exec.
    let child = std::process::Command::new(format!("/proc/self/fd/{}", program.held.as_raw_fd()))
        .arg0("berth-monitor")
        .args(["--pod", pod, "--listen-fd", "0", "--line-bytes", &line_bytes.to_string()])
        .env_clear()
        .current_dir("/")
        .stdin(listener)
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(refuse)?;
    std::thread::Builder::new()
        .name("monitor-wait".into())
        .stack_size(64 << 10)
        .spawn(move || {
            let mut child = child;
            if let Err(error) = child.wait() {
                tracing::warn!(%error, "cannot wait for a monitor");
            }
        })
        .map_err(refuse)?;
    Ok(())
}

fn listen(dir: &Path) -> io::Result<OwnedFd> {
    let _ = std::fs::remove_file(dir.join("monitor.sock"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    let listener = std::os::unix::net::UnixListener::bind(beneath(&dir))?;
    Ok(listener.into())
}

/// A unix socket's path holds 108 bytes and ours may be deeper than that.
fn beneath(dir: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}/monitor.sock", dir.as_raw_fd()).into()
}

impl Monitor {
    /// Connects to the monitor that listens at `dir`/monitor.sock; what it says
    /// unasked goes to `events` with `tag`.
    ///
    /// # Errors
    /// `Unreachable` when nobody listens there, `Lost` or `Silent` when it does
    /// not greet back.
    pub async fn connect<T: Clone + Send + 'static>(
        dir: &Path,
        tag: T,
        events: mpsc::UnboundedSender<(T, Event)>,
    ) -> Result<Self, MonitorError> {
        let unreachable = |source| MonitorError::Unreachable { socket: dir.join("monitor.sock"), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let held = rustix::fs::open(dir, flags, Mode::empty()).map_err(|e| unreachable(e.into()))?;
        let stream = UnixStream::connect(beneath(&held)).await.map_err(unreachable)?;
        let stream = Arc::new(stream);
        let waiting = Waiting::default();
        let execs = Execs::default();
        let (lost_sender, lost) = watch::channel(false);
        let reader = tokio::spawn({
            let (stream, waiting, execs) = (stream.clone(), waiting.clone(), execs.clone());
            async move {
                if let Err(error) = read_all(&stream, &waiting, &execs, &tag, &events).await {
                    tracing::debug!(%error, "the connection to a monitor ended");
                }
                lost_sender.send_replace(true);
                // Dropping the senders tells everybody who waits.
                lock(&waiting).clear();
                lock(&execs).clear();
                let _ = events.send((tag, Event::Lost));
            }
        });
        let mut monitor = Self {
            stream,
            writing: tokio::sync::Mutex::new(()),
            next: AtomicU64::new(1),
            waiting,
            execs,
            lost,
            reader,
            hello: monitor_v1::HelloReply::default(),
        };
        let hello = monitor_v1::Hello { protocol: monitor_v1::PROTOCOL, events: true };
        match monitor.ask(request::Body::Hello(hello), &[]).await?.0 {
            reply::Body::Hello(hello) => monitor.hello = hello,
            _ => return Err(MonitorError::Unexpected),
        }
        Ok(monitor)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// `Refused` with what the monitor said; `Lost`, `Silent`, `TooLarge`.
    pub async fn ask(&self, body: request::Body, fds: &[OwnedFd]) -> Result<Answer, MonitorError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        // The reader clears the map after it has said that it is gone.
        if *self.lost.borrow() {
            lock(&self.waiting).remove(&id);
            return Err(MonitorError::Lost);
        }
        let request = monitor_v1::Request { id, body: Some(body), fd_count: fds.len() as u32 };
        let sent = self.send(&request, fds).await;
        if let Err(error) = sent {
            lock(&self.waiting).remove(&id);
            return Err(error);
        }
        let answer = match tokio::time::timeout(ANSWER, receiver).await {
            Ok(answer) => answer.map_err(|_| MonitorError::Lost)?,
            Err(_) => {
                lock(&self.waiting).remove(&id);
                return Err(MonitorError::Silent);
            }
        };
        match answer {
            (reply::Body::Failure(f), _) => Err(MonitorError::Refused {
                stage: f.stage,
                errno: f.errno,
                detail: f.detail,
                not_found: f.not_found,
            }),
            answer => Ok(answer),
        }
    }

    /// As [`Monitor::ask`], for requests whose answer says nothing more.
    ///
    /// # Errors
    /// As [`Monitor::ask`].
    pub async fn tell(&self, body: request::Body, fds: &[OwnedFd]) -> Result<(), MonitorError> {
        match self.ask(body, fds).await?.0 {
            reply::Body::Done(_) => Ok(()),
            _ => Err(MonitorError::Unexpected),
        }
    }

    /// Whom to tell when the exec `id` ends; to be called before it is asked for.
    pub fn expect_exec(&self, id: &str) -> oneshot::Receiver<monitor_v1::Exited> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.execs).insert(id.to_owned(), sender);
        receiver
    }

    /// Forgets an exec that never began or that nobody waits for.
    pub fn forget_exec(&self, id: &str) {
        lock(&self.execs).remove(id);
    }

    async fn send(&self, request: &monitor_v1::Request, fds: &[OwnedFd]) -> Result<(), MonitorError> {
        let length = request.encoded_len();
        if length > MAX_FRAME_BYTES || fds.len() > MAX_FDS {
            return Err(MonitorError::TooLarge { bytes: length, fds: fds.len() });
        }
        let mut frame = Vec::with_capacity(4 + length);
        frame.extend_from_slice(&(length as u32).to_le_bytes());
        request.encode(&mut frame).map_err(|_| MonitorError::Unexpected)?;
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();

        let _writing = self.writing.lock().await;
        let mut sent = 0;
        while sent < frame.len() {
            let fds: &[BorrowedFd<'_>] = if sent == 0 { &borrowed } else { &[] };
            let written = self
                .stream
                .async_io(Interest::WRITABLE, || send_with_fds(&self.stream, &frame[sent..], fds))
                .await;
            match written {
                Ok(written) => sent += written,
                Err(_) => {
                    // Half a frame is worse than none: nothing after it could be understood.
                    let _ = rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Both);
                    return Err(MonitorError::Lost);
                }
            }
        }
        Ok(())
    }
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// Reads frames until the connection ends and hands each to whom it is for.
async fn read_all<T: Clone + Send>(
    stream: &UnixStream,
    waiting: &Waiting,
    execs: &Execs,
    tag: &T,
    events: &mpsc::UnboundedSender<(T, Event)>,
) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::new();
    let mut fds: VecDeque<OwnedFd> = VecDeque::new();
    loop {
        while let Some(reply) = next_frame(&mut buffer)? {
            let Some(body) = reply.body else { continue };
            match body {
                reply::Body::Exited(exited) if reply.id == 0 => {
                    if exited.exec_id.is_empty() {
                        let _ = events.send((tag.clone(), Event::Exited(exited)));
                    } else if let Some(waiter) = lock(execs).remove(&exited.exec_id) {
                        let _ = waiter.send(exited);
                    }
                }
                body => {
                    let count = (reply.fd_count as usize).min(fds.len());
                    let with: Vec<OwnedFd> = fds.drain(..count).collect();
                    if let Some(waiter) = lock(waiting).remove(&reply.id) {
                        let _ = waiter.send((body, with));
                    }
                }
            }
        }
        let mut chunk = [0u8; 16 << 10];
        let read = stream
            .async_io(Interest::READABLE, || receive(stream, &mut chunk, &mut fds))
            .await?;
        if read == 0 {
            return Ok(());
        }
        buffer.extend_from_slice(&chunk[..read]);
    }
}

fn receive(stream: &UnixStream, chunk: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(chunk)], &mut control, flags)?;
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = ancillary {
            fds.extend(received);
        }
    }
    Ok(message.bytes)
}

/// Takes one whole frame off the front of `buffer`.
fn next_frame(buffer: &mut Vec<u8>) -> io::Result<Option<monitor_v1::Reply>> {
    let Some(header) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*header) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    let reply = monitor_v1::Reply::decode(&buffer[4..4 + length]).map_err(io::Error::other)?;
    buffer.drain(..4 + length);
    Ok(Some(reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_taken_only_when_whole() {
        let reply = monitor_v1::Reply { id: 7, body: Some(reply::Body::Done(monitor_v1::Done {})), fd_count: 0 };
        let body = reply.encode_to_vec();
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        for cut in 0..frame.len() {
            assert!(next_frame(&mut frame[..cut].to_vec()).unwrap().is_none());
        }
        let mut two = [frame.clone(), frame].concat();
        assert_eq!(next_frame(&mut two).unwrap().unwrap().id, 7);
        assert_eq!(next_frame(&mut two).unwrap().unwrap().id, 7);
        assert!(two.is_empty());
    }

    #[test]
    fn a_frame_longer_than_the_bound_is_refused() {
        let mut buffer = (MAX_FRAME_BYTES as u32 + 1).to_le_bytes().to_vec();
        next_frame(&mut buffer).unwrap_err();
    }
}
