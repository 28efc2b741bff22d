//! Signatures as cosign keeps them in a registry.
//!
//! ```text
//! <repository>:sha256-<hex of the image's digest>.sig    an OCI manifest; each layer:
//!   the payload, application/vnd.dev.cosign.simplesigning.v1+json
//!   annotation dev.cosignproject.cosign/signature         base64 of the signature over it
//! payload: {"critical": {"identity": {"docker-reference": "registry.example/team/app"},
//!                        "image": {"docker-manifest-digest": "sha256:..."},
//!                        "type": "cosign container image signature"}, "optional": ...}
//! ```
//! Source: cosign, `specs/SIGNATURE_SPEC.md`.

use super::identity::SignedIdentity;
use super::key::{self, PublicKey};
use crate::digest::Digest;
use crate::reference::Reference;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const CRITICAL_TYPE: &str = "cosign container image signature";
/// Most signatures of one image that are looked at.
const MAX_SIGNATURES: usize = 32;
/// Largest payload, in bytes: they have some 300.
pub(crate) const MAX_PAYLOAD_BYTES: u64 = 64 << 10;

/// One signature and what was signed, kept with the image to be checked again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// The payload, JSON, byte for byte.
    payload: String,
    /// Base64.
    signature: String,
}

/// Where a payload is, and its signature.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub digest: Digest,
    pub signature: String,
}

/// The tag under which cosign keeps the signatures of `digest`.
pub(crate) fn tag_of(digest: &Digest) -> String {
    format!("{}-{}.sig", digest.algorithm().name(), digest.hex())
}

/// The signatures that a manifest under [`tag_of`] lists; other layers are passed over. `None`
/// when it is no manifest.
pub(crate) fn listed(manifest: &[u8]) -> Option<Vec<Listed>> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(default)]
        layers: Vec<Layer>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Layer {
        media_type: String,
        digest: Digest,
        size: u64,
        #[serde(default)]
        annotations: BTreeMap<String, String>,
    }
    let manifest: Manifest = serde_json::from_slice(manifest).ok()?;
    let listed = manifest.layers.into_iter().filter_map(|mut layer| {
        let signature = layer.annotations.remove(ANNOTATION)?;
        (layer.media_type == PAYLOAD_TYPE && layer.size <= MAX_PAYLOAD_BYTES).then_some(Listed {
            digest: layer.digest,
            signature,
        })
    });
    Some(listed.take(MAX_SIGNATURES).collect())
}

/// Reads a manifest of signatures and a payload, for fuzzing.
pub fn exercise(data: &[u8]) {
    assert!(listed(data).is_none_or(|found| found.len() <= MAX_SIGNATURES));
    let _ = serde_json::from_slice::<Payload>(data);
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    identity: Identity,
    image: Image,
    r#type: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    docker_reference: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    docker_manifest_digest: String,
}

impl Signature {
    /// From a payload's bytes and the signature in base64; `None` when the payload is no text.
    pub fn new(payload: Vec<u8>, signature: String) -> Option<Signature> {
        Some(Signature {
            payload: String::from_utf8(payload).ok()?,
            signature,
        })
    }

    /// Whether this is a signature by one of `keys` for an image with one of `digests` under
    /// `reference`; else why not. Nothing of the payload is looked at before its signature is
    /// right.
    pub(super) fn check(
        &self,
        keys: &[PublicKey],
        identity: &SignedIdentity,
        reference: Option<&Reference>,
        digests: &[&Digest],
    ) -> Result<(), String> {
        let signature = key::base64(&self.signature).ok_or("a signature is not base64")?;
        let message = self.payload.as_bytes();
        if !keys.iter().any(|key| key.signed(message, &signature)) {
            return Err("a signature is by another key".into());
        }
        let Payload { critical } = serde_json::from_str(&self.payload)
            .map_err(|_| "what is signed is no statement of cosign's")?;
        if critical.r#type != CRITICAL_TYPE {
            return Err("what is signed is no statement of cosign's".into());
        }
        let signed = &critical.image.docker_manifest_digest;
        if !digests.iter().any(|digest| digest.to_string() == *signed) {
            return Err("a signature is for another image".into());
        }
        let name = &critical.identity.docker_reference;
        if !identity.matches(reference, name) {
            let name: String = name.chars().take(200).collect();
            return Err(format!("a signature is for the name {name:?}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use rcgen::{KeyPair, SigningKey as _};
    use serde_json::json;

    fn payload(name: &str, digest: &str, kind: &str) -> String {
        json!({"critical": {"identity": {"docker-reference": name},
            "image": {"docker-manifest-digest": digest}, "type": kind}, "optional": null})
        .to_string()
    }

    #[test]
    fn a_signature_counts_for_its_key_image_and_name_only() {
        let (pair, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let key = PublicKey::from_pem(pair.public_key_pem().as_bytes()).unwrap();
        let digest = Digest::sha256(b"image");
        let sign = |pair: &KeyPair, payload: &str| {
            let signature = pair.sign(payload.as_bytes()).unwrap();
            let signature = base64::engine::general_purpose::STANDARD.encode(signature);
            Signature::new(payload.into(), signature).unwrap()
        };
        let good = payload("a.b/c", &digest.to_string(), CRITICAL_TYPE);
        let reference: Reference = "a.b/c:1".parse().unwrap();
        let check = |signature: &Signature| {
            let identity = SignedIdentity::AsSigned;
            let keys = std::slice::from_ref(&key);
            signature.check(keys, &identity, Some(&reference), &[&digest])
        };
        assert_eq!(check(&sign(&pair, &good)), Ok(()));
        let mut changed = sign(&pair, &good);
        changed.payload = changed.payload.replace("a.b/c", "a.b/d");
        let elsewhere = payload("a.b/c", &Digest::sha256(b"x").to_string(), CRITICAL_TYPE);
        for (signature, why) in [
            (sign(&other, &good), "another key"),
            (changed, "another key"),
            (sign(&pair, &elsewhere), "another image"),
            (
                sign(&pair, &payload("a.b/d", &digest.to_string(), CRITICAL_TYPE)),
                "\"a.b/d\"",
            ),
            (
                sign(&pair, &payload("a.b/c", &digest.to_string(), "other")),
                "no statement",
            ),
            (sign(&pair, "{}"), "no statement"),
            (Signature::new(good.into(), "!".into()).unwrap(), "base64"),
        ] {
            let said = check(&signature).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn payloads_are_found_among_the_layers() {
        let digest = Digest::sha256(b"p");
        let layer = |media_type: &str, size: u64, annotated: bool| {
            let annotations = if annotated {
                json!({ANNOTATION: "c2ln"})
            } else {
                json!({})
            };
            json!({"mediaType": media_type, "digest": digest, "size": size, "annotations": annotations})
        };
        let manifest = json!({"layers": [
            layer(PAYLOAD_TYPE, 7, true), layer("x", 7, true),
            layer(PAYLOAD_TYPE, 7, false), layer(PAYLOAD_TYPE, 1 << 30, true)]});
        let found = listed(manifest.to_string().as_bytes()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].digest, &*found[0].signature), (&digest, "c2ln"));
        assert_eq!(listed(b"no manifest"), None);
        let many = json!({"layers": vec![layer(PAYLOAD_TYPE, 7, true); 100]}).to_string();
        assert_eq!(listed(many.as_bytes()).unwrap().len(), MAX_SIGNATURES);
        assert_eq!(tag_of(&digest), format!("sha256-{}.sig", digest.hex()));
    }
}
