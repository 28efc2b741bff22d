//! The images of this node: what is known of each, and finding them by any of their names.
//!
//! An [`Images`] never changes; a change makes the next one, which is swapped in whole, so a
//! reader never waits and never sees half a change.

use crate::digest::Digest;
use crate::layer::LayerId;
use crate::manifest::ImageConfig;
use crate::pinned::Patterns;
use crate::policy::Signature;
use crate::reference::{Reference, image_id, is_lower_hex};
use berth_store::Record;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Fewest digits that are looked up as the beginning of an image ID.
const MIN_PREFIX_DIGITS: usize = 4;

/// One image, whole and unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// `sha256:<64 hex digits>`, the config's digest: what CRI calls the image in every message.
    pub id: String,
    /// `host/repository:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// `host/repository@digest`, sorted; the digest is of what the reference led to, an index
    /// where there is one.
    pub repo_digests: Vec<String>,
    /// Bytes the distinct layers take on disk, unpacked.
    pub size_bytes: u64,
    /// How it says it should be run.
    pub config: ImageConfig,
    /// The manifest for this platform.
    pub manifest_digest: Digest,
    /// The layers as they are stored, lowest first.
    pub layers: Vec<LayerId>,
    /// The user, when the image names it by number.
    pub uid: Option<i64>,
    /// The user, when the image names it by name; else "".
    pub username: String,
    /// Never offered to garbage collection.
    pub pinned: bool,
}

/// What is on disk of an [`Image`], in `records/<hex>.rec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub id: Digest,
    pub repo_tags: BTreeSet<String>,
    pub repo_digests: BTreeSet<String>,
    pub size_bytes: u64,
    pub config: ImageConfig,
    pub layers: Vec<LayerId>,
    pub manifest_digest: Digest,
    /// Manifests, indexes and the config; kept so that the next pull need not fetch them.
    pub documents: BTreeSet<Digest>,
    #[serde(default)]
    pub pinned: bool,
    /// Full forms of short names it was pulled by that mean another registry here: it is found
    /// by them, where no image has them for a tag or digest.
    #[serde(default)]
    pub found_as: BTreeSet<String>,
    /// What the policy wanted when it was pulled; it is checked again at each use.
    #[serde(default)]
    pub signatures: Vec<Signature>,
}

impl Record for ImageRecord {
    const KIND: &'static str = "image";
    const VERSION: u32 = 1;
}

impl ImageRecord {
    /// The image as callers see it.
    pub fn image(&self, pinned: &Patterns) -> Image {
        let (uid, username) = self.config.cri_user();
        Image {
            id: self.id.to_string(),
            repo_tags: self.repo_tags.iter().cloned().collect(),
            repo_digests: self.repo_digests.iter().cloned().collect(),
            size_bytes: self.size_bytes,
            config: self.config.clone(),
            manifest_digest: self.manifest_digest.clone(),
            layers: self.layers.clone(),
            uid,
            username,
            pinned: self.pinned
                || self
                    .repo_tags
                    .iter()
                    .chain(&self.repo_digests)
                    .any(|name| pinned.matches(name)),
        }
    }
}

/// All images at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Images {
    pub by_id: BTreeMap<String, (Arc<ImageRecord>, Arc<Image>)>,
    by_name: BTreeMap<String, String>,
    pinned: Arc<Patterns>,
}

impl Images {
    /// From what is on disk; `pinned` are the names that are never offered to collection.
    pub fn new(records: impl IntoIterator<Item = ImageRecord>, pinned: Arc<Patterns>) -> Images {
        let mut images = Images::default();
        let mut found_as = Vec::new();
        for record in records {
            let image = Arc::new(record.image(&pinned));
            let id = |name: &String| (name.clone(), image.id.clone());
            found_as.extend(record.found_as.iter().map(id));
            for name in record.repo_tags.iter().chain(&record.repo_digests) {
                images.by_name.insert(name.clone(), image.id.clone());
            }
            images
                .by_id
                .insert(image.id.clone(), (Arc::new(record), image));
        }
        for (name, id) in found_as {
            images.by_name.entry(name).or_insert(id);
        }
        images.pinned = pinned;
        images
    }

    /// These images with one put in or taken out for every entry of `changes`.
    pub fn with(&self, changes: &[(Digest, Option<ImageRecord>)]) -> Images {
        let mut records: BTreeMap<String, ImageRecord> = self
            .by_id
            .iter()
            .map(|(id, (record, _))| (id.clone(), (**record).clone()))
            .collect();
        for (id, record) in changes {
            match record {
                Some(record) => records.insert(id.to_string(), record.clone()),
                None => records.remove(&id.to_string()),
            };
        }
        Images::new(records.into_values(), Arc::clone(&self.pinned))
    }

