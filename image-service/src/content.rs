//! Manifests and configs as they were sent, by digest; and the reader that checks a layer
//! while it streams.
//!
//! ```text
//! DIR/sha256/<64 hex>      the bytes; the name is their digest
//! DIR/sha512/<128 hex>
//! ```
//! A file is written beside its name and renamed, and verified again whenever it is read: after
//! a power cut a damaged one is simply not there and is fetched again.
//! Source: OCI image-spec 1.1, `image-layout.md`, "Blobs", for the naming.

mod hashing;

use crate::digest::{Algorithm, Digest, Mismatch};
use berth_store::atomic_file::{self, Durability};
use hashing::Aside;
use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Largest manifest, index or config that is taken, in bytes.
/// Source: distribution-spec 1.1, "Pushing Manifests": registries should take 4 MiB.
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;

/// Why content could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// "create", "write", "sync", "read", "list", "remove".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The bytes are not what the digest names.
    #[error("the content is not what was asked for")]
    Mismatch(#[from] Mismatch),
}

/// The directory of manifests and configs.
#[derive(Debug)]
pub struct Content {
    dir: PathBuf,
    /// What is known of the files, so that asking for the sum needs no disk.
    files: Mutex<HashMap<Digest, Kept>>,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    /// Bytes on disk.
    space: u64,
    /// This process has synced it.
    durable: bool,
}

impl Kept {
    /// A file of `bytes` on ext4's and xfs's default blocks.
    fn new(bytes: u64) -> Kept {
        Kept {
            space: bytes.next_multiple_of(4096),
            durable: false,
        }
    }
}

impl Content {
    /// Opens or creates `dir`, and removes what a crash left half written.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn open(dir: &Path) -> Result<Content, ContentError> {
        let mut files = HashMap::new();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let dir = dir.join(algorithm.name());
            std::fs::create_dir_all(&dir).map_err(|source| ContentError::Io {
                action: "create",
                path: dir.clone(),
                source,
            })?;
            for name in names(&dir)? {
                if atomic_file::is_temporary(&name) {
                    remove(&dir.join(name))?;
                } else if let Ok(digest) = format!("{}:{name}", algorithm.name()).parse()
                    && let Ok(metadata) = std::fs::symlink_metadata(dir.join(name))
                {
                    files.insert(digest, Kept::new(metadata.len()));
                }
            }
        }
        Ok(Content {
            dir: dir.into(),
            files: Mutex::new(files),
        })
    }

    fn files(&self) -> MutexGuard<'_, HashMap<Digest, Kept>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that the files take on disk, and their number. Never waits for the disk.
    pub fn sums(&self) -> (u64, u64) {
        let files = self.files();
        let space = files.values().map(|kept| kept.space).sum();
        (space, files.len() as u64)
    }

    /// Whether there is a file for `digest`; only reading it tells whether it is good.
    pub fn has(&self, digest: &Digest) -> bool {
        self.files().contains_key(digest)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.algorithm().name()).join(digest.hex())
    }

    /// The bytes `digest` names; `None` when they are not here, or no longer right.
    pub fn get(&self, digest: &Digest) -> Option<Vec<u8>> {
        let path = self.path(digest);
        let length = std::fs::metadata(&path).ok()?.len();
        if length > MAX_DOCUMENT_BYTES {
            return None;
        }
        let bytes = std::fs::read(&path).ok()?;
        match digest.verify(&bytes) {
            Ok(()) => Some(bytes),
            Err(error) => {
                tracing::warn!(
                    path = %path.display(),
                    error = &error as &dyn std::error::Error,
                    "stored content is damaged, will be fetched again"
                );
                None
            }
        }
    }

    /// Keeps `bytes` under their digest. It is durable after [`Content::sync`].
    ///
    /// # Errors
    /// [`ContentError::Mismatch`] when they are something else, [`ContentError::Io`].
    pub fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ContentError> {
        digest.verify(bytes)?;
        let path = self.path(digest);
        atomic_file::replace(&path, bytes, Durability::ProcessEnd).map_err(|source| {
            ContentError::Io {
                action: "write",
                path,
                source,
            }
        })?;
        let kept = Kept::new(bytes.len() as u64);
        self.files().insert(digest.clone(), kept);
        Ok(())
    }

    /// Makes durable what is here of `digests`, and passes over what is being removed.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn sync<'a>(
        &self,
        digests: impl IntoIterator<Item = &'a Digest>,
    ) -> Result<(), ContentError> {
        let mut synced = Vec::new();
        for digest in digests {
            let is_due = |kept: &Kept| !kept.durable;
            if !self.files().get(digest).is_some_and(is_due) {
                continue;
            }
            if sync(&self.path(digest))? {
                synced.push(digest);
            }
        }
        let algorithms: HashSet<&str> = synced.iter().map(|d| d.algorithm().name()).collect();
        for name in algorithms {
            sync(&self.dir.join(name))?;
        }
        let mut files = self.files();
        for digest in synced {
            if let Some(kept) = files.get_mut(digest) {
                kept.durable = true;
            }
        }
        Ok(())
    }

    /// Reads every file; those that are not what their name says are removed and told.
    pub fn damaged(&self) -> Vec<Digest> {
        let mut here: Vec<Digest> = self.files().keys().cloned().collect();
        here.sort();
        here.retain(|digest| {
            if self.get(digest).is_some() || remove(&self.path(digest)).is_err() {
                return false;
            }
            self.files().remove(digest).is_some()
        });
        here
    }

    /// Removes everything whose digest is not in `kept`; tells what could not be removed.
    pub fn retain(&self, kept: &HashSet<Digest>) -> Vec<ContentError> {
        let mut failed = Vec::new();
        let here: Vec<Digest> = self.files().keys().cloned().collect();
        for digest in here.iter().filter(|digest| !kept.contains(digest)) {
            match remove(&self.path(digest)) {
                Ok(()) => {
                    self.files().remove(digest);
                }
                Err(error) => failed.push(error),
            }
        }
        failed
    }
}

