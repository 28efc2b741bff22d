//! Images that lost a layer, and finding damage before a container does.
//!
//! An image with a layer that is gone or damaged is not listed: the kubelet asks for it, does not
//! find it, and pulls it, which fetches what is missing and nothing else. For that its record
//! stays, and what is good of it is not collected for a while.

use super::{ImageService, RemoveError, lock};
use crate::digest::Digest;
use crate::image::{ImageRecord, Images};
use crate::layer::{Finding, LayerId, Pace, StoreError};
use berth_store::atomic_file::Durability;
use berth_store::record;
use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long what is good of an incomplete image is kept for the pull that mends it. The kubelet
/// tries every five minutes at the latest. Source: kubelet, `MaxContainerBackOff`.
const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// Records of images that are not whole.
#[derive(Debug, Default)]
pub(super) struct Incomplete {
    records: BTreeMap<Digest, (Instant, ImageRecord)>,
}

impl Incomplete {
    pub(super) fn put(&mut self, record: ImageRecord) {
        self.records
            .insert(record.id.clone(), (Instant::now(), record));
    }

    pub(super) fn remove(&mut self, id: &Digest) {
        self.records.remove(id);
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn kept(&self) -> impl Iterator<Item = &ImageRecord> {
        let kept = self
            .records
            .values()
            .filter(|(since, _)| since.elapsed() < KEPT_FOR);
        kept.map(|(_, record)| record)
    }
}

/// What was found of one layer, or of one manifest or config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The layer's name in the store, or the document's digest.
    pub what: String,
    /// How it is.
    pub finding: Finding,
    /// IDs of the images that have it.
    pub images: Vec<String>,
}

impl ImageService {
    /// Reads all layers, manifests and configs against what they should be, and tells of each.
    /// What is damaged is taken out of use: images that have it are not listed until they are
    /// pulled again, which fetches just that; running containers go on. Ends early where `each`
    /// gives `false`. Blocking, for as long as reading takes.
    pub fn verify(&self, pace: &mut Pace, each: &mut dyn FnMut(Verified) -> bool) {
        let images = self.0.images.load_full();
        for digest in self.0.content.damaged() {
            let whose = images.by_id.values();
            let whose = whose.filter(|(record, _)| record.documents.contains(&digest));
            let verified = Verified {
                what: digest.to_string(),
                finding: Finding::Gone,
                images: whose.map(|(_, image)| image.id.clone()).collect(),
            };
            if !each(verified) {
                return;
            }
        }
        let mut layers = self.0.layers.layers();
        layers.sort_by(|a, b| a.id.cmp(&b.id));
        for layer in layers {
            let finding = match self.0.layers.verify(&layer.id, pace) {
                Ok(Finding::Gone) => continue,
                Ok(finding) => finding,
                Err(error) => {
                    super::warn(&error, "a layer cannot be looked at");
                    continue;
                }
            };
            if let Finding::Damaged(damage) = &finding {
                self.layer_is_damaged(&layer.id, &damage.to_string());
            }
            let verified = Verified {
                what: layer.id.to_string(),
                finding,
                images: self.images_with(&layer.id),
            };
            if !each(verified) {
                return;
            }
        }
    }

    fn images_with(&self, layer: &LayerId) -> Vec<String> {
        let images = self.0.images.load();
        let listed = images.by_id.values().map(|(record, _)| &**record);
        let incomplete = lock(&self.0.incomplete);
        listed
            .chain(incomplete.kept())
            .filter(|record| record.layers.contains(layer))
            .map(|record| record.id.to_string())
            .collect()
    }

    /// Takes a layer out of use, and the images that have it off the list.
    pub fn layer_is_damaged(&self, id: &LayerId, why: &str) {
        let _alone = lock(&self.0.changes);
        tracing::error!(layer = %id, why, "a layer is damaged; it is fetched again with the next pull that needs it");
        if let Err(error) = self.0.layers.mark_damaged(id, why) {
            super::warn(&error, "a damaged layer is not marked");
        }
        let images = self.0.images.load_full();
        let mut changes = Vec::new();
        for (record, _) in images.by_id.values() {
            if record.layers.contains(id) {
                lock(&self.0.incomplete).put((**record).clone());
                changes.push((record.id.clone(), None));
            }
        }
        self.0.images.store(Arc::new(images.with(&changes)));
    }

    /// What is not whole: damaged layers by name, and images by ID.
    pub fn not_whole(&self) -> (Vec<String>, Vec<String>) {
        let layers = self.0.layers.damaged();
        let incomplete = lock(&self.0.incomplete);
        (
            layers.iter().map(|info| info.id.to_string()).collect(),
            incomplete.records.keys().map(Digest::to_string).collect(),
        )
    }

