//! Giving a volume's files the label of the container that is to use them.
//!
//! The tree is another's, who may change it at the same moment: names are opened
//! one by one beneath the directory at hand, links are labelled and not followed,
//! and what is labelled is what was opened. The walk stays on the file system it
//! began on. A tree takes as long as it takes: run it where only its container waits.
//!
//! Source: openat2(2); xattr(7); opencontainers/selinux for what is never relabelled.

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The attribute that has a file's label.
pub const ATTRIBUTE: &str = "security.selinux";

/// Deepest tree that is relabelled: each directory on the way down is open.
const DEEPEST: usize = 512;

/// Directories of the host that are many programs' and no volume.
///
/// Source: opencontainers/selinux, `label_linux.go`.
const PROTECTED: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// What is the kernel's, with all that is below.
const KERNELS: [&str; 4] = ["/boot", "/dev", "/proc", "/sys"];

/// Why a volume was not relabelled, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum RelabelError {
    /// It is the host's.
    #[error("{path} is not relabelled: it belongs to the whole node")]
    Protected {
        /// Where it really is.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {attempt} {path}")]
    Kernel {
        /// "open", "label".
        attempt: &'static str,
        /// As far as it is known.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// Directories in directories without end.
    #[error("{path} is deeper than {DEEPEST} directories")]
    TooDeep {
        /// The volume.
        path: PathBuf,
    },
    /// Who wanted it does not want it any more.
    #[error("relabelling {path} was called off")]
    CalledOff {
        /// The volume.
        path: PathBuf,
    },
}

/// How a tree is relabelled.
pub struct Relabel<'a> {
    /// [`ATTRIBUTE`], but in tests.
    pub attribute: &'a str,
    /// What everything gets.
    pub label: &'a str,
    /// A tree whose root has the label already counts as done.
    pub trust_root: bool,
    /// Asked now and then; `false` ends it.
    pub goes_on: &'a dyn Fn() -> bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relabelled {
    /// Files that had another label.
    pub changed: u64,
    /// Files that had it.
    pub right: u64,
    /// The file system has no labels: nothing was done, and that is no error.
    pub unsupported: bool,
}

/// A name in this process for what was opened with O_PATH.
fn name(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    std::fs::read_link(name(fd)).unwrap_or_default()
}

/// Refuses what belongs to the whole node, under whatever name it was opened.
///
/// # Errors
/// `Protected`, or it cannot be looked at.
pub fn check_allowed(root: BorrowedFd<'_>) -> Result<(), RelabelError> {
    let path = path_of(root);
    let kernel = |source| RelabelError::Kernel {
        attempt: "look at",
        path: path.clone(),
        source,
    };
    let own = rustix::fs::fstat(root).map_err(kernel)?;
    let same = |protected: &str| {
        rustix::fs::stat(protected)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (own.st_dev, own.st_ino))
    };
    let below = KERNELS.iter().any(|dir| path.starts_with(dir));
    let named = PROTECTED.iter().any(|dir| path == Path::new(dir));
    if below || named || PROTECTED.iter().any(|dir| same(dir)) {
        return Err(RelabelError::Protected { path });
    }
    Ok(())
}

/// Labels what `root` was opened on and everything beneath it.
///
/// # Errors
/// The first thing that could not be labelled; what was labelled before stays so.
pub fn relabel(root: BorrowedFd<'_>, how: &Relabel<'_>) -> Result<Relabelled, RelabelError> {
    let volume = path_of(root);
    let mut done = Relabelled::default();
    let failed = |attempt, fd: BorrowedFd<'_>| {
        let path = path_of(fd);
        move |source| RelabelError::Kernel {
            attempt,
            path,
            source,
        }
    };
    match set(root, how) {
        Ok(true) => done.changed += 1,
        Ok(false) => {
            done.right += 1;
            if how.trust_root {
                return Ok(done);
            }
        }
        Err(Errno::OPNOTSUPP) => {
            done.unsupported = true;
            return Ok(done);
        }
        Err(error) => return Err(failed("label", root)(error)),
    }
    let mut open: Vec<Dir> = Vec::new();
    if is_directory(root).map_err(failed("look at", root))? {
        open.push(read(root).map_err(failed("open", root))?);
    }
    while let Some(dir) = open.last_mut() {
        let Some(entry) = dir.read() else {
            open.pop();
            continue;
        };
        let entry = match entry {
            Ok(entry) => entry,
            Err(source) => {
                return Err(RelabelError::Kernel {
                    attempt: "read a directory of",
                    path: volume,
                    source,
                });
            }
        };
        if !(how.goes_on)() {
            return Err(RelabelError::CalledOff { path: volume });
        }
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let at = dir.fd().map_err(failed("open", root))?;
        let found = match beneath(at, entry.file_name()) {
            Ok(found) => found,
            // Gone meanwhile, or something else is mounted there.
            Err(Errno::NOENT | Errno::XDEV) => continue,
            Err(error) => return Err(failed("open an entry of", at)(error)),
        };
        match set(found.as_fd(), how) {
            Ok(true) => done.changed += 1,
            Ok(false) => done.right += 1,
            Err(Errno::NOENT | Errno::OPNOTSUPP) => continue,
            Err(error) => return Err(failed("label", found.as_fd())(error)),
        }
        if is_directory(found.as_fd()).map_err(failed("look at", found.as_fd()))? {
            if open.len() >= DEEPEST {
                return Err(RelabelError::TooDeep { path: volume });
            }
            match read(found.as_fd()) {
                Ok(dir) => open.push(dir),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(failed("open", found.as_fd())(error)),
            }
        }
    }
    Ok(done)
}

