//! The record of one container and what may happen to it.
//!
//! ```text
//! Creating ──> Created ── start ──> Starting ── execve ──> Running ── init exits ──> Exited ── remove ──> gone
//!     │           ^                     │                                              ^
//!     └ undone    └── nothing began ────┴── could not be started ──────────────────────┘
//! ```
//!
//! The record is on disk before the kernel is touched, so after a crash
//! `recovery` knows what was meant; the monitor, the exit record and the cgroup
//! tell what came of it. Creating is never listed.
//! Source: CRI `ContainerState`; OCI runtime-spec, `runtime.md`.

use crate::cdi::Edits;
use crate::cgroup::Cgroup;
use crate::container_spec::ContainerSpec;
use crate::id::{ContainerId, PodId};
use crate::image::ContainerImage;
use crate::selinux::Labels;
use crate::user::Identity;
use berth_store::Record;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell says it: 128 + signal where a signal ended it.
    pub code: i32,
    /// One word: Completed, Error, OOMKilled, StartError, MonitorLost, NodeRestarted.
    pub reason: String,
    /// A sentence for people; may be empty.
    pub message: String,
}

/// Where a container is in its life. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Being made; never listed.
    Creating,
    /// Made, not started.
    Created,
    /// The monitor has been told to start it, or is about to be.
    Starting,
    /// Its first process runs.
    Running {
        since: i64,
        pid: i32,
        /// Start time of that process in clock ticks since boot: with the pid it
        /// names one process.
        start_ticks: u64,
    },
    /// Its first process has ended.
    Exited {
        /// `None`: it never ran.
        since: Option<i64>,
        at: i64,
        exit: Exit,
    },
    /// Being removed; `last` is what it was.
    Removing { last: Box<ContainerState> },
}

/// What happens to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerEvent {
    /// Every step of CreateContainer is done.
    Made,
    /// StartContainer.
    Start,
    /// Its first process runs.
    Started {
        since: i64,
        pid: i32,
        start_ticks: u64,
    },
    /// Nothing was started after all: the start can be repeated.
    NothingStarted,
    /// Its first process has ended, or never came to be.
    Exited { at: i64, exit: Exit },
    /// RemoveContainer.
    Remove,
}

impl ContainerState {
    /// The state after `event`, or `None` where that cannot happen.
    #[must_use]
    pub fn on(&self, event: &ContainerEvent) -> Option<ContainerState> {
        use ContainerEvent as E;
        use ContainerState as S;
        match (self, event) {
            (S::Creating, E::Made) => Some(S::Created),
            (S::Created, E::Start) => Some(S::Starting),
            (
                S::Starting,
                E::Started {
                    since,
                    pid,
                    start_ticks,
                },
            ) => Some(S::Running {
                since: *since,
                pid: *pid,
                start_ticks: *start_ticks,
            }),
            (S::Starting, E::NothingStarted) => Some(S::Created),
            (S::Created | S::Starting, E::Exited { at, exit }) => Some(S::Exited {
                since: None,
                at: *at,
                exit: exit.clone(),
            }),
            (S::Running { since, .. }, E::Exited { at, exit }) => Some(S::Exited {
                since: Some(*since),
                at: *at,
                exit: exit.clone(),
            }),
            // The exit is known from the event, the record and recovery: the first one counts.
            (S::Exited { .. } | S::Removing { .. }, E::Exited { .. }) => Some(self.clone()),
            (S::Creating | S::Created | S::Exited { .. }, E::Remove) => Some(S::Removing {
                last: Box::new(self.clone()),
            }),
            (S::Removing { .. }, E::Remove) => Some(self.clone()),
            (S::Starting | S::Running { .. }, E::Remove)
            | (S::Creating, E::Start | E::Exited { .. })
            | (S::Starting | S::Running { .. } | S::Exited { .. } | S::Removing { .. }, E::Start)
            | (
                S::Created
                | S::Starting
                | S::Running { .. }
                | S::Exited { .. }
                | S::Removing { .. },
                E::Made,
            )
            | (
                S::Creating
                | S::Created
                | S::Running { .. }
                | S::Exited { .. }
                | S::Removing { .. },
                E::Started { .. } | E::NothingStarted,
            ) => None,
        }
    }

    /// Whether lists and status show it.
    pub fn is_listed(&self) -> bool {
        !matches!(self, ContainerState::Creating)
    }

    /// Whether a first process runs or may be about to.
    pub fn is_live(&self) -> bool {
        matches!(
            self,
            ContainerState::Starting | ContainerState::Running { .. }
        )
    }

    /// The pid of the first process while it runs.
    pub fn pid(&self) -> Option<i32> {
        match self {
            ContainerState::Running { pid, .. } => Some(*pid),
            ContainerState::Creating
            | ContainerState::Created
            | ContainerState::Starting
            | ContainerState::Exited { .. }
            | ContainerState::Removing { .. } => None,
        }
    }
}

/// A container, as on disk at `lib/pods/<pod>/containers/<id>.rec`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub id: ContainerId,
    pub pod: PodId,
    pub spec: ContainerSpec,
    pub image: ContainerImage,
    pub state: ContainerState,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Absolute; empty when it has no log.
    #[serde(default)]
    pub log_path: PathBuf,
    /// Who its first process runs as, resolved in the image.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// The signal StopContainer sends first.
    pub stop_signal: i32,
    #[serde(default)]
    pub cgroup: Option<Cgroup>,
    /// What its CDI devices change, as it was when the container was created.
    #[serde(default)]
    pub cdi: Edits,
    /// Its SELinux labels, where its pod has any.
    #[serde(default)]
    pub selinux: Option<Labels>,
    /// What is not certain about the state, for people; empty when nothing is.
    #[serde(default)]
    pub message: String,
}

impl Record for ContainerRecord {
    const KIND: &'static str = "container";
    const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            reason: "Error".into(),
            message: String::new(),
        }
    }

    #[test]
    fn the_first_exit_counts() {
        let running = ContainerState::Running {
            since: 1,
            pid: 2,
            start_ticks: 3,
        };
        let exited = running
            .on(&ContainerEvent::Exited {
                at: 5,
                exit: exit(1),
            })
            .unwrap();
        assert_eq!(
            exited,
            ContainerState::Exited {
                since: Some(1),
                at: 5,
                exit: exit(1)
            }
        );
        assert_eq!(
            exited
                .on(&ContainerEvent::Exited {
                    at: 9,
                    exit: exit(2)
                })
                .unwrap(),
            exited
        );
    }

    #[test]
    fn a_container_starts_once() {
        let starting = ContainerState::Created.on(&ContainerEvent::Start).unwrap();
        assert_eq!(starting.on(&ContainerEvent::Start), None);
        assert_eq!(
            starting.on(&ContainerEvent::NothingStarted),
            Some(ContainerState::Created)
        );
        let exited = starting
            .on(&ContainerEvent::Exited {
                at: 1,
                exit: exit(128),
            })
            .unwrap();
        assert_eq!(exited.on(&ContainerEvent::Start), None);
    }

    #[test]
    fn what_lives_is_not_removed() {
        let running = ContainerState::Running {
            since: 1,
            pid: 2,
            start_ticks: 3,
        };
        assert_eq!(running.on(&ContainerEvent::Remove), None);
        assert_eq!(ContainerState::Starting.on(&ContainerEvent::Remove), None);
    }
}
