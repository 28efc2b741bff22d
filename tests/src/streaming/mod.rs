//! Clients of the streaming server: exec, attach and port-forward as kubectl and crictl
//! do them, over SPDY/3.1, over WebSocket channels and through a tunnel; and everything a
//! client may do wrong.
//!
//! They block, with a thread that reads per connection. Like Kubernetes' own clients they
//! do not know windows, unless asked to.

mod events;
mod socket;
pub mod spdy;
pub mod websocket;

use crate::{Container, Node, Pod};
use anyhow::{Context, Result, bail, ensure};
use berth_proto::runtime_v1 as cri;
use serde_json::Value;
use std::cell::RefCell;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;
use tonic::Status;

pub use events::Events;
pub use socket::{Refused, Url};

/// Nothing is silent for this long when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What comes on a stream.
#[derive(Debug)]
pub enum Event {
    Data(bytes::Bytes),
    /// As many bytes as were to be counted, see [`Events::count`].
    Counted,
    /// The server ended its side.
    End,
    /// The server broke the stream off.
    Reset,
    /// The connection is over; the code of a WebSocket's close frame.
    Gone(Option<u16>),
}

/// How a command's connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Spdy,
    WebSocket,
}

pub const TRANSPORTS: [Transport; 2] = [Transport::Spdy, Transport::WebSocket];

/// The streams a command is to have.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Wanted {
    pub const OUTPUT: Self = Self {
        stdin: false,
        stdout: true,
        stderr: true,
        tty: false,
    };
    pub const ALL: Self = Self {
        stdin: true,
        ..Self::OUTPUT
    };
    pub const TTY: Self = Self {
        stdin: true,
        stdout: true,
        stderr: false,
        tty: true,
    };
}

impl Container<'_> {
    pub fn exec_url(&self, command: &[&str], wanted: Wanted) -> Result<String, Status> {
        let request = cri::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty: wanted.tty,
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
        };
        let answer = self.node.wait(self.node.runtime().exec(request))?;
        Ok(answer.url)
    }

    pub fn attach_url(&self, wanted: Wanted) -> Result<String, Status> {
        let request = cri::AttachRequest {
            container_id: self.id.clone(),
            tty: wanted.tty,
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
        };
        let answer = self.node.wait(self.node.runtime().attach(request))?;
        Ok(answer.url)
    }

    /// Begins a command.
    #[track_caller]
    pub fn stream(&self, transport: Transport, command: &[&str], wanted: Wanted) -> Command {
        let url = self.exec_url(command, wanted).expect("Exec");
        Command::open(self.node, &url, transport, wanted).expect("the streaming server upgrades")
    }

    /// Joins its streams.
    #[track_caller]
    pub fn attach(&self, transport: Transport, wanted: Wanted) -> Command {
        let url = self.attach_url(wanted).expect("Attach");
        Command::open(self.node, &url, transport, wanted).expect("the streaming server upgrades")
    }
}

impl Pod<'_> {
    pub fn port_forward_url(&self, ports: &[i32]) -> Result<String, Status> {
        let request = cri::PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: ports.to_vec(),
        };
        let answer = self.node.wait(self.node.runtime().port_forward(request))?;
        Ok(answer.url)
    }

    /// A connection that ports can be forwarded over.
    #[track_caller]
    pub fn forward(&self, transport: Transport) -> Forwarder {
        let url = self.port_forward_url(&[]).expect("PortForward");
        Forwarder::open(self.node, &url, transport).expect("the streaming server upgrades")
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With an exit code.
    Code(i32),
    /// The message of a failure.
    Failed(String),
}

impl Ended {
    /// Reads the API's Status object.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let status: Value = serde_json::from_slice(text)
            .with_context(|| format!("no status: {:?}", String::from_utf8_lossy(text)))?;
        if status["status"] == "Success" {
            return Ok(Self::Code(0));
        }
        ensure!(
            status["status"] == "Failure",
            "neither success nor failure: {status}"
        );
        if status["reason"] == "NonZeroExitCode" {
            let cause = &status["details"]["causes"][0];
            ensure!(cause["reason"] == "ExitCode", "no exit code: {status}");
            let code = cause["message"].as_str().context("no code")?;
            return Ok(Self::Code(code.parse()?));
        }
        Ok(Self::Failed(
            status["message"].as_str().unwrap_or_default().to_owned(),
        ))
    }
}

/// What a command left behind.
#[derive(Debug)]
pub struct Finished {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub ended: Ended,
}

