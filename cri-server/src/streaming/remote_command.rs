//! Exec and attach: a client's channels joined to the streams of a process.
//!
//! ```text
//! stdin ──> pipe or terminal        stdout, stderr <── pipes, or the terminal
//! resize ──> size of the terminal   error <── how it ended, as the last thing
//! ```
//!
//! A command is over when its process has ended and what it wrote has been sent: until
//! the end of its streams, or, where something it left behind keeps them open, until
//! they are quiet. A client that leaves ends the command.

use super::channel::Channel;
use super::fd::{Buffer, Fd};
use super::status::Outcome;
use berth_sandbox::service::{
    AttachEnd, AttachRequest, AttachSession, ExecRequest, ExecSession, Sandboxes,
};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a stream may be quiet after the process has ended, while something the
/// process left behind holds it open.
const QUIET: Duration = Duration::from_millis(500);

/// How long output is taken in all after the process has ended.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Most bytes of a size of a terminal that is not whole yet.
const RESIZE_BYTES: usize = 4 << 10;

/// The streams a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// What a client wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// To run a command in a container.
    Exec {
        container: String,
        command: Vec<String>,
    },
    /// To join the streams of a container's first process.
    Attach { container: String },
}

/// The channels of a client, those it wants.
pub struct Channels {
    pub stdin: Option<Channel>,
    pub stdout: Option<Channel>,
    pub stderr: Option<Channel>,
    pub resize: Option<Channel>,
    pub error: Channel,
    /// The error channel carries Status objects.
    pub status_objects: bool,
}

impl Channels {
    /// Does the job and says how it ended. To be dropped when the client has gone, which
    /// ends a command and detaches.
    pub async fn serve(self, sandboxes: &Sandboxes, job: &Job, wanted: Wanted) {
        let outcome = match job {
            Job::Exec { container, command } => {
                let request = ExecRequest {
                    command: command.clone(),
                    tty: wanted.tty,
                    stdin: wanted.stdin,
                    stdout: wanted.stdout,
                    stderr: wanted.stderr,
                };
                match sandboxes.exec_session(container, request).await {
                    Ok(session) => self.exec(session).await,
                    Err(error) => Outcome::Failure(format!(
                        "error executing command in container: {}",
                        error.chain()
                    )),
                }
            }
            Job::Attach { container } => {
                let request = AttachRequest {
                    tty: wanted.tty,
                    stdin: wanted.stdin,
                    stdout: wanted.stdout,
                    stderr: wanted.stderr,
                };
                match sandboxes.attach_session(container, request).await {
                    Ok(session) => self.attach(session).await,
                    Err(error) => {
                        Outcome::Failure(format!("error attaching to container: {}", error.chain()))
                    }
                }
            }
        };
        self.say(&outcome).await;
    }

    /// The end: the output's channels first, then how it went.
    async fn say(self, outcome: &Outcome) {
        for channel in [&self.stdout, &self.stderr].into_iter().flatten() {
            let _ = channel.close().await;
        }
        let text = if self.status_objects {
            outcome.json()
        } else {
            outcome.text()
        };
        // Each fails only where the client has gone.
        if !text.is_empty() {
            let _ = self.error.write(text.as_bytes()).await;
        }
        for channel in [Some(&self.error), self.stdin.as_ref(), self.resize.as_ref()]
            .into_iter()
            .flatten()
        {
            let _ = channel.close().await;
        }
    }

