//! Removing what nothing uses, when somebody asks for it.

use super::ImageService;
use crate::image::Image;
use crate::layer::LayerId;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The images, by ID.
    pub images: Vec<String>,
    /// Space in bytes that the images took together before and do not take now.
    pub bytes: u64,
}

impl ImageService {
    /// Removes the images that no container has: those without a tag, or `all`. Pinned ones
    /// stay. Forgets images that are not whole, and frees what pulls left that never ended.
    /// Blocking.
    pub fn prune(&self, all: bool) -> Pruned {
        let before = self.fs_usage().used_bytes;
        let used = self.layers_of_containers();
        let unused = |image: &Arc<Image>| {
            !image.pinned && (all || image.repo_tags.is_empty()) && !used.contains(&image.layers)
        };
        let mut pruned = Pruned::default();
        for image in self.list().into_iter().filter(unused) {
            match self.remove_now(&image.id) {
                Ok(true) => pruned.images.push(image.id.clone()),
                Ok(false) => {}
                Err(error) => super::warn(&error, "an image that nobody uses stays"),
            }
        }
        self.forget_incomplete();
        self.collect();
        self.finish_removals();
        pruned.bytes = before.saturating_sub(self.fs_usage().used_bytes);
        pruned
    }

    /// Where the images are.
    pub fn dir(&self) -> &Path {
        &self.0.settings.lib
    }

    /// After a pull that found the disk full: frees what it left, and waits until it is free.
    pub(super) async fn give_back_space(&self) {
        let service = self.clone();
        let freed = tokio::task::spawn_blocking(move || {
            // Blobs that are kept until layers are synced take space, too.
            if let Err(error) = service.0.layers.settle() {
                super::warn(&error, "layers are not synced, later");
            }
            service.collect();
            service.finish_removals();
        });
        if freed.await.is_err() {
            tracing::warn!("what a pull left is not freed, later");
        }
    }

    /// Whether no image has the layer, or it is there in an old copy.
    pub(super) fn is_left_over(&self, layer: &LayerId) -> bool {
        let images = self.0.images.load();
        let mut records = images.by_id.values();
        !records.any(|(record, _)| record.layers.contains(layer))
            || self.0.layers.has_superseded(layer)
    }

    /// Frees what nothing uses, without holding up the caller.
    pub(super) fn collect_soon(&self) {
        let service = self.clone();
        let spawned = std::thread::Builder::new()
            .name("image-collect".into())
            .spawn(move || service.collect());
        if let Err(error) = spawned {
            super::warn(&error, "no thread to free layers, later");
        }
    }

    /// The layers of each container's image, and of the images it has as volumes.
    fn layers_of_containers(&self) -> BTreeSet<Vec<LayerId>> {
        let snapshots = &self.0.snapshots;
        let mut layers = BTreeSet::new();
        for container in snapshots.list().unwrap_or_default() {
            if let Ok(found) = snapshots.all_layers(&container) {
                layers.extend(found);
            }
        }
        layers
    }
}
