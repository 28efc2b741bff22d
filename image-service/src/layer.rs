//! The layers on this node: one stored copy each, unpacked.
//!
//! ```text
//! layers/<hex of diff ID>/      fs/ layer.rec recipe.zst synced   a layer that stands alone
//! layers/on-<hex of chain ID>/  fs/ layer.rec recipe.zst synced   one that leans on its parents
//! layers/<either>/damaged                                         its content was found wrong
//! layers/old-<random>-<name>/                                     damaged, and fetched again; some
//!                                                                 container still has it mounted
//! layers/empty/                                                   for images without layers
//! layers/<hex of diff ID>/blob                                    its files are not synced yet
//! layers/ingest-<random>/       fs/ recipe.zst blob               being unpacked
//! layers/trash-<random>                                           being removed
//!
//! ingest ── whole and verified: rename ──> layer ── syncfs, then `synced` ──> durable
//!                                           ├── rename ──> trash ── removed in the background
//!                                           └── `damaged` ── fetched again: rename ──> old
//! ```
//!
//! A layer without `synced` is good until the node reboots: a power cut may
//! have taken its data. [`Store::sync`] comes before anything durable names it: it then has
//! `synced`, or a durable `blob` that it can be unpacked from again, see [`kept`].
//!
//! A layer is in use while a [`Lease`] holds it or a reference that
//! [`crate::gc`] asks for names it.
//! Source: OCI image-spec, `config.md`, "Layer DiffID" and "Layer ChainID".

mod damage;
mod kept;
mod settle;
mod sweep;
mod verify;
pub mod walk;

use crate::digest::{Algorithm, BadDigest, Digest};
use crate::snapshot::{self, SnapshotError};
use crate::unpack::apart::{self, Writers};
use crate::unpack::{self, Compression, Parents, Summary, Target, UnpackError, recipe};
use berth_store::atomic_file::Durability;
use berth_store::{Record, crash, record};
use kept::{Keeping, Kept};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use sweep::Sweeper;
pub(crate) use verify::note_files;
pub use verify::{Damage, Finding, Pace};

const FS: &str = "fs";
const RECORD: &str = "layer.rec";
const RECIPE: &str = "recipe.zst";
const SYNCED: &str = "synced";
const DAMAGED: &str = "damaged";
const OLD: &str = "old-";
const EMPTY: &str = "empty";
const INGEST: &str = "ingest-";
const TRASH: &str = "trash-";
const ON_PARENTS: &str = "on-";

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A stored layer's name: also that of its directory.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LayerId {
    leans_on_parents: bool,
    digest: Digest,
}

impl LayerId {
    /// A layer that is the same above any parents.
    pub fn alone(diff_id: &Digest) -> LayerId {
        LayerId {
            leans_on_parents: false,
            digest: diff_id.clone(),
        }
    }

    /// The last of the layers `diff_ids` (lowest first) where it leans on the
    /// others; `None` for no layers.
    pub fn on_parents(diff_ids: &[Digest]) -> Option<LayerId> {
        Some(LayerId {
            leans_on_parents: true,
            digest: chain_id(diff_ids)?,
        })
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = if self.leans_on_parents {
            ON_PARENTS
        } else {
            ""
        };
        write!(f, "{prefix}{}", self.digest.hex())
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for LayerId {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<LayerId, BadDigest> {
        let (leans_on_parents, hex) = match text.strip_prefix(ON_PARENTS) {
            Some(hex) => (true, hex),
            None => (false, text),
        };
        // The length tells the algorithms apart.
        let algorithm = if hex.len() == 128 { "sha512" } else { "sha256" };
        Ok(LayerId {
            leans_on_parents,
            digest: format!("{algorithm}:{hex}").parse()?,
        })
    }
}

impl TryFrom<String> for LayerId {
    type Error = BadDigest;
    fn try_from(text: String) -> Result<LayerId, BadDigest> {
        text.parse()
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> String {
        id.to_string()
    }
}

/// The chain ID of layers given lowest first; `None` for none.
pub fn chain_id(diff_ids: &[Digest]) -> Option<Digest> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(first.clone(), |chain, diff_id| {
        Digest::sha256(format!("{chain} {diff_id}").as_bytes())
    }))
}

/// What is known of a stored layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Its name here.
    pub id: LayerId,
    /// The digest of its uncompressed archive.
    pub diff_id: Digest,
    /// Space it takes, in bytes.
    pub bytes: u64,
    /// Inodes it takes.
    pub inodes: u64,
    /// It says what the image's root directory is like.
    pub has_root: bool,
    /// It hides all layers below it.
    #[serde(default)]
    pub opaque_root: bool,
    /// What is known of its content.
    #[serde(default)]
    pub recipe: Recipe,
}

