//! The one nftables table of a bridge.
//!
//! It is written once, as a whole, in one transaction: masquerading, the host
//! ports' maps and the guard of localhost. Pods that come and go change only
//! elements of the maps. An empty chain in it is named after what the table
//! says, so one netlink request tells whether it is there and up to date, also
//! after somebody flushed the host's rules. `nft` is run to write the table; a
//! pod's elements are one netlink transaction, which takes 0.1 ms where running
//! `nft` takes ten.
//!
//! The table accepts nothing that another one drops: where a firewall's FORWARD
//! policy is to drop, it must let the bridge through by a rule of its own.
//!
//! Source: nft(8); linux/netfilter/nf_tables.h.

mod element;

pub use element::{Element, number, word};

use crate::address::IpNet;
use crate::netlink::{NetlinkError, Request, Socket, push_attribute};
use crate::process::{self, ProcessError};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Longest that `nft` may take: it needs milliseconds, but waits for others' transactions.
const NFT_DEADLINE: Duration = Duration::from_secs(20);

/// More elements than this are left to `nft`: what the kernel takes as one
/// datagram is bounded. Source: 212992 bytes by default, net.core.wmem_max.
const BATCH_ELEMENTS: usize = 500;

/// Where `nft` is looked for after PATH: a daemon's PATH may lack sbin.
const USUAL_DIRS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Why the rules are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// There is no `nft` to call.
    #[error("nft is not installed: the package is called nftables")]
    Missing,
    /// It did not run.
    #[error("cannot run nft")]
    Run(#[source] ProcessError),
    /// It refused.
    #[error("nft refused the rules of table {table}: {message}")]
    Refused {
        /// Which table.
        table: String,
        /// What it said.
        message: String,
    },
    /// The kernel refused.
    #[error("cannot change the nftables table {table}")]
    Change {
        /// Which table.
        table: String,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// The kernel does not say what rules there are.
    #[error("cannot look for the nftables table {table}")]
    Look {
        /// Which table.
        table: String,
        /// What the kernel said.
        source: NetlinkError,
    },
}

/// The path of `nft`.
///
/// # Errors
/// `Missing`.
pub fn find() -> Result<PathBuf, NftError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(USUAL_DIRS.iter().map(PathBuf::from))
        .map(|dir| dir.join("nft"))
        .find(|nft| nft.is_file())
        .ok_or(NftError::Missing)
}

/// A bridge's table: its name and what it says.
#[derive(Debug)]
pub struct Table {
    name: String,
    body: String,
    marker: String,
}

impl Table {
    /// The table for the pods of `subnets` behind `bridge`. With `masquerade` what
    /// they send to elsewhere, save to the networks in it, gets the host's address.
    pub fn new(bridge: &str, subnets: &[IpNet], masquerade: Option<&Vec<IpNet>>) -> Self {
        let body = body(bridge, subnets, masquerade.map(Vec::as_slice));
        let marker = format!("rules_{}", &hex::encode(Sha256::digest(&body))[..12]);
        Self {
            name: name(bridge),
            body,
            marker,
        }
    }

    /// Its name in the family inet.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// True when the table is there and says what it should.
    ///
    /// # Errors
    /// `Look`.
    pub fn is_current(&self) -> Result<bool, NftError> {
        const GET_CHAIN: u16 = (10 << 8) | 4;
        const FAMILY_INET: u8 = 1;
        const CHAIN_TABLE: u16 = 1;
        const CHAIN_NAME: u16 = 3;
        let text = |text: &str| [text.as_bytes(), b"\0"].concat();
        let mut payload = vec![FAMILY_INET, 0, 0, 0];
        push_attribute(&mut payload, CHAIN_TABLE, &text(&self.name));
        push_attribute(&mut payload, CHAIN_NAME, &text(&self.marker));
        let ask = Request::raw("look for a chain", GET_CHAIN, 0, payload).or(Errno::NOENT);
        Socket::netfilter()
            .and_then(|mut socket| socket.run(&[ask]))
            .map(|answers| !answers.is_empty())
            .map_err(|source| NftError::Look {
                table: self.name.clone(),
                source,
            })
    }

    /// Replaces the whole table, with `elements` in its maps.
    ///
    /// # Errors
    /// Whatever `nft` has against it; the table is as it was then.
    pub fn replace(&self, elements: &[Element]) -> Result<(), NftError> {
        let name = &self.name;
        // Declared first, so that deleting it works whether or not it was there.
        let mut script = format!(
            "table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n{}\tchain {} {{ }}\n}}\n",
            self.body, self.marker
        );
        script.push_str(&self.each("add", elements));
        self.nft(&script)
    }

