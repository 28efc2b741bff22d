//! How much of the disk images take, without looking at the disk.

use crate::layer::Store;
use std::path::{Path, PathBuf};

/// What something takes of a file system, in CRI's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    /// A directory on the file system. Source: CRI `FilesystemIdentifier`.
    pub mountpoint: PathBuf,
    /// Space taken, in bytes.
    pub used_bytes: u64,
    /// Inodes taken.
    pub inodes: u64,
}

/// What a record or a small file takes, in bytes: one block of ext4's and xfs's default.
const BLOCK_BYTES: u64 = 4096;
/// The directories of the store itself: `images`, `content` with its two, `records`, `layers`
/// and `layers/empty`.
const DIRECTORIES: u64 = 7;

/// What everything below `lib` takes: the layers with what is kept beside them, by counters, the
/// documents (space and number), and `records` records.
pub fn of_images(lib: &Path, store: &Store, documents: (u64, u64), records: u64) -> FsUsage {
    let layers = store.footprint();
    let (bytes, files) = documents;
    FsUsage {
        mountpoint: lib.to_owned(),
        used_bytes: layers.bytes + bytes + (records + DIRECTORIES) * BLOCK_BYTES,
        inodes: layers.inodes + files + records + DIRECTORIES,
    }
}
