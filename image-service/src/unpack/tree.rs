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

use super::archive::{Archive, Entry, Kind, MAX_PATH_BYTES, Time};
use super::{Parents, Summary, UnpackError, shown};
use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Symbolic links followed on the way to one directory. Source: path_resolution(7).
const MAX_SYMLINKS: usize = 40;
/// Directories kept open, so that neighbours in an archive need no walk.
const OPEN_DIRECTORIES: usize = 48;
/// Directory times kept in memory before they go to an unnamed file.
const TIMES_IN_MEMORY_BYTES: usize = 1 << 20;
/// What overlayfs hides a name of lower layers with: a character device of this number.
const WHITEOUT_DEVICE: Dev = 0;
const OPAQUE: &str = "trusted.overlay.opaque";

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
    /// By the path entries use for them; the most recently used last.
    open: RefCell<Vec<(Vec<u8>, Rc<Directory>)>>,
    times: DirectoryTimes,
    umask: u32,
    summary: Summary,
    /// A directory was replaced: the sums no longer hold.
    recount: bool,
    /// A link of the parents was followed; a new entry may stand before it.
    followed_below: bool,
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
            open: RefCell::new(Vec::with_capacity(OPEN_DIRECTORIES)),
            times: DirectoryTimes::default(),
            umask: umask(),
            summary: Summary::default(),
            recount: false,
            followed_below: false,
        }
    }

    /// Writes one entry and its data.
    pub fn write<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), UnpackError> {
        let path = normalised(&entry.path)?;
        self.summary.entries += 1;
        let (parent_path, name) = split(&path);
        if name.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(bad_path(entry, "names the root and is no directory"));
            }
            let root = self.root.clone();
            self.set_directory(entry, &root)?;
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
                    self.summary.add_file(target.len() as u64);
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
        times.replay(|path, time| {
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
                Ok(fd) => rustix::fs::futimens(&fd, &timestamps(time)),
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
        if self.recount {
            let sums =
                crate::layer::walk::measure(&root.fd).map_err(|source| UnpackError::Entry {
                    action: "measure",
                    entry: "the layer".into(),
                    source,
                })?;
            self.summary.bytes = sums.bytes;
            self.summary.inodes = sums.inodes;
        } else {
            self.summary.inodes += 1;
            self.summary.bytes += BLOCK_BYTES;
        }
        Ok(self.summary)
    }

    fn file<R: Read>(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory>,
        name: &[u8],
        archive: &mut Archive<R>,
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
        loop {
            let bytes = archive.data()?;
            if bytes.is_empty() {
                break;
            }
            let count = match rustix::io::write(&fd, bytes) {
                Err(Errno::INTR) => 0,
                other => other.map_err(at("write"))?,
            };
            archive.consume(count);
        }
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
        self.summary.add_file(entry.size);
        Ok(())
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
        match rustix::fs::mkdirat(&parent.fd, name, mode) {
            Ok(()) => self.summary.add_directory(),
            Err(Errno::EXIST) => {
                let stat = self.stat(entry, parent, name)?;
                if file_type(&stat) != FileType::Directory {
                    self.displace(entry, parent, name, &stat)?;
                    rustix::fs::mkdirat(&parent.fd, name, mode).map_err(fail("make"))?;
                    self.summary.add_directory();
                    // Whatever stood here has hidden what is below.
                    merges = false;
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
        self.set_directory(entry, &directory)?;
        self.remember(path, directory);
        Ok(())
    }

    fn set_directory(&mut self, entry: &Entry, directory: &Directory) -> Result<(), UnpackError> {
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
        self.note_times(entry, &directory.path, entry.mtime)
    }

    fn note_times(&mut self, entry: &Entry, path: &[u8], time: Time) -> Result<(), UnpackError> {
        // Links can lead to where no path of the kernel's reaches.
        if path.len() >= MAX_PATH_BYTES {
            return Err(bad_path(entry, "leads deeper than 4096 bytes of path"));
        }
        self.times
            .push(path, time, self.attic)
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

    fn hard_link(
        &mut self,
        entry: &Entry,
        parent: &Rc<Directory>,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        // An absolute target means the image's root, as for a symbolic link.
        let link = entry.link.iter().position(|&b| b != b'/').unwrap_or(0);
        let target = normalised(&entry.link[link..]).map_err(|error| match error {
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

    fn whiteout_entry(
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
    fn hide(&mut self, entry: &Entry, parent: &Directory, name: &[u8]) -> Result<(), UnpackError> {
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
    fn reopen_root(
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

    fn make_opaque(&mut self, entry: &Entry, directory: &Directory) -> Result<(), UnpackError> {
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
    fn create<T>(
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
    fn displace(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &[u8],
        stat: &Stat,
    ) -> Result<(), UnpackError> {
        let removed = if file_type(stat) == FileType::Directory {
            self.recount = true;
            let name_there = (self.attic_names)();
            rustix::fs::renameat(&parent.fd, name, self.attic, &*name_there)
        } else {
            self.recount |= stat.st_nlink != 1;
            if stat.st_nlink == 1 && !is_whiteout(stat) && stat.st_size >= 60 {
                self.summary.remove_file(stat.st_size as u64);
            }
            self.summary.inodes = self.summary.inodes.saturating_sub(1);
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

    fn stat(&self, entry: &Entry, parent: &Directory, name: &[u8]) -> Result<Stat, UnpackError> {
        rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|source| {
            UnpackError::Entry {
                action: "look at",
                entry: shown(&entry.path),
                source,
            }
        })
    }

    fn remember(&self, path: Vec<u8>, directory: Rc<Directory>) {
        let mut open = self.open.borrow_mut();
        open.retain(|(known, _)| *known != path);
        if open.len() == OPEN_DIRECTORIES {
            open.remove(0);
        }
        open.push((path, directory));
    }

    fn remembered(&self, path: &[u8]) -> Option<Rc<Directory>> {
        let mut open = self.open.borrow_mut();
        let at = open.iter().rposition(|(known, _)| known == path)?;
        // Moving only what is not near the end already keeps this cheap.
        if at + 4 < open.len() {
            open[at..].rotate_left(1);
            return open.last().map(|(_, directory)| directory.clone());
        }
        Some(open[at].1.clone())
    }

    fn made_directory(&mut self, entry: &Entry, path: &[u8]) -> Result<Rc<Directory>, UnpackError> {
        self.find_directory(entry, path, Missing::Make)?
            .ok_or_else(|| bad_path(entry, "has no parent directory"))
    }

    /// The directory at `path` of the merged view, made or copied up into the
    /// layer. `None` where there is none and `missing` says to leave it so.
    fn find_directory(
        &mut self,
        entry: &Entry,
        path: &[u8],
        missing: Missing,
    ) -> Result<Option<Rc<Directory>>, UnpackError> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        if let Some(known) = self.remembered(path) {
            return Ok(Some(known));
        }
        // From the nearest open ancestor on.
        let mut current = self.root.clone();
        let mut rest = path;
        let mut end = path.len();
        while let Some(slash) = path[..end].iter().rposition(|&b| b == b'/') {
            if let Some(known) = self.remembered(&path[..slash]) {
                current = known;
                rest = &path[slash + 1..];
                break;
            }
            end = slash;
        }
        let mut links = 0;
        // The next component is the last.
        let mut todo: Vec<Vec<u8>> = components(rest).map(<[u8]>::to_vec).rev().collect();
        while let Some(name) = todo.pop() {
            if name == b".." {
                // Paths of directories have no links, so the parent is the path's.
                let (up, _) = split(&current.path);
                todo.extend(components(up).map(<[u8]>::to_vec).rev());
                current = self.root.clone();
                continue;
            }
            match self.step(entry, &current, &name, missing)? {
                Step::Into(next) => current = next,
                Step::Nowhere => return Ok(None),
                Step::Link(target) => {
                    links += 1;
                    if links > MAX_SYMLINKS {
                        return Err(bad_path(entry, "goes through too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        current = self.root.clone();
                    }
                    todo.extend(components(&target).map(<[u8]>::to_vec).rev());
                }
            }
        }
        self.remember(path.to_vec(), current.clone());
        Ok(Some(current))
    }

    fn step(
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
        match rustix::fs::openat(&current.fd, name, DIRECTORY, Mode::empty()) {
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd).map_err(fail("look at the parent of"))?;
                let merges =
                    current.merges && !is_opaque(&fd).map_err(fail("look at the parent of"))?;
                Ok(Step::Into(Rc::new(Directory {
                    fd,
                    path: join(&current.path, name),
                    merges,
                    setgid: stat.st_mode & 0o2000 != 0,
                })))
            }
            Err(Errno::NOENT) if current.merges => {
                self.lean()?;
                self.step_below(entry, current, name, missing)
            }
            Err(Errno::NOENT) if missing == Missing::Leave => Ok(Step::Nowhere),
            Err(Errno::NOENT) => self.make_parent(entry, current, name, false),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let stat = self.stat(entry, current, name)?;
                if file_type(&stat) == FileType::Symlink {
                    let target = rustix::fs::readlinkat(&current.fd, name, Vec::new())
                        .map_err(fail("follow a symbolic link for"))?;
                    return Ok(Step::Link(target.into_bytes()));
                }
                if !is_whiteout(&stat) {
                    return Err(bad_path(entry, "has a parent that is no directory"));
                }
                if missing == Missing::Leave {
                    return Ok(Step::Nowhere);
                }
                self.displace(entry, current, name, &stat)?;
                self.make_parent(entry, current, name, true)
            }
            Err(source) => Err(fail("open the parent of")(source)),
        }
    }

    /// A step to where this layer has nothing and its parents may have something.
    fn step_below(
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
                self.note_times(entry, &path, modified(&stat))?;
                self.summary.add_directory();
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

    /// A parent directory that no archive describes: root's, 0755, of 1970.
    fn make_parent(
        &mut self,
        entry: &Entry,
        current: &Rc<Directory>,
        name: &[u8],
        opaque: bool,
    ) -> Result<Step, UnpackError> {
        let fail = |source| UnpackError::Entry {
            action: "make the parent of",
            entry: shown(&entry.path),
            source,
        };
        rustix::fs::mkdirat(&current.fd, name, Mode::from_raw_mode(0o755)).map_err(fail)?;
        let fd = rustix::fs::openat(&current.fd, name, DIRECTORY, Mode::empty()).map_err(fail)?;
        rustix::fs::fchown(&fd, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(fail)?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(fail)?;
        if opaque && current.merges {
            set_opaque(&fd).map_err(fail)?;
        }
        let path = join(&current.path, name);
        self.note_times(entry, &path, Time::default())?;
        self.summary.add_directory();
        Ok(Step::Into(Rc::new(Directory {
            fd,
            path,
            merges: current.merges && !opaque,
            setgid: false,
        })))
    }

    /// Notes that the parents matter; an error where they are not at hand.
    fn lean(&mut self) -> Result<(), UnpackError> {
        self.summary.leans_on_parents = true;
        match self.parents {
            Parents::Unknown => Err(UnpackError::LeansOnParents),
            Parents::None | Parents::Merged(_) => Ok(()),
        }
    }

    /// Opens `path`/`name` of the parents' merged view, itself and not what it
    /// links to. `path` has no symbolic links in that view.
    fn below(
        &self,
        entry: &Entry,
        path: &[u8],
        name: &[u8],
        flags: OFlags,
    ) -> Result<Option<OwnedFd>, UnpackError> {
        let Parents::Merged(root) = self.parents else {
            return Ok(None);
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
    fn copy_up_file(
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
                io::copy(&mut from, &mut to).map_err(|error| fail(errno(&error)))?;
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
        self.summary.inodes += 1;
        self.summary.add_file(stat.st_size as u64);
        rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
            .map(Some)
            .map_err(fail)
    }
}

enum Step {
    Into(Rc<Directory>),
    Link(Vec<u8>),
    Nowhere,
}

/// What a file system allocates at once, in bytes: ext4's and xfs's default.
pub const BLOCK_BYTES: u64 = 4096;

impl Summary {
    fn add_file(&mut self, size: u64) {
        self.bytes += size.next_multiple_of(BLOCK_BYTES);
    }

    fn remove_file(&mut self, size: u64) {
        self.bytes = self
            .bytes
            .saturating_sub(size.next_multiple_of(BLOCK_BYTES));
    }

    fn add_directory(&mut self) {
        self.inodes += 1;
        self.bytes += BLOCK_BYTES;
    }
}

/// The times of directories, which anything written into one changes: kept
/// until the end, in memory and then in an unnamed file.
#[derive(Default)]
struct DirectoryTimes {
    /// `<u16 path length><i64 seconds><u32 nanoseconds><path>`, again and again.
    buffer: Vec<u8>,
    spilled: Option<File>,
}

impl DirectoryTimes {
    fn push(&mut self, path: &[u8], time: Time, spill_to: BorrowedFd<'_>) -> io::Result<()> {
        let length = u16::try_from(path.len()).map_err(|_| Errno::NAMETOOLONG)?;
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(&time.seconds.to_le_bytes());
        self.buffer
            .extend_from_slice(&time.nanoseconds.to_le_bytes());
        self.buffer.extend_from_slice(path);
        if self.buffer.len() < TIMES_IN_MEMORY_BYTES {
            return Ok(());
        }
        if self.spilled.is_none() {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(spill_to, ".", flags, Mode::from_raw_mode(0o600))?;
            self.spilled = Some(File::from(fd));
        }
        if let Some(file) = &mut self.spilled {
            file.write_all(&self.buffer)?;
        }
        self.buffer.clear();
        Ok(())
    }

    /// Gives each note back, in order: the last one of a path is the right one.
    fn replay(
        mut self,
        mut set: impl FnMut(&[u8], Time) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        let fail = |source: io::Error| UnpackError::Entry {
            action: "read back the times of directories of",
            entry: "the layer".into(),
            source: errno(&source),
        };
        let mut notes: Box<dyn Read> = match self.spilled.take() {
            None => Box::new(self.buffer.as_slice()),
            Some(mut file) => {
                file.seek(SeekFrom::Start(0)).map_err(fail)?;
                Box::new(BufReader::new(file).chain(self.buffer.as_slice()))
            }
        };
        let mut path = Vec::new();
        loop {
            let mut fixed = [0; 14];
            match notes.read_exact(&mut fixed) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(fail(error)),
            }
            let [a, b, seconds @ .., n0, n1, n2, n3] = fixed;
            path.resize(usize::from(u16::from_le_bytes([a, b])), 0);
            notes.read_exact(&mut path).map_err(fail)?;
            let time = Time {
                seconds: i64::from_le_bytes(seconds),
                nanoseconds: u32::from_le_bytes([n0, n1, n2, n3]),
            };
            set(&path, time)?;
        }
    }
}

/// `path` without empty and "." components.
fn normalised(path: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let refuse = |why| UnpackError::Path {
        entry: shown(path),
        why,
    };
    if path.len() > MAX_PATH_BYTES {
        return Err(refuse("is longer than 4096 bytes"));
    }
    if path.contains(&0) {
        return Err(refuse("has a NUL byte"));
    }
    if path.starts_with(b"/") {
        return Err(refuse("is absolute"));
    }
    let mut clean = Vec::with_capacity(path.len());
    for part in components(path) {
        if part == b".." {
            return Err(refuse("has a \"..\" component"));
        }
        if !clean.is_empty() {
            clean.push(b'/');
        }
        clean.extend_from_slice(part);
    }
    Ok(clean)
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// Directory and last component; both empty for the root.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() {
        return name.to_vec();
    }
    [directory, b"/", name].concat()
}

fn no_nul<'e>(entry: &Entry, text: &'e [u8]) -> Result<&'e [u8], UnpackError> {
    if text.contains(&0) {
        return Err(bad_path(entry, "links to a name with a NUL byte"));
    }
    Ok(text)
}

fn bad_path(entry: &Entry, why: &'static str) -> UnpackError {
    UnpackError::Path {
        entry: shown(&entry.path),
        why,
    }
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == WHITEOUT_DEVICE
}

/// Whether overlayfs hides what lower layers have in `directory`.
pub(crate) fn is_opaque(directory: &OwnedFd) -> Result<bool, Errno> {
    let mut value = [0u8; 8];
    match rustix::fs::fgetxattr(directory, OPAQUE, &mut value) {
        Ok(count) => Ok(value[..count] == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}

fn set_opaque(directory: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

/// Attributes that may come from an image. The rest would steer overlayfs
/// (`trusted.overlay.`), or claim what only this host can know (`security.`
/// labels and signatures).
fn is_allowed_xattr(name: &[u8]) -> bool {
    (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        || name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
}

fn set_xattr(
    entry: &Entry,
    name: &[u8],
    set: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), UnpackError> {
    if !is_allowed_xattr(name) {
        tracing::debug!(
            entry = shown(&entry.path),
            name = shown(name),
            "xattr left out"
        );
        return Ok(());
    }
    match set() {
        Ok(()) => Ok(()),
        // A file system without user attributes still runs images that have some.
        Err(Errno::OPNOTSUPP) if name != b"security.capability" => Ok(()),
        Err(source) => Err(UnpackError::Entry {
            action: "set an attribute of",
            entry: shown(&entry.path),
            source,
        }),
    }
}

/// Owner, mode and xattrs, in the order that loses none of them.
fn copy_attributes(from: impl AsFd, to: impl AsFd, stat: &Stat) -> Result<(), Errno> {
    let (from, to) = (from.as_fd(), to.as_fd());
    rustix::fs::fchown(to, Some(uid(stat.st_uid)), Some(gid(stat.st_gid)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    // Source: linux/limits.h, XATTR_LIST_MAX.
    let mut names = vec![0u8; 64 << 10];
    let count = match rustix::fs::flistxattr(from, &mut names) {
        Ok(count) => count,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut value = vec![0u8; super::archive::MAX_XATTR_BYTES];
    for name in names[..count].split(|&b| b == 0) {
        if is_allowed_xattr(name) {
            let count = rustix::fs::fgetxattr(from, name, &mut value)?;
            rustix::fs::fsetxattr(to, name, &value[..count], XattrFlags::empty())?;
        }
    }
    Ok(())
}

fn uid(raw: u32) -> Uid {
    Uid::from_raw(raw)
}

fn gid(raw: u32) -> Gid {
    Gid::from_raw(raw)
}

fn device(entry: &Entry) -> Dev {
    rustix::fs::makedev(entry.device.0, entry.device.1)
}

fn modified(stat: &Stat) -> Time {
    Time {
        seconds: stat.st_mtime,
        nanoseconds: stat.st_mtime_nsec as u32,
    }
}

/// Access time as well, so that two unpackings of a layer are equal.
fn timestamps(time: Time) -> Timestamps {
    let at = Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    };
    Timestamps {
        last_access: at,
        last_modification: at,
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The process's umask; all bits where it cannot be read, which costs a
/// system call per file and nothing else.
fn umask() -> u32 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| parse_umask(&status))
        .unwrap_or(0o777)
}

/// `Umask` of proc_pid_status(5), an octal number.
fn parse_umask(status: &str) -> Option<u32> {
    let text = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(text.trim(), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_their_dots_and_nothing_else() {
        let clean =
            |path: &str| normalised(path.as_bytes()).map(|clean| String::from_utf8(clean).unwrap());
        assert_eq!(clean("./a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(clean("./").unwrap(), "");
        assert_eq!(clean("..a/b..").unwrap(), "..a/b..");
        for bad in ["/a", "//", "..", "a/../b", "a/..", "a\0b"] {
            clean(bad).unwrap_err();
        }
    }

    #[test]
    fn the_umask_is_octal() {
        assert_eq!(
            parse_umask("Name:\tx\nUmask:\t0022\nState:\tR\n"),
            Some(0o22)
        );
        assert_eq!(parse_umask("Name:\tx\n"), None);
    }

    #[test]
    fn times_come_back_in_order_also_when_there_are_many() {
        let dir = tempfile::tempdir().unwrap();
        let spill = File::open(dir.path()).unwrap();
        let mut times = DirectoryTimes::default();
        let time = |n: u32| Time {
            seconds: -i64::from(n),
            nanoseconds: n,
        };
        for n in 0..100_000 {
            times
                .push(format!("some/dir/{n}").as_bytes(), time(n), spill.as_fd())
                .unwrap();
        }
        assert!(times.spilled.is_some());
        let mut n = 0;
        times
            .replay(|path, at| {
                assert_eq!(path, format!("some/dir/{n}").as_bytes());
                assert_eq!(at, time(n));
                n += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(n, 100_000);
    }
}
