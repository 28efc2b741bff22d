//! `berth-monitor --user-namespace`: a process in a new user namespace, for as
//! long as whoever started it writes the namespace's maps and opens it.
//!
//! The daemon has threads and so can neither make a user namespace nor fork a
//! process that does. It says "r" on its standard output once the namespace is
//! there, and ends with its standard input.

use berth_sys::Errno;
use berth_sys::clone::flag;
use berth_sys::namespace;

/// Makes the namespace and waits.
///
/// # Errors
/// The kernel's, to making it or to saying so.
pub fn hold() -> Result<(), Errno> {
    namespace::unshare(flag::NEWUSER)?;
    rustix::io::write(rustix::stdio::stdout(), b"r")?;
    let mut byte = [0];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
