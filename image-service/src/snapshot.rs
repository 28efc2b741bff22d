//! Root file systems: layers below, a container's own writable layer on top.
//!
//! ```text
//! containers/<container ID>/  upper/  work/  snapshot.rec
//! containers/trash-<random>                                being removed
//!
//! prepare ──> recorded: its layers cannot be collected ── mount ──> detached overlay
//! ```
//!
//! Overlays are made as detached mounts and never attached on the host, so the
//! host's mount table does not grow with the containers. They vanish with the
//! last descriptor and mount namespace that has them.
//!
//! Source: kernel, `filesystems/overlayfs.rst`; `lowerdir+` since Linux 6.5.

use crate::layer::{self, LayerId, Store, random_name, walk};
use berth_store::atomic_file::Durability;
use berth_store::{Record, RecordError, crash, record};
use rustix::fs::{Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

mod changes;
mod mapped;

pub use mapped::{IdMap, IdRange};

const UPPER: &str = "upper";
const WORK: &str = "work";
const RECORD: &str = "snapshot.rec";
const TRASH: &str = "trash-";

/// Longest container ID that is taken; the CRI's own are 64 characters.
const MAX_ID_BYTES: usize = 128;
/// What mount(2) takes as data, in bytes, its NUL included. Source: mount(2).
const MOUNT_DATA_BYTES: usize = 4096;

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// What every overlay is mounted with. Nothing may depend on file handles or on
/// attributes that steer overlayfs, so that layers stay plain directories.
const OPTIONS: [(&str, &str); 4] = [
    ("index", "off"),
    ("metacopy", "off"),
    ("redirect_dir", "nofollow"),
    ("xino", "auto"),
];

/// Why a root file system cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not an ID that can be the name of a directory.
    #[error("{0:?} is not a container ID")]
    BadId(String),
    /// A layer was not unpacked, or was removed.
    #[error("the layer {layer} is not here")]
    NoLayer {
        /// Which.
        layer: LayerId,
    },
    /// The container was prepared with other layers.
    #[error("the container {container_id} already has a snapshot of other layers")]
    Taken {
        /// Which.
        container_id: String,
    },
    /// The kernel refused the overlay.
    #[error("cannot {action} the overlay of {layers} layers ({kernel})")]
    Overlay {
        /// "configure", "create" and so on.
        action: &'static str,
        /// How many are below.
        layers: usize,
        /// What the kernel wrote about it, or "no details".
        kernel: String,
        /// What the kernel said.
        source: Errno,
    },
    /// More layers than this kernel can be told of.
    #[error(
        "{layers} layers are too many for this kernel, which takes {max}; Linux 6.5 and later take 500"
    )]
    TooManyLayers {
        /// How many there are.
        layers: usize,
        /// How many fit.
        max: usize,
    },
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// "make", "read" and so on.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// The snapshot's record could not be read or written.
    #[error("the snapshot's record is not usable")]
    Record {
        /// Which file, and why.
        #[from]
        source: RecordError,
    },
    /// The container was not prepared with this image as a volume.
    #[error("the image {image_id} is no volume of the container {container_id}")]
    NoVolume {
        /// Whose.
        container_id: String,
        /// Which.
        image_id: String,
    },
    /// The image has nothing at this path.
    #[error("the image has no {path}")]
    NoSubPath {
        /// As asked for.
        path: String,
        /// What the kernel said.
        source: Errno,
    },
    /// A file of the image is not one, or is too large.
    #[error("the image's file {path} {why}")]
    Unreadable {
        /// Its path in the image.
        path: String,
        /// Why it is not read.
        why: String,
    },
}

/// What a container's root file system is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SnapshotRecord {
    /// Lowest first.
    layers: Vec<LayerId>,
    /// Layers, lowest first, of the images that are mounted as volumes, by the
    /// image's ID.
    #[serde(default)]
    volumes: BTreeMap<String, Vec<LayerId>>,
}

impl Record for SnapshotRecord {
    const KIND: &'static str = "snapshot";
    const VERSION: u32 = 1;
}