/// What was kept from unpacking a layer, see [`crate::unpack::recipe`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// Nothing: unpacked by an earlier version.
    #[default]
    None,
    /// The checksum of every file.
    Files,
    /// That, and everything else of the archive: it can be put together again.
    Archive,
}

#[derive(Serialize, Deserialize)]
struct LayerRecord {
    layer: LayerInfo,
    /// The kernel's boot the layer was unpacked in.
    boot_id: String,
}

impl Record for LayerRecord {
    const KIND: &'static str = "layer";
    const VERSION: u32 = 1;
}

/// What a layer's record says, from the bytes of its file.
///
/// # Errors
/// Where it is damaged, or of a later version.
pub fn parse_record(bytes: &[u8]) -> Result<LayerInfo, berth_store::RecordError> {
    record::decode::<LayerRecord>(Path::new(RECORD), bytes).map(|record| record.layer)
}

/// Why the place layers are kept in cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}")]
pub struct StoreError {
    /// "open", "make" and so on.
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What the kernel said.
    pub source: Errno,
}

/// What [`Store::unpack`] is to unpack.
#[derive(Clone, Copy, Debug)]
pub struct Ingest<'a> {
    /// The diff IDs of the image's layers, lowest first; the last is this layer's.
    pub diff_ids: &'a [Digest],
    /// The layers below, lowest first, when all are here: one fewer than `diff_ids`.
    /// A layer that turns out to need them fails with `LeansOnParents` otherwise.
    pub parents: Option<&'a [LayerId]>,
    /// By the media type.
    pub compression: Compression,
    /// Refuses an uncompressed archive of more bytes.
    pub limit_bytes: Option<u64>,
}

/// Waits for the layers below one and gives them, lowest first.
pub type WaitForParents<'a> = dyn Fn() -> Result<Vec<LayerId>, UnpackError> + Sync + 'a;

/// The layers on this node. Cheap to clone; all clones are the same store.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    fd: OwnedFd,
    boot_id: String,
    state: Mutex<State>,
    /// An unpacking has ended.
    landed: Condvar,
    /// One sync at a time: the second finds its work done.
    syncing: Mutex<()>,
    settler: settle::Settler,
    /// One collection at a time.
    collecting: Mutex<()>,
    sweeper: Sweeper,
    early: unpack::Early,
    /// Who writes layers; without them, the thread that asks.
    writers: Option<Arc<Writers>>,
}

#[derive(Default)]
struct State {
    layers: HashMap<LayerId, LayerInfo>,
    /// How many leases hold each layer.
    held: HashMap<LayerId, usize>,
    /// While a collection runs: every layer that was held at any moment of it.
    held_while_collecting: Option<HashSet<LayerId>>,
    /// Diff IDs being unpacked.
    flights: HashSet<Digest>,
    unsynced: HashSet<LayerId>,
    /// Those of them whose blob is on the disk.
    kept: HashSet<LayerId>,
    /// Layers that are unpacked again from their blobs; their flights are taken.
    rebuilding: HashSet<LayerId>,
    /// Layers whose content is not right; containers may have them mounted.
    damaged: HashMap<LayerId, LayerInfo>,
    /// Directories of layers that were fetched again since, and what they take.
    old: HashMap<String, (LayerId, walk::Sums)>,
    /// What records, recipes and the layers' own directories take, by directory.
    beside: HashMap<String, walk::Sums>,
    bytes: u64,
    inodes: u64,
}

