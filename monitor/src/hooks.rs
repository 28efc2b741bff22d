//! OCI hooks: programs that are run at given moments of a container's life.
//!
//! ```text
//! prestart, createRuntime   a runner, our child, in the host's namespaces; init waits for it
//! createContainer           init's child: the container's namespaces, the host's root
//! startContainer            init's child, confined and rooted as the container's program
//! poststart, poststop       berth-monitor --hooks, a child of the daemon
//! ```
//!
//! A hook gets the container's state on stdin, a pipe for what it says, its own
//! environment, and nothing else: no descriptor, no ignored signal, no priority for
//! memory. The program of a hook of the host is looked up from the host's root; no
//! path of the container's is ever in it. Only a startContainer hook is a program of
//! the container's, and may do no more than that.
//!
//! Who waits for hooks is never the monitor's loop. What they leave running when
//! they succeed is theirs; one that takes too long, or whose start is called off,
//! is killed with its process group.
//!
//! Source: OCI runtime-spec, config.md "POSIX-platform Hooks", runtime.md "State"
//! and "Lifecycle".

use crate::become_program::{LastSteps, write_at};
use crate::status::{self, Failed, Heard, Note, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use berth_sys::clone::{self, Forked};
use berth_sys::pidfd::{self, Ended};
use berth_sys::process::{self, Strings};
use prost::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Most of what a hook says that is told when it fails: its last words. Unit: bytes.
const MOST_WORDS: usize = 1024;

/// Soft limit of open files, as programs of the host expect it. Source: systemd's default.
const FILES: u64 = 1024;

/// RLIMIT_NOFILE, whose type is not the same in every libc.
#[allow(clippy::unnecessary_cast)]
const NOFILE: u32 = libc::RLIMIT_NOFILE as u32;

/// A hook that is about to be run.
struct Run<'a> {
    kind: &'a str,
    hook: &'a proto::Hook,
    /// For its stdin.
    state: &'a [u8],
    /// When this can be read, or has ended, nobody waits for the hook any more.
    abort: Option<BorrowedFd<'a>>,
    /// Where it is run; `None` for where we are.
    directory: Option<&'a str>,
}

/// Whether any of them is for the runner.
pub fn of_host(hooks: &proto::Hooks) -> bool {
    !hooks.prestart.is_empty() || !hooks.create_runtime.is_empty()
}

/// The life of the runner: waits for init's word, runs the hooks of the host's
/// namespaces, and tells init how that went. `pid` is init's.
pub fn serve_init(hooks: &proto::Hooks, pid: i32, init: &OwnedFd) -> i32 {
    process::reset_signals();
    // Not a signal's to the monitor's group, and no longer than the monitor.
    let _ = rustix::process::setsid();
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    ordinary();
    if wait_for_word(init).is_err() {
        return 1;
    }
    let all = || {
        let state = state(&hooks.state, "creating", pid)?;
        let lists = [
            ("prestart", &hooks.prestart),
            ("createRuntime", &hooks.create_runtime),
        ];
        for (kind, hook) in lists
            .iter()
            .flat_map(|(kind, list)| list.iter().map(move |h| (*kind, h)))
        {
            let run = Run {
                kind,
                hook,
                state: &state,
                abort: Some(init.as_fd()),
                directory: Some(&hooks.bundle),
            };
            run.on_host()?;
        }
        Ok(())
    };
    let note = match all() {
        Ok(()) => Note::Ready,
        Err(failed) => Note::Failed(failed),
    };
    i32::from(status::send(init, &note).is_err())
}

/// Has the runner run its hooks, and runs the createContainer ones: everything is
/// mounted, and the root is still the host's.
pub fn before_change_of_root(
    hooks: Option<&proto::Hooks>,
    runner: Option<&OwnedFd>,
) -> Result<(), Failed> {
    let Some(hooks) = hooks else { return Ok(()) };
    if let Some(runner) = runner {
        status::send(runner, &Note::Ready).step("hooks", "wake who runs them")?;
        wait_for_word(runner)?;
    }
    if hooks.create_container.is_empty() {
        return Ok(());
    }
    let state = state(&hooks.state, "creating", own_pid())?;
    for hook in &hooks.create_container {
        let run = Run {
            kind: "createContainer",
            hook,
            state: &state,
            abort: None,
            directory: Some(&hooks.bundle),
        };
        run.on_host()?;
    }
    Ok(())
}

