//! Sees a peer's end of a connection, also while nothing is read from it.
//!
//! A connection is not read while a process does not take its input. If the client dies
//! then, its end waits in the client's kernel behind bytes that do not fit here: nothing
//! of it arrives. On this node the client's socket can be looked at directly; for one
//! elsewhere, keepalive finds out within minutes.
//!
//! Source: sock_diag(7); Linux `tcp_probe_timer`, which gives a dead socket up only when
//! its probes are minutes apart.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a client elsewhere is silent before it is asked for a sign of life, how
/// often then, and how many times.
const SILENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_secs(10);
const TIMES: u32 = 3;

/// Sees the other end of a connection.
pub struct Watch {
    own: OwnedFd,
    /// This end and the other, where the other is on this node.
    ends: Option<(SocketAddr, SocketAddr)>,
}

impl Watch {
    /// Watches `stream`, and has keepalive do so too.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn of(stream: &TcpStream) -> io::Result<Self> {
        sockopt::set_socket_keepalive(stream, true)?;
        sockopt::set_tcp_keepidle(stream, SILENCE)?;
        sockopt::set_tcp_keepintvl(stream, INTERVAL)?;
        sockopt::set_tcp_keepcnt(stream, TIMES)?;
        let (own, other) = (stream.local_addr()?, stream.peer_addr()?);
        let here = other.ip().is_loopback();
        Ok(Self {
            own: stream.as_fd().try_clone_to_owned()?,
            ends: here.then_some((own, other)),
        })
    }

    /// Whether the peer has closed its end, though bytes of its may still wait to be read
    /// or to be sent.
    pub fn peer_has_left(&self) -> bool {
        let mut fds = [PollFd::new(&self.own, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // HUP and ERR come without being asked for.
        if poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
            return true;
        }
        // A kernel without sock_diag cannot say.
        self.ends
            .is_some_and(|(own, other)| is_established(other, own).is_ok_and(|is| !is))
    }
}

const REQUEST_BYTES: usize = 72;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const TCP: u8 = 6;
const TCP_ESTABLISHED: u8 = 1;

/// Whether there is a socket between `local` and `remote`, seen from `local`, that can
/// still send.
fn is_established(local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    let protocol = Some(netlink::SOCK_DIAG);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(
        &socket,
        &request(local, remote),
        SendFlags::empty(),
        &kernel,
    )?;
    // The kernel has answered by the time that the request is sent.
    let mut answer = [0; 512];
    let (length, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    parse(&answer[..length])
}

/// Source: linux/sock_diag.h, linux/inet_diag.h (`inet_diag_req_v2`).
fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let address = |ip: IpAddr| -> [u8; 16] {
        match ip {
            IpAddr::V4(ip) => {
                let mut padded = [0; 16];
                padded[..4].copy_from_slice(&ip.octets());
                padded
            }
            IpAddr::V6(ip) => ip.octets(),
        }
    };
    let family = match local {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let mut bytes = Vec::with_capacity(REQUEST_BYTES);
    bytes.extend_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    // Sequence and sender.
    bytes.extend_from_slice(&[0; 8]);
    // AF_INET and AF_INET6 are small numbers.
    bytes.extend_from_slice(&[family.as_raw() as u8, TCP, 0, 0]);
    // Every state.
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(&local.port().to_be_bytes());
    bytes.extend_from_slice(&remote.port().to_be_bytes());
    bytes.extend_from_slice(&address(local.ip()));
    bytes.extend_from_slice(&address(remote.ip()));
    // Any interface, any cookie.
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[0xff; 8]);
    bytes
}

fn parse(answer: &[u8]) -> io::Result<bool> {
    let kind = answer.get(4..6).and_then(|kind| kind.first_chunk());
    match kind.map(|kind| u16::from_ne_bytes(*kind)) {
        Some(SOCK_DIAG_BY_FAMILY) => Ok(answer.get(17) == Some(&TCP_ESTABLISHED)),
        Some(NLMSG_ERROR) => {
            let code = answer.get(16..20).and_then(|code| code.first_chunk());
            match code.map(|code| i32::from_ne_bytes(*code).wrapping_neg()) {
                Some(code) if code == Errno::NOENT.raw_os_error() => Ok(false),
                Some(code) => Err(io::Error::from_raw_os_error(code)),
                None => Err(io::ErrorKind::InvalidData.into()),
            }
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    async fn pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn a_client_that_left_behind_bytes_that_do_not_fit_is_seen_to_have_left() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (mut client, server) = pair(address).await;
            let watch = Watch::of(&server).unwrap();
            assert!(!watch.peer_has_left());
            let piece = vec![0; 1 << 20];
            while tokio::time::timeout(Duration::from_millis(200), client.write_all(&piece))
                .await
                .is_ok()
            {}
            assert!(!watch.peer_has_left(), "it only waits");
            drop(client);
            assert!(watch.peer_has_left(), "{address}");
        }
    }

    #[tokio::test]
    async fn a_client_that_left_nothing_is_seen_too() {
        let (client, server) = pair("127.0.0.1:0").await;
        let watch = Watch::of(&server).unwrap();
        drop(client);
        assert!(watch.peer_has_left());
    }
}
