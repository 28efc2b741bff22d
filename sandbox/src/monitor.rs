//! The daemon's side of a pod's monitor: spawning it, asking it, hearing from it.
//!
//! The daemon binds the socket and hands the listening end to the monitor as
//! its standard input, so there is no moment at which the monitor runs and cannot be
//! reached, and a later daemon finds it by path. The framing and the messages
//! are described in `proto/protos/monitor_v1.proto`.

use crate::operation::lock;
use berth_proto::monitor_v1::{self, MAX_FDS, MAX_FRAME_BYTES, reply, request};
use berth_sys::mount::{self, Change, Propagation};
use berth_sys::wire::{Bounds, FrameReader, FrameWriter, Received};
use prost::Message as _;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
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
    #[error("the monitor did not answer in time")]
    Silent,
    /// The monitor tried and failed.
    #[error("{stage} {detail}{}", errno_text(*errno))]
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
    if errno == 0 {
        // The detail says all there is.
        String::new()
    } else {
        format!(": {}", io::Error::from_raw_os_error(errno))
    }
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
type Attached = Arc<Mutex<HashMap<String, oneshot::Sender<monitor_v1::Detached>>>>;

/// A connection to one pod's monitor.
pub struct Monitor {
    stream: Arc<UnixStream>,
    writing: tokio::sync::Mutex<()>,
    next: AtomicU64,
    waiting: Waiting,
    execs: Execs,
    attached: Attached,
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
        let refuse = |source| MonitorError::Spawn {
            program: path.into(),
            source,
        };
        let held = mount::clone_tree(path, false).map_err(|errno| refuse(errno.into()))?;
        let change = Change {
            set: mount::attr::RDONLY,
            propagation: Some(Propagation::Private),
            ..Change::default()
        };
        mount::set_attr(&held, change, false).map_err(|errno| refuse(errno.into()))?;
        Ok(Self {
            path: path.into(),
            held,
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A call of it: no environment, "/" as its directory. Neither a hook between
    /// fork and exec nor a shared environment: this is a posix_spawn.
    pub fn command(&self) -> std::process::Command {
        // The descriptor's number is read before it is closed on exec.
        let path = format!("/proc/self/fd/{}", self.held.as_raw_fd());
        let mut command = std::process::Command::new(path);
        command.arg0("berth-monitor").env_clear().current_dir("/");
        command
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
pub fn spawn(
    program: &Program,
    pod: &str,
    dir: &Path,
    line_bytes: u32,
) -> Result<(), MonitorError> {
    let socket = dir.join("monitor.sock");
    let listener = listen(dir).map_err(|source| MonitorError::Unreachable { socket, source })?;
    let refuse = |source| MonitorError::Spawn {
        program: program.path.clone(),
        source,
    };
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("monitor.log"))
        .map_err(refuse)?;
    let child = program
        .command()
        .args([
            "--pod",
            pod,
            "--listen-fd",
            "0",
            "--line-bytes",
            &line_bytes.to_string(),
        ])
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

/// A unix socket's path holds 108 bytes and ours may be deeper than that, so
/// both ends name it beneath its open directory.
fn listen(dir: &Path) -> io::Result<OwnedFd> {
    let _ = std::fs::remove_file(dir.join(SOCKET));
    let dir = open_dir(dir)?;
    Ok(berth_sys::fd::listen_at(&dir, SOCKET, BACKLOG, true)?)
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}

const SOCKET: &str = "monitor.sock";

/// Connections that may wait to be accepted; one daemon opens one.
const BACKLOG: i32 = 16;

impl Monitor {
    /// Connects to the monitor that listens at `dir`/monitor.sock; what it says
    /// unasked goes to `events` with `tag`.
    ///
    /// # Errors
    /// `Unreachable` when nobody listens there, `Lost` or `Silent` when it does
    /// not greet back.
    pub async fn connect<T: Clone + Send + Sync + 'static>(
        dir: &Path,
        tag: T,
        events: mpsc::UnboundedSender<(T, Event)>,
    ) -> Result<Self, MonitorError> {
        let unreachable = |source| MonitorError::Unreachable {
            socket: dir.join("monitor.sock"),
            source,
        };
        let connected = open_dir(dir).and_then(|dir| Ok(berth_sys::fd::connect_at(&dir, SOCKET)?));
        let stream = std::os::unix::net::UnixStream::from(connected.map_err(unreachable)?);
        stream.set_nonblocking(true).map_err(unreachable)?;
        let stream = UnixStream::from_std(stream).map_err(unreachable)?;
        let stream = Arc::new(stream);
        let waiting = Waiting::default();
        let execs = Execs::default();
        let attached = Attached::default();
        let (lost_sender, lost) = watch::channel(false);
        let reader = tokio::spawn({
            let stream = stream.clone();
            let hearers = Hearers {
                waiting: waiting.clone(),
                execs: execs.clone(),
                attached: attached.clone(),
            };
            async move {
                if let Err(error) = read_all(&stream, &hearers, &tag, &events).await {
                    tracing::debug!(%error, "the connection to a monitor ended");
                }
                lost_sender.send_replace(true);
                // Dropping the senders tells everybody who waits.
                lock(&hearers.waiting).clear();
                lock(&hearers.execs).clear();
                lock(&hearers.attached).clear();
                let _ = events.send((tag, Event::Lost));
            }
        });
        let mut monitor = Self {
            stream,
            writing: tokio::sync::Mutex::new(()),
            next: AtomicU64::new(1),
            waiting,
            execs,
            attached,
            lost,
            reader,
            hello: monitor_v1::HelloReply::default(),
        };
        let hello = monitor_v1::Hello {
            protocol: monitor_v1::PROTOCOL,
            events: true,
        };
        match monitor
            .ask(request::Body::Hello(hello), Vec::new())
            .await?
            .0
        {
            reply::Body::Hello(hello) => monitor.hello = hello,
            _ => return Err(MonitorError::Unexpected),
        }
        Ok(monitor)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// `Refused` with what the monitor said; `Lost`, `Silent`, `TooLarge`.
    pub async fn ask(
        &self,
        body: request::Body,
        fds: Vec<OwnedFd>,
    ) -> Result<Answer, MonitorError> {
        self.ask_within(body, fds, Duration::ZERO).await
    }

    /// As [`Monitor::ask`], for what may take `longer` than an answer does.
    ///
    /// # Errors
    /// As [`Monitor::ask`].
    pub async fn ask_within(
        &self,
        body: request::Body,
        fds: Vec<OwnedFd>,
        longer: Duration,
    ) -> Result<Answer, MonitorError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        // The reader clears the map after it has said that it is gone.
        if *self.lost.borrow() {
            lock(&self.waiting).remove(&id);
            return Err(MonitorError::Lost);
        }
        let request = monitor_v1::Request {
            id,
            body: Some(body),
        };
        let sent = self.send(&request, fds).await;
        if let Err(error) = sent {
            lock(&self.waiting).remove(&id);
            return Err(error);
        }
        let answer = match tokio::time::timeout(ANSWER.saturating_add(longer), receiver).await {
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
    pub async fn tell(&self, body: request::Body, fds: Vec<OwnedFd>) -> Result<(), MonitorError> {
        match self.ask(body, fds).await?.0 {
            reply::Body::Done(_) => Ok(()),
            _ => Err(MonitorError::Unexpected),
        }
    }

    /// Whether the connection has ended.
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Waits until the connection has ended, which it does with the monitor.
    pub async fn ended(&self) {
        let mut lost = self.lost.clone();
        // An error means that the reader is gone, and the connection with it.
        let _ = lost.wait_for(|lost| *lost).await;
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

    /// Whom to tell when the attached client `id` is detached; to be called
    /// before it is asked for.
    pub fn expect_attach(&self, id: &str) -> oneshot::Receiver<monitor_v1::Detached> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.attached).insert(id.to_owned(), sender);
        receiver
    }

    /// Forgets a client that never was attached.
    pub fn forget_attach(&self, id: &str) {
        lock(&self.attached).remove(id);
    }

    async fn send(
        &self,
        request: &monitor_v1::Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(), MonitorError> {
        let body = request.encode_to_vec();
        if body.len() > MAX_FRAME_BYTES || fds.len() > MAX_FDS {
            return Err(MonitorError::TooLarge {
                bytes: body.len(),
                fds: fds.len(),
            });
        }
        let mut writer = FrameWriter::new();
        if writer.push(&body, fds).is_err() {
            return Err(MonitorError::TooLarge {
                bytes: body.len(),
                fds: 0,
            });
        }
        let _writing = self.writing.lock().await;
        let flush = || match writer.flush(&*self.stream) {
            Ok(true) => Ok(()),
            Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(io::Error::other(error)),
        };
        if self
            .stream
            .async_io(Interest::WRITABLE, flush)
            .await
            .is_err()
        {
            // Half a frame is worse than none: nothing after it could be understood.
            let _ = rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Both);
            return Err(MonitorError::Lost);
        }
        Ok(())
    }
}

/// Who waits for what the monitor says.
struct Hearers {
    waiting: Waiting,
    execs: Execs,
    attached: Attached,
}

/// Reads frames until the connection ends and hands each to whom it is for.
async fn read_all<T: Clone + Send + Sync>(
    stream: &UnixStream,
    hearers: &Hearers,
    tag: &T,
    events: &mpsc::UnboundedSender<(T, Event)>,
) -> io::Result<()> {
    let mut reader = FrameReader::new(Bounds {
        frame_bytes: MAX_FRAME_BYTES,
        fds: MAX_FDS,
    });
    loop {
        let read = || match reader.read(stream) {
            Ok(Received::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Ok(received) => Ok(received),
            Err(error) => Err(io::Error::other(error)),
        };
        let frame = match stream.async_io(Interest::READABLE, read).await? {
            Received::Frame(frame) => frame,
            Received::Closed | Received::WouldBlock => return Ok(()),
        };
        let reply = monitor_v1::Reply::decode(&*frame.bytes).map_err(io::Error::other)?;
        match reply.body {
            Some(reply::Body::Exited(exited)) if reply.id == 0 => {
                if exited.exec_id.is_empty() {
                    let _ = events.send((tag.clone(), Event::Exited(exited)));
                } else if let Some(waiter) = lock(&hearers.execs).remove(&exited.exec_id) {
                    let _ = waiter.send(exited);
                }
            }
            Some(reply::Body::Detached(detached)) if reply.id == 0 => {
                if let Some(waiter) = lock(&hearers.attached).remove(&detached.attach_id) {
                    let _ = waiter.send(detached);
                }
            }
            Some(body) => {
                if let Some(waiter) = lock(&hearers.waiting).remove(&reply.id) {
                    let _ = waiter.send((body, frame.fds));
                }
            }
            // An event of a later version.
            None => {}
        }
    }
}
