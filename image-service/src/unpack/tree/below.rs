//! What the layer's parents have, where it leans on them.

use super::super::archive::Entry;
use super::super::{Parents, UnpackError, shown};
use super::attributes::{copy_attributes, errno, file_type, gid, modified, timestamps, uid};
use super::find::Step;
use super::names::{bad_path, join};
use super::{DIRECTORY, Directory, Missing, Tree};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

/// Bytes copied at once.
const COPY_BYTES: usize = 64 << 10;

impl Tree<'_> {
    /// A step to where this layer has nothing and its parents may have something.
    pub(super) fn step_below(
        &mut self,
        entry: &Entry,
        current: &Rc<Directory>,
        name: &[u8],
        missing: Missing,
    ) -> Result<Step, UnpackError> {
        let fail = |action| {
            move |source| UnpackError::Entry {
                action,
                entry: shown(&entry.path),
                source,
            }
        };
        let Some(below) = self.below(entry, &current.path, name, OFlags::PATH)? else {
            if missing == Missing::Leave {
                return Ok(Step::Nowhere);
            }
            return self.make_parent(entry, current, name, false);
        };
        let stat = rustix::fs::fstat(&below).map_err(fail("look at the parent of"))?;
        match file_type(&stat) {
            FileType::Symlink => {
                self.followed_below = true;
                let target = rustix::fs::readlinkat(&below, "", Vec::new())
                    .map_err(fail("follow a symbolic link for"))?;
                Ok(Step::Link(target.into_bytes()))
            }
            FileType::Directory => {
                let from = self
                    .below(entry, &current.path, name, DIRECTORY)?
                    .ok_or(Errno::NOENT)
                    .map_err(fail("open the parent of"))?;
                let fail = fail("copy up the parent of");
                rustix::fs::mkdirat(&current.fd, name, Mode::from_raw_mode(0o700)).map_err(fail)?;
                let fd = rustix::fs::openat(&current.fd, name, DIRECTORY, Mode::empty())
                    .map_err(fail)?;
                copy_attributes(&from, &fd, &stat).map_err(fail)?;
                let path = join(&current.path, name);
                self.note_times(entry, &path, modified(&stat), true)?;
                self.summary.inodes += 1;
                Ok(Step::Into(Rc::new(Directory {
                    fd,
                    path,
                    merges: true,
                    setgid: stat.st_mode & 0o2000 != 0,
                })))
            }
            _ => Err(bad_path(entry, "has a parent that is no directory")),
        }
    }

    /// Notes that the parents matter, and waits for them where they can be waited for; an error
    /// where they are not at hand. Nothing before the first call depended on them, so the layer
    /// goes on as if they had been there from the beginning.
    pub(super) fn lean(&mut self) -> Result<(), UnpackError> {
        self.summary.leans_on_parents = true;
        match self.parents {
            Parents::Unknown => Err(UnpackError::LeansOnParents),
            Parents::Later(wait) if self.lent.is_none() => {
                self.lent = Some(wait()?);
                Ok(())
            }
            Parents::None | Parents::Later(_) | Parents::Merged(_) => Ok(()),
        }
    }

    /// Opens `path`/`name` of the parents' merged view, itself and not what it
    /// links to. `path` has no symbolic links in that view.
    pub(super) fn below(
        &self,
        entry: &Entry,
        path: &[u8],
        name: &[u8],
        flags: OFlags,
    ) -> Result<Option<OwnedFd>, UnpackError> {
        let root = match (&self.lent, self.parents) {
            (Some(lent), _) => lent.as_fd(),
            (None, Parents::Merged(root)) => root,
            (None, _) => return Ok(None),
        };
        let opened = rustix::fs::openat2(
            root,
            join(path, name),
            flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            // With O_PATH and O_NOFOLLOW a link at the end is opened, not followed.
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        );
        match opened {
            Ok(fd) => Ok(Some(fd)),
            // A link where this layer has a directory: nothing of it shows through.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(source) => Err(UnpackError::Entry {
                action: "look in the parent layers for",
                entry: shown(&entry.path),
                source,
            }),
        }
    }

    /// Copies `name` of the parents' merged view into the layer, so that it can
    /// be linked to. `None` where the parents do not have it.
    pub(super) fn copy_up_file(
        &mut self,
        entry: &Entry,
        directory: &Directory,
        name: &[u8],
    ) -> Result<Option<Stat>, UnpackError> {
        let fail = |source| UnpackError::Entry {
            action: "copy up what it links to for",
            entry: shown(&entry.path),
            source,
        };
        let Some(below) = self.below(entry, &directory.path, name, OFlags::PATH)? else {
            return Ok(None);
        };
        let stat = rustix::fs::fstat(&below).map_err(fail)?;
        let at = &directory.fd;
        match file_type(&stat) {
            // The caller says why not.
            FileType::Directory => return Ok(Some(stat)),
            FileType::RegularFile => {
                let readable = OFlags::RDONLY | OFlags::NONBLOCK;
                let from = self
                    .below(entry, &directory.path, name, readable)?
                    .ok_or_else(|| fail(Errno::NOENT))?;
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let to = rustix::fs::openat(at, name, flags, Mode::from_raw_mode(0o600))
                    .map_err(fail)?;
                let mut from = File::from(from);
                let mut to = File::from(to);
                let (size, crc32) =
                    copy(&mut from, &mut to).map_err(|error| fail(errno(&error)))?;
                self.note_file(&join(&directory.path, name), size, crc32, false);
                copy_attributes(from.as_fd(), to.as_fd(), &stat).map_err(fail)?;
                rustix::fs::futimens(&to, &timestamps(modified(&stat))).map_err(fail)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&below, "", Vec::new()).map_err(fail)?;
                rustix::fs::symlinkat(target, at, name).map_err(fail)?;
            }
            special => {
                rustix::fs::mknodat(at, name, special, Mode::empty(), stat.st_rdev)
                    .map_err(fail)?;
            }
        }
        if file_type(&stat) != FileType::RegularFile {
            rustix::fs::chownat(
                at,
                name,
                Some(uid(stat.st_uid)),
                Some(gid(stat.st_gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(fail)?;
            if file_type(&stat) != FileType::Symlink {
                let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
                rustix::fs::chmodat(at, name, mode, AtFlags::empty()).map_err(fail)?;
            }
            let times = timestamps(modified(&stat));
            rustix::fs::utimensat(at, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        }
        let made = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        self.summary.add(&made);
        Ok(Some(made))
    }
}

/// All of `from`, its length and checksum.
fn copy(from: &mut File, to: &mut File) -> std::io::Result<(u64, u32)> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut hasher = crc32fast::Hasher::new();
    let mut size = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok((size, hasher.finalize())),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..count])?;
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
}
