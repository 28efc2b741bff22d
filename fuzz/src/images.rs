//! What registries and those who name images send.

use berth_image_service::hosts::{self, Fallback};
use berth_image_service::manifest::{self, Document, Platform};
use berth_image_service::policy::{Policy, signature};
use berth_image_service::reference::Reference;
use berth_image_service::registries_conf::RegistriesConf;
use berth_image_service::sources::RegistryFiles;
use berth_image_service::{auth, auth_file};
use std::path::Path;

/// An image reference: what is taken prints as something that means the same, and its registry
/// can be asked.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(reference) = text.parse::<Reference>() {
        let printed = reference.to_string();
        let again: Reference = printed.parse().expect("a printed reference is one");
        assert_eq!(again.to_string(), printed);
        let hosts = hosts::hosts(&[], reference.host(), Fallback::Origin);
        assert_eq!(hosts.expect("no file to read").len(), 1);
    }
}

/// A hosts.toml: there is always somebody to ask, and the hosts' URLs can be built upon.
pub fn hosts_toml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let path = Path::new("/c/hosts.toml");
    for fallback in [Fallback::Origin, Fallback::Never] {
        if let Ok(hosts) = hosts::parse(path, text, "registry.example:5000", fallback) {
            assert!(!hosts.is_empty());
            for host in hosts {
                assert!(host.url.host_str().is_some());
                assert!(host.url.username().is_empty() && host.url.password().is_none());
            }
        }
    }
}

/// A registries.conf, and what a few names become by it.
pub fn registries_conf(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut conf = RegistriesConf::default();
    if conf.apply(Path::new("/c/registries.conf"), text).is_err() {
        return;
    }
    let files = RegistryFiles::default();
    for name in ["a", "a/b:1", "a.b/c/d:1", "localhost:5000/a"] {
        let Ok(references) = conf.references(name) else {
            continue;
        };
        assert!(!references.is_empty());
        for reference in references {
            if let Ok(sources) = files.sources(&conf, &reference) {
                assert!(!sources.is_empty());
            }
        }
    }
}

/// A `WWW-Authenticate` header.
pub fn challenge(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        auth::exercise_challenge(text);
    }
}

/// A Docker config.json.
pub fn auth_file(data: &[u8]) {
    auth_file::exercise(data);
}

/// A manifest or index, of whichever media type it says itself.
pub fn manifest(data: &[u8]) {
    if let Ok(Document::Manifest(manifest)) = manifest::parse(None, data) {
        assert!(!manifest.config.digest.hex().is_empty());
    }
}

/// An index, and the platform picked from it.
pub fn index(data: &[u8]) {
    if let Ok(Document::Index(entries)) = manifest::parse(None, data)
        && let Ok(entry) = manifest::pick(&entries, &Platform::host())
    {
        let picked = &entry.descriptor.digest;
        assert!(entries.iter().any(|e| e.descriptor.digest == *picked));
    }
}

/// An image's configuration.
pub fn config(data: &[u8]) {
    if let Ok(config) = manifest::parse_config(data) {
        let _ = config.cri_user();
    }
}

/// A policy, and what it says of a reference. Keys it names are files that are not there.
pub fn policy(data: &[u8]) {
    if let Ok(policy) = Policy::parse(Path::new("/c/policy.json"), data) {
        let reference: Reference = "a.b/c/d:1".parse().expect("a reference");
        let decision = policy.decision(&reference);
        let accepted = decision.check(Some(&reference), &[], &[]).is_ok();
        assert!(accepted || !policy.accepts_everything());
    }
}

/// A manifest of signatures.
pub fn signatures(data: &[u8]) {
    signature::exercise(data);
}
