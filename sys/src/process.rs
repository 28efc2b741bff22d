//! What a process does to itself: signals, limits, ending, becoming another
//! program.

use crate::{Errno, Result, check};
use std::ffi::{CStr, CString};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Ends this process at once: no destructor runs, nothing is flushed. How
/// every forked child ends that does not exec.
pub fn exit(code: i32) -> ! {
    // SAFETY: ends the process, whatever state it is in.
    unsafe { libc::_exit(code) }
}

/// The life of a forked child: closes every descriptor but 0 to 2 and `keep`,
/// runs `body`, ends with its result (or 255 for a panic or a refused close).
///
/// It never returns, so nothing the caller owns is dropped twice. `body` must
/// own or use no descriptor that is not in `keep`.
pub fn child(mut keep: Vec<RawFd>, body: impl FnOnce() -> i32) -> ! {
    keep.extend([0, 1, 2]);
    if crate::fd::close_all_but(&mut keep).is_err() {
        exit(255);
    }
    // A panic must not unwind into what was the parent's.
    let body = std::panic::AssertUnwindSafe(body);
    exit(std::panic::catch_unwind(body).unwrap_or(255))
}

/// Blocks `signals` and gives a close-on-exec, non-blocking signalfd of them.
///
/// # Errors
/// EINVAL for a signal there is not.
pub fn signal_fd(signals: &[i32]) -> Result<OwnedFd> {
    let set = signal_set(signals)?;
    // SAFETY: `set` was initialised by sigemptyset; the old set is not asked for.
    let blocked =
        unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    check(blocked.into())?;
    // SAFETY: as above; -1 asks for a new descriptor, which is ours.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    check(fd.into())?;
    // SAFETY: just made, so open and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn signal_set(signals: &[i32]) -> Result<libc::sigset_t> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for &signal in signals {
        // SAFETY: the set is initialised; a bad number is refused.
        check(unsafe { libc::sigaddset(&raw mut set, signal) }.into())?;
    }
    Ok(set)
}

/// Every signal back to its default and unblocked, as a program expects it.
pub fn reset_signals() {
    // The system call itself: libc keeps 32 to 34 for itself and refuses them,
    // but they may have been ignored by whoever started this process.
    // `struct sigaction` of the kernel, at most 4 words, all zero: SIG_DFL.
    let default = [0_u64; 4];
    let none = std::ptr::null_mut::<u64>();
    for signal in 1..=64 {
        // SAFETY: the kernel reads one structure from `default`, and 8 is the
        // size of its signal set. SIG_DFL is no handler, so no code of ours
        // can be entered. KILL and STOP are refused, harmlessly.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, 8) };
    }
    if let Ok(none) = signal_set(&[]) {
        // SAFETY: an initialised set; nothing is returned.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
    }
}

/// Ignores `signal` from now on.
pub fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN is no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Sends `signal` to the process group `group`.
///
/// # Errors
/// ESRCH when it is empty; EINVAL for a group below 2, which would be this
/// process's own or everybody.
pub fn signal_group(group: i32, signal: i32) -> Result<()> {
    if group < 2 {
        return Err(Errno::INVAL);
    }
    // SAFETY: integers only.
    check(unsafe { libc::kill(-group, signal) }.into()).map(drop)
}

/// Sets a resource limit of this process by its number.
///
/// # Errors
/// EPERM where the hard limit would rise without CAP_SYS_RESOURCE; EINVAL.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    let none = std::ptr::null_mut::<libc::rlimit64>();
    // SAFETY: `limit` lives through the call; the old one is not asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, none) })
        .map(drop)
}

/// Soft and hard limit of this process by the resource's number.
///
/// # Errors
/// EINVAL for a resource there is not.
pub fn limit(resource: u32) -> Result<(u64, u64)> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let none = std::ptr::null::<libc::rlimit64>();
    // SAFETY: the kernel writes one rlimit64 to `limit`, which is ours.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, none, &raw mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// The working directory as the kernel says it. It begins with