    /// Takes `gone` out of the maps and puts `new` in, in one transaction. It
    /// does not matter which of them are there already.
    ///
    /// # Errors
    /// Whatever the kernel has against it; nothing is changed then.
    pub fn change(&self, gone: &[Element], new: &[Element]) -> Result<(), NftError> {
        if gone.is_empty() && new.is_empty() {
            return Ok(());
        }
        if gone.len() + new.len() > BATCH_ELEMENTS {
            let script = [
                self.each("add", gone),
                self.each("delete", gone),
                self.each("add", new),
            ];
            return self.nft(&script.concat());
        }
        // Added first, so that taking one out works whether or not it was there.
        let requests: Vec<Request> = gone
            .iter()
            .flat_map(|gone| [gone.addition(&self.name), gone.deletion(&self.name)])
            .chain(new.iter().map(|new| new.addition(&self.name)))
            .collect();
        Socket::netfilter()
            .and_then(|socket| socket.transact(&requests))
            .map_err(|source| NftError::Change {
                table: self.name.clone(),
                source,
            })
    }

    /// Removes the table, if it is there.
    ///
    /// # Errors
    /// Whatever `nft` has against it.
    pub fn remove(&self) -> Result<(), NftError> {
        let name = &self.name;
        self.nft(&format!("table inet {name}\ndelete table inet {name}\n"))
    }

    fn each(&self, verb: &str, elements: &[Element]) -> String {
        let line = |element: &Element| {
            format!(
                "{verb} element inet {} {} {{ {} }}\n",
                self.name,
                element.map(),
                element.text()
            )
        };
        elements.iter().map(line).collect()
    }

    fn nft(&self, script: &str) -> Result<(), NftError> {
        let mut command = Command::new(find()?);
        command.args(["-f", "-"]).env_clear();
        let done =
            process::run(&mut command, script.as_bytes(), NFT_DEADLINE).map_err(NftError::Run)?;
        if done.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&done.stderr);
        let message = message
            .lines()
            .next()
            .unwrap_or("it did not say why")
            .to_owned();
        Err(NftError::Refused {
            table: self.name.clone(),
            message,
        })
    }
}

/// The table's name; what nft takes for an identifier has no dash.
fn name(bridge: &str) -> String {
    let plain: String = bridge
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    if plain == bridge {
        return format!("berth_{plain}");
    }
    format!(
        "berth_{plain}_{}",
        &hex::encode(Sha256::digest(bridge))[..6]
    )
}

fn body(bridge: &str, subnets: &[IpNet], masquerade: Option<&[IpNet]>) -> String {
    let mut text = format!(
        r#"	comment "the pods behind {bridge}"
	map hostports4 {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
	map hostports6 {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }}
	map anyports4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
	map anyports6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
	chain guard {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{bridge}" ip daddr 127.0.0.0/8 drop
		iifname "{bridge}" ip saddr 127.0.0.0/8 drop
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump hostports
	}}
	chain output {{
		type nat hook output priority -100; policy accept;
		fib daddr type local jump hostports
	}}
	chain hostports {{
		ip6 daddr ::1 return
		dnat ip to ip daddr . meta l4proto . th dport map @hostports4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @hostports6
		meta nfproto ipv4 dnat ip to meta l4proto . th dport map @anyports4
		meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @anyports6
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
"#
    );
    for subnet in subnets.iter().map(IpNet::network) {
        let (family, multicast) = if subnet.is_ipv4() {
            ("ip", "224.0.0.0/4")
        } else {
            ("ip6", "ff00::/8")
        };
        // A pod that comes back to its own network by a host port: the answer must pass here too.
        text.push_str(&format!(
            "\t\t{family} saddr {subnet} {family} daddr {subnet} ct status dnat masquerade\n"
        ));
        if let Some(exceptions) = masquerade {
            for exception in exceptions.iter().map(IpNet::network) {
                if exception.is_ipv4() == subnet.is_ipv4() {
                    text.push_str(&format!(
                        "\t\t{family} saddr {subnet} {family} daddr {exception} return\n"
                    ));
                }
            }
            text.push_str(&format!(
                "\t\t{family} saddr {subnet} {family} daddr != {{ {subnet}, {multicast} }} masquerade\n"
            ));
        }
    }
    text.push_str("\t}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_identifiers_and_differ() {
        assert_eq!(name("berth0"), "berth_berth0");
        assert_ne!(name("a-b"), name("a.b"));
        assert!(name("a-b").starts_with("berth_a_b_"));
    }

    #[test]
    fn another_setting_is_another_marker() {
        let subnet = ["10.0.0.0/8".parse().unwrap()];
        let with = Table::new("b", &subnet, Some(&Vec::new()));
        let again = |subnets: &[IpNet], masquerade: Option<&Vec<IpNet>>| {
            Table::new("b", subnets, masquerade).marker
        };
        assert_eq!(with.marker, again(&subnet, Some(&Vec::new())));
        assert_ne!(with.marker, again(&subnet, Some(&subnet.to_vec())));
        assert_ne!(with.marker, again(&subnet, None));
        assert_ne!(with.marker, again(&[], Some(&Vec::new())));
    }
}
