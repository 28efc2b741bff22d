//! Secrets to show a registry: those of one pull, and where else they come from.
//!
//! Types that hold a secret show none of it in Debug.

use crate::digest::{Algorithm, Hasher};
use base64::Engine as _;
use std::fmt;
use std::sync::OnceLock;

/// CRI `AuthConfig`: every field may be empty.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// `username:password` in base64.
    pub auth: String,
    /// The host these are for, or its URL; empty: the image's registry and its configured
    /// mirrors, as containerd has it.
    pub server_address: String,
    /// A refresh token to get access tokens with.
    pub identity_token: String,
    /// An access token to send as it is.
    pub registry_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| if text.is_empty() { "" } else { "[redacted]" };
        f.debug_struct("Credentials")
            .field("username", &shown(&self.username))
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

/// The `auth` field is not what it should be. Its content is nowhere in the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCredentials {
    /// Not base64.
    #[error("the credentials' auth field is not base64")]
    Base64,
    /// No colon, or not text.
    #[error("the credentials' auth field is not base64 of username:password")]
    NoPassword,
}

/// What the credentials come down to.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    Basic { username: String, password: String },
    Identity(String),
    Bearer(String),
}

impl Credentials {
    /// What to use, the most specific field that is filled in, in containerd's order.
    pub(crate) fn secret(&self) -> Result<Option<Secret>, BadCredentials> {
        if !self.username.is_empty() {
            return Ok(Some(Secret::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            }));
        }
        if !self.identity_token.is_empty() {
            return Ok(Some(Secret::Identity(self.identity_token.clone())));
        }
        if !self.auth.is_empty() {
            let (username, password) = decode_auth(&self.auth)?;
            return Ok(Some(Secret::Basic { username, password }));
        }
        if !self.registry_token.is_empty() {
            return Ok(Some(Secret::Bearer(self.registry_token.clone())));
        }
        Ok(None)
    }

    /// True when they hold nothing that could be shown.
    pub(crate) fn are_empty(&self) -> bool {
        self.username.is_empty()
            && self.auth.is_empty()
            && self.identity_token.is_empty()
            && self.registry_token.is_empty()
    }

    /// True when they say for which registry they are.
    pub(crate) fn are_addressed(&self) -> bool {
        !self.server_address.trim().is_empty()
    }

    /// True unless `server_address` names another registry than `host`.
    pub(crate) fn are_for(&self, host: &str) -> bool {
        let address = self.server_address.trim();
        let address = address
            .split_once("://")
            .map_or(address, |(_, rest)| rest)
            .split('/')
            .next()
            .unwrap_or_default();
        address.is_empty() || canonical(address) == canonical(host)
    }
}

/// Docker Hub goes by three names.
pub(crate) fn canonical(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    match &*host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".into(),
        _ => host,
    }
}

/// Username and password of the `auth` field: standard base64, strictly, of `username:password`.
pub(crate) fn decode_auth(auth: &str) -> Result<(String, String), BadCredentials> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(auth)
        .map_err(|_| BadCredentials::Base64)?;
    let text = String::from_utf8(bytes).map_err(|_| BadCredentials::NoPassword)?;
    let (username, password) = text.split_once(':').ok_or(BadCredentials::NoPassword)?;
    if username.is_empty() {
        return Err(BadCredentials::NoPassword);
    }
    // Docker's own config files pad the password with NULs.
    Ok((username.into(), password.trim_end_matches('\0').into()))
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Secret::Basic { .. } => "a password",
            Secret::Identity(_) => "an identity token",
            Secret::Bearer(_) => "a registry token",
        })
    }
}

/// Who somebody is to a registry, without saying it: equal for the same secret, and useless
/// outside this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity([u8; 32]);

impl Identity {
    /// Of who shows nothing.
    pub const NOBODY: Identity = Identity([0; 32]);

    /// Of who shows `secret`.
    pub fn of(secret: &Secret) -> Identity {
        match secret {
            Secret::Basic { username, password } => Identity::mark(&["basic", username, password]),
            Secret::Identity(token) => Identity::mark(&["identity", token]),
            Secret::Bearer(token) => Identity::mark(&["bearer", token]),
        }
    }

    /// Of who shows what these programs know.
    pub fn of_helpers(names: &[String]) -> Identity {
        let parts: Vec<&str> = std::iter::once("helpers")
            .chain(names.iter().map(String::as_str))
            .collect();
        Identity::mark(&parts)
    }

    fn mark(parts: &[&str]) -> Identity {
        static SALT: OnceLock<[u8; 32]> = OnceLock::new();
        let salt = SALT.get_or_init(|| {
            let mut salt = [0; 32];
            // Before the kernel has gathered enough randomness this blocks, and it cannot fail
            // otherwise.
            let _ = rustix::rand::getrandom(&mut salt, rustix::rand::GetRandomFlags::empty());
            salt
        });
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(salt);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        let mut mark = [0; 32];
        // The digest is 64 hex digits, so this fills the mark.
        let _ = hex::decode_to_slice(hasher.finish().hex(), &mut mark);
        Identity(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auth_field_is_decoded_strictly() {
        assert_eq!(decode_auth("dTpw"), Ok(("u".into(), "p".into())));
        assert_eq!(decode_auth("dTpwOnEAAA=="), Ok(("u".into(), "p:q".into())));
        assert_eq!(decode_auth("dTo="), Ok(("u".into(), String::new())));
        assert_eq!(decode_auth("dTpw="), Err(BadCredentials::Base64));
        assert_eq!(decode_auth(" dTpw"), Err(BadCredentials::Base64));
        assert_eq!(decode_auth("dQ=="), Err(BadCredentials::NoPassword));
        assert_eq!(decode_auth("OnA="), Err(BadCredentials::NoPassword));
        assert_eq!(decode_auth("/zov"), Err(BadCredentials::NoPassword));
    }

    #[test]
    fn debug_shows_no_secret() {
        let credentials = Credentials {
            username: "secret-u".into(),
            password: "secret-p".into(),
            auth: "secret-a".into(),
            server_address: "registry.example".into(),
            identity_token: "secret-i".into(),
            registry_token: "secret-r".into(),
        };
        let shown = format!("{credentials:?}");
        assert!(!shown.contains("secret-"), "{shown}");
        assert!(shown.contains("registry.example"));
    }

    #[test]
    fn credentials_for_another_registry_are_not_used() {
        let credentials = |address: &str| Credentials {
            server_address: address.into(),
            ..Credentials::default()
        };
        assert!(credentials("").are_for("a.b"));
        assert!(credentials("a.b").are_for("A.b"));
        assert!(credentials("https://a.b:5000/v2/").are_for("a.b:5000"));
        assert!(credentials("https://index.docker.io/v1/").are_for("registry-1.docker.io"));
        assert!(!credentials("a.b").are_for("a.b:5000"));
        assert!(!credentials("b.a").are_for("a.b"));
    }

    #[test]
    fn an_identity_is_of_the_whole_secret() {
        let basic = |username: &str, password: &str| {
            Identity::of(&Secret::Basic {
                username: username.into(),
                password: password.into(),
            })
        };
        assert_eq!(basic("a", "b"), basic("a", "b"));
        for other in [
            basic("a", "c"),
            basic("ab", ""),
            basic("", "ab"),
            Identity::of(&Secret::Identity("ab".into())),
            Identity::of(&Secret::Bearer("ab".into())),
            Identity::NOBODY,
        ] {
            assert_ne!(basic("a", "b"), other);
        }
        let shown = format!("{:?}", Secret::Bearer("secret-r".into()));
        assert!(!shown.contains("secret-"), "{shown}");
    }
}
