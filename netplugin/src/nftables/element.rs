//! One entry of a table's maps: a port of the host and where it leads.
//!
//! ```text
//! key:   [address 4 or 16 bytes,] protocol u8, port u16, each padded to 4 bytes
//! value: address 4 or 16 bytes, port u16, each padded to 4 bytes
//! ```
//! Source: nft(8), "concatenations"; a component starts a new 32 bit register.

use crate::netlink::{Request, push_attribute, push_nested};
use crate::network::Protocol;
use rtnetlink::packet_core::NLM_F_CREATE;
use std::net::IpAddr;

const NEW_ELEMENT: u16 = (10 << 8) | 12;
const DELETE_ELEMENT: u16 = (10 << 8) | 14;
const FAMILY_INET: u8 = 1;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;

/// A port of the host and where it leads. Order and equality are of all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The address of the host it is for; `None` for all of the target's family.
    pub host_ip: Option<IpAddr>,
    /// The transport.
    pub protocol: Protocol,
    /// The host's port.
    pub host_port: u16,
    /// The pod.
    pub target: IpAddr,
    /// The pod's port.
    pub target_port: u16,
}

impl Element {
    /// Which of the table's maps it belongs in.
    pub fn map(&self) -> &'static str {
        match (self.host_ip.is_some(), self.target.is_ipv4()) {
            (true, true) => "hostports4",
            (true, false) => "hostports6",
            (false, true) => "anyports4",
            (false, false) => "anyports6",
        }
    }

    /// "key : value", as nft writes it.
    pub fn text(&self) -> String {
        let ip = self.host_ip.map(|ip| format!("{ip} . "));
        format!(
            "{}{} . {} : {} . {}",
            ip.unwrap_or_default(),
            word(self.protocol),
            self.host_port,
            self.target,
            self.target_port
        )
    }

    fn key(&self) -> Vec<u8> {
        let mut key = Vec::with_capacity(24);
        if let Some(ip) = self.host_ip {
            push_ip(&mut key, ip);
        }
        push_padded(&mut key, &[number(self.protocol)]);
        push_padded(&mut key, &self.host_port.to_be_bytes());
        key
    }

    fn value(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(20);
        push_ip(&mut value, self.target);
        push_padded(&mut value, &self.target_port.to_be_bytes());
        value
    }

    /// Puts it into the map of `table`; one that is there already is fine.
    pub(super) fn addition(&self, table: &str) -> Request {
        self.request(
            "add a host port's element",
            NEW_ELEMENT,
            NLM_F_CREATE,
            table,
        )
    }

    /// Takes it out; it has to be there.
    pub(super) fn deletion(&self, table: &str) -> Request {
        self.request("remove a host port's element", DELETE_ELEMENT, 0, table)
    }

    fn request(&self, what: &'static str, kind: u16, flags: u16, table: &str) -> Request {
        let data = |bytes: &[u8]| {
            let mut data = Vec::with_capacity(32);
            push_attribute(&mut data, DATA_VALUE, bytes);
            data
        };
        let mut element = Vec::with_capacity(80);
        push_nested(&mut element, ELEMENT_KEY, &data(&self.key()));
        push_nested(&mut element, ELEMENT_DATA, &data(&self.value()));
        let mut list = Vec::with_capacity(80);
        push_nested(&mut list, LIST_ELEMENT, &element);
        let mut payload = vec![FAMILY_INET, 0, 0, 0];
        let text = |text: &str| [text.as_bytes(), b"\0"].concat();
        push_attribute(&mut payload, LIST_TABLE, &text(table));
        push_attribute(&mut payload, LIST_SET, &text(self.map()));
        push_nested(&mut payload, LIST_ELEMENTS, &list);
        Request::raw(what, kind, flags, payload)
    }
}

/// The transport's name.
pub fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// The transport's number. Source: IANA, "Protocol Numbers".
pub fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn push_ip(bytes: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(v4) => bytes.extend(v4.octets()),
        IpAddr::V6(v6) => bytes.extend(v6.octets()),
    }
}

fn push_padded(bytes: &mut Vec<u8>, part: &[u8]) {
    bytes.extend(part);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_of_a_key_starts_a_register() {
        let element = Element {
            host_ip: Some("192.0.2.1".parse().unwrap()),
            protocol: Protocol::Sctp,
            host_port: 0x1f90,
            target: "10.0.0.2".parse().unwrap(),
            target_port: 80,
        };
        assert_eq!(
            element.key(),
            [192, 0, 2, 1, 132, 0, 0, 0, 0x1f, 0x90, 0, 0]
        );
        assert_eq!(element.value(), [10, 0, 0, 2, 0, 80, 0, 0]);
        assert_eq!(element.text(), "192.0.2.1 . sctp . 8080 : 10.0.0.2 . 80");
        let any = Element {
            host_ip: None,
            target: "fd00::2".parse().unwrap(),
            ..element
        };
        assert_eq!((any.map(), any.key().len()), ("anyports6", 8));
        assert_eq!(any.value().len(), 20);
    }
}
