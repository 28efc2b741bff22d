//! Pseudo terminals, by descriptor only: the slave is asked of the master, so
//! no name below /dev/pts that somebody else could exchange is ever looked up.
//!
//! Source: ioctl_tty(2), `TIOCGPTPEER` (Linux 4.13).

use crate::{Errno, Result};
use rustix::fs::{FileType, fstat, fstatfs, major, minor};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::os::fd::{AsFd, OwnedFd};

/// DEVPTS_SUPER_MAGIC, linux/magic.h.
const DEVPTS_MAGIC: u64 = 0x1cd1;

/// Unlocks a master that was opened from a `ptmx` and gives the slave. Refuses
/// what is not the multiplexer of a devpts.
///
/// # Errors
/// ENOTTY when it is something else.
pub fn slave_of(master: impl AsFd) -> Result<OwnedFd> {
    let master = master.as_fd();
    let stat = fstat(master)?;
    let is_ptmx = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
    if !is_ptmx || fstatfs(master)?.f_type as u64 != DEVPTS_MAGIC {
        return Err(Errno::NOTTY);
    }
    rustix::pty::unlockpt(master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    rustix::pty::ioctl_tiocgptpeer(master, flags)
}

/// Makes `slave` the controlling terminal of this session leader.
///
/// # Errors
/// EPERM where the process leads no session or has a terminal.
pub fn make_controlling(slave: impl AsFd) -> Result<()> {
    rustix::process::ioctl_tiocsctty(slave)
}

/// Sets the size in characters; those in front are told by SIGWINCH.
///
/// # Errors
/// ENOTTY where it is no terminal.
pub fn resize(terminal: impl AsFd, width: u16, height: u16) -> Result<()> {
    let size = Winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn a_slave_comes_only_from_a_real_multiplexer() {
        let open = |path| rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
        assert_eq!(
            slave_of(open("/dev/null").unwrap()).unwrap_err(),
            Errno::NOTTY
        );
        let master = open("/dev/pts/ptmx").unwrap();
        let slave = slave_of(&master).unwrap();
        resize(&master, 80, 24).unwrap();
        assert_eq!(rustix::termios::tcgetwinsize(&slave).unwrap().ws_col, 80);
    }
}