impl State {
    fn hold(&mut self, id: &LayerId) {
        *self.held.entry(id.clone()).or_default() += 1;
        if let Some(held) = &mut self.held_while_collecting {
            held.insert(id.clone());
        }
    }

    fn add(&mut self, info: LayerInfo) {
        self.bytes += info.bytes;
        self.inodes += info.inodes;
        self.layers.insert(info.id.clone(), info);
    }

    fn forget(&mut self, id: &LayerId) -> Option<LayerInfo> {
        self.unsynced.remove(id);
        self.kept.remove(id);
        self.beside.remove(&id.to_string());
        if let Some(info) = self.damaged.remove(id) {
            return Some(info);
        }
        let info = self.layers.remove(id)?;
        self.bytes = self.bytes.saturating_sub(info.bytes);
        self.inodes = self.inodes.saturating_sub(info.inodes);
        Some(info)
    }
}

/// Keeps the layers it was told to hold from being collected, until dropped.
pub struct Lease {
    store: Store,
    layers: Mutex<Vec<LayerId>>,
}

impl Lease {
    /// Holds `id`; `false` when there is no such layer.
    pub fn hold(&self, id: &LayerId) -> bool {
        let mut state = self.store.state();
        if !state.layers.contains_key(id) {
            return false;
        }
        self.take(&mut state, id);
        true
    }

    fn take(&self, state: &mut State, id: &LayerId) {
        state.hold(id);
        lock(&self.layers).push(id.clone());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.store.state();
        for id in lock(&self.layers).drain(..) {
            if let Some(count) = state.held.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    state.held.remove(&id);
                }
            }
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&*lock(&self.layers)).finish()
    }
}

