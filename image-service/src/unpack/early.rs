//! Files go to the disk while the next are unpacked.
//!
//! A file system that allocates late (ext4, XFS, btrfs) does all that work when it is synced; after
//! 100,000 files it takes as long as unpacking them. So it is synced while the layer is
//! unpacked, too, and the sync that counts finds little left.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// After so much the file system is synced: its journal is committed each time. A file counts
/// [`FILE_BYTES`] more than it has.
const BYTES: u64 = 32 << 20;

/// What a file costs beside its content.
const FILE_BYTES: u64 = 8 << 10;

/// Counts the files of all layers that are unpacked onto one file system.
#[derive(Debug, Default)]
pub struct Early {
    bytes: AtomicU64,
    runs: Arc<AtomicBool>,
}

impl Early {
    /// A file of `size` bytes was written; now and then that begins a sync of the file system that `dir`
    /// is on, in a thread of its own. It is a hint: nothing is durable for it, and what the kernel
    /// refuses it will refuse again when it counts. `dir` must not be the descriptor that is asked
    /// then, as each open file is told of an error once. Source: syncfs(2).
    pub fn wrote(&self, dir: BorrowedFd<'_>, size: u64) {
        let written = size + FILE_BYTES;
        if self.bytes.fetch_add(written, Ordering::Relaxed) + written < BYTES
            || self.runs.swap(true, Ordering::Relaxed)
        {
            return;
        }
        self.bytes.store(0, Ordering::Relaxed);
        let runs = Arc::clone(&self.runs);
        let begun = dir.try_clone_to_owned().and_then(|dir| {
            let sync = move || {
                _ = rustix::fs::syncfs(&dir);
                runs.store(false, Ordering::Relaxed);
            };
            thread::Builder::new().name("layer-sync".into()).spawn(sync)
        });
        if begun.is_err() {
            self.runs.store(false, Ordering::Relaxed);
        }
    }
}
