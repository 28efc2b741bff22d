//! Replacing a file so that a reader, or a boot after a crash, sees the old
//! content or the new and nothing between.
//!
//! write DIR/.NAME.tmp ── fsync ──> rename over DIR/NAME ── fsync DIR ──> durable
//!
//! Source: rename(2); fsync(2), "does not necessarily ensure that the entry in
//! the directory containing the file has also reached disk".

use rustix::fs::{AtFlags, Mode, OFlags};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Whether a write survives a power cut or only the end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// fsync of file and directory before the call returns.
    PowerCut,
    /// In the page cache: survives a killed daemon, not a power cut.
    ProcessEnd,
}

/// Replaces `path` with `content`, mode 0600.
///
/// # Errors
/// Whatever the kernel says to open, write, fsync or rename; `path` keeps its
/// old content then.
pub fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let (dir, name) = split(path)?;
    let temporary = format!(".{name}.tmp");
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::openat(&dir, &temporary, flags, Mode::from_raw_mode(0o600))?;
    let mut file = File::from(fd);
    let written = (|| {
        file.write_all(content)?;
        if durability == Durability::PowerCut {
            file.sync_all()?;
        }
        rustix::fs::renameat(&dir, &temporary, &dir, name)?;
        if durability == Durability::PowerCut {
            rustix::fs::fsync(&dir)?;
        }
        Ok(())
    })();
    if written.is_err() {
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
    }
    written
}

/// Removes `path`; one that is gone counts as removed.
///
/// # Errors
/// Whatever the kernel says to unlink or fsync, but for ENOENT.
pub fn remove(path: &Path, durability: Durability) -> io::Result<()> {
    let (dir, name) = match split(path) {
        Ok(parts) => parts,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    if durability == Durability::PowerCut {
        rustix::fs::fsync(&dir)?;
    }
    Ok(())
}

/// True for the names [`replace`] uses before the rename: what a crash leaves.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

fn split(path: &Path) -> io::Result<(OwnedFd, &str)> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no file name"))?;
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok((rustix::fs::open(dir, flags, Mode::empty())?, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_has_the_new_content_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"one", Durability::PowerCut).unwrap();
        replace(&path, b"two", Durability::ProcessEnd).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn removing_what_is_gone_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        remove(&dir.path().join("a"), Durability::PowerCut).unwrap();
        remove(&dir.path().join("no/such/dir/a"), Durability::PowerCut).unwrap();
    }

    #[test]
    fn a_failed_replace_keeps_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), b"x").unwrap();
        replace(&path, b"new", Durability::ProcessEnd).unwrap_err();
        assert!(path.join("inside").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
