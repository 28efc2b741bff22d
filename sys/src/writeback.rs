//! Having written pages go to the disk early.
//!
//! Source: sync_file_range(2).

use crate::{Result, check};
use std::os::fd::{AsFd, AsRawFd};

/// Begins to write all of a file's dirty pages to the disk and waits for none.
/// It is a hint: nothing is durable for it.
///
/// # Errors
/// ESPIPE where `file` is no file with pages; EIO, ENOSPC.
pub fn begin(file: impl AsFd) -> Result<()> {
    let file = file.as_fd();
    // SAFETY: the descriptor is open while `file` is borrowed; the call takes numbers only and
    // touches no memory of ours. 0 and 0 mean all of the file.
    let result =
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    check(result.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_is_begun_and_a_pipe_is_not() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::memfd_create("writeback", flags).unwrap());
        file.write_all(&[1; 8192]).unwrap();
        begin(&file).unwrap();
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert_eq!(begin(&pipe), Err(rustix::io::Errno::SPIPE));
    }
}