fn names(dir: &Path) -> Result<Vec<String>, ContentError> {
    let list = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    };
    list().map_err(|source| ContentError::Io {
        action: "list",
        path: dir.into(),
        source,
    })
}

/// Puts a file or directory on the disk; `false` where there is none.
fn sync(path: &Path) -> Result<bool, ContentError> {
    match std::fs::File::open(path).and_then(|file| file.sync_all()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(ContentError::Io {
            action: "sync",
            path: path.into(),
            source,
        }),
    }
}

fn remove(path: &Path) -> Result<(), ContentError> {
    atomic_file::remove(path, Durability::ProcessEnd).map_err(|source| ContentError::Io {
        action: "remove",
        path: path.into(),
        source,
    })
}

/// What a blob turned out not to be.
#[derive(Debug, thiserror::Error)]
pub enum BadBlob {
    /// It ended early.
    #[error("it ended after {found} of {expected} bytes")]
    Short {
        /// What the manifest says.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// It did not end where it should.
    #[error("it has more than the {expected} bytes the manifest says")]
    Long {
        /// What the manifest says.
        expected: u64,
    },
    /// It is something else.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

/// Passes a blob on and checks it: the reader ends cleanly only when size and digest are right.
///
/// A wrong blob is an [`io::ErrorKind::InvalidData`] error in place of the end, whose inner
/// error is a [`BadBlob`]; it repeats on every further read.
pub struct VerifyingReader<R> {
    inner: R,
    expected: Digest,
    size: u64,
    seen: u64,
    hasher: Option<Aside>,
    failed: bool,
}

impl<R: Read> VerifyingReader<R> {
    /// Reads `inner`, which should give `size` bytes that `digest` names.
    pub fn new(inner: R, digest: &Digest, size: u64) -> VerifyingReader<R> {
        VerifyingReader {
            inner,
            expected: digest.clone(),
            size,
            seen: 0,
            hasher: Some(Aside::new(digest.hasher())),
            failed: false,
        }
    }

    fn bad(&mut self, why: BadBlob) -> io::Error {
        self.failed = true;
        io::Error::new(io::ErrorKind::InvalidData, why)
    }
}

impl<R: Read> Read for VerifyingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.failed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the blob was already found to be wrong",
            ));
        }
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.inner.read(buffer)?;
        if count > 0 {
            self.seen += count as u64;
            if self.seen > self.size {
                let expected = self.size;
                return Err(self.bad(BadBlob::Long { expected }));
            }
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&buffer[..count]);
            }
            return Ok(count);
        }
        if self.seen < self.size {
            let (expected, found) = (self.size, self.seen);
            return Err(self.bad(BadBlob::Short { expected, found }));
        }
        if let Some(hasher) = self.hasher.take()
            && let Err(mismatch) = hasher.verify(&self.expected)
        {
            return Err(self.bad(mismatch.into()));
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_what_its_name_says_or_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let digest = Digest::sha256(b"a");
        assert!(matches!(
            content.put(&digest, b"b"),
            Err(ContentError::Mismatch(_))
        ));
        assert_eq!(content.get(&digest), None);
        content.put(&digest, b"a").unwrap();
        assert_eq!(content.get(&digest).as_deref(), Some(&b"a"[..]));
        std::fs::write(dir.path().join("sha256").join(digest.hex()), b"").unwrap();
        assert_eq!(content.get(&digest), None);
    }

    #[test]
    fn what_is_not_kept_goes_and_so_do_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path()).unwrap();
        let (kept, gone) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        content.put(&kept, b"a").unwrap();
        content.put(&gone, b"b").unwrap();
        std::fs::write(dir.path().join("sha256/.x.tmp"), b"half").unwrap();
        assert!(content.retain(&HashSet::from([kept.clone()])).is_empty());
        let content = Content::open(dir.path()).unwrap();
        assert!(content.get(&kept).is_some() && content.get(&gone).is_none());
        assert!(!dir.path().join("sha256/.x.tmp").exists());
    }

    #[test]
    fn a_blob_ends_cleanly_only_when_it_is_right() {
        let read = |bytes: &[u8], size| {
            let mut reader = VerifyingReader::new(bytes, &Digest::sha256(b"hello"), size);
            let result = io::copy(&mut reader, &mut io::sink());
            if result.is_err() {
                assert!(reader.read(&mut [0; 8]).is_err());
            }
            result.map_err(|error| error.to_string())
        };
        assert_eq!(read(b"hello", 5), Ok(5));
        assert!(read(b"hell", 5).unwrap_err().contains("after 4 of 5"));
        assert!(read(b"hello!", 5).unwrap_err().contains("more than the 5"));
        assert!(read(b"jello", 5).unwrap_err().contains("digest"));
        assert!(read(b"", 5).is_err());
    }
}
