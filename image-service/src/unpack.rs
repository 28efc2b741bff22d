//! Unpacks one layer, in a stream, into one directory.
//!
//! blob ──> decompress ──┬──> tar entries ──> files beneath one descriptor, and the recipe
//!                       └──> hash
//!
//! The result is a layer as overlayfs reads it: a deleted name is a character
//! device 0:0, a directory that hides what is below has
//! `trusted.overlay.opaque`. Nothing is written anywhere else, whatever the
//! archive says. The caller makes the result visible only when all of it is
//! right: see [`crate::layer`].
//!
//! Source: OCI image-spec, `layer.md`.

pub mod apart;
mod archive;
mod early;
pub mod recipe;
mod stream;
mod tree;

pub(crate) use archive::{Archive, Kind};
pub use archive::{MAX_EXTENSION_BYTES, MAX_PATH_BYTES, MAX_XATTR_BYTES};
pub use early::Early;
pub use stream::Compression;
pub(crate) use stream::read as read_archive;
pub(crate) use tree::is_opaque;

use crate::digest::{Algorithm, Digest};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

/// Waits until the layers below are here and gives the root of their merged view. Asked at most
/// once for a layer, and only where it needs them.
pub type Wait<'a> = dyn Fn() -> Result<OwnedFd, UnpackError> + Sync + 'a;

/// What is below the layer.
#[derive(Clone, Copy)]
pub enum Parents<'a> {
    /// Nothing: it is the lowest of its image.
    None,
    /// Layers that are not here yet.
    Unknown,
    /// Layers that may not be here yet, and can be waited for.
    Later(&'a Wait<'a>),
    /// The root of their merged view.
    Merged(BorrowedFd<'a>),
}

impl fmt::Debug for Parents<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Parents::None => "None",
            Parents::Unknown => "Unknown",
            Parents::Later(_) => "Later",
            Parents::Merged(_) => "Merged",
        })
    }
}

/// What came out of an archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Entries read, repeated ones and whiteouts included.
    pub entries: u64,
    /// Inodes made, the root included.
    pub inodes: u64,
    /// Space taken, in bytes, as the file system says.
    pub bytes: u64,
    /// Nothing of the layers below shows through, not even beside what is here.
    /// overlayfs does not look for that on a layer's root, so whoever mounts it must.
    pub opaque_root: bool,
    /// The archive says who owns the root directory and so on.
    pub has_root: bool,
    /// The result would be another one above other parents.
    pub leans_on_parents: bool,
    /// No entry replaced another, so the recipe gives the archive again.
    pub is_exact: bool,
    /// How the blob was compressed, whatever its media type says.
    pub compression: Compression,
}

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The blob's reader failed: the network, or a wrong compressed digest.
    #[error("the layer's blob cannot be read")]
    Read {
        /// What the reader said.
        source: io::Error,
    },
    /// The blob is damaged.
    #[error("the layer is not valid {compression} data")]
    Decompress {
        /// What it should be.
        compression: Compression,
        /// What the decoder said.
        source: io::Error,
    },
    /// The content is none of what a layer can be.
    #[error(
        "the layer's media type says {said}, its content is neither gzip nor zstd nor a tar archive"
    )]
    NoFormat {
        /// By the media type.
        said: Compression,
    },
    /// Bytes after the end of the compressed data.
    #[error("the layer goes on after the end of its {compression} data")]
    TrailingBytes {
        /// What ended.
        compression: Compression,
    },
    /// The archive ends in the middle of an entry.
    #[error("the layer's archive ends inside an entry, after {offset} bytes")]
    Truncated {
        /// Bytes of the uncompressed archive before the end.
        offset: u64,
    },
    /// More than the caller allows.
    #[error("the layer is larger than {limit_bytes} bytes")]
    TooLarge {
        /// The caller's bound on the uncompressed archive.
        limit_bytes: u64,
    },
    /// A header that is none.
    #[error("the layer's archive is damaged at byte {offset}: {why}")]
    Header {
        /// Where the header starts in the uncompressed archive.
        offset: u64,
        /// What is wrong with it.
        why: String,
    },
    /// An entry whose path is refused.
    #[error("the layer's entry {entry} is refused: its path {why}")]
    Path {
        /// Its path, printable and cut to a reasonable length.
        entry: String,
        /// What is wrong with the path.
        why: &'static str,
    },
    /// A hard link that leads nowhere.
    #[error("the layer's entry {entry} is refused: its hard link target {target} {why}")]
    LinkTarget {
        /// Its path.
        entry: String,
        /// What it wants to link to.
        target: String,
        /// What is wrong with the target.
        why: &'static str,
    },
    /// An attribute no kernel would take.
    #[error(
        "the layer's entry {entry} is refused: the name or value of the xattr {name} is too long"
    )]
    Xattr {
        /// Its path.
        entry: String,
        /// The attribute.
        name: String,
    },
    /// An entry of a type that cannot be unpacked.
    #[error("the layer's entry {entry} is {what}, which is not supported")]
    Unsupported {
        /// Its path.
        entry: String,
        /// What it is.
        what: String,
    },
    /// The kernel refused something for an entry.
    #[error("cannot {action} the layer's entry {entry}")]
    Entry {
        /// "make", "write" and so on.
        action: &'static str,
        /// Its path.
        entry: String,
        /// What the kernel said.
        source: Errno,
    },
    /// An entry needs what is in the layers below, and they are not here: try
    /// again when they are.
    #[error("the layer needs its parent layers to be unpacked first")]
    LeansOnParents,
    /// The archive is not the one the image's configuration names.
    #[error("the layer's diff ID is {found}, the image says {expected}")]
    DiffId {
        /// By the image's configuration.
        expected: Digest,
        /// Of the archive.
        found: Digest,
    },
    /// The place layers are kept in.
    #[error("cannot {action} {path}")]
    Store {
        /// "make", "rename" and so on.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// The layer's record could not be written.
    #[error("the layer cannot be recorded")]
    Record {
        /// Which file, and why.
        #[from]
        source: berth_store::RecordError,
    },
    /// The parents' merged view could not be mounted.
    #[error("the parent layers cannot be mounted")]
    Parents {
        /// Why not.
        source: Box<crate::snapshot::SnapshotError>,
    },
    /// The process that was to write it, see [`apart`].
    #[error("the layer cannot be written in the cgroup for pulls")]
    Apart {
        /// Why not.
        source: apart::ApartError,
    },
}

