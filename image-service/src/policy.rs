//! Which images this node takes: a policy by registry and repository, in the format of
//! containers-policy.json.
//!
//! ```json
//! {"default": [{"type": "insecureAcceptAnything"}],
//!  "transports": {"docker": {
//!    "registry.example/team": [{"type": "sigstoreSigned", "keyPath": "/etc/berth/team.pub"}],
//!    "*.untrusted.example": [{"type": "reject"}]}}}
//! ```
//! The most specific scope counts: the reference itself, its repository, each part above it, the
//! host, `*.` and a domain, `""`; then `default`. All requirements of a scope must hold.
//! `signedIdentity` may be any of the format's; without one a signature is for its repository,
//! and where it names a tag, for that tag. Without a file everything is accepted.
//!
//! The file and its keys are read anew for every check: at a pull, and again when a container is
//! created from an image that is here already, against the signatures its pull kept. What a
//! policy wants that we cannot check (GPG's `signedBy`, Fulcio, Rekor) is an error, never passed
//! over. An unknown key is an error.
//! Source: containers-policy.json(5).

mod identity;
mod key;
pub mod signature;

pub use signature::Signature;

use crate::digest::Digest;
use crate::pull::Kind;
use crate::reference::Reference;
use identity::SignedIdentity;
use key::PublicKey;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Largest policy file, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Largest key file, in bytes: a RSA key of 8192 bits has 1.4 KiB.
const MAX_KEY_BYTES: u64 = 64 << 10;

/// Why an image is not accepted, or the policy cannot tell.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("cannot read the policy {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what the format says, or wants what we cannot check.
    #[error("the policy {path} cannot be used: {why}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A key it names.
    #[error("the policy's key {path} cannot be used: {why}")]
    Key {
        /// The file, or the policy's when the key is in it.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The policy says no.
    #[error("the policy {} rejects {scope:?}", path.display())]
    Rejected {
        /// The scope that counts.
        scope: String,
        /// The policy.
        path: PathBuf,
    },
    /// There is no signature at all.
    #[error("the policy {} wants a signature for {scope:?} and the image has none", path.display())]
    Unsigned {
        /// The scope that counts.
        scope: String,
        /// The policy.
        path: PathBuf,
    },
    /// There are signatures, none of which counts.
    #[error("the policy {} wants a signature for {scope:?} and none of the image's counts: {why}", path.display())]
    BadSignature {
        /// The scope that counts.
        scope: String,
        /// The policy.
        path: PathBuf,
        /// What is wrong with each.
        why: String,
    },
}

