//! Named points at which the process dies when told to: how the tests sweep
//! every moment a daemon can be killed in.
//!
//! `BERTH_CRASH_AT=name` makes [`point`]`("name")` end the process at once, as
//! SIGKILL would: no destructor runs, nothing is flushed.

use std::sync::OnceLock;

/// The variable that names the point to die at.
pub const VARIABLE: &str = "BERTH_CRASH_AT";

static TARGET: OnceLock<Option<String>> = OnceLock::new();

/// The point this process will die at, if any.
pub fn armed() -> Option<&'static str> {
    TARGET
        .get_or_init(|| std::env::var(VARIABLE).ok().filter(|name| !name.is_empty()))
        .as_deref()
}

/// Ends the process here if `name` is what [`VARIABLE`] says.
pub fn point(name: &str) {
    if armed() == Some(name) {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // SIGKILL to oneself is delivered before the call returns; this is for the reader.
        std::process::abort();
    }
}
