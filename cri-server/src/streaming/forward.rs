//! Port-forward: pairs of streams, each joined to a connection to one of the pod's ports.
//!
//! Each pair is a task of its own. One side's end is passed on as it is (half-close);
//! a connection that breaks resets its own streams and nothing else. Only a port that
//! cannot be reached is worth a message on the error stream: kubectl gives up the whole
//! connection for one.
//!
//! Source: k8s.io/cri-streaming `portforward`; client-go `portforward.go`.

use super::channel::Channel;
use super::dial::{DialError, dial};
use super::fd::Buffer;
use super::spdy::{FRAME_BYTES, Opened, Stream};
use super::splice::Pipe;
use super::websocket::WebSocket;
use crate::rpc;
use crate::wire::spdy::Reset;
use berth_sandbox::service::Sandboxes;
use rustix::net::{SendFlags, Shutdown};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long a client may take to open the second stream of a pair.
/// Source: k8s.io/cri-streaming, `DefaultStreamCreationTimeout`.
pub const PAIRING: Duration = Duration::from_secs(30);

/// A connection of which so much was read at once is worth a pipe, in bytes.
const BUSY_BYTES: usize = 64 << 10;

/// Half a pair.
struct Half {
    stream: Stream,
    is_error: bool,
    until: Instant,
}

/// Forwards what comes over a SPDY connection, until it has no more streams to offer.
pub async fn over_spdy(sandboxes: &Sandboxes, pod: &str, mut opened: Opened) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let next = halves.values().map(|half| half.until).min();
        let late = async {
            match next {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stream = opened.recv() => {
                let Some(stream) = stream else { return };
                if let Some((port, data, error)) = pair(&mut halves, stream) {
                    let (sandboxes, pod) = (sandboxes.clone(), pod.to_owned());
                    forwards.spawn(async move { forward(&sandboxes, &pod, port, data, error).await });
                }
            }
            () = late => {
                let now = Instant::now();
                // Dropping a stream resets it.
                halves.retain(|_, half| half.until > now);
            }
            Some(_) = forwards.join_next() => {}
        }
    }
}

/// Finds the other stream of `stream`'s pair: the port, the data and the error stream.
fn pair(halves: &mut HashMap<String, Half>, stream: Stream) -> Option<(u16, Stream, Stream)> {
    let port = stream.header("port").and_then(|port| port.parse().ok());
    let is_error = match stream.header("streamType") {
        Some("error") => true,
        Some("data") => false,
        _ => return refuse(stream),
    };
    let Some(port) = port.filter(|port| *port != 0) else {
        return refuse(stream);
    };
    // Clients before Kubernetes 1.4 send no ID, and open the error stream right before
    // the data stream.
    let id = match stream.header("requestID") {
        Some(id) if !id.is_empty() => id.to_owned(),
        _ if is_error => format!("stream {}", stream.id()),
        _ => format!("stream {}", stream.id().wrapping_sub(2)),
    };
    stream.accept();
    match halves.remove(&id) {
        Some(other) if other.is_error != is_error => {
            let (data, error) = if is_error {
                (other.stream, stream)
            } else {
                (stream, other.stream)
            };
            Some((port, data, error))
        }
        // The second of a kind: neither can be told from the other.
        Some(_) => None,
        None => {
            let until = Instant::now() + PAIRING;
            halves.insert(
                id,
                Half {
                    stream,
                    is_error,
                    until,
                },
            );
            None
        }
    }
}

fn refuse<T>(stream: Stream) -> Option<T> {
    stream.reset(Reset::Protocol);
    None
}

async fn reach(sandboxes: &Sandboxes, pod: &str, port: u16) -> Result<TcpStream, String> {
    let network = sandboxes.pod_network(pod).map_err(|error| error.chain())?;
    let dialled = dial(&network, port).await;
    dialled.map_err(|error: DialError| rpc::chain(&error))
}

async fn forward(sandboxes: &Sandboxes, pod: &str, port: u16, data: Stream, error: Stream) {
    match reach(sandboxes, pod, port).await {
        Ok(connection) => {
            join(connection, &Channel::Spdy(data)).await;
            // It fails only where the client has gone.
            let _ = error.close().await;
        }
        Err(why) => {
            tracing::debug!(pod, port, why, "a port cannot be forwarded");
            let text = format!("error forwarding port {port} to pod {pod}: {why}");
            let _ = error.write(text.as_bytes()).await;
            let _ = error.close().await;
            data.reset(Reset::Internal);
        }
    }
}

