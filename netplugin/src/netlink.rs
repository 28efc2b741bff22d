//! Asking the kernel over netlink, one blocking socket at a time.
//!
//! Several requests go out as one datagram: the kernel works through them in
//! order and answers each, so a pod's whole interface is one system call. The
//! messages themselves are rtnetlink's; its connection is not used, because it
//! wants an async runtime and gives no batches.
//!
//! ```text
//! nlmsghdr: length u32 | type u16 | flags u16 | sequence u32 | port u32, then the payload
//! attribute: length u16 | type u16, then the value, padded to 4 bytes
//! ```
//! Source: netlink(7); RFC 3549; linux/netlink.h.

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::time::Duration;

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;

/// Kinds of netlink's own answers. Source: linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The error carries attributes. Source: linux/netlink.h.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The attribute of an error that holds the kernel's sentence.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// The two highest bits of an attribute's type are flags.
const ATTRIBUTE_TYPE_MASK: u16 = 0x3fff;
const ATTRIBUTE_NESTED: u16 = 0x8000;

/// More than any answer datagram of the kernel: dumps come in pieces of at most
/// 32 KiB. Source: netlink_dump() in Linux.
const RECEIVE_BYTES: usize = 64 << 10;

/// The kernel works through requests while they are sent, however long that
/// takes; an answer that is not there at once is lost.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket itself failed.
    #[error("the netlink socket failed")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {what}{}", if .message.is_empty() { String::new() } else { format!(" ({message})") })]
    Refused {
        /// What was asked, as "make the bridge".
        what: &'static str,
        /// The kernel's sentence on it; often empty.
        message: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's answer cannot be read.
    #[error("cannot read the kernel's answer to: {what}")]
    Answer {
        /// What was asked.
        what: &'static str,
    },
}

impl NetlinkError {
    /// The kernel's error number, if it is the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            NetlinkError::Refused { source, .. } => Errno::from_io_error(source),
            NetlinkError::Socket(_) | NetlinkError::Answer { .. } => None,
        }
    }
}

/// One request to the kernel.
#[derive(Clone, Debug)]
pub struct Request {
    what: &'static str,
    kind: u16,
    flags: u16,
    payload: Vec<u8>,
    /// An error that counts as success.
    unless: Option<Errno>,
}

impl Request {
    /// A request of `kind`; `flags` beside NLM_F_REQUEST and NLM_F_ACK. `what`
    /// completes "cannot ...".
    pub fn raw(what: &'static str, kind: u16, flags: u16, payload: Vec<u8>) -> Self {
        Self {
            what,
            kind,
            flags,
            payload,
            unless: None,
        }
    }

    /// A request about links, addresses or routes.
    pub fn route(what: &'static str, flags: u16, message: RouteNetlinkMessage) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        Self::raw(what, message.message_type(), flags, payload)
    }

    /// The same, but `errno` is as good as done: EEXIST where it must only be there.
    pub fn or(mut self, errno: Errno) -> Self {
        self.unless = Some(errno);
        self
    }
}

/// One message of an answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its netlink type.
    pub kind: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// A blocking netlink socket of the namespace it was opened in.
pub struct Socket {
    socket: rtnetlink::sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// For links, addresses and routes.
    ///
    /// # Errors
    /// `Socket` where the kernel gives none.
    pub fn route() -> Result<Self, NetlinkError> {
        Self::open(NETLINK_ROUTE)
    }

