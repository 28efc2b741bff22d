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

use crate::auth::Credentials;
use crate::content::{Content, ContentError};
use crate::digest::Digest;
use crate::gc;
use crate::image::{Image, ImageRecord, Images};
use crate::layer::{Store, StoreError};
use crate::manifest::Platform;
use crate::progress::{Progress, Stage};
use crate::pull::{Documents, Job, PullError};
use crate::reference::Reference;
use crate::registry::{Registry, Timeouts};
use crate::snapshot::{self, IdMap, SnapshotError, Snapshots};
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
use tokio::sync::watch;

/// Where images are and how they are pulled.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directory of images, `lib/images`; made when missing.
    pub lib: PathBuf,
    /// The directory of containers' writable layers, `lib/containers`; made when missing.
    pub containers: PathBuf,
    /// Directories in the format of [`crate::hosts`], searched in order.
    pub certs_d: Vec<PathBuf>,
    /// How many layers of one image are fetched at a time; 3 unless said otherwise.
    pub max_layer_downloads: usize,
    /// Refuses a layer whose archive has more bytes, uncompressed; `None`: the disk decides.
    pub max_layer_bytes: Option<u64>,
    /// How long to wait for registries.
    pub timeouts: Timeouts,
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
            max_layer_downloads: 3,
            max_layer_bytes: Some(MAX_LAYER_BYTES),
            timeouts: Timeouts::default(),
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

type Outcome = Result<Pulled, Arc<PullError>>;

/// Pulls that give the same to everybody who waits for them.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    reference: Reference,
    // Another's secret must not open an image for those who have none.
    credentials: Option<Credentials>,
}

struct Running {
    outcome: watch::Receiver<Option<Outcome>>,
    progress: Progress,
}

struct Inner {
    settings: Settings,
    machine: Platform,
    content: Arc<Content>,
    layers: Store,
    snapshots: Snapshots,
    images: ArcSwap<Images>,
    /// Held while records change.
    changes: Mutex<()>,
    running: Mutex<HashMap<Key, Running>>,
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
        let layers = Store::open(&settings.lib.join("layers"))?;
        let snapshots = Snapshots::open(&settings.containers, &layers)?;
        let images = load(&records, &layers)?;
        Ok(ImageService(Arc::new(Inner {
            machine: Platform::host(),
            content: Arc::new(content),
            layers,
            snapshots,
            images: ArcSwap::from_pointee(images),
            changes: Mutex::default(),
            running: Mutex::default(),
            settings,
        })))
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

