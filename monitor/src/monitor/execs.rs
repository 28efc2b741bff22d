//! Execs: further processes in running containers.

use super::launch::{fork_driver, go_home};
use super::*;
use std::path::{Component, Path, PathBuf};

/// Execs at a time. Each costs a process of the node.
const MAX_EXECS: usize = 1024;

impl Monitor {
    pub(super) fn exec(&mut self, asker: Asker, exec: proto::Exec, fds: Vec<OwnedFd>) -> Answer {
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
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let (pid, pidfd) = match &exec.oci_runtime {
            None => self.fork_exec(&exec, &fds, &theirs)?,
            Some(runtime) => {
                self.running(&exec.container_id)?;
                drive_exec(&exec, runtime, &fds, &theirs)?
            }
        };
        drop(theirs);
        let driven = exec.oci_runtime.is_some();
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
                pid: if driven { 0 } else { pid },
                group: pid,
                early: None,
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

    /// Clones the process into the container.
    fn fork_exec(
        &mut self,
        exec: &proto::Exec,
        fds: &[OwnedFd],
        status: &OwnedFd,
    ) -> Result<(i32, OwnedFd), Refused> {
        let container = self.running(&exec.container_id)?;
        let work = Exec {
            exec,
            fds,
            init: &container.pidfd,
            join_user: container.join_user,
            status,
        };
        let cgroup = open_cgroup(exec.cgroup.as_ref())?;
        let options = clone::Options {
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            ..Default::default()
        };
        namespace::join_process(&container.pidfd, flag::NEWPID)
            .step("join namespace", &exec.container_id)?;
        let mut forked = clone::fork(options);
        // One that has handed its controllers on to cgroups inside it takes no process itself.
        if let (Err(Errno::BUSY), Some(own)) = (&forked, &exec.cgroup)
            && let Some(inside) = open_inside(container.pid, Path::new(&own.directory))
        {
            forked = clone::fork(clone::Options {
                cgroup: Some(inside.as_fd()),
                ..Default::default()
            });
        }
        if let Ok(Forked::Child) = forked {
            process::child(work.keep(), || work.run());
        }
        go_home(&self.own_pid, &mut self.pid_astray, true);
        match forked.step("clone", &exec.exec_id)? {
            Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
            Forked::Child => process::exit(255),
        }
    }

    pub(super) fn hear_exec(&mut self, key: u64) {
        let Some(exec) = self.execs.get_mut(&key) else {
            return;
        };
        let Some(starting) = &mut exec.starting else {
            return;
        };
        let (pid, pidfd) = (&mut exec.pid, &mut exec.pidfd);
        let (early, ticks) = (&mut exec.early, &mut exec.start_ticks);
        let group = &mut exec.group;
        let strays = &mut self.strays;
        let hold = |made: i32| {
            // It runs since before its pid was told, and may have come to its end.
            if let Some(at) = strays.iter().position(|(stray, _)| *stray == made) {
                *early = strays.remove(at).map(|(_, ended)| ended);
                return Ok(());
            }
            *pidfd = Some(pidfd::open(made)?);
            *pid = made;
            *ticks = reaper::start_ticks(made);
            // The driver leads a session: nothing of the monitor's own is in either group.
            let made = rustix::process::Pid::from_raw(made);
            if let Ok(found) = rustix::process::getpgid(made) {
                *group = found.as_raw_nonzero().get();
            }
            Ok(())
        };
        if !hear_start(starting, &mut exec.console, hold) {
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
        let early = self.execs.get_mut(&key).and_then(|exec| exec.early.take());
        if let Some(ended) = early {
            self.end_exec(key, ended);
            return;
        }
        // A client that went away before its exec had started.
        if !self.connections.contains_key(&asker.connection)
            && let Some(exec) = self.execs.get(&key)
        {
            exec.kill(libc::SIGKILL);
        }
    }

    pub(super) fn find_exec(&self, container_id: &str, exec_id: &str) -> Option<&ExecProcess> {
        self.execs
            .values()
            .find(|exec| exec.container_id == container_id && exec.exec_id == exec_id)
    }

    pub(super) fn end_exec(&mut self, key: u64, ended: Ended) {
        if let Some(exec) = self.execs.get_mut(&key)
            && exec.starting.is_some()
        {
            // An OCI runtime's, whose driver has the last word on the start.
            exec.early = Some(ended);
            return;
        }
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
}

impl ExecProcess {
    /// Signals the whole group, and the process itself in case it leads none yet.
    pub(super) fn signal(&self, signal: i32) -> Result<(), Errno> {
        let Some(pidfd) = &self.pidfd else {
            return Err(Errno::SRCH);
        };
        if self.pid == 0 {
            return pidfd::send_signal(pidfd, signal);
        }
        // Not reaped yet, so the pid is still its own and the group's.
        match process::signal_group(self.group, signal) {
            Err(Errno::SRCH) => pidfd::send_signal(pidfd, signal),
            other => other,
        }
    }

    pub(super) fn kill(&self, signal: i32) {
        let _ = self.signal(signal);
    }
}

/// The cgroup inside `own` that the process `pid` has moved to, as systemd does in a container.
fn open_inside(pid: i32, own: &Path) -> Option<OwnedFd> {
    let all = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let now = all.lines().find_map(|line| line.strip_prefix("0::"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(inside(Path::new(now), own)?, flags, Mode::empty()).ok()
}

/// Where the cgroup `now` of the hierarchy is, if it is inside the one at `own`.
fn inside(now: &Path, own: &Path) -> Option<PathBuf> {
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !now.components().all(plain) {
        return None;
    }
    let of_own = |path: &&Path| {
        let below_mount = path.strip_prefix("/").unwrap_or(path);
        below_mount.components().next().is_some() && own.ends_with(below_mount)
    };
    let base = now.ancestors().skip(1).find(of_own)?;
    Some(own.join(now.strip_prefix(base).ok()?))
}

/// Clones a child that has an OCI runtime run the process.
fn drive_exec(
    exec: &proto::Exec,
    runtime: &proto::OciRuntime,
    fds: &[OwnedFd],
    status: &OwnedFd,
) -> Result<(i32, OwnedFd), Failed> {
    let stream = |index: Option<u32>| index.and_then(|index| fds.get(index as usize));
    let process = exec.process.as_ref();
    let driver = Driver {
        runtime,
        container_id: &exec.container_id,
        status,
        gate: None,
        streams: [exec.stdin_fd, exec.stdout_fd, exec.stderr_fd].map(stream),
        owner: process.and_then(|process| process.stream_owner),
        tty: process.is_some_and(|process| process.tty),
        size: process.map_or((0, 0), |process| (process.tty_width, process.tty_height)),
    };
    fork_driver(&driver, |driver| {
        driver.exec(&exec.exec_id, &exec.oci_process)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroup_inside_the_containers_is_gone_to() {
        let own = Path::new("/sys/fs/cgroup/unified/kubepods/pod1/berth-a");
        let of = |now: &str| inside(Path::new(now), own);
        assert_eq!(
            of("/kubepods/pod1/berth-a/init.scope"),
            Some(own.join("init.scope"))
        );
        assert_eq!(of("/kubepods/pod1/berth-a/x/y"), Some(own.join("x/y")));
        for elsewhere in [
            "/",
            "/kubepods/pod1/berth-a",
            "/kubepods/pod1/berth-b/x",
            "/kubepods/pod1",
            "/kubepods/pod1/berth-a/../berth-b",
            "/../other",
        ] {
            assert_eq!(of(elsewhere), None, "{elsewhere}");
        }
    }
}
