//! Writes a layer's entries beneath one directory and nowhere else.
//!
//! Every name is used relative to a directory descriptor and never followed.
//! Directories are reached one component at a time; a symbolic link on the way
//! is resolved here, with the layer as its root, so that no content of an
//! archive makes the kernel resolve a path that could leave.
//!
//! Where a directory is missing the layer leans on its parents: their merged
//! view, a read-only overlay, says what is there, and a directory is copied up
//! as overlayfs would on a first write.
//!
//! Source: OCI image-spec, `layer.md`, "Applying Changesets" and "Whiteouts";
//! kernel, `filesystems/overlayfs.rst`, "whiteouts and opaque directories".

mod attributes;
mod below;
mod find;
mod names;
mod replace;
mod times;

use super::archive::{Archive, Entry, Kind, MAX_PATH_BYTES, Time};
use super::recipe::{self, FileNote};
use super::{Early, Parents, Summary, UnpackError, shown};
pub(crate) use attributes::is_opaque;
use attributes::{device, errno, file_type, gid, set_opaque, set_xattr, timestamps, uid, umask};
use names::{bad_path, join, no_nul, normalised, split};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags};
use rustix::io::Errno;
use std::cell::RefCell;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use times::DirectoryTimes;

/// Symbolic links followed on the way to one directory. Source: path_resolution(7).
const MAX_SYMLINKS: usize = 40;
/// Components walked on the way to one directory, those of links and of ways back included: a path
/// has 2048 at most, and links in real images add some dozens.
const MAX_STEPS: usize = 8192;
/// Directories kept open on the way to one, for links that lead up again.
const MAX_ABOVE: usize = 64;
/// Directories kept open, so that neighbours in an archive need no walk.
const OPEN_DIRECTORIES: usize = 48;
/// Files from this size on are begun to be written to the disk by themselves, in bytes; smaller
/// ones together, see [`Early`].
const EARLY_WRITEBACK_BYTES: u64 = 1 << 20;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// An open directory of the layer.
struct Directory {
    fd: OwnedFd,
    /// From the layer's root, without symbolic links; empty for the root.
    path: Vec<u8>,
    /// Whether directories of lower layers show through.
    merges: bool,
    /// New files take over the group, new directories this bit too.
    setgid: bool,
}

/// What to do where a directory does not exist.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Leave,
}

/// A layer being written.
pub struct Tree<'a> {
    root: Rc<Directory>,
    /// Where replaced directories go, outside of the layer.
    attic: BorrowedFd<'a>,
    attic_names: &'a mut dyn FnMut() -> String,
    parents: Parents<'a>,
    /// The parents' merged view, once it was waited for.
    lent: Option<OwnedFd>,
    /// By the path entries use for them; the most recently used last.
    open: RefCell<Vec<(Vec<u8>, Rc<Directory>)>>,
    times: DirectoryTimes,
    early: Option<&'a Early>,
    umask: u32,
    summary: Summary,
    /// A directory was replaced: the sums no longer hold.
    recount: bool,
    /// A link of the parents was followed; a new entry may stand before it.
    followed_below: bool,
    recipe: Rc<RefCell<recipe::Writer>>,
}