impl PolicyError {
    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        match self {
            PolicyError::Read { .. } | PolicyError::Invalid { .. } | PolicyError::Key { .. } => {
                Kind::Configuration
            }
            PolicyError::Rejected { .. }
            | PolicyError::Unsigned { .. }
            | PolicyError::BadSignature { .. } => Kind::Untrusted,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    default: Vec<RawRequirement>,
    #[serde(default)]
    transports: BTreeMap<String, BTreeMap<String, Vec<RawRequirement>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawRequirement {
    r#type: String,
    key_path: Option<PathBuf>,
    key_paths: Option<Vec<PathBuf>>,
    key_data: Option<String>,
    key_datas: Option<Vec<String>>,
    signed_identity: Option<identity::RawIdentity>,
    // Known to the format; what it means cannot be checked here.
    key_type: Option<String>,
    fulcio: Option<serde_json::Value>,
    pki: Option<serde_json::Value>,
    rekor_public_key_path: Option<serde_json::Value>,
    rekor_public_key_paths: Option<serde_json::Value>,
    rekor_public_key_data: Option<serde_json::Value>,
    rekor_public_key_datas: Option<serde_json::Value>,
}

enum Requirement {
    Accept,
    Reject,
    Signed(Signed),
}

/// A signature by one of these keys.
struct Signed {
    keys: Vec<PublicKey>,
    identity: SignedIdentity,
}

/// The policy as it is now.
pub struct Policy {
    /// `None` when there is no file.
    path: Option<PathBuf>,
    default: Vec<Requirement>,
    scopes: BTreeMap<String, Vec<Requirement>>,
}

/// What the policy says of one reference.
pub struct Decision<'a> {
    path: &'a Path,
    scope: String,
    requirements: &'a [Requirement],
}

impl Policy {
    /// Reads `path`, which need not be there, and the keys it names. Blocking.
    ///
    /// # Errors
    /// [`PolicyError::Read`], [`PolicyError::Invalid`], [`PolicyError::Key`].
    pub fn load(path: Option<&Path>) -> Result<Policy, PolicyError> {
        let accept_all = Policy {
            path: None,
            default: vec![Requirement::Accept],
            scopes: BTreeMap::new(),
        };
        let Some(path) = path else {
            return Ok(accept_all);
        };
        match bounded(path, MAX_FILE_BYTES) {
            Ok(text) => Policy::parse(path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(accept_all),
            Err(source) => Err(PolicyError::Read {
                path: path.into(),
                source,
            }),
        }
    }

    /// Parses the file's text, reading the keys it names.
    ///
    /// # Errors
    /// [`PolicyError::Invalid`], [`PolicyError::Key`].
    pub fn parse(path: &Path, text: &[u8]) -> Result<Policy, PolicyError> {
        let invalid = |why: String| PolicyError::Invalid {
            path: path.into(),
            why,
        };
        let raw: RawPolicy =
            serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))?;
        let requirements = |raw: Vec<RawRequirement>| {
            if raw.is_empty() {
                return Err(invalid("a scope has no requirement".into()));
            }
            raw.into_iter()
                .map(|requirement| convert(path, requirement))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut scopes = BTreeMap::new();
        for (transport, raw) in raw.transports {
            for (scope, raw) in raw {
                let converted = requirements(raw)?;
                // Registries are the one transport there is here.
                if transport == "docker" {
                    scopes.insert(scope, converted);
                }
            }
        }
        Ok(Policy {
            path: Some(path.into()),
            default: requirements(raw.default)?,
            scopes,
        })
    }

    /// What counts for `reference`.
    pub fn decision(&self, reference: &Reference) -> Decision<'_> {
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        for scope in scopes_of(reference) {
            if let Some(requirements) = self.scopes.get(&scope) {
                return Decision {
                    path,
                    scope,
                    requirements,
                };
            }
        }
        Decision {
            path,
            scope: "default".into(),
            requirements: &self.default,
        }
    }

    /// What counts for an image that no registry has given a name.
    pub fn decision_for_nameless(&self) -> Decision<'_> {
        Decision {
            path: self.path.as_deref().unwrap_or(Path::new("")),
            scope: "default".into(),
            requirements: &self.default,
        }
    }

    /// What the policy is, in one line, for `berth doctor`.
    pub fn summary(&self) -> String {
        let Some(path) = &self.path else {
            return "no policy: images are accepted from every registry, signed or not".into();
        };
        let accepts = |requirements: &[Requirement]| {
            requirements
                .iter()
                .all(|requirement| matches!(requirement, Requirement::Accept))
        };
        let strict = self.scopes.values().filter(|scope| !accepts(scope)).count();
        let otherwise = if accepts(&self.default) {
            "everything else is accepted, signed or not"
        } else {
            "nothing else is accepted unchecked"
        };
        format!(
            "{}: {strict} of {} scopes reject or want signatures; {otherwise}",
            path.display(),
            self.scopes.len()
        )
    }

    /// True when every image of every registry is accepted unchecked.
    pub fn accepts_everything(&self) -> bool {
        self.scopes
            .values()
            .chain([&self.default])
            .flatten()
            .all(|requirement| matches!(requirement, Requirement::Accept))
    }
}

