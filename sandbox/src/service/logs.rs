//! Containers' logs: opening them again, and what they have had.

use super::{Inner, Sandboxes};
use crate::error::{Kind, Result, SandboxError};
use crate::monitor::MonitorError;
use crate::operation::lock;
use berth_proto::monitor_v1::{self, reply, request};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a monitor may take to say what its containers logged; one that does
/// not is left out this time.
const ANSWER: Duration = Duration::from_millis(500);

/// What is done when a container's log cannot be written: its disk is full,
/// slow, or a budget is used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// The container waits once its pipe is full. No line is lost.
    #[default]
    Block,
    /// Lines are dropped and counted, and a line in the log says how many.
    Drop,
}

/// How much containers may log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPolicy {
    /// What is done past it, and when the disk refuses.
    pub on_full: OnFull,
    /// Bytes of output a second and container, on average; 0 for no bound.
    pub bytes_per_second: u64,
    /// Bytes of a log file until it is rotated; 0 for no bound.
    pub file_bytes: u64,
}

impl LogPolicy {
    pub(super) fn for_monitor(self) -> monitor_v1::LogPolicy {
        let on_full = match self.on_full {
            OnFull::Block => monitor_v1::log_policy::OnFull::Block,
            OnFull::Drop => monitor_v1::log_policy::OnFull::Drop,
        };
        monitor_v1::LogPolicy {
            on_full: on_full.into(),
            bytes_per_second: self.bytes_per_second,
            file_bytes: self.file_bytes,
        }
    }
}

/// What containers have logged since this daemon started, and those that ran
/// then since they started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogTotals {
    /// Lines in logs; one in parts counts once.
    pub lines: u64,
    /// Bytes of output in them.
    pub bytes: u64,
    /// Lines that were dropped.
    pub dropped_lines: u64,
    /// Bytes of output in those.
    pub dropped_bytes: u64,
}

impl LogTotals {
    fn add(&mut self, counts: &monitor_v1::LogCounts) {
        self.lines += counts.lines;
        self.bytes += counts.bytes;
        self.dropped_lines += counts.dropped_lines;
        self.dropped_bytes += counts.dropped_bytes;
    }
}

/// What was heard of containers' logs, those that are gone included: what is
/// counted never falls.
#[derive(Debug, Default)]
pub(super) struct LogBook(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    /// By container, as last heard.
    current: HashMap<String, monitor_v1::LogCounts>,
    gone: LogTotals,
}

impl LogBook {
    /// A container's counts, as its monitor says them.
    pub(super) fn heard(&self, container_id: &str, counts: &monitor_v1::LogCounts) {
        let mut pages = lock(&self.0);
        match pages.current.get_mut(container_id) {
            Some(known) => known.clone_from(counts),
            None => {
                pages.current.insert(container_id.to_owned(), *counts);
            }
        }
    }

    /// The sum; those `is_known` does not know are kept as a sum only.
    fn totals(&self, is_known: impl Fn(&str) -> bool) -> LogTotals {
        let mut pages = lock(&self.0);
        let Pages { current, gone } = &mut *pages;
        current.retain(|id, counts| {
            let known = is_known(id);
            if !known {
                gone.add(counts);
            }
            known
        });
        let mut totals = *gone;
        for counts in current.values() {
            totals.add(counts);
        }
        totals
    }
}

impl Sandboxes {
    /// Opens a container's log file again; lines go to the new one when this returns.
    ///
    /// # Errors
    /// `ContainerNotFound`, `WrongState` when it does not run, or the file cannot be opened.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.0.container(id)?;
        if !container.state.is_live() {
            let text = format!("container {} does not run", container.id);
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        let monitor = self.0.monitor(&container.pod)?;
        let reopen = request::Body::ReopenLog(monitor_v1::ReopenLog {
            container_id: container.id.to_string(),
        });
        // Half a frame to the monitor would be the end of the connection.
        let told = super::to_the_end(async move { monitor.tell(reopen, Vec::new()).await }).await?;
        told.map_err(|error| {
            const ESRCH: i32 = 3;
            let kind = match &error {
                // It ended meanwhile: the old file has all of it.
                MonitorError::Refused { errno: ESRCH, .. }
                | MonitorError::Refused {
                    not_found: true, ..
                } => Kind::WrongState,
                _ => Kind::Internal,
            };
            let text = format!("cannot reopen the log of container {}", container.id);
            SandboxError::caused(kind, text, error)
        })
    }

    /// What containers have logged. A monitor that does not answer is counted as
    /// it was known last.
    pub async fn log_totals(&self) -> LogTotals {
        let monitors: Vec<_> = lock(&self.0.monitors).values().cloned().collect();
        let asked = monitors.into_iter().map(|monitor| {
            tokio::spawn(async move {
                let inspect = request::Body::Inspect(monitor_v1::Inspect {});
                monitor.ask(inspect, Vec::new()).await
            })
        });
        let until = tokio::time::Instant::now() + ANSWER;
        for asked in asked.collect::<Vec<_>>() {
            if let Ok(Ok(Ok((reply::Body::State(state), _)))) =
                tokio::time::timeout_at(until, asked).await
            {
                for container in &state.containers {
                    if let Some(counts) = &container.log {
                        self.0.log_book.heard(&container.container_id, counts);
                    }
                }
            }
        }
        let view = self.view();
        self.0.log_book.totals(|id| view.container(id).is_some())
    }
}

impl Inner {
    /// Keeps what an ended container's log has had.
    pub(super) fn log_ended(self: &Arc<Self>, exited: &monitor_v1::Exited) {
        if let Some(counts) = &exited.log {
            self.log_book.heard(&exited.container_id, counts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_never_fall_when_containers_go() {
        let book = LogBook::default();
        let counts = |lines| monitor_v1::LogCounts {
            lines,
            ..Default::default()
        };
        book.heard("a", &counts(3));
        book.heard("a", &counts(5));
        book.heard("b", &counts(10));
        assert_eq!(book.totals(|_| true).lines, 15);
        assert_eq!(book.totals(|id| id == "b").lines, 15);
        book.heard("b", &counts(11));
        assert_eq!(book.totals(|_| false).lines, 16);
        assert_eq!(book.totals(|_| false).lines, 16);
    }
}