impl Finished {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A command, or a container that was attached to.
pub struct Command {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub error: Output,
    pub resize: Option<Input>,
    pub connection: Connection,
}

/// Where bytes come out.
pub struct Output {
    events: Events,
    /// What came behind a text that was waited for.
    behind: RefCell<Vec<u8>>,
}

impl From<Events> for Output {
    fn from(events: Events) -> Self {
        let behind = RefCell::default();
        Self { events, behind }
    }
}

/// Where bytes go in.
pub enum Input {
    Spdy(spdy::Sender),
    WebSocket(websocket::Sender),
}

/// What a command's streams share.
#[derive(Clone)]
pub enum Connection {
    Spdy(spdy::Connection),
    WebSocket(websocket::Connection),
}

impl Connection {
    /// Closes the socket without a word, as a client that was killed.
    pub fn kill(&self) {
        match self {
            Self::Spdy(connection) => connection.kill(),
            Self::WebSocket(connection) => connection.kill(),
        }
    }
}

impl Command {
    /// Upgrades to the newest protocol of the transport and opens what is wanted.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open(node: &Node, url: &str, transport: Transport, wanted: Wanted) -> Result<Self> {
        let protocol = match transport {
            Transport::Spdy => "v4.channel.k8s.io",
            Transport::WebSocket => "v5.channel.k8s.io",
        };
        Self::open_as(node, url, transport, wanted, protocol)
    }

    /// The same with one protocol.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open_as(
        node: &Node,
        url: &str,
        transport: Transport,
        wanted: Wanted,
        protocol: &str,
    ) -> Result<Self> {
        node.host
            .enter(|| Self::open_here(url, transport, wanted, protocol))
    }

    /// The same from the network of this thread.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open_here(
        url: &str,
        transport: Transport,
        wanted: Wanted,
        protocol: &str,
    ) -> Result<Self> {
        let stderr = wanted.stderr && !wanted.tty;
        match transport {
            Transport::Spdy => {
                let connection = spdy::Connection::open(url, protocol)?;
                let open = |kind| connection.stream(&[("streamType", kind)]);
                let some = |wanted: bool, kind| wanted.then(|| open(kind)).transpose();
                let (_, error) = open("error")?;
                let stdin = some(wanted.stdin, "stdin")?;
                let stdout = some(wanted.stdout, "stdout")?;
                let stderr = some(stderr, "stderr")?;
                let sized =
                    wanted.tty && (protocol.starts_with("v4") || protocol.starts_with("v3"));
                let resize = some(sized, "resize")?;
                Ok(Self {
                    stdin: stdin.map(|(sender, _)| Input::Spdy(sender)),
                    stdout: stdout.map(|(_, events)| events.into()),
                    stderr: stderr.map(|(_, events)| events.into()),
                    error: error.into(),
                    resize: resize.map(|(sender, _)| Input::Spdy(sender)),
                    connection: Connection::Spdy(connection),
                })
            }
            Transport::WebSocket => {
                let (connection, events) = websocket::Connection::open(url, protocol, 5)?;
                let mut events = events.into_iter().map(Output::from);
                let mut next = || events.next().expect("five channels");
                let (_, stdout_events, stderr_events, error) = (next(), next(), next(), next());
                let input = |number| Input::WebSocket(connection.sender(number));
                Ok(Self {
                    stdin: wanted.stdin.then(|| input(0)),
                    stdout: wanted.stdout.then_some(stdout_events),
                    stderr: stderr.then_some(stderr_events),
                    error,
                    resize: wanted.tty.then(|| input(4)),
                    connection: Connection::WebSocket(connection),
                })
            }
        }
    }

    /// Sends input.
    #[track_caller]
    pub fn say(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin was wanted");
        stdin.write(bytes).expect("the server takes input");
    }

    /// Ends the input.
    #[track_caller]
    pub fn end_input(&mut self) {
        let stdin = self.stdin.take().expect("stdin was wanted");
        stdin.close().expect("the server takes the end of input");
    }

    /// Says how large the terminal is.
    #[track_caller]
    pub fn resize(&mut self, width: u16, height: u16) {
        let resize = self.resize.as_mut().expect("a terminal was wanted");
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}\n");
        resize
            .write(size.as_bytes())
            .expect("the server takes sizes");
    }

    /// Reads standard output until `text` is there; what came up to then.
    #[track_caller]
    pub fn wait_for(&self, text: &str) -> String {
        let stdout = self.stdout.as_ref().expect("stdout was wanted");
        stdout
            .until(text)
            .unwrap_or_else(|err| panic!("waiting for {text:?}: {err:#}"))
    }

    /// Everything to the end; the input stays open.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub fn finish(self) -> Result<Finished> {
        // All at once: one that waits must not hold up another.
        std::thread::scope(|scope| {
            let read = |output: Option<Output>| {
                scope.spawn(move || output.map(|output| output.all()).transpose())
            };
            let (stdout, stderr) = (read(self.stdout), read(self.stderr));
            let error = self.error.all()?;
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Option<Vec<u8>>>>| {
                thread
                    .join()
                    .expect("reading does not panic")
                    .map(Option::unwrap_or_default)
            };
            Ok(Finished {
                stdout: join(stdout)?,
                stderr: join(stderr)?,
                ended: Ended::parse(&error)?,
            })
        })
    }

    /// As [`Command::finish`], and the end has to come.
    #[track_caller]
    pub fn finished(self) -> Finished {
        self.finish()
            .unwrap_or_else(|err| panic!("the command did not end as it should: {err:#}"))
    }
}

