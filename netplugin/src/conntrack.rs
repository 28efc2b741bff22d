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
const FILTER: u16 = 25;
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
/// The tuple's source address is to be compared.
const FILTER_SOURCE: u32 = 1;
const V4_SRC: u16 = 1;
const V6_SRC: u16 = 3;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;

/// So many are looked through here. More are left to the kernel, which has no need to
/// copy them (a microsecond each), but walks through its table once for each request.
const LISTED: u64 = 4096;

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

/// Forgets the connections that match one of `which`.
///
/// # Errors
/// The kernel's refusal; EOPNOTSUPP and the like where it has no connection
/// tracking count as "none there were".
pub fn forget(which: &[Which]) -> Result<(), NetlinkError> {
    let tracked = count();
    if which.is_empty() || tracked == Some(0) {
        return Ok(());
    }
    if tracked.is_none_or(|tracked| tracked > LISTED)
        && let Some(requests) = which.iter().map(flushes).collect::<Option<Vec<_>>>()
    {
        match Socket::netfilter()?.run(&requests.concat()) {
            Ok(_) => return Ok(()),
            // Before Linux 6.10 or so connections are not forgotten by address.
            Err(error) if absent(&error) => {}
            Err(error) => return Err(error),
        }
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
        Err(error) if absent(&error) => return Ok(()),
        other => other?,
    }
    for batch in requests.chunks(64) {
        socket.run(batch)?;
    }
    Ok(())
}

/// What makes the kernel forget by itself: those an address began, and those that
/// are answered from it. `None` where it cannot be told so.
///
/// A kernel that does not know filters sees tuples without a protocol, which it refuses.
fn flushes(which: &Which) -> Option<[Request; 2]> {
    let Which::Of(address) = which else {
        return None;
    };
    let (family, source, octets) = match address {
        IpAddr::V4(v4) => (AF_INET, V4_SRC, v4.octets().to_vec()),
        IpAddr::V6(v6) => (AF_INET6, V6_SRC, v6.octets().to_vec()),
    };
    let flush = |tuple: u16, flags: u16| {
        let mut ip = Vec::new();
        push_attribute(&mut ip, source, &octets);
        let mut ends = Vec::new();
        push_nested(&mut ends, TUPLE_IP, &ip);
        let mut filter = Vec::new();
        push_attribute(&mut filter, flags, &FILTER_SOURCE.to_ne_bytes());
        // Version 1: the family counts.
        let mut payload = vec![family, 1, 0, 0];
        push_nested(&mut payload, tuple, &ends);
        push_nested(&mut payload, FILTER, &filter);
        Request::raw("forget an address's connections", DELETE, 0, payload).or(Errno::NOENT)
    };
    Some([
        flush(TUPLE_ORIG, FILTER_ORIG_FLAGS),
        flush(TUPLE_REPLY, FILTER_REPLY_FLAGS),
    ])
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
