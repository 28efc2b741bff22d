//! The streaming server: what Exec, Attach and PortForward answer with a URL for.
//!
//! ```text
//! CRI Exec ── token ──> URL            kubelet, crictl ── HTTP, URL ──> token, once
//!                                                              └── upgrade ──┐
//!    SPDY/3.1 ──────────── streams ──┐                                      │
//!    WebSocket ─────────── channels ─┼──> remote_command ──> a process      │
//!    SPDY in WebSocket ─── streams ──┴──> forward ─────────> the pod's ports│
//!                                                              <────────────┘
//! ```
//!
//! Nothing here survives the daemon: a command ends with its stream, a client that was
//! attached or forwarded has to come again. Each connection is tasks of its own; what it
//! may keep in memory is bounded by `inbox` and `link`.

mod channel;
mod dial;
mod fd;
mod forward;
mod handshake;
mod inbox;
mod link;
mod remote_command;
mod source;
mod spdy;
mod splice;
mod status;
mod tls;
mod tokens;
mod transport;
mod watch;
mod websocket;

use crate::wire::websocket::{CLOSE_GOING_AWAY, CLOSE_NORMAL};
use berth_sandbox::service::Sandboxes;
use bytes::BytesMut;
use channel::Channel;
use handshake::{Kind, Upgrade};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use link::{Envelope, Link};
use remote_command::Channels;
use source::Source;
use spdy::Spdy;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tls::Tls;
use tokens::Tokens;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use transport::Connection;
use websocket::WebSocket;

pub use remote_command::{Job, Wanted};
pub use tls::{Files as TlsFiles, TlsError};
pub use tokens::TokenError;

/// Connections at a time. A node of 500 pods has a few; each takes three descriptors.
const CONNECTIONS: usize = 4096;

/// How long a client may take for its TLS handshake, and for its request's headers.
const GREETING: Duration = Duration::from_secs(10);

/// How long a client may take to open its streams.
/// Source: k8s.io/cri-streaming, `DefaultStreamCreationTimeout`.
const STREAMS: Duration = Duration::from_secs(30);

/// Most ports one WebSocket connection can forward: two channels each, 255 is the close signal.
pub const MAX_PORTS: usize = 127;

/// How the server is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen; port 0 is any that is free.
    pub address: SocketAddr,
    /// `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// How long a URL is good for.
    pub token_lifetime: Duration,
    /// How long a connection may be without a byte in either direction.
    pub idle_timeout: Duration,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    #[error("cannot listen on {address} for streaming")]
    Bind {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("the streaming server has no certificate")]
    Tls(#[from] TlsError),
}

/// What a token stands for.
#[derive(Clone, Debug)]
pub enum Errand {
    Command(Job, Wanted),
    PortForward { pod: String, ports: Vec<u16> },
}

impl Errand {
    fn path(&self) -> &'static str {
        match self {
            Self::Command(Job::Exec { .. }, _) => "exec",
            Self::Command(Job::Attach { .. }, _) => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// The server, whether it listens yet or no longer.
pub struct Streaming {
    address: SocketAddr,
    idle_timeout: Duration,
    tls: Option<Tls>,
    tokens: Tokens<Errand>,
    stop: CancellationToken,
    sessions: TaskTracker,
}

impl Streaming {
    /// Binds the address and reads the certificates.
    ///
    /// # Errors
    /// See [`StreamingError`].
    pub async fn bind(settings: &Settings) -> Result<(Self, TcpListener), StreamingError> {
        let bind = |source| StreamingError::Bind {
            address: settings.address,
            source,
        };
        let tls = settings.tls.clone().map(Tls::open).transpose()?;
        let listener = TcpListener::bind(settings.address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        if address.ip().is_loopback() {
            transport::unpaced(&listener);
        }
        let server = Self {
            address,
            idle_timeout: settings.idle_timeout,
            tls,
            tokens: Tokens::new(settings.token_lifetime),
            stop: CancellationToken::new(),
            sessions: TaskTracker::new(),
        };
        Ok((server, listener))
    }

    /// The URL at which a client finds `errand` done, once.
    ///
    /// # Errors
    /// Too many wait for their clients.
    pub fn url(&self, errand: Errand) -> Result<String, TokenError> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut address = self.address;
        // The client is on this node.
        match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            IpAddr::V4(_) | IpAddr::V6(_) => {}
        }
        let path = errand.path();
        let token = self.tokens.insert(errand)?;
        Ok(format!("{scheme}://{address}/{path}/{token}"))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until stopped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, sandboxes: Sandboxes) {
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = async {
                    // Never closed, so a permit always comes.
                    let permit = free.clone().acquire_owned().await;
                    (permit, listener.accept().await)
                } => accepted,
            };
            let (permit, stream) = match accepted {
                (Ok(permit), Ok((stream, _))) => (permit, stream),
                (Err(_), _) => return,
                (_, Err(error)) => {
                    tracing::warn!(%error, "cannot accept a streaming connection");
                    // Out of descriptors: a moment later there may be one.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, sandboxes) = (self.clone(), sandboxes.clone());
            self.sessions.spawn(async move {
                let _permit = permit;
                let stopped = server.stop.clone();
                let greeted = tokio::select! {
                    greeted = server.clone().greet(stream) => greeted,
                    () = stopped.cancelled() => return,
                };
                if let Some(session) = greeted {
                    session.run(&server, &sandboxes).await;
                }
            });
        }
    }

    /// Ends every connection, and the commands with them.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.sessions.close();
        self.sessions.wait().await;
    }