/// Labels one file; whether it had another label.
fn set(file: BorrowedFd<'_>, how: &Relabel<'_>) -> Result<bool, Errno> {
    let name = name(file);
    let mut present = [0; 512];
    // What cannot be read is written.
    if let Ok(length) = rustix::fs::getxattr(&*name, how.attribute, &mut present[..]) {
        let present = present.get(..length).unwrap_or_default();
        let present = present.strip_suffix(b"\0").unwrap_or(present);
        if present == how.label.as_bytes() {
            return Ok(false);
        }
    }
    rustix::fs::setxattr(
        &*name,
        how.attribute,
        how.label.as_bytes(),
        XattrFlags::empty(),
    )
    .map(|()| true)
}

fn is_directory(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn read(dir: BorrowedFd<'_>) -> Result<Dir, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Dir::new(rustix::fs::openat(dir, c".", flags, Mode::empty())?)
}

fn beneath(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve)
}

/// Labels one file of Berth's own making.
///
/// # Errors
/// The kernel's.
pub(crate) fn label_file(path: &Path, label: &str) -> Result<(), Errno> {
    rustix::fs::lsetxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn how<'a>(goes_on: &'a dyn Fn() -> bool) -> Relabel<'a> {
        Relabel {
            attribute: ATTRIBUTE,
            label: LABEL,
            trust_root: false,
            goes_on,
        }
    }

    fn label_of(path: &Path) -> String {
        let mut text = [0; 256];
        match rustix::fs::lgetxattr(path, ATTRIBUTE, &mut text[..]) {
            Ok(length) => String::from_utf8_lossy(&text[..length])
                .trim_end_matches('\0')
                .into(),
            Err(_) => String::new(),
        }
    }

    #[test]
    fn everything_beneath_is_labelled_once_and_nothing_that_links_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, volume) = (dir.path().join("outside"), dir.path().join("volume"));
        std::fs::create_dir_all(outside.join("d")).unwrap();
        std::fs::write(outside.join("d/file"), "").unwrap();
        std::fs::create_dir_all(volume.join("a/b")).unwrap();
        std::fs::write(volume.join("a/b/c"), "").unwrap();
        symlink(outside.join("d"), volume.join("a/link")).unwrap();
        symlink(outside.join("d/file"), volume.join("file")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            volume.join("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();

        let all = ["", "a", "a/b", "a/b/c", "a/link", "file", "fifo"];
        let root = open(&volume);
        let done = relabel(root.as_fd(), &how(&|| true)).unwrap();
        assert_eq!((done.changed, done.right), (all.len() as u64, 0));
        for path in all {
            assert_eq!(label_of(&volume.join(path)), LABEL, "{path:?}");
        }
        for path in [&outside, &outside.join("d"), &outside.join("d/file")] {
            assert_ne!(label_of(path), LABEL);
        }
        std::fs::write(volume.join("new"), "").unwrap();
        let again = relabel(root.as_fd(), &how(&|| true)).unwrap();
        assert_eq!((again.changed, again.right), (1, all.len() as u64));
    }

    #[test]
    fn a_right_root_is_enough_where_it_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        label_file(dir.path(), LABEL).unwrap();
        let trusting = Relabel {
            trust_root: true,
            ..how(&|| true)
        };
        let done = relabel(open(dir.path()).as_fd(), &trusting).unwrap();
        assert_eq!((done.changed, done.right), (0, 1));
        assert_ne!(label_of(&dir.path().join("file")), LABEL);
    }

    #[test]
    fn a_file_can_be_a_volume_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let done = relabel(open(file.path()).as_fd(), &how(&|| true)).unwrap();
        assert_eq!(done.changed, 1);
        assert_eq!(label_of(file.path()), LABEL);
    }

    #[test]
    fn what_is_mounted_below_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let root = open(dir.path());
        let tmpfs = berth_sys::mount::new_fs("tmpfs", "tmpfs", "mode=755", 0).unwrap();
        berth_sys::mount::attach(&tmpfs, open(&dir.path().join("mnt"))).unwrap();
        let done = relabel(root.as_fd(), &how(&|| true));
        let label = label_of(&dir.path().join("mnt"));
        berth_sys::mount::detach(&dir.path().join("mnt")).unwrap();
        assert_eq!(done.unwrap().changed, 1);
        assert_ne!(label, LABEL);
    }

    #[test]
    fn a_file_system_without_labels_is_no_error() {
        let done = relabel(open(Path::new("/proc/self/status")).as_fd(), &how(&|| true));
        assert!(done.unwrap().unsupported);
    }

    #[test]
    fn it_ends_when_it_is_called_off_or_too_deep() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let off = relabel(open(dir.path()).as_fd(), &how(&|| false));
        assert!(matches!(off, Err(RelabelError::CalledOff { .. })));

        let mut at = open(dir.path());
        for _ in 0..=DEEPEST {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o700)).unwrap();
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            at = rustix::fs::openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        let deep = relabel(open(dir.path()).as_fd(), &how(&|| true));
        assert!(matches!(deep, Err(RelabelError::TooDeep { .. })));
    }

    #[test]
    fn the_nodes_own_directories_are_refused_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/etc", &link).unwrap();
        for path in [
            Path::new("/"),
            Path::new("/usr"),
            &link,
            Path::new("/sys/fs"),
        ] {
            let refused = check_allowed(open(path).as_fd());
            assert!(
                matches!(refused, Err(RelabelError::Protected { .. })),
                "{path:?}"
            );
        }
        check_allowed(open(dir.path()).as_fd()).unwrap();
    }
}