/// Runs the startContainer hooks, each in a child that becomes it by `last_steps`
/// as init will become the container's program.
pub fn in_container(
    hooks: Option<&proto::Hooks>,
    last_steps: &LastSteps<'_>,
) -> Result<(), Failed> {
    let Some(hooks) = hooks.filter(|hooks| !hooks.start_container.is_empty()) else {
        return Ok(());
    };
    let state = state(&hooks.state, "created", own_pid())?;
    for hook in &hooks.start_container {
        let run = Run {
            kind: "startContainer",
            hook,
            state: &state,
            abort: None,
            directory: None,
        };
        run.run(last_steps)?;
    }
    Ok(())
}

/// `berth-monitor --hooks`: see `proto::RunHooks`.
pub fn serve_daemon() -> ExitCode {
    process::reset_signals();
    let _ = rustix::process::setsid();
    ordinary();
    let Some(request) = read_request() else {
        return ExitCode::FAILURE;
    };
    // Nothing of it may be in a hook, nor keep the daemon waiting for its end.
    if berth_sys::fd::close_on_exec_from(3).is_err() {
        return ExitCode::FAILURE;
    }
    let mut answer = proto::HooksRun::default();
    for hook in &request.hooks {
        let run = Run {
            kind: &request.kind,
            hook,
            state: request.state.as_bytes(),
            abort: Some(rustix::stdio::stdin()),
            directory: Some(&request.bundle),
        };
        if let Err(failed) = run.on_host() {
            answer.failures.push(failed.into_proto());
        }
    }
    let mut out = std::io::stdout();
    match std::io::Write::write_all(&mut out, &answer.encode_to_vec()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn read_request() -> Option<proto::RunHooks> {
    // Unbuffered: what comes after the request is not ours to take.
    let mut stdin =
        std::fs::File::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).ok()?);
    let mut length = [0; 4];
    stdin.read_exact(&mut length).ok()?;
    let length = u32::from_le_bytes(length) as usize;
    if length > proto::MAX_FRAME_BYTES {
        return None;
    }
    let mut bytes = vec![0; length];
    stdin.read_exact(&mut bytes).ok()?;
    proto::RunHooks::decode(&*bytes).ok()
}

/// As other programs of the host are: the monitor is spared when memory runs out,
/// what hooks take is not.
fn ordinary() {
    if let Ok(this) = crate::beneath::proc_dir("/proc/self") {
        let _ = write_at(&this, "oom_score_adj", b"0");
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// The state as JSON. Source: OCI runtime-spec, runtime.md "State": the pid is what
/// it is in the namespace the hook runs in.
fn state(template: &str, status: &str, pid: i32) -> Result<Vec<u8>, Failed> {
    let mut state: serde_json::Value = serde_json::from_str(template)
        .map_err(|_| Failed::invalid("hooks", "the state is no JSON"))?;
    let Some(fields) = state.as_object_mut() else {
        return Err(Failed::invalid("hooks", "the state is no object"));
    };
    fields.insert("status".into(), status.into());
    fields.insert("pid".into(), pid.into());
    Ok(state.to_string().into_bytes())
}

/// Waits until the other side says that it goes on, or why not.
fn wait_for_word(socket: &OwnedFd) -> Result<(), Failed> {
    loop {
        let mut wait = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut wait, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failed::new("hooks", "wait", error)),
        }
        match status::receive(socket) {
            Heard::Note(Note::Ready) => return Ok(()),
            Heard::Note(Note::Failed(failed)) => return Err(failed),
            Heard::Note(_) | Heard::Nothing => {}
            Heard::End => return Err(Failed::new("hooks", "who runs them is gone", Errno::CHILD)),
        }
    }
}

