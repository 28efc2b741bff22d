//! Starting containers and execs through another OCI runtime: runc, crun, ...
//!
//! ```text
//! driver (our child) ── runs ──> runc create ── clones ──> container's init, waiting
//!   │ the runtime ends, its child becomes ours (subreaper)
//!   ├─ tells the pid, waits until the monitor holds it
//!   ├─ waits for the log
//!   └─ runs ──> runc start ──> init execve's
//! ```
//!
//! The monitor is the parent of what the runtime leaves behind, as of what it
//! clones itself, so everything that follows (streams, log, signals, exits) is
//! the same. The driver is a process of its own because a runtime may take its
//! time; it ends with the start.
//!
//! Source: OCI runtime-spec, `runtime.md`; runc(8), crun(1).

use crate::become_program;
use crate::status::{self, Failed, Heard, Note, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::{Errno, pidfd, process};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::{IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long one call of the runtime may take. The kubelet gives a start two
/// minutes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Most of a runtime's log that is looked at for its last error. Unit: bytes.
const MOST_LOG: u64 = 64 << 10;

/// Where the runtime finds its own helpers.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the driver works with.
pub struct Driver<'a> {
    /// The runtime.
    pub runtime: &'a proto::OciRuntime,
    /// The container.
    pub container_id: &'a str,
    /// To the monitor.
    pub status: &'a OwnedFd,
    /// One byte comes here once the log is open.
    pub gate: Option<&'a OwnedFd>,
    /// stdin, stdout, stderr; `None` for /dev/null.
    pub streams: [Option<&'a OwnedFd>; 3],
    /// Who they are to belong to; `None` leaves that to the runtime.
    pub owner: Option<proto::Owner>,
    /// With a terminal, whose master the runtime hands out.
    pub tty: bool,
    /// Its size in characters, columns first; 0 leaves it.
    pub size: (u32, u32),
}

impl Driver<'_> {
    /// The descriptors the child keeps.
    pub fn keep(&self) -> Vec<RawFd> {
        let streams = self.streams.iter().flatten().map(|fd| fd.as_raw_fd());
        let gate = self.gate.map(AsRawFd::as_raw_fd);
        streams
            .chain(gate)
            .chain([self.status.as_raw_fd()])
            .collect()
    }

    /// Creates and starts the container; the driver's exit code.
    pub fn launch(&self) -> i32 {
        process::reset_signals();
        self.give_streams();
        self.report(self.create().and_then(|()| self.start()))
    }

    /// Runs a process in the running container; the driver's exit code.
    /// `description` is the OCI process as JSON.
    pub fn exec(&self, exec_id: &str, description: &str) -> i32 {
        process::reset_signals();
        self.give_streams();
        self.report(self.enter(exec_id, description))
    }

    /// In a user namespace the runtime may not.
    fn give_streams(&self) {
        if let Some(owner) = self.owner {
            let streams = self.streams.iter().copied().flatten();
            become_program::give_streams_to(owner, streams);
        }
    }

    fn report(&self, outcome: Result<(), Failed>) -> i32 {
        match outcome {
            Ok(()) => i32::from(status::send(self.status, &Note::Ready).is_err()),
            Err(failed) => {
                let _ = status::send(self.status, &Note::Failed(failed));
                1
            }
        }
    }

    fn create(&self) -> Result<(), Failed> {
        self.go_to_bundle()?;
        let mut arguments = vec!["create", "--bundle", ".", "--pid-file", "pid"];
        let console = self.console("console.sock")?;
        if console.is_some() {
            arguments.extend(["--console-socket", "console.sock"]);
        }
        arguments.push(self.container_id);
        let outcome = self.run("create", &arguments, self.streams);
        let console = self.take_console(console, "console.sock", outcome)?;
        self.introduce("pid")?;
        console.map_or(Ok(()), |console| self.pass_console(console))
    }

    fn start(&self) -> Result<(), Failed> {
        if let Some(gate) = self.gate {
            let mut byte = [0];
            loop {
                match rustix::io::read(gate, &mut byte) {
                    Ok(1) => break,
                    Err(Errno::INTR) => {}
                    // The logger has told the monitor why.
                    _ => return Err(Failed::new("open log", "", Errno::IO)),
                }
            }
        }
        self.run("start", &["start", self.container_id], [None; 3])
    }

    fn enter(&self, exec_id: &str, description: &str) -> Result<(), Failed> {
        self.go_to_bundle()?;
        let file = |ending: &str| format!("exec-{exec_id}.{ending}");
        let (process, pid, socket) = (file("json"), file("pid"), file("sock"));
        let outcome = (|| {
            std::fs::write(&process, description).map_err(|error| io("write", &process, &error))?;
            let mut arguments = vec!["exec", "--detach", "--pid-file", &pid];
            arguments.extend(["--process", &process]);
            let console = self.console(&socket)?;
            if console.is_some() {
                arguments.extend(["--console-socket", &socket]);
            }
            arguments.push(self.container_id);
            let outcome = self.run("exec", &arguments, self.streams);
            let console = self.take_console(console, &socket, outcome)?;
            self.introduce(&pid)?;
            console.map_or(Ok(()), |console| self.pass_console(console))
        })();
        for name in [&process, &pid, &socket] {
            let _ = std::fs::remove_file(name);
        }
        outcome
    }

    /// From here on paths are relative, as a socket's may have 107 bytes only.
    fn go_to_bundle(&self) -> Result<(), Failed> {
        rustix::process::setsid().step("setsid", "")?;
        let bundle = &self.runtime.bundle;
        std::env::set_current_dir(bundle).map_err(|error| io("enter the bundle", bundle, &error))
    }

    fn console(&self, name: &str) -> Result<Option<UnixListener>, Failed> {
        if !self.tty {
            return Ok(None);
        }
        let _ = std::fs::remove_file(name);
        let listener = UnixListener::bind(name).map_err(|error| io("bind", name, &error))?;
        Ok(Some(listener))
    }

    /// The terminal's master that the runtime has sent by now.
    fn take_console(
        &self,
        listener: Option<UnixListener>,
        name: &str,
        outcome: Result<(), Failed>,
    ) -> Result<Option<OwnedFd>, Failed> {
        let _ = listener.is_some().then(|| std::fs::remove_file(name));
        outcome?;
        let Some(listener) = listener else {
            return Ok(None);
        };
        let failed = |error: &std::io::Error| io("take the console", name, error);
        // It has connected and sent before it ended, or never will.
        listener
            .set_nonblocking(true)
            .map_err(|error| failed(&error))?;
        let (connection, _) = listener.accept().map_err(|error| failed(&error))?;
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(
            &connection,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .step("take the console", name)?;
        let fds = control.drain().find_map(|item| match item {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match fds {
            Some(fd) => Ok(Some(fd)),
            None => Err(Failed::new("take the console", name, Errno::BADF)),
        }
    }

    fn pass_console(&self, console: OwnedFd) -> Result<(), Failed> {
        let (columns, rows) = self.size;
        if columns > 0 && rows > 0 {
            let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
            let _ = berth_sys::pty::resize(&console, size(columns), size(rows));
        }
        status::send(self.status, &Note::Console(console)).step("report", "console")
    }

    /// Tells the monitor the pid that the runtime wrote down, and waits until it
    /// holds that process.
    fn introduce(&self, pid_file: &str) -> Result<(), Failed> {
        let text =
            std::fs::read_to_string(pid_file).map_err(|error| io("read", pid_file, &error))?;
        let pid = text.trim().parse().ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(|| Failed::invalid("read", format!("{pid_file}: {text:?}")))?;
        status::send(self.status, &Note::Process(pid)).step("report", "pid")?;
        let mut wait = [PollFd::new(self.status, PollFlags::IN)];
        poll(&mut wait, None).step("poll", "monitor")?;
        match status::receive(self.status) {
            Heard::Note(Note::Ready) => Ok(()),
            _ => Err(Failed::new("hand over the process", pid_file, Errno::CHILD)),
        }
    }

    /// Runs the runtime to its end.
    fn run(
        &self,
        what: &str,
        arguments: &[&str],
        streams: [Option<&OwnedFd>; 3],
    ) -> Result<(), Failed> {
        let runtime = self.runtime;
        let name = Path::new(&runtime.program).file_name();
        let name = name.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let stage = format!("{name} {what}");
        let log = format!("{what}-{}.log", std::process::id());
        // A terminal is the runtime's to make: it must not take these for one.
        let stream = |stream: Option<&OwnedFd>| match stream {
            Some(fd) => fd.try_clone().map(Stdio::from),
            None => Ok(Stdio::null()),
        };
        let failed = |error: &std::io::Error| io(&stage, &runtime.program, error);
        let [stdin, stdout, stderr] = streams.map(stream);
        let mut child = Command::new(&runtime.program)
            .arg("--root")
            .arg(&runtime.root)
            .args(["--log", &log, "--log-format", "json"])
            .args(&runtime.options)
            .args(arguments)
            .env_clear()
            .env("PATH", PATH)
            .stdin(stdin.map_err(|error| failed(&error))?)
            .stdout(stdout.map_err(|error| failed(&error))?)
            .stderr(stderr.map_err(|error| failed(&error))?)
            .spawn()
            .map_err(|error| failed(&error))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        let late = outlasts(pid, PATIENCE).step(&stage, "wait")?;
        if late {
            let _ = child.kill();
        }
        let ended = child.wait().map_err(|error| failed(&error))?;
        let said = last_error(Path::new(&log));
        let _ = std::fs::remove_file(&log);
        if late {
            return Err(Failed::new(&stage, "it took too long", Errno::TIMEDOUT));
        }
        if ended.success() {
            return Ok(());
        }
        let said = said.unwrap_or_else(|| format!("it failed without a word: {ended}"));
        Err(Failed {
            errno: 0,
            stage,
            detail: said,
        })
    }
}

/// Whether the process is still there after `limit`.
fn outlasts(pid: i32, limit: Duration) -> Result<bool, Errno> {
    let pidfd = pidfd::open(pid)?;
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut wait = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut wait, Some(&timeout)) {
            Ok(0) => return Ok(true),
            Ok(_) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The last error in a log of one JSON object a line.
fn last_error(log: &Path) -> Option<String> {
    let mut text = Vec::new();
    let file = std::fs::File::open(log).ok()?;
    file.take(MOST_LOG).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines().rev();
    lines.find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        matches!(line["level"].as_str(), Some("error" | "fatal"))
            .then(|| line["msg"].as_str().map(str::to_owned))?
    })
}

fn io(stage: &str, detail: &str, error: &std::io::Error) -> Failed {
    Failed {
        stage: stage.to_owned(),
        detail: detail.to_owned(),
        errno: error.raw_os_error().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_what_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let text = "{\"level\":\"warning\",\"msg\":\"hm\"}\n{\"level\":\"error\",\"msg\":\"first\"}\n\
            {\"level\":\"error\",\"msg\":\"exec: \\\"x\\\": executable file not found in $PATH\"}\nnot JSON\n";
        std::fs::write(&log, text).unwrap();
        let said = last_error(&log).unwrap();
        assert!(said.starts_with("exec:"), "{said}");
        assert_eq!(last_error(&dir.path().join("none")), None);
    }

    #[test]
    fn a_runtime_that_hangs_is_noticed() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(outlasts(pid, Duration::from_millis(20)).unwrap());
        child.kill().unwrap();
        assert!(!outlasts(pid, Duration::from_secs(20)).unwrap());
        child.wait().unwrap();
    }
}