impl Store {
    /// Opens the store in `dir`, which is made if it is not there, and begins
    /// to remove what an earlier process left half-done or a power cut made
    /// doubtful.
    ///
    /// # Errors
    /// Where `dir` cannot be made, opened or read. A single damaged layer is
    /// repaired if its content is known to be whole and else removed.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        Store::open_with(dir, None)
    }

    /// As [`Store::open`], with layers written by processes of their own.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(dir: &Path, writers: Option<Arc<Writers>>) -> Result<Store, StoreError> {
        let fail = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError {
                action,
                path,
                source,
            }
        };
        std::fs::create_dir_all(dir).map_err(|error| fail("make", dir)(errno(&error)))?;
        // Images have files that only root may see, setuid ones among them.
        rustix::fs::chmod(dir, Mode::from_raw_mode(0o700)).map_err(fail("make private", dir))?;
        let fd = rustix::fs::open(dir, OPEN_DIRECTORY, Mode::empty()).map_err(fail("open", dir))?;
        match rustix::fs::mkdirat(&fd, EMPTY, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(fail("make", &dir.join(EMPTY))(source)),
        }
        let boot_id_file = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = std::fs::read_to_string(boot_id_file)
            .map_err(|error| fail("read", boot_id_file)(errno(&error)))?;
        let sweeper = Sweeper::new(
            fd.try_clone()
                .map_err(|error| fail("open", dir)(errno(&error)))?,
        );
        let store = Store(Arc::new(Inner {
            dir: dir.to_owned(),
            fd,
            boot_id: boot_id.trim().to_owned(),
            state: Mutex::default(),
            landed: Condvar::new(),
            syncing: Mutex::default(),
            settler: settle::Settler::default(),
            collecting: Mutex::default(),
            sweeper,
            early: unpack::Early::default(),
            writers,
        }));
        store.load().map_err(fail("read", dir))?;
        Ok(store)
    }

    fn load(&self) -> Result<(), Errno> {
        let mut state = self.state();
        let mut to_rebuild = Vec::new();
        for entry in Dir::read_from(&self.0.fd)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(INGEST) || name.starts_with(TRASH) {
                self.0.sweeper.remove(name);
            } else if let Some(id) = damage::old_id(&name) {
                self.load_old(&mut state, name, id);
            } else if let Ok(id) = name.parse::<LayerId>() {
                match self.load_layer(&id) {
                    Some((info, _)) if self.is_marked_damaged(&id) => {
                        tracing::warn!(layer = %id, "a layer is damaged, it is fetched again when it is needed");
                        state.beside.insert(name, self.measure_beside(&id));
                        state.damaged.insert(id, info);
                    }
                    Some((info, synced)) => {
                        if !synced {
                            state.unsynced.insert(id.clone());
                            if self.has_blob(&id) {
                                state.kept.insert(id.clone());
                            }
                        } else if let Ok(dir) =
                            rustix::fs::openat(&self.0.fd, &*name, OPEN_DIRECTORY, Mode::empty())
                        {
                            kept::drop_blob(dir.as_fd());
                        }
                        state.beside.insert(name, self.measure_beside(&id));
                        state.add(info);
                    }
                    None if self.has_blob(&id) && !self.is_marked_damaged(&id) => {
                        to_rebuild.push(id);
                    }
                    None => {
                        tracing::warn!(layer = %id, "removing a layer that is not known to be whole");
                        self.trash(&id)?;
                    }
                }
            }
        }
        let has_kept = !state.kept.is_empty();
        drop(state);
        if has_kept {
            self.0.settler.soon(self);
        }
        self.rebuild(to_rebuild);
        Ok(())
    }

    /// The layer and whether it is durable; `None` where its content cannot be trusted.
    fn load_layer(&self, id: &LayerId) -> Option<(LayerInfo, bool)> {
        let dir = self.0.dir.join(id.to_string());
        let synced = dir.join(SYNCED).exists();
        let path = dir.join(RECORD);
        match record::load::<LayerRecord>(&path) {
            Ok(record)
                if record.layer.id == *id
                    && (synced || record.boot_id == self.0.boot_id)
                    && dir.join(FS).is_dir() =>
            {
                Some((record.layer, synced))
            }
            Ok(_) => None,
            // Only the record is lost, and what it says can be found again, but for the diff ID
            // of a layer that leans; nobody asks for that.
            Err(error) if synced => {
                tracing::warn!(
                    layer = %id,
                    error = &error as &dyn std::error::Error,
                    "writing a layer's damaged record anew"
                );
                let root = rustix::fs::open(dir.join(FS), OPEN_DIRECTORY, Mode::empty()).ok()?;
                let sums = walk::measure(&root).ok()?;
                let layer = LayerInfo {
                    id: id.clone(),
                    diff_id: id.digest.clone(),
                    bytes: sums.bytes,
                    inodes: sums.inodes,
                    has_root: true,
                    opaque_root: unpack::is_opaque(&root).ok()?,
                    recipe: if dir.join(RECIPE).exists() {
                        Recipe::Files
                    } else {
                        Recipe::None
                    },
                };
                self.save(&path, &layer).ok()?;
                Some((layer, true))
            }
            Err(_) => None,
        }
    }

    fn save(&self, path: &Path, layer: &LayerInfo) -> Result<(), berth_store::RecordError> {
        let record = LayerRecord {
            layer: layer.clone(),
            boot_id: self.0.boot_id.clone(),
        };
        record::save(path, &record, Durability::ProcessEnd)
    }

    /// A lease that holds nothing yet.
    pub fn lease(&self) -> Lease {
        Lease {
            store: self.clone(),
            layers: Mutex::default(),
        }
    }

    /// Whether the layer is here and whole.
    pub fn has(&self, id: &LayerId) -> bool {
        self.state().layers.contains_key(id)
    }

    /// What is known of a layer.
    pub fn info(&self, id: &LayerId) -> Option<LayerInfo> {
        self.state().layers.get(id).cloned()
    }

    /// The last of the layers `diff_ids` (lowest first) if it is here in a form
    /// that fits above the others; `lease` holds it from then on.
    pub fn find(&self, lease: &Lease, diff_ids: &[Digest]) -> Option<LayerInfo> {
        let mut state = self.state();
        self.find_locked(&mut state, lease, diff_ids)
    }

    fn find_locked(
        &self,
        state: &mut State,
        lease: &Lease,
        diff_ids: &[Digest],
    ) -> Option<LayerInfo> {
        let alone = LayerId::alone(diff_ids.last()?);
        let info = match state.layers.get(&alone) {
            Some(info) => info.clone(),
            None => state.layers.get(&LayerId::on_parents(diff_ids)?)?.clone(),
        };
        lease.take(state, &info.id);
        Some(info)
    }

    /// All layers, in no order.
    pub fn layers(&self) -> Vec<LayerInfo> {
        self.state().layers.values().cloned().collect()
    }

    /// Unpacks a layer, unless it is here already; `lease` holds it from then on.
    ///
    /// Blocks: on `blob`, and while another call unpacks the same diff ID. `blob`
    /// is not read in the second case, so let it begin its work with the first read.
    ///
    /// # Errors
    /// Nothing of the layer stays then. After `LeansOnParents` the caller comes
    /// again once the layers below are here, with a new `blob`.
    ///
    /// # Panics
    /// When `ingest.diff_ids` is empty.
    pub fn unpack(
        &self,
        lease: &Lease,
        ingest: Ingest<'_>,
        blob: impl Read + Send,
    ) -> Result<LayerInfo, UnpackError> {
        self.unpack_waiting(lease, ingest, None, None, blob)
    }

    /// As [`Store::unpack`], and a layer that turns out to need its parents while
    /// `ingest.parents` is `None` waits for them: `wait` is called once, blocks, and gives them
    /// as `ingest.parents` would. While it blocks, nobody who wants the same diff ID waits for
    /// this call any more, so it may depend on any layer below; where the layer is here when
    /// this call is done, by whomever, that one is given.
    ///
    /// `blob_bytes` is how long `blob` is, if it may be kept beside the layer until the layer's
    /// files are on the disk: [`Store::sync`] is short then.
    ///
    /// # Errors
    /// As [`Store::unpack`]; what `wait` says.
    ///
    /// # Panics
    /// When `ingest.diff_ids` is empty.
    pub fn unpack_waiting(
        &self,
        lease: &Lease,
        ingest: Ingest<'_>,
        wait: Option<&WaitForParents<'_>>,
        blob_bytes: Option<u64>,
        blob: impl Read + Send,
    ) -> Result<LayerInfo, UnpackError> {
        let diff_id = ingest
            .diff_ids
            .last()
            .expect("a layer to unpack has a diff ID");
        let flight = {
            let mut state = self.state();
            loop {
                if let Some(info) = self.find_locked(&mut state, lease, ingest.diff_ids) {
                    return Ok(info);
                }
                if state.flights.insert(diff_id.clone()) {
                    break;
                }
                state = self
                    .0
                    .landed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            Mutex::new(Some(Flight {
                store: self,
                diff_id,
            }))
        };
        let view = |parents: &[LayerId]| {
            snapshot::mount_readonly(self, parents).map_err(|source| UnpackError::Parents {
                source: Box::new(source),
            })
        };
        let later = wait.map(|wait| {
            let (flight, view) = (&flight, &view);
            move || {
                drop(lock(flight).take());
                view(&wait()?)
            }
        });
        let parents_view = match ingest.parents {
            Some(parents) if !parents.is_empty() && ingest.diff_ids.len() > 1 => {
                Some(view(parents)?)
            }
            _ => None,
        };
        let parents = match (&parents_view, &later) {
            (Some(view), _) => Parents::Merged(view.as_fd()),
            (None, _) if ingest.diff_ids.len() == 1 => Parents::None,
            (None, Some(later)) => Parents::Later(later),
            (None, None) => Parents::Unknown,
        };
        let name = format!("{INGEST}{}", random_name());
        let unpacked = self
            .unpack_to(&name, ingest, diff_id, parents, blob_bytes, blob)
            .and_then(|(info, is_kept)| self.put(&name, lease, ingest, info, is_kept));
        match unpacked {
            Ok((info, true)) => Ok(info),
            Ok((info, false)) => {
                self.0.sweeper.remove(name);
                Ok(info)
            }
            Err(error) => {
                self.0.sweeper.remove(name);
                if !matches!(error, UnpackError::LeansOnParents) {
                    return Err(error);
                }
                // Without its flight another one may have been quicker.
                self.find(lease, ingest.diff_ids).ok_or(error)
            }
        }
    }

    /// Unpacks a layer into the directory `name`, which is made; gives what is known of it and
    /// whether its blob is there and durable.
    fn unpack_to(
        &self,
        name: &str,
        ingest: Ingest<'_>,
        diff_id: &Digest,
        parents: Parents<'_>,
        blob_bytes: Option<u64>,
        blob: impl Read + Send,
    ) -> Result<(LayerInfo, bool), UnpackError> {
        let path = self.0.dir.join(name);
        let fail = |action, path: &Path| {
            let path = path.to_owned();
            move |source| UnpackError::Store {
                action,
                path,
                source,
            }
        };
        let private = Mode::from_raw_mode(0o700);
        rustix::fs::mkdirat(&self.0.fd, name, private).map_err(fail("make", &path))?;
        let ingest_dir = rustix::fs::openat(&self.0.fd, name, OPEN_DIRECTORY, Mode::empty())
            .map_err(fail("open", &path))?;
        let fs = path.join(FS);
        rustix::fs::mkdirat(&ingest_dir, FS, private).map_err(fail("make", &fs))?;
        let root = rustix::fs::openat(&ingest_dir, FS, OPEN_DIRECTORY, Mode::empty())
            .map_err(fail("open", &fs))?;
        // What a layer without an entry for its root gets, as everywhere.
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(fail("make", &fs))?;

        let recipe_path = path.join(RECIPE);
        let open_recipe = || {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
            rustix::fs::openat(&ingest_dir, RECIPE, flags, Mode::from_raw_mode(0o600))
                .map_err(fail("write", &recipe_path))
        };
        let recipe_writer = |file: OwnedFd| {
            recipe::Writer::new(file.into())
                .map_err(|error| fail("write", &recipe_path)(recipe::errno(&error)))
        };
        let kept = blob_bytes
            .filter(|_| self.0.writers.is_none())
            .and_then(|bytes| Kept::new(ingest_dir.as_fd(), ingest.compression, bytes));
        let (summary, found) = match &self.0.writers {
            Some(writers) => {
                let recipe = open_recipe()?;
                let layer = apart::Layer {
                    compression: ingest.compression,
                    diff_id,
                    limit_bytes: ingest.limit_bytes,
                    parents,
                    root: root.as_fd(),
                    root_path: &fs,
                    recipe: recipe.as_fd(),
                };
                self.unpack_apart(writers, blob, &layer)?
            }
            None => {
                let recipe = recipe_writer(open_recipe()?)?;
                let blob = Keeping {
                    reader: blob,
                    kept: kept.clone(),
                };
                // Files whose blob is kept need not be on the disk soon.
                let early = kept.is_none().then_some(&self.0.early);
                self.unpack_here(blob, ingest, root, parents, early, recipe)?
            }
        };
        if found != *diff_id {
            return Err(UnpackError::DiffId {
                expected: diff_id.clone(),
                found,
            });
        }
        if summary.compression != ingest.compression {
            tracing::warn!(
                layer = %diff_id,
                said = %ingest.compression,
                found = %summary.compression,
                "a layer is packed otherwise than its media type says"
            );
        }
        let id = match LayerId::on_parents(ingest.diff_ids) {
            Some(on_parents) if summary.leans_on_parents => on_parents,
            _ => LayerId::alone(diff_id),
        };
        let info = LayerInfo {
            id: id.clone(),
            diff_id: diff_id.clone(),
            bytes: summary.bytes,
            inodes: summary.inodes,
            has_root: summary.has_root,
            opaque_root: summary.opaque_root,
            recipe: match (summary.is_exact, &self.0.writers) {
                (true, _) => Recipe::Archive,
                // The writer has noted the files.
                (false, Some(_)) => Recipe::Files,
                (false, None) => {
                    // What an entry wrote and a later one replaced is not there to be checked.
                    let root = rustix::fs::openat(&ingest_dir, FS, OPEN_DIRECTORY, Mode::empty())
                        .map_err(fail("open", &fs))?;
                    verify::note_files(&root, recipe_writer(open_recipe()?)?)
                        .map_err(fail("read", &fs))?;
                    Recipe::Files
                }
            },
        };
        self.save(&path.join(RECORD), &info)?;
        // One that leans cannot be unpacked again without its parents.
        let is_kept =
            kept.is_some_and(|kept| kept.finish(ingest_dir.as_fd(), !summary.leans_on_parents));
        crash::point("layer-unpacked");
        Ok((info, is_kept))
    }

    /// Gives the layer that was unpacked into the directory `name` its own name, and tells
    /// whether it is the one that is here now: else another one came meanwhile.
    fn put(
        &self,
        name: &str,
        lease: &Lease,
        ingest: Ingest<'_>,
        info: LayerInfo,
        is_kept: bool,
    ) -> Result<(LayerInfo, bool), UnpackError> {
        let id = info.id.clone();
        let mut state = self.state();
        if let Some(info) = self.find_locked(&mut state, lease, ingest.diff_ids) {
            return Ok((info, false));
        }
        let final_name = id.to_string();
        self.supersede(&mut state, &id)?;
        rustix::fs::renameat_with(
            &self.0.fd,
            name,
            &self.0.fd,
            &*final_name,
            RenameFlags::NOREPLACE,
        )
        .map_err(|source| UnpackError::Store {
            action: "rename",
            path: self.0.dir.join(name),
            source,
        })?;
        crash::point("layer-renamed");
        state.unsynced.insert(id.clone());
        if is_kept {
            state.kept.insert(id.clone());
        }
        let beside = self.measure_beside(&id);
        state.beside.insert(final_name, beside);
        state.add(info.clone());
        lease.take(&mut state, &id);
        Ok((info, true))
    }

    /// Unpacks in this thread.
    fn unpack_here(
        &self,
        blob: impl Read + Send,
        ingest: Ingest<'_>,
        root: OwnedFd,
        parents: Parents<'_>,
        early: Option<&unpack::Early>,
        recipe: recipe::Writer,
    ) -> Result<(Summary, Digest), UnpackError> {
        let algorithm = ingest
            .diff_ids
            .last()
            .map_or(Algorithm::Sha256, Digest::algorithm);
        let mut replaced = Vec::new();
        let mut attic_names = || {
            let name = format!("{TRASH}{}", random_name());
            replaced.push(name.clone());
            name
        };
        let target = Target {
            root,
            attic: self.0.fd.as_fd(),
            attic_names: &mut attic_names,
            parents,
            early,
            recipe,
        };
        let (compression, limit_bytes) = (ingest.compression, ingest.limit_bytes);
        let unpacked = unpack::unpack(blob, compression, algorithm, limit_bytes, target);
        for name in replaced {
            self.0.sweeper.remove(name);
        }
        unpacked
    }

    /// Has it unpacked by a process of its own. What entries replace goes into one directory, as
    /// a process that is killed cannot tell their names.
    fn unpack_apart(
        &self,
        writers: &Writers,
        blob: impl Read,
        layer: &apart::Layer<'_>,
    ) -> Result<(Summary, Digest), UnpackError> {
        let name = format!("{TRASH}{}", random_name());
        let path = self.0.dir.join(&name);
        let fail = |action| {
            let path = path.clone();
            move |source| UnpackError::Store {
                action,
                path,
                source,
            }
        };
        rustix::fs::mkdirat(&self.0.fd, &*name, Mode::from_raw_mode(0o700))
            .map_err(fail("make"))?;
        let unpacked = rustix::fs::openat(&self.0.fd, &*name, OPEN_DIRECTORY, Mode::empty())
            .map_err(fail("open"))
            .and_then(|attic| writers.unpack(blob, layer, attic.as_fd()));
        self.0.sweeper.remove(name);
        unpacked
    }

    /// Removes a layer: gone from here at once, its files soon after. One that
    /// is not here counts as removed. Leases and references are the caller's
    /// business: see [`crate::gc::collect`].
    ///
    /// # Errors
    /// The kernel's to the rename; the layer is still here then.
    pub fn remove(&self, id: &LayerId) -> Result<(), StoreError> {
        let mut state = self.state();
        self.remove_locked(&mut state, id).map(|_| ())
    }

    fn remove_locked(
        &self,
        state: &mut State,
        id: &LayerId,
    ) -> Result<Option<LayerInfo>, StoreError> {
        self.trash(id).map_err(|source| StoreError {
            action: "remove",
            path: self.0.dir.join(id.to_string()),
            source,
        })?;
        Ok(state.forget(id))
    }

    fn trash(&self, id: &LayerId) -> Result<(), Errno> {
        let name = format!("{TRASH}{}", random_name());
        match rustix::fs::renameat(&self.0.fd, id.to_string(), &self.0.fd, &*name) {
            Ok(()) => {
                self.0.sweeper.remove(name);
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes the layers that neither `references` names nor a lease has held
    /// at any moment since this call began.
    pub(crate) fn collect<E>(
        &self,
        references: impl FnOnce() -> Result<HashSet<LayerId>, E>,
    ) -> Result<(Vec<LayerInfo>, Vec<StoreError>), E> {
        let _turn = lock(&self.0.collecting);
        let candidates: Vec<LayerId> = {
            let mut state = self.state();
            state.held_while_collecting = Some(state.held.keys().cloned().collect());
            let damaged = state.damaged.keys();
            state.layers.keys().chain(damaged).cloned().collect()
        };
        let _end = EndOfCollection(self);
        let referenced = references()?;
        let mut removed = Vec::new();
        let mut failures = Vec::new();
        for id in candidates {
            let mut state = self.state();
            let held = state
                .held_while_collecting
                .as_ref()
                .is_some_and(|held| held.contains(&id));
            if held || referenced.contains(&id) {
                continue;
            }
            match self.remove_locked(&mut state, &id) {
                Ok(info) => removed.extend(info),
                Err(error) => failures.push(error),
            }
        }
        Ok((removed, failures))
    }

    /// Space in bytes and inodes that the layers take together, from counters.
    pub fn sums(&self) -> walk::Sums {
        let state = self.state();
        walk::Sums {
            bytes: state.bytes,
            inodes: state.inodes,
        }
    }

    /// The kernel's boot this store was opened in.
    pub(crate) fn boot_id(&self) -> &str {
        &self.0.boot_id
    }

    /// Where the layers are kept.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The directory everything is below, for mounting.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// The layer's files, relative to [`Store::fd`].
    pub(crate) fn fs_path(id: &LayerId) -> String {
        format!("{id}/{FS}")
    }

    /// An empty directory, relative to [`Store::fd`].
    pub(crate) const EMPTY_PATH: &'static str = EMPTY;

    /// Waits until everything that was being removed is gone.
    pub fn finish_removals(&self) {
        self.0.sweeper.finish();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.0.dir).finish()
    }
}

/// The mode, owner and group of an image's root directory: from its topmost
/// layer that says so, else root's with 0755.
pub(crate) fn root_attributes(
    store: &Store,
    layers: &[LayerId],
) -> Result<(u32, u32, u32), SnapshotError> {
    for id in layers.iter().rev() {
        let info = store
            .info(id)
            .ok_or_else(|| SnapshotError::NoLayer { layer: id.clone() })?;
        if info.has_root {
            let path = Store::fs_path(id);
            let stat = rustix::fs::statat(store.fd(), &*path, AtFlags::SYMLINK_NOFOLLOW).map_err(
                |source| SnapshotError::Io {
                    action: "look at",
                    path: store.dir().join(&path),
                    source,
                },
            )?;
            return Ok((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid));
        }
        if info.opaque_root {
            break;
        }
    }
    Ok((0o755, 0, 0))
}

struct Flight<'a> {
    store: &'a Store,
    diff_id: &'a Digest,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.store.state().flights.remove(self.diff_id);
        self.store.0.landed.notify_all();
    }
}

struct EndOfCollection<'a>(&'a Store);

impl Drop for EndOfCollection<'_> {
    fn drop(&mut self) {
        self.0.state().held_while_collecting = None;
    }
}

/// A panic elsewhere leaves nothing half-changed under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// 16 hex digits nobody can guess.
pub(crate) fn random_name() -> String {
    let mut bytes = [0u8; 8];
    // Before the kernel has gathered enough randomness this blocks, and it cannot fail otherwise;
    // a name taken twice is an error of mkdir or rename, no damage.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    hex::encode(bytes)
}
