//! Small files go to the disk while the next are unpacked.
//!
//! A file system that allocates late (ext4, XFS, btrfs) does all that work when it is synced; after
//! 100,000 files it takes as long as unpacking them. So it is synced while the layer is
//! unpacked, too, and the sync that counts finds little left.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

/// After how many files the file system is synced: its journal is committed each time.
const FILES: u32 = 4096;

/// Counts the files of all layers that are unpacked onto one file system.
#[derive(Debug, Default)]
pub struct Early {
    files: AtomicU32,
    runs: Arc<AtomicBool>,
}

impl Early {
    /// A small file was written; now and then that begins a sync of the file system that `dir`
    /// is on, in a thread of its own. It is a hint: nothing is durable for it, and what the kernel
    /// refuses it will refuse again when it counts. `dir` must not be the descriptor that is asked
    /// then, as each open file is told of an error once. Source: syncfs(2).
    pub fn wrote(&self, dir: BorrowedFd<'_>) {
        if self.files.fetch_add(1, Ordering::Relaxed) + 1 < FILES
            || self.runs.swap(true, Ordering::Relaxed)
        {
            return;
        }
        self.files.store(0, Ordering::Relaxed);
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