/// The containers' writable layers. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    fd: OwnedFd,
    store: Store,
    sweeper: layer::Sweeper,
    /// Preparing and removing one ID at the same time must not mix.
    changing: Mutex<()>,
}

impl Snapshots {
    /// Opens the writable layers in `dir`, which is made if it is not there, and
    /// begins to remove what was being made or removed when a process ended.
    ///
    /// # Errors
    /// Where `dir` cannot be made, opened or read.
    pub fn open(dir: &Path, store: &Store) -> Result<Snapshots, SnapshotError> {
        let fail = |action| move |source| io(action, dir, source);
        std::fs::create_dir_all(dir).map_err(|error| fail("make")(layer::errno(&error)))?;
        rustix::fs::chmod(dir, Mode::from_raw_mode(0o700)).map_err(fail("make private"))?;
        let fd = rustix::fs::open(dir, OPEN_DIRECTORY, Mode::empty()).map_err(fail("open"))?;
        let sweeper = layer::Sweeper::new(
            fd.try_clone()
                .map_err(|error| fail("open")(layer::errno(&error)))?,
        );
        let snapshots = Snapshots(Arc::new(Inner {
            dir: dir.to_owned(),
            fd,
            store: store.clone(),
            sweeper,
            changing: Mutex::new(()),
        }));
        for name in snapshots.names()? {
            if name.starts_with(TRASH) {
                snapshots.0.sweeper.remove(name);
            } else if !dir.join(&name).join(RECORD).exists() {
                snapshots.trash(&name)?;
            }
        }
        Ok(snapshots)
    }

    /// Makes the writable layer of a container above `layers`, lowest first,
    /// and keeps them from being collected until [`Snapshots::remove`]. Again
    /// with the same layers, it succeeds and changes nothing.
    ///
    /// # Errors
    /// `NoLayer`, `Taken`, `BadId`, or what the file system refused; then
    /// nothing is left.
    pub fn prepare(&self, container_id: &str, layers: &[LayerId]) -> Result<(), SnapshotError> {
        self.prepare_with(container_id, layers, &BTreeMap::new())
    }

