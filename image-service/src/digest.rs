//! Content digests: `sha256:<64 hex digits>` or `sha512:<128 hex digits>`.
//!
//! A [`Digest`] that exists is well formed, so it may be put into a path.
//! Source: OCI image-spec, `descriptor.md`, "Digests" and "Registered
//! Algorithms" (the encoded part of both is lower-case hex).

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use std::fmt;
use std::str::FromStr;

/// The registered algorithms Berth computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// `sha256`, what nearly everybody uses.
    Sha256,
    /// `sha512`.
    Sha512,
}

impl Algorithm {
    /// The name before the colon.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }
}

/// A digest whose algorithm is known and whose hex part has the right length.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: Box<str>,
}

/// A text that is no digest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDigest {
    /// No colon, or the wrong characters or length after it.
    #[error("{0:?} is not a digest: want sha256:<64 lower-case hex digits> or sha512:<128>")]
    Malformed(String),
    /// An algorithm Berth does not compute.
    #[error("digest algorithm {0:?} is not supported, only sha256 and sha512 are")]
    UnknownAlgorithm(String),
}

impl Digest {
    /// The sha256 of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The algorithm before the colon.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hex digits after the colon.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// A hasher of this digest's algorithm.
    pub fn hasher(&self) -> Hasher {
        Hasher::new(self.algorithm)
    }

    /// Checks that `bytes` are what this digest names.
    ///
    /// # Errors
    /// [`Mismatch`] with both digests.
    pub fn verify(&self, bytes: &[u8]) -> Result<(), Mismatch> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.verify(self)
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Digest, BadDigest> {
        let malformed = || BadDigest::Malformed(clipped(text));
        let (name, hex) = text.split_once(':').ok_or_else(malformed)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            // An algorithm's own grammar allows these and no more.
            _ if !name.is_empty()
                && name.bytes().all(|b| {
                    b.is_ascii_lowercase() || b.is_ascii_digit() || b"+._-".contains(&b)
                }) =>
            {
                return Err(BadDigest::UnknownAlgorithm(clipped(name)));
            }
            _ => return Err(malformed()),
        };
        let lower_hex = |b| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if hex.len() != algorithm.hex_len() || !hex.bytes().all(lower_hex) {
            return Err(malformed());
        }
        Ok(Digest {
            algorithm,
            hex: hex.into(),
        })
    }
}

/// Enough of a stranger's text to recognise it in a message.
fn clipped(text: &str) -> String {
    text.chars().take(160).collect()
}

impl TryFrom<String> for Digest {
    type Error = BadDigest;
    fn try_from(text: String) -> Result<Digest, BadDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Content that does not have the digest it was asked for by.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the content's digest is {found}, not {expected}")]
pub struct Mismatch {
    /// What was asked for.
    pub expected: Digest,
    /// What the bytes have.
    pub found: Digest,
}

/// Computes a digest as bytes pass.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new(algorithm: Algorithm) -> Hasher {
        Hasher(match algorithm {
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => State::Sha512(sha2::Sha512::new()),
        })
    }

    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(hasher) => hasher.update(bytes),
            State::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of everything taken in.
    pub fn finish(self) -> Digest {
        match self.0 {
            State::Sha256(hasher) => Digest {
                algorithm: Algorithm::Sha256,
                hex: hex::encode(hasher.finalize()).into(),
            },
            State::Sha512(hasher) => Digest {
                algorithm: Algorithm::Sha512,
                hex: hex::encode(hasher.finalize()).into(),
            },
        }
    }

    /// Checks that everything taken in is what `expected` names.
    ///
    /// # Errors
    /// [`Mismatch`] with both digests.
    pub fn verify(self, expected: &Digest) -> Result<(), Mismatch> {
        let found = self.finish();
        if found == *expected {
            return Ok(());
        }
        Err(Mismatch {
            expected: expected.clone(),
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_parses_and_prints_as_itself() {
        let digest: Digest = EMPTY.parse().unwrap();
        assert_eq!(digest.to_string(), EMPTY);
        assert_eq!(digest, Digest::sha256(b""));
        let long = format!("sha512:{}", "0a".repeat(64));
        assert_eq!(long.parse::<Digest>().unwrap().to_string(), long);
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        for text in [
            "",
            "sha256",
            "sha256:",
            &EMPTY[7..],
            &EMPTY[..EMPTY.len() - 1],
            &EMPTY.to_uppercase(),
            &EMPTY.replace('e', "E"),
            &EMPTY.replace('e', "/"),
            "sha256:../../../../../../../../../../../../../../../../../../../etc/pass",
            "SHA256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ] {
            assert!(
                matches!(text.parse::<Digest>(), Err(BadDigest::Malformed(_))),
                "{text}"
            );
        }
        assert!(matches!(
            "blake3:00".parse::<Digest>(),
            Err(BadDigest::UnknownAlgorithm(_))
        ));
    }

    #[test]
    fn other_bytes_do_not_verify() {
        let digest = Digest::sha256(b"one");
        digest.verify(b"one").unwrap();
        assert_eq!(digest.verify(b"two").unwrap_err().expected, digest);
    }
}
