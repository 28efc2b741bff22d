//! Reads a layer's files against what was kept from unpacking it.

use super::{FS, LayerId, OPEN_DIRECTORY, RECIPE, Recipe, Store, StoreError, errno};
use crate::digest::Digest;
use crate::unpack::recipe::{self, FileNote, Step};
use rustix::fs::{Advice, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes read at once.
const READ_BYTES: usize = 128 << 10;

/// How fast to read: at full speed, or so that others hardly notice.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<NonZeroU64>,
    /// When what was read so far should have been read.
    due: Instant,
}

impl Pace {
    /// As fast as the disk.
    pub fn full() -> Pace {
        Pace {
            bytes_per_second: None,
            due: Instant::now(),
        }
    }

    /// On average no faster than this. What was read does not stay in the page cache.
    pub fn limited(bytes_per_second: NonZeroU64) -> Pace {
        Pace {
            bytes_per_second: Some(bytes_per_second),
            due: Instant::now(),
        }
    }

    fn have_read(&mut self, bytes: usize) {
        let Some(rate) = self.bytes_per_second else {
            return;
        };
        let now = Instant::now();
        // A pause is not made up for.
        let begun = self
            .due
            .max(now.checked_sub(Duration::from_secs(1)).unwrap_or(now));
        self.due = begun + Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        if let Some(wait) = self.due.checked_duration_since(now) {
            thread::sleep(wait);
        }
    }

    fn done_with(&self, file: &File) {
        if self.bytes_per_second.is_some() {
            // Only a hint.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}

/// What is wrong with a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A file is not there, or something else is.
    Missing {
        /// In the layer.
        path: String,
    },
    /// A file has another length.
    Length {
        /// In the layer.
        path: String,
        /// What it should have, in bytes.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// A file has another content.
    Content {
        /// In the layer.
        path: String,
    },
    /// A file cannot be read.
    Unreadable {
        /// In the layer.
        path: String,
        /// What the kernel said.
        error: Errno,
    },
    /// What was kept to check the layer against is damaged itself.
    Recipe {
        /// How.
        why: String,
    },
    /// Each file is right and the whole is not.
    DiffId {
        /// What came out.
        found: Digest,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Missing { path } => write!(f, "{path} is not there"),
            Damage::Length {
                path,
                expected,
                found,
            } => write!(f, "{path} has {found} bytes, not {expected}"),
            Damage::Content { path } => write!(f, "the content of {path} has changed"),
            Damage::Unreadable { path, error } => write!(f, "{path} cannot be read: {error}"),
            Damage::Recipe { why } => write!(f, "its list of files is damaged: {why}"),
            Damage::DiffId { found } => write!(f, "its archive has the digest {found}"),
        }
    }
}

/// What a verification came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// All content is as it was unpacked.
    Whole {
        /// Bytes of files that were read.
        bytes: u64,
    },
    /// The first thing found wrong.
    Damaged(Damage),
    /// Nothing was kept to check it against.
    Unknown,
    /// It was removed meanwhile, or is marked already.
    Gone,
}

impl Store {
    /// Reads the layer's files and compares them with what was unpacked. Blocking, for as long
    /// as reading takes; the layer is not collected meanwhile. It is not marked.
    ///
    /// # Errors
    /// Where the layer's directory cannot be opened.
    pub fn verify(&self, id: &LayerId, pace: &mut Pace) -> Result<Finding, StoreError> {
        let lease = self.lease();
        if !lease.hold(id) {
            return Ok(Finding::Gone);
        }
        let Some(info) = self.info(id) else {
            return Ok(Finding::Gone);
        };
        if info.recipe == Recipe::None {
            return Ok(Finding::Unknown);
        }
        let mut hasher = info.diff_id.hasher();
        let mut bytes = 0;
        let replayed = self.replay(id, pace, &mut |part, is_file| {
            hasher.update(part);
            if is_file {
                bytes += part.len() as u64;
            }
            Ok(())
        });
        match replayed {
            Ok(()) => {}
            Err(ReplayError::Damage(damage)) => return Ok(Finding::Damaged(damage)),
            Err(ReplayError::Store(error)) => return Err(error),
            Err(ReplayError::Sink(error)) => {
                return Ok(Finding::Damaged(Damage::Recipe {
                    why: error.to_string(),
                }));
            }
        }
        let found = hasher.finish();
        if info.recipe == Recipe::Archive && found != info.diff_id {
            return Ok(Finding::Damaged(Damage::DiffId { found }));
        }
        Ok(Finding::Whole { bytes })
    }

