//! Blobs that stay until what was unpacked of them is on the disk.
//!
//! Compressed, a layer is a fraction of its files and all in one piece, so a disk has it much
//! sooner. A pull therefore waits for the blob alone: it is to the layer what a journal is to a
//! file system. Seconds later the file system is synced and the blob goes. Where the power fails
//! before that, the next start unpacks the layer again, without the registry.
//!
//! ```text
//! ingest: fs/, and `blob` as it passes ── blob and directory on the disk ── rename ──> layer
//! layer with `blob` ── Settler, seconds later: syncfs, `synced`, no `blob` ──> durable by itself
//!                   └─ power cut ── unpacked again beside, syncfs, `synced` ── exchanged ──> durable
//! ```
//! Whether `blob` is whole needs no mark: what is unpacked of it must have the layer's diff ID.

use super::{INGEST, LayerId, OPEN_DIRECTORY, Store, random_name, settle};
use crate::unpack::{Compression, Parents, UnpackError};
use berth_store::crash;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Instant;

pub(super) const BLOB: &str = "blob";

/// A larger blob is not kept, in bytes: its files are written while they come.
const MAX_BYTES: u64 = 256 << 20;
/// A blob is kept if it takes no more than this part of what is free.
const PART_OF_FREE: u64 = 8;
/// After so many bytes the kernel is told to begin writing.
const WRITE_BYTES: u64 = 4 << 20;

/// A blob that is written beside the files that are unpacked of it.
pub(super) struct Kept {
    file: File,
    /// As many as the blob has.
    bytes: u64,
    /// `u64::MAX` once a write failed.
    written: AtomicU64,
}

impl Kept {
    /// In the directory of the layer; `None` where it is not worth it or there is no room.
    pub(super) fn new(dir: BorrowedFd<'_>, said: Compression, bytes: u64) -> Option<Arc<Kept>> {
        // Writing an archive and its files is twice the work.
        if said == Compression::None || bytes > MAX_BYTES {
            return None;
        }
        let free = rustix::fs::fstatvfs(dir).ok()?;
        if free.f_bavail.saturating_mul(free.f_frsize) / PART_OF_FREE < bytes {
            return None;
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, BLOB, flags, Mode::from_raw_mode(0o600)).ok()?;
        Some(Arc::new(Kept {
            file: file.into(),
            bytes,
            written: AtomicU64::new(0),
        }))
    }

    fn write(&self, bytes: &[u8]) {
        let before = self.written.load(Ordering::Relaxed);
        if before == u64::MAX {
            return;
        }
        let after = before + bytes.len() as u64;
        if (&self.file).write_all(bytes).is_err() {
            self.written.store(u64::MAX, Ordering::Relaxed);
            return;
        }
        self.written.store(after, Ordering::Relaxed);
        if before / WRITE_BYTES != after / WRITE_BYTES {
            // Only a hint.
            let _ = berth_sys::writeback::begin(&self.file);
        }
    }

    /// Puts it on the disk with `dir`, the directory it is in; `false` where that is not to be:
    /// it is gone then, and the files have to be synced.
    pub(super) fn finish(&self, dir: BorrowedFd<'_>, wanted: bool) -> bool {
        let is_whole = wanted && self.written.load(Ordering::Relaxed) == self.bytes;
        let durable = is_whole
            && rustix::fs::fsync(&self.file)
                .and_then(|()| rustix::fs::fsync(dir))
                .is_ok();
        if !durable {
            let _ = rustix::fs::unlinkat(dir, BLOB, AtFlags::empty());
        }
        durable
    }
}

/// A blob's reader that writes down what it gives, if that is to be kept.
pub(super) struct Keeping<R> {
    pub(super) reader: R,
    pub(super) kept: Option<Arc<Kept>>,
}

impl<R: Read> Read for Keeping<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if let Some(kept) = &self.kept {
            kept.write(&buffer[..count]);
        }
        Ok(count)
    }
}

