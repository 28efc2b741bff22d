//! Walks over trees that strangers made: removes or measures them, however
//! deep they are, with a few descriptors and without following a link.
//!
//! Depth costs neither stack nor descriptors: the walk holds one directory and
//! goes up by "..", which it checks against the inode it came from.

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::CString;
use std::ops::AddAssign;
use std::os::fd::{AsFd, OwnedFd};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// What a tree takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Space allocated, in bytes.
    pub bytes: u64,
    /// Inodes, each counted once.
    pub inodes: u64,
}

impl Sums {
    /// What one file takes.
    pub fn of(stat: &Stat) -> Sums {
        Sums {
            // Source: stat(2), st_blocks is in units of 512 bytes.
            bytes: (stat.st_blocks as u64) * 512,
            inodes: 1,
        }
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Sums) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

type Identity = (u64, u64);

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// Removes `name` in `directory` with everything below. What is gone already
/// counts as removed.
///
/// # Errors
/// The first thing the kernel refused; the rest may still be there.
pub fn remove(directory: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    let directory = directory.as_fd();
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    let mut current = rustix::fs::openat(directory, name, DIRECTORY, Mode::empty())?;
    let mut above: Vec<(CString, Identity)> = Vec::new();
    loop {
        match next_directory(&current)? {
            Some(child) => {
                let parent = identity(&rustix::fs::fstat(&current)?);
                current = rustix::fs::openat(&current, &*child, DIRECTORY, Mode::empty())?;
                above.push((child, parent));
            }
            None => {
                let Some((name, parent)) = above.pop() else {
                    break;
                };
                current = up(&current, parent)?.ok_or(Errno::STALE)?;
                rustix::fs::unlinkat(&current, &*name, AtFlags::REMOVEDIR)?;
            }
        }
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what is in `directory` up to its first directory that has content.
fn next_directory(directory: &OwnedFd) -> Result<Option<CString>, Errno> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_directory = match entry.file_type() {
            FileType::Directory => true,
            FileType::Unknown => {
                let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        let removed = if is_directory {
            rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)
        } else {
            rustix::fs::unlinkat(directory, name, AtFlags::empty())
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) if is_directory => {
                return Ok(Some(name.to_owned()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// What `root` and everything below it takes. What is moved or removed
/// meanwhile is counted as far as it was seen.
///
/// # Errors
/// The kernel's, but for those of names that vanish.
pub fn measure(root: &OwnedFd) -> Result<Sums, Errno> {
    let mut sums = Sums::default();
    let mut linked = HashSet::new();
    let mut count = |stat: &Stat| {
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !directory && stat.st_nlink > 1 && !linked.insert(identity(stat)) {
            return;
        }
        sums += Sums::of(stat);
    };
    let mut current = rustix::fs::openat(root, ".", DIRECTORY, Mode::empty())?;
    let stat = rustix::fs::fstat(&current)?;
    count(&stat);
    let device = stat.st_dev;
    let mut levels = vec![(identity(&stat), children(&current, device, &mut count)?)];
    while let Some((_, pending)) = levels.last_mut() {
        let Some(name) = pending.pop() else {
            levels.pop();
            let Some((parent, _)) = levels.last() else {
                break;
            };
            match up(&current, *parent)? {
                Some(parent) => current = parent,
                // Somebody moved the directory we are in.
                None => break,
            }
            continue;
        };
        match rustix::fs::openat(&current, &*name, DIRECTORY, Mode::empty()) {
            Ok(child) => {
                let stat = rustix::fs::fstat(&child)?;
                let pending = children(&child, device, &mut count)?;
                current = child;
                levels.push((identity(&stat), pending));
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sums)
}

/// Counts what is in `directory` and gives its directories of the same device.
fn children(
    directory: &OwnedFd,
    device: u64,
    count: &mut impl FnMut(&Stat),
) -> Result<Vec<CString>, Errno> {
    let mut directories = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        if stat.st_dev != device {
            continue;
        }
        count(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            directories.push(name.to_owned());
        }
    }
    Ok(directories)
}

/// The parent of `directory` if it is still the one of that identity.
fn up(directory: &OwnedFd, parent: Identity) -> Result<Option<OwnedFd>, Errno> {
    let fd = rustix::fs::openat(directory, "..", DIRECTORY, Mode::empty())?;
    let found = identity(&rustix::fs::fstat(&fd)?);
    Ok((found == parent).then_some(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn open(path: &std::path::Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn a_tree_far_deeper_than_any_path_is_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = open(dir.path());
        rustix::fs::mkdirat(&root, "deep", Mode::from_raw_mode(0o755)).unwrap();
        let mut at = rustix::fs::openat(&root, "deep", DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
            at = rustix::fs::openat(&at, "d", DIRECTORY, Mode::empty()).unwrap();
        }
        assert_eq!(measure(&root).unwrap().inodes, 3002);
        remove(&root, b"deep").unwrap();
        assert_eq!(measure(&root).unwrap().inodes, 1);
        remove(&root, b"deep").unwrap();
    }

    #[test]
    fn what_a_link_leads_to_is_neither_counted_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("keep/sub")).unwrap();
        std::fs::create_dir(dir.path().join("go")).unwrap();
        std::os::unix::fs::symlink("../keep", dir.path().join("go/link")).unwrap();
        std::fs::write(dir.path().join("go/a"), b"x").unwrap();
        std::fs::hard_link(dir.path().join("go/a"), dir.path().join("go/b")).unwrap();
        let go = open(&dir.path().join("go"));
        assert_eq!(measure(&go).unwrap().inodes, 3);
        remove(open(dir.path()), b"go").unwrap();
        assert!(dir.path().join("keep/sub").exists());
    }
}
