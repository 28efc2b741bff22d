//! File systems whose owners are shown through a user namespace, and images as volumes.
//!
//! An overlay cannot be idmapped, what it is made of can:
//!
//! ```text
//! store ── idmapped copy of its mount ──> lower layers    owner 0 is shown as the pod's root
//! containers/<id>/upper, as it is         upper layer     what the container writes has the pod's owners
//! ```
//!
//! The writable layer belongs to one container of one pod, so what is in it may
//! have that pod's owners; only its root is given to the pod's root before the start.
//! Overlayfs takes layers from mounts of the caller's mount namespace alone
//! (before Linux 6.15), and the host's table is to stay small: all of it is done
//! by a thread in a mount namespace of its own, which ends with the thread.
//!
//! Source: kernel, `filesystems/idmappings.rst`; overlayfs on idmapped layers since Linux 5.19.

use super::{OPEN_DIRECTORY, Overlay, SnapshotError, Snapshots, Store, UPPER, io, layer};
use crate::layer::LayerId;
use berth_sys::clone::flag;
use berth_sys::mount::{self, Change};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// IDs `inside` to `inside + length - 1` are shown as `outside` and those that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First ID on disk.
    pub inside: u32,
    /// The ID of the host it is shown as.
    pub outside: u32,
    /// How many.
    pub length: u32,
}

/// How owners on disk are shown.
#[derive(Clone, Debug)]
pub struct IdMap {
    /// A user namespace with these maps.
    pub user_namespace: Arc<OwnedFd>,
    /// Users.
    pub uids: Vec<IdRange>,
    /// Groups.
    pub gids: Vec<IdRange>,
}

/// What `id` is shown as; `None` where no range has it.
fn shown(ranges: &[IdRange], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.inside)?;
        (offset < range.length).then(|| range.outside.checked_add(offset))?
    })
}

impl Snapshots {
    /// As [`Snapshots::mount`], with the owners of the image's files shown through
    /// `map`, and one SELinux label for all. What the container writes is on disk with the owners shown.
    ///
    /// # Errors
    /// Those of [`Snapshots::mount`]; `Io` where the file system cannot be
    /// idmapped (Linux 5.19, and a file system that supports it).
    pub fn mount_mapped(
        &self,
        container_id: &str,
        map: &IdMap,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        let layers = self.layers(container_id)?;
        let path = self.0.dir.join(container_id);
        let (_, uid, gid) = layer::root_attributes(&self.0.store, &layers)?;
        let owner = |ranges: &[IdRange], id| shown(ranges, id).or_else(|| shown(ranges, 0));
        let (uid, gid) = (owner(&map.uids, uid), owner(&map.gids, gid));
        let upper = path.join(UPPER);
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        rustix::fs::chownat(CWD, &upper, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|source| io("set the owner of", &upper, source))?;
        apart(|| {
            let base = map_store(&self.0.store, map)?;
            let dir = open(&path)?;
            Overlay {
                store: &self.0.store,
                base: base.as_fd(),
                layers: &layers,
                writable: Some(dir.as_fd()),
                label,
            }
            .mount(MountAttrFlags::empty())
        })
    }

    /// A detached read-only mount of an image that was prepared as a volume of
    /// the container: all of it, or what is at `sub_path`, which links lead to
    /// inside the image only.
    ///
    /// # Errors
    /// `NoVolume` where it was not prepared, `NoSubPath`, or what the kernel refused.
    pub fn mount_volume(
        &self,
        container_id: &str,
        image_id: &str,
        sub_path: &str,
        map: Option<&IdMap>,
        label: Option<&str>,
    ) -> Result<OwnedFd, SnapshotError> {
        let mut volumes = self.record(container_id)?.volumes;
        let layers = volumes
            .remove(image_id)
            .ok_or_else(|| SnapshotError::NoVolume {
                container_id: container_id.into(),
                image_id: image_id.into(),
            })?;
        let store = &self.0.store;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        apart(|| {
            let base = match map {
                Some(map) => map_store(store, map)?,
                None => open(store.dir())?,
            };
            let overlay = Overlay {
                store,
                base: base.as_fd(),
                layers: &layers,
                writable: None,
                label,
            };
            let whole = overlay.mount(attributes)?;
            if sub_path.trim_matches('/').is_empty() {
                return Ok(whole);
            }
            // Only what is attached can be copied from on every kernel.
            let point = store.dir().join(Store::EMPTY_PATH);
            let failed = |source| io("mount an image at", &point, source);
            mount::attach(&whole, open(&point)?).map_err(failed)?;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let found = rustix::fs::openat2(&whole, sub_path, flags, Mode::empty(), resolve)
                .map_err(|source| SnapshotError::NoSubPath {
                    path: sub_path.into(),
                    source,
                })?;
            mount::clone_tree_at(found, false).map_err(failed)
        })
    }

    /// What [`Snapshots::prepare_with`] keeps for the container besides its own layers.
    ///
    /// # Errors
    /// `BadId`, or `Record` where it was not prepared.
    pub fn volumes(
        &self,
        container_id: &str,
    ) -> Result<BTreeMap<String, Vec<LayerId>>, SnapshotError> {
        Ok(self.record(container_id)?.volumes)
    }
}

fn open(path: &Path) -> Result<OwnedFd, SnapshotError> {
    rustix::fs::open(path, OPEN_DIRECTORY, Mode::empty()).map_err(|source| io("open", path, source))
}

/// The store's directory, its owners mapped, over itself in this mount namespace.
fn map_store(store: &Store, map: &IdMap) -> Result<OwnedFd, SnapshotError> {
    let dir = open(store.dir())?;
    let mapped = || {
        let mapped = mount::clone_tree_at(&dir, false)?;
        let change = Change {
            idmap: Some(map.user_namespace.as_fd()),
            ..Change::default()
        };
        mount::set_attr(&mapped, change, false)?;
        mount::attach(&mapped, &dir)?;
        Ok(mapped)
    };
    mapped().map_err(|source: Errno| io("map the owners in", store.dir(), source))
}

/// Runs `work` on a thread with a mount namespace of its own, where what is
/// mounted is seen by nobody else.
fn apart<T: Send>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send,
) -> Result<T, SnapshotError> {
    let enter = || {
        berth_sys::namespace::unshare(flag::NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", private)
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter().map_err(|source| {
                io("enter a mount namespace apart from", Path::new("/"), source)
            })?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_shown_by_the_range_that_has_them() {
        let ranges = [
            IdRange {
                inside: 0,
                outside: 100_000,
                length: 10,
            },
            IdRange {
                inside: 20,
                outside: u32::MAX - 1,
                length: 2,
            },
        ];
        assert_eq!(shown(&ranges, 0), Some(100_000));
        assert_eq!(shown(&ranges, 9), Some(100_009));
        assert_eq!(shown(&ranges, 10), None);
        assert_eq!(shown(&ranges, 21), Some(u32::MAX));
        assert_eq!(shown(&ranges, 22), None);
    }

    #[test]
    fn what_is_mounted_apart_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        apart(|| {
            let tmpfs = mount::new_fs("tmpfs", "tmpfs", "", 0).unwrap();
            mount::attach(&tmpfs, open(dir.path())?).unwrap();
            std::fs::write(dir.path().join("inside"), "").unwrap();
            Ok(())
        })
        .unwrap();
        assert!(!dir.path().join("inside").exists());
    }
}