impl Output {
    /// What comes next; `None` at the end.
    ///
    /// # Errors
    /// The stream or the connection broke, or nothing comes.
    pub fn next(&self) -> Result<Option<bytes::Bytes>> {
        let behind = self.behind.take();
        if !behind.is_empty() {
            return Ok(Some(behind.into()));
        }
        match self.events.recv_timeout(PATIENCE) {
            Ok(Event::Data(bytes)) => Ok(Some(bytes)),
            Ok(Event::End | Event::Gone(Some(1000))) => Ok(None),
            Ok(Event::Reset) => bail!("the server reset the stream"),
            Ok(Event::Counted) => bail!("bytes that were only counted"),
            Ok(Event::Gone(code)) => bail!("the connection is gone, code {code:?}"),
            Err(RecvTimeoutError::Timeout) => bail!("nothing for {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("after the end"),
        }
    }

    /// Waits for exactly as many bytes, see [`Events::count`].
    ///
    /// # Errors
    /// More come, or it breaks.
    pub fn count(&self, bytes: usize) -> Result<()> {
        let behind = self.behind.take().len();
        let left = bytes.checked_sub(behind).context("too many bytes")?;
        self.events.count(left)
    }

    /// What comes next, whatever it is.
    pub fn event(&self) -> Option<Event> {
        self.events.recv_timeout(PATIENCE).ok()
    }

    /// Everything up to the end.
    ///
    /// # Errors
    /// It broke.
    pub fn all(self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next()? {
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    /// Everything up to where the stream ends, in whatever way. Kubernetes' clients take a
    /// reset for an end, and its servers reset what they are done with.
    pub fn rest(self) -> Vec<u8> {
        let mut rest = self.behind.take();
        while let Ok(Event::Data(bytes)) = self.events.recv_timeout(PATIENCE) {
            rest.extend_from_slice(&bytes);
        }
        rest
    }

    /// Reads until `text` is there; what came up to then. The rest is kept.
    ///
    /// # Errors
    /// It ended or broke before.
    pub fn until(&self, text: &str) -> Result<String> {
        let mut all = Vec::new();
        loop {
            let found = all
                .windows(text.len())
                .position(|part| part == text.as_bytes());
            if let Some(at) = found {
                self.behind.replace(all.split_off(at + text.len()));
                return Ok(String::from_utf8_lossy(&all).into_owned());
            }
            let so_far = || String::from_utf8_lossy(&all).into_owned();
            match self.next() {
                Ok(Some(bytes)) => all.extend_from_slice(&bytes),
                Ok(None) => bail!("ended after {:?}", so_far()),
                Err(err) => return Err(err.context(format!("after {:?}", so_far()))),
            }
        }
    }
}

impl Input {
    /// Sends bytes.
    ///
    /// # Errors
    /// The connection broke.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Spdy(sender) => sender.write(bytes),
            Self::WebSocket(sender) => sender.write(bytes),
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// The connection broke.
    pub fn close(self) -> Result<()> {
        match self {
            Self::Spdy(sender) => sender.close(),
            Self::WebSocket(sender) => sender.close(),
        }
    }
}

/// A connection that ports are forwarded over, by pairs of SPDY streams.
#[derive(Clone)]
pub struct Forwarder(pub spdy::Connection);

/// One forwarded connection.
pub struct Forwarded {
    pub to: spdy::Sender,
    pub from: Output,
    pub error: Output,
}

impl Forwarder {
    /// Upgrades; `WebSocket` tunnels SPDY.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open(node: &Node, url: &str, transport: Transport) -> Result<Self> {
        node.host.enter(|| Self::open_here(url, transport))
    }

    /// The same from the network of this thread.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open_here(url: &str, transport: Transport) -> Result<Self> {
        match transport {
            Transport::Spdy => spdy::Connection::open(url, "portforward.k8s.io"),
            Transport::WebSocket => {
                spdy::Connection::open_tunnel(url, "SPDY/3.1+portforward.k8s.io")
            }
        }
        .map(Self)
    }

    /// Connects to a port of the pod.
    ///
    /// # Errors
    /// The connection broke. What the pod does comes on the streams.
    pub fn connect(&self, port: u16) -> Result<Forwarded> {
        let (port, id) = (port.to_string(), self.0.fresh().to_string());
        let open = |kind| {
            self.0
                .stream(&[("streamType", kind), ("port", &port), ("requestID", &id)])
        };
        let (sender, error) = open("error")?;
        sender.close()?;
        let (to, from) = open("data")?;
        Ok(Forwarded {
            to,
            from: from.into(),
            error: error.into(),
        })
    }
}
