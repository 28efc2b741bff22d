//! The images of a node, behind one handle: pull, find, list, remove, measure.
//!
//! ```text
//! DIR/content/sha256/<hex>   manifests and configs        content
//! DIR/records/<hex>.rec      one record per image         here
//! DIR/layers/...             unpacked layers              layer
//! ```
//! A record is written last and removed first: an image is there when its record is. Readers
//! see an immutable [`Images`] that is swapped whole before a call answers; writers take
//! `changes` and do nothing slow while they hold it but write records. Pulls lease the layers
//! they rely on, and collection leaves alone what is leased, recorded or under a container.

mod export;
mod import;
mod prune;
mod pulling;
mod repair;
mod scrub;

use crate::content::{Content, ContentError};
use crate::digest::Digest;
use crate::gc;
use crate::hosts::Fallback;
use crate::image::{Image, ImageRecord, Images};
use crate::layer::{LayerId, Store, StoreError};
use crate::manifest::Platform;
use crate::pinned::Patterns;
use crate::proxy::ProxyEnvironment;
use crate::pull::{self, Documents, PullError};
use crate::registry::{Registries, Timeouts};
use crate::snapshot::{self, IdMap, SnapshotError, Snapshots};
use crate::sources::RegistryFiles;
use crate::unpack::apart::Writers;
use crate::usage::{self, FsUsage};
use arc_swap::ArcSwap;
use berth_store::atomic_file::{self, Durability};
use berth_store::record;
use berth_store::{RecordError, crash};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error as StdError;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Semaphore;

pub use export::ExportError;
pub use import::{ImportError, ImportOptions, Imported};
pub use prune::Pruned;
use repair::Incomplete;
pub use repair::Verified;
pub use scrub::Scrubbing;

/// Where images are and how they are pulled.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directory of images, `lib/images`; made when missing.
    pub lib: PathBuf,
    /// The directory of containers' writable layers, `lib/containers`; made when missing.
    pub containers: PathBuf,
    /// Directories in the format of [`crate::hosts`], searched in order.
    pub certs_d: Vec<PathBuf>,
    /// A file in the format of [`crate::registries_conf`], with drop-ins beside it.
    pub registries_conf: Option<PathBuf>,
    /// The node's own credentials, in the format of Docker's config.json.
    pub auth_file: Option<PathBuf>,
    /// Which images are accepted, in the format of [`crate::policy`].
    pub policy: Option<PathBuf>,
    /// Whether a registry is asked that has mirrors, where its hosts.toml says nothing of it.
    pub fallback: Fallback,
    /// The daemon's proxies.
    pub proxies: ProxyEnvironment,
    /// Images that are never offered to collection.
    pub pinned: Patterns,
    /// How many pulls run at a time; the others wait for their turn.
    pub max_pulls: usize,
    /// How many layers are fetched at a time, over all pulls; each pull may fetch one beyond them.
    pub max_layers: usize,
    /// How many layers of one image are fetched at a time; 3 unless said otherwise.
    pub max_layer_downloads: usize,
    /// Refuses a layer whose archive has more bytes, uncompressed; `None`: the disk decides.
    pub max_layer_bytes: Option<u64>,
    /// How long to wait for registries.
    pub timeouts: Timeouts,
    /// Who writes layers; `None`: the daemon itself.
    pub writers: Option<Arc<Writers>>,
}

/// A few compressed megabytes can become any number of bytes; the largest layers in use, models
/// for machine learning, have some tens of GiB.
const MAX_LAYER_BYTES: u64 = 256 << 30;

impl Settings {
    /// The defaults, for images below `lib` and containers below `containers`.
    pub fn new(lib: PathBuf, containers: PathBuf) -> Settings {
        Settings {
            lib,
            containers,
            certs_d: Vec::new(),
            registries_conf: None,
            auth_file: None,
            policy: None,
            fallback: Fallback::Origin,
            proxies: ProxyEnvironment::default(),
            pinned: Patterns::default(),
            max_pulls: 16,
            max_layers: 8,
            max_layer_downloads: 3,
            max_layer_bytes: Some(MAX_LAYER_BYTES),
            timeouts: Timeouts::default(),
            writers: None,
        }
    }
}