    async fn exec(&self, mut session: ExecSession) -> Outcome {
        let control = session.control();
        let (ended, hears) = watch::channel(false);
        let waiting = async {
            let exit = control.wait().await;
            ended.send_replace(true);
            exit
        };
        let streams = Streams::of_exec(&mut session);
        let streams = match streams {
            Ok(streams) => streams,
            Err(error) => {
                return Outcome::Failure(format!("cannot use the streams of the command: {error}"));
            }
        };
        let Streams {
            stdin,
            stdout,
            stderr,
        } = streams;
        let work = async {
            tokio::join!(
                waiting,
                output(stdout, self.stdout.as_ref(), Some(hears.clone())),
                output(stderr, self.stderr.as_ref(), Some(hears)),
            )
            .0
        };
        let resize = |width, height| session.resize(width, height);
        let exit = tokio::select! {
            exit = work => exit,
            () = async { tokio::join!(input(self.stdin.as_ref(), stdin), sizes(self.resize.as_ref(), resize)); } => {
                unreachable_end().await
            }
        };
        match exit {
            Ok(exit) if exit.code == 0 => Outcome::Success,
            Ok(exit) => Outcome::Exit(exit.code),
            Err(error) => Outcome::Failure(error.chain()),
        }
    }

    async fn attach(&self, mut session: AttachSession) -> Outcome {
        let streams = match Streams::of_attach(&mut session) {
            Ok(streams) => streams,
            Err(error) => {
                return Outcome::Failure(format!(
                    "cannot use the streams of the container: {error}"
                ));
            }
        };
        let Streams {
            stdin,
            stdout,
            stderr,
        } = streams;
        let work = async {
            tokio::join!(
                session.ended(),
                output(stdout, self.stdout.as_ref(), None),
                output(stderr, self.stderr.as_ref(), None),
            )
            .0
        };
        let resize = |width, height| session.resize(width, height);
        let end = tokio::select! {
            end = work => end,
            () = async { tokio::join!(input(self.stdin.as_ref(), stdin), sizes(self.resize.as_ref(), resize)); } => {
                unreachable_end().await
            }
        };
        match end {
            AttachEnd::ContainerEnded | AttachEnd::HungUp => Outcome::Success,
            end @ (AttachEnd::TooSlow | AttachEnd::Lost) => {
                Outcome::Failure(format!("error attaching to container: {}", end.reason()))
            }
        }
    }
}

/// Input and sizes are served until the session is over: their futures never end.
async fn unreachable_end<T>() -> T {
    std::future::pending().await
}

/// The daemon's ends of a process's streams.
struct Streams {
    stdin: Option<Arc<Fd>>,
    stdout: Option<Arc<Fd>>,
    stderr: Option<Arc<Fd>>,
}

impl Streams {
    fn of_exec(session: &mut ExecSession) -> std::io::Result<Self> {
        let mut streams = Self::of(
            session.stdin.take(),
            session.stdout.take(),
            session.stderr.take(),
        )?;
        if let Some(terminal) = session.tty.take() {
            let terminal = Arc::new(Fd::new(terminal)?);
            streams.stdin = Some(terminal.clone());
            streams.stdout = Some(terminal);
        }
        Ok(streams)
    }

    fn of_attach(session: &mut AttachSession) -> std::io::Result<Self> {
        Self::of(
            session.stdin.take(),
            session.stdout.take(),
            session.stderr.take(),
        )
    }

