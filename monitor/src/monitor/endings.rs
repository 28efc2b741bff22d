//! What follows a process' end, step by step, each with a deadline.

use super::*;
use crate::log::order::Order;

/// Longest wait for a sweep, beyond its own deadline.
const SWEEP: Duration = Duration::from_secs(12);

/// Longest wait for the logger: its own deadline, and a hung disk's grace.
const DRAIN: Duration = log::DRAIN.saturating_add(Duration::from_millis(500));

/// Longest wait for a record to be durable.
const RECORD: Duration = Duration::from_secs(30);

/// Ended children of nobody that are kept while an exec is being made.
const MAX_STRAYS: usize = 256;

impl Monitor {
    pub(super) fn reap(&mut self) {
        let mut seen = [0_u8; 1024];
        while rustix::io::read(&self.signals, &mut seen).is_ok_and(|count| count > 0) {}
        while let Some((pid, ended)) = process::reap_any() {
            self.buried(pid, ended);
        }
    }

    /// One child has ended and is reaped: its pid may be somebody else's now.
    pub(super) fn buried(&mut self, pid: i32, ended: Ended) {
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
            self.stray(pid, ended);
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

    /// Remembers what may be an exec whose pid is yet to be told.
    fn stray(&mut self, pid: i32, ended: Ended) {
        let waited_for = |exec: &ExecProcess| exec.starting.is_some() && exec.pid == 0;
        if !self.execs.values().any(waited_for) {
            self.strays.clear();
            return;
        }
        if self.strays.len() >= MAX_STRAYS {
            self.strays.pop_front();
        }
        self.strays.push_back((pid, ended));
    }

    pub(super) fn end_container(&mut self, id: &str, ended: Ended) {
        // It may have become its program and ended before we heard of it.
        self.hear_init(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.pid = 0;
        if matches!(container.phase, Phase::Starting(_)) {
            // An OCI runtime's, whose driver has the last word on the start.
            container.early = Some(ended);
            return;
        }
        let end = End {
            ended,
            finished_at: now(),
            oom_kills: self.kills_of(id),
        };
        let Some(container) = self.containers.get_mut(id) else {
            return;
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

    pub(super) fn drain(&mut self, id: &str, end: End) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if let Some(logger) = &container.logger
            && Order::Finish.send(&logger.control).is_ok()
        {
            container.phase = Phase::Draining {
                end,
                until: Instant::now() + DRAIN,
            };
            return;
        }
        self.record(id, end);
    }

    pub(super) fn record(&mut self, id: &str, end: End) {
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

    pub(super) fn ended(&mut self, id: &str, end: End, unrecorded: bool) {
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
            log: Some(Counts::read(&container.log_page).into_proto()),
        };
        container.phase = Phase::Ended(exited.clone());
        container.console = None;
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

    pub(super) fn check_deadlines(&mut self) {
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
                    // Its disk is full or hangs; the logger ends when it is done.
                    complain("log", &Failed::new("drain", &id, Errno::TIMEDOUT));
                    self.record(&id, end);
                }
                Phase::Recording { end, .. } => self.ended(&id, end, true),
                Phase::Starting(_) | Phase::Running | Phase::Ended(_) => {}
            }
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
