//! The waiting loop and everything the monitor knows.
//!
//! ```text
//! container: Starting ── execve ──> Running ── init ends ──> [Sweeping] ─> Draining ─> Recording ─> Ended
//!                └── failed: gone                                                               └─ Forget: gone
//! exec:      Starting ── execve ──> running ── ends: Exited to the asker, gone
//! ```
//!
//! One thread, one epoll; nothing here waits for anything else. What could
//! hang is a child's: namespaces, mounts, log files, cgroup sweeps, records.
//! Each step after a container's end has a deadline, so that its exit is told
//! even if a disk hangs.
//!
//! Nothing here survives this process but the exit records; a daemon tells by
//! its pidfd that the monitor is gone.

use crate::exec::Exec;
use crate::init::{Init, PodNamespaces};
use crate::log::{self, Logger};
use crate::namespaces::{self, Made};
use crate::status::{self, Failed, Heard, Note, Step};
use crate::wire::{Connection, Dropped, Incoming};
use crate::{Options, line::Stream, reaper};
use berth_proto::monitor_v1 as proto;
use berth_store::exit::ExitRecord;
use berth_sys::clone::{self, Forked, flag};
use berth_sys::namespace::{self, Kind};
use berth_sys::pidfd::Ended;
use berth_sys::wire::{Bounds, FrameReader, Received};
use berth_sys::{Errno, pidfd, process};
use proto::reply::Body as ReplyBody;
use proto::request::Body;
use rustix::event::{Timespec, epoll};
use rustix::fs::{Mode, OFlags};
use rustix::net::SocketFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Clients at a time: a daemon, its predecessor, and some tools.
const MAX_CONNECTIONS: usize = 64;

/// How long it waits before it looks for clients again when there are too many
/// or too few descriptors.
const CROWDED: Duration = Duration::from_millis(200);

/// Containers at a time, ended ones that nobody forgot included.
const MAX_CONTAINERS: usize = 1024;

/// Execs at a time. Each costs a process of the node.
const MAX_EXECS: usize = 1024;

/// Requests taken from one client before others have their turn.
const REQUESTS_PER_TURN: usize = 16;

/// Longest wait for a sweep, beyond its own deadline.
const SWEEP: Duration = Duration::from_secs(12);

/// Longest wait for the logger: its own deadline, and a hung disk's grace.
const DRAIN: Duration = log::DRAIN.saturating_add(Duration::from_millis(500));

/// Longest wait for a record to be durable.
const RECORD: Duration = Duration::from_secs(30);

/// Longest time replies are still delivered after Shutdown.
const GOODBYE: Duration = Duration::from_secs(1);

/// Who asked for something: which connection, which of its requests.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Asker {
    connection: u64,
    request: u64,
}

/// What a ready descriptor stands for.
#[derive(Clone, PartialEq, Eq)]
enum Source {
    Listener,
    Signals,
    Connection,
    /// The maker of the namespaces.
    Maker,
    /// A container's child, before it is its program.
    Init(String),
    /// A container's logger.
    Logger(String),
    /// An exec's child, before it is its program.
    Exec(u64),
}

/// A child on its way to execve.
struct Starting {
    status: OwnedFd,
    token: u64,
    asker: Asker,
    ready: bool,
    failed: Option<Failed>,
    /// What the logger says; it knows better than init why there is no log.
    log_failed: Option<Failed>,
}

/// A container's logger.
struct LoggerProcess {
    control: OwnedFd,
    token: u64,
    reopens: Vec<Asker>,
}

/// Where a container stands.
enum Phase {
    Starting(Starting),
    Running,
    Sweeping {
        sweeper: i32,
        end: End,
        until: Instant,
    },
    Draining {
        end: End,
        until: Instant,
    },
    Recording {
        recorder: i32,
        end: End,
        until: Instant,
    },
    Ended(proto::Exited),
}

/// How and when a container ended.
#[derive(Clone, Copy)]
struct End {
    ended: Ended,
    finished_at: i64,
    oom_kills: u64,
}

struct Container {
    /// 0 once it is reaped.
    pid: i32,
    pidfd: OwnedFd,
    start_ticks: u64,
    started_at: i64,
    phase: Phase,
    logger: Option<LoggerProcess>,
    console: Option<OwnedFd>,
    /// Kept open so that the container does not read an end it was not sent.
    _stdin: Option<OwnedFd>,
    join_user: bool,
    /// Others' processes may be in its PID namespace.
    shares_pid: bool,
    cgroup: proto::Cgroup,
    oom_before: u64,
    exit_record: String,
}

struct ExecProcess {
    container_id: String,
    exec_id: String,
    pid: i32,
    pidfd: Option<OwnedFd>,
    start_ticks: u64,
    starting: Option<Starting>,
    console: Option<OwnedFd>,
    connection: u64,
}

/// The maker of the namespaces, while it works.
struct Making {
    socket: OwnedFd,
    reader: FrameReader,
    asker: Asker,
    token: u64,
}

struct Monitor {
    options: Options,
    epoll: OwnedFd,
    listener: OwnedFd,
    listener_token: u64,
    /// When to look for clients again, while there are too many.
    accept_again: Option<Instant>,
    signals: OwnedFd,
    /// This process's own PID namespace, to come back to.
    own_pid: OwnedFd,
    /// Going back failed; nothing is cloned until it has worked.
    pid_astray: bool,
    next_token: u64,
    sources: BTreeMap<u64, Source>,
    connections: BTreeMap<u64, Connection>,
    containers: BTreeMap<String, Container>,
    execs: BTreeMap<u64, ExecProcess>,
    pod: PodNamespaces,
    pod_init: Option<(i32, OwnedFd)>,
    making: Option<Making>,
    namespaces_made: bool,
    ending: Option<Instant>,
}

/// Runs until it is told to end.
///
/// # Errors
/// A step without which there is no monitor.
pub fn run(options: Options) -> Result<(), Failed> {
    let mut monitor = Monitor::new(options)?;
    while !monitor.is_over() {
        monitor.turn()?;
    }
    if let Some((_, pidfd)) = &monitor.pod_init {
        let _ = pidfd::send_signal(pidfd, libc::SIGKILL);
    }
    Ok(())
}

