//! StopContainer: the stop signal, the grace period, then SIGKILL.
//!
//! Nothing hangs on a single event: the wait is for a state of the view, which
//! the monitor's event, its exit record and recovery all lead to.

use super::teardown::signal;
use super::{Inner, Sandboxes};
use crate::container::ContainerRecord;
use crate::error::Result;
use crate::id::ContainerId;
use crate::operation::Stage;
use berth_store::crash;
use std::sync::Arc;
use std::time::Duration;

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
            if let Ok(monitor) = self.monitor(&container.pod)
                && let Err(error) =
                    signal(&monitor, container.id.as_str(), container.stop_signal).await
            {
                // Most likely it has just ended; if not, SIGKILL follows.
                tracing::info!(container = %container.id, error = &error as &dyn std::error::Error,
                    "the stop signal was not delivered");
            }
            crash::point("stop_container.signalled");
            let _ = tokio::time::timeout(grace, self.objects.ended(&container.id)).await;
        }
        if live(self) {
            stage.enter("kill");
            self.kill_container(container).await?;
        }
        crash::point("stop_container.ended");
        Ok(())
    }

    /// Waits while the container is being started: a start always ends.
    pub(super) async fn settled(&self, id: &ContainerId) {
        let mut changes = self.objects.changes();
        loop {
            changes.mark_unchanged();
            let view = self.objects.view();
            let starting = view
                .container(id.as_str())
                .is_some_and(|c| matches!(c.state, crate::container::ContainerState::Starting));
            if !starting {
                return;
            }
            let _ = changes.changed().await;
        }
    }
}
