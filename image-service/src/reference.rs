//! Image references: what a pod spec calls an image.
//!
//! ```text
//! reference := name [ ":" tag ] [ "@" digest ]
//! name      := [ host [ ":" port ] "/" ] component { "/" component }
//! component := alnum { ( "." | "_" | "__" | "-"+ ) alnum }      alnum = [a-z0-9]+
//! tag       := [A-Za-z0-9_] [A-Za-z0-9_.-]{0,127}
//! ```
//! The first component is a host when it has a dot, a colon, a bracket or an upper-case
//! letter, or is `localhost`; without a host it is `docker.io`, there `library/` stands before
//! a name of one component; without tag and digest the tag is `latest`.
//! Source: distribution `reference` grammar (distribution-spec 1.1, "Pulling manifests", for
//! `<name>` and tags); the defaults are Docker's, which the kubelet relies on.

use crate::digest::{BadDigest, Digest};
use std::fmt;
use std::str::FromStr;

/// The registry of names that name none.
pub const DEFAULT_HOST: &str = "docker.io";
/// The tag of names with neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";

/// Longest reference looked at, in bytes: the longest name, tag and digest and some slack.
const MAX_REFERENCE_BYTES: usize = 1024;
/// Longest repository, in bytes. Source: distribution `reference`, `RepositoryNameTotalLengthMax`.
const MAX_REPOSITORY_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;
/// Longest DNS name, in bytes. Source: RFC 1035, 2.3.4.
const MAX_HOST_BYTES: usize = 253;

/// A checked, normalised reference; its parts are safe in URLs, and the host in paths.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no reference. The text is cut to what a message can bear.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReference {
    /// Nothing there.
    #[error("the image reference is empty")]
    Empty,
    /// Longer than any reference can be.
    #[error("the image reference has {bytes} bytes, {MAX_REFERENCE_BYTES} is the most")]
    TooLong {
        /// What it has.
        bytes: usize,
    },
    /// An image ID, which names nothing a registry knows.
    #[error("{text:?} is an image ID, not a reference a registry could be asked for")]
    ImageId {
        /// The text.
        text: String,
    },
    /// The host or port.
    #[error("{text:?} has no valid registry host: {host:?}")]
    Host {
        /// The text.
        text: String,
        /// What stands where the host should.
        host: String,
    },
    /// The repository.
    #[error("{text:?} has no valid repository name: {why}")]
    Repository {
        /// The text.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The tag.
    #[error("{text:?} has an invalid tag: {tag:?}")]
    Tag {
        /// The text.
        text: String,
        /// What stands where the tag should.
        tag: String,
    },
    /// The digest.
    #[error("{text:?} has an invalid digest")]
    Digest {
        /// The text.
        text: String,
        /// What is wrong with it.
        source: BadDigest,
    },
}

impl Reference {
    /// The registry, with its port if it has one: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path below the registry: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` only where there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which decides where both are given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `host/repository`, what stands before tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// How the image is listed under `repo_tags`, if this names it by tag: with a digest the
    /// tag is only a remark, nobody checked that it points there.
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// How the manifest with `digest` from this repository is listed under `repo_digests`.
    pub fn repo_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Reference, BadReference> {
        if text.is_empty() {
            return Err(BadReference::Empty);
        }
        if text.len() > MAX_REFERENCE_BYTES {
            return Err(BadReference::TooLong { bytes: text.len() });
        }
        if image_id(text).is_some() {
            return Err(BadReference::ImageId { text: text.into() });
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|source| BadReference::Digest {
                    text: text.into(),
                    source,
                })?;
                (rest, Some(digest))
            }
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon before the last slash is a port's.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(BadReference::Tag {
                text: text.into(),
                tag: tag.into(),
            });
        }
        let (host, path) = split_host(name);
        if !is_host(host) {
            return Err(BadReference::Host {
                text: text.into(),
                host: host.into(),
            });
        }
        // Without a dot or a port it is its capital letters that make it a host.
        let mut host = match host.contains(['.', ':']) {
            true => host.to_ascii_lowercase(),
            false => host.to_owned(),
        };
        if host == "index.docker.io" {
            host = DEFAULT_HOST.into();
        }
        let repository = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_repository(path, &repository).map_err(|why| BadReference::Repository {
            text: text.into(),
            why,
        })?;
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_TAG.to_owned()),
        };
        Ok(Reference {
            host,
            repository,
            tag,
            digest,
        })
    }
}