impl Monitor {
    fn new(options: Options) -> Result<Monitor, Failed> {
        // 0 to 2 are open, so no descriptor of ours ever is one of them.
        let null = open_null()?;
        let listener = berth_sys::fd::inherited(options.listen_fd)
            .step("take the listening socket", options.listen_fd.to_string())?;
        for number in 0..=2 {
            let is_socket = number == options.listen_fd;
            if is_socket || rustix::io::fcntl_getfd(stdio(number)).is_err() {
                berth_sys::fd::install_stdio(&null, number).step("open", "/dev/null")?;
            }
        }
        berth_sys::fd::close_on_exec_from(3).step("close_range", "")?;
        rustix::io::ioctl_fionbio(&listener, true).step("make the socket non-blocking", "")?;

        // Fails where it is a group's leader, which is as good.
        let _ = rustix::process::setsid();
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .step("become subreaper", "")?;
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .step("become undumpable", "")?;
        let this = crate::beneath::proc_dir("/proc/self").step("open", "/proc/self")?;
        // Only with CAP_SYS_RESOURCE; without, it is as killable as its parent.
        let _ = crate::become_program::write_at(&this, "oom_score_adj", b"-999");
        process::ignore_signal(libc::SIGPIPE);
        let signals = process::signal_fd(&[
            libc::SIGCHLD,
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGUSR1,
            libc::SIGUSR2,
        ])
        .step("signalfd", "")?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).step("epoll_create", "")?;
        let own_pid = namespace::open(0, Kind::Pid).step("open namespace", "pid")?;
        let mut monitor = Monitor {
            options,
            epoll,
            listener,
            listener_token: 0,
            accept_again: None,
            signals,
            own_pid,
            pid_astray: false,
            next_token: 1,
            sources: BTreeMap::new(),
            connections: BTreeMap::new(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            pod: PodNamespaces::default(),
            pod_init: None,
            making: None,
            namespaces_made: false,
            ending: None,
        };
        let token = monitor.token(Source::Listener);
        monitor.listener_token = token;
        watch(&monitor.epoll, &monitor.listener, token).step("epoll_ctl", "listener")?;
        let token = monitor.token(Source::Signals);
        watch(&monitor.epoll, &monitor.signals, token).step("epoll_ctl", "signals")?;
        Ok(monitor)
    }