    /// The image `name` means: an ID with or without `sha256:`, the beginning of an ID if only
    /// one image has it, or a reference by tag or digest, short or long.
    pub fn find(&self, name: &str) -> Option<&Arc<Image>> {
        let by_id = |id: &str| self.by_id.get(id).map(|(_, image)| image);
        if let Some(image) = by_id(name) {
            return Some(image);
        }
        if let Some(digits) = image_id(name) {
            return by_id(&format!("sha256:{digits}"));
        }
        if let Ok(reference) = name.parse::<Reference>() {
            let full = match (reference.digest(), reference.repo_tag()) {
                (Some(digest), _) => Some(reference.repo_digest(digest)),
                (None, tag) => tag,
            };
            if let Some(id) = full.and_then(|full| self.by_name.get(&full)) {
                return by_id(id);
            }
        }
        self.find_prefix(name)
    }

    fn find_prefix(&self, name: &str) -> Option<&Arc<Image>> {
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.len() < MIN_PREFIX_DIGITS || !is_lower_hex(digits) {
            return None;
        }
        let prefix = format!("sha256:{digits}");
        let mut found = self
            .by_id
            .range(prefix.clone()..)
            .take_while(|(id, _)| id.starts_with(&prefix));
        match (found.next(), found.next()) {
            (Some((_, (_, image))), None) => Some(image),
            _ => None,
        }
    }

    /// The image that has `tag` among its `repo_tags`.
    pub fn tagged(&self, tag: &str) -> Option<&Arc<ImageRecord>> {
        let id = self.by_name.get(tag)?;
        self.by_id.get(id).map(|(record, _)| record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seed: &str, tags: &[&str], digests: &[&str]) -> ImageRecord {
        let id = Digest::sha256(seed.as_bytes());
        ImageRecord {
            id: id.clone(),
            repo_tags: tags.iter().map(|&tag| tag.into()).collect(),
            repo_digests: digests.iter().map(|&name| name.into()).collect(),
            size_bytes: 1,
            config: ImageConfig::default(),
            layers: Vec::new(),
            manifest_digest: id,
            documents: BTreeSet::new(),
            pinned: false,
            found_as: BTreeSet::new(),
            signatures: Vec::new(),
        }
    }

    #[test]
    fn an_image_is_found_by_every_name_it_has() {
        let digest = Digest::sha256(b"manifest");
        let full = format!("docker.io/library/a@{digest}");
        let a = record("a", &["docker.io/library/a:latest", "q.io/a:1"], &[&full]);
        let b = record("b", &["q.io/a:2"], &[]);
        let id = a.id.to_string();
        let images = Images::new([a, b], Arc::default());
        for name in [
            "a",
            "a:latest",
            "docker.io/a",
            "library/a",
            "q.io/a:1",
            &format!("a@{digest}"),
            &format!("a:whatever@{digest}"),
            &id,
            &id[7..],
            &id[7..20],
            &id[..20],
        ] {
            assert_eq!(images.find(name).map(|i| &*i.id), Some(&*id), "{name}");
        }
        for name in [
            "",
            "b",
            "q.io/a",
            "q.io/a:3",
            &id[7..10],
            "sha256:",
            "é",
            &format!("q.io/a@{digest}"),
            &"0".repeat(64),
        ] {
            assert!(images.find(name).is_none(), "{name}");
        }
    }

    #[test]
    fn an_image_is_found_by_a_short_names_full_form_unless_another_has_it() {
        let mut quay = record("quay", &["quay.example/a:latest"], &[]);
        quay.found_as.insert("docker.io/library/a:latest".into());
        let id = quay.id.to_string();
        let images = Images::new([quay.clone()], Arc::default());
        assert_eq!(images.find("a").map(|i| &*i.id), Some(&*id));
        let hub = record("hub", &["docker.io/library/a:latest"], &[]);
        let hub_id = hub.id.to_string();
        for records in [[quay.clone(), hub.clone()], [hub, quay]] {
            let images = Images::new(records, Arc::default());
            assert_eq!(images.find("a").map(|i| &*i.id), Some(&*hub_id));
        }
    }

    #[test]
    fn images_are_pinned_by_their_names() {
        let one = record("a", &["q.io/a:1"], &[]);
        let two = record("b", &["q.io/b:1"], &[]);
        let pinned = Arc::new(Patterns::new(["q.io/a*"]));
        let images = Images::new([one, two], pinned);
        assert!(images.find("q.io/a:1").unwrap().pinned);
        assert!(!images.find("q.io/b:1").unwrap().pinned);
    }

    #[test]
    fn a_prefix_of_two_ids_means_neither() {
        let mut one = record("a", &[], &[]);
        let mut two = record("b", &[], &[]);
        one.id = format!("sha256:abcd{}", "0".repeat(60)).parse().unwrap();
        two.id = format!("sha256:abcd{}", "1".repeat(60)).parse().unwrap();
        let images = Images::new([one, two], Arc::default());
        assert!(images.find("abcd").is_none());
        assert!(images.find("abcd1").is_some());
    }
}
