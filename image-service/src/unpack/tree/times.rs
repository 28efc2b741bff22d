//! The times of directories.

use super::super::UnpackError;
use super::super::archive::Time;
use super::attributes::errno;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;

/// Directory times kept in memory before they go to an unnamed file.
const TIMES_IN_MEMORY_BYTES: usize = 1 << 20;

/// The times of directories, which anything written into one changes: kept
/// until the end, in memory and then in an unnamed file.
#[derive(Default)]
pub(super) struct DirectoryTimes {
    /// `<u16 path length><i64 seconds><u32 nanoseconds><u8 is new><path>`, again and again.
    buffer: Vec<u8>,
    spilled: Option<File>,
}

impl DirectoryTimes {
    /// `is_new` where the directory was made just now: once for each.
    pub(super) fn push(
        &mut self,
        path: &[u8],
        time: Time,
        is_new: bool,
        spill_to: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let length = u16::try_from(path.len()).map_err(|_| Errno::NAMETOOLONG)?;
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(&time.seconds.to_le_bytes());
        self.buffer
            .extend_from_slice(&time.nanoseconds.to_le_bytes());
        self.buffer.push(is_new.into());
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
    pub(super) fn replay(
        mut self,
        mut set: impl FnMut(&[u8], Time, bool) -> Result<(), UnpackError>,
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
            let mut fixed = [0; 15];
            match notes.read_exact(&mut fixed) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(fail(error)),
            }
            let [a, b, seconds @ .., n0, n1, n2, n3, is_new] = fixed;
            path.resize(usize::from(u16::from_le_bytes([a, b])), 0);
            notes.read_exact(&mut path).map_err(fail)?;
            let time = Time {
                seconds: i64::from_le_bytes(seconds),
                nanoseconds: u32::from_le_bytes([n0, n1, n2, n3]),
            };
            set(&path, time, is_new != 0)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

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
                .push(
                    format!("some/dir/{n}").as_bytes(),
                    time(n),
                    n % 2 == 0,
                    spill.as_fd(),
                )
                .unwrap();
        }
        assert!(times.spilled.is_some());
        let mut n = 0;
        times
            .replay(|path, at, is_new| {
                assert_eq!(is_new, n % 2 == 0);
                assert_eq!(path, format!("some/dir/{n}").as_bytes());
                assert_eq!(at, time(n));
                n += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(n, 100_000);
    }
}