    /// Lists images again once their layers are, which are being unpacked again since the start.
    pub(super) fn list_what_is_rebuilt(&self) {
        if lock(&self.0.incomplete).len() == 0 {
            return;
        }
        let service = self.clone();
        let work = move || {
            service.0.layers.finish_rebuilding();
            service.list_what_is_whole();
        };
        let builder = std::thread::Builder::new().name("image-rebuild".into());
        if let Err(error) = builder.spawn(work) {
            super::warn(&error, "images are not listed again until they are pulled");
        }
    }

    /// Waits until the layers that a power cut made doubtful are unpacked again and their images
    /// listed. Blocking.
    pub fn finish_rebuilding(&self) {
        self.0.layers.finish_rebuilding();
        self.list_what_is_whole();
    }

    /// Puts the files of all layers on the disk, which else happens some seconds after the last
    /// pull. Blocking.
    ///
    /// # Errors
    /// What the kernel said to write.
    pub fn settle(&self) -> Result<(), StoreError> {
        self.0.layers.settle()
    }

    fn list_what_is_whole(&self) {
        let _alone = lock(&self.0.changes);
        let images = self.0.images.load_full();
        let whole: Vec<ImageRecord> = {
            let incomplete = lock(&self.0.incomplete);
            let records = incomplete.records.values().map(|(_, record)| record);
            let is_whole = |record: &&ImageRecord| {
                let mut layers = record.layers.iter();
                layers.all(|id| self.0.layers.has(id))
            };
            records.filter(is_whole).cloned().collect()
        };
        let mut changes = Vec::new();
        for mut record in whole {
            let names = record.repo_tags.len() + record.found_as.len();
            // Somebody else's by now.
            record.repo_tags.retain(|tag| images.tagged(tag).is_none());
            record.found_as.retain(|tag| images.tagged(tag).is_none());
            if record.repo_tags.len() + record.found_as.len() < names
                && let Err(error) =
                    record::save(&self.record_path(&record.id), &record, Durability::PowerCut)
            {
                super::warn(&error, "an image is not listed until it is pulled");
                continue;
            }
            tracing::info!(image = %record.id, "an image is whole again");
            lock(&self.0.incomplete).remove(&record.id);
            changes.push((record.id.clone(), Some(record)));
        }
        self.0.images.store(Arc::new(images.with(&changes)));
    }

    pub(super) fn incomplete_layers(&self) -> Vec<LayerId> {
        let incomplete = lock(&self.0.incomplete);
        let layers = incomplete.kept().flat_map(|record| record.layers.clone());
        layers.collect()
    }

    pub(super) fn incomplete_documents(&self) -> Vec<Digest> {
        let incomplete = lock(&self.0.incomplete);
        let documents = incomplete.kept();
        documents
            .flat_map(|record| record.documents.clone())
            .collect()
    }

    /// The image that is whole again has the names it had, but those that are another's by now.
    pub(super) fn take_names_of_incomplete(&self, new: &mut ImageRecord, images: &Images) {
        let incomplete = lock(&self.0.incomplete);
        let Some((_, old)) = incomplete.records.get(&new.id) else {
            return;
        };
        let free = |tag: &&String| images.tagged(tag).is_none();
        new.repo_tags
            .extend(old.repo_tags.iter().filter(free).cloned());
        new.repo_digests.extend(old.repo_digests.iter().cloned());
        new.found_as.extend(old.found_as.iter().cloned());
        new.pinned |= old.pinned;
    }

    /// Removes the record of the image that `name` means if that is not whole.
    pub(super) fn remove_incomplete(&self, name: &str) -> Result<(), RemoveError> {
        let mut incomplete = lock(&self.0.incomplete);
        let records = incomplete.records.values();
        let pinned = Arc::new(self.0.settings.pinned.clone());
        let found = Images::new(records.map(|(_, record)| record.clone()), pinned)
            .find(name)
            .map(|image| image.id.clone());
        let Some(id) = found.and_then(|id| id.parse::<Digest>().ok()) else {
            return Ok(());
        };
        record::remove(&self.record_path(&id), Durability::PowerCut).map_err(|source| {
            RemoveError::Record {
                id: id.to_string(),
                source,
            }
        })?;
        incomplete.remove(&id);
        Ok(())
    }

    /// Forgets all images that are not whole; how many there were.
    pub(super) fn forget_incomplete(&self) -> usize {
        let _alone = lock(&self.0.changes);
        let mut incomplete = lock(&self.0.incomplete);
        let all: Vec<Digest> = incomplete.records.keys().cloned().collect();
        let mut forgotten = 0;
        for id in all {
            match record::remove(&self.record_path(&id), Durability::PowerCut) {
                Ok(()) => {
                    incomplete.remove(&id);
                    forgotten += 1;
                }
                Err(error) => super::warn(
                    &error as &(dyn StdError + 'static),
                    "the record of an image that is not whole stays",
                ),
            }
        }
        forgotten
    }
}
