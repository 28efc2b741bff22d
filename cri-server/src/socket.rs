//! The daemon's unix socket and its locks: one daemon per state directory, and
//! no socket taken from one that answers.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// Why the daemon cannot have its socket or its directories.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("another berth serve uses {}", path.display())]
    Locked { path: PathBuf },
    #[error("somebody answers on {} already", path.display())]
    InUse { path: PathBuf },
    #[error("{} is there and is not a socket", path.display())]
    NotASocket { path: PathBuf },
    #[error("{} is no path for a socket", path.display())]
    NoName { path: PathBuf },
    #[error("cannot make {}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot lock {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    #[error("cannot listen on {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// Makes a directory of the daemon's and those above it. Others may pass through it
/// (a user namespace's root must reach what is below) and not list it.
///
/// # Errors
/// [`SocketError::Make`].
pub fn make_dir(path: &Path) -> Result<(), SocketError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)
        .map_err(|source| SocketError::Make {
            path: path.to_owned(),
            source,
        })
}

/// Held as long as the daemon uses a directory; the kernel gives it back when it ends.
#[must_use]
pub struct Lock {
    _file: File,
}

/// Takes the directory for this daemon alone.
///
/// # Errors
/// [`SocketError::Locked`] when another daemon has it.
pub fn lock(dir: &Path) -> Result<Lock, SocketError> {
    let path = dir.join("berth.lock");
    let failed = |source| SocketError::Lock {
        path: path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock { _file: file }),
        Err(Errno::WOULDBLOCK) => Err(SocketError::Locked {
            path: dir.to_owned(),
        }),
        Err(error) => Err(failed(error.into())),
    }
}

/// A path to `name` below the open directory `dir`, short enough for a socket's
/// address whatever the directory's own path is.
/// Source: unix(7), sun_path holds 108 bytes.
fn short(dir: &File, name: &Path) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name)
}

fn parts(path: &Path) -> Result<(&Path, &Path), SocketError> {
    let refused = || SocketError::NoName {
        path: path.to_owned(),
    };
    let name = path.file_name().map(Path::new).ok_or_else(refused)?;
    Ok((path.parent().ok_or_else(refused)?, name))
}

/// Connects to a socket, its path as long as it may be.
///
/// # Errors
/// What open(2) of the directory or connect(2) say.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (dir, name) = parts(path).map_err(io::Error::other)?;
    let dir = File::open(dir)?;
    UnixStream::connect(short(&dir, name))
}

/// Listens on `path`. What a dead daemon left there is removed, and only that.
///
/// # Errors
/// Somebody answers there, or something else than a socket is there.
pub fn listen(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    let (parent, name) = parts(path)?;
    make_dir(parent)?;
    let dir = File::open(parent).map_err(failed)?;
    let short = short(&dir, name);
    match std::fs::symlink_metadata(&short) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => match UnixStream::connect(&short) {
            Ok(_) => {
                return Err(SocketError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(&short).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Under a name nobody knows until its mode is right.
    let hidden = short.with_file_name(format!(".berth-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(failed)?;
    std::fs::set_permissions(&hidden, Permissions::from_mode(mode)).map_err(failed)?;
    std::fs::rename(&hidden, &short).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("berth.sock");
        let first = listen(&path, 0o660).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
        connect(&path).unwrap();
        assert!(matches!(
            listen(&path, 0o660),
            Err(SocketError::InUse { .. })
        ));
        drop(first);
        listen(&path, 0o600).unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing but the socket"
        );
    }

    #[tokio::test]
    async fn a_file_in_the_sockets_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("berth.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            listen(&path, 0o660),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_long_path_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d".repeat(200)).join("berth.sock");
        let _listener = listen(&path, 0o660).unwrap();
        connect(&path).unwrap();
    }

    #[test]
    fn a_directory_has_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(SocketError::Locked { .. })));
        drop(held);
        let _again = lock(dir.path()).unwrap();
    }
}