    fn of(
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> std::io::Result<Self> {
        let fd = |fd: Option<OwnedFd>| fd.map(|fd| Fd::new(fd).map(Arc::new)).transpose();
        Ok(Self {
            stdin: fd(stdin)?,
            stdout: fd(stdout)?,
            stderr: fd(stderr)?,
        })
    }
}

/// Sends what comes out of `from`, to its end. Output that nobody wants is read and
/// forgotten, that of a terminal above all; a client that resets its channel breaks the
/// pipe, as a reader that has seen enough does.
async fn output(
    from: Option<Arc<Fd>>,
    mut to: Option<&Channel>,
    mut ended: Option<watch::Receiver<bool>>,
) {
    let Some(from) = from else { return };
    let mut buffer = Buffer::default();
    let mut afterwards: Option<tokio::time::Instant> = None;
    loop {
        let read = match (&mut ended, afterwards) {
            (_, Some(until)) => {
                let quiet = tokio::time::Instant::now() + QUIET;
                match tokio::time::timeout_at(quiet.min(until), from.read(buffer.space())).await {
                    Ok(read) => read,
                    Err(_) => break,
                }
            }
            (Some(ended), None) => tokio::select! {
                biased;
                read = from.read(buffer.space()) => read,
                // It never goes away without having said so.
                _ = ended.wait_for(|ended| *ended) => {
                    afterwards = Some(tokio::time::Instant::now() + AFTERWARDS);
                    continue;
                }
            },
            (None, None) => from.read(buffer.space()).await,
        };
        let length = match read {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        if let Some(channel) = to {
            let begun = tokio::time::Instant::now();
            if channel.write(buffer.filled(length)).await.is_err() {
                if !from.is_terminal() {
                    return;
                }
                // Closing it would take the input along.
                to = None;
            }
            // The time a client takes is not the process's.
            if let Some(until) = &mut afterwards {
                *until += begun.elapsed();
            }
        }
        buffer.done(length);
    }
    if let Some(to) = to {
        // It fails only where the client has gone.
        let _ = to.close().await;
    }
}

/// Passes on what the client sends, to its end, and then waits for ever.
async fn input(from: Option<&Channel>, to: Option<Arc<Fd>>) {
    if let Some(from) = from {
        if let Some(to) = to {
            pass_on(from, to).await;
        }
        // What a process does not want must not hold up the other channels.
        from.discard();
    }
    std::future::pending().await
}

async fn pass_on(from: &Channel, to: Arc<Fd>) {
    loop {
        match from.read().await {
            Ok(Some(bytes)) => {
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Ok(None) => {
                // Closing a terminal is no end of input: its reader hears of one.
                if let Some(end) = to.end_of_input() {
                    let _ = to.write_all(&[end]).await;
                }
                return;
            }
            Err(_) => return,
        }
    }
}

/// Passes on sizes of the terminal, and then waits for ever.
async fn sizes<F: Future<Output = berth_sandbox::error::Result<()>>>(
    from: Option<&Channel>,
    resize: impl Fn(u32, u32) -> F,
) {
    if let Some(from) = from {
        let mut text = Vec::new();
        while let Ok(Some(bytes)) = from.read().await {
            text.extend_from_slice(&bytes);
            let Some(size) = take_sizes(&mut text) else {
                break;
            };
            if let Some((width, height)) = size
                && let Err(error) = resize(width, height).await
            {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "cannot resize a terminal"
                );
            }
        }
        from.discard();
    }
    std::future::pending().await
}

/// Takes whole sizes out of `text` and gives the last one; `None` where it is none.
fn take_sizes(text: &mut Vec<u8>) -> Option<Option<(u32, u32)>> {
    let mut objects = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
    let (mut last, mut used) = (None, 0);
    loop {
        match objects.next() {
            Some(Ok(object)) => {
                let side = |name| {
                    object
                        .get(name)?
                        .as_u64()
                        .and_then(|side| u16::try_from(side).ok())
                };
                last = Some((side("Width")?.into(), side("Height")?.into()));
                used = objects.byte_offset();
            }
            Some(Err(error)) if error.is_eof() => break,
            Some(Err(_)) => return None,
            None => {
                used = text.len();
                break;
            }
        }
    }
    text.drain(..used);
    (text.len() <= RESIZE_BYTES).then_some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_come_in_pieces_and_the_last_one_counts() {
        let mut text = b"{\"Width\":80,\"Hei".to_vec();
        assert_eq!(take_sizes(&mut text), Some(None));
        text.extend(b"ght\":24}\n{\"Width\":100,\"Height\":30}\n{");
        assert_eq!(take_sizes(&mut text), Some(Some((100, 30))));
        assert_eq!(text, b"\n{");
        text.extend(b"}");
        assert_eq!(take_sizes(&mut text), None, "no size");
        assert_eq!(take_sizes(&mut b"[1,2]".to_vec()), None);
        assert_eq!(
            take_sizes(&mut b"{\"Width\":70000,\"Height\":1}".to_vec()),
            None
        );
        assert_eq!(take_sizes(&mut vec![b' '; 10]), Some(None));
        let mut endless = vec![b'['; RESIZE_BYTES + 1];
        assert_eq!(take_sizes(&mut endless), None);
    }
}