impl Store {
    /// Whether a blob is beside the layer's files.
    pub(super) fn has_blob(&self, id: &LayerId) -> bool {
        let path = format!("{id}/{BLOB}");
        rustix::fs::statat(&self.0.fd, &*path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Begins to unpack `layers` again from their blobs: whoever wants one of them waits.
    pub(super) fn rebuild(&self, layers: Vec<LayerId>) {
        if layers.is_empty() {
            return;
        }
        {
            let mut state = self.state();
            state
                .flights
                .extend(layers.iter().map(|id| id.digest.clone()));
            state.rebuilding.extend(layers.iter().cloned());
        }
        let store = self.clone();
        let work = move || {
            for id in &layers {
                store.rebuild_one(id);
                let mut state = store.state();
                state.flights.remove(&id.digest);
                state.rebuilding.remove(id);
                store.0.landed.notify_all();
            }
        };
        let builder = thread::Builder::new().name("layer-rebuild".into());
        if let Err(error) = builder.spawn(work) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no thread to unpack layers again after a power cut; they are fetched again"
            );
            let mut state = self.state();
            for id in std::mem::take(&mut state.rebuilding) {
                state.flights.remove(&id.digest);
                self.trash_doubtful(&id);
            }
        }
    }

    /// Whether the layer is being unpacked again.
    pub fn is_rebuilding(&self, id: &LayerId) -> bool {
        self.state().rebuilding.contains(id)
    }

    /// Waits until no layer is being unpacked again.
    pub fn finish_rebuilding(&self) {
        let state = self.state();
        let _state = self
            .0
            .landed
            .wait_while(state, |state| !state.rebuilding.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
    }

    fn rebuild_one(&self, id: &LayerId) {
        let begun = Instant::now();
        let name = format!("{INGEST}{}", random_name());
        let rebuilt = self.rebuild_into(&name, id);
        // What is under that name now is of no use: the old files, or half of the new ones.
        self.0.sweeper.remove(name);
        match rebuilt {
            Ok(()) => tracing::info!(
                layer = %id,
                seconds = begun.elapsed().as_secs_f64(),
                "unpacked a layer again from its blob, a power cut may have taken files of it"
            ),
            Err(error) => {
                tracing::warn!(
                    layer = %id,
                    error = &error as &dyn std::error::Error,
                    "removing a layer that is not known to be whole, its blob is no help"
                );
                self.trash_doubtful(id);
            }
        }
    }

    fn trash_doubtful(&self, id: &LayerId) {
        if let Err(errno) = self.trash(id) {
            tracing::warn!(
                layer = %id,
                error = &errno as &dyn std::error::Error,
                "a layer that is not known to be whole stays until the next start"
            );
        }
    }

    fn rebuild_into(&self, name: &str, id: &LayerId) -> Result<(), UnpackError> {
        let path = self.0.dir.join(id.to_string());
        let fail = |action| {
            let path = path.clone();
            move |source| UnpackError::Store {
                action,
                path,
                source,
            }
        };
        let open_blob = || {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&self.0.fd, format!("{id}/{BLOB}"), flags, Mode::empty())
        };
        let mut magic = Vec::new();
        File::from(open_blob().map_err(fail("open the blob of"))?)
            .take(4)
            .read_to_end(&mut magic)
            .map_err(|source| UnpackError::Read { source })?;
        let blob = File::from(open_blob().map_err(fail("open the blob of"))?);
        let ingest = super::Ingest {
            diff_ids: std::slice::from_ref(&id.digest),
            parents: None,
            compression: Compression::of_magic(&magic),
            limit_bytes: None,
        };
        let (info, _) = self.unpack_to(name, ingest, &id.digest, Parents::None, None, blob)?;
        let dir: OwnedFd = rustix::fs::openat(&self.0.fd, name, OPEN_DIRECTORY, Mode::empty())
            .map_err(fail("open"))?;
        rustix::fs::syncfs(&self.0.fd).map_err(fail("sync"))?;
        settle::mark_synced(dir.as_fd())
            .and_then(|()| rustix::fs::fsync(&dir))
            .map_err(fail("mark"))?;
        crash::point("layer-rebuilt");
        let mut state = self.state();
        rustix::fs::renameat_with(
            &self.0.fd,
            name,
            &self.0.fd,
            id.to_string(),
            RenameFlags::EXCHANGE,
        )
        .map_err(fail("exchange"))?;
        let beside = self.measure_beside(id);
        state.beside.insert(id.to_string(), beside);
        state.add(info);
        Ok(())
    }
}

/// Removes a blob that is not needed any more.
pub(super) fn drop_blob(dir: BorrowedFd<'_>) {
    match rustix::fs::unlinkat(dir, BLOB, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => tracing::warn!(
            error = &errno as &dyn std::error::Error,
            "the blob of a layer that is synced stays, until the next start"
        ),
    }
}