    /// The layer's archive as it was unpacked, uncompressed, part by part; `None` where that
    /// was not kept. Blocking.
    ///
    /// # Errors
    /// Those of `sink`, and `InvalidData` where the layer is damaged; the caller then has parts
    /// that it must not use.
    pub fn write_archive(
        &self,
        id: &LayerId,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Option<()>> {
        let lease = self.lease();
        let info = self.info(id).filter(|_| lease.hold(id));
        let Some(info) = info.filter(|info| info.recipe == Recipe::Archive) else {
            return Ok(None);
        };
        let damaged = |damage: &Damage| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the layer {id} is damaged: {damage}"),
            )
        };
        let mut hasher = info.diff_id.hasher();
        self.replay(id, &mut Pace::full(), &mut |part, _| {
            hasher.update(part);
            sink(part)
        })
        .map_err(|error| match error {
            ReplayError::Damage(damage) => damaged(&damage),
            ReplayError::Store(error) => io::Error::from(error.source),
            ReplayError::Sink(error) => error,
        })?;
        let found = hasher.finish();
        if found != info.diff_id {
            return Err(damaged(&Damage::DiffId { found }));
        }
        Ok(Some(()))
    }

    /// How many bytes [`Store::write_archive`] would give; `None` where it cannot.
    ///
    /// # Errors
    /// Where what was kept cannot be read.
    pub fn archive_bytes(&self, id: &LayerId) -> io::Result<Option<u64>> {
        if self
            .info(id)
            .is_none_or(|info| info.recipe != Recipe::Archive)
        {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.0.fd, format!("{id}/{RECIPE}"), flags, Mode::empty())?;
        let mut recipe = recipe::Reader::new(File::from(fd))?;
        let mut bytes = 0;
        while let Some(step) = recipe.next_step()? {
            bytes += match step {
                Step::Raw(raw) => raw.len() as u64,
                Step::File(note) => note.size,
                Step::Copied(_) => 0,
            };
        }
        Ok(Some(bytes))
    }

    fn replay(
        &self,
        id: &LayerId,
        pace: &mut Pace,
        sink: &mut dyn FnMut(&[u8], bool) -> io::Result<()>,
    ) -> Result<(), ReplayError> {
        let open = |name: &str, flags| {
            let path = format!("{id}/{name}");
            rustix::fs::openat(&self.0.fd, &*path, flags, Mode::empty()).map_err(|source| {
                StoreError {
                    action: "open",
                    path: self.0.dir.join(path),
                    source,
                }
            })
        };
        let root = open(FS, OPEN_DIRECTORY).map_err(ReplayError::Store)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let bad = |error: io::Error| {
            ReplayError::Damage(Damage::Recipe {
                why: error.to_string(),
            })
        };
        let recipe = open(RECIPE, flags)
            .map_err(|error| bad(error.source.into()))
            .map(File::from)?;
        let mut recipe = recipe::Reader::new(recipe).map_err(bad)?;
        let mut files = Files {
            root: &root,
            directory: None,
            buffer: vec![0; READ_BYTES],
        };
        while let Some(step) = recipe.next_step().map_err(bad)? {
            match step {
                Step::Raw(bytes) => sink(&bytes, false).map_err(ReplayError::Sink)?,
                Step::File(note) => files.read(&note, pace, &mut |part| sink(part, true))?,
                Step::Copied(note) => files.read(&note, pace, &mut |_| Ok(()))?,
            }
        }
        Ok(())
    }
}