/// "(unreachable)", not with "/", when it is outside the root.
///
/// # Errors
/// ENOENT when it was removed.
pub fn working_directory() -> Result<Vec<u8>> {
    let mut buffer = vec![0_u8; libc::PATH_MAX as usize];
    // The system call itself: libc's getcwd hides "(unreachable)" as ENOENT.
    // SAFETY: the kernel writes at most the length given into our buffer.
    let length =
        check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    buffer.truncate((length as usize).saturating_sub(1));
    Ok(buffer)
}

/// Strings for execve: an array of pointers that ends with null. Made before
/// the point after which nothing may be allocated.
pub struct Strings {
    pointers: Vec<*const libc::c_char>,
    _strings: Vec<CString>,
}

impl Strings {
    /// Takes them in order; `None` when one holds a NUL.
    pub fn new(strings: Vec<Vec<u8>>) -> Option<Strings> {
        let strings: Vec<CString> = strings
            .into_iter()
            .map(CString::new)
            .collect::<std::result::Result<_, _>>()
            .ok()?;
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Some(Strings {
            pointers,
            _strings: strings,
        })
    }
}

/// Becomes another program; returns only the error.
pub fn exec(path: &CStr, argv: &Strings, env: &Strings) -> Errno {
    // SAFETY: both arrays end with null, and their strings live in the same
    // structures, which outlive the call.
    let result =
        unsafe { libc::execve(path.as_ptr(), argv.pointers.as_ptr(), env.pointers.as_ptr()) };
    check(result.into()).err().unwrap_or(Errno::IO)
}

/// Reaps one child that has ended, whichever: its pid and how it ended. `None`
/// when none has, or there are none.
pub fn reap_any() -> Option<(i32, crate::pidfd::Ended)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int to `status`, which is ours.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match check(pid.into()) {
            Ok(0) => return None,
            Ok(_) => return Some((pid, crate::pidfd::Ended::from_wait_status(status))),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Waits for the child `pid` to end.
///
/// # Errors
/// ECHILD when it is none of this process's.
pub fn wait_for(pid: i32) -> Result<crate::pidfd::Ended> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int to `status`, which is ours.
        match check(unsafe { libc::waitpid(pid, &raw mut status, 0) }.into()) {
            Ok(_) => return Ok(crate::pidfd::Ended::from_wait_status(status)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Makes a session keyring called `name` this process's, a new one unless it
/// may join one of that name.
///
/// # Errors
/// ENOSYS where the kernel keeps no keys; EDQUOT; EINVAL for a name with a NUL.
///
/// Source: keyctl(2), KEYCTL_JOIN_SESSION_KEYRING.
pub fn join_session_keyring(name: &str) -> Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    const SETPERM: libc::c_long = 5;
    // All for its possessor; view, read, search and link for its user, so that the next
    // process can join it.
    const PERMISSIONS: libc::c_long = 0x3f1b_0000;
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    // SAFETY: `name` is a C string that lives through the call, which only reads it.
    let joined =
        check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    // SAFETY: takes numbers only. What was joined and not made refuses; it has been done then.
    unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, joined, PERMISSIONS) };
    Ok(())
}

/// Brings up the loopback interface of this network namespace.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN over it.
pub fn loopback_up() -> Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use std::os::fd::AsRawFd;
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives through the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    };
    check(result.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_with_a_nul_are_refused() {
        assert!(Strings::new(vec![b"a".to_vec(), b"b\0c".to_vec()]).is_none());
        assert_eq!(Strings::new(vec![b"a".to_vec()]).unwrap().pointers.len(), 2);
    }

    #[test]
    fn a_group_that_would_be_everybody_is_refused() {
        for group in [-1, 0, 1] {
            assert_eq!(signal_group(group, 0), Err(Errno::INVAL));
        }
    }

    #[test]
    fn limits_are_read_and_the_working_directory_is_absolute() {
        let (soft, hard) = limit(libc::RLIMIT_NOFILE).unwrap();
        assert!(soft <= hard);
        set_limit(libc::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(working_directory().unwrap().starts_with(b"/"));
    }
}
