//! Public keys that images are signed with: PEM of SubjectPublicKeyInfo.
//!
//! ECDSA on P-256 and P-384, Ed25519, RSA of 2048 to 8192 bits (PKCS #1 v1.5), hashed with
//! SHA-256 where the algorithm hashes: what cosign writes.
//! Source: RFC 5280, 4.1 (SubjectPublicKeyInfo); RFC 5480, RFC 8410, RFC 8017 (identifiers);
//! X.690 (DER).

use base64::Engine as _;
use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};

type Algorithms = &'static [&'static dyn VerificationAlgorithm];

static ON_P256: Algorithms = &[&signature::ECDSA_P256_SHA256_ASN1];
static ON_P384: Algorithms = &[
    &signature::ECDSA_P384_SHA256_ASN1,
    &signature::ECDSA_P384_SHA384_ASN1,
];
static WITH_ED25519: Algorithms = &[&signature::ED25519];
static WITH_RSA: Algorithms = &[&signature::RSA_PKCS1_2048_8192_SHA256];

/// A key and what is signed with it.
pub(super) struct PublicKey {
    algorithms: Algorithms,
    key: Vec<u8>,
}

/// A file that is no key, or none we can use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadKey {
    #[error("it is not a PEM file with a public key (-----BEGIN PUBLIC KEY-----)")]
    Pem,
    #[error("the public key in it is damaged")]
    Der,
    #[error(
        "the key's algorithm is not supported, only ECDSA on P-256 and P-384, Ed25519 and RSA are"
    )]
    Algorithm,
}

const EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;
const BIT_STRING: u8 = 0x03;

impl PublicKey {
    /// The first public key of a PEM file.
    pub fn from_pem(text: &[u8]) -> Result<PublicKey, BadKey> {
        let text = std::str::from_utf8(text).map_err(|_| BadKey::Pem)?;
        let (_, rest) = text
            .split_once("-----BEGIN PUBLIC KEY-----")
            .ok_or(BadKey::Pem)?;
        let (body, _) = rest
            .split_once("-----END PUBLIC KEY-----")
            .ok_or(BadKey::Pem)?;
        let der = base64(body).ok_or(BadKey::Pem)?;
        PublicKey::from_der(&der)
    }

    fn from_der(der: &[u8]) -> Result<PublicKey, BadKey> {
        let (info, after) = element(der, SEQUENCE).ok_or(BadKey::Der)?;
        let (algorithm, rest) = element(info, SEQUENCE).ok_or(BadKey::Der)?;
        let (bits, end) = element(rest, BIT_STRING).ok_or(BadKey::Der)?;
        let (kind, parameters) = element(algorithm, OBJECT_IDENTIFIER).ok_or(BadKey::Der)?;
        if !after.is_empty() || !end.is_empty() {
            return Err(BadKey::Der);
        }
        // The first octet counts the unused bits of the last one.
        let Some((0, key)) = bits.split_first() else {
            return Err(BadKey::Der);
        };
        let algorithms = match kind {
            EC => {
                let (curve, _) = element(parameters, OBJECT_IDENTIFIER).ok_or(BadKey::Der)?;
                match curve {
                    P256 => ON_P256,
                    P384 => ON_P384,
                    _ => return Err(BadKey::Algorithm),
                }
            }
            ED25519 => WITH_ED25519,
            RSA => WITH_RSA,
            _ => return Err(BadKey::Algorithm),
        };
        Ok(PublicKey {
            algorithms,
            key: key.into(),
        })
    }

    /// Whether `signature` is this key's over `message`.
    pub fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.algorithms.iter().any(|algorithm| {
            UnparsedPublicKey::new(*algorithm, &self.key)
                .verify(message, signature)
                .is_ok()
        })
    }
}

/// Standard base64, whatever white space is in it.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let bare: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    base64::engine::general_purpose::STANDARD.decode(bare).ok()
}

/// The content of the first element, which must have `tag`, and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = der.split_first()?;
    let (length, rest) = rest.split_first()?;
    if *found != tag {
        return None;
    }
    let (length, rest) = match usize::from(*length) {
        short @ 0..0x80 => (short, rest),
        long => {
            let count = long & 0x7f;
            if count == 0 || count > 4 {
                return None;
            }
            let (digits, rest) = rest.split_at_checked(count)?;
            let length = digits
                .iter()
                .fold(0usize, |sum, b| sum << 8 | usize::from(*b));
            (length, rest)
        }
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{KeyPair, SigningKey as _};

    #[test]
    fn every_kind_of_key_tells_its_own_signatures() {
        for algorithm in [
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ED25519,
        ] {
            let pair = KeyPair::generate_for(algorithm).unwrap();
            let key = PublicKey::from_pem(pair.public_key_pem().as_bytes()).unwrap();
            let signature = pair.sign(b"message").unwrap();
            assert!(key.signed(b"message", &signature));
            assert!(!key.signed(b"massage", &signature));
            assert!(!key.signed(b"message", &signature[1..]));
            let other = KeyPair::generate_for(algorithm).unwrap();
            assert!(!key.signed(b"message", &other.sign(b"message").unwrap()));
        }
    }

    /// Made with `openssl genrsa`, `openssl dgst -sha256 -sign`, over "message".
    #[test]
    fn a_rsa_key_tells_its_signatures() {
        let key = PublicKey::from_pem(include_bytes!("testdata/rsa.pub")).unwrap();
        let signature = base64(include_str!("testdata/rsa.sig")).unwrap();
        assert!(key.signed(b"message", &signature));
        assert!(!key.signed(b"massage", &signature));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bad in [
            "",
            "-----BEGIN PUBLIC KEY-----",
            "-----BEGIN PUBLIC KEY-----!-----END PUBLIC KEY-----",
        ] {
            assert_eq!(PublicKey::from_pem(bad.as_bytes()).err(), Some(BadKey::Pem));
        }
        let pem =
            |text: &str| format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n");
        assert_eq!(
            PublicKey::from_pem(pem("AAAA").as_bytes()).err(),
            Some(BadKey::Der)
        );
        // An X25519 key.
        let other = "MCowBQYDK2VuAyEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        assert_eq!(
            PublicKey::from_pem(pem(other).as_bytes()).err(),
            Some(BadKey::Algorithm)
        );
    }

    proptest! {
        #[test]
        fn no_der_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(key) = PublicKey::from_der(&bytes) {
                key.signed(b"message", &bytes);
            }
        }
    }
}