/// The 64 digits of `text` if it is an image ID: 64 lower-case hex digits, with or without
/// `sha256:` before them.
pub fn image_id(text: &str) -> Option<&str> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    (digits.len() == 64 && is_lower_hex(digits)).then_some(digits)
}

/// True for what may stand between a registry and a tag: `team/app`.
pub(crate) fn is_repository(text: &str) -> bool {
    check_repository(text, text).is_ok()
}

/// True for text of the digits an image ID is made of.
pub(crate) fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `host[:port]` and the path below it.
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, path))
            if first == "localhost"
                || first.contains(['.', ':', '['])
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, path)
        }
        _ => (DEFAULT_HOST, name),
    }
}

/// True for `name`, `name:port`, `[v6]` and `[v6]:port`.
pub(crate) fn is_host(text: &str) -> bool {
    if text.len() > MAX_HOST_BYTES {
        return false;
    }
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    port.is_none_or(is_port)
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
        && is_url_host(name)
}

/// False for what looks like a name and is none in a URL: one that ends in a number and is no
/// IPv4 address, one in a damaged Punycode. Source: URL standard, 3.5, "host parsing".
fn is_url_host(name: &str) -> bool {
    match url::Host::parse(name) {
        Ok(url::Host::Domain(_)) => true,
        // Not another address than the one that is written: 127.1 would be 127.0.0.1.
        Ok(url::Host::Ipv4(address)) => address.to_string() == name,
        Ok(url::Host::Ipv6(_)) | Err(_) => false,
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_tag(text: &str) -> bool {
    let mut bytes = text.bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG_BYTES
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

fn check_repository(path: &str, repository: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("it is empty");
    }
    if repository.len() > MAX_REPOSITORY_BYTES {
        return Err("it has more than 255 characters");
    }
    if repository.split('/').all(is_component) {
        return Ok(());
    }
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("it must be in lower case");
    }
    Err(
        "its parts are lower-case letters and digits with single dots, one or two underscores or dashes between",
    )
}

fn is_component(text: &str) -> bool {
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if !(bytes.first().is_some_and(alnum) && bytes.last().is_some_and(alnum)) {
        return false;
    }
    text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|between| {
            matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(count: usize) -> String {
        "0123456789abcdef".chars().cycle().take(count).collect()
    }

    #[test]
    fn short_names_get_dockers_defaults() {
        let digest = format!("sha256:{}", hex(64));
        for (text, normal) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".into()),
            ("a/b", "docker.io/a/b:latest".into()),
            ("docker.io/b", "docker.io/library/b:latest".into()),
            ("index.docker.io/b", "docker.io/library/b:latest".into()),
            ("localhost/b", "localhost/b:latest".into()),
            ("localhost:5000/b:x", "localhost:5000/b:x".into()),
            (
                "Registry.Example:5000/a/b",
                "registry.example:5000/a/b:latest".into(),
            ),
            ("[::1]:5000/b", "[::1]:5000/b:latest".into()),
            ("LOCAL/b", "LOCAL/b:latest".into()),
            ("b.c/d", "b.c/d:latest".into()),
            ("b.c", "docker.io/library/b.c:latest".into()),
            (
                &format!("b@{digest}"),
                format!("docker.io/library/b@{digest}"),
            ),
            (&format!("q.io/b:1@{digest}"), format!("q.io/b:1@{digest}")),
            ("a--b/c__d/e.f_g", "docker.io/a--b/c__d/e.f_g:latest".into()),
        ] {
            assert_eq!(
                text.parse::<Reference>().unwrap().to_string(),
                normal,
                "{text}"
            );
        }
    }

    #[test]
    fn a_tag_beside_a_digest_is_no_name_of_the_image() {
        let both: Reference = format!("a/b:1@sha256:{}", hex(64)).parse().unwrap();
        assert_eq!((both.tag(), both.repo_tag()), (Some("1"), None));
        let tag: Reference = "a/b:1".parse().unwrap();
        assert_eq!(tag.repo_tag().as_deref(), Some("docker.io/a/b:1"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in [
            "",
            " ",
            "/",
            ":",
            "@",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a@",
            ":a",
            "@a",
            "A",
            "a:-x",
            "a b",
            "a:b:c/d",
            "http://a/b",
            "a/../b",
            "../a",
            "a/.b",
            "a/b.",
            "a/b..c",
            "a/b___c",
            "a/b._c",
            "-a.b/c",
            "a.b-/c",
            "a..b/c",
            "a.b:/c",
            "a.b:0/c",
            "a.b:99999/c",
            "a.b:8o/c",
            "[::1/c",
            "[zz]/c",
            "[::1]x/c",
            "1.2.3.4.5/c",
            "256.0.0.1/c",
            "127.1/c",
            "a.123/c",
            "a.0x1:5000/c",
            "xn--a.b/c",
            "a@sha256:00",
            "a@md5:00",
            "é",
            "a:é",
            "a\0b",
            "a\nb",
            "a%2fb",
            "a?b",
            "a#b",
            "a\\b",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
        for text in [
            "a".repeat(256),
            format!("a:{}", "b".repeat(129)),
            "a/".repeat(2000),
            hex(64),
            format!("sha256:{}", hex(64)),
            format!("{}.x/a", "b".repeat(300)),
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn image_ids_are_told_from_names() {
        assert_eq!(image_id(&hex(64)), Some(&*hex(64)));
        assert_eq!(image_id(&format!("sha256:{}", hex(64))), Some(&*hex(64)));
        assert_eq!(image_id(&hex(63)), None);
        assert_eq!(image_id(&hex(64).to_uppercase()), None);
        assert!(hex(63).parse::<Reference>().is_ok());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>()) {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn what_almost_is_a_reference_is_normalised_once(
            text in "[a-cA-C0-1.:/@_\\[\\]-]{0,24}(:[a-b.-]{0,3})?(@sha256:[0-9a-f]{64})?"
        ) {
            if let Ok(reference) = text.parse::<Reference>() {
                let normal = reference.to_string();
                let host = crate::hosts::plain(reference.host(), false);
                prop_assert!(host.url.has_host());
                prop_assert_eq!(normal.parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn every_reference_of_the_grammar_is_taken(
            host in prop::option::of("[a-z0-9]{1,5}(\\.[a-z0-9]{1,5}){0,2}\\.[a-z][a-z0-9]{0,4}(:[1-9][0-9]{0,3})?"),
            path in "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,4}){0,3}",
            tag in prop::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in prop::option::of("[0-9a-f]{64}"),
        ) {
            let mut text = host.clone().map(|host| host + "/").unwrap_or_default() + &path;
            if let Some(tag) = &tag { text = format!("{text}:{tag}"); }
            if let Some(digest) = &digest { text = format!("{text}@sha256:{digest}"); }
            let first = path.split('/').next().unwrap();
            // A dotted first component of two is a host by the rule; that is another case.
            prop_assume!(host.is_some() || !path.contains('/') || !first.contains('.'));
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.host(), host.as_deref().unwrap_or(DEFAULT_HOST));
            prop_assert!(reference.repository().ends_with(&path));
            prop_assert_eq!(reference.tag().is_some(), tag.is_some() || digest.is_none());
            prop_assert_eq!(reference.digest().map(|d| d.hex().to_owned()), digest);
        }
    }
}
