//! Bandwidth limits of one pod.
//!
//! ```text
//! to the pod:    bridge ──> host's end [tbf] ──> pod
//! from the pod:  pod ──> host's end [ingress: all of it is sent out of ifb] ──> ifb [tbf] ──> bridge
//! ```
//!
//! A token bucket delays what is too much, and drops what would wait longer
//! than [`LATENCY`]. Both are on the host, where the pod cannot change them. The
//! ifb device has the alias of the pod's host end, so that gc knows it.
//!
//! Source: tc-tbf(8), tc-u32(8), tc-mirred(8); linux/pkt_sched.h, linux/pkt_cls.h,
//! linux/tc_act/tc_mirred.h.

use super::error::NetError;
use super::link::{find_link, new_link};
use super::veth::Pair;
use crate::bandwidth;
use crate::netlink::{NetlinkError, Request, Socket, push_attribute};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};
use rustix::io::Errno;
use std::time::Duration;

/// How long a packet may wait for its turn. Source: the plugin `bandwidth`.
const LATENCY: Duration = Duration::from_millis(25);

/// Bursts from here on are placeholders.
const NO_BURST: u64 = i32::MAX as u64;

const NEW_QDISC: u16 = 36;
const NEW_FILTER: u16 = 44;
const ROOT: u32 = 0xffff_ffff;
const INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const TBF_HANDLE: u32 = 1 << 16;
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const LINKLAYER_ETHERNET: u8 = 1;
const U32_SEL: u16 = 5;
const U32_ACT: u16 = 7;
const U32_TERMINAL: u8 = 1;
const ACT_KIND: u16 = 1;
const ACT_OPTIONS: u16 = 2;
const MIRRED_PARMS: u16 = 2;
const MIRRED_EGRESS_REDIRECT: u32 = 1;
const ACT_STOLEN: u32 = 4;
const ALL_PROTOCOLS: u16 = 3;

/// Limits what passes `host`, the pair's end on the host.
pub(super) fn limit(
    socket: &mut Socket,
    host: &str,
    ifb: &str,
    alias: &str,
    pair: &Pair<'_>,
) -> Result<(), NetError> {
    let limits = pair.request.bandwidth;
    let gone = || NetlinkError::Answer {
        what: "look for the host's end",
    };
    let host = find_link(socket, host)?.ok_or_else(gone)?.header.index;
    if limits.ingress_rate != 0 {
        let what = "limit what the pod receives";
        let bucket = bucket(limits.ingress_rate, limits.ingress_burst, pair.mtu);
        run(socket, &[tbf(what, host, bucket)])?;
    }
    if limits.egress_rate != 0 {
        let create = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Ifb)
            .name(ifb)
            .mtu(pair.mtu)
            .build();
        let up = LinkUnspec::new_with_name(ifb).up().build();
        let alias = LinkMessageBuilder::<LinkUnspec>::new()
            .name(ifb)
            .alias(alias)
            .build();
        run(
            socket,
            &[
                new_link(
                    "make the ifb device that limits what the pod sends",
                    NLM_F_CREATE | NLM_F_EXCL,
                    create,
                ),
                new_link("name the ifb device's owner", 0, alias),
                new_link("bring the ifb device up", 0, up),
            ],
        )?;
        let ifb = find_link(socket, ifb)?.ok_or_else(gone)?.header.index;
        let bucket = bucket(limits.egress_rate, limits.egress_burst, pair.mtu);
        run(
            socket,
            &[
                tbf("limit what the pod sends", ifb, bucket),
                ingress(host),
                redirect(host, ifb),
            ],
        )?;
    }
    Ok(())
}

/// A kernel without one of the parts says so with one of these.
fn run(socket: &mut Socket, requests: &[Request]) -> Result<(), NetError> {
    match socket.run(requests) {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.errno() {
            Some(Errno::NOENT | Errno::OPNOTSUPP | Errno::NODEV) => NetError::NoShaping(error),
            _ => error.into(),
        }),
    }
}

/// A token bucket in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    /// Per second.
    rate: u64,
    burst: u32,
    /// What may wait.
    queue: u32,
}

