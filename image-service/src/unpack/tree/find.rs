//! Reaching the directory of an entry, one component at a time.

use super::super::archive::{Entry, Time};
use super::super::{UnpackError, shown};
use super::attributes::{file_type, is_opaque, is_whiteout, set_opaque};
use super::names::{bad_path, components, join, split};
use super::{
    DIRECTORY, Directory, MAX_ABOVE, MAX_STEPS, MAX_SYMLINKS, Missing, OPEN_DIRECTORIES, Tree,
};
use rustix::fs::{FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::rc::Rc;

impl Tree<'_> {
    pub(super) fn remember(&self, path: Vec<u8>, directory: Rc<Directory>) {
        let mut open = self.open.borrow_mut();
        open.retain(|(known, _)| *known != path);
        if open.len() == OPEN_DIRECTORIES {
            open.remove(0);
        }
        open.push((path, directory));
    }

    pub(super) fn remembered(&self, path: &[u8]) -> Option<Rc<Directory>> {
        let mut open = self.open.borrow_mut();
        let at = open.iter().rposition(|(known, _)| known == path)?;
        // Moving only what is not near the end already keeps this cheap.
        if at + 4 < open.len() {
            open[at..].rotate_left(1);
            return open.last().map(|(_, directory)| directory.clone());
        }
        Some(open[at].1.clone())
    }

    pub(super) fn made_directory(
        &mut self,
        entry: &Entry,
        path: &[u8],
    ) -> Result<Rc<Directory>, UnpackError> {
        self.find_directory(entry, path, Missing::Make)?
            .ok_or_else(|| bad_path(entry, "has no parent directory"))
    }

    /// The directory at `path` of the merged view, made or copied up into the
    /// layer. `None` where there is none and `missing` says to leave it so.
    pub(super) fn find_directory(
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
        let mut steps = 0;
        // The directories above `current`, the nearest last, as far as they are known.
        let mut above: VecDeque<Rc<Directory>> = VecDeque::new();
        // The next component is the last.
        let mut todo: Vec<Vec<u8>> = components(rest).map(<[u8]>::to_vec).rev().collect();
        while let Some(name) = todo.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(bad_path(entry, "goes through too many directories"));
            }
            if name == b".." {
                if let Some(up) = above.pop_back() {
                    current = up;
                    continue;
                }
                // Paths of directories have no links, so the parent is the path's.
                let (up, _) = split(&current.path);
                todo.extend(components(up).map(<[u8]>::to_vec).rev());
                current = self.root.clone();
                continue;
            }
            match self.step(entry, &current, &name, missing)? {
                Step::Into(next) => {
                    if above.len() == MAX_ABOVE {
                        above.pop_front();
                    }
                    above.push_back(std::mem::replace(&mut current, next));
                }
                Step::Nowhere => return Ok(None),
                Step::Link(target) => {
                    links += 1;
                    if links > MAX_SYMLINKS {
                        return Err(bad_path(entry, "goes through too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        current = self.root.clone();
                        above.clear();
                    }
                    todo.extend(components(&target).map(<[u8]>::to_vec).rev());
                }
            }
        }
        self.remember(path.to_vec(), current.clone());
        Ok(Some(current))
    }

    pub(super) fn step(
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

    /// A parent directory that no archive describes: root's, 0755, of 1970.
    pub(super) fn make_parent(
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
        self.note_times(entry, &path, Time::default(), true)?;
        self.summary.inodes += 1;
        Ok(Step::Into(Rc::new(Directory {
            fd,
            path,
            merges: current.merges && !opaque,
            setgid: false,
        })))
    }
}

pub(super) enum Step {
    Into(Rc<Directory>),
    Link(Vec<u8>),
    Nowhere,
}