impl Decision<'_> {
    /// True when no signature is looked at: everything is accepted, or rejected.
    pub fn needs_no_signature(&self) -> bool {
        !self
            .requirements
            .iter()
            .any(|requirement| matches!(requirement, Requirement::Signed(_)))
    }

    /// In words, for `berth explain pull`.
    pub fn summary(&self) -> String {
        let words: Vec<&str> = self
            .requirements
            .iter()
            .map(|requirement| match requirement {
                Requirement::Accept => "accept",
                Requirement::Reject => "reject",
                Requirement::Signed(_) => "signature by key",
            })
            .collect();
        let words = words.join(" and ");
        if self.path.as_os_str().is_empty() {
            return format!("{words} (no policy file)");
        }
        format!("{words} ({}, scope {:?})", self.path.display(), self.scope)
    }

    /// Whether an image is accepted. `digests` are its own: of its index and of its manifest.
    ///
    /// # Errors
    /// [`PolicyError::Rejected`], [`PolicyError::Unsigned`], [`PolicyError::BadSignature`].
    pub fn check(
        &self,
        reference: Option<&Reference>,
        digests: &[&Digest],
        signatures: &[Signature],
    ) -> Result<(), PolicyError> {
        for requirement in self.requirements {
            match requirement {
                Requirement::Accept => {}
                Requirement::Reject => {
                    return Err(PolicyError::Rejected {
                        scope: self.scope.clone(),
                        path: self.path.into(),
                    });
                }
                Requirement::Signed(signed) => {
                    self.check_signed(signed, reference, digests, signatures)?;
                }
            }
        }
        Ok(())
    }

    fn check_signed(
        &self,
        signed: &Signed,
        reference: Option<&Reference>,
        digests: &[&Digest],
        signatures: &[Signature],
    ) -> Result<(), PolicyError> {
        let mut wrong = Vec::new();
        for signature in signatures {
            match signature.check(&signed.keys, &signed.identity, reference, digests) {
                Ok(()) => return Ok(()),
                Err(why) if !wrong.contains(&why) => wrong.push(why),
                Err(_) => {}
            }
        }
        if signatures.is_empty() {
            return Err(PolicyError::Unsigned {
                scope: self.scope.clone(),
                path: self.path.into(),
            });
        }
        Err(PolicyError::BadSignature {
            scope: self.scope.clone(),
            path: self.path.into(),
            why: wrong.join("; "),
        })
    }
}

