//! A container, as a test handles it.

use crate::deadline::eventually;
use crate::leftovers::processes_of;
use crate::node::Node;
use berth_proto::runtime_v1::{
    self as cri, ContainerConfig, ContainerState, ContainerStatus, ExecSyncResponse,
    LinuxContainerResources, LinuxContainerSecurityContext,
};
use std::fs;
use std::path::PathBuf;
use tonic::Status;

pub struct Container<'n> {
    pub node: &'n Node,
    pub id: String,
    /// Empty for one without a log.
    pub log_path: PathBuf,
}

/// One line of a CRI log file. Source: CRI logging design, "TIME STREAM TAGS TEXT".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub time: String,
    pub stream: String,
    /// "P" where the line goes on in the next one, "F" where it ends.
    pub tag: String,
    pub text: String,
}

impl Container<'_> {
    pub fn start(&self) -> Result<(), Status> {
        let request = cri::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.node
            .wait(self.node.runtime().start_container(request))
            .map(drop)
    }

    pub fn try_status(&self) -> Result<ContainerStatus, Status> {
        let request = cri::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .node
            .wait(self.node.runtime().container_status(request))?;
        answer
            .status
            .ok_or_else(|| Status::internal("an answer without a status"))
    }

    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        self.try_status()
            .unwrap_or_else(|err| panic!("ContainerStatus: {err}"))
    }

    pub fn state(&self) -> ContainerState {
        self.status().state()
    }

    /// Its status once it has exited.
    #[track_caller]
    pub fn wait_for_exit(&self) -> ContainerStatus {
        eventually("the container exits", || {
            Some(self.status()).filter(|s| s.state() == ContainerState::ContainerExited)
        })
    }

    /// With the grace period in seconds.
    pub fn stop(&self, timeout: i64) -> Result<(), Status> {
        let request = cri::StopContainerRequest {
            container_id: self.id.clone(),
            timeout,
        };
        self.node
            .wait(self.node.runtime().stop_container(request))
            .map(drop)
    }

    pub fn remove(&self) -> Result<(), Status> {
        let request = cri::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.node
            .wait(self.node.runtime().remove_container(request))
            .map(drop)
    }

    pub fn try_exec(&self, command: &[&str], timeout: i64) -> Result<ExecSyncResponse, Status> {
        let request = cri::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        self.node.wait(self.node.runtime().exec_sync(request))
    }

    /// What a command printed to standard output; it has to end with 0.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> String {
        let answer = self
            .try_exec(command, 20)
            .unwrap_or_else(|err| panic!("ExecSync {command:?}: {err}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(answer.exit_code, 0, "{command:?}: {}", text(&answer.stderr));
        text(&answer.stdout)
    }

    /// Its first process, as the machine numbers it: the oldest in its cgroup.
    #[track_caller]
    pub fn init_pid(&self) -> i32 {
        self.pids()
            .first()
            .copied()
            .expect("the container has a process")
    }

    /// The processes in its cgroup, oldest first.
    pub fn pids(&self) -> Vec<i32> {
        let cgroups = self.node.footprint().cgroups();
        let own = cgroups.iter().filter(|dir| {
            dir.components()
                .any(|c| c.as_os_str().to_string_lossy().contains(&self.id))
        });
        let mut pids: Vec<(u64, i32)> = own
            .flat_map(|dir| processes_of(dir))
            .filter_map(|pid| Some((start_time(pid)?, pid)))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids.into_iter().map(|(_, pid)| pid).collect()
    }

    /// The lines of its log file; an unfinished last line is left out.
    #[track_caller]
    pub fn log(&self) -> Vec<LogLine> {
        let text = fs::read(&self.log_path)
            .unwrap_or_else(|err| panic!("{}: {err}", self.log_path.display()));
        let text = String::from_utf8_lossy(&text);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .split('\n')
            .filter(|line| !line.is_empty())
            .map(parse_line)
            .collect()
    }

    /// What it printed on a stream, as its log has it.
    #[track_caller]
    pub fn logged(&self, stream: &str) -> String {
        let mut text = String::new();
        for line in self.log().iter().filter(|line| line.stream == stream) {
            text.push_str(&line.text);
            if line.tag == "F" {
                text.push('\n');
            }
        }
        text
    }

    #[track_caller]
    pub fn stdout(&self) -> String {
        self.logged("stdout")
    }

    #[track_caller]
    pub fn stderr(&self) -> String {
        self.logged("stderr")
    }

    /// Waits until a text is in its log.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        eventually(&format!("{text:?} is logged"), || {
            (self.stdout() + &self.stderr())
                .contains(text)
                .then_some(())
        });
    }
}

#[track_caller]
fn parse_line(line: &str) -> LogLine {
    let mut words = line.splitn(4, ' ').map(str::to_owned);
    let mut word = || {
        words
            .next()
            .unwrap_or_else(|| panic!("not a line of a CRI log: {line:?}"))
    };
    LogLine {
        time: word(),
        stream: word(),
        tag: word(),
        text: word(),
    }
}

/// Field 22 of /proc/PID/stat, in clock ticks since boot.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// Reaches what a test wants to change in a ContainerConfig.
pub trait LinuxConfig {
    fn security(&mut self) -> &mut LinuxContainerSecurityContext;
    fn resources(&mut self) -> &mut LinuxContainerResources;
    fn mount(&mut self, host: impl AsRef<std::path::Path>, container: &str) -> &mut cri::Mount;
    fn env(&mut self, name: &str, value: &[u8]);
}

impl LinuxConfig for ContainerConfig {
    fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        let linux = self.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    fn resources(&mut self) -> &mut LinuxContainerResources {
        self.linux
            .get_or_insert_default()
            .resources
            .get_or_insert_default()
    }

    fn mount(&mut self, host: impl AsRef<std::path::Path>, container: &str) -> &mut cri::Mount {
        self.mounts.push(cri::Mount {
            host_path: host.as_ref().display().to_string(),
            container_path: container.to_owned(),
            ..Default::default()
        });
        self.mounts.last_mut().expect("one was pushed")
    }

    fn env(&mut self, name: &str, value: &[u8]) {
        self.envs.push(cri::KeyValue {
            key: name.to_owned(),
            value: value.to_vec(),
        });
    }
}