    /// For nftables and connection tracking.
    ///
    /// # Errors
    /// `Socket` where the kernel gives none.
    pub fn netfilter() -> Result<Self, NetlinkError> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let open = || {
            let socket = rtnetlink::sys::Socket::new(protocol)?;
            // Both are there since Linux 4.12 and only make errors say more and be shorter.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_DEADLINE))?;
            Ok(Self {
                socket,
                sequence: 0,
                buffer: vec![0; RECEIVE_BYTES],
            })
        };
        open().map_err(NetlinkError::Socket)
    }

    /// Carries out `requests` in order and returns what came back beside the
    /// acknowledgements. The kernel does not stop at one that fails.
    ///
    /// # Errors
    /// `Refused` for the first that failed.
    pub fn run(&mut self, requests: &[Request]) -> Result<Vec<Answer>, NetlinkError> {
        let first = self.send(requests, NLM_F_ACK)?;
        let mut answers = Vec::new();
        let mut failure = None;
        let mut open = requests.len();
        while open > 0 {
            self.receive(|header, payload, flags| {
                let Some(request) = header
                    .sequence_number
                    .checked_sub(first)
                    .and_then(|at| requests.get(at as usize))
                else {
                    return;
                };
                if header.message_type != NLMSG_ERROR {
                    answers.push(Answer {
                        kind: header.message_type,
                        payload: payload.to_vec(),
                    });
                    return;
                }
                open -= 1;
                let refused = refusal(request, payload, flags);
                if failure.is_none() {
                    failure = refused;
                }
            })?;
        }
        failure.map_or(Ok(answers), Err)
    }

    /// Carries out all of `requests` to nftables or none of them. For one
    /// transaction: the socket is used up.
    ///
    /// # Errors
    /// `Refused` for the first that failed, or for all of it.
    pub fn transact(mut self, requests: &[Request]) -> Result<(), NetlinkError> {
        const BATCH_BEGIN: u16 = 0x10;
        const BATCH_END: u16 = 0x11;
        // nfgenmsg of no family, version 0, for the subsystem 10 of nftables.
        let batch = |kind| Request::raw("begin a transaction", kind, 0, vec![0, 0, 0, 10]);
        let Some(last) = requests.len().checked_sub(1) else {
            return Ok(());
        };
        let mut all = vec![batch(BATCH_BEGIN)];
        all.extend_from_slice(requests);
        // One acknowledgement tells of success; failures tell of themselves.
        all[last + 1].flags |= NLM_F_ACK;
        all.push(batch(BATCH_END));
        let first = self.send(&all, 0)?;
        let mut result = None;
        while result.is_none() {
            self.receive(|header, payload, flags| {
                let at = header.sequence_number.checked_sub(first);
                let Some(request) = at.and_then(|at| all.get(at as usize)) else {
                    return;
                };
                if header.message_type != NLMSG_ERROR || matches!(result, Some(Err(_))) {
                    return;
                }
                result = Some(refusal(request, payload, flags).map_or(Ok(()), Err));
            })?;
        }
        result.unwrap_or(Ok(()))
    }

    /// All that the kernel lists in answer to `request`.
    ///
    /// # Errors
    /// `Refused` where it lists nothing.
    pub fn list(&mut self, request: &Request) -> Result<Vec<Answer>, NetlinkError> {
        let mut answers = Vec::new();
        self.each(request, |kind, payload| {
            answers.push(Answer {
                kind,
                payload: payload.to_vec(),
            });
        })?;
        Ok(answers)
    }

    /// Hands type and payload of each thing the kernel lists to `take`: for
    /// lists that may be longer than one wants to keep.
    ///
    /// # Errors
    /// `Refused` where it lists nothing.
    pub fn each(
        &mut self,
        request: &Request,
        mut take: impl FnMut(u16, &[u8]),
    ) -> Result<(), NetlinkError> {
        let first = self.send(std::slice::from_ref(request), NLM_F_DUMP)?;
        let mut failure = None;
        let mut done = false;
        while !done {
            self.receive(|header, payload, flags| {
                if header.sequence_number != first {
                    return;
                }
                match header.message_type {
                    NLMSG_DONE => done = true,
                    NLMSG_ERROR => {
                        done = true;
                        failure = refusal(request, payload, flags);
                    }
                    kind => take(kind, payload),
                }
            })?;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Sends all as one datagram; the first one's sequence number.
    fn send(&mut self, requests: &[Request], flags: u16) -> Result<u32, NetlinkError> {
        let first = self.sequence + 1;
        let mut datagram = Vec::with_capacity(512);
        for request in requests {
            self.sequence += 1;
            let length = HEADER_BYTES + request.payload.len();
            datagram.extend((length as u32).to_ne_bytes());
            datagram.extend(request.kind.to_ne_bytes());
            datagram.extend((NLM_F_REQUEST | flags | request.flags).to_ne_bytes());
            datagram.extend(self.sequence.to_ne_bytes());
            datagram.extend(0u32.to_ne_bytes());
            datagram.extend(&request.payload);
            datagram.resize(datagram.len().next_multiple_of(4), 0);
        }
        rustix::net::send(&self.socket, &datagram, SendFlags::empty())
            .map_err(|errno| NetlinkError::Socket(errno.into()))?;
        Ok(first)
    }

    /// Hands each message of the next datagram to `each`.
    fn receive(
        &mut self,
        mut each: impl FnMut(&NetlinkHeader, &[u8], u16),
    ) -> Result<(), NetlinkError> {
        let (length, _) = loop {
            match rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                other => break other.map_err(|errno| NetlinkError::Socket(errno.into()))?,
            }
        };
        let mut rest = &self.buffer[..length];
        while let Some((header, payload)) = split_message(rest) {
            each(&header, payload, header.flags);
            let whole = (header.length as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[whole..];
        }
        Ok(())
    }
}

/// The first message of `bytes`, if it is whole.
fn split_message(bytes: &[u8]) -> Option<(NetlinkHeader, &[u8])> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let mut header = NetlinkHeader::default();
    header.length = u32_at(0)?;
    header.message_type = u16_at(4)?;
    header.flags = u16_at(6)?;
    header.sequence_number = u32_at(8)?;
    header.port_number = u32_at(12)?;
    let payload = bytes.get(HEADER_BYTES..header.length as usize)?;
    Some((header, payload))
}

