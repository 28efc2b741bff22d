//! Putting layers on the disk: before something durable names them, and all of each some seconds
//! later.

use super::kept::drop_blob;
use super::{Inner, LayerId, OPEN_DIRECTORY, SYNCED, Store, StoreError, lock};
use berth_store::crash;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How long after the last pull the file system is synced, and after the first at the latest.
const QUIET: Duration = Duration::from_secs(3);
const LATEST: Duration = Duration::from_secs(30);
/// How long after a sync that failed the next is tried.
const AGAIN: Duration = Duration::from_secs(60);

/// Syncs a store's layers once pulls are over for a moment.
#[derive(Default)]
pub(super) struct Settler(Arc<(Mutex<Turn>, Condvar)>);

#[derive(Default)]
struct Turn {
    due: Option<Due>,
    /// A thread is at work; it ends when nothing is due.
    running: bool,
}

#[derive(Clone, Copy)]
struct Due {
    next: Instant,
    latest: Instant,
}

impl Settler {
    /// Has the layers settled soon, and later where more come meanwhile. Returns at once.
    pub(super) fn soon(&self, store: &Store) {
        let now = Instant::now();
        let mut turn = lock(&self.0.0);
        let latest = turn.due.map_or(now + LATEST, |due| due.latest);
        let next = (now + QUIET).min(latest);
        turn.due = Some(Due { next, latest });
        if turn.running {
            return;
        }
        let (shared, store) = (Arc::clone(&self.0), Arc::downgrade(&store.0));
        let spawned = thread::Builder::new()
            .name("layer-settle".into())
            .spawn(move || settle(&shared, &store));
        match spawned {
            Ok(_) => turn.running = true,
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no thread to sync layers; their blobs stay until the next pull"
            ),
        }
    }
}

impl Drop for Settler {
    fn drop(&mut self) {
        self.0.1.notify_all();
    }
}

/// The thread of a [`Settler`]; ends when all is done or the store is gone.
fn settle((shared, changed): &(Mutex<Turn>, Condvar), store: &Weak<Inner>) {
    let mut turn = lock(shared);
    while let Some(Due { next, .. }) = turn.due
        && store.strong_count() > 0
    {
        let now = Instant::now();
        if now < next {
            let waited = changed.wait_timeout(turn, next - now);
            turn = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        turn.due = None;
        drop(turn);
        let settled = store.upgrade().map(|inner| Store(inner).settle());
        turn = lock(shared);
        if let Some(Err(error)) = settled {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "layers are not synced, later; a start after a power cut has them from their blobs"
            );
            let again = Instant::now() + AGAIN;
            turn.due.get_or_insert(Due {
                next: again,
                latest: again,
            });
        }
    }
    turn.running = false;
}

impl Store {
    /// Makes `layers` durable: themselves, or their blobs. Returns at once where they are.
    ///
    /// # Errors
    /// What the kernel said to write; nothing that is durable may name the
    /// layers then.
    pub fn sync(&self, layers: &[LayerId]) -> Result<(), StoreError> {
        {
            let state = self.state();
            let unsynced = |id: &&LayerId| state.unsynced.contains(*id);
            let unsynced: Vec<&LayerId> = layers.iter().filter(unsynced).collect();
            if unsynced.is_empty() {
                return Ok(());
            }
            if !unsynced.into_iter().all(|id| state.kept.contains(id)) {
                drop(state);
                return self.settle();
            }
        }
        // Each blob is on the disk before its layer gets its name. Nobody waits here for a sync
        // of everything that may be running.
        rustix::fs::fsync(&self.0.fd).map_err(|source| StoreError {
            action: "sync",
            path: self.0.dir.clone(),
            source,
        })?;
        crash::point("layer-blobs-synced");
        self.0.settler.soon(self);
        Ok(())
    }

    /// Makes the files of every layer that is here now durable, and removes the blobs that
    /// were kept for them. Happens by itself some seconds after the last [`Store::sync`].
    ///
    /// # Errors
    /// What the kernel said to write.
    pub fn settle(&self) -> Result<(), StoreError> {
        let _turn = lock(&self.0.syncing);
        let layers: Vec<LayerId> = self.state().unsynced.iter().cloned().collect();
        if layers.is_empty() {
            return Ok(());
        }
        let fail = |action, path: PathBuf| {
            move |source| StoreError {
                action,
                path,
                source,
            }
        };
        let mut directories = Vec::with_capacity(layers.len());
        for id in layers {
            let name = id.to_string();
            let path = self.0.dir.join(&name);
            match rustix::fs::openat(&self.0.fd, &*name, OPEN_DIRECTORY, Mode::empty()) {
                Ok(dir) => directories.push((id, dir, path)),
                // Removed meanwhile.
                Err(Errno::NOENT) => {}
                Err(source) => return Err(fail("open", path)(source)),
            }
        }
        rustix::fs::syncfs(&self.0.fd).map_err(fail("sync", self.0.dir.clone()))?;
        crash::point("layers-synced");
        for (_, dir, path) in &directories {
            match mark_synced(dir.as_fd()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(source) => return Err(fail("mark", path.clone())(source)),
            }
        }
        // The first of these commits the file system's journal, so the rest cost nothing.
        for (_, dir, path) in &directories {
            rustix::fs::fsync(dir).map_err(fail("sync", path.clone()))?;
        }
        crash::point("layers-marked");
        for (id, dir, _) in directories {
            let mut state = self.state();
            // Another one of the same name may be here by now, and was not synced.
            if !self.is_under(&id, dir.as_fd()) {
                continue;
            }
            state.unsynced.remove(&id);
            if state.kept.remove(&id) {
                drop_blob(dir.as_fd());
                let beside = self.measure_beside(&id);
                state.beside.insert(id.to_string(), beside);
            }
        }
        Ok(())
    }

    /// Whether `dir` is what stands under the layer's name.
    fn is_under(&self, id: &LayerId, dir: BorrowedFd<'_>) -> bool {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let here = rustix::fs::statat(&self.0.fd, id.to_string(), flags);
        matches!((here, rustix::fs::fstat(dir)), (Ok(a), Ok(b)) if a.st_ino == b.st_ino)
    }
}

/// Says that everything in the layer's directory is on the disk.
pub(super) fn mark_synced(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    rustix::fs::openat(dir, SYNCED, flags, Mode::from_raw_mode(0o600)).map(drop)
}