/// Copies both ways until both are over.
async fn join(connection: TcpStream, data: &Channel) {
    // Whatever ends this early, the program is to see a connection that broke, not one
    // that ended; nor may bytes it does not read keep the connection.
    let _ = connection.set_zero_linger();
    let connection = Arc::new(connection);
    // One way that breaks ends the other.
    let outcome = tokio::try_join!(towards_pod(data, &connection), from_pod(&connection, data));
    if outcome.is_ok() {
        let _ = rustix::net::sockopt::set_socket_linger(&*connection, None);
    } else if let Channel::Spdy(stream) = data {
        // Channels of a WebSocket have no way to say it.
        stream.reset(Reset::Cancel);
    }
}

/// The connection broke, or the client broke its stream off.
struct Broke;

/// Nothing goes through any more once this is gone.
struct Passing<'a>(&'a Channel);

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.0.pass(None);
    }
}

async fn towards_pod(data: &Channel, to: &Arc<TcpStream>) -> Result<(), Broke> {
    let _passing = Passing(data);
    data.pass(Some(to.clone()));
    loop {
        match data.read().await {
            Ok(Some(bytes)) => {
                if write_all(to, &bytes).await.is_err() {
                    // It reads no more, but what it wrote before is still worth having:
                    // the other way ends when that is through.
                    data.discard();
                    return Ok(());
                }
            }
            Ok(None) => {
                // Half-close. Gone already is as good.
                let _ = rustix::net::shutdown(&**to, Shutdown::Write);
                return Ok(());
            }
            Err(_) => return Err(Broke),
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let send = || Ok(rustix::net::send(to, bytes, SendFlags::NOSIGNAL)?);
        bytes = &bytes[to.async_io(Interest::WRITABLE, send).await?..];
    }
    Ok(())
}

async fn from_pod(from: &TcpStream, data: &Channel) -> Result<(), Broke> {
    let mut buffer = Buffer::default();
    loop {
        let read = || Ok(rustix::io::read(from, buffer.space())?);
        match from.async_io(Interest::READABLE, read).await {
            Ok(0) => return data.close().await.map_err(|_| Broke),
            Ok(length) => {
                data.write(buffer.filled(length)).await.map_err(|_| Broke)?;
                buffer.done(length);
                if length >= BUSY_BYTES
                    && let Channel::Spdy(stream) = data
                    && stream.can_splice().await
                    && let Ok(pipe) = Pipe::new()
                {
                    return splice_from_pod(from, stream, &pipe).await;
                }
            }
            Err(_) => return Err(Broke),
        }
    }
}

/// As [`from_pod`], with bytes that nobody looks at.
async fn splice_from_pod(from: &TcpStream, stream: &Stream, pipe: &Pipe) -> Result<(), Broke> {
    loop {
        match pipe.fill(from, FRAME_BYTES).await {
            Ok(0) => return stream.close().await.map_err(|_| Broke),
            Ok(length) => stream.splice(pipe, length).await.map_err(|_| Broke)?,
            Err(_) => return Err(Broke),
        }
    }
}

/// Forwards the ports of a WebSocket connection, two channels each: data, and errors.
/// Each channel begins with its port. Source: KEP-4006, k8s.io/cri-streaming `websocket.go`.
pub async fn over_websocket(
    sandboxes: &Sandboxes,
    pod: &str,
    ports: &[u16],
    connection: &WebSocket,
) {
    let mut forwards = JoinSet::new();
    for (at, &port) in (0u8..).step_by(2).zip(ports) {
        let (data, error) = (connection.channel(at), connection.channel(at + 1));
        let (sandboxes, pod) = (sandboxes.clone(), pod.to_owned());
        forwards.spawn(async move {
            for channel in [&data, &error] {
                if channel.write(&port.to_le_bytes()).await.is_err() {
                    return;
                }
            }
            match reach(&sandboxes, &pod, port).await {
                Ok(connection) => join(connection, &Channel::WebSocket(data)).await,
                Err(why) => {
                    let text = format!("error forwarding port {port} to pod {pod}: {why}");
                    let _ = error.write(text.as_bytes()).await;
                }
            }
        });
    }
    while forwards.join_next().await.is_some() {}
}