/// What an NLMSG_ERROR says; `None` for an acknowledgement.
fn refusal(request: &Request, payload: &[u8], flags: u16) -> Option<NetlinkError> {
    let what = request.what;
    let Some(code) = payload
        .first_chunk::<4>()
        .map(|code| i32::from_ne_bytes(*code))
    else {
        return Some(NetlinkError::Answer { what });
    };
    if code == 0
        || request
            .unless
            .is_some_and(|errno| errno.raw_os_error() == -code)
    {
        return None;
    }
    // The request's header is echoed between the code and the attributes.
    let told = payload
        .get(4 + HEADER_BYTES..)
        .filter(|_| flags & NLM_F_ACK_TLVS != 0);
    let message = told
        .and_then(|bytes| attributes(bytes).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG))
        .map(|(_, text)| {
            String::from_utf8_lossy(text)
                .trim_end_matches('\0')
                .to_owned()
        });
    Some(NetlinkError::Refused {
        what,
        message: message.unwrap_or_default(),
        source: io::Error::from_raw_os_error(-code),
    })
}

/// What the kernel says of links, addresses or routes.
///
/// # Errors
/// `Answer` when it is none of these.
pub fn parse_route(
    what: &'static str,
    answer: &Answer,
) -> Result<RouteNetlinkMessage, NetlinkError> {
    let mut header = NetlinkHeader::default();
    header.message_type = answer.kind;
    RouteNetlinkMessage::deserialize(&header, &answer.payload)
        .map_err(|_| NetlinkError::Answer { what })
}

/// Type and value of each attribute in `bytes`; ends at the first that is not whole.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & ATTRIBUTE_TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
        Some((kind, value))
    })
}

/// Appends an attribute.
pub fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = ATTRIBUTE_HEADER_BYTES + value.len();
    bytes.extend((length as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Appends an attribute that holds attributes.
pub fn push_nested(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    push_attribute(bytes, kind | ATTRIBUTE_NESTED, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, 1, b"abc");
        push_nested(&mut bytes, 2, &[]);
        push_attribute(&mut bytes, 3, &[9; 4]);
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(1, &b"abc"[..]), (2, &[]), (3, &[9; 4])]);
        for cut in 0..bytes.len() {
            assert!(attributes(&bytes[..cut]).count() <= 3);
        }
    }

    #[test]
    fn a_cut_message_is_no_message() {
        let mut bytes = 20u32.to_ne_bytes().to_vec();
        bytes.resize(20, 0);
        assert!(split_message(&bytes).is_some());
        assert!(split_message(&bytes[..19]).is_none());
        assert!(
            split_message(&[0; 16]).is_none(),
            "shorter than its own header"
        );
    }

    #[test]
    fn the_kernel_lists_the_loopback_interface() {
        use rtnetlink::packet_route::link::LinkMessage;
        let mut socket = Socket::route().unwrap();
        let ask = Request::route(
            "list links",
            0,
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        );
        let links = socket.list(&ask).unwrap();
        assert!(links.iter().any(|answer| matches!(
            parse_route("list links", answer),
            Ok(RouteNetlinkMessage::NewLink(link)) if link.header.index == 1
        )));
    }
}
