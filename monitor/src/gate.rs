//! `berth-monitor --gate PROGRAM [ARGUMENT]...`: becomes PROGRAM once it is told to.
//!
//! So the daemon runs what freezes and dumps a container. It leads a session of
//! its own, so everything that comes of it can be found. It waits for a byte on
//! its stdin, so that the daemon can write down who it is before anything
//! happens, and ends without one when the daemon does. To write past a limit is
//! an error to it and not its end: with a limit the daemon makes it give up and
//! put everything back, as after a kill nobody would.
//!
//! Source: setrlimit(2), RLIMIT_FSIZE; signal(7): an ignored signal stays so
//! over execve.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

/// Waits, then is another program; comes back only where that is not to be.
pub fn pass(mut arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let Some(program) = arguments.next() else {
        eprintln!("berth-monitor: --gate has no program");
        return ExitCode::from(2);
    };
    match wait() {
        Ok(true) => {}
        Ok(false) => return ExitCode::FAILURE,
        Err(error) => {
            eprintln!("berth-monitor: the gate: {error}");
            return ExitCode::FAILURE;
        }
    }
    let error = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .exec();
    eprintln!("cannot run {}: {error}", program.display());
    ExitCode::FAILURE
}

/// Whether the byte came.
fn wait() -> io::Result<bool> {
    rustix::process::setsid()?;
    berth_sys::process::ignore_signal(libc::SIGXFSZ);
    let mut byte = [0];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut byte) {
            Ok(read) => return Ok(read == 1),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