enum ReplayError {
    Damage(Damage),
    Store(StoreError),
    Sink(io::Error),
}

/// Files below a layer's root, mostly one directory after the other.
struct Files<'a> {
    root: &'a OwnedFd,
    directory: Option<(Vec<u8>, OwnedFd)>,
    buffer: Vec<u8>,
}

impl Files<'_> {
    fn open(&mut self, path: &[u8]) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let (parent, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], path),
        };
        let at = if parent.is_empty() {
            self.root.as_fd()
        } else {
            let known = matches!(&self.directory, Some((known, _)) if known == parent);
            if !known {
                let fd = rustix::fs::openat2(
                    self.root,
                    parent,
                    OPEN_DIRECTORY,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
                )?;
                self.directory = Some((parent.to_vec(), fd));
            }
            match &self.directory {
                Some((_, fd)) => fd.as_fd(),
                None => self.root.as_fd(),
            }
        };
        rustix::fs::openat(at, name, flags, Mode::empty()).map(File::from)
    }

    fn read(
        &mut self,
        note: &FileNote,
        pace: &mut Pace,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), ReplayError> {
        let path = || {
            String::from_utf8_lossy(&note.path)
                .escape_debug()
                .to_string()
        };
        let damage = |damage| Err(ReplayError::Damage(damage));
        let unreadable = |error: Errno| {
            ReplayError::Damage(match error {
                Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO => {
                    Damage::Missing { path: path() }
                }
                error => Damage::Unreadable {
                    path: path(),
                    error,
                },
            })
        };
        let mut file = self.open(&note.path).map_err(unreadable)?;
        let stat = rustix::fs::fstat(&file).map_err(unreadable)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return damage(Damage::Missing { path: path() });
        }
        let found = stat.st_size as u64;
        if found != note.size {
            return damage(Damage::Length {
                path: path(),
                expected: note.size,
                found,
            });
        }
        let mut hasher = crc32fast::Hasher::new();
        loop {
            let count = match file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(unreadable(errno(&error))),
            };
            let part = &self.buffer[..count];
            hasher.update(part);
            sink(part).map_err(ReplayError::Sink)?;
            pace.have_read(count);
        }
        pace.done_with(&file);
        if hasher.finalize() != note.crc32 {
            return damage(Damage::Content { path: path() });
        }
        Ok(())
    }
}

/// Notes every file below `root` as it is.
pub(crate) fn note_files(root: &OwnedFd, mut writer: recipe::Writer) -> Result<(), Errno> {
    let mut buffer = vec![0; READ_BYTES];
    let mut linked = HashSet::new();
    let mut directories: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = directories.pop() {
        let directory = if path.is_empty() {
            rustix::fs::openat(root, ".", OPEN_DIRECTORY, Mode::empty())?
        } else {
            rustix::fs::openat2(
                root,
                &*path,
                OPEN_DIRECTORY,
                Mode::empty(),
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
            )?
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let mut full = path.clone();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(name);
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            let stat = rustix::fs::statat(&directory, name, flags)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => directories.push(full),
                FileType::RegularFile => {
                    if stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
                        continue;
                    }
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let mut file =
                        File::from(rustix::fs::openat(&directory, name, flags, Mode::empty())?);
                    let mut hasher = crc32fast::Hasher::new();
                    loop {
                        let count = file.read(&mut buffer).map_err(|error| errno(&error))?;
                        if count == 0 {
                            break;
                        }
                        hasher.update(&buffer[..count]);
                    }
                    writer.file(&FileNote {
                        path: full,
                        size: stat.st_size as u64,
                        crc32: hasher.finalize(),
                    });
                }
                _ => {}
            }
        }
    }
    writer.finish().map_err(|error| recipe::errno(&error))
}