/// Where an unpacking happens.
pub struct Target<'a> {
    /// The empty directory that becomes the layer.
    pub root: OwnedFd,
    /// Takes the directories that later entries replace; same file system.
    pub attic: BorrowedFd<'a>,
    /// Gives unused names in the attic.
    pub attic_names: &'a mut dyn FnMut() -> String,
    /// What is below the layer.
    pub parents: Parents<'a>,
    /// Of the file system that `root` is on, where files are to be on the disk soon.
    pub early: Option<&'a Early>,
    /// Takes down how the archive is put together again.
    pub recipe: recipe::Writer,
}

/// Unpacks `blob` into `target`. Blocks; memory does not grow with the layer.
/// Gives what was made and the digest of the uncompressed archive.
///
/// The digest is that of everything only because the blob was read to its end,
/// where its reader could still refuse it.
///
/// # Errors
/// Any but `DiffId`, `Store`, `Record`, `Parents` and `Apart`. Whatever was made by then
/// is still there.
pub fn unpack(
    blob: impl Read + Send,
    compression: Compression,
    algorithm: Algorithm,
    limit_bytes: Option<u64>,
    target: Target<'_>,
) -> Result<(Summary, Digest), UnpackError> {
    let recipe = Rc::new(RefCell::new(target.recipe));
    let unpacked = read_archive(blob, compression, algorithm, limit_bytes, |source| {
        source.record(Rc::clone(&recipe));
        let mut archive = Archive::new(source);
        let mut tree = tree::Tree::new(
            target.root,
            target.attic,
            target.attic_names,
            target.parents,
            target.early,
            Rc::clone(&recipe),
        );
        while let Some(entry) = archive.next_entry()? {
            tree.write(&entry, &mut archive)?;
        }
        let summary = tree.finish()?;
        Ok(Summary {
            compression: source.compression(),
            ..summary
        })
    })?;
    if let Some(recipe) = Rc::into_inner(recipe) {
        recipe
            .into_inner()
            .finish()
            .map_err(|error| UnpackError::Entry {
                action: "write the recipe of",
                entry: "the layer".into(),
                source: recipe::errno(&error),
            })?;
    }
    Ok(unpacked)
}

/// Reads a layer's archive to its end as [`unpack`] would and writes nothing; gives the number of
/// its entries and its digest.
///
/// # Errors
/// What is wrong with the archive itself.
pub fn read_entries(
    blob: impl Read + Send,
    compression: Compression,
    limit_bytes: Option<u64>,
) -> Result<(u64, Digest), UnpackError> {
    read_archive(
        blob,
        compression,
        Algorithm::Sha256,
        limit_bytes,
        |source| {
            let mut archive = Archive::new(source);
            let mut entries = 0;
            while archive.next_entry()?.is_some() {
                entries += 1;
                loop {
                    let count = archive.data()?.len();
                    if count == 0 {
                        break;
                    }
                    archive.consume(count);
                }
            }
            Ok(entries)
        },
    )
}

/// A stranger's bytes for a message: printable and not too long.
fn shown(bytes: &[u8]) -> String {
    const LIMIT: usize = 200;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LIMIT)]);
    let more = if bytes.len() > LIMIT { "..." } else { "" };
    format!("\"{}{more}\"", text.escape_debug())
}