    /// Pulls `reference`, or joins the pull of the same with the same credentials that is
    /// running. The pull goes on when the caller does not wait for it any more.
    ///
    /// # Errors
    /// [`PullError`], shared by all who waited; nothing is listed then that was not before.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
        progress: &Progress,
    ) -> Result<Pulled, Arc<PullError>> {
        let reference: Reference = reference
            .parse()
            .map_err(|error| Arc::new(PullError::from(error)))?;
        let image = reference.to_string();
        let mut outcome = self.join_or_begin(reference, credentials, progress);
        match outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("waited for it to be there"),
            Err(_) => Err(Arc::new(PullError::Aborted { image })),
        }
    }

    fn join_or_begin(
        &self,
        reference: Reference,
        credentials: Option<Credentials>,
        progress: &Progress,
    ) -> watch::Receiver<Option<Outcome>> {
        let key = Key {
            reference,
            credentials,
        };
        let mut running = lock(&self.0.running);
        if let Some(running) = running.get(&key) {
            progress.follow(&running.progress);
            return running.outcome.clone();
        }
        let (sender, outcome) = watch::channel(None);
        running.insert(
            key.clone(),
            Running {
                outcome: outcome.clone(),
                progress: progress.clone(),
            },
        );
        let flight = Flight {
            service: self.clone(),
            key,
            progress: progress.clone(),
        };
        tokio::spawn(async move {
            let result = flight.run().await.map_err(Arc::new);
            // Not to be joined any more once its outcome is known.
            drop(flight);
            sender.send_replace(Some(result));
        });
        outcome
    }

    /// The pulls that are running: the reference of each, and how far it is.
    pub fn running_pulls(&self) -> Vec<(String, Progress)> {
        let running = lock(&self.0.running);
        let pulls = running.iter();
        pulls
            .map(|(key, pull)| (key.reference.to_string(), pull.progress.clone()))
            .collect()
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
            let kept: HashSet<Digest> = records.flat_map(|r| r.documents.clone()).collect();
            for error in self.0.content.retain(&kept) {
                warn(&error, "a manifest nobody uses is not removed, later");
            }
        }
        let collected = gc::collect(&self.0.layers, || {
            let mut used = self.0.snapshots.references()?;
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
        let (bytes, files) = self.0.content.sums();
        usage::of_images(&self.0.layers, bytes, files)
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
    ) -> Result<OwnedFd, SnapshotError> {
        self.0.snapshots.mount_mapped(container_id, map)
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
    ) -> Result<OwnedFd, SnapshotError> {
        let snapshots = &self.0.snapshots;
        snapshots.mount_volume(container_id, image_id, sub_path, map)
    }

    /// A detached mount of a prepared container's root file system, writable. Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn mount_rootfs(&self, container_id: &str) -> Result<OwnedFd, SnapshotError> {
        self.0.snapshots.mount(container_id)
    }

    /// Removes a container's writable layer; absent is success. The container must have ended.
    /// Blocking.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn remove_container(&self, container_id: &str) -> Result<(), SnapshotError> {
        self.0.snapshots.remove(container_id)
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
        let images = self.0.images.load_full();
        if let Some((old, _)) = images.by_id.get(&new.id.to_string()) {
            new.repo_tags.extend(old.repo_tags.iter().cloned());
            new.repo_digests.extend(old.repo_digests.iter().cloned());
            new.documents.extend(old.documents.iter().cloned());
            new.pinned |= old.pinned;
        }
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
        let mut changes = Vec::new();
        for (id, loser) in losers {
            record::save(&self.record_path(&id), &loser, Durability::PowerCut)?;
            changes.push((id, Some(loser)));
        }
        crash::point("pull_image.before_record");
        record::save(&self.record_path(&new.id), &new, Durability::PowerCut)?;
        changes.push((new.id.clone(), Some(new)));
        self.0.images.store(Arc::new(images.with(&changes)));
        crash::point("pull_image.after_record");
        Ok(())
    }
}

/// A running pull; dropping it ends its being joined.
struct Flight {
    service: ImageService,
    key: Key,
    progress: Progress,
}

impl Drop for Flight {
    fn drop(&mut self) {
        lock(&self.service.0.running).remove(&self.key);
        self.progress.enter(Stage::Done);
    }
}

impl Flight {
    async fn run(&self) -> Result<Pulled, PullError> {
        let service = &self.service.0;
        let reference = self.key.reference.clone();
        let image = reference.to_string();
        let registry = Registry::open(
            &reference,
            &service.settings.certs_d,
            self.key.credentials.clone(),
            service.settings.timeouts,
        )
        .await
        .map_err(|error| PullError::from_registry("manifest", &image, error))?;
        let job = Arc::new(Job {
            reference,
            registry: Arc::new(registry),
            content: Arc::clone(&service.content),
            layers: service.layers.clone(),
            machine: service.machine.clone(),
            max_layer_downloads: service.settings.max_layer_downloads,
            max_layer_bytes: service.settings.max_layer_bytes,
            progress: self.progress.clone(),
        });
        let described = job.describe().await?;
        let fetched = job.fetch(described).await?;
        let image_id = fetched.record.id.to_string();
        self.progress.enter(Stage::Record);
        let service = self.service.clone();
        // The layers' lease ends with `fetched`, after the record names them.
        let committed = tokio::task::spawn_blocking(move || {
            let documents = &fetched.documents;
            service.commit(fetched.record.clone(), documents)
        });
        committed
            .await
            .map_err(|_| PullError::Aborted {
                image: image.clone(),
            })?
            .map_err(|error| error.of(image))?;
        Ok(Pulled {
            image_id,
            bytes: self.progress.bytes(),
        })
    }
}

fn warn(error: &(dyn StdError + 'static), what: &'static str) {
    tracing::warn!(error, what);
}

fn load(dir: &Path, layers: &Store) -> Result<Images, OpenError> {
    let io = |action| {
        move |source| OpenError::Io {
            action,
            path: dir.into(),
            source,
        }
    };
    let mut records = Vec::new();
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
        let missing = record.layers.iter().find(|id| !layers.has(id));
        if record.id.hex() != hex || missing.is_some() {
            tracing::warn!(
                image = %record.id,
                missing = ?missing,
                "an image is not whole, it must be pulled again"
            );
            continue;
        }
        records.push(record);
    }
    Ok(Images::new(records))
}
