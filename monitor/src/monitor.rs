//! The waiting loop and everything the monitor knows. Its parts: `connections`
//! (clients), `launch`, `execs`, `logs` (the loggers), `endings`.
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

mod connections;
mod endings;
mod execs;
mod launch;
mod logs;
mod ooms;

use logs::LoggerProcess;

use crate::exec::Exec;
use crate::init::{Init, PodNamespaces};
use crate::log::{self, Logger, counts::Counts};
use crate::namespaces::{self, Made};
use crate::oci_runtime::Driver;
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
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

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
    /// 0 once it is reaped, and until an OCI runtime has made it.
    pid: i32,
    /// As long as an OCI runtime has not made it, the driver's.
    pidfd: OwnedFd,
    /// What drives an OCI runtime, until it has started it.
    driver: Option<(i32, OwnedFd)>,
    /// It ended before its start had.
    early: Option<Ended>,
    start_ticks: u64,
    started_at: i64,
    phase: Phase,
    logger: Option<LoggerProcess>,
    console: Option<OwnedFd>,
    /// What its log has had: `log::counts`.
    log_page: OwnedFd,
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
    /// 0 until an OCI runtime has made it.
    pid: i32,
    /// What is signalled: it and its children. Its own, or with some OCI runtimes
    /// the one of their driver.
    group: i32,
    /// It ended before its start had.
    early: Option<Ended>,
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
    pod_kills: ooms::PodKills,
    ending: Option<Instant>,
    /// Children that ended while an OCI runtime was making an exec, and were
    /// nobody's: one of them may turn out to be it.
    strays: VecDeque<(i32, Ended)>,
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
            pod_kills: ooms::PodKills::default(),
            ending: None,
            strays: VecDeque::new(),
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
                log: Some(Counts::read(&container.log_page).into_proto()),
                starting: matches!(container.phase, Phase::Starting(_)),
            });
        proto::State {
            containers: containers.collect(),
            namespaces_made: self.namespaces_made,
            held: self.pod.held(),
        }
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

    /// Kills what is on its way to a container's program; its end is heard as any other.
    fn call_off(&self, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if !matches!(container.phase, Phase::Starting(_)) {
            return;
        }
        let _ = pidfd::send_signal(&container.pidfd, libc::SIGKILL);
        // An OCI runtime's driver leads a group, with the runtime and its hooks in it.
        // Where the first works it is not reaped yet, so the number is still its own.
        if let Some((driver, pidfd)) = &container.driver
            && pidfd::send_signal(pidfd, libc::SIGKILL).is_ok()
        {
            let _ = process::signal_group(*driver, libc::SIGKILL);
        }
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

impl Starting {
    /// What to say of a child that ended without a word before execve.
    fn died(&self) -> Option<Failed> {
        (!self.ready).then(|| Failed::new("start", "the process was killed", Errno::CHILD))
    }
}

/// Takes what a starting child says; true once its socket has ended. `made` is
/// called with the process that an OCI runtime has made and answers whether it
/// is held.
fn hear_start(
    starting: &mut Starting,
    console: &mut Option<OwnedFd>,
    mut made: impl FnMut(i32) -> Result<(), Errno>,
) -> bool {
    loop {
        match status::receive(&starting.status) {
            Heard::Note(Note::Ready) => starting.ready = true,
            Heard::Note(Note::Console(fd)) => *console = Some(fd),
            Heard::Note(Note::Failed(failed)) => starting.failed = Some(failed),
            Heard::Note(Note::Process(pid)) => {
                // The driver waits for one or the other; it may be gone.
                let _ = match made(pid) {
                    Ok(()) => status::send(&starting.status, &Note::Ready),
                    Err(error) => {
                        let failed = Failed::new("hold", format!("process {pid}"), error);
                        status::send(&starting.status, &Note::Failed(failed))
                    }
                };
            }
            Heard::Nothing => return false,
            Heard::End => return true,
        }
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
