//! How much of the disk images take, without looking at the disk.

use crate::layer::Store;
use std::path::PathBuf;

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

/// What the images take: the layers by their records, and the documents beside
/// them (`content_bytes` in `content_files` files).
pub fn of_images(store: &Store, content_bytes: u64, content_files: u64) -> FsUsage {
    let layers = store.sums();
    FsUsage {
        mountpoint: store.dir().to_owned(),
        used_bytes: layers.bytes + content_bytes,
        inodes: layers.inodes + content_files,
    }
}