    fn token(&mut self, source: Source) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.sources.insert(token, source);
        token
    }

    fn is_over(&self) -> bool {
        let Some(until) = self.ending else {
            return false;
        };
        !self.connections.values().any(Connection::is_waiting) || Instant::now() >= until
    }

    /// Waits once and deals with what is ready.
    fn turn(&mut self) -> Result<(), Failed> {
        let timeout = self.next_deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut ready = Vec::with_capacity(16);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut ready),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failed::new("epoll_wait", "", error)),
        }
        for event in ready {
            let token = event.data.u64();
            // One that went away in the same turn is not there any more.
            let Some(source) = self.sources.get(&token).cloned() else {
                continue;
            };
            match source {
                Source::Listener => self.accept(),
                Source::Signals => self.reap(),
                Source::Connection => self.serve(token),
                Source::Maker => self.hear_maker(),
                Source::Init(id) => self.hear_init(&id),
                Source::Logger(id) => self.hear_logger(&id),
                Source::Exec(key) => self.hear_exec(key),
            }
        }
        self.check_deadlines();
        Ok(())
    }

    fn next_deadline(&self) -> Option<Instant> {
        let phases = self
            .containers
            .values()
            .filter_map(|container| match container.phase {
                Phase::Sweeping { until, .. }
                | Phase::Draining { until, .. }
                | Phase::Recording { until, .. } => Some(until),
                Phase::Starting(_) | Phase::Running | Phase::Ended(_) => None,
            });
        phases.chain(self.ending).chain(self.accept_again).min()
    }

    // ---- connections

    fn accept(&mut self) {
        loop {
            if self.connections.len() >= MAX_CONNECTIONS {
                return self.pause_accepting();
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return,
                // No descriptors or memory: not to be asked again at once.
                Err(_) => return self.pause_accepting(),
            };
            let own = rustix::process::geteuid();
            let trusted = rustix::net::sockopt::socket_peercred(&socket)
                .is_ok_and(|peer| peer.uid.is_root() || peer.uid == own);
            if !trusted || self.ending.is_some() {
                continue;
            }
            let token = self.token(Source::Connection);
            if watch(&self.epoll, &socket, token).is_err() {
                self.sources.remove(&token);
                continue;
            }
            self.connections.insert(token, Connection::new(socket));
        }
    }

    /// Leaves further clients waiting in the kernel's queue for a while.
    fn pause_accepting(&mut self) {
        let data = epoll::EventData::new_u64(self.listener_token);
        let _ = epoll::modify(
            &self.epoll,
            &self.listener,
            data,
            epoll::EventFlags::empty(),
        );
        self.accept_again = Some(Instant::now() + CROWDED);
    }

    fn go_on_accepting(&mut self) {
        if self.accept_again.take().is_some() {
            let data = epoll::EventData::new_u64(self.listener_token);
            let _ = epoll::modify(&self.epoll, &self.listener, data, epoll::EventFlags::IN);
        }
    }

    fn serve(&mut self, token: u64) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(connection) = self.connections.get_mut(&token) else {
                return;
            };
            let next = connection.flush().and_then(|()| connection.next());
            match next {
                Ok(Some(incoming)) => self.handle(token, incoming),
                Ok(None) => break,
                Err(why) => {
                    if !matches!(why, Dropped::Closed) {
                        complain("connection", &why);
                    }
                    self.drop_connection(token);
                    return;
                }
            }
        }
        self.rewatch(token);
    }

    /// Waits for room only while replies wait for it.
    fn rewatch(&mut self, token: u64) {
        let Some(connection) = self.connections.get(&token) else {
            return;
        };
        let mut flags = epoll::EventFlags::IN;
        flags.set(epoll::EventFlags::OUT, connection.is_waiting());
        let data = epoll::EventData::new_u64(token);
        let _ = epoll::modify(&self.epoll, connection.socket(), data, flags);
    }

    /// Forgets a client. Its execs end with it: nobody would take their output.
    fn drop_connection(&mut self, token: u64) {
        self.sources.remove(&token);
        self.connections.remove(&token);
        self.go_on_accepting();
        for exec in self.execs.values().filter(|exec| exec.connection == token) {
            exec.kill(libc::SIGKILL);
        }
    }

    fn reply(&mut self, asker: Asker, body: ReplyBody, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&asker.connection) else {
            return;
        };
        let reply = proto::Reply {
            id: asker.request,
            body: Some(body),
        };
        match connection.send(&reply, fds) {
            Ok(()) => self.rewatch(asker.connection),
            Err(why) => {
                complain("reply", &why);
                self.drop_connection(asker.connection);
            }
        }
    }

    fn fail(&mut self, asker: Asker, failed: Failed) {
        self.reply(asker, ReplyBody::Failure(failed.into_proto()), Vec::new());
    }

    fn handle(&mut self, connection: u64, incoming: Incoming) {
        let Incoming { request, fds } = incoming;
        let asker = Asker {
            connection,
            request: request.id,
        };
        let done = match request.body {
            Some(Body::Hello(hello)) => {
                if let Some(connection) = self.connections.get_mut(&connection) {
                    connection.events = hello.events;
                }
                let hello = proto::HelloReply {
                    protocol: proto::PROTOCOL,
                    features: proto::feature::BASE,
                    pod_id: self.options.pod.clone(),
                    pid: std::process::id() as i32,
                    version: env!("CARGO_PKG_VERSION").into(),
                };
                self.reply(asker, ReplyBody::Hello(hello), Vec::new());
                return;
            }
            Some(Body::Inspect(_)) => {
                let state = self.state();
                self.reply(asker, ReplyBody::State(state), Vec::new());
                return;
            }
            Some(Body::MakeNamespaces(request)) => self.make_namespaces(asker, request),
            Some(Body::Launch(launch)) => self.launch(asker, launch, fds),
            Some(Body::Exec(exec)) => self.exec(asker, exec, fds),
            Some(Body::ReopenLog(request)) => self.reopen_log(asker, &request.container_id),
            Some(Body::Attach(attach)) => {
                Err(Failed::new("attach", attach.container_id, Errno::NOSYS).into())
            }
            Some(Body::Signal(signal)) => self.signal(&signal).map(Some),
            Some(Body::ResizeTty(resize)) => self.resize(&resize).map(Some),
            Some(Body::Forget(forget)) => self.forget(&forget.container_id).map(Some),
            Some(Body::Shutdown(_)) => self.shutdown().map(Some),
            None => Err(Refused::Failed(Failed::new(
                "request",
                "unknown",
                Errno::NOSYS,
            ))),
        };
        match done {
            Ok(None) => {}
            Ok(Some(())) => self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new()),
            Err(Refused::Failed(failed)) => self.fail(asker, failed),
            Err(Refused::NotFound(what)) => {
                let failure = proto::Failure {
                    stage: "find".into(),
                    errno: Errno::NOENT.raw_os_error(),
                    detail: what,
                    not_found: true,
                };
                self.reply(asker, ReplyBody::Failure(failure), Vec::new());
            }
        }
    }

    fn state(&self) -> proto::State {
        let containers = self
            .containers
            .iter()
            .map(|(id, container)| proto::ContainerState {
                container_id: id.clone(),
                pid: container.pid,
                start_ticks: container.start_ticks,
                started_at: container.started_at,
                exited: match &container.phase {
                    Phase::Ended(exited) => Some(exited.clone()),
                    _ => None,
                },
                log: None,
            });
        proto::State {
            containers: containers.collect(),
            namespaces_made: self.namespaces_made,
        }
    }

    // ---- namespaces

    fn make_namespaces(&mut self, asker: Asker, request: proto::MakeNamespaces) -> Answer {
        if self.namespaces_made || self.making.is_some() {
            return Err(Failed::new("make namespaces", "they are made", Errno::EXIST).into());
        }
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .step("socketpair", "")?;
        match clone::fork(clone::Options::default()).step("clone", "maker")? {
            Forked::Child => process::child(vec![theirs.as_raw_fd()], || {
                namespaces::maker(&request, theirs.as_fd())
            }),
            Forked::Parent { .. } => {}
        }
        rustix::io::ioctl_fionbio(&ours, true).step("make the socket non-blocking", "")?;
        let token = self.token(Source::Maker);
        watch(&self.epoll, &ours, token).step("epoll_ctl", "maker")?;
        // A pidns, netns, ipc, uts, user: never more.
        let reader = FrameReader::new(Bounds {
            frame_bytes: 8 << 10,
            fds: 8,
        });
        self.making = Some(Making {
            socket: ours,
            reader,
            asker,
            token,
        });
        Ok(None)
    }

    fn hear_maker(&mut self) {
        let Some(making) = &mut self.making else {
            return;
        };
        let made = match making.reader.read(&making.socket) {
            Ok(Received::WouldBlock) => return,
            Ok(Received::Frame(frame)) => Made::decode(&frame.bytes).map(|made| (made, frame.fds)),
            Ok(Received::Closed) | Err(_) => Err(Failed::new(
                "make namespaces",
                "the maker died",
                Errno::CHILD,
            )),
        };
        let asker = making.asker;
        let token = making.token;
        self.making = None;
        self.sources.remove(&token);
        match made.and_then(|(made, fds)| self.keep_namespaces(made, fds)) {
            Ok(()) => self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new()),
            Err(failed) => self.fail(asker, failed),
        }
    }

    fn keep_namespaces(&mut self, made: Made, fds: Vec<OwnedFd>) -> Result<(), Failed> {
        let mut pod = PodNamespaces::default();
        for (kind, fd) in made.kinds.iter().zip(fds) {
            match kind {
                Kind::User => pod.user = Some(fd),
                Kind::Net => pod.net = Some(fd),
                Kind::Ipc => pod.ipc = Some(fd),
                Kind::Uts => pod.uts = Some(fd),
                Kind::Pid => pod.pid = Some(fd),
            }
        }
        if made.init != 0 {
            // A child that is not reaped, so the pid is still its own.
            let pidfd = pidfd::open(made.init).step("pidfd_open", "pod init")?;
            pod.pid = Some(namespace::open(made.init, Kind::Pid).step("open namespace", "pid")?);
            self.pod_init = Some((made.init, pidfd));
        }
        self.pod = pod;
        self.namespaces_made = true;
        Ok(())
    }

    // ---- launch

    fn launch(&mut self, asker: Asker, launch: proto::Launch, fds: Vec<OwnedFd>) -> Answer {
        let id = launch.container_id.clone();
        if id.is_empty() {
            return Err(Failed::invalid("launch", "no container ID").into());
        }
        if self.containers.contains_key(&id) {
            return Err(Failed::new("launch", id, Errno::EXIST).into());
        }
        if self.containers.len() >= MAX_CONTAINERS || self.ending.is_some() {
            return Err(Failed::new("launch", id, Errno::AGAIN).into());
        }
        let target = match launch.target_container_id.as_str() {
            "" => None,
            target => {
                let container = self.running(target)?;
                Some(
                    container
                        .pidfd
                        .try_clone()
                        .map_err(|_| Failed::invalid("dup", target))?,
                )
            }
        };
        let sharing = [launch.new_pid, launch.join_pid, target.is_some()];
        if sharing.into_iter().filter(|&one| one).count() > 1 {
            return Err(Failed::invalid("launch", "more than one PID namespace").into());
        }
        self.return_home()?;

        let tty = launch.process.as_ref().is_some_and(|process| process.tty);
        let cloexec = PipeFlags::CLOEXEC;
        let mut streams = Streams::default();
        let mut logger = None;
        let mut gate = None;
        if !launch.log_path.is_empty() {
            let mut sources = Vec::new();
            if !tty {
                for stream in [Stream::Stdout, Stream::Stderr] {
                    let (read, write) = pipe_with(cloexec).step("pipe", "log")?;
                    // Only this end: the container's is another description.
                    rustix::io::ioctl_fionbio(&read, true).step("pipe", "log")?;
                    sources.push((stream, read));
                    match stream {
                        Stream::Stdout => streams.stdout = Some(write),
                        Stream::Stderr => streams.stderr = Some(write),
                    }
                }
            }
            let (gate_read, gate_write) = pipe_with(cloexec).step("pipe", "gate")?;
            logger = Some(self.start_logger(&launch, sources, gate_write)?);
            gate = Some(gate_read);
        }
        if launch.stdin && !tty {
            let (read, write) = pipe_with(cloexec).step("pipe", "stdin")?;
            streams.stdin = Some(read);
            streams.stdin_kept = Some(write);
        }
        let oom_before = launch
            .cgroup
            .as_ref()
            .map_or(0, |cgroup| reaper::oom_kills(&cgroup.oom_file));

        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let init = Init {
            launch: &launch,
            fds: &fds,
            pod: &self.pod,
            status: &theirs,
            gate: gate.as_ref(),
            streams: [
                streams.stdin.as_ref(),
                streams.stdout.as_ref(),
                streams.stderr.as_ref(),
            ],
        };
        let (pid, pidfd) =
            match fork_init(&init, target.as_ref(), &self.own_pid, &mut self.pid_astray) {
                Ok(child) => child,
                Err(failed) => {
                    // The logger ends by itself: nobody holds its streams or control.
                    return Err(failed.into());
                }
            };
        drop(theirs);

        let token = self.token(Source::Init(id.clone()));
        if let Err(error) = watch(&self.epoll, &ours, token) {
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            self.sources.remove(&token);
            return Err(Failed::new("epoll_ctl", id, error).into());
        }
        let logger = logger.map(|control| {
            let token = self.token(Source::Logger(id.clone()));
            // Without, an answer is only heard when the logger ends.
            let _ = watch(&self.epoll, &control, token);
            LoggerProcess {
                control,
                token,
                reopens: Vec::new(),
            }
        });
        let container = Container {
            pid,
            pidfd,
            start_ticks: reaper::start_ticks(pid),
            started_at: 0,
            phase: Phase::Starting(Starting {
                status: ours,
                token,
                asker,
                ready: false,
                failed: None,
                log_failed: None,
            }),
            logger,
            console: None,
            _stdin: streams.stdin_kept.take(),
            join_user: launch.join_user,
            shares_pid: !launch.new_pid,
            cgroup: launch.cgroup.clone().unwrap_or_default(),
            oom_before,
            exit_record: launch.exit_record.clone(),
        };
        self.containers.insert(id, container);
        Ok(None)
    }

    fn start_logger(
        &self,
        launch: &proto::Launch,
        sources: Vec<(Stream, OwnedFd)>,
        gate: OwnedFd,
    ) -> Result<OwnedFd, Failed> {
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        match clone::fork(clone::Options::default()).step("clone", "logger")? {
            Forked::Child => {
                let mut keep = vec![theirs.as_raw_fd(), gate.as_raw_fd()];
                keep.extend(sources.iter().map(|(_, fd)| fd.as_raw_fd()));
                let line_bytes = match launch.log_line_bytes {
                    0 => self.options.line_bytes,
                    bytes => (bytes as usize).min(log::MAX_LINE_BYTES),
                };
                let path = launch.log_path.clone();
                process::child(keep, move || {
                    let _ = rustix::thread::set_name(c"berth-log");
                    Logger {
                        path,
                        line_bytes,
                        control: theirs,
                        gate,
                        streams: sources,
                    }
                    .run()
                })
            }
            Forked::Parent { .. } => Ok(ours),
        }
    }

    fn return_home(&mut self) -> Result<(), Failed> {
        go_home(&self.own_pid, &mut self.pid_astray, false);
        if self.pid_astray {
            return Err(Failed::new(
                "join namespace",
                "the monitor's own pid",
                Errno::PERM,
            ));
        }
        Ok(())
    }

    fn hear_init(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Phase::Starting(starting) = &mut container.phase else {
            return;
        };
        if !hear_start(starting, &mut container.console) {
            return;
        }
        let token = starting.token;
        let asker = starting.asker;
        if let Some(failed) = starting.failed.take().or_else(|| starting.died()) {
            let failed = starting.log_failed.take().unwrap_or(failed);
            self.sources.remove(&token);
            self.fail_launch(id, asker, failed);
            return;
        }
        container.phase = Phase::Running;
        container.started_at = now();
        self.sources.remove(&token);
        let started = proto::Started {
            pid: container.pid,
            start_ticks: container.start_ticks,
            started_at: container.started_at,
        };
        if let (Some(console), Some(logger)) = (&container.console, &container.logger)
            && let Ok(copy) = console.try_clone()
        {
            let _ = status::send(&logger.control, &Note::Console(copy));
        }
        let fds = container.pidfd.try_clone().into_iter().collect();
        self.reply(asker, ReplyBody::Started(started), fds);
    }

    /// Takes a container that never ran away again.
    fn fail_launch(&mut self, id: &str, asker: Asker, mut failed: Failed) {
        if let Some(container) = self.containers.remove(id) {
            let _ = pidfd::send_signal(&container.pidfd, libc::SIGKILL);
            if let Some(logger) = container.logger {
                self.sources.remove(&logger.token);
                // What it said has been heard, or is still in the socket.
                while let Heard::Note(note) = status::receive(&logger.control) {
                    if let Note::Failed(why) = note {
                        failed = why;
                    }
                }
            }
        }
        self.fail(asker, failed);
    }

    // ---- exec

    fn exec(&mut self, asker: Asker, exec: proto::Exec, fds: Vec<OwnedFd>) -> Answer {
        if exec.exec_id.is_empty() {
            return Err(Failed::invalid("exec", "no exec ID").into());
        }
        if self.find_exec(&exec.container_id, &exec.exec_id).is_some() {
            return Err(Failed::new("exec", exec.exec_id, Errno::EXIST).into());
        }
        if self.execs.len() >= MAX_EXECS || self.ending.is_some() {
            return Err(Failed::new("exec", exec.exec_id, Errno::AGAIN).into());
        }
        self.return_home()?;
        let container = self.running(&exec.container_id)?;
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let work = Exec {
            exec: &exec,
            fds: &fds,
            init: &container.pidfd,
            join_user: container.join_user,
            status: &theirs,
        };
        let cgroup = open_cgroup(exec.cgroup.as_ref())?;
        let options = clone::Options {
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            ..Default::default()
        };
        namespace::join_process(&container.pidfd, flag::NEWPID)
            .step("join namespace", &exec.container_id)?;
        let forked = clone::fork(options);
        if let Ok(Forked::Child) = forked {
            process::child(work.keep(), || work.run());
        }
        go_home(&self.own_pid, &mut self.pid_astray, true);
        let (pid, pidfd) = match forked.step("clone", &exec.exec_id)? {
            Forked::Parent { pid, pidfd } => (pid, pidfd),
            Forked::Child => process::exit(255),
        };
        drop(theirs);
        let key = self.next_token;
        let token = self.token(Source::Exec(key));
        if let Err(error) = watch(&self.epoll, &ours, token) {
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            self.sources.remove(&token);
            return Err(Failed::new("epoll_ctl", exec.exec_id, error).into());
        }
        self.execs.insert(
            key,
            ExecProcess {
                container_id: exec.container_id,
                exec_id: exec.exec_id,
                pid,
                pidfd: Some(pidfd),
                start_ticks: reaper::start_ticks(pid),
                starting: Some(Starting {
                    status: ours,
                    token,
                    asker,
                    ready: false,
                    failed: None,
                    log_failed: None,
                }),
                console: None,
                connection: asker.connection,
            },
        );
        Ok(None)
    }

    fn hear_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get_mut(&key) else {
            return;
        };
        let Some(starting) = &mut exec.starting else {
            return;
        };
        if !hear_start(starting, &mut exec.console) {
            return;
        }
        let asker = starting.asker;
        let token = starting.token;
        let failed = starting.failed.take().or_else(|| starting.died());
        exec.starting = None;
        self.sources.remove(&token);
        if let Some(failed) = failed {
            exec.kill(libc::SIGKILL);
            self.execs.remove(&key);
            self.fail(asker, failed);
            return;
        }
        let started = proto::Started {
            pid: exec.pid,
            start_ticks: exec.start_ticks,
            started_at: now(),
        };
        let console = exec
            .console
            .as_ref()
            .and_then(|console| console.try_clone().ok());
        let pidfd = exec.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok());
        self.reply(
            asker,
            ReplyBody::Started(started),
            console.into_iter().chain(pidfd).collect(),
        );
        // A client that went away before its exec had started.
        if !self.connections.contains_key(&asker.connection)
            && let Some(exec) = self.execs.get(&key)
        {
            exec.kill(libc::SIGKILL);
        }
    }

    fn find_exec(&self, container_id: &str, exec_id: &str) -> Option<&ExecProcess> {
        self.execs
            .values()
            .find(|exec| exec.container_id == container_id && exec.exec_id == exec_id)
    }

    // ---- small requests

    fn running(&self, id: &str) -> Result<&Container, Refused> {
        match self.containers.get(id) {
            None => Err(Refused::NotFound(id.into())),
            Some(container) if matches!(container.phase, Phase::Running) => Ok(container),
            Some(_) => Err(Failed::new("container is not running", id, Errno::SRCH).into()),
        }
    }

    fn signal(&self, request: &proto::Signal) -> Result<(), Refused> {
        let detail = format!("{} {}", request.container_id, request.exec_id);
        if !request.exec_id.is_empty() {
            let exec = self
                .find_exec(&request.container_id, &request.exec_id)
                .ok_or_else(|| Refused::NotFound(detail.clone()))?;
            return Ok(exec.signal(request.signal).step("signal", detail)?);
        }
        let container = self
            .containers
            .get(&request.container_id)
            .ok_or_else(|| Refused::NotFound(detail.clone()))?;
        Ok(pidfd::send_signal(&container.pidfd, request.signal).step("signal", detail)?)
    }

    fn resize(&self, request: &proto::ResizeTty) -> Result<(), Refused> {
        let id = &request.container_id;
        let console = if request.exec_id.is_empty() {
            let container = self
                .containers
                .get(id)
                .ok_or_else(|| Refused::NotFound(id.clone()))?;
            container.console.as_ref()
        } else {
            let exec = self
                .find_exec(id, &request.exec_id)
                .ok_or_else(|| Refused::NotFound(request.exec_id.clone()))?;
            exec.console.as_ref()
        };
        let console = console.ok_or_else(|| Failed::new("resize", id, Errno::NOTTY))?;
        let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        berth_sys::pty::resize(console, size(request.width), size(request.height))
            .step("resize", id)?;
        Ok(())
    }

    fn reopen_log(&mut self, asker: Asker, id: &str) -> Answer {
        let container = self
            .containers
            .get_mut(id)
            .ok_or_else(|| Refused::NotFound(id.to_owned()))?;
        let Some(logger) = &mut container.logger else {
            return Err(Failed::new("reopen log", id, Errno::SRCH).into());
        };
        status::send(&logger.control, &Note::Reopen).step("reopen log", id)?;
        logger.reopens.push(asker);
        Ok(None)
    }

    fn forget(&mut self, id: &str) -> Result<(), Refused> {
        let container = self
            .containers
            .get(id)
            .ok_or_else(|| Refused::NotFound(id.to_owned()))?;
        if !matches!(container.phase, Phase::Ended(_)) {
            return Err(Failed::new("forget", id, Errno::BUSY).into());
        }
        self.containers.remove(id);
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), Refused> {
        let busy = self
            .containers
            .iter()
            .find(|(_, container)| !matches!(container.phase, Phase::Ended(_)));
        if let Some((id, _)) = busy {
            return Err(Failed::new("shutdown", id, Errno::BUSY).into());
        }
        if self.making.is_some() {
            return Err(Failed::new("shutdown", "namespaces are being made", Errno::BUSY).into());
        }
        self.ending = Some(Instant::now() + GOODBYE);
        Ok(())
    }

    // ---- what happens by itself

    fn hear_logger(&mut self, id: &str) {
        loop {
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            let Some(logger) = &mut container.logger else {
                return;
            };
            let heard = status::receive(&logger.control);
            let (asker, outcome) = match heard {
                Heard::Nothing => return,
                Heard::End => {
                    self.lose_logger(id);
                    return;
                }
                Heard::Note(note) => {
                    // Answers come in the order of the orders.
                    if logger.reopens.is_empty() {
                        if let (Phase::Starting(starting), Note::Failed(failed)) =
                            (&mut container.phase, note)
                        {
                            starting.log_failed = Some(failed);
                        }
                        continue;
                    }
                    let asker = logger.reopens.remove(0);
                    match note {
                        Note::Failed(failed) => (asker, Err(failed)),
                        _ => (asker, Ok(())),
                    }
                }
            };
            match outcome {
                Ok(()) => self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new()),
                Err(failed) => self.fail(asker, failed),
            }
        }
    }

    /// The logger has ended. One that drained a container lets its exit go on;
    /// one that could not open its file has told so, and init will too.
    fn lose_logger(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        // While it starts, why there is no log is still to be read.
        if matches!(container.phase, Phase::Starting(_)) {
            if let Some(logger) = &container.logger {
                let _ = epoll::delete(&self.epoll, &logger.control);
            }
            return;
        }
        let Some(logger) = container.logger.take() else {
            return;
        };
        self.sources.remove(&logger.token);
        for asker in logger.reopens {
            self.fail(asker, Failed::new("reopen log", id, Errno::SRCH));
        }
        if let Some(container) = self.containers.get(id)
            && let Phase::Draining { end, .. } = container.phase
        {
            self.record(id, end);
        }
    }

    fn reap(&mut self) {
        let mut seen = [0_u8; 1024];
        while rustix::io::read(&self.signals, &mut seen).is_ok_and(|count| count > 0) {}
        while let Some((pid, ended)) = process::reap_any() {
            self.buried(pid, ended);
        }
    }

    /// One child has ended and is reaped: its pid may be somebody else's now.
    fn buried(&mut self, pid: i32, ended: Ended) {
        let exec = self
            .execs
            .iter()
            .find(|(_, exec)| exec.pid == pid)
            .map(|(key, _)| *key);
        if let Some(key) = exec {
            // Its last words are there already.
            self.hear_exec(key);
            self.end_exec(key, ended);
            return;
        }
        if self.pod_init.as_ref().is_some_and(|(init, _)| *init == pid) {
            self.pod_init = None;
            return;
        }
        let Some(id) = self.containers.iter().find_map(|(id, container)| {
            let helper = match container.phase {
                Phase::Sweeping { sweeper, .. } => sweeper,
                Phase::Recording { recorder, .. } => recorder,
                _ => 0,
            };
            (container.pid == pid || helper == pid).then(|| id.clone())
        }) else {
            return;
        };
        match self.containers.get(&id).map(|container| &container.phase) {
            Some(Phase::Sweeping { end, .. }) => {
                let end = *end;
                self.drain(&id, end);
            }
            Some(Phase::Recording { end, .. }) => {
                let end = *end;
                self.ended(&id, end, ended != Ended::Code(0));
            }
            _ => self.end_container(&id, ended),
        }
    }

    fn end_exec(&mut self, key: u64, ended: Ended) {
        let Some(mut exec) = self.execs.remove(&key) else {
            return;
        };
        // Whoever asked to signal it from now on must not hit another process.
        exec.pidfd = None;
        let exited = proto::Exited {
            container_id: exec.container_id,
            exec_id: exec.exec_id,
            exit_code: ended.exit_code(),
            signal: ended.signal(),
            finished_at: now(),
            ..Default::default()
        };
        let asker = Asker {
            connection: exec.connection,
            request: 0,
        };
        self.reply(asker, ReplyBody::Exited(exited), Vec::new());
    }

    fn end_container(&mut self, id: &str, ended: Ended) {
        // It may have become its program and ended before we heard of it.
        self.hear_init(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.pid = 0;
        let end = End {
            ended,
            finished_at: now(),
            oom_kills: reaper::oom_kills(&container.cgroup.oom_file)
                .saturating_sub(container.oom_before),
        };
        let cgroup = &container.cgroup;
        let procs = procs_file(cgroup);
        if container.shares_pid && !(cgroup.kill_file.is_empty() && procs.is_empty()) {
            let kill = cgroup.kill_file.clone();
            match clone::fork(clone::Options::default()) {
                Ok(Forked::Child) => process::child(Vec::new(), || reaper::sweep(&kill, &procs)),
                Ok(Forked::Parent { pid, .. }) => {
                    let until = Instant::now() + SWEEP;
                    container.phase = Phase::Sweeping {
                        sweeper: pid,
                        end,
                        until,
                    };
                    return;
                }
                Err(error) => complain("sweep", &Failed::new("clone", id, error)),
            }
        }
        self.drain(id, end);
    }

    fn drain(&mut self, id: &str, end: End) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if let Some(logger) = &container.logger
            && status::send(&logger.control, &Note::Finish).is_ok()
        {
            container.phase = Phase::Draining {
                end,
                until: Instant::now() + DRAIN,
            };
            return;
        }
        self.record(id, end);
    }

    fn record(&mut self, id: &str, end: End) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.exit_record.is_empty() {
            self.ended(id, end, true);
            return;
        }
        let exit = ExitRecord {
            container_id: id.to_owned(),
            exit_code: end.ended.exit_code(),
            signal: end.ended.signal(),
            started_at_ns: container.started_at,
            finished_at_ns: end.finished_at,
            oom_kills: end.oom_kills,
            boot_id: String::new(),
        };
        let path = container.exit_record.clone();
        match clone::fork(clone::Options::default()) {
            Ok(Forked::Child) => {
                process::child(Vec::new(), move || reaper::write_record(&path, exit))
            }
            Ok(Forked::Parent { pid, .. }) => {
                let until = Instant::now() + RECORD;
                container.phase = Phase::Recording {
                    recorder: pid,
                    end,
                    until,
                };
            }
            Err(error) => {
                complain("record", &Failed::new("clone", id, error));
                self.ended(id, end, true);
            }
        }
    }

    fn ended(&mut self, id: &str, end: End, unrecorded: bool) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let exited = proto::Exited {
            container_id: id.to_owned(),
            exec_id: String::new(),
            exit_code: end.ended.exit_code(),
            signal: end.ended.signal(),
            finished_at: end.finished_at,
            oom_kills: end.oom_kills,
            unrecorded,
        };
        container.phase = Phase::Ended(exited.clone());
        container.console = None;
        container._stdin = None;
        let listeners: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.events)
            .map(|(token, _)| *token)
            .collect();
        for connection in listeners {
            let asker = Asker {
                connection,
                request: 0,
            };
            self.reply(asker, ReplyBody::Exited(exited.clone()), Vec::new());
        }
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        if self.accept_again.is_some_and(|at| at <= now) {
            self.go_on_accepting();
        }
        let late: Vec<String> = self
            .containers
            .iter()
            .filter(|(_, container)| match container.phase {
                Phase::Sweeping { until, .. }
                | Phase::Draining { until, .. }
                | Phase::Recording { until, .. } => until <= now,
                Phase::Starting(_) | Phase::Running | Phase::Ended(_) => false,
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in late {
            let Some(container) = self.containers.get_mut(&id) else {
                continue;
            };
            match container.phase {
                Phase::Sweeping { end, .. } => self.drain(&id, end),
                Phase::Draining { end, .. } => {
                    // Its disk hangs; what it holds goes when that comes back.
                    if let Some(logger) = container.logger.take() {
                        self.sources.remove(&logger.token);
                        complain("log", &Failed::new("drain", &id, Errno::TIMEDOUT));
                    }
                    self.record(&id, end);
                }
                Phase::Recording { end, .. } => self.ended(&id, end, true),
                Phase::Starting(_) | Phase::Running | Phase::Ended(_) => {}
            }
        }
    }
}

