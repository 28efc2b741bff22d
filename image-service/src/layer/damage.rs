//! Layers whose content turned out to be wrong: marked, passed over, and replaced by the next
//! unpacking of the same layer, while containers go on with what they have mounted.

use super::kept::BLOB;
use super::{
    DAMAGED, FS, LayerId, LayerInfo, LayerRecord, OLD, OPEN_DIRECTORY, RECIPE, RECORD, SYNCED,
    State, Store, StoreError, errno, random_name, walk,
};
use crate::unpack::UnpackError;
use berth_store::atomic_file::{self, Durability};
use berth_store::{crash, record};
use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;
use std::collections::HashSet;

/// The layer of a directory that was superseded.
pub(super) fn old_id(name: &str) -> Option<LayerId> {
    let (_, id) = name.strip_prefix(OLD)?.split_once('-')?;
    id.parse().ok()
}

impl Store {
    /// Takes the layer out of use, for good: it counts as missing from now on, so the next pull
    /// that needs it fetches it again. Its files stay for whoever has them mounted.
    ///
    /// # Errors
    /// The mark could not be written; it is out of use until the next start then.
    pub fn mark_damaged(&self, id: &LayerId, why: &str) -> Result<(), StoreError> {
        {
            let mut state = self.state();
            let Some(info) = state.layers.get(id).cloned() else {
                return Ok(());
            };
            let beside = state.beside.get(&id.to_string()).copied();
            state.forget(id);
            state.damaged.insert(id.clone(), info);
            if let Some(beside) = beside {
                state.beside.insert(id.to_string(), beside);
            }
        }
        let path = self.0.dir.join(id.to_string()).join(DAMAGED);
        atomic_file::replace(&path, why.as_bytes(), Durability::PowerCut).map_err(|error| {
            StoreError {
                action: "mark as damaged",
                path,
                source: errno(&error),
            }
        })
    }

    /// The layers that are marked, in no order.
    pub fn damaged(&self) -> Vec<LayerInfo> {
        self.state().damaged.values().cloned().collect()
    }

    pub(super) fn is_marked_damaged(&self, id: &LayerId) -> bool {
        let path = format!("{id}/{DAMAGED}");
        rustix::fs::statat(&self.0.fd, &*path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Makes room for a new copy of a damaged layer.
    pub(super) fn supersede(&self, state: &mut State, id: &LayerId) -> Result<(), UnpackError> {
        let Some(info) = state.damaged.get(id) else {
            return Ok(());
        };
        let mut sums = walk::Sums {
            bytes: info.bytes,
            inodes: info.inodes,
        };
        let name = id.to_string();
        let old = format!("{OLD}{}-{name}", random_name());
        match rustix::fs::renameat(&self.0.fd, &*name, &self.0.fd, &*old) {
            Ok(()) => {}
            Err(Errno::NOENT) => {
                state.forget(id);
                return Ok(());
            }
            Err(source) => {
                return Err(UnpackError::Store {
                    action: "rename",
                    path: self.0.dir.join(name),
                    source,
                });
            }
        }
        crash::point("layer-superseded");
        sums += state.beside.get(&name).copied().unwrap_or_default();
        state.forget(id);
        state.old.insert(old, (id.clone(), sums));
        Ok(())
    }

    pub(super) fn load_old(&self, state: &mut State, name: String, id: LayerId) {
        let record = self.0.dir.join(&name).join(RECORD);
        let sums = record::load::<LayerRecord>(&record).map_or_else(
            |_| walk::Sums::default(),
            |record| walk::Sums {
                bytes: record.layer.bytes,
                inodes: record.layer.inodes,
            },
        );
        state.old.insert(name, (id, sums));
    }

    /// Removes superseded copies of layers that no container has: `in_containers` are those
    /// that some container uses.
    pub fn remove_superseded(&self, in_containers: &HashSet<LayerId>) {
        let mut state = self.state();
        let unused: Vec<String> = state
            .old
            .iter()
            .filter(|(_, (id, _))| !in_containers.contains(id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in unused {
            state.old.remove(&name);
            self.0.sweeper.remove(name);
        }
    }

    /// Whether some container may have an old copy of the layer.
    pub fn has_superseded(&self, id: &LayerId) -> bool {
        self.state().old.values().any(|(old, _)| old == id)
    }

    /// What all that is kept of layers takes: files, records, recipes, and copies that some
    /// container still has. From counters.
    pub fn footprint(&self) -> walk::Sums {
        let state = self.state();
        let mut sums = walk::Sums {
            bytes: state.bytes,
            inodes: state.inodes,
        };
        for info in state.damaged.values() {
            sums += walk::Sums {
                bytes: info.bytes,
                inodes: info.inodes,
            };
        }
        for (_, old) in state.old.values() {
            sums += *old;
        }
        for beside in state.beside.values() {
            sums += *beside;
        }
        sums
    }

    /// What a layer's directory, record, recipe, blob and marks take.
    pub(super) fn measure_beside(&self, id: &LayerId) -> walk::Sums {
        let mut sums = walk::Sums::default();
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let Ok(dir) = rustix::fs::openat(&self.0.fd, id.to_string(), OPEN_DIRECTORY, Mode::empty())
        else {
            return sums;
        };
        for name in [".", RECORD, RECIPE, BLOB, DAMAGED, SYNCED] {
            if let Ok(stat) = rustix::fs::statat(&dir, name, flags) {
                sums += walk::Sums::of(&stat);
            } else if name == SYNCED {
                // It comes later, and takes no space.
                sums.inodes += 1;
            }
        }
        debug_assert!(rustix::fs::statat(&dir, FS, flags).is_ok());
        sums
    }
}