    /// Reads the request and answers it; a session where it upgrades.
    async fn greet(self: Arc<Self>, stream: TcpStream) -> Option<Session> {
        let connection = match &self.tls {
            None => Connection::Plain(stream),
            Some(tls) => {
                let handshake = tls.acceptor().accept(stream);
                match tokio::time::timeout(GREETING, handshake).await {
                    Ok(Ok(stream)) => Connection::Tls(Box::new(stream)),
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "a streaming client's TLS handshake failed");
                        return None;
                    }
                    Err(_) => return None,
                }
            }
        };
        let (sender, mut upgrading) = tokio::sync::mpsc::channel(1);
        let service = service_fn(|mut request: Request<Incoming>| {
            let answer = match self.answer(&request) {
                Ok((errand, upgrade, answer)) => {
                    // One connection is upgraded once.
                    let _ = sender.try_send((errand, upgrade, hyper::upgrade::on(&mut request)));
                    answer
                }
                Err(refusal) => refusal,
            };
            async move { Ok::<_, Infallible>(answer) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(GREETING)
            .title_case_headers(true)
            .serve_connection(TokioIo::new(connection), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a streaming client's request broke off");
            return None;
        }
        let (errand, upgrade, upgraded) = upgrading.try_recv().ok()?;
        let parts = upgraded
            .await
            .ok()?
            .downcast::<TokioIo<Connection>>()
            .ok()?;
        let (connection, read) = (parts.io.into_inner(), BytesMut::from(parts.read_buf));
        Some(Session {
            errand,
            upgrade,
            connection,
            read,
        })
    }

    #[allow(
        clippy::result_large_err,
        reason = "both are answers, made once per request"
    )]
    fn answer(
        &self,
        request: &Request<Incoming>,
    ) -> Result<(Errand, Upgrade, Response<String>), Response<String>> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(refusal(StatusCode::METHOD_NOT_ALLOWED, "GET and POST only"));
        }
        let not_found = || {
            refusal(
                StatusCode::NOT_FOUND,
                "no such URL, or it was used already, or it has expired",
            )
        };
        let mut parts = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (Some(path), Some(token)) = (parts.next(), parts.next()) else {
            return Err(not_found());
        };
        let kind = match path {
            "exec" | "attach" => Kind::Command,
            "portforward" => Kind::PortForward,
            _ => return Err(not_found()),
        };
        let agreed = handshake::agree(kind, request.headers());
        let (upgrade, answer) = agreed.map_err(|refusal| refusal.response(kind))?;
        let errand = self
            .tokens
            .take(token)
            .filter(|errand| errand.path() == path);
        let errand = errand.ok_or_else(not_found)?;
        Ok((errand, upgrade, answer))
    }
}

fn refusal(status: StatusCode, text: &str) -> Response<String> {
    let mut response = Response::new(format!("{text}\n"));
    *response.status_mut() = status;
    response
}

/// A connection that has come for its errand.
struct Session {
    errand: Errand,
    upgrade: Upgrade,
    connection: Connection,
    /// What came behind the request already.
    read: BytesMut,
}

impl Session {
    async fn run(self, server: &Streaming, sandboxes: &Sandboxes) {
        let Self {
            errand,
            upgrade,
            connection,
            read,
        } = self;
        let watch = match connection.prepare() {
            Ok(watch) => watch,
            Err(error) => {
                tracing::warn!(%error, "cannot serve a streaming connection");
                return;
            }
        };
        let (from, to) = connection.split();
        let link = |envelope| Link::new(to, watch, envelope, server.idle_timeout);
        match upgrade {
            Upgrade::Spdy { version } => {
                let (spdy, opened) = Spdy::serve(link(Envelope::Plain), Source::Plain(from), read);
                over_spdy(server, sandboxes, errand, &spdy, opened, version).await;
            }
            Upgrade::Tunnel => {
                let source = Source::tunnel(from, read);
                let (spdy, opened) = Spdy::serve(link(Envelope::Tunnel), source, BytesMut::new());
                over_spdy(server, sandboxes, errand, &spdy, opened, 1).await;
            }
            Upgrade::Channels { protocol, version } => {
                let readable = readable(&errand);
                let link = link(Envelope::Messages);
                let websocket = WebSocket::serve(link, from, read, protocol, &readable);
                let work = over_channels(sandboxes, errand, &websocket, version);
                let code = if server.work(websocket.link(), work).await {
                    CLOSE_NORMAL
                } else {
                    CLOSE_GOING_AWAY
                };
                websocket.finish(code).await;
            }
        }
    }
}