/// Why the service cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory.
    #[error("cannot {action} {path}")]
    Io {
        /// "create", "list", "clean".
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The manifests and configs.
    #[error("cannot open the stored manifests")]
    Content(#[from] ContentError),
    /// The layers.
    #[error("cannot open the stored layers")]
    Layers(#[from] StoreError),
    /// The containers' layers.
    #[error("cannot open the containers' layers")]
    Snapshots(#[from] SnapshotError),
}

/// Why an image could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Its record cannot be removed, so the image is still there.
    #[error("cannot remove the image {id}")]
    Record {
        /// The image.
        id: String,
        /// Why.
        source: RecordError,
    },
    /// The work ended without a result: a bug, or the daemon is going down.
    #[error("the removal was broken off")]
    Aborted,
}

/// Why an image's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// No such image.
    #[error("there is no image {image}")]
    NoImage {
        /// By what name it was asked for.
        image: String,
    },
    /// Its layers.
    #[error("the image's layers cannot be used")]
    Snapshot(#[from] SnapshotError),
}

/// What a pull gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The image's ID, `sha256:<64 hex digits>`.
    pub image_id: String,
    /// Compressed bytes that were fetched for it.
    pub bytes: u64,
}

#[derive(Debug)]
enum CommitError {
    Content(ContentError),
    Record(RecordError),
}

impl CommitError {
    fn of(self, image: String) -> PullError {
        match self {
            CommitError::Content(source) => PullError::Content { image, source },
            CommitError::Record(source) => PullError::Record { image, source },
        }
    }
}

impl From<ContentError> for CommitError {
    fn from(error: ContentError) -> CommitError {
        CommitError::Content(error)
    }
}

impl From<RecordError> for CommitError {
    fn from(error: RecordError) -> CommitError {
        CommitError::Record(error)
    }
}

struct Inner {
    settings: Settings,
    machine: Platform,
    content: Arc<Content>,
    layers: Store,
    snapshots: Snapshots,
    images: ArcSwap<Images>,
    /// Images with a layer that is gone or damaged: not listed, and kept so that the next pull
    /// fetches no more than that layer.
    incomplete: Mutex<Incomplete>,
    /// Held while records change.
    changes: Mutex<()>,
    running: Mutex<HashMap<pulling::Key, pulling::Running>>,
    registries: Arc<Registries>,
    pulls: Arc<pull::Shared>,
    pull_permits: Semaphore,
}

/// The images of this node. Clones are the same service.
#[derive(Clone)]
pub struct ImageService(Arc<Inner>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageService {
    /// Opens or creates the directories, removes what a crash left half made and reads the
    /// records. Blocking. A damaged record costs its own image, with a warning.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(settings: Settings) -> Result<ImageService, OpenError> {
        let create = |path: &Path| {
            std::fs::create_dir_all(path).map_err(|source| OpenError::Io {
                action: "create",
                path: path.into(),
                source,
            })
        };
        create(&settings.lib)?;
        create(&settings.containers)?;
        let records = settings.lib.join("records");
        create(&records)?;
        let content = Content::open(&settings.lib.join("content"))?;
        let layers = Store::open_with(&settings.lib.join("layers"), settings.writers.clone())?;
        let snapshots = Snapshots::open(&settings.containers, &layers)?;
        let (images, incomplete) = load(&records, &layers, &settings.pinned)?;
        import::remove_leftovers(&settings.lib)?;
        let service = ImageService(Arc::new(Inner {
            machine: Platform::host(),
            content: Arc::new(content),
            layers,
            snapshots,
            images: ArcSwap::from_pointee(images),
            incomplete: Mutex::new(incomplete),
            changes: Mutex::default(),
            running: Mutex::default(),
            registries: Registries::new(registry_files(&settings), settings.timeouts),
            pulls: pull::Shared::new(settings.max_layers),
            pull_permits: Semaphore::new(settings.max_pulls.clamp(1, Semaphore::MAX_PERMITS)),
            settings,
        }));
        service.list_what_is_rebuilt();
        Ok(service)
    }

    /// Every image, sorted by ID. Never waits.
    pub fn list(&self) -> Vec<Arc<Image>> {
        let images = self.0.images.load();
        images.by_id.values().map(|(_, i)| Arc::clone(i)).collect()
    }

    /// The image `name` means: an ID with or without `sha256:`, the beginning of one, a
    /// reference by tag or by digest, short or long. Never waits.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        self.0.images.load().find(name).map(Arc::clone)
    }

    /// Removes the image `name` means, under all its names, and frees what nothing else uses.
    /// Tells whether there was one; absent is success.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub async fn remove(&self, name: &str) -> Result<bool, RemoveError> {
        let (service, name) = (self.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || service.remove_now(&name))
            .await
            .map_err(|_| RemoveError::Aborted)?
    }

    fn remove_now(&self, name: &str) -> Result<bool, RemoveError> {
        {
            let _alone = lock(&self.0.changes);
            let Some(image) = self.find(name) else {
                self.remove_incomplete(name)?;
                return Ok(false);
            };
            let images = self.0.images.load_full();
            let (record, _) = &images.by_id[&image.id];
            record::remove(&self.record_path(&record.id), Durability::PowerCut).map_err(
                |source| RemoveError::Record {
                    id: image.id.clone(),
                    source,
                },
            )?;
            let next = images.with(&[(record.id.clone(), None)]);
            self.0.images.store(Arc::new(next));
        }
        self.collect();
        Ok(true)
    }

    /// Frees every layer, manifest and config that no image, container or pull uses.
    /// What cannot be freed now is tried again by the next collection.
    fn collect(&self) {
        {
            // No pull records an image while its documents are looked at.
            let _alone = lock(&self.0.changes);
            let images = self.0.images.load_full();
            let records = images.by_id.values().map(|(record, _)| record);
            let mut kept: HashSet<Digest> = records.flat_map(|r| r.documents.clone()).collect();
            kept.extend(self.incomplete_documents());
            for error in self.0.content.retain(&kept) {
                warn(&error, "a manifest nobody uses is not removed, later");
            }
        }
        let collected = gc::collect(&self.0.layers, || {
            let mut used = self.0.snapshots.references()?;
            self.0.layers.remove_superseded(&used);
            used.extend(self.incomplete_layers());
            let images = self.0.images.load_full();
            let records = images.by_id.values().map(|(record, _)| record);
            used.extend(records.flat_map(|record| record.layers.clone()));
            Ok::<_, SnapshotError>(used)
        });
        match collected {
            Ok(collected) => {
                for error in &collected.failures {
                    warn(error, "a layer nobody uses is not removed, later");
                }
            }
            Err(error) => warn(&error, "no layers are removed, a container's are not known"),
        }
    }

    /// What the images take of their file system. Never waits for the disk.
    pub fn fs_usage(&self) -> FsUsage {
        let records = self.0.images.load().by_id.len() + lock(&self.0.incomplete).len();
        usage::of_images(
            &self.0.settings.lib,
            &self.0.layers,
            self.0.content.sums(),
            records as u64,
        )
    }

    /// Makes the writable layer of a container above an image's layers and keeps those from
    /// being collected until [`ImageService::remove_container`]. Again with the same image it
    /// succeeds and changes nothing. Blocking.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left then.
    pub fn prepare(&self, container_id: &str, image_id: &str) -> Result<(), PrepareError> {
        let image = self.image(image_id)?;
        Ok(self.0.snapshots.prepare(container_id, &image.layers)?)
    }

    /// As [`ImageService::prepare`], and keeps the images `volumes` (by ID) from being collected,
    /// too, so that they can be mounted with [`ImageService::mount_volume`]. Blocking.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left then.
    pub fn prepare_with_volumes(
        &self,
        container_id: &str,
        image_id: &str,
        volumes: &[String],
    ) -> Result<(), PrepareError> {
        let image = self.image(image_id)?;
        let layers = |id: &String| Ok((id.clone(), self.image(id)?.layers.clone()));
        let volumes = volumes
            .iter()
            .map(layers)
            .collect::<Result<_, PrepareError>>()?;
        let snapshots = &self.0.snapshots;
        Ok(snapshots.prepare_with(container_id, &image.layers, &volumes)?)
    }

    /// As [`ImageService::mount_rootfs`], with owners shown through `map`. Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn mount_rootfs_mapped(
        &self,
        container_id: &str,
        map: &IdMap,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        self.0.snapshots.mount_mapped(container_id, map, label)
    }

    /// A detached read-only mount of an image prepared as a volume of the container: all of it, or
    /// what is at `sub_path`. Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn mount_volume(
        &self,
        container_id: &str,
        image_id: &str,
        sub_path: &str,
        map: Option<&IdMap>,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        let snapshots = &self.0.snapshots;
        snapshots.mount_volume(container_id, image_id, sub_path, map, label)
    }

    /// A detached mount of a prepared container's root file system, writable; all of its files
    /// have the SELinux label, where one is given. Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn mount_rootfs(
        &self,
        container_id: &str,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        self.0.snapshots.mount_labelled(container_id, label)
    }

    /// Removes a container's writable layer; absent is success. The container must have ended.
    /// Layers that only it still had go as well, soon after. Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn remove_container(&self, container_id: &str) -> Result<(), SnapshotError> {
        // One that cannot be read is removed all the same.
        let layers = self
            .0
            .snapshots
            .all_layers(container_id)
            .unwrap_or_default();
        self.0.snapshots.remove(container_id)?;
        if layers
            .iter()
            .flatten()
            .any(|layer| self.is_left_over(layer))
        {
            self.collect_soon();
        }
        Ok(())
    }

    /// The content of a regular file of an image, as a process in it would see it; `None` where
    /// there is none. Blocking.
    ///
    /// # Errors
    /// [`PrepareError`]; also for more than `max_bytes` and for what is no regular file.
    pub fn read_file_in_image(
        &self,
        image_id: &str,
        path: &str,
        max_bytes: u64,
    ) -> Result<Option<Vec<u8>>, PrepareError> {
        let image = self.image(image_id)?;
        let found = snapshot::read_in_image(&self.0.layers, &image.layers, path, max_bytes);
        Ok(found?)
    }

    /// A detached read-only mount of an image's merged layers. Blocking.
    ///
    /// # Errors
    /// [`PrepareError`].
    pub fn mount_image(&self, image_id: &str) -> Result<OwnedFd, PrepareError> {
        let image = self.image(image_id)?;
        Ok(snapshot::mount_readonly(&self.0.layers, &image.layers)?)
    }

    /// The containers' writable layers, for what is measured or looked for in them.
    pub fn snapshots(&self) -> &Snapshots {
        &self.0.snapshots
    }

    fn image(&self, name: &str) -> Result<Arc<Image>, PrepareError> {
        self.find(name).ok_or_else(|| PrepareError::NoImage {
            image: name.chars().take(300).collect(),
        })
    }

    /// Waits until the files of what was removed are gone. Blocking.
    pub fn finish_removals(&self) {
        self.0.layers.finish_removals();
        self.0.snapshots.finish_removals();
    }

    fn record_path(&self, id: &Digest) -> PathBuf {
        self.0
            .settings
            .lib
            .join("records")
            .join(format!("{}.rec", id.hex()))
    }

    /// Writes `new`, moving its tags here from the images that had them, and lists it.
    fn commit(&self, mut new: ImageRecord, documents: &Documents) -> Result<(), CommitError> {
        let _alone = lock(&self.0.changes);
        for (digest, bytes) in documents {
            // Collected since, as nothing named them yet.
            if !self.0.content.has(digest) {
                self.0.content.put(digest, bytes)?;
            }
        }
        self.0.content.sync(documents.keys())?;
        let images = self.0.images.load_full();
        if let Some((old, _)) = images.by_id.get(&new.id.to_string()) {
            new.repo_tags.extend(old.repo_tags.iter().cloned());
            new.repo_digests.extend(old.repo_digests.iter().cloned());
            new.documents.extend(old.documents.iter().cloned());
            new.pinned |= old.pinned;
            new.found_as.extend(old.found_as.iter().cloned());
            pulling::keep_signatures(&mut new.signatures, &old.signatures);
        }
        self.take_names_of_incomplete(&mut new, &images);
        // An image loses its tag before another has it: never do two claim it.
        let mut losers: BTreeMap<Digest, ImageRecord> = BTreeMap::new();
        for tag in &new.repo_tags {
            if let Some(owner) = images.tagged(tag)
                && owner.id != new.id
            {
                losers
                    .entry(owner.id.clone())
                    .or_insert_with(|| (**owner).clone())
                    .repo_tags
                    .remove(tag);
            }
        }
        for name in &new.found_as {
            if let Some(owner) = images.tagged(name)
                && owner.id != new.id
                && owner.found_as.contains(name)
            {
                losers
                    .entry(owner.id.clone())
                    .or_insert_with(|| (**owner).clone())
                    .found_as
                    .remove(name);
            }
        }
        let mut changes = Vec::new();
        for (id, loser) in losers {
            record::save(&self.record_path(&id), &loser, Durability::PowerCut)?;
            changes.push((id, Some(loser)));
        }
        crash::point("pull_image.before_record");
        record::save(&self.record_path(&new.id), &new, Durability::PowerCut)?;
        changes.push((new.id.clone(), Some(new)));
        for (id, _) in &changes {
            lock(&self.0.incomplete).remove(id);
        }
        self.0.images.store(Arc::new(images.with(&changes)));
        crash::point("pull_image.after_record");
        Ok(())
    }
}

