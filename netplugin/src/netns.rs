//! Running code in another network namespace.
//!
//! A namespace belongs to a thread. A thread made for the purpose enters it
//! and ends there, so no other code can find itself in the wrong one.

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// What `work` returns when run in the namespace `netns`; sockets it opens and
/// `/proc/sys/net` it writes are that namespace's.
///
/// # Errors
/// The kernel's refusal to make a thread or to enter: EINVAL when the
/// descriptor is no network namespace.
pub fn run_in<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))?;
                Ok(work())
            })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// True when a namespace is what is at `path`: a pin without its mount, as a
/// reboot leaves it, is an ordinary file.
pub fn is_one(path: &Path) -> bool {
    // Source: linux/magic.h, NSFS_MAGIC; namespaces are looked at without opening them.
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as u64 == NSFS_MAGIC)
}

/// [`run_in`] for the namespace pinned at `path`.
///
/// # Errors
/// Also what opening `path` gives.
pub fn run_at<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    run_in(File::open(path)?.as_fd(), work)
}