/// `Some` to answer Done now, `None` when the answer comes later.
type Answer = Result<Option<()>, Refused>;

enum Refused {
    Failed(Failed),
    NotFound(String),
}

impl From<Failed> for Refused {
    fn from(failed: Failed) -> Refused {
        Refused::Failed(failed)
    }
}

/// The container's ends of its streams, and what is kept of its stdin.
#[derive(Default)]
struct Streams {
    stdin: Option<OwnedFd>,
    stdin_kept: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Starting {
    /// What to say of a child that ended without a word before execve.
    fn died(&self) -> Option<Failed> {
        (!self.ready).then(|| Failed::new("start", "the process was killed", Errno::CHILD))
    }
}

impl ExecProcess {
    /// Signals the whole group, and the process itself in case it leads none yet.
    fn signal(&self, signal: i32) -> Result<(), Errno> {
        let Some(pidfd) = &self.pidfd else {
            return Err(Errno::SRCH);
        };
        // Not reaped yet, so the pid is still its own and the group's.
        match process::signal_group(self.pid, signal) {
            Err(Errno::SRCH) => pidfd::send_signal(pidfd, signal),
            other => other,
        }
    }

    fn kill(&self, signal: i32) {
        let _ = self.signal(signal);
    }
}

/// Takes what a starting child says; true once its socket has ended.
fn hear_start(starting: &mut Starting, console: &mut Option<OwnedFd>) -> bool {
    loop {
        match status::receive(&starting.status) {
            Heard::Note(Note::Ready) => starting.ready = true,
            Heard::Note(Note::Console(fd)) => *console = Some(fd),
            Heard::Note(Note::Failed(failed)) => starting.failed = Some(failed),
            Heard::Note(_) => {}
            Heard::Nothing => return false,
            Heard::End => return true,
        }
    }
}

/// Clones a container's init with the PID namespace and cgroup it asks for.
fn fork_init(
    init: &Init<'_>,
    target: Option<&OwnedFd>,
    own_pid: &OwnedFd,
    astray: &mut bool,
) -> Result<(i32, OwnedFd), Failed> {
    let launch = init.launch;
    let cgroup = open_cgroup(launch.cgroup.as_ref())?;
    let options = clone::Options {
        namespaces: if launch.new_pid { flag::NEWPID } else { 0 },
        cgroup: cgroup.as_ref().map(AsFd::as_fd),
        sibling: false,
    };
    if launch.join_user && launch.new_pid {
        return fork_in_user(init, options);
    }
    if let Some(target) = target {
        namespace::join_process(target, flag::NEWPID)
            .step("join namespace", &launch.target_container_id)?;
    } else if launch.join_pid {
        let missing = || {
            Failed::new(
                "join namespace",
                "the pod has no pid namespace",
                Errno::NOENT,
            )
        };
        let pid = init.pod.pid.as_ref().ok_or_else(missing)?;
        namespace::join(pid, Kind::Pid).step("join namespace", "pid")?;
    }
    let forked = clone::fork(options);
    if let Ok(Forked::Child) = forked {
        process::child(init.keep(), || init.run());
    }
    go_home(own_pid, astray, launch.join_pid || target.is_some());
    match forked.step("clone", &launch.container_id)? {
        Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Forked::Child => process::exit(255),
    }
}

/// Makes children come into this process's own PID namespace again.
fn go_home(own: &OwnedFd, astray: &mut bool, left: bool) {
    if left || *astray {
        *astray = namespace::join(own, Kind::Pid).is_err();
    }
}

/// Clones an init into a new PID namespace that the pod's user namespace owns:
/// a helper joins that and makes init, which becomes our child.
fn fork_in_user(init: &Init<'_>, options: clone::Options<'_>) -> Result<(i32, OwnedFd), Failed> {
    let id = &init.launch.container_id;
    let missing = || {
        Failed::new(
            "join namespace",
            "the pod has no user namespace",
            Errno::NOENT,
        )
    };
    let user = init.pod.user.as_ref().ok_or_else(missing)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).step("pipe", id)?;
    let helper = match clone::fork(clone::Options::default()).step("clone", id)? {
        Forked::Parent { pid, .. } => pid,
        Forked::Child => {
            let mut keep = init.keep();
            keep.extend(options.cgroup.iter().map(|fd| fd.as_raw_fd()));
            keep.push(write.as_raw_fd());
            process::child(keep, || {
                let answer = namespace::join(user, Kind::User).and_then(|()| {
                    clone::fork(clone::Options {
                        sibling: true,
                        ..options
                    })
                });
                let word = match answer {
                    Ok(Forked::Child) => process::child(init.keep(), || init.run()),
                    Ok(Forked::Parent { pid, .. }) => pid,
                    Err(error) => -error.raw_os_error(),
                };
                i32::from(rustix::io::write(&write, &word.to_le_bytes()).is_err())
            })
        }
    };
    drop(write);
    // Two system calls that cannot hang; the helper's end closes the pipe.
    let mut word = [0; 4];
    let got = loop {
        match rustix::io::read(&read, &mut word) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    let _ = process::wait_for(helper);
    match (got, i32::from_le_bytes(word)) {
        // Our child and not reaped, as only the loop reaps: the pid is its own.
        (Ok(4), pid) if pid > 0 => Ok((pid, pidfd::open(pid).step("pidfd_open", id)?)),
        (Ok(4), error) => Err(Failed::new("clone", id, Errno::from_raw_os_error(-error))),
        _ => Err(Failed::new("clone", id, Errno::CHILD)),
    }
}

/// The directory of a cgroup v2 to start in.
fn open_cgroup(cgroup: Option<&proto::Cgroup>) -> Result<Option<OwnedFd>, Failed> {
    match cgroup.map(|cgroup| cgroup.directory.as_str()) {
        None | Some("") => Ok(None),
        Some(path) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
                .step("open cgroup", path)
                .map(Some)
        }
    }
}

