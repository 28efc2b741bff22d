//! Forgetting the connections of an address that changes hands.
//!
//! ```text
//! answer to a listing: nfgenmsg (family u8, version u8, res_id u16), then attributes
//!   TUPLE_ORIG { TUPLE_IP { V4_SRC | V4_DST | V6_SRC | V6_DST }, TUPLE_PROTO { NUM, SRC_PORT, DST_PORT } }
//!   TUPLE_REPLY { the same }  ID  ZONE ...
//! ```
//! Source: linux/netfilter/nfnetlink_conntrack.h.

use crate::netlink::{NetlinkError, Request, Socket, attributes, push_attribute, push_nested};
use rustix::io::Errno;
use std::net::IpAddr;

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const NFGENMSG_BYTES: usize = 4;
const FAMILY_ANY: u8 = 0;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;

/// Which connections are meant.
#[derive(Clone, Copy, Debug)]
pub enum Which {
    /// Those that have this address at either end, translated or not.
    Of(IpAddr),
    /// Those to this port of any address, as their first packet had it: what
    /// keeps a UDP sender on the way it found before a host port was mapped.
    To {
        /// IP protocol number: 17 is UDP.
        protocol: u8,
        /// The port.
        port: u16,
    },
}

/// Forgets the connections that match one of `which`; how many there were.
///
/// # Errors
/// The kernel's refusal; EOPNOTSUPP and the like where it has no connection
/// tracking count as "none there were".
pub fn forget(which: &[Which]) -> Result<usize, NetlinkError> {
    if which.is_empty() {
        return Ok(0);
    }
    if count() == Some(0) {
        return Ok(0);
    }
    let mut socket = Socket::netfilter()?;
    let mut requests = Vec::new();
    let list = Request::raw(
        "list tracked connections",
        GET,
        0,
        vec![FAMILY_ANY, 0, 0, 0],
    );
    // A busy node tracks hundreds of thousands: only what matches is kept.
    let listed = socket.each(&list, |_, payload| {
        if let Some((header, body)) = payload.split_at_checked(NFGENMSG_BYTES)
            && which.iter().any(|which| matches(which, body))
        {
            requests.push(delete(header[0], body));
        }
    });
    match listed {
        Err(error) if absent(&error) => return Ok(0),
        other => other?,
    }
    for batch in requests.chunks(64) {
        socket.run(batch)?;
    }
    Ok(requests.len())
}

/// How many connections this namespace tracks: where there are none, the kernel's
/// walk through its whole table (5 ms) is saved.
fn count() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").ok()?;
    text.trim().parse().ok()
}

/// The kernel has no connection tracking, or none that can be asked.
fn absent(error: &NetlinkError) -> bool {
    matches!(
        error.errno(),
        Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOENT | Errno::PROTONOSUPPORT)
    )
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn matches(which: &Which, body: &[u8]) -> bool {
    let tuples = [attribute(body, TUPLE_ORIG), attribute(body, TUPLE_REPLY)];
    match which {
        Which::Of(address) => {
            let octets = match address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            // Each of the four kinds in TUPLE_IP is an address.
            tuples
                .into_iter()
                .flatten()
                .filter_map(|tuple| attribute(tuple, TUPLE_IP))
                .any(|ends| attributes(ends).any(|(_, value)| value == octets))
        }
        Which::To { protocol, port } => {
            let Some(proto) = tuples[0].and_then(|tuple| attribute(tuple, TUPLE_PROTO)) else {
                return false;
            };
            attribute(proto, PROTO_NUM) == Some(&[*protocol])
                && attribute(proto, PROTO_DST_PORT) == Some(&port.to_be_bytes())
        }
    }
}

fn delete(family: u8, body: &[u8]) -> Request {
    let mut payload = vec![family, 0, 0, 0];
    for (kind, value) in attributes(body) {
        match kind {
            TUPLE_ORIG => push_nested(&mut payload, kind, value),
            // The ID keeps a newer connection of the same ends from being hit.
            ID | ZONE => push_attribute(&mut payload, kind, value),
            _ => {}
        }
    }
    Request::raw("forget a tracked connection", DELETE, 0, payload).or(Errno::NOENT)
}
