//! The log file: what waits to be written, and opening it again.
//!
//! What a full disk does not take waits and is written later, in order. A line
//! that is only half in the file when it is opened again is taken out of the old
//! one and written whole to the new one: rotation neither cuts nor doubles it.

use crate::status::{Failed, Step};
use berth_sys::Errno;
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;

/// What a buffer keeps of its room once it is empty, in bytes.
const KEPT_BYTES: usize = 32 << 10;

/// Whether everything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Nothing waits.
    All,
    /// The disk takes no more for now, or the file has reached its bound.
    Stuck,
}

/// The file and what is to be written to it.
#[derive(Debug)]
pub struct LogFile {
    path: String,
    /// `None` where there is no log.
    file: Option<OwnedFd>,
    /// Whole lines.
    pending: Vec<u8>,
    written: usize,
    /// Bytes the file may have, 0 for no bound.
    bound: u64,
    /// Bytes it has, as far as we wrote them.
    size: u64,
}

impl LogFile {
    /// Opens the log at `path`; an empty one is no log. `bound` is the longest
    /// file in bytes, 0 for none.
    ///
    /// # Errors
    /// The file cannot be made, or is no regular one.
    pub fn open(path: &str, bound: u64) -> Result<LogFile, Failed> {
        let mut log = LogFile {
            path: path.to_owned(),
            file: None,
            pending: Vec::new(),
            written: 0,
            bound,
            size: 0,
        };
        if !path.is_empty() {
            log.begin(open(path)?);
        }
        Ok(log)
    }

    fn begin(&mut self, file: OwnedFd) {
        self.size = rustix::fs::fstat(&file).map_or(0, |stat| stat.st_size.max(0) as u64);
        self.file = Some(file);
    }

    /// Takes whole lines, leaving `lines` empty, with some room.
    pub fn add(&mut self, lines: &mut Vec<u8>) {
        if self.pending.is_empty() {
            std::mem::swap(&mut self.pending, lines);
        } else {
            self.pending.extend_from_slice(lines);
        }
        lines.clear();
    }

    /// Writes what waits, as far as the disk takes it.
    pub fn flush(&mut self) -> Flushed {
        let Some(file) = &self.file else {
            self.pending.clear();
            return Flushed::All;
        };
        while self.written < self.pending.len() {
            let rest = &self.pending[self.written..];
            let rest = &rest[..fits(rest, self.bound, self.size)];
            if rest.is_empty() {
                return Flushed::Stuck;
            }
            match rustix::io::write(file, rest) {
                Ok(count) if count > 0 => {
                    self.written += count;
                    self.size += count as u64;
                }
                Err(Errno::INTR) => {}
                // Full, over quota, broken: it may come back, or be rotated.
                Ok(_) | Err(_) => return Flushed::Stuck,
            }
        }
        self.pending.clear();
        self.written = 0;
        Flushed::All
    }

    /// True when nothing waits to be written.
    pub fn is_flushed(&self) -> bool {
        self.pending.is_empty()
    }

    /// Gives back room that bursts took.
    pub fn shrink(&mut self) {
        self.pending.shrink_to(KEPT_BYTES);
    }

    /// Opens the file at its path anew; what waits goes there.
    ///
    /// # Errors
    /// It cannot be opened; the old one stays in use.
    pub fn reopen(&mut self) -> Result<(), Failed> {
        if self.path.is_empty() {
            return Ok(());
        }
        let new = open(&self.path)?;
        let done = &self.pending[..self.written];
        let begin = memchr::memrchr(b'\n', done).map_or(0, |at| at + 1);
        let cut = (self.written - begin) as u64;
        if let (1.., Some(old)) = (cut, &self.file)
            && let Ok(stat) = rustix::fs::fstat(old)
            && stat.st_size as u64 >= cut
        {
            // A disk that refuses even this keeps half a line too much.
            let _ = rustix::fs::ftruncate(old, stat.st_size as u64 - cut);
        }
        self.pending.drain(..begin);
        self.written = 0;
        self.begin(new);
        Ok(())
    }

