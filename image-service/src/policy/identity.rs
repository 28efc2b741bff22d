//! Which signatures are for which references: `signedIdentity` of a policy.
//! Source: containers-policy.json(5), "signedBy", "signedIdentity".

use crate::reference::Reference;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawIdentity {
    r#type: String,
    docker_reference: Option<String>,
    docker_repository: Option<String>,
    prefix: Option<String>,
    signed_prefix: Option<String>,
}

/// What a signature must name to count for a reference.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SignedIdentity {
    /// Its repository, and its tag where the signature names one: cosign signs repositories.
    AsSigned,
    /// The same repository and tag.
    Exact,
    /// For a reference by digest its repository, else the same repository and tag.
    RepoDigestOrExact,
    /// Its repository.
    Repository,
    /// Always this reference.
    Reference(Reference),
    /// Always this repository.
    ThisRepository(String),
    /// As `RepoDigestOrExact`, for names below the first with the second in its place.
    Remapped(String, String),
}

impl SignedIdentity {
    pub fn from_raw(raw: Option<RawIdentity>) -> Result<SignedIdentity, String> {
        let Some(raw) = raw else {
            return Ok(SignedIdentity::AsSigned);
        };
        let kind = raw.r#type.as_str();
        let needed = |value: &Option<String>, name: &str| {
            value
                .clone()
                .ok_or_else(|| format!("signedIdentity {kind} needs {name}"))
        };
        let reference = |text: String| {
            text.parse::<Reference>()
                .map_err(|error| format!("signedIdentity {kind}: {error}"))
        };
        Ok(match kind {
            "matchExact" => SignedIdentity::Exact,
            "matchRepoDigestOrExact" => SignedIdentity::RepoDigestOrExact,
            "matchRepository" => SignedIdentity::Repository,
            "exactReference" => {
                let text = needed(&raw.docker_reference, "dockerReference")?;
                SignedIdentity::Reference(reference(text)?)
            }
            "exactRepository" => {
                let text = needed(&raw.docker_repository, "dockerRepository")?;
                SignedIdentity::ThisRepository(reference(text)?.name())
            }
            "remapIdentity" => SignedIdentity::Remapped(
                needed(&raw.prefix, "prefix")?,
                needed(&raw.signed_prefix, "signedPrefix")?,
            ),
            other => return Err(format!("signedIdentity {other:?} is not known")),
        })
    }

    /// Whether a signature that names `signed` counts for `reference`; one without a name has no
    /// image of its own, so only fixed identities can be its.
    pub fn matches(&self, reference: Option<&Reference>, signed: &str) -> bool {
        let Ok(named) = signed.parse::<Reference>() else {
            return false;
        };
        let last = signed.rsplit('/').next().unwrap_or_default();
        let has_tag = last.contains([':', '@']);
        let same = |a: &Reference, b: &Reference| {
            a.name() == b.name() && a.tag() == b.tag() && a.digest() == b.digest()
        };
        let repo_or_exact = |reference: &Reference, signed: &Reference| {
            reference.name() == signed.name()
                && (reference.digest().is_some() || (has_tag && same(reference, signed)))
        };
        match self {
            SignedIdentity::Reference(fixed) => has_tag && same(fixed, &named),
            SignedIdentity::ThisRepository(fixed) => *fixed == named.name(),
            SignedIdentity::AsSigned => reference.is_some_and(|reference| {
                reference.name() == named.name()
                    && (!has_tag || reference.digest().is_some() || same(reference, &named))
            }),
            SignedIdentity::Exact => reference.is_some_and(|r| has_tag && same(r, &named)),
            SignedIdentity::RepoDigestOrExact => {
                reference.is_some_and(|r| repo_or_exact(r, &named))
            }
            SignedIdentity::Repository => reference.is_some_and(|r| r.name() == named.name()),
            SignedIdentity::Remapped(prefix, signed_prefix) => {
                reference.is_some_and(|r| match remap(r, prefix, signed_prefix) {
                    Some(remapped) => repo_or_exact(&remapped, &named),
                    None => repo_or_exact(r, &named),
                })
            }
        }
    }
}

fn remap(reference: &Reference, prefix: &str, signed_prefix: &str) -> Option<Reference> {
    let text = reference.to_string();
    let rest = text.strip_prefix(prefix)?;
    if !(rest.is_empty() || rest.starts_with(['/', ':', '@'])) {
        return None;
    }
    format!("{signed_prefix}{rest}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> Result<SignedIdentity, String> {
        SignedIdentity::from_raw(serde_json::from_str(text).map_err(|e| e.to_string())?)
    }

    #[test]
    fn identities_match_as_the_format_says() {
        let digest = format!("a.b/c@sha256:{}", "0".repeat(64));
        let exact = r#"{"type": "matchExact"}"#;
        let either = r#"{"type": "matchRepoDigestOrExact"}"#;
        let repository = r#"{"type": "matchRepository"}"#;
        let fixed = r#"{"type": "exactReference", "dockerReference": "x.y/z:1"}"#;
        let this = r#"{"type": "exactRepository", "dockerRepository": "x.y/z"}"#;
        let remap = r#"{"type": "remapIdentity", "prefix": "a.b", "signedPrefix": "x.y/m"}"#;
        for (kind, reference, signed, expected) in [
            ("null", "a.b/c:1", "a.b/c", true),
            ("null", "a.b/c:1", "a.b/c:1", true),
            ("null", "a.b/c:1", "a.b/c:2", false),
            ("null", "a.b/c:1", "a.b/d", false),
            ("null", "a.b/c:1", "", false),
            ("null", &digest, "a.b/c:2", true),
            (exact, "a.b/c:1", "a.b/c:1", true),
            (exact, "a.b/c:1", "a.b/c", false),
            (exact, "a.b/c", "a.b/c", false),
            (either, "a.b/c:1", "a.b/c:1", true),
            (either, "a.b/c:1", "a.b/c", false),
            (either, &digest, "a.b/c:9", true),
            (either, &digest, "a.b/d", false),
            (repository, "a.b/c:1", "a.b/c:2", true),
            (repository, "a.b/c:1", "a.b/d:1", false),
            (fixed, "a.b/c:1", "x.y/z:1", true),
            (fixed, "a.b/c:1", "a.b/c:1", false),
            (this, "a.b/c:1", "x.y/z:7", true),
            (remap, "a.b/c:1", "x.y/m/c:1", true),
            (remap, "a.b/c:1", "a.b/c:1", false),
            (remap, "e.f/c:1", "e.f/c:1", true),
        ] {
            let reference: Reference = reference.parse().unwrap();
            let found = identity(kind).unwrap().matches(Some(&reference), signed);
            assert_eq!(found, expected, "{kind} {reference} {signed}");
        }
        assert!(identity(this).unwrap().matches(None, "x.y/z"));
        assert!(!identity("null").unwrap().matches(None, "x.y/z"));
        for bad in [
            r#"{"type": "matchAnything"}"#,
            r#"{"type": "exactReference"}"#,
            r#"{"type": "exactRepository", "dockerRepository": "A B"}"#,
            r#"{"type": "matchExact", "x": 1}"#,
        ] {
            assert!(identity(bad).is_err(), "{bad}");
        }
    }
}
