//! An address with its prefix length, and what follows from it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// "10.187.0.7/16": an address and the length of its network's prefix.
///
/// Used both for an interface's address (host bits set) and for a subnet (host
/// bits clear, see [`IpNet::network`]). Serialised as text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpNet {
    address: IpAddr,
    prefix: u8,
}

/// The text is no address with a prefix length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address with a prefix length, such as 10.187.0.0/16")]
pub struct BadNet(pub String);

impl IpNet {
    /// `address` in a network of `prefix` bits; `None` when there are not that many.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= bits(address)).then_some(Self { address, prefix })
    }

    /// The address, host bits and all.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Length of the network's prefix in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// True for IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// The same network with its host bits clear.
    pub fn network(&self) -> IpNet {
        IpNet {
            address: from_number(self.first(), self.is_ipv4()),
            prefix: self.prefix,
        }
    }

    /// True when `address` is of this network.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4()
            && (self.first()..=self.last()).contains(&to_number(address))
    }

    /// The network's address number `offset`; `None` beyond its end.
    pub fn nth(&self, offset: u128) -> Option<IpAddr> {
        let number = self.first().checked_add(offset)?;
        (number <= self.last()).then(|| from_number(number, self.is_ipv4()))
    }

    pub(crate) fn first(&self) -> u128 {
        to_number(self.address) & !self.host_mask()
    }

    pub(crate) fn last(&self) -> u128 {
        self.first() | self.host_mask()
    }

    fn host_mask(&self) -> u128 {
        match bits(self.address) - self.prefix {
            128 => u128::MAX,
            host_bits => (1 << host_bits) - 1,
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address as a number, IPv4 in the low 32 bits.
pub(crate) fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The reverse of [`to_number`].
pub(crate) fn from_number(number: u128, ipv4: bool) -> IpAddr {
    if ipv4 {
        // The cut loses nothing: numbers of IPv4 networks have 32 bits.
        IpAddr::V4(Ipv4Addr::from(number as u32))
    } else {
        IpAddr::V6(Ipv6Addr::from(number))
    }
}

impl fmt::Display for IpNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Debug for IpNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for IpNet {
    type Err = BadNet;

    fn from_str(text: &str) -> Result<Self, BadNet> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
            let prefix = digits.then(|| prefix.parse().ok())??;
            IpNet::new(address.parse().ok()?, prefix)
        };
        parse().ok_or_else(|| BadNet(text.into()))
    }
}

impl TryFrom<String> for IpNet {
    type Error = BadNet;
    fn try_from(text: String) -> Result<Self, BadNet> {
        text.parse()
    }
}

impl From<IpNet> for String {
    fn from(net: IpNet) -> String {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_network_knows_its_members() {
        let subnet = net("10.187.3.0/24");
        assert!(subnet.contains("10.187.3.255".parse().unwrap()));
        assert!(!subnet.contains("10.187.4.0".parse().unwrap()));
        assert!(!subnet.contains("::1".parse().unwrap()));
        assert_eq!(subnet.nth(1), Some("10.187.3.1".parse().unwrap()));
        assert_eq!(subnet.nth(256), None);
        assert_eq!(net("fd00::5/64").network(), net("fd00::/64"));
        assert!(net("::/0").contains("ffff::".parse().unwrap()));
        assert!(net("0.0.0.0/0").contains("255.1.1.1".parse().unwrap()));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "::/+1",
        ] {
            assert!(bad.parse::<IpNet>().is_err(), "{bad}");
        }
    }
}
