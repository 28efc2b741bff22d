//! Everything of Berth that needs `unsafe`, behind functions that are safe to
//! call: system calls the standard library and rustix lack, or have only as
//! unsafe functions. No policy lives here.
//!
//! Errors are [`Errno`]: what the kernel said and nothing else. Callers know
//! which object it was about.

pub mod bpf;
pub mod caps;
pub mod clone;
pub mod fd;
pub mod mount;
pub mod namespace;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod seccomp;
pub mod wire;
pub mod writeback;

/// What a system call failed with.
pub use rustix::io::Errno;

/// The result of one system call.
pub type Result<T> = std::result::Result<T, Errno>;

/// Turns the -1-and-errno convention of libc into a [`Result`].
fn check(result: libc::c_long) -> Result<libc::c_long> {
    if result != -1 {
        return Ok(result);
    }
    let code = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    Err(Errno::from_raw_os_error(code))
}
