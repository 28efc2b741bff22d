//! Looking things up inside a container's root, and nowhere else.
//!
//! Every lookup is one openat2 with RESOLVE_IN_ROOT: absolute links and ".."
//! stay inside, whoever changes the tree meanwhile, and magic links (the ones
//! in /proc that lead anywhere) are refused.
//!
//! Source: openat2(2).

use crate::status::{Failed, Step};
use berth_sys::Errno;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// PROC_SUPER_MAGIC, linux/magic.h.
const PROC_MAGIC: u64 = 0x9fa0;

/// How often a lookup is repeated that somebody's rename disturbed.
const TRIES: u32 = 64;

/// Longest chain of dangling links that directories are made through.
const MAX_LINKS: u32 = 8;

/// A container's root directory.
#[derive(Clone, Copy)]
pub struct Root<'a>(pub BorrowedFd<'a>);

impl Root<'_> {
    /// Opens `path` as it is seen inside.
    pub fn open(self, path: &str, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(self.0, path, flags, Mode::empty(), resolve) {
                // A rename or mount went on somewhere, which the kernel cannot tell apart.
                Err(Errno::AGAIN | Errno::INTR) if tries < TRIES => tries += 1,
                other => return other,
            }
        }
    }

    /// A descriptor that only stands for what is at `path`.
    pub fn find(self, path: &str) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH, ResolveFlags::empty())
    }

    /// The same, where no component may be a symbolic link.
    pub fn find_plain(self, path: &str) -> Result<OwnedFd, Errno> {
        self.open(path, OFlags::PATH, ResolveFlags::NO_SYMLINKS)
    }

    /// The directory at `path`; missing ones are made, 0755 without the umask.
    pub fn make_dir(self, path: &str) -> Result<OwnedFd, Errno> {
        self.make_dir_through(path, ResolveFlags::empty(), 0)
    }

    fn make_dir_through(
        self,
        path: &str,
        resolve: ResolveFlags,
        links: u32,
    ) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match self.open(path, flags, resolve) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let (parent_path, name) = split(path)?;
        let parent = self.make_dir_through(parent_path, resolve, links)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                // Made by somebody else meanwhile, or a link to what is not there.
                if let Ok(target) = rustix::fs::readlinkat(&parent, name, Vec::new()) {
                    let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
                    if links >= MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let target = match target.starts_with('/') {
                        true => target.to_owned(),
                        false => format!("{parent_path}/{target}"),
                    };
                    return self.make_dir_through(&target, resolve, links + 1);
                }
            }
            Err(error) => return Err(error),
        }
        self.open(path, flags, resolve)
    }

    /// The file at `path`, whatever it is unless a directory; an empty one,
    /// 0644, is made where none is.
    pub fn make_file(self, path: &str) -> Result<OwnedFd, Errno> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let (parent, name) = self.parent_of(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o644);
        match rustix::fs::openat(&parent, name, flags | OFlags::CLOEXEC, mode) {
            Ok(_) | Err(Errno::EXIST) => self.find(path),
            Err(error) => Err(error),
        }
    }

    /// The directory `path` is to be made in (made itself if need be), and its name.
    pub fn parent_of(self, path: &str) -> Result<(OwnedFd, &str), Errno> {
        let (parent, name) = split(path)?;
        Ok((self.make_dir(parent)?, name))
    }

    /// The same, where everything has to be on this root's own mount: EXDEV where
    /// the way leads onto another one.
    pub fn parent_of_own(self, path: &str) -> Result<(OwnedFd, &str), Errno> {
        let (parent, name) = split(path)?;
        let parent = self.make_dir_through(parent, ResolveFlags::NO_XDEV, 0)?;
        Ok((parent, name))
    }

    /// The container's own /dev/null, checked to be that device: one that was
    /// exchanged, or the host's, would let the container reach further.
    pub fn null(self) -> Result<OwnedFd, Failed> {
        let null = self
            .open(
                "/dev/null",
                OFlags::RDWR | OFlags::NOCTTY,
                ResolveFlags::empty(),
            )
            .step("open", "/dev/null")?;
        if is_null(&null).step("fstat", "/dev/null")? {
            Ok(null)
        } else {
            Err(Failed::new("open", "/dev/null", Errno::NXIO))
        }
    }

    /// The master of a new terminal from the container's devpts.
    pub fn new_terminal(self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        self.open("/dev/pts/ptmx", flags, ResolveFlags::NO_SYMLINKS)
    }
}

/// True for the null device, through whatever name.
pub fn is_null(fd: impl AsFd) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    let device = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    Ok(kind == rustix::fs::FileType::CharacterDevice && device == (1, 3))
}

/// Opens a directory of the host's procfs and makes sure it is one.
pub fn proc_dir(path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&dir)?.f_type as u64 != PROC_MAGIC {
        return Err(Errno::NOTSUP);
    }
    Ok(dir)
}

/// Parent and last component. ".." is refused: a path to make has none.
fn split(path: &str) -> Result<(&str, &str), Errno> {
    let path = path.trim_end_matches('/');
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    match name {
        "" | "." | ".." => Err(Errno::INVAL),
        name => Ok((if parent.is_empty() { "/" } else { parent }, name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn with_root(test: impl FnOnce(&std::path::Path, Root<'_>)) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&root, flags, Mode::empty()).unwrap();
        test(&root, Root(fd.as_fd()));
        let outside: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(outside.len(), 1, "something was made outside the root");
    }

    #[test]
    fn what_is_made_through_links_stays_inside() {
        with_root(|path, root| {
            symlink("/../../etc", path.join("absolute")).unwrap();
            symlink("../../..", path.join("up")).unwrap();
            symlink("/gone/deep", path.join("dangling")).unwrap();
            root.make_dir("/absolute/x").unwrap();
            root.make_file("/up/y").unwrap();
            root.make_file("/dangling/z").unwrap();
            assert!(path.join("y").is_file());
            assert!(path.join("gone/deep/z").is_file());
            assert!(!std::path::Path::new("/etc/x").exists());
        });
    }

    #[test]
    fn links_that_lead_in_circles_are_refused() {
        with_root(|path, root| {
            symlink("b", path.join("a")).unwrap();
            symlink("a", path.join("b")).unwrap();
            assert_eq!(root.make_dir("/a/x").unwrap_err(), Errno::LOOP);
        });
    }

    #[test]
    fn a_path_to_make_has_no_way_up() {
        with_root(|_, root| {
            assert_eq!(root.make_dir("/x/..").unwrap_err(), Errno::INVAL);
            assert_eq!(root.make_dir("/x/../y").unwrap_err(), Errno::INVAL);
        });
    }

    #[test]
    fn only_procfs_is_taken_for_procfs() {
        assert!(proc_dir("/proc/self").is_ok());
        assert_eq!(proc_dir("/tmp").unwrap_err(), Errno::NOTSUP);
    }
}