/// The file that lists a cgroup's processes; empty without one.
fn procs_file(cgroup: &proto::Cgroup) -> String {
    if !cgroup.directory.is_empty() {
        return format!("{}/cgroup.procs", cgroup.directory);
    }
    cgroup.tasks_files.first().cloned().unwrap_or_default()
}

fn open_null() -> Result<OwnedFd, Failed> {
    // The lowest free number may be below 3, so a copy from 3 on is what is kept.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .step("open", "/dev/null")?;
    rustix::io::fcntl_dupfd_cloexec(&null, 3).step("dup", "/dev/null")
}

fn stdio(number: i32) -> std::os::fd::BorrowedFd<'static> {
    match number {
        0 => rustix::stdio::stdin(),
        1 => rustix::stdio::stdout(),
        _ => rustix::stdio::stderr(),
    }
}

fn watch(epoll: &OwnedFd, fd: &OwnedFd, token: u64) -> Result<(), Errno> {
    epoll::add(
        epoll,
        fd,
        epoll::EventData::new_u64(token),
        epoll::EventFlags::IN,
    )
}

/// One line on stderr, which the daemon directs to the pod's monitor.log.
fn complain(what: &str, error: &dyn std::error::Error) {
    match error.source() {
        Some(source) => eprintln!("berth-monitor: {what}: {error}: {source}"),
        None => eprintln!("berth-monitor: {what}: {error}"),
    }
}

fn now() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}
