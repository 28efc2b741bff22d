//! Giving back what a pod has in the kernel, and StopPodSandbox.
//!
//! Every step is tried whatever became of the one before, and each succeeds
//! where there is nothing: so the same code stops a pod, undoes a half-made one
//! and finishes what a killed daemon began.

use super::hooks::LAST_WORDS;
use super::run_pod::network_pod;
use super::{Inner, Sandboxes, blocking, internal, now};
use crate::container::{ContainerEvent, ContainerRecord, ContainerState, Exit};
use crate::error::{Kind, Result, SandboxError};
use crate::id::PodId;
use crate::monitor::{Monitor, MonitorError};
use crate::operation::{Stage, lock};
use crate::pod::{PodEvent, PodRecord, PodState};
use crate::pod_files;
use crate::pod_spec::Namespace;
use berth_netplugin::network::DetachRequest;
use berth_proto::monitor_v1::{self, reply, request};
use berth_store::crash;
use futures_util::future::join_all;
use std::sync::Arc;
use std::time::Duration;

/// How long a killed container may take to end before the teardown says so:
/// one in uninterruptible sleep cannot be helped.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// How long until one that may have started only now is killed again.
const KILL_AGAIN: Duration = Duration::from_millis(250);

/// How long until a monitor is told again to end that had a container left to reap.
const SHUTDOWN_AGAIN: Duration = Duration::from_millis(20);

/// How long a monitor that has nothing left to do may take to end.
const MONITOR_END: Duration = Duration::from_secs(5);

impl Sandboxes {
    /// Stops every container of the pod and gives its network and namespaces
    /// back. A pod that is stopped or gone counts as stopped.
    ///
    /// # Errors
    /// `Internal` with everything that could not be given back; it can be repeated.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        let Ok(pod) = self.0.pod(id) else {
            return Ok(());
        };
        let subject = pod.spec.name.to_string();
        self.0
            .operation("StopPodSandbox", id, subject, |me, stage| async move {
                me.stop_pod(&pod.id, &stage).await.map(|()| String::new())
            })
            .await
            .map(drop)
    }
}

