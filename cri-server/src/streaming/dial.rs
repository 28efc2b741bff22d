//! Connections to the ports of a pod, from inside its network.
//!
//! A socket belongs to the network namespace it was made in, wherever it is used from:
//! a thread that lives for this only enters the namespace and makes it. No program is
//! run in the pod.

use berth_sandbox::service::PodNetwork;
use berth_sys::namespace::{Kind, join};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

/// How long a program may take to accept: its queue may be full for a moment.
const ACCEPT: Duration = Duration::from_secs(30);

/// Why there is no connection to a pod's port.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("cannot enter the pod's network")]
    Namespace(#[source] io::Error),
    #[error("nothing on localhost accepts on port {port}, neither over IPv4 nor IPv6")]
    Refused { port: u16, source: io::Error },
}

/// Connects to `port` of localhost in a pod's network, over IPv4, else over IPv6.
///
/// # Errors
/// See [`DialError`].
pub async fn dial(network: &PodNetwork, port: u16) -> Result<TcpStream, DialError> {
    let addresses = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    ];
    let mut first = None;
    for address in addresses {
        let socket = match socket(network, address).await {
            Ok(socket) => socket,
            // A node without IPv6 has no such sockets.
            Err(error) if first.is_none() => return Err(DialError::Namespace(error)),
            Err(_) => break,
        };
        match connect(socket, SocketAddr::new(address, port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    let source = first.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into());
    Err(DialError::Refused { port, source })
}

async fn connect(socket: OwnedFd, address: SocketAddr) -> io::Result<TcpStream> {
    super::transport::unpaced(&socket);
    let socket = TcpSocket::from_std_stream(socket.into());
    let stream = tokio::time::timeout(ACCEPT, socket.connect(address))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn socket(network: &PodNetwork, address: IpAddr) -> io::Result<OwnedFd> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let make = move || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(rustix::net::socket_with(
            family,
            SocketType::STREAM,
            flags,
            None,
        )?)
    };
    let path = match network {
        PodNetwork::Host => return make(),
        PodNetwork::Own(path) => path.clone(),
    };
    let (sender, made) = oneshot::channel();
    std::thread::Builder::new()
        .name("netns-dial".into())
        .spawn(move || {
            // The thread ends in whatever namespace it came to: nobody else finds itself there.
            let socket = enter(&path).and_then(|()| make());
            let _ = sender.send(socket);
        })?;
    made.await.map_err(io::Error::other)?
}

fn enter(path: &Path) -> io::Result<()> {
    let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(join(namespace, Kind::Net)?)
}
