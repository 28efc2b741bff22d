//! A checkpoint that is being made, written down: what to put back if the
//! daemon dies meanwhile.
//!
//! ```text
//! lib/checkpoints/<container>.rec
//! ```

use crate::id::ContainerId;
use berth_store::Record;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A checkpoint that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Whose.
    pub container: ContainerId,
    /// Beside the location; everything below is ours to remove.
    pub work: PathBuf,
    /// Its cgroup was frozen before, by somebody else, and stays so.
    pub was_frozen: bool,
    /// The session of what dumps it, once there is one.
    #[serde(default)]
    pub session: Option<Session>,
}

/// A process that leads a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Its pid, and the number of the session.
    pub leader: i32,
    /// When it began, in clock ticks since boot: with the pid it names one process.
    pub start_ticks: u64,
}

impl Record for Journal {
    const KIND: &'static str = "checkpoint";
    const VERSION: u32 = 1;
}
