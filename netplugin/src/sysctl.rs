//! Kernel settings of the network namespace the calling thread is in.

use std::io;
use std::path::Path;

/// Writes `value` unless the file already says so: then a read-only
/// `/proc/sys` is no obstacle.
///
/// # Errors
/// What reading or writing gives.
pub fn write(path: &Path, value: &str) -> io::Result<()> {
    if std::fs::read_to_string(path)?.trim_end() == value {
        return Ok(());
    }
    std::fs::write(path, value)
}
