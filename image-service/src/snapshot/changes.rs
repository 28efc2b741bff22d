//! What a container has changed in its image, as an archive.
//!
//! ```text
//! upper/a          file, link, device, directory ──> an entry of the archive
//! upper/b          whiteout                      ──> "/b" is deleted
//! upper/c/         opaque: what the layers have  ──> "/c/<name>" is deleted, for each
//!                  there is out of sight             name that upper/c has not got
//! ```
//!
//! The upper directory is the container's own: no link of it is followed, and
//! holes of a file stay holes. Nothing may change it meanwhile.
//!
//! Source: kernel, `filesystems/overlayfs.rst`, "whiteouts and opaque
//! directories"; tar(5), pax and GNU sparse entries; what peers make of a
//! writable layer in a checkpoint (`rootfs-diff.tar`, `deleted.files`).

use super::{OPEN_DIRECTORY, SnapshotError, Snapshots, UPPER, check_id, io};
use crate::layer::{LayerId, Store};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// How deep directories are followed: each level holds a descriptor.
const DEEPEST: usize = 512;

/// What marks a directory that hides what lies below it.
const OPAQUE: &str = "trusted.overlay.opaque";

/// Longest attribute that is kept. Source: XATTR_SIZE_MAX.
const LONGEST_ATTRIBUTE: usize = 64 << 10;

/// Most bytes that the names of a file's attributes take. Source: XATTR_LIST_MAX.
const LONGEST_NAMES: usize = 64 << 10;

impl Snapshots {
    /// Writes everything the container has added or changed to `to`, as a tar
    /// archive, and gives the paths of what it has deleted, from "/" on.
    ///
    /// # Errors
    /// `Io` with what could not be read, or written to `to`.
    pub fn write_changes(
        &self,
        container_id: &str,
        to: &mut dyn Write,
    ) -> Result<Vec<String>, SnapshotError> {
        check_id(container_id)?;
        let path = self.0.dir.join(container_id).join(UPPER);
        let layers = self.layers(container_id)?;
        let name = format!("{container_id}/{UPPER}");
        let upper = rustix::fs::openat(&self.0.fd, name, OPEN_DIRECTORY, Mode::empty())
            .map_err(|source| io("open", &path, source))?;
        let walk = Walk {
            archive: Builder::new(to),
            upper: path,
            lower: Lower {
                store: &self.0.store,
                layers: &layers,
            },
            links: HashMap::new(),
            deleted: Vec::new(),
        };
        walk.run(upper)
    }
}

/// A directory that is being gone through.
struct Level {
    fd: OwnedFd,
    names: Vec<CString>,
    /// From the root on, without a leading slash; empty for the root.
    path: PathBuf,
    opaque: bool,
}

struct Walk<'a> {
    archive: Builder<&'a mut dyn Write>,
    upper: PathBuf,
    lower: Lower<'a>,
    /// Where an inode of several names was first.
    links: HashMap<u64, PathBuf>,
    deleted: Vec<String>,
}

