//! Namespaces and containers: from the request to a running program.

use super::logs::{LoggerProcess, LoggerStreams};
use super::*;
use crate::hooks;

/// Containers at a time, ended ones that nobody forgot included.
const MAX_CONTAINERS: usize = 1024;

impl Monitor {
    pub(super) fn make_namespaces(
        &mut self,
        asker: Asker,
        request: proto::MakeNamespaces,
    ) -> Answer {
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

    pub(super) fn hear_maker(&mut self) {
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

    pub(super) fn keep_namespaces(&mut self, made: Made, fds: Vec<OwnedFd>) -> Result<(), Failed> {
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

    pub(super) fn launch(
        &mut self,
        asker: Asker,
        launch: proto::Launch,
        fds: Vec<OwnedFd>,
    ) -> Answer {
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
        let mut sources = Vec::new();
        let mut stdin = None;
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
        if launch.stdin && !tty {
            let (read, write) = pipe_with(cloexec).step("pipe", "stdin")?;
            streams.stdin = Some(read);
            stdin = Some(write);
        }
        let (gate, gate_write) = pipe_with(cloexec).step("pipe", "gate")?;
        let page = log::counts::page().step("memfd_create", &id)?;
        // Without a log too: clients attach to it.
        let logger_streams = LoggerStreams {
            sources,
            stdin,
            gate: gate_write,
        };
        let control = self.start_logger(&launch, logger_streams, &page)?;
        let oom_before = launch
            .cgroup
            .as_ref()
            .and_then(|cgroup| reaper::oom_kills(&cgroup.oom_file))
            .unwrap_or(0);
        if let Some(cgroup) = &launch.cgroup {
            self.count_from_now(&cgroup.oom_file);
        }

        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let hooks = launch.hooks.as_ref().filter(|hooks| hooks::of_host(hooks));
        let runner = hooks
            .map(|_| status::pair().step("socketpair", "hooks"))
            .transpose()?;
        let init = Init {
            launch: &launch,
            fds: &fds,
            pod: &self.pod,
            status: &theirs,
            hooks: runner.as_ref().map(|(_, init)| init),
            gate: Some(&gate),
            streams: [
                streams.stdin.as_ref(),
                streams.stdout.as_ref(),
                streams.stderr.as_ref(),
            ],
        };
        let child = match &launch.oci_runtime {
            None => fork_init(&init, target.as_ref(), &self.own_pid, &mut self.pid_astray),
            Some(runtime) => {
                let wanted = launch.process.as_ref();
                let driver = Driver {
                    runtime,
                    container_id: &id,
                    status: &theirs,
                    gate: Some(&gate),
                    streams: init.streams,
                    owner: wanted.and_then(|process| process.stream_owner),
                    tty,
                    size: wanted.map_or((0, 0), |process| (process.tty_width, process.tty_height)),
                };
                fork_driver(&driver, |driver| driver.launch())
            }
        };
        // Otherwise the logger ends by itself: nobody holds its streams or control.
        let (pid, pidfd) = child?;
        drop(theirs);
        if let (Some(hooks), Some((runner, _))) = (hooks, &runner)
            && let Err(failed) = fork_runner(hooks, pid, runner)
        {
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            return Err(failed.into());
        }
        drop(runner);

        let token = self.token(Source::Init(id.clone()));
        if let Err(error) = watch(&self.epoll, &ours, token) {
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
            self.sources.remove(&token);
            return Err(Failed::new("epoll_ctl", id, error).into());
        }
        let logger_token = self.token(Source::Logger(id.clone()));
        // Without, an answer is only heard when the logger ends.
        let _ = watch(&self.epoll, &control, logger_token);
        let driven = launch.oci_runtime.is_some();
        let driver = driven.then(|| pidfd.try_clone().ok()).flatten();
        let driver = driver.map(|pidfd| (pid, pidfd));
        let container = Container {
            pid: if driven { 0 } else { pid },
            pidfd,
            driver,
            early: None,
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
            logger: Some(LoggerProcess::new(control, logger_token)),
            log_page: page,
            console: None,
            join_user: launch.join_user,
            shares_pid: !launch.new_pid,
            cgroup: launch.cgroup.clone().unwrap_or_default(),
            oom_before,
            exit_record: launch.exit_record.clone(),
        };
        self.containers.insert(id, container);
        Ok(None)
    }

    pub(super) fn return_home(&mut self) -> Result<(), Failed> {
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

    pub(super) fn hear_init(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Phase::Starting(starting) = &mut container.phase else {
            return;
        };
        let (pid, pidfd) = (&mut container.pid, &mut container.pidfd);
        let ticks = &mut container.start_ticks;
        // It waits for the driver's word, so it is there.
        let hold = |made: i32| {
            *pidfd = pidfd::open(made)?;
            *pid = made;
            *ticks = reaper::start_ticks(made);
            Ok(())
        };
        if !hear_start(starting, &mut container.console, hold) {
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
        container.driver = None;
        container.started_at = now();
        let early = container.early.take();
        self.sources.remove(&token);
        let started = proto::Started {
            pid: container.pid,
            start_ticks: container.start_ticks,
            started_at: container.started_at,
        };
        let fds = container.pidfd.try_clone().into_iter().collect();
        if let Some(container) = self.containers.get(id) {
            self.give_console(container);
        }
        self.reply(asker, ReplyBody::Started(started), fds);
        if let Some(ended) = early {
            self.end_container(id, ended);
        }
    }

    /// Takes a container that never ran away again.
    pub(super) fn fail_launch(&mut self, id: &str, asker: Asker, mut failed: Failed) {
        if let Some(container) = self.containers.remove(id) {
            let _ = pidfd::send_signal(&container.pidfd, libc::SIGKILL);
            if let Some(logger) = container.logger {
                self.sources.remove(&logger.token);
                // What it said has been heard, or is still in the socket.
                failed = Monitor::last_words(&logger).unwrap_or(failed);
            }
        }
        self.fail(asker, failed);
    }
}

/// The container's ends of its streams.
#[derive(Default)]
struct Streams {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Clones a child that drives an OCI runtime.
pub(super) fn fork_driver(
    driver: &Driver<'_>,
    body: impl FnOnce(&Driver<'_>) -> i32,
) -> Result<(i32, OwnedFd), Failed> {
    match clone::fork(clone::Options::default()).step("clone", driver.container_id)? {
        Forked::Child => process::child(driver.keep(), || body(driver)),
        Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}

/// Clones the child that runs hooks in the host's namespaces while init waits. It
/// ends with init, which holds the other end of `socket`.
fn fork_runner(hooks: &proto::Hooks, pid: i32, socket: &OwnedFd) -> Result<(), Failed> {
    match clone::fork(clone::Options::default()).step("clone", "hooks")? {
        Forked::Child => process::child(vec![socket.as_raw_fd()], || {
            hooks::serve_init(hooks, pid, socket)
        }),
        Forked::Parent { .. } => Ok(()),
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
pub(super) fn go_home(own: &OwnedFd, astray: &mut bool, left: bool) {
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
                // Again in init, where less is allowed, it says what has failed.
                let _ = init.before_user_namespace();
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