/// Which files of `settings` say how registries are reached.
pub fn registry_files(settings: &Settings) -> RegistryFiles {
    RegistryFiles {
        certs_d: settings.certs_d.clone(),
        registries_conf: settings.registries_conf.clone(),
        auth_file: settings.auth_file.clone(),
        fallback: settings.fallback,
        proxies: settings.proxies.clone(),
    }
}

fn warn(error: &(dyn StdError + 'static), what: &'static str) {
    tracing::warn!(error, what);
}

fn load(dir: &Path, layers: &Store, pinned: &Patterns) -> Result<(Images, Incomplete), OpenError> {
    let io = |action| {
        move |source| OpenError::Io {
            action,
            path: dir.into(),
            source,
        }
    };
    let mut records = Vec::new();
    let mut incomplete = Incomplete::default();
    for entry in std::fs::read_dir(dir).map_err(io("list"))? {
        let entry = entry.map_err(io("list"))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if atomic_file::is_temporary(&name) {
            std::fs::remove_file(entry.path()).map_err(io("clean"))?;
            continue;
        }
        let Some(hex) = name.strip_suffix(".rec") else {
            continue;
        };
        let record: ImageRecord = match record::load(&entry.path()) {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn StdError,
                    "an image's record cannot be read, the image must be pulled again"
                );
                continue;
            }
        };
        if record.id.hex() != hex {
            tracing::warn!(image = %record.id, "an image's record has another's name");
            continue;
        }
        // In this order, as a layer is here before it is not being rebuilt any more.
        let is_missing = |id: &&LayerId| !layers.is_rebuilding(id) && !layers.has(id);
        if let Some(missing) = record.layers.iter().find(is_missing) {
            tracing::warn!(
                image = %record.id,
                %missing,
                "an image is not whole, it must be pulled again"
            );
            incomplete.put(record);
            continue;
        }
        if record.layers.iter().any(|id| !layers.has(id)) {
            tracing::info!(
                image = %record.id,
                "an image is not listed yet, a power cut may have taken files that are unpacked again"
            );
            incomplete.put(record);
            continue;
        }
        records.push(record);
    }
    Ok((Images::new(records, Arc::new(pinned.clone())), incomplete))
}