    /// As [`Snapshots::prepare`], and keeps the layers of the images that are
    /// mounted in the container as volumes, too.
    ///
    /// # Errors
    /// Those of [`Snapshots::prepare`].
    pub fn prepare_with(
        &self,
        container_id: &str,
        layers: &[LayerId],
        volumes: &BTreeMap<String, Vec<LayerId>>,
    ) -> Result<(), SnapshotError> {
        check_id(container_id)?;
        let _turn = self
            .0
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let path = self.0.dir.join(container_id);
        match record::load::<SnapshotRecord>(&path.join(RECORD)) {
            Ok(record) if record.layers == layers && record.volumes == *volumes => return Ok(()),
            Ok(_) => {
                return Err(SnapshotError::Taken {
                    container_id: container_id.into(),
                });
            }
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error.into()),
        }
        let lease = self.0.store.lease();
        let mut all = layers.iter().chain(volumes.values().flatten());
        if let Some(gone) = all.find(|id| !lease.hold(id)) {
            return Err(SnapshotError::NoLayer {
                layer: gone.clone(),
            });
        }
        // A crash can have left one without a record.
        self.trash(container_id)?;
        let made = self.make(&path, container_id, layers, volumes);
        if made.is_err()
            && let Err(error) = self.trash(container_id)
        {
            tracing::warn!(
                container_id,
                error = &error as &dyn std::error::Error,
                "a snapshot that failed stays until the next start"
            );
        }
        made
    }

    fn make(
        &self,
        path: &Path,
        container_id: &str,
        layers: &[LayerId],
        volumes: &BTreeMap<String, Vec<LayerId>>,
    ) -> Result<(), SnapshotError> {
        let private = Mode::from_raw_mode(0o700);
        let fail = |action| move |source| io(action, path, source);
        rustix::fs::mkdirat(&self.0.fd, container_id, private).map_err(fail("make"))?;
        let dir = rustix::fs::openat(&self.0.fd, container_id, OPEN_DIRECTORY, Mode::empty())
            .map_err(fail("open"))?;
        let (mode, uid, gid) = layer::root_attributes(&self.0.store, layers)?;
        rustix::fs::mkdirat(&dir, WORK, private).map_err(fail("make"))?;
        rustix::fs::mkdirat(&dir, UPPER, private).map_err(fail("make"))?;
        let upper =
            rustix::fs::openat(&dir, UPPER, OPEN_DIRECTORY, Mode::empty()).map_err(fail("open"))?;
        rustix::fs::fchown(&upper, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(fail("set the owner of"))?;
        rustix::fs::fchmod(&upper, Mode::from_raw_mode(mode)).map_err(fail("set the mode of"))?;
        crash::point("snapshot-made");
        let record = SnapshotRecord {
            layers: layers.to_vec(),
            volumes: volumes.clone(),
        };
        record::save(&path.join(RECORD), &record, Durability::ProcessEnd)?;
        Ok(())
    }

    /// A detached mount of the container's root file system, writable.
    ///
    /// # Errors
    /// `Record` where it was not prepared, `NoLayer`, or what the kernel refused.
    pub fn mount(&self, container_id: &str) -> Result<OwnedFd, SnapshotError> {
        self.mount_labelled(container_id, None)
    }

    /// As [`Snapshots::mount`], with one SELinux label for all of its files.
    ///
    /// # Errors
    /// Those of [`Snapshots::mount`]; `Overlay` where the kernel does not know the label.
    pub fn mount_labelled(
        &self,
        container_id: &str,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        let layers = self.layers(container_id)?;
        let path = self.0.dir.join(container_id);
        let dir = rustix::fs::openat(&self.0.fd, container_id, OPEN_DIRECTORY, Mode::empty())
            .map_err(|source| io("open", &path, source))?;
        Overlay {
            store: &self.0.store,
            base: self.0.store.fd(),
            layers: &layers,
            writable: Some(dir.as_fd()),
            label,
        }
        .mount(MountAttrFlags::empty())
    }

    /// The layers below a container, lowest first.
    ///
    /// # Errors
    /// `BadId`, or `Record` where it was not prepared.
    pub fn layers(&self, container_id: &str) -> Result<Vec<LayerId>, SnapshotError> {
        Ok(self.record(container_id)?.layers)
    }

    fn record(&self, container_id: &str) -> Result<SnapshotRecord, SnapshotError> {
        check_id(container_id)?;
        let path = self.0.dir.join(container_id).join(RECORD);
        Ok(record::load::<SnapshotRecord>(&path)?)
    }

    /// The layers of the container's image, and those of each image it has as a volume.
    ///
    /// # Errors
    /// `BadId`, or `Record` where it was not prepared.
    pub fn all_layers(&self, container_id: &str) -> Result<Vec<Vec<LayerId>>, SnapshotError> {
        let record = self.record(container_id)?;
        let mut layers = vec![record.layers];
        layers.extend(record.volumes.into_values());
        Ok(layers)
    }

    /// What the container has written. Walks its files; what it changes
    /// meanwhile is counted as far as it was seen.
    ///
    /// # Errors
    /// `Io` with ENOENT where it was not prepared.
    pub fn usage(&self, container_id: &str) -> Result<walk::Sums, SnapshotError> {
        check_id(container_id)?;
        let path = self.0.dir.join(container_id).join(UPPER);
        let upper = rustix::fs::openat(
            &self.0.fd,
            format!("{container_id}/{UPPER}"),
            OPEN_DIRECTORY,
            Mode::empty(),
        )
        .map_err(|source| io("open", &path, source))?;
        walk::measure(&upper).map_err(|source| io("measure", &path, source))
    }

    /// What all writable layers take together, with what is kept beside them: what `du` counts.
    /// Walks all files.
    ///
    /// # Errors
    /// `Io` where something cannot be read.
    pub fn footprint(&self) -> Result<walk::Sums, SnapshotError> {
        walk::measure(&self.0.fd).map_err(|source| io("measure", &self.0.dir, source))
    }

    /// Removes a container's writable layer: gone from here at once, its files
    /// soon after. One that is not here counts as removed. The container must
    /// have ended.
    ///
    /// # Errors
    /// `BadId`, or the kernel's to the rename.
    pub fn remove(&self, container_id: &str) -> Result<(), SnapshotError> {
        check_id(container_id)?;
        let _turn = self
            .0
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.trash(container_id)
    }

    fn trash(&self, name: &str) -> Result<(), SnapshotError> {
        let trash = format!("{TRASH}{}", random_name());
        match rustix::fs::renameat(&self.0.fd, name, &self.0.fd, &*trash) {
            Ok(()) => {
                self.0.sweeper.remove(trash);
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(source) => Err(io("remove", &self.0.dir.join(name), source)),
        }
    }

    /// The IDs of all containers that were prepared, in no order.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn list(&self) -> Result<Vec<String>, SnapshotError> {
        let mut names = self.names()?;
        names.retain(|name| !name.starts_with(TRASH));
        Ok(names)
    }

    fn names(&self) -> Result<Vec<String>, SnapshotError> {
        let fail = |source| io("read", &self.0.dir, source);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            // Everything here was made by `make`, so it has a valid name.
            if let Ok(name) = entry.file_name().to_str()
                && (check_id(name).is_ok() || name.starts_with(TRASH))
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// The layers that containers use, for [`crate::gc::collect`].
    ///
    /// # Errors
    /// Where one record cannot be read: nobody knows then what it uses, so
    /// nothing may be collected.
    pub fn references(&self) -> Result<HashSet<LayerId>, SnapshotError> {
        let mut references = HashSet::new();
        for container_id in self.list()? {
            match self.record(&container_id) {
                Ok(record) => {
                    references.extend(record.layers);
                    references.extend(record.volumes.into_values().flatten());
                }
                // Being made, under a lease of its own, or just removed.
                Err(SnapshotError::Record { source }) if source.is_absent() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(references)
    }

    /// Where the writable layers are kept.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Waits until everything that was being removed is gone.
    pub fn finish_removals(&self) {
        self.0.sweeper.finish();
    }
}

/// A detached mount of the merged view of `layers`, lowest first. Read-only,
/// and nothing in it does anything: no programs, devices or setuid bits.
///
/// # Errors
/// `NoLayer`, or what the kernel refused.
pub fn mount_readonly(store: &Store, layers: &[LayerId]) -> Result<OwnedFd, SnapshotError> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Overlay {
        store,
        base: store.fd(),
        layers,
        writable: None,
        label: None,
    }
    .mount(attributes)
}

/// The content of a regular file of an image, as a process in it would see it;
/// `None` where there is none. Symbolic links lead nowhere outside the image.
///
/// # Errors
/// `Unreadable` for what is no regular file or has more than `max_bytes`;
/// those of [`mount_readonly`].
pub fn read_in_image(
    store: &Store,
    layers: &[LayerId],
    path: &str,
    max_bytes: u64,
) -> Result<Option<Vec<u8>>, SnapshotError> {
    if layers.is_empty() {
        return Ok(None);
    }
    read_in_mount(&mount_readonly(store, layers)?, path, max_bytes)
}

/// As [`read_in_image`], of a mount that is at hand. Opening a device in it must
/// do nothing: it has to be mounted `nodev`.
///
/// # Errors
/// `Unreadable` for what is no regular file or has more than `max_bytes`; `Io`.
pub fn read_in_mount(
    mount: impl AsFd,
    path: &str,
    max_bytes: u64,
) -> Result<Option<Vec<u8>>, SnapshotError> {
    let unreadable = |why: String| SnapshotError::Unreadable {
        path: path.into(),
        why,
    };
    let fail = |source| io("read", Path::new(path), source);
    let opened = rustix::fs::openat2(
        mount,
        path,
        // A FIFO without a writer must not hold anybody up.
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    );
    let fd = match opened {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        // What open says to devices on a nodev mount, and to sockets.
        Err(Errno::ACCESS | Errno::NXIO | Errno::NODEV) => {
            return Err(unreadable("is not a regular file".into()));
        }
        Err(Errno::LOOP) => return Err(unreadable("is a loop of symbolic links".into())),
        Err(source) => return Err(fail(source)),
    };
    let stat = rustix::fs::fstat(&fd).map_err(fail)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(unreadable("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    File::from(fd)
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| fail(layer::errno(&error)))?;
    if bytes.len() as u64 > max_bytes {
        return Err(unreadable(format!("has more than {max_bytes} bytes")));
    }
    Ok(Some(bytes))
}

/// An overlay to be mounted.
struct Overlay<'a> {
    store: &'a Store,
    /// The store's directory, on the mount that the layers are taken from.
    base: BorrowedFd<'a>,
    /// Lowest first.
    layers: &'a [LayerId],
    /// The directory that has `upper` and `work`.
    writable: Option<BorrowedFd<'a>>,
    /// The SELinux label of all files.
    label: Option<&'a str>,
}

/// The kernel has no `lowerdir+`: found out once.
static WITHOUT_LOWERDIR_PLUS: AtomicBool = AtomicBool::new(false);
/// One old-style mount at a time, as all use the same mount point.
static MOUNTING_BY_NAME: Mutex<()> = Mutex::new(());

impl Overlay<'_> {
    fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd, SnapshotError> {
        let visible = self.visible()?;
        let overlay = Overlay {
            layers: visible,
            ..*self
        };
        overlay.mount_visible(attributes)
    }

    /// The layers from the topmost whose root hides everything below it.
    fn visible(&self) -> Result<&[LayerId], SnapshotError> {
        let mut first = 0;
        for (index, id) in self.layers.iter().enumerate() {
            match self.store.info(id) {
                Some(info) if info.opaque_root => first = index,
                Some(_) => {}
                None => return Err(SnapshotError::NoLayer { layer: id.clone() }),
            }
        }
        Ok(&self.layers[first..])
    }

    fn mount_visible(&self, attributes: MountAttrFlags) -> Result<OwnedFd, SnapshotError> {
        if !WITHOUT_LOWERDIR_PLUS.load(Ordering::Relaxed) {
            match self.mount_detached(attributes)? {
                Some(mount) => return Ok(mount),
                None => WITHOUT_LOWERDIR_PLUS.store(true, Ordering::Relaxed),
            }
        }
        self.mount_by_name(attributes)
    }

    /// Topmost first, relative to the store's directory; never fewer than overlayfs wants.
    fn lower(&self) -> Vec<String> {
        let mut lower: Vec<String> = self.layers.iter().rev().map(Store::fs_path).collect();
        // Without a writable layer overlayfs wants two, and it never wants none.
        let wanted = if self.writable.is_some() { 1 } else { 2 };
        if lower.len() < wanted {
            lower.push(Store::EMPTY_PATH.into());
        }
        lower
    }

    fn failure(
        &self,
        action: &'static str,
        context: Option<&OwnedFd>,
    ) -> impl FnOnce(Errno) -> SnapshotError {
        let kernel = context
            .and_then(kernel_log)
            .unwrap_or_else(|| "no details".into());
        let layers = self.layers.len();
        move |source| SnapshotError::Overlay {
            action,
            layers,
            kernel,
            source,
        }
    }

    /// By the new mount API; `None` where the kernel has no `lowerdir+`.
    fn mount_detached(&self, attributes: MountAttrFlags) -> Result<Option<OwnedFd>, SnapshotError> {
        if self.layers.is_empty() && self.writable.is_none() {
            return self.empty_view(attributes).map(Some);
        }
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(self.failure("open", None))?;
        let set = |key: &str, value: &[u8]| {
            rustix::mount::fsconfig_set_string(context.as_fd(), key, value)
        };
        // A value has at most 255 bytes, and the store's path may have more: so through the
        // descriptors, which the kernel resolves here and now.
        let store = format!("/proc/self/fd/{}/", self.base.as_raw_fd());
        for (index, lower) in self.lower().iter().enumerate() {
            match set("lowerdir+", format!("{store}{lower}").as_bytes()) {
                Ok(()) => {}
                Err(Errno::INVAL) if index == 0 => return Ok(None),
                Err(error) => return Err(self.failure("add a layer to", Some(&context))(error)),
            }
        }
        for (key, value) in OPTIONS {
            set(key, value.as_bytes())
                .map_err(|error| self.failure("configure", Some(&context))(error))?;
        }
        if let Some(label) = self.label {
            set("context", label.as_bytes())
                .map_err(|error| self.failure("label", Some(&context))(error))?;
        }
        if let Some(dir) = self.writable {
            let dir = format!("/proc/self/fd/{}/", dir.as_raw_fd());
            set("upperdir", format!("{dir}{UPPER}").as_bytes())
                .and_then(|()| set("workdir", format!("{dir}{WORK}").as_bytes()))
                .map_err(|error| self.failure("configure", Some(&context))(error))?;
        }
        rustix::mount::fsconfig_create(context.as_fd())
            .map_err(|error| self.failure("create", Some(&context))(error))?;
        rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map(Some)
            .map_err(|error| self.failure("mount", Some(&context))(error))
    }

    /// What an image without layers looks like.
    fn empty_view(&self, attributes: MountAttrFlags) -> Result<OwnedFd, SnapshotError> {
        let path = self.store.dir().join(Store::EMPTY_PATH);
        let open = || {
            let empty =
                rustix::fs::openat(self.base, Store::EMPTY_PATH, OPEN_DIRECTORY, Mode::empty())?;
            let mount = berth_sys::mount::clone_tree_at(&empty, false)?;
            let change = berth_sys::mount::Change {
                set: attributes.bits().into(),
                ..Default::default()
            };
            berth_sys::mount::set_attr(&mount, change, false)?;
            Ok(mount)
        };
        open().map_err(|source| io("mount", &path, source))
    }

    /// By mount(2), for kernels before 6.5: their `lowerdir` takes only 255 bytes through
    /// fsconfig(2). It is attached for a moment, on the store's empty directory.
    fn mount_by_name(&self, attributes: MountAttrFlags) -> Result<OwnedFd, SnapshotError> {
        if self.layers.is_empty() && self.writable.is_none() {
            return self.empty_view(attributes);
        }
        let open = |path: &str| {
            rustix::fs::openat(
                self.base,
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(|source| io("open", &self.store.dir().join(path), source))
        };
        // Descriptors make names that are short, and free of the characters overlayfs splits at.
        let paths = self.lower();
        let mut lower = Vec::with_capacity(paths.len());
        let mut data = String::from("lowerdir=");
        for path in &paths {
            let fd = open(path)?;
            if !lower.is_empty() {
                data.push(':');
            }
            data.push_str(&format!("/proc/self/fd/{}", fd.as_raw_fd()));
            lower.push(fd);
            // Room for what follows.
            if data.len() > MOUNT_DATA_BYTES - 256 - self.label.map_or(0, str::len) {
                return Err(SnapshotError::TooManyLayers {
                    layers: paths.len(),
                    max: lower.len() - 1,
                });
            }
        }
        for (key, value) in OPTIONS {
            data.push_str(&format!(",{key}={value}"));
        }
        if let Some(label) = self.label {
            data.push_str(&format!(",context=\"{label}\""));
        }
        if let Some(dir) = self.writable {
            let dir = dir.as_raw_fd();
            data.push_str(&format!(
                ",upperdir=/proc/self/fd/{dir}/{UPPER},workdir=/proc/self/fd/{dir}/{WORK}"
            ));
        }
        let data = CString::new(data).expect("descriptors and options have no NUL");
        let _turn = MOUNTING_BY_NAME
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let point = self.store.dir().join(Store::EMPTY_PATH);
        // A crash between mount and detach may have left one.
        while berth_sys::mount::detach(&point).is_ok() {}
        rustix::mount::mount(
            "overlay",
            &point,
            "overlay",
            MountFlags::empty(),
            Some(data.as_c_str()),
        )
        .map_err(self.failure("mount", None))?;
        let cloned = berth_sys::mount::clone_tree(&point, false);
        let detached = berth_sys::mount::detach(&point);
        let mount = cloned.map_err(self.failure("detach", None))?;
        detached.map_err(self.failure("detach", None))?;
        let change = berth_sys::mount::Change {
            set: attributes.bits().into(),
            ..Default::default()
        };
        berth_sys::mount::set_attr(&mount, change, false)
            .map_err(self.failure("configure", None))?;
        Ok(mount)
    }
}

/// The first of the messages the kernel has for a file system context.
/// Source: fsopen(2), "message retrieval".
fn kernel_log(context: &OwnedFd) -> Option<String> {
    let mut message = [0u8; 256];
    let count = rustix::io::read(context, &mut message).ok()?;
    Some(
        String::from_utf8_lossy(&message[..count])
            .trim_start_matches("e ")
            .trim()
            .to_owned(),
    )
}

fn check_id(id: &str) -> Result<(), SnapshotError> {
    let valid = (1..=MAX_ID_BYTES).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !id.starts_with('.')
        && !id.starts_with(TRASH);
    if valid {
        return Ok(());
    }
    Err(SnapshotError::BadId(id.chars().take(160).collect()))
}

fn io(action: &'static str, path: &Path, source: Errno) -> SnapshotError {
    SnapshotError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::layer::Ingest;
    use crate::unpack::Compression;

    /// A layer whose one file has the given name.
    fn layer(store: &Store, name: &str) -> LayerId {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        header.set_cksum();
        let bytes = header.as_bytes().as_slice();
        let diff_ids = [Digest::sha256(bytes)];
        let ingest = Ingest {
            diff_ids: &diff_ids,
            parents: None,
            compression: Compression::None,
            limit_bytes: None,
        };
        store.unpack(&store.lease(), ingest, bytes).unwrap().id
    }

    fn names(mount: &OwnedFd) -> usize {
        let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
        std::fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn a_kernel_without_lowerdir_plus_mounts_the_same_view() {
        // What overlayfs splits its options at must not matter.
        let dir = tempfile::Builder::new().prefix("a:b,c").tempdir().unwrap();
        let store = Store::open(&dir.path().join("layers")).unwrap();
        let layers: Vec<LayerId> = (0..300).map(|n| layer(&store, &format!("f{n}"))).collect();
        let snapshots = Snapshots::open(&dir.path().join("containers"), &store).unwrap();
        for count in [0, 1, 2, 128] {
            let id = format!("c{count}");
            snapshots.prepare(&id, &layers[..count]).unwrap();
            let dir = File::open(snapshots.dir().join(&id)).unwrap();
            let overlay = |writable| Overlay {
                store: &store,
                base: store.fd(),
                layers: &layers[..count],
                writable,
                label: None,
            };
            let writable = overlay(Some(dir.as_fd()))
                .mount_by_name(MountAttrFlags::empty())
                .unwrap();
            assert_eq!(names(&writable), count);
            std::fs::write(format!("/proc/self/fd/{}/new", writable.as_raw_fd()), "").unwrap();
            let readonly = overlay(None)
                .mount_by_name(MountAttrFlags::MOUNT_ATTR_RDONLY)
                .unwrap();
            assert_eq!(names(&readonly), count);
            std::fs::write(format!("/proc/self/fd/{}/new", readonly.as_raw_fd()), "").unwrap_err();
            let fd = File::open(snapshots.dir().join(&id)).unwrap();
            drop(writable);
            let again = Overlay {
                store: &store,
                base: store.fd(),
                layers: &layers[..count],
                writable: Some(fd.as_fd()),
                label: None,
            }
            .mount(MountAttrFlags::empty())
            .unwrap();
            assert_eq!(names(&again), count + 1);
        }
        let too_many = Overlay {
            store: &store,
            base: store.fd(),
            layers: &layers,
            writable: None,
            label: None,
        }
        .mount_by_name(MountAttrFlags::empty());
        assert!(matches!(
            too_many,
            Err(SnapshotError::TooManyLayers { layers: 300, .. })
        ));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains("a:b"));
    }
}