fn bucket(rate_bits: u64, burst_bits: u64, mtu: u32) -> Bucket {
    // The largest 31 or 32 bit number is what containerd and CRI-O send because plugins want one:
    // with half a gigabyte at once there would be no limit.
    let burst_bits = match burst_bits {
        0 | NO_BURST.. => bandwidth::burst(rate_bits),
        asked => asked,
    };
    let cut = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let rate = (rate_bits / 8).max(1);
    // One that no packet fits in lets nothing through at all.
    let burst = cut(burst_bits / 8).max(mtu + 64);
    let waiting = u128::from(rate) * LATENCY.as_millis() / 1000;
    let waiting = u64::try_from(waiting).unwrap_or(u64::MAX);
    Bucket {
        rate,
        burst,
        queue: cut(waiting.saturating_add(u64::from(burst))),
    }
}

/// `tcmsg`: family u8, padding, interface i32, handle, parent and info u32.
fn message(
    what: &'static str,
    kind: u16,
    [index, handle, parent, info]: [u32; 4],
    name: &str,
    options: &[u8],
) -> Request {
    let mut payload = vec![0; 4];
    for number in [index, handle, parent, info] {
        payload.extend(number.to_ne_bytes());
    }
    push_attribute(&mut payload, KIND, &[name.as_bytes(), b"\0"].concat());
    if !options.is_empty() {
        push_attribute(&mut payload, OPTIONS, options);
    }
    Request::raw(what, kind, NLM_F_CREATE | NLM_F_EXCL, payload)
}

fn tbf(what: &'static str, index: u32, bucket: Bucket) -> Request {
    // tc_tbf_qopt: two tc_ratespec (cell_log u8, linklayer u8, overhead u16, cell_align i16,
    // mpu u16, rate u32), of which the second is the peak rate; limit, buffer and mtu u32.
    let rate32 = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
    let mut parms = vec![0, LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parms.extend(rate32.to_ne_bytes());
    parms.extend([0; 12]);
    parms.extend(bucket.queue.to_ne_bytes());
    parms.extend([0; 8]);
    let mut options = Vec::new();
    push_attribute(&mut options, TBF_PARMS, &parms);
    push_attribute(&mut options, TBF_BURST, &bucket.burst.to_ne_bytes());
    if u64::from(rate32) != bucket.rate {
        push_attribute(&mut options, TBF_RATE64, &bucket.rate.to_ne_bytes());
    }
    message(
        what,
        NEW_QDISC,
        [index, TBF_HANDLE, ROOT, 0],
        "tbf",
        &options,
    )
}

fn ingress(index: u32) -> Request {
    let what = "see what the pod sends";
    message(
        what,
        NEW_QDISC,
        [index, INGRESS_HANDLE, INGRESS, 0],
        "ingress",
        &[],
    )
}

/// Every packet that comes in by `from` goes out of `to`, and from there on.
fn redirect(from: u32, to: u32) -> Request {
    // tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex, each 32 bits.
    let mirred: Vec<u8> = [0, 0, ACT_STOLEN, 0, 0, MIRRED_EGRESS_REDIRECT, to]
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect();
    let mut parms = Vec::new();
    push_attribute(&mut parms, MIRRED_PARMS, &mirred);
    let mut action = Vec::new();
    push_attribute(&mut action, ACT_KIND, b"mirred\0");
    push_attribute(&mut action, ACT_OPTIONS, &parms);
    let mut actions = Vec::new();
    push_attribute(&mut actions, 1, &action);
    // tc_u32_sel: flags u8, offshift u8, nkeys u8, then 12 bytes that are not used here,
    // and one tc_u32_key that masks all away.
    let mut selector = vec![U32_TERMINAL, 0, 1];
    selector.resize(16 + 16, 0);
    let mut options = Vec::new();
    push_attribute(&mut options, U32_SEL, &selector);
    push_attribute(&mut options, U32_ACT, &actions);
    let info = (1 << 16) | u32::from(ALL_PROTOCOLS.to_be());
    message(
        "lead what the pod sends through the limit",
        NEW_FILTER,
        [from, 0, INGRESS_HANDLE, info],
        "u32",
        &options,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_never_too_small_for_a_packet_and_fits_the_kernels_numbers() {
        let small = bucket(1_000, 1, 9000);
        assert_eq!((small.rate, small.burst), (125, 9064));
        let usual = bucket(100_000_000, 0, 1500);
        assert_eq!((usual.rate, usual.burst), (12_500_000, 1_250_000));
        assert_eq!(usual.queue, 1_250_000 + 312_500);
        assert_eq!(bucket(100_000_000, u64::from(u32::MAX), 1500), usual);
        let large = bucket(1_000_000_000_000_000, u64::MAX, 1500);
        assert_eq!((large.burst, large.queue), (i32::MAX as u32 / 8, u32::MAX));
    }
}
