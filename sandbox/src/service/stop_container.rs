//! StopContainer: the stop signal, the grace period, then SIGKILL.
//!
//! Nothing hangs on a single event: the wait is for a state of the view, which
//! the monitor's event, its exit record and recovery all lead to.

use super::teardown::signal;
use super::{Inner, Sandboxes};
use crate::container::{ContainerRecord, ContainerState};
use crate::error::Result;
use crate::id::ContainerId;
use crate::operation::{Stage, lock};
use crate::pod_spec::PidMode;
use berth_store::crash;
use rustix::process::Signal;
use std::sync::Arc;
use std::time::Duration;

/// How long until a container that is deaf to its stop signal is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How long until a start that goes on is called off again.
const CALL_OFF_AGAIN: Duration = Duration::from_millis(200);

impl Sandboxes {
    /// Stops a container: its stop signal, and SIGKILL once `grace` has passed.
    /// One that does not run, or is gone, counts as stopped. A second call with
    /// a shorter grace kills earlier.
    ///
    /// # Errors
    /// `DeadlineExceeded` when it does not even end by SIGKILL.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let Ok(container) = self.0.container(id) else {
            return Ok(());
        };
        let object = format!("{id} {}", grace.as_millis());
        let subject = container.spec.name.name.clone();
        self.0
            .operation("StopContainer", object, subject, |me, stage| async move {
                me.stop_container(&container, grace, &stage)
                    .await
                    .map(|()| String::new())
            })
            .await
            .map(drop)
    }
}

impl Inner {
    async fn stop_container(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        grace: Duration,
        stage: &Stage,
    ) -> Result<()> {
        stage.enter("settle");
        self.settled(&container.id).await;
        let live = |me: &Self| {
            me.objects
                .view()
                .container(container.id.as_str())
                .is_some_and(|c| c.state.is_live())
        };
        if live(self) && !grace.is_zero() {
            stage.enter("grace");
            let signalled_and_ended = async {
                self.heard_by(container).await;
                if let Ok(monitor) = self.monitor(&container.pod)
                    && let Err(error) =
                        signal(&monitor, container.id.as_str(), container.stop_signal).await
                {
                    // Most likely it has just ended; if not, SIGKILL follows.
                    tracing::info!(container = %container.id, error = &error as &dyn std::error::Error,
                        "the stop signal was not delivered");
                }
                crash::point("stop_container.signalled");
                self.objects.ended(&container.id).await;
            };
            let _ = tokio::time::timeout(grace, signalled_and_ended).await;
        }
        if live(self) {
            stage.enter("kill");
            self.kill_container(container).await?;
        }
        crash::point("stop_container.ended");
        Ok(())
    }

    /// Waits until the stop signal would do something, or the container has ended.
    ///
    /// The first process of a PID namespace is not even told of a signal it has
    /// no handler for. One that has been started this moment has not come to
    /// installing any: its stop signal would be lost, and the grace period spent
    /// waiting for nothing. Source: pid_namespaces(7); proc_pid_status(5), SigCgt.
    async fn heard_by(&self, container: &Arc<ContainerRecord>) {
        let own_namespace = container.spec.security.pid == PidMode::Container;
        let always = [Signal::KILL.as_raw(), Signal::STOP.as_raw()];
        if !own_namespace || always.contains(&container.stop_signal) {
            return;
        }
        loop {
            let view = self.objects.view();
            let Some(pid) = view
                .container(container.id.as_str())
                .and_then(|c| c.state.pid())
            else {
                return;
            };
            match std::fs::read_to_string(format!("/proc/{pid}/status")) {
                Ok(status) if !hears(&status, container.stop_signal) => {}
                // It does, or it is gone.
                Ok(_) | Err(_) => return,
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Calls off a checkpoint, and a start that is still being planned or has its hooks run,
    /// and waits for the end of any other: the monitor's part always ends.
    pub(super) async fn settled(self: &Arc<Self>, id: &ContainerId) {
        self.call_off_checkpoint(id).await;
        loop {
            if let Err(error) = self.call_off(id).await {
                tracing::warn!(container = %id, error = error.chain(), "its start is not called off");
            }
            // The monitor may not have heard of it when it was called off.
            let launched = self.launched(id);
            if tokio::time::timeout(CALL_OFF_AGAIN, launched).await.is_ok() {
                return;
            }
        }
    }

    /// Waits while the monitor starts the container.
    pub(super) async fn launched(&self, id: &ContainerId) {
        let mut changes = self.objects.changes();
        loop {
            changes.mark_unchanged();
            let view = self.objects.view();
            let starting = view
                .container(id.as_str())
                .is_some_and(|c| matches!(c.state, ContainerState::Starting));
            if !starting || !lock(&self.launching).contains_key(id) {
                return;
            }
            let _ = changes.changed().await;
        }
    }
}

/// Whether /proc/PID/status says that a signal is caught, or blocked and so kept.
fn hears(status: &str, signal: i32) -> bool {
    let has = |field: &str| {
        let set = status.lines().find_map(|line| line.strip_prefix(field))?;
        let set = u64::from_str_radix(set.trim(), 16).ok()?;
        Some(set >> u32::try_from(signal - 1).ok()? & 1 == 1)
    };
    // What cannot be read is no reason to withhold a signal.
    has("SigCgt:").unwrap_or(true) || has("SigBlk:").unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_heard_when_caught_or_blocked() {
        let status =
            "SigBlk:\t0000000000000001\nSigIgn:\t0000000000000002\nSigCgt:\t0000000000004000\n";
        assert!(hears(status, 15) && hears(status, 1));
        assert!(!hears(status, 2) && !hears(status, 9));
        assert!(hears("", 15));
    }
}