impl Run<'_> {
    /// Runs a program of the host.
    fn on_host(&self) -> Result<(), Failed> {
        self.run(&|program, argv, env| {
            let error = process::exec(program, argv, env);
            Failed::new("exec", String::from_utf8_lossy(program.to_bytes()), error)
        })
    }

    fn run(&self, last_steps: &LastSteps<'_>) -> Result<(), Failed> {
        let stage = format!("{} hook", self.kind);
        let path = self.hook.path.as_str();
        let nul = || {
            Failed::invalid(
                &stage,
                format!("{path}: a NUL in its path, arguments or environment"),
            )
        };
        let program = CString::new(path).map_err(|_| nul())?;
        let mut argv = self.hook.args.clone();
        if argv.is_empty() {
            argv.push(path.into());
        }
        let argv = Strings::new(argv).ok_or_else(nul)?;
        let env = Strings::new(self.hook.env.clone()).ok_or_else(nul)?;

        let stdin = sealed(self.state).step(&stage, path)?;
        let (said, saying) = pipe_with(PipeFlags::CLOEXEC).step(&stage, path)?;
        let (word, failing) = pipe_with(PipeFlags::CLOEXEC).step(&stage, path)?;
        for end in [&said, &word] {
            rustix::io::ioctl_fionbio(end, true).step(&stage, path)?;
        }
        let (pid, pidfd) = match clone::fork(clone::Options::default()).step(&stage, path)? {
            Forked::Parent { pid, pidfd } => (pid, pidfd),
            Forked::Child => {
                let keep = [&stdin, &saying, &failing].map(AsRawFd::as_raw_fd);
                process::child(keep.to_vec(), || {
                    let failed = match self.become_it(
                        (&program, &argv, &env),
                        &stdin,
                        &saying,
                        last_steps,
                    ) {
                        Ok(never) => match never {},
                        Err(failed) => failed,
                    };
                    let _ = rustix::io::write(&failing, &status::encode_failed(&failed));
                    127
                })
            }
        };
        // As in the child: whichever comes first.
        let group = rustix::process::Pid::from_raw(pid);
        let _ = rustix::process::setpgid(group, group);
        drop((stdin, saying, failing));

        let mut words = Words::default();
        let waited = self.wait(&pidfd, &said, &mut words);
        if !matches!(waited, Ok(Outcome::Ended)) {
            let _ = process::signal_group(pid, libc::SIGKILL);
            let _ = pidfd::send_signal(&pidfd, libc::SIGKILL);
        }
        let ended = process::wait_for(pid).step(&stage, path)?;
        words.read(&said);
        let failed = |what: String| Failed {
            stage: stage.clone(),
            detail: format!("{path} {what}{}", words.told()),
            errno: 0,
        };
        match waited.step(&stage, path)? {
            Outcome::Ended => {}
            Outcome::Late => {
                let seconds = Duration::from_millis(self.hook.timeout_ms).as_secs_f64();
                return Err(failed(format!(
                    "took longer than {seconds} s and was killed"
                )));
            }
            Outcome::CalledOff => {
                return Err(failed("was killed: the start was called off".into()));
            }
        }
        let mut bytes = [0; 4096];
        if let Ok(count @ 1..) = rustix::io::read(&word, &mut bytes)
            && let Some(mut why) = status::decode_failed(&bytes[..count])
        {
            why.detail = match why.stage.as_str() {
                "exec" => format!("{path} cannot be run"),
                step => format!("{path} cannot be run: {step} {}", why.detail),
            };
            why.stage = stage;
            return Err(why);
        }
        match ended {
            Ended::Code(0) => Ok(()),
            Ended::Code(code) => Err(failed(format!("failed with exit code {code}"))),
            Ended::Signal(signal) => Err(failed(format!("was ended by signal {signal}"))),
        }
    }

    /// What the child does.
    fn become_it(
        &self,
        (program, argv, env): (&CStr, &Strings, &Strings),
        stdin: &OwnedFd,
        saying: &OwnedFd,
        last_steps: &LastSteps<'_>,
    ) -> Result<Infallible, Failed> {
        let _ = rustix::process::setpgid(None, None);
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .step("prctl", "parent death signal")?;
        process::reset_signals();
        rustix::process::umask(Mode::from_raw_mode(0o022));
        if let Ok((soft, hard)) = process::limit(NOFILE)
            && soft > FILES
        {
            let _ = process::set_limit(NOFILE, FILES, hard);
        }
        if let Some(directory) = self.directory {
            rustix::process::chdir(directory).step("chdir", directory)?;
        }
        berth_sys::fd::install_stdio(stdin, 0).step("dup2", "0")?;
        berth_sys::fd::install_stdio(saying, 1).step("dup2", "1")?;
        berth_sys::fd::install_stdio(saying, 2).step("dup2", "2")?;
        berth_sys::fd::close_on_exec_from(3).step("close_range", "")?;
        Err(last_steps(program, argv, env))
    }

    fn wait(&self, pidfd: &OwnedFd, said: &OwnedFd, words: &mut Words) -> Result<Outcome, Errno> {
        let until = Instant::now() + Duration::from_millis(self.hook.timeout_ms);
        let mut open = true;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let nobody = PollFlags::empty();
            let mut wait = [
                PollFd::new(pidfd, PollFlags::IN),
                PollFd::new(said, if open { PollFlags::IN } else { nobody }),
                // In place of none, what is there anyway.
                self.abort
                    .as_ref()
                    .map_or(PollFd::new(pidfd, PollFlags::IN), |abort| {
                        PollFd::new(abort, PollFlags::IN | PollFlags::RDHUP)
                    }),
            ];
            // A pipe that has ended is ready for good, whatever is asked for.
            let watched = if open {
                &mut wait[..]
            } else {
                wait.swap(1, 2);
                &mut wait[..2]
            };
            match poll(watched, Some(&timeout)) {
                Ok(0) => return Ok(Outcome::Late),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error),
            }
            let ready: Vec<bool> = wait.iter().map(|one| !one.revents().is_empty()).collect();
            let (talks, aborted) = if open {
                (ready[1], ready[2])
            } else {
                (false, ready[1])
            };
            if ready[0] {
                return Ok(Outcome::Ended);
            }
            if self.abort.is_some() && aborted {
                return Ok(Outcome::CalledOff);
            }
            if talks {
                open = words.read(said);
            }
            if left.is_zero() {
                return Ok(Outcome::Late);
            }
        }
    }
}