impl Inner {
    pub(super) async fn stop_pod(self: &Arc<Self>, id: &PodId, stage: &Stage) -> Result<()> {
        stage.enter("record");
        let pod = match self.pod_event(id, PodEvent::Stop).await {
            Ok(pod) => pod,
            Err(error) if error.kind() == Kind::PodNotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if pod.state == PodState::Stopped {
            return Ok(());
        }
        crash::point("stop_pod.record");
        let failures = self.teardown(&pod, Some(stage)).await;
        if let Some(error) = together(failures, || format!("pod sandbox {id} is not all stopped")) {
            return Err(error);
        }
        stage.enter("stopped");
        self.pod_event(id, PodEvent::Stopped).await?;
        crash::point("stop_pod.stopped");
        Ok(())
    }

    /// Takes a half-made pod apart and forgets it; what fails is tried again later.
    pub(super) async fn undo_pod(self: &Arc<Self>, id: &PodId) {
        let undone = async {
            let Some(pod) = self.objects.view().pod(id.as_str()).cloned() else {
                return Ok(());
            };
            let failures = self.teardown(&pod, None).await;
            if let Some(error) =
                together(failures, || format!("pod sandbox {id} is not all undone"))
            {
                return Err(error);
            }
            let (me, id) = (self.clone(), id.clone());
            blocking(move || me.objects.remove_pod(&id)).await
        };
        if let Err(error) = undone.await {
            self.pending.undo(id.clone(), &error);
        }
    }

    /// All steps, newest first; what failed.
    pub(super) async fn teardown(
        self: &Arc<Self>,
        pod: &Arc<PodRecord>,
        stage: Option<&Stage>,
    ) -> Vec<SandboxError> {
        let enter = |name| stage.inspect(|stage| stage.enter(name));
        let mut failures = Vec::new();

        enter("containers");
        failures.extend(self.kill_containers(pod).await);
        crash::point("stop_pod.containers");

        enter("network");
        if let Err(error) = self.detach(pod).await {
            // A pod goes also when its network does not let it: that is finished later.
            self.pending.detach(pod.id.as_str(), &error);
        }
        crash::point("stop_pod.network");

        if failures.is_empty() {
            // While a container lives its monitor is needed.
            enter("monitor");
            self.end_monitor(&pod.id).await;
            crash::point("stop_pod.monitor");

            enter("files");
            failures.extend(self.remove_files(pod).await.err());
            crash::point("stop_pod.files");
        }
        failures
    }

    async fn kill_containers(self: &Arc<Self>, pod: &Arc<PodRecord>) -> Vec<SandboxError> {
        let view = self.objects.view();
        let killed = join_all(view.containers_of(&pod.id).map(|container| async {
            let ended = self.kill_container(container).await;
            let released = self.release_cgroup(container, Some(LAST_WORDS)).await;
            ended.and(released)
        }));
        killed.await.into_iter().filter_map(Result::err).collect()
    }

    /// Kills what lives of a container and waits until it is known to have ended.
    pub(super) async fn kill_container(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
    ) -> Result<()> {
        let id = &container.id;
        let until = tokio::time::Instant::now() + KILL_DEADLINE;
        loop {
            self.settled(id).await;
            let live = |me: &Inner| {
                let view = me.objects.view();
                view.container(id.as_str())
                    .is_some_and(|c| c.state.is_live())
            };
            if !live(self) {
                return Ok(());
            }
            let signalled = match self.monitor(&container.pod) {
                Ok(monitor) => signal(&monitor, id.as_str(), libc_sigkill()).await.is_ok(),
                Err(_) => false,
            };
            self.empty_cgroup(container).await?;
            if !signalled && self.monitor(&container.pod).is_err() {
                self.declare_lost(container).await?;
            }
            // A start that came behind the first line had nothing yet that could be killed.
            let ended = tokio::time::timeout(KILL_AGAIN, self.objects.ended(id)).await;
            if ended.is_ok() {
                return Ok(());
            }
            if tokio::time::Instant::now() >= until {
                let text = format!(
                    "container {id} does not end: its processes are killed and still there after {} s",
                    KILL_DEADLINE.as_secs()
                );
                return Err(SandboxError::new(Kind::DeadlineExceeded, text));
            }
        }
    }

    /// Kills every process in the container's cgroup.
    pub(super) async fn empty_cgroup(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
    ) -> Result<()> {
        let Some(cgroup) = container.cgroup.clone() else {
            return Ok(());
        };
        let id = container.id.clone();
        blocking(move || {
            cgroup
                .kill_all(KILL_DEADLINE)
                .map_err(internal(format!("cannot kill all of container {id}")))
        })
        .await
    }

    /// Empties and removes the container's cgroup, has what other runtimes keep of it
    /// forgotten, and its poststop hooks run: these get `patience` at most.
    pub(super) async fn release_cgroup(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        patience: Option<Duration>,
    ) -> Result<()> {
        let Some(cgroup) = container.cgroup.clone() else {
            return Ok(());
        };
        let (me, record) = (self.clone(), container.clone());
        let hooked = blocking(move || {
            let text = format!("cannot remove the cgroup of container {}", record.id);
            cgroup.kill_all(KILL_DEADLINE).map_err(internal(&text))?;
            let hooked = me.has_hook_bundle(&record);
            let forgotten = match hooked {
                true => Ok(()),
                false => me.forget_bundle(&record),
            };
            me.cgroups
                .release(&cgroup, KILL_DEADLINE)
                .map_err(internal(&text))?;
            forgotten.map(|()| hooked)
        })
        .await?;
        match hooked {
            true => self.poststop(container, patience).await,
            false => Ok(()),
        }
    }

    /// The monitor that could have said how the container ended is gone.
    pub(super) async fn declare_lost(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
    ) -> Result<()> {
        let (me, id, pod) = (self.clone(), container.id.clone(), container.pod.clone());
        blocking(move || {
            let event = me
                .recorded_exit(&pod, &id)
                .unwrap_or_else(|| ContainerEvent::Exited {
                    at: now(),
                    exit: Exit {
                        code: 137,
                        reason: "MonitorLost".into(),
                        message: "the pod's monitor ended before the container; it was killed"
                            .into(),
                    },
                });
            me.objects.update_container(&id, |container| {
                if container.state.is_live()
                    && let Some(next) = container.state.on(&event)
                {
                    container.state = next;
                }
                Ok(())
            })
        })
        .await
        .map(drop)
    }

    pub(super) async fn detach(self: &Arc<Self>, pod: &Arc<PodRecord>) -> Result<()> {
        if pod.spec.namespaces.network == Namespace::Node {
            return Ok(());
        }
        let (me, pod) = (self.clone(), pod.clone());
        blocking(move || {
            let netns = me.run_dir(&pod.id).join("netns");
            let request = DetachRequest {
                pod: network_pod(&pod),
                netns: netns.exists().then_some(netns.as_path()),
            };
            me.network
                .detach(&request, pod.network.as_ref())
                .map_err(internal(format!(
                    "cannot take the network of pod sandbox {} back",
                    pod.id
                )))
        })
        .await
    }

    async fn end_monitor(self: &Arc<Self>, id: &PodId) {
        let held = lock(&self.monitors).remove(id);
        let monitor = match held {
            Some(monitor) => monitor,
            // Not connected: it may run all the same, after a crash of ours.
            None => {
                let dir = self.run_dir(id);
                match Monitor::connect(&dir, id.clone(), self.events.clone()).await {
                    Ok(monitor) => Arc::new(monitor),
                    Err(_) => return,
                }
            }
        };
        if let Err(error) = shut_down(&monitor).await {
            tracing::warn!(pod = %id, error = &error as &dyn std::error::Error, "the monitor does not end");
        }
    }

    async fn remove_files(self: &Arc<Self>, pod: &Arc<PodRecord>) -> Result<()> {
        let (me, pod) = (self.clone(), pod.clone());
        blocking(move || {
            let dir = me.run_dir(&pod.id);
            unpin(&dir.join("netns"))?;
            pod_files::remove(&dir).map_err(internal("cannot remove the pod's files"))?;
            match std::fs::remove_dir_all(&dir) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    let text = format!("cannot remove {}", dir.display());
                    return Err(SandboxError::caused(Kind::Internal, text, error));
                }
            }
            let failed = || {
                internal(format!(
                    "cannot remove the cgroup of pod sandbox {}",
                    pod.id
                ))
            };
            // All of it where it is the pod's own: a container with a damaged record is in there too.
            let own = me.cgroups.at(&me.own_cgroup(&pod.id)).map_err(failed())?;
            if own.exists() {
                own.kill_all(KILL_DEADLINE)
                    .and_then(|()| own.remove(KILL_DEADLINE))
                    .map_err(failed())?;
            }
            if let Some(parent) = &pod.cgroup {
                me.cgroups.remove_parent(parent).map_err(failed())?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn pod_event(
        self: &Arc<Self>,
        id: &PodId,
        event: PodEvent,
    ) -> Result<Arc<PodRecord>> {
        let (me, id) = (self.clone(), id.clone());
        blocking(move || {
            me.objects.update_pod(&id, |pod| {
                pod.state = pod.state.on(&event).ok_or_else(|| {
                    let text = format!("pod sandbox {} is {:?}: no {event:?}", pod.id, pod.state);
                    SandboxError::new(Kind::WrongState, text)
                })?;
                Ok(())
            })
        })
        .await
    }

    pub(super) async fn container_event(
        self: &Arc<Self>,
        id: &crate::ContainerId,
        event: ContainerEvent,
    ) -> Result<Arc<ContainerRecord>> {
        let (me, id) = (self.clone(), id.clone());
        blocking(move || {
            me.objects.update_container(&id, |container| {
                container.state = container.state.on(&event).ok_or_else(|| {
                    let text = format!(
                        "container {} is {}: no {}",
                        container.id,
                        state_word(&container.state),
                        event_word(&event)
                    );
                    SandboxError::new(Kind::WrongState, text)
                })?;
                Ok(())
            })
        })
        .await
    }
}

/// Ends a monitor. Containers it still has are those whose records are damaged.
async fn shut_down(monitor: &Monitor) -> std::result::Result<(), MonitorError> {
    let until = tokio::time::Instant::now() + MONITOR_END;
    loop {
        let shutdown = request::Body::Shutdown(monitor_v1::Shutdown {});
        match monitor.tell(shutdown, Vec::new()).await {
            Ok(()) | Err(MonitorError::Lost) => break,
            Err(error) if tokio::time::Instant::now() > until => return Err(error),
            Err(_) => {}
        }
        let inspect = request::Body::Inspect(monitor_v1::Inspect {});
        if let (reply::Body::State(state), _) = monitor.ask(inspect, Vec::new()).await? {
            for container in state
                .containers
                .iter()
                .filter(|container| container.exited.is_none())
            {
                let _ = signal(monitor, &container.container_id, libc_sigkill()).await;
            }
        }
        tokio::time::sleep(SHUTDOWN_AGAIN).await;
    }
    tokio::time::timeout_at(until, monitor.ended())
        .await
        .map_err(|_| MonitorError::Silent)
}

fn state_word(state: &ContainerState) -> &'static str {
    match state {
        ContainerState::Creating => "being made",
        ContainerState::Created => "created",
        ContainerState::Starting => "being started",
        ContainerState::Running { .. } => "running",
        ContainerState::Exited { .. } => "exited",
        ContainerState::Removing { .. } => "being removed",
    }
}

fn event_word(event: &ContainerEvent) -> &'static str {
    match event {
        ContainerEvent::Made => "making",
        ContainerEvent::Start => "start",
        ContainerEvent::Started { .. } | ContainerEvent::NothingStarted => "end of a start",
        ContainerEvent::Exited { .. } => "exit",
        ContainerEvent::Remove => "removal",
    }
}

fn unpin(pin: &std::path::Path) -> Result<()> {
    use rustix::io::Errno;
    // EINVAL: it is not a mount. Several pins cannot be, but one left over and one new may.
    loop {
        match rustix::mount::unmount(pin, rustix::mount::UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => {
                let text = format!("cannot unpin {}", pin.display());
                return Err(SandboxError::caused(Kind::Internal, text, error));
            }
        }
    }
}

/// Sends a signal to a container's first process.
pub(super) async fn signal(
    monitor: &Monitor,
    container: &str,
    signal: i32,
) -> std::result::Result<(), crate::monitor::MonitorError> {
    let message = monitor_v1::Signal {
        container_id: container.to_owned(),
        exec_id: String::new(),
        signal,
    };
    monitor
        .tell(request::Body::Signal(message), Vec::new())
        .await
}

pub(super) fn libc_sigkill() -> i32 {
    rustix::process::Signal::KILL.as_raw()
}

/// One error for several; `None` for none.
pub(super) fn together(
    failures: Vec<SandboxError>,
    what: impl FnOnce() -> String,
) -> Option<SandboxError> {
    if failures.is_empty() {
        return None;
    }
    let each: Vec<String> = failures.iter().map(SandboxError::chain).collect();
    Some(SandboxError::new(
        failures[0].kind(),
        format!("{}: {}", what(), each.join("; ")),
    ))
}
