//! An archive's files, put aside and hashed.

use super::ImportError;
use crate::content::MAX_DOCUMENT_BYTES;
use crate::digest::{Algorithm, Digest, Hasher};
use crate::layer::random_name;
use crate::unpack::{Archive, Compression, Kind, UnpackError, read_archive};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::path::{Path, PathBuf};

/// Far more than the blobs of the images anybody puts into one archive.
const MAX_FILES: usize = 100_000;
/// Longest name in the archive, in bytes. Source: limits.h, PATH_MAX.
const MAX_NAME_BYTES: usize = 4096;
/// Manifests, indexes and configs that are read of one archive, in bytes, each as often as it is
/// read: they are kept in memory, and an index may name another one a thousand times.
const MAX_READ_BYTES: u64 = 256 << 20;
/// How many links lead to one file at most.
const MAX_LINKS: usize = 8;

/// One file of the archive.
#[derive(Clone, Debug)]
pub(super) struct Spooled {
    number: usize,
    /// sha256 of its content.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
}

/// The files, by their names in the archive; removed when dropped.
pub(super) struct Spool {
    dir: PathBuf,
    files: HashMap<String, Spooled>,
    by_digest: HashMap<Digest, Spooled>,
    links: HashMap<String, String>,
    /// Blobs named by another digest than sha256, once that was found right.
    verified: RefCell<HashMap<Digest, Spooled>>,
    /// Of manifests, indexes and configs.
    read_bytes: Cell<u64>,
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(
                path = %self.dir.display(),
                error = &error as &dyn std::error::Error,
                "what an import put aside stays until the next start"
            );
        }
    }
}

impl Spool {
    /// Reads `archive` to its end, into a new directory in `lib` whose name begins with `prefix`.
    pub(super) fn fill(
        lib: &Path,
        prefix: &str,
        mut archive: impl Read + Send,
    ) -> Result<Spool, ImportError> {
        let dir = lib.join(format!("{prefix}{}", random_name()));
        std::fs::create_dir(&dir).map_err(io_error("create", &dir))?;
        let mut spool = Spool {
            dir,
            files: HashMap::new(),
            by_digest: HashMap::new(),
            links: HashMap::new(),
            verified: RefCell::default(),
            read_bytes: Cell::new(0),
        };
        let mut start = Vec::with_capacity(4);
        (&mut archive)
            .take(4)
            .read_to_end(&mut start)
            .map_err(|source| ImportError::Archive(UnpackError::Read { source }))?;
        let compression = Compression::of_magic(&start);
        let archive = Cursor::new(start).chain(archive);
        let mut failed = None;
        let read = read_archive(archive, compression, Algorithm::Sha256, None, |source| {
            spool.take_all(&mut Archive::new(source), &mut failed)
        });
        match (failed, read) {
            (Some(error), _) => Err(error),
            (None, Err(error)) => Err(ImportError::Archive(error)),
            (None, Ok(_)) => Ok(spool),
        }
    }

    /// What is no fault of the archive goes to `failed`.
    fn take_all(
        &mut self,
        archive: &mut Archive<'_>,
        failed: &mut Option<ImportError>,
    ) -> Result<(), UnpackError> {
        let mut count = 0;
        while let Some(entry) = archive.next_entry()? {
            count += 1;
            if count > MAX_FILES {
                *failed = Some(ImportError::TooManyFiles { most: MAX_FILES });
                return Err(UnpackError::LeansOnParents);
            }
            if entry.path.len().max(entry.link.len()) > MAX_NAME_BYTES {
                let begin = &entry.path[..entry.path.len().min(100)];
                *failed = Some(ImportError::Wrong {
                    what: String::from_utf8_lossy(begin).into_owned(),
                    why: format!("its name or link is longer than {MAX_NAME_BYTES} bytes"),
                });
                return Err(UnpackError::LeansOnParents);
            }
            let name = clean(&entry.path);
            match entry.kind {
                Kind::File => {
                    if let Err(error) = self.take(count, &name, archive)? {
                        *failed = Some(error);
                        return Err(UnpackError::LeansOnParents);
                    }
                }
                // What old versions of docker save write for a layer that is there twice.
                Kind::Symlink => {
                    let base = name.rsplit_once('/').map_or("", |(base, _)| base);
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    self.links.insert(name.clone(), join(base, &target));
                }
                Kind::HardLink => {
                    self.links.insert(name.clone(), clean(&entry.link));
                }
                Kind::Directory | Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {}
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        number: usize,
        name: &str,
        archive: &mut Archive<'_>,
    ) -> Result<Result<(), ImportError>, UnpackError> {
        let path = self.dir.join(number.to_string());
        let mut file = match File::create_new(&path) {
            Ok(file) => file,
            Err(error) => return Ok(Err(io_error("create", &path)(error))),
        };
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut size = 0;
        loop {
            let bytes = archive.data()?;
            if bytes.is_empty() {
                break;
            }
            if let Err(error) = file.write_all(bytes) {
                return Ok(Err(io_error("write", &path)(error)));
            }
            hasher.update(bytes);
            let count = bytes.len();
            size += count as u64;
            archive.consume(count);
        }
        let spooled = Spooled {
            number,
            digest: hasher.finish(),
            size,
        };
        self.by_digest
            .insert(spooled.digest.clone(), spooled.clone());
        self.files.insert(name.to_owned(), spooled);
        Ok(Ok(()))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of that name, links followed.
    pub(super) fn named(&self, name: &str) -> Option<&Spooled> {
        let mut name = join("", name);
        for _ in 0..MAX_LINKS {
            if let Some(file) = self.files.get(&name) {
                return Some(file);
            }
            name = self.links.get(&name)?.clone();
        }
        None
    }

    /// The blob `digest` names, verified.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Option<Spooled>, ImportError> {
        if let Some(file) = self.by_digest.get(digest) {
            return Ok(Some(file.clone()));
        }
        if let Some(file) = self.verified.borrow().get(digest) {
            return Ok(Some(file.clone()));
        }
        let name = format!("blobs/{}/{}", digest.algorithm().name(), digest.hex());
        let Some(file) = self.named(&name) else {
            return Ok(None);
        };
        // Its name says so, and sha256 is known by now.
        let mut hasher = digest.hasher();
        let mut reader = self.open(file)?;
        let mut buffer = vec![0; 128 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) => return Err(io_error("read", &self.dir)(error)),
            }
        }
        match hasher.verify(digest) {
            Ok(()) => {
                // An index may name it a thousand times. Not more than there are files.
                let mut verified = self.verified.borrow_mut();
                verified.insert(digest.clone(), file.clone());
                Ok(Some(file.clone()))
            }
            Err(error) => Err(ImportError::Wrong {
                what: name,
                why: error.to_string(),
            }),
        }
    }

