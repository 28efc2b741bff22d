//! What takes the place of something else, or hides it.

use super::super::archive::Entry;
use super::super::{UnpackError, shown};
use super::attributes::{WHITEOUT_DEVICE, errno, file_type, is_whiteout, set_opaque};
use super::names::{bad_path, normalised, split};
use super::{DIRECTORY, Directory, Missing, Tree};
use rustix::fs::{AtFlags, FileType, Mode, Stat};
use rustix::io::Errno;
use std::rc::Rc;

impl Tree<'_> {
    pub(super) fn hard_link(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory>,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let target = normalised(&entry.link).map_err(|error| match error {
            UnpackError::Path { why, .. } => UnpackError::LinkTarget {
                entry: shown(&entry.path),
                target: shown(&entry.link),
                why,
            },
            other => other,
        })?;
        let missing = || UnpackError::LinkTarget {
            entry: shown(&entry.path),
            target: shown(&entry.link),
            why: "does not exist in the image",
        };
        let fail = |source| UnpackError::Entry {
            action: "link",
            entry: shown(&entry.path),
            source,
        };
        let (target_parent, target_name) = split(&target);
        if target_name.is_empty() {
            return Err(missing());
        }
        let from = self
            .find_directory(entry, target_parent, Missing::Leave)?
            .ok_or_else(missing)?;
        let found = match rustix::fs::statat(&from.fd, target_name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_whiteout(&stat) => return Err(missing()),
            Ok(stat) => stat,
            Err(Errno::NOENT) if from.merges => {
                self.lean()?;
                self.copy_up_file(entry, &from, target_name)?
                    .ok_or_else(missing)?
            }
            Err(Errno::NOENT) => return Err(missing()),
            Err(source) => return Err(fail(source)),
        };
        if file_type(&found) == FileType::Directory {
            return Err(UnpackError::LinkTarget {
                entry: shown(&entry.path),
                target: shown(&entry.link),
                why: "is a directory",
            });
        }
        let link = || rustix::fs::linkat(&from.fd, target_name, &parent.fd, name, AtFlags::empty());
        match link() {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let stat = self.stat(entry, parent, name)?;
                if (stat.st_dev, stat.st_ino) == (found.st_dev, found.st_ino) {
                    return Ok(());
                }
                self.displace(entry, parent, name, &stat)?;
                link().map_err(fail)
            }
            Err(source) => Err(fail(source)),
        }
    }

    pub(super) fn whiteout_entry(
        &mut self,
        entry: &Entry,
        parent_path: &[u8],
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let hidden = &name[b".wh.".len()..];
        let opaque = hidden == b".wh..opq";
        if hidden.starts_with(b".wh.") && !opaque {
            // aufs bookkeeping; every unpacker passes over it.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(bad_path(entry, "is a whiteout of no name"));
        }
        // Hiding something in a directory that is nowhere is done already.
        let Some(parent) = self.find_directory(entry, parent_path, Missing::Leave)? else {
            return Ok(());
        };
        if opaque {
            self.make_opaque(entry, &parent)?;
            if parent.path.is_empty() {
                self.summary.opaque_root = true;
                self.reopen_root(entry, false, self.root.setgid)?;
            }
            return Ok(());
        }
        if self.followed_below {
            self.open.borrow_mut().clear();
        }
        self.hide(entry, &parent, hidden)
    }

    /// Hides `name` of lower layers; what this layer itself has stays.
    pub(super) fn hide(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let fail = |source| UnpackError::Entry {
            action: "make the whiteout",
            entry: shown(&entry.path),
            source,
        };
        match rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if file_type(&stat) == FileType::Directory => {
                let fd =
                    rustix::fs::openat(&parent.fd, name, DIRECTORY, Mode::empty()).map_err(fail)?;
                set_opaque(&fd).map_err(fail)?;
                self.open.borrow_mut().clear();
            }
            Ok(_) => {}
            Err(Errno::NOENT) if parent.merges => {
                rustix::fs::mknodat(
                    &parent.fd,
                    name,
                    FileType::CharacterDevice,
                    Mode::empty(),
                    WHITEOUT_DEVICE,
                )
                .map_err(fail)?;
                self.summary.inodes += 1;
            }
            Err(Errno::NOENT) => {}
            Err(source) => return Err(fail(source)),
        }
        Ok(())
    }

    /// The root stays open for good, so what changes about it is told here.
    pub(super) fn reopen_root(
        &mut self,
        entry: &Entry,
        merges: bool,
        setgid: bool,
    ) -> Result<(), UnpackError> {
        let fd = self
            .root
            .fd
            .try_clone()
            .map_err(|error| UnpackError::Entry {
                action: "open",
                entry: shown(&entry.path),
                source: errno(&error),
            })?;
        self.root = Rc::new(Directory {
            fd,
            path: Vec::new(),
            merges,
            setgid,
        });
        self.open.borrow_mut().clear();
        Ok(())
    }

    pub(super) fn make_opaque(
        &mut self,
        entry: &Entry,
        directory: &Directory,
    ) -> Result<(), UnpackError> {
        set_opaque(&directory.fd).map_err(|source| UnpackError::Entry {
            action: "make opaque",
            entry: shown(&entry.path),
            source,
        })?;
        // What is open below no longer merges either.
        self.open.borrow_mut().clear();
        Ok(())
    }

    /// Runs `make`, once more where something of the same name had to go first.
    pub(super) fn create<T>(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, UnpackError> {
        let fail = |source| UnpackError::Entry {
            action: "make",
            entry: shown(&entry.path),
            source,
        };
        match make() {
            Err(Errno::EXIST) => {
                let stat = self.stat(entry, parent, name)?;
                self.displace(entry, parent, name, &stat)?;
                make().map_err(fail)
            }
            other => other.map_err(fail),
        }
    }

    /// Takes away what an earlier entry put at `name`.
    pub(super) fn displace(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
        stat: &Stat,
    ) -> Result<(), UnpackError> {
        self.summary.is_exact = false;
        let removed = if file_type(stat) == FileType::Directory {
            self.recount = true;
            let name_there = (self.attic_names)();
            rustix::fs::renameat(&parent.fd, name, self.attic, &*name_there)
        } else {
            self.recount |= stat.st_nlink != 1;
            self.summary.remove(stat);
            rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty())
        };
        if matches!(file_type(stat), FileType::Directory | FileType::Symlink) {
            self.open.borrow_mut().clear();
        }
        removed.map_err(|source| UnpackError::Entry {
            action: "replace",
            entry: shown(&entry.path),
            source,
        })
    }

    pub(super) fn stat(
        &self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
    ) -> Result<Stat, UnpackError> {
        rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|source| {
            UnpackError::Entry {
                action: "look at",
                entry: shown(&entry.path),
                source,
            }
        })
    }
}