/// What came of waiting for a hook.
enum Outcome {
    Ended,
    Late,
    CalledOff,
}

/// The last of what a hook has said.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    /// Takes some of what there is; false once there will be no more. The rest is
    /// for the next time, so that one who never stops does not hold us.
    fn read(&mut self, pipe: &OwnedFd) -> bool {
        let mut bytes = [0; 4096];
        for _ in 0..16 {
            match rustix::io::read(pipe, &mut bytes) {
                Ok(0) => return false,
                Ok(count) => {
                    self.0.extend_from_slice(&bytes[..count]);
                    let surplus = self.0.len().saturating_sub(MOST_WORDS);
                    self.0.drain(..surplus);
                }
                Err(Errno::INTR) => {}
                Err(_) => return true,
            }
        }
        true
    }

    /// ": what it said", or nothing.
    fn told(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        match text.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        }
    }
}

/// A file of memory that holds `content` and cannot be changed, read from its beginning.
fn sealed(content: &[u8]) -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create(c"state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut rest = content;
    while !rest.is_empty() {
        let count = rustix::io::write(&file, rest)?;
        rest = &rest[count..];
    }
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_says_where_the_container_is() {
        let made = state(r#"{"id":"a","annotations":{"k":"v"}}"#, "creating", 7).unwrap();
        let made: serde_json::Value = serde_json::from_slice(&made).unwrap();
        let expected = serde_json::json!({"id": "a", "annotations": {"k": "v"}, "status": "creating", "pid": 7});
        assert_eq!(made, expected);
        assert!(state("[]", "creating", 7).is_err());
        assert!(state("", "creating", 7).is_err());
    }

    #[test]
    fn only_the_last_words_are_kept() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let mut words = Words::default();
        for _ in 0..3 {
            rustix::io::write(&write, &[b'x'; MOST_WORDS]).unwrap();
            assert!(words.read(&read));
        }
        rustix::io::write(&write, b" the end\n").unwrap();
        drop(write);
        assert!(!words.read(&read));
        assert_eq!(words.0.len(), MOST_WORDS);
        assert!(words.told().starts_with(": xx") && words.told().ends_with("x the end"));
        assert_eq!(Words::default().told(), "");
    }

    #[test]
    fn a_sealed_file_is_read_from_its_beginning_and_cannot_be_changed() {
        let file = sealed(b"{}").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::read(&file, &mut bytes).unwrap(), 2);
        assert_eq!(rustix::io::write(&file, b"x").unwrap_err(), Errno::PERM);
    }

    #[test]
    fn only_hooks_of_the_host_need_a_runner() {
        let one = || vec![proto::Hook::default()];
        let mut hooks = proto::Hooks {
            create_container: one(),
            start_container: one(),
            ..Default::default()
        };
        assert!(!of_host(&hooks));
        hooks.prestart = one();
        assert!(of_host(&hooks));
    }
}
