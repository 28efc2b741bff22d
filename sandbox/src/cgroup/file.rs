//! The kernel's little files: opened, read or written once, closed.

use super::Error;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::path::Path;

/// Longest file that is read: a `cgroup.procs` with as many processes as the
/// kernel can have, 4 million of 8 bytes. A fork bomb must not be safe in its number.
const LONGEST: usize = 32 << 20;

/// The whole file.
pub(super) fn read(path: &Path) -> Result<String, Error> {
    read_io(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

/// The whole file, `None` where it does not exist.
pub(super) fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    match read_io(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

pub(super) fn read_io(path: &Path) -> io::Result<String> {
    let file = open(path, OFlags::RDONLY)?;
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        let got = match rustix::io::read(&file, &mut chunk) {
            Ok(0) => break,
            Ok(got) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(gone(errno)),
        };
        bytes.extend_from_slice(&chunk[..got]);
        if bytes.len() > LONGEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "longer than 32 MiB",
            ));
        }
    }
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not text"))
}

/// Writes `value` in one call, as these files want it.
pub(super) fn write(path: &Path, value: &str) -> Result<(), Error> {
    write_io(path, value).map_err(|source| Error::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

pub(super) fn write_io(path: &Path, value: &str) -> io::Result<()> {
    let file = open(path, OFlags::WRONLY)?;
    loop {
        match rustix::io::write(&file, value.as_bytes()) {
            Ok(written) if written == value.len() => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(gone(errno)),
        }
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<rustix::fd::OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(gone)
}

/// ENODEV is how a cgroup's files say that it was removed a moment ago, be it
/// while one was opened or once it was open.
fn gone(errno: rustix::io::Errno) -> io::Error {
    if errno == rustix::io::Errno::NODEV {
        return io::ErrorKind::NotFound.into();
    }
    errno.into()
}

/// Whether it had to be made.
pub(super) fn make_directory(path: &Path) -> Result<bool, Error> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(errno) => Err(Error::Make {
            path: path.to_owned(),
            source: errno.into(),
        }),
    }
}