fn convert(path: &Path, raw: RawRequirement) -> Result<Requirement, PolicyError> {
    let invalid = |why: String| PolicyError::Invalid {
        path: path.into(),
        why,
    };
    let has_keys = raw.key_path.is_some()
        || raw.key_paths.is_some()
        || raw.key_data.is_some()
        || raw.key_datas.is_some();
    match raw.r#type.as_str() {
        "insecureAcceptAnything" | "reject" => {
            if has_keys || raw.signed_identity.is_some() {
                return Err(invalid(format!("type {:?} has no keys", raw.r#type)));
            }
            Ok(if raw.r#type == "reject" {
                Requirement::Reject
            } else {
                Requirement::Accept
            })
        }
        "sigstoreSigned" => {
            let unsupported = [
                ("fulcio", raw.fulcio.is_some()),
                ("pki", raw.pki.is_some()),
                ("rekorPublicKeyPath", raw.rekor_public_key_path.is_some()),
                ("rekorPublicKeyPaths", raw.rekor_public_key_paths.is_some()),
                ("rekorPublicKeyData", raw.rekor_public_key_data.is_some()),
                ("rekorPublicKeyDatas", raw.rekor_public_key_datas.is_some()),
                ("keyType", raw.key_type.is_some()),
            ];
            if let Some((name, _)) = unsupported.iter().find(|(_, given)| *given) {
                return Err(invalid(format!(
                    "{name} of sigstoreSigned is not supported, signatures are checked by key"
                )));
            }
            let mut keys = Vec::new();
            for file in raw
                .key_path
                .into_iter()
                .chain(raw.key_paths.unwrap_or_default())
            {
                let failed = |why: String| PolicyError::Key {
                    path: file.clone(),
                    why,
                };
                let text =
                    bounded(&file, MAX_KEY_BYTES).map_err(|error| failed(error.to_string()))?;
                keys.push(PublicKey::from_pem(&text).map_err(|bad| failed(bad.to_string()))?);
            }
            for data in raw
                .key_data
                .into_iter()
                .chain(raw.key_datas.unwrap_or_default())
            {
                let failed = |why: String| PolicyError::Key {
                    path: path.into(),
                    why,
                };
                let text =
                    key::base64(&data).ok_or_else(|| failed("keyData is not base64".into()))?;
                keys.push(PublicKey::from_pem(&text).map_err(|bad| failed(bad.to_string()))?);
            }
            if keys.is_empty() {
                return Err(invalid("sigstoreSigned names no key".into()));
            }
            Ok(Requirement::Signed(Signed {
                keys,
                identity: SignedIdentity::from_raw(raw.signed_identity).map_err(invalid)?,
            }))
        }
        other => Err(invalid(format!(
            "requirements of type {other:?} are not supported, only insecureAcceptAnything, reject and sigstoreSigned are"
        ))),
    }
}

/// What may name a reference in the policy, the most specific first.
fn scopes_of(reference: &Reference) -> Vec<String> {
    let name = reference.name();
    let mut scopes = Vec::new();
    if let Some(digest) = reference.digest() {
        scopes.push(format!("{name}@{digest}"));
    }
    if let Some(tag) = reference.tag() {
        scopes.push(format!("{name}:{tag}"));
    }
    let mut part = name.as_str();
    scopes.push(part.to_owned());
    while let Some((above, _)) = part.rsplit_once('/') {
        scopes.push(above.to_owned());
        part = above;
    }
    // Wildcards stand for hosts without their port.
    let mut domain = reference.host().split(':').next().unwrap_or_default();
    while let Some((_, above)) = domain.split_once('.') {
        scopes.push(format!("*.{above}"));
        domain = above;
    }
    scopes.push(String::new());
    scopes
}

fn bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let length = std::fs::metadata(path)?.len();
    if length > most {
        return Err(io::Error::other(format!("{length} bytes long")));
    }
    std::fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<Policy, String> {
        Policy::parse(Path::new("/c/policy.json"), text.as_bytes())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_most_specific_scope_counts() {
        let accept = r#"[{"type": "insecureAcceptAnything"}]"#;
        let reject = r#"[{"type": "reject"}]"#;
        let policy = policy(&format!(
            r#"{{"default": {reject}, "transports": {{
                "docker-archive": {{"": {reject}}},
                "docker": {{"a.b": {accept}, "a.b/team": {reject}, "a.b/team/app:1": {accept},
                           "*.c.d": {accept}, "x.c.d:5000": {reject}}}}}}}"#
        ))
        .unwrap();
        for (name, accepted) in [
            ("a.b/x", true),
            ("a.b/team/app:2", false),
            ("a.b/team/app:1", true),
            ("a.b/teams/app", true),
            ("y.x.c.d/z", true),
            ("c.d/z", false),
            ("x.c.d:5000/z", false),
            ("x.c.d:5001/z", true),
            ("other/z", false),
        ] {
            let reference: Reference = name.parse().unwrap();
            let decision = policy.decision(&reference);
            let verdict = decision.check(Some(&reference), &[], &[]);
            assert_eq!(verdict.is_ok(), accepted, "{name}");
        }
        assert!(!policy.accepts_everything());
        assert!(
            policy.summary().contains("nothing else"),
            "{}",
            policy.summary()
        );
        let nobody = Policy::load(Some(Path::new("/nonexistent/policy.json"))).unwrap();
        assert!(nobody.accepts_everything());
        assert!(nobody.summary().starts_with("no policy"));
    }

    #[test]
    fn what_cannot_be_checked_is_refused() {
        for (text, expected) in [
            ("", "cannot be used"),
            ("{}", "default"),
            (r#"{"default": []}"#, "no requirement"),
            (
                r#"{"default": [{"type": "reject"}], "defualt": []}"#,
                "defualt",
            ),
            (
                r#"{"default": [{"type": "signedBy", "keyType": "GPGKeys"}]}"#,
                "signedBy",
            ),
            (
                r#"{"default": [{"type": "reject", "keyPath": "/k"}]}"#,
                "no keys",
            ),
            (
                r#"{"default": [{"type": "sigstoreSigned"}]}"#,
                "names no key",
            ),
            (
                r#"{"default": [{"type": "sigstoreSigned", "fulcio": {}}]}"#,
                "fulcio",
            ),
            (
                r#"{"default": [{"type": "sigstoreSigned", "keyPath": "/nonexistent/k"}]}"#,
                "/nonexistent/k",
            ),
            (
                r#"{"default": [{"type": "sigstoreSigned", "keyData": "!"}]}"#,
                "not base64",
            ),
            (
                r#"{"default": [{"type": "sigstoreSigned", "keyData": "AAAA"}]}"#,
                "PEM",
            ),
            (
                r#"{"default": [{"type": "reject"}], "transports": {"docker": {"a": [{"type": "x"}]}}}"#,
                "\"x\"",
            ),
        ] {
            let error = policy(text).err().unwrap();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