    pub(super) fn open(&self, file: &Spooled) -> Result<File, ImportError> {
        let path = self.dir.join(file.number.to_string());
        File::open(&path).map_err(io_error("read", &path))
    }

    /// The content of a manifest, config or the like.
    pub(super) fn read(&self, what: &str, file: &Spooled) -> Result<Vec<u8>, ImportError> {
        if file.size > MAX_DOCUMENT_BYTES {
            return Err(ImportError::Wrong {
                what: what.to_owned(),
                why: format!("it has {} bytes, over {MAX_DOCUMENT_BYTES}", file.size),
            });
        }
        let read_bytes = self.read_bytes.get() + file.size;
        if read_bytes > MAX_READ_BYTES {
            return Err(ImportError::Wrong {
                what: what.to_owned(),
                why: format!(
                    "with it, manifests and configs of more than {MAX_READ_BYTES} bytes are to be read"
                ),
            });
        }
        self.read_bytes.set(read_bytes);
        let mut bytes = Vec::with_capacity(file.size as usize);
        self.open(file)?
            .read_to_end(&mut bytes)
            .map_err(io_error("read", &self.dir))?;
        Ok(bytes)
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Io {
        action,
        path,
        source,
    }
}

fn clean(path: &[u8]) -> String {
    join("", &String::from_utf8_lossy(path))
}

/// `path` as seen from `base`, without `.` and `..`. It is only ever a key.
fn join(base: &str, path: &str) -> String {
    let base = if path.starts_with('/') { "" } else { base };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::{Spool, join};
    use crate::digest::Digest;

    #[test]
    fn names_are_plain_keys() {
        assert_eq!(join("", "./blobs//sha256/x"), "blobs/sha256/x");
        assert_eq!(join("a", "../b/layer.tar"), "b/layer.tar");
        assert_eq!(join("", "../../etc/passwd"), "etc/passwd");
        assert_eq!(join("a", "/b"), "b");
    }

    #[test]
    fn a_blob_named_by_another_digest_than_sha256_is_hashed_once() {
        // sha512 of "blob".
        let hex = {
            let mut hasher = crate::digest::Hasher::new(crate::digest::Algorithm::Sha512);
            hasher.update(b"blob");
            hasher.finish()
        };
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(4);
        let mut builder = tar::Builder::new(Vec::new());
        let name = format!("blobs/sha512/{}", hex.hex());
        builder
            .append_data(&mut header, &name, &b"blob"[..])
            .unwrap();
        let lib = tempfile::tempdir().unwrap();
        let archive = builder.into_inner().unwrap();
        let spool = Spool::fill(lib.path(), "import-", &archive[..]).unwrap();
        let first = spool.blob(&hex).unwrap().unwrap();
        assert_eq!(first.digest, Digest::sha256(b"blob"));
        // What is not read again may as well be gone.
        std::fs::remove_file(spool.dir().join(first.number.to_string())).unwrap();
        assert_eq!(spool.blob(&hex).unwrap().unwrap().number, first.number);
    }
}