impl<'a> Tree<'a> {
    /// A tree below the empty directory `root`. `attic` is a directory on the
    /// same file system that takes what later entries replace, under names of
    /// `attic_names`.
    pub fn new(
        root: OwnedFd,
        attic: BorrowedFd<'a>,
        attic_names: &'a mut dyn FnMut() -> String,
        parents: Parents<'a>,
        early: Option<&'a Early>,
        recipe: Rc<RefCell<recipe::Writer>>,
    ) -> Tree<'a> {
        Tree {
            root: Rc::new(Directory {
                fd: root,
                path: Vec::new(),
                merges: true,
                setgid: false,
            }),
            attic,
            attic_names,
            parents,
            lent: None,
            open: RefCell::new(Vec::with_capacity(OPEN_DIRECTORIES)),
            times: DirectoryTimes::default(),
            early,
            umask: umask(),
            summary: Summary {
                is_exact: true,
                ..Summary::default()
            },
            recount: false,
            followed_below: false,
            recipe,
        }
    }

    /// Writes one entry and its data.
    pub fn write(&mut self, entry: &Entry, archive: &mut Archive<'_>) -> Result<(), UnpackError> {
        let path = normalised(&entry.path)?;
        self.summary.entries += 1;
        let (parent_path, name) = split(&path);
        if name.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(bad_path(entry, "names the root and is no directory"));
            }
            let root = self.root.clone();
            self.set_directory(entry, &root, false)?;
            self.reopen_root(entry, root.merges, entry.mode & 0o2000 != 0)?;
            self.summary.has_root = true;
            return Ok(());
        }
        if name.starts_with(b".wh.") {
            return self.whiteout_entry(entry, parent_path, name);
        }
        if parent_path
            .split(|&b| b == b'/')
            .any(|part| part.starts_with(b".wh."))
        {
            // aufs kept its bookkeeping in such directories and put it into images.
            if parent_path
                .split(|&b| b == b'/')
                .any(|part| part.starts_with(b".wh..wh."))
            {
                return Ok(());
            }
            return Err(bad_path(entry, "is below a whiteout"));
        }
        let parent = self.made_directory(entry, parent_path)?;
        if self.followed_below {
            self.open.borrow_mut().clear();
        }
        if entry.kind == Kind::CharDevice && entry.device == (0, 0) {
            // What overlayfs itself takes for a whiteout, whatever the archive meant.
            return self.hide(entry, &parent, name);
        }
        match entry.kind {
            Kind::File => self.file(entry, &parent, name, archive)?,
            Kind::Directory => return self.directory(entry, &parent, name, path.clone()),
            Kind::HardLink => return self.hard_link(entry, &parent, name),
            Kind::Symlink => {
                let target = no_nul(entry, &entry.link)?;
                if target.is_empty() {
                    return Err(bad_path(entry, "is a symbolic link to nothing"));
                }
                self.create(entry, &parent, name, || {
                    rustix::fs::symlinkat(target, &parent.fd, name)
                })?;
                self.finish_special(entry, &parent, name)?;
                // A link of up to 59 bytes lives in its inode.
                if target.len() >= 60 {
                    let stat = self.stat(entry, &parent, name)?;
                    self.summary.bytes += allocated(&stat);
                }
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let (file_type, device) = match entry.kind {
                    Kind::Fifo => (FileType::Fifo, 0),
                    Kind::CharDevice => (FileType::CharacterDevice, device(entry)),
                    _ => (FileType::BlockDevice, device(entry)),
                };
                self.create(entry, &parent, name, || {
                    rustix::fs::mknodat(
                        &parent.fd,
                        name,
                        file_type,
                        Mode::from_raw_mode(0o600),
                        device,
                    )
                })?;
                self.finish_special(entry, &parent, name)?;
            }
        }
        self.summary.inodes += 1;
        Ok(())
    }

    /// Sets what can only be set last, and gives the sums.
    pub fn finish(mut self) -> Result<Summary, UnpackError> {
        self.open.borrow_mut().clear();
        let root = self.root.clone();
        let times = std::mem::take(&mut self.times);
        let bytes = &mut self.summary.bytes;
        times.replay(|path, time, is_new| {
            let opened = if path.is_empty() {
                root.fd.try_clone().map_err(|error| errno(&error))
            } else {
                rustix::fs::openat2(
                    &root.fd,
                    path,
                    DIRECTORY,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
                )
            };
            let set = match opened {
                Ok(fd) => rustix::fs::futimens(&fd, &timestamps(time)).and_then(|()| {
                    if is_new {
                        *bytes += allocated(&rustix::fs::fstat(&fd)?);
                    }
                    Ok(())
                }),
                // Replaced by a later entry.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
                Err(error) => Err(error),
            };
            set.map_err(|source| UnpackError::Entry {
                action: "set the times of",
                entry: shown(path),
                source,
            })
        })?;
        let measuring = |source| UnpackError::Entry {
            action: "measure",
            entry: "the layer".into(),
            source,
        };
        if self.recount {
            let sums = crate::layer::walk::measure(&root.fd).map_err(measuring)?;
            self.summary.bytes = sums.bytes;
            self.summary.inodes = sums.inodes;
        } else {
            let stat = rustix::fs::fstat(&root.fd).map_err(measuring)?;
            self.summary.add(&stat);
        }
        Ok(self.summary)
    }

    fn file(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory>,
        name: &[u8],
        archive: &mut Archive<'_>,
    ) -> Result<(), UnpackError> {
        let at = |action| {
            move |source| UnpackError::Entry {
                action,
                entry: shown(&entry.path),
                source,
            }
        };
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC
            | OFlags::NOCTTY;
        // The bits that lend somebody's rights come last, once the owner is right.
        let early = Mode::from_raw_mode(entry.mode & 0o777);
        let fd = self.create(entry, parent, name, || {
            rustix::fs::openat(&parent.fd, name, flags, early)
        })?;
        let mut checksum = crc32fast::Hasher::new();
        loop {
            let bytes = archive.data()?;
            if bytes.is_empty() {
                break;
            }
            let count = match rustix::io::write(&fd, bytes) {
                Err(Errno::INTR) => 0,
                other => other.map_err(at("write"))?,
            };
            checksum.update(&bytes[..count]);
            archive.consume(count);
        }
        let path = join(&parent.path, name);
        self.note_file(&path, entry.size, checksum.finalize(), true);
        if entry.uid != 0 || entry.gid != 0 || parent.setgid {
            rustix::fs::fchown(&fd, Some(uid(entry.uid)), Some(gid(entry.gid)))
                .map_err(at("set the owner of"))?;
        }
        // A new file already has its permissions, unless these bits are in play.
        if entry.mode & (0o7000 | self.umask) != 0 {
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(entry.mode))
                .map_err(at("set the mode of"))?;
        }
        for (key, value) in &entry.xattrs {
            set_xattr(entry, key, || {
                rustix::fs::fsetxattr(&fd, key, value, XattrFlags::empty())
            })?;
        }
        rustix::fs::futimens(&fd, &timestamps(entry.mtime)).map_err(at("set the times of"))?;
        if entry.size > 0 {
            // What the file system says: nobody else knows its block size.
            let stat = rustix::fs::fstat(&fd).map_err(at("measure"))?;
            self.summary.bytes += allocated(&stat);
        }
        if let Some(early) = self.early {
            if entry.size >= EARLY_WRITEBACK_BYTES {
                // Only a hint: the sync at the end waits for what is left.
                let _ = berth_sys::writeback::begin(&fd);
            } else {
                early.wrote(self.root.fd.as_fd(), entry.size);
            }
        }
        Ok(())
    }

    /// Writes down what a file's content is.
    fn note_file(&self, path: &[u8], size: u64, crc32: u32, is_in_archive: bool) {
        let note = FileNote {
            path: path.to_vec(),
            size,
            crc32,
        };
        let mut recipe = self.recipe.borrow_mut();
        if is_in_archive {
            recipe.file(&note);
        } else {
            recipe.copied(&note);
        }
    }

    fn directory(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory>,
        name: &[u8],
        path: Vec<u8>,
    ) -> Result<(), UnpackError> {
        let fail = |action| {
            move |source| UnpackError::Entry {
                action,
                entry: shown(&entry.path),
                source,
            }
        };
        let mode = Mode::from_raw_mode(entry.mode & 0o777);
        let mut merges = parent.merges;
        let mut is_new = true;
        match rustix::fs::mkdirat(&parent.fd, name, mode) {
            Ok(()) => self.summary.inodes += 1,
            Err(Errno::EXIST) => {
                let stat = self.stat(entry, parent, name)?;
                if file_type(&stat) != FileType::Directory {
                    self.displace(entry, parent, name, &stat)?;
                    rustix::fs::mkdirat(&parent.fd, name, mode).map_err(fail("make"))?;
                    self.summary.inodes += 1;
                    // Whatever stood here has hidden what is below.
                    merges = false;
                } else {
                    is_new = false;
                }
            }
            Err(source) => return Err(fail("make")(source)),
        }
        let fd =
            rustix::fs::openat(&parent.fd, name, DIRECTORY, Mode::empty()).map_err(fail("open"))?;
        if parent.merges && !merges {
            set_opaque(&fd).map_err(fail("make opaque"))?;
        } else if merges {
            merges = !is_opaque(&fd).map_err(fail("read an attribute of"))?;
        }
        let directory = Rc::new(Directory {
            fd,
            path: join(&parent.path, name),
            merges,
            setgid: entry.mode & 0o2000 != 0,
        });
        self.set_directory(entry, &directory, is_new)?;
        self.remember(path, directory);
        Ok(())
    }

    fn set_directory(
        &mut self,
        entry: &Entry,
        directory: &Directory,
        is_new: bool,
    ) -> Result<(), UnpackError> {
        let fail = |action| {
            move |source| UnpackError::Entry {
                action,
                entry: shown(&entry.path),
                source,
            }
        };
        rustix::fs::fchown(&directory.fd, Some(uid(entry.uid)), Some(gid(entry.gid)))
            .map_err(fail("set the owner of"))?;
        rustix::fs::fchmod(&directory.fd, Mode::from_raw_mode(entry.mode))
            .map_err(fail("set the mode of"))?;
        for (key, value) in &entry.xattrs {
            set_xattr(entry, key, || {
                rustix::fs::fsetxattr(&directory.fd, key, value, XattrFlags::empty())
            })?;
        }
        self.note_times(entry, &directory.path, entry.mtime, is_new)
    }

    fn note_times(
        &mut self,
        entry: &Entry,
        path: &[u8],
        time: Time,
        is_new: bool,
    ) -> Result<(), UnpackError> {
        // Links can lead to where no path of the kernel's reaches.
        if path.len() >= MAX_PATH_BYTES {
            return Err(bad_path(entry, "leads deeper than 4096 bytes of path"));
        }
        self.times
            .push(path, time, is_new, self.attic)
            .map_err(|error| UnpackError::Entry {
                action: "note the times of",
                entry: shown(&entry.path),
                source: errno(&error),
            })
    }

    /// Owner, mode, xattrs and times of what has no descriptor of its own.
    fn finish_special(
        &self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let fail = |action| {
            move |source| UnpackError::Entry {
                action,
                entry: shown(&entry.path),
                source,
            }
        };
        rustix::fs::chownat(
            &parent.fd,
            name,
            Some(uid(entry.uid)),
            Some(gid(entry.gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(fail("set the owner of"))?;
        if entry.kind != Kind::Symlink {
            // Nobody else writes here, and this name was just made as no link.
            rustix::fs::chmodat(
                &parent.fd,
                name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )
            .map_err(fail("set the mode of"))?;
        }
        if !entry.xattrs.is_empty() {
            let mut path = format!("/proc/self/fd/{}/", parent.fd.as_raw_fd()).into_bytes();
            path.extend_from_slice(name);
            for (key, value) in &entry.xattrs {
                // Source: xattr(7), user attributes are for files and directories only.
                if !key.starts_with(b"user.") {
                    set_xattr(entry, key, || {
                        rustix::fs::lsetxattr(path.as_slice(), key, value, XattrFlags::empty())
                    })?;
                }
            }
        }
        rustix::fs::utimensat(
            &parent.fd,
            name,
            &timestamps(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(fail("set the times of"))
    }
}

impl Summary {
    fn add(&mut self, stat: &Stat) {
        self.inodes += 1;
        self.bytes += allocated(stat);
    }

    fn remove(&mut self, stat: &Stat) {
        self.inodes = self.inodes.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(allocated(stat));
    }
}

/// Space a file takes, in bytes. Source: stat(2), st_blocks is in units of 512 bytes.
fn allocated(stat: &Stat) -> u64 {
    (stat.st_blocks as u64) * 512
}
