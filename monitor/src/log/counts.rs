//! What a log has had so far, in a page of memory that the monitor can read
//! whatever the logger is doing.

use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};

/// Counts since the container's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines logged; one in parts counts once.
    pub lines: u64,
    /// Bytes of output in them, as the container wrote them.
    pub bytes: u64,
    /// Lines dropped; one that is missing a part counts.
    pub dropped_lines: u64,
    /// Bytes of output that are missing.
    pub dropped_bytes: u64,
}

const BYTES: usize = 32;

/// Makes the page.
///
/// # Errors
/// Too few descriptors.
pub fn page() -> Result<OwnedFd, Errno> {
    rustix::fs::memfd_create(c"berth-log", MemfdFlags::CLOEXEC)
}

impl Counts {
    /// Writes them to the page. That never waits: it is memory.
    pub fn publish(&self, page: impl AsFd) {
        let mut bytes = [0; BYTES];
        let values = [
            self.lines,
            self.bytes,
            self.dropped_lines,
            self.dropped_bytes,
        ];
        for (to, value) in bytes.chunks_exact_mut(8).zip(values) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        let _ = rustix::io::pwrite(page, &bytes, 0);
    }

    /// What the page says; all 0 before anything was.
    pub fn read(page: impl AsFd) -> Counts {
        let mut bytes = [0; BYTES];
        let _ = rustix::io::pread(page, &mut bytes, 0);
        let value = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
            u64::from_ne_bytes(value)
        };
        Counts {
            lines: value(0),
            bytes: value(1),
            dropped_lines: value(2),
            dropped_bytes: value(3),
        }
    }

    /// Counts what was logged, as it seemed, as dropped.
    pub fn lose(&mut self, lines: u64, bytes: u64) {
        self.lines = self.lines.saturating_sub(lines);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.dropped_lines += lines;
        self.dropped_bytes += bytes;
    }

    /// As the protocol says it.
    pub fn into_proto(self) -> proto::LogCounts {
        proto::LogCounts {
            lines: self.lines,
            bytes: self.bytes,
            dropped_lines: self.dropped_lines,
            dropped_bytes: self.dropped_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_published_is_read() {
        let page = page().unwrap();
        assert_eq!(Counts::read(&page), Counts::default());
        let counts = Counts {
            lines: 1,
            bytes: 2,
            dropped_lines: 3,
            dropped_bytes: u64::MAX,
        };
        counts.publish(&page);
        assert_eq!(Counts::read(&page), counts);
    }
}