    /// Lets go of what waits: what of it is in no file, from the beginning of
    /// the line that was being written.
    pub fn give_up(&mut self) -> Vec<u8> {
        let done = &self.pending[..self.written];
        let begin = memchr::memrchr(b'\n', done).map_or(0, |at| at + 1);
        self.written = 0;
        let mut rest = std::mem::take(&mut self.pending);
        rest.drain(..begin);
        rest
    }
}

/// How much of `rest` may be written to a file of `size` bytes: whole lines up
/// to the bound, but always a line in an empty file.
fn fits(rest: &[u8], bound: u64, size: u64) -> usize {
    let room = bound.saturating_sub(size);
    if bound == 0 || rest.len() as u64 <= room {
        return rest.len();
    }
    let within = &rest[..usize::try_from(room).unwrap_or(rest.len())];
    match memchr::memrchr(b'\n', within) {
        Some(at) => at + 1,
        None if size == 0 => memchr::memchr(b'\n', rest).map_or(rest.len(), |at| at + 1),
        None => 0,
    }
}

/// Opens the log for appending. A symbolic link is not followed, and what is
/// not a regular file (a FIFO would block) is refused.
fn open(path: &str) -> Result<OwnedFd, Failed> {
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o640)).step("open log", path)?;
    let stat = rustix::fs::fstat(&file).step("open log", path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Failed::invalid("open log", path));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        assert!(open(&path("a")).is_ok());
        std::os::unix::fs::symlink(path("a"), path("link")).unwrap();
        assert_eq!(
            open(&path("link")).unwrap_err().errno,
            Errno::LOOP.raw_os_error()
        );
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(open(&path("fifo")).is_err());
        let missing = open(&path("no/such")).unwrap_err();
        assert_eq!((missing.stage.as_str(), missing.errno), ("open log", 2));
    }

    #[test]
    fn a_half_written_line_is_whole_in_the_new_file_and_gone_from_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log").to_str().unwrap().to_owned();
        let old = dir.path().join("log.1");
        let mut log = LogFile::open(&path, 0).unwrap();
        log.add(&mut b"one\ntwo\nthree\n".to_vec());
        // As after a disk that took six bytes.
        rustix::io::write(log.file.as_ref().unwrap(), b"one\ntw").unwrap();
        (log.written, log.size) = (6, 6);
        std::fs::rename(&path, &old).unwrap();
        log.reopen().unwrap();
        assert_eq!(log.flush(), Flushed::All);
        assert_eq!(std::fs::read(&old).unwrap(), b"one\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"two\nthree\n");
    }

    #[test]
    fn a_file_stops_at_its_bound_and_goes_on_after_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log").to_str().unwrap().to_owned();
        let mut log = LogFile::open(&path, 9).unwrap();
        log.add(&mut b"one\ntwo\nthree\n".to_vec());
        assert_eq!(log.flush(), Flushed::Stuck);
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
        std::fs::remove_file(&path).unwrap();
        log.reopen().unwrap();
        assert_eq!(log.flush(), Flushed::All);
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        // A line longer than the bound is not stuck for ever.
        std::fs::remove_file(&path).unwrap();
        log.reopen().unwrap();
        log.add(&mut b"longer than nine\nx\n".to_vec());
        assert_eq!(log.flush(), Flushed::Stuck);
        assert_eq!(std::fs::read(&path).unwrap(), b"longer than nine\n");
        assert_eq!(log.give_up(), b"x\n");
    }

    #[test]
    fn without_a_path_there_is_no_log() {
        let mut log = LogFile::open("", 0).unwrap();
        log.add(&mut b"x\n".to_vec());
        assert_eq!(log.flush(), Flushed::All);
        log.reopen().unwrap();
    }
}