impl Walk<'_> {
    fn run(mut self, upper: OwnedFd) -> Result<Vec<String>, SnapshotError> {
        let opaque = is_opaque(&upper);
        let first = self.enter(upper, PathBuf::new(), opaque)?;
        let mut levels = vec![first];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.pop() else {
                levels.pop();
                continue;
            };
            let path = level.path.join(OsStr::from_bytes(name.to_bytes()));
            let stat = rustix::fs::statat(&level.fd, &*name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|source| io("look at", &self.upper.join(&path), source))?;
            let opaque = level.opaque;
            let directory = self.add(level.fd.as_fd(), &name, &path, &stat)?;
            if let Some(directory) = directory {
                if levels.len() >= DEEPEST {
                    return Err(io(
                        "go deeper than",
                        &self.upper.join(&path),
                        Errno::NAMETOOLONG,
                    ));
                }
                let opaque = opaque || is_opaque(&directory);
                levels.push(self.enter(directory, path, opaque)?);
            }
        }
        let finished = self.archive.finish();
        finished.map_err(|error| io("archive", &self.upper, crate::layer::errno(&error)))?;
        self.deleted.sort();
        Ok(self.deleted)
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf, opaque: bool) -> Result<Level, SnapshotError> {
        let mut names = names(&fd).map_err(|source| io("read", &self.upper.join(&path), source))?;
        if opaque {
            let here: HashSet<&[u8]> = names.iter().map(|name| name.to_bytes()).collect();
            for hidden in self.lower.names(&path)? {
                if !here.contains(hidden.to_bytes()) {
                    self.deleted
                        .push(absolute(&path.join(OsStr::from_bytes(hidden.to_bytes()))));
                }
            }
        }
        // Taken from the end.
        names.sort_by(|a, b| b.cmp(a));
        Ok(Level {
            fd,
            names,
            path,
            opaque,
        })
    }

    /// Archives what is at `path`; a directory is given back to be gone through.
    fn add(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CString,
        path: &Path,
        stat: &Stat,
    ) -> Result<Option<OwnedFd>, SnapshotError> {
        let at = self.upper.join(path);
        let unreadable = |source| io("read", &at, source);
        let unwritten = |error: std::io::Error| io("archive", &at, crate::layer::errno(&error));
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            self.deleted.push(absolute(path));
            return Ok(None);
        }
        let mut header = Header::new_gnu();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        header.set_size(0);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                header.set_entry_type(EntryType::Link);
                let linked = self.archive.append_link(&mut header, path, first);
                return linked.map(|()| None).map_err(unwritten);
            }
            self.links.insert(stat.st_ino, path.to_owned());
        }
        match kind {
            FileType::Directory => {
                let fd = rustix::fs::openat(parent, name, OPEN_DIRECTORY, Mode::empty())
                    .map_err(unreadable)?;
                self.attributes(&fd).map_err(unwritten)?;
                header.set_entry_type(EntryType::Directory);
                self.archive
                    .append_data(&mut header, path, std::io::empty())
                    .map_err(unwritten)?;
                return Ok(Some(fd));
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let fd =
                    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(unreadable)?;
                self.attributes(&fd).map_err(unwritten)?;
                self.archive
                    .append_file(path, &mut File::from(fd))
                    .map_err(unwritten)?;
            }
            FileType::Symlink => {
                let target =
                    rustix::fs::readlinkat(parent, name, Vec::new()).map_err(unreadable)?;
                header.set_entry_type(EntryType::Symlink);
                self.archive
                    .append_link(&mut header, path, OsStr::from_bytes(target.to_bytes()))
                    .map_err(unwritten)?;
            }
            FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo => {
                header.set_entry_type(match kind {
                    FileType::CharacterDevice => EntryType::Char,
                    FileType::BlockDevice => EntryType::Block,
                    _ => EntryType::Fifo,
                });
                let (major, minor) = (
                    rustix::fs::major(stat.st_rdev),
                    rustix::fs::minor(stat.st_rdev),
                );
                let numbered = header
                    .set_device_major(major)
                    .and_then(|()| header.set_device_minor(minor));
                numbered.map_err(unwritten)?;
                self.archive
                    .append_data(&mut header, path, std::io::empty())
                    .map_err(unwritten)?;
            }
            // A socket means something to those who hold it, and they are in the memory.
            _ => {}
        }
        Ok(None)
    }

    /// Attributes that belong to the file, ahead of its entry.
    fn attributes(&mut self, fd: &OwnedFd) -> std::io::Result<()> {
        let mut names = vec![0; LONGEST_NAMES];
        let length = match rustix::fs::flistxattr(fd, &mut names[..]) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for name in names[..length].split(|byte| *byte == 0) {
            let Ok(name) = std::str::from_utf8(name) else {
                continue;
            };
            if name != "security.capability" && !name.starts_with("user.") {
                continue;
            }
            let mut value = vec![0; LONGEST_ATTRIBUTE];
            let length = rustix::fs::fgetxattr(fd, name, &mut value[..])?;
            value.truncate(length);
            kept.push((format!("SCHILY.xattr.{name}"), value));
        }
        if kept.is_empty() {
            return Ok(());
        }
        let pairs = kept.iter().map(|(name, value)| (name.as_str(), &value[..]));
        self.archive.append_pax_extensions(pairs)
    }
}

/// The layers below.
struct Lower<'a> {
    store: &'a Store,
    layers: &'a [LayerId],
}

impl Lower<'_> {
    /// What they have in the directory `path`, whichever hides which.
    fn names(&self, path: &Path) -> Result<HashSet<CString>, SnapshotError> {
        let mut all = HashSet::new();
        for layer in self.layers {
            let base = Store::fs_path(layer);
            let at = self.store.dir().join(&base).join(path);
            let fail = |source| io("read", &at, source);
            let root = rustix::fs::openat(self.store.fd(), &*base, OPEN_DIRECTORY, Mode::empty())
                .map_err(fail)?;
            let wanted = if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            };
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            match rustix::fs::openat2(&root, wanted, OPEN_DIRECTORY, Mode::empty(), resolve) {
                Ok(directory) => all.extend(names(&directory).map_err(fail)?),
                // It has no such directory.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(source) => return Err(fail(source)),
            }
        }
        Ok(all)
    }
}

fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn is_opaque(directory: &OwnedFd) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::fgetxattr(directory, OPAQUE, &mut value), Ok(1) if value == *b"y")
}

fn absolute(path: &Path) -> String {
    Path::new("/").join(path).to_string_lossy().into_owned()
}
