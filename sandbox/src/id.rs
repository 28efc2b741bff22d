//! IDs of pods and containers: 64 lower-case hex digits, so that they can be
//! file names, cgroup names and host names of log lines without a check.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::str::FromStr;

/// Not an ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an ID: 64 lower-case hex digits are")]
pub struct BadId(pub String);

fn check(text: &str) -> Result<&str, BadId> {
    let hex = |b| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == 64 && text.bytes().all(hex) {
        Ok(text)
    } else {
        // A hostile ID may be megabytes long; the message need not be.
        Err(BadId(text.chars().take(80).collect()))
    }
}

fn random() -> io::Result<String> {
    let mut bytes = [0u8; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(hex::encode(bytes))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new one, 256 random bits.
            ///
            /// # Errors
            /// What getrandom(2) says; in practice never.
            pub fn random() -> io::Result<Self> {
                random().map(Self)
            }

            /// All 64 digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 13 digits, as crictl shows them.
            pub fn short(&self) -> &str {
                &self.0[..13]
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                check(text).map(|text| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;
            fn try_from(text: String) -> Result<Self, BadId> {
                check(&text)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// Names one pod sandbox on this node for as long as it exists.
    PodId
}
id! {
    /// Names one container on this node for as long as it exists.
    ContainerId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_64_hex_digits_are_an_id() {
        let good = PodId::random().unwrap();
        assert_eq!(good.as_str().parse::<PodId>().unwrap(), good);
        for bad in [
            "",
            "abc",
            "../../etc/passwd",
            &"A".repeat(64),
            &"a".repeat(65),
            &"é".repeat(32),
        ] {
            bad.parse::<ContainerId>().unwrap_err();
        }
        assert_eq!(
            "x".repeat(1 << 20).parse::<PodId>().unwrap_err().0.len(),
            80
        );
    }
}
