//! How a container ended: written by its monitor before it tells anybody, read
//! by a daemon that was not there.
//!
//! One file per container, `exits/<container>.rec` in its pod's directory.

use crate::record::Record;
use serde::{Deserialize, Serialize};

/// The end of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Which container.
    pub container_id: String,
    /// As a shell says it: 128 + signal where a signal ended it.
    pub exit_code: i32,
    /// The signal that ended it, 0 for none.
    pub signal: i32,
    /// When its program began, in nanoseconds since 1970.
    pub started_at_ns: i64,
    /// When it ended, in nanoseconds since 1970.
    pub finished_at_ns: i64,
    /// OOM kills in its cgroup while it ran.
    pub oom_kills: u64,
    /// The boot it ended in: `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl Record for ExitRecord {
    const KIND: &'static str = "exit";
    const VERSION: u32 = 1;
}