impl Streaming {
    /// Works for a client until that is done (true), the client is gone or idle, or the
    /// server is to stop.
    async fn work(&self, link: &Link, work: impl Future<Output = ()>) -> bool {
        tokio::select! {
            () = work => true,
            () = link.gone().cancelled() => false,
            () = link.idle() => {
                tracing::info!(seconds = self.idle_timeout.as_secs(), "a streaming connection was idle for too long");
                false
            }
            () = self.stop.cancelled() => false,
        }
    }
}

async fn over_spdy(
    server: &Streaming,
    sandboxes: &Sandboxes,
    errand: Errand,
    spdy: &Spdy,
    opened: spdy::Opened,
    version: u8,
) {
    let work = async {
        match errand {
            Errand::PortForward { pod, .. } => forward::over_spdy(sandboxes, &pod, opened).await,
            Errand::Command(job, wanted) => {
                let streams = command_streams(opened, wanted, version);
                match tokio::time::timeout(STREAMS, streams).await {
                    Ok(Some(channels)) => channels.serve(sandboxes, &job, wanted).await,
                    Ok(None) => {}
                    Err(_) => tracing::info!("a client did not open its streams"),
                }
            }
        }
    };
    server.work(spdy.link(), work).await;
    spdy.finish().await;
}

/// Waits for the streams that a client of that version opens for a command: the error
/// stream, those it wants, and from v3 on one for the terminal's size.
async fn command_streams(
    mut opened: spdy::Opened,
    wanted: Wanted,
    version: u8,
) -> Option<Channels> {
    let [mut error, mut stdin, mut stdout, mut stderr, mut resize] = [const { None }; 5];
    let expected = [
        true,
        wanted.stdin,
        wanted.stdout,
        wanted.stderr && !wanted.tty,
        wanted.tty && version >= 3,
    ];
    let mut missing = expected.into_iter().filter(|wanted| *wanted).count();
    while missing > 0 {
        let stream = opened.recv().await?;
        let place = match stream.header("streamType") {
            Some("error") => &mut error,
            Some("stdin") => &mut stdin,
            Some("stdout") => &mut stdout,
            Some("stderr") => &mut stderr,
            Some("resize") => &mut resize,
            // Dropping it resets it.
            _ => continue,
        };
        if place.is_none() {
            stream.accept();
            *place = Some(Channel::Spdy(stream));
            missing -= 1;
        }
    }
    // Further streams are of no use, and nobody waits for them: dropping `opened` resets them.
    if version == 1
        && let Some(stdin) = &stdin
    {
        // Clients of v1 wait for this; it only says that nothing is sent to them on it.
        stdin.close().await.ok()?;
    }
    let error = error?;
    Some(Channels {
        stdin,
        stdout,
        stderr,
        resize,
        error,
        status_objects: version >= 4,
    })
}

/// Numbers of the channels of a command. Source: k8s.io/apimachinery `remotecommand`.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// On which channels a client may send.
fn readable(errand: &Errand) -> Vec<bool> {
    match errand {
        Errand::Command(_, wanted) => vec![wanted.stdin, false, false, false, wanted.tty],
        Errand::PortForward { ports, .. } => [true, false].repeat(ports.len()),
    }
}

async fn over_channels(sandboxes: &Sandboxes, errand: Errand, websocket: &WebSocket, version: u8) {
    match errand {
        Errand::PortForward { pod, ports } => {
            forward::over_websocket(sandboxes, &pod, &ports, websocket).await
        }
        Errand::Command(job, wanted) => {
            let channel = |number| Channel::WebSocket(websocket.channel(number));
            let some = |wanted: bool, number| wanted.then(|| channel(number));
            let channels = Channels {
                stdin: some(wanted.stdin, STDIN),
                stdout: some(wanted.stdout, STDOUT),
                stderr: some(wanted.stderr && !wanted.tty, STDERR),
                resize: some(wanted.tty, RESIZE),
                error: channel(ERROR),
                status_objects: version >= 4,
            };
            // An empty message tells the client that it is connected.
            let first = [&channels.stdout, &channels.stderr]
                .into_iter()
                .flatten()
                .next();
            if first.unwrap_or(&channels.error).write(&[]).await.is_ok() {
                channels.serve(sandboxes, &job, wanted).await;
            }
        }
    }
}
