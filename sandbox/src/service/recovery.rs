//! After a start: records compared with the kernel. And what monitors say
//! meanwhile, because an exit heard late is the same thing.
//!
//! | record says | found | becomes |
//! |---|---|---|
//! | pod Creating | anything | undone |
//! | pod Ready, other boot | nothing can be left | stopped; its containers ended with the node |
//! | pod Ready | its monitor answers | as it was, containers as the monitor knows them |
//! | pod Ready | no monitor | stopped; containers by their exit records, else MonitorLost |
//! | pod Stopping, Removing | anything | finished in the background |
//! | pod, damaged | anything | NOTREADY, kept until it is stopped or removed by its ID |
//! | container Creating | anything | removed |
//! | checkpoint being made | anything | given up: the container goes on, its files are removed |
//! | container Starting | the monitor does not know it | Created: the start can be repeated |
//! | container Starting | the monitor is still at it, with hooks say | Exited, StartError: it is called off |
//!
//! Doubt never changes a state: a monitor that is there and does not answer
//! leaves its pod as it was, with the doubt in its message.

use super::start_container::{START_ERROR, call_off_launch};
use super::{Inner, blocking, now};
use crate::container::{ContainerEvent, ContainerRecord, ContainerState, Exit};
use crate::error::{Kind, Result, SandboxError};
use crate::id::{ContainerId, PodId};
use crate::monitor::{Monitor, MonitorError};
use crate::operation::lock;
use crate::pod::{PodEvent, PodRecord, PodState};
use crate::view::Unreadable;
use berth_proto::monitor_v1::{self, reply, request};
use berth_store::exit::ExitRecord;
use berth_store::record;
use futures_util::future::join_all;
use std::sync::Arc;
use std::time::Duration;

/// How long a start waits for adoption; what takes longer goes on in the background.
const ADOPTION: Duration = Duration::from_secs(10);

/// How often a lost connection is tried again before its monitor counts as gone.
const RECONNECTS: u32 = 3;
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// How long starts that were under way may take to come to their end before they are called off.
const STARTS: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Reported for a container that was running when its node went down: nobody
/// saw how it ended.
const UNKNOWN_EXIT: i32 = 255;

pub(super) async fn recover(inner: &Arc<Inner>, unreadable: Vec<Unreadable>) {
    let whole = unreadable.is_empty();
    for bad in unreadable {
        let error = SandboxError::caused(Kind::Internal, "kept as it is", bad.error);
        inner.pending.unreadable(&bad.path, &error);
    }
    // First: what is frozen hears neither a signal nor its monitor.
    let me = inner.clone();
    let recovered = blocking(move || {
        me.recover_checkpoints();
        Ok(())
    });
    if let Err(error) = recovered.await {
        tracing::warn!(
            error = error.chain(),
            "checkpoints that were being made stay"
        );
    }
    let view = inner.objects.view();
    for pod in view.pods() {
        if let Some(parent) = &pod.cgroup {
            inner.cgroups.adopt_parent(parent);
        }
    }
    let adoptions = view.pods().map(|pod| {
        let (inner, pod) = (inner.clone(), pod.clone());
        tokio::spawn(async move { adopt(&inner, &pod).await })
    });
    if tokio::time::timeout(ADOPTION, join_all(adoptions))
        .await
        .is_err()
    {
        tracing::warn!("pods are still being taken over");
    }
    // With a record missing, what it owns would look like nobody's.
    if whole {
        sweep(inner).await;
    }
}

async fn adopt(inner: &Arc<Inner>, pod: &Arc<PodRecord>) {
    let rebooted = pod.boot_id != inner.boot_id && !pod.unreadable;
    if rebooted {
        end_with_the_node(inner, pod).await;
    }
    for container in inner.objects.view().containers_of(&pod.id) {
        if container.state == ContainerState::Creating
            || matches!(container.state, ContainerState::Removing { .. })
        {
            let (inner, container) = (inner.clone(), container.clone());
            if let Err(error) = inner.remove_container(&container, None).await {
                inner.pending.remove(container, &error);
            }
        }
    }
    match &pod.state {
        PodState::Creating => inner.undo_pod(&pod.id).await,
        PodState::Ready if rebooted => finish_stop(inner, &pod.id).await,
        PodState::Ready => adopt_ready(inner, pod).await,
        // It is stopped when somebody says so: what runs in it may be all that is left of it.
        PodState::Stopping if pod.unreadable => adopt_ready(inner, pod).await,
        PodState::Stopping => finish_stop(inner, &pod.id).await,
        PodState::Stopped => {}
        PodState::Removing => {
            if let Err(error) = inner.finish_removal(&pod.id, None).await {
                tracing::warn!(pod = %pod.id, error = error.chain(), "the removal is not finished");
            }
        }
    }
}

async fn adopt_ready(inner: &Arc<Inner>, pod: &Arc<PodRecord>) {
    match inner.connect(&pod.id).await {
        Ok(monitor) => {
            if let Err(error) = reconcile(inner, pod, &monitor).await {
                tracing::warn!(pod = %pod.id, error = error.chain(), "the pod keeps its last known state");
                doubt(inner, &pod.id, &error).await;
            }
        }
        Err(error) => {
            tracing::warn!(pod = %pod.id, error = error.chain(), "the pod's monitor is gone");
            monitor_lost(inner, &pod.id).await;
        }
    }
}

/// Brings the records of a pod's containers to what its monitor knows.
async fn reconcile(inner: &Arc<Inner>, pod: &PodRecord, monitor: &Monitor) -> Result<()> {
    let mut state = inspect(pod, monitor).await?;
    let until = tokio::time::Instant::now() + STARTS;
    // Most starts are a matter of milliseconds.
    while state.containers.iter().any(|known| known.starting) && tokio::time::Instant::now() < until
    {
        tokio::time::sleep(LOOK_AGAIN).await;
        state = inspect(pod, monitor).await?;
    }
    for container in inner.objects.view().containers_of(&pod.id) {
        if !container.state.is_live() {
            continue;
        }
        let known = state
            .containers
            .iter()
            .find(|known| known.container_id == container.id.as_str());
        let event = match known {
            Some(monitor_v1::ContainerState {
                exited: Some(exited),
                started_at,
                ..
            }) => {
                started_first(inner, container, *started_at).await;
                let event = exit_event(exited);
                Some(inner.explain(&container.id, event, exited.oom_kills).await)
            }
            Some(starting) if starting.starting => {
                call_off_launch(monitor, &container.id).await;
                Some(ContainerEvent::Exited {
                    at: now(),
                    exit: Exit {
                        code: START_ERROR,
                        reason: "StartError".into(),
                        message: "the daemon ended while the container was being started".into(),
                    },
                })
            }
            Some(running) if container.state == ContainerState::Starting => {
                Some(ContainerEvent::Started {
                    since: running.started_at,
                    pid: running.pid,
                    start_ticks: running.start_ticks,
                })
            }
            Some(_) => None,
            None => Some(match inner.recorded_exit(&container.pod, &container.id) {
                Some(exit) => exit,
                None if container.state == ContainerState::Starting => {
                    ContainerEvent::NothingStarted
                }
                None => ContainerEvent::Exited {
                    at: now(),
                    exit: Exit {
                        code: UNKNOWN_EXIT,
                        reason: "MonitorLost".into(),
                        message: "the pod's monitor does not know the container".into(),
                    },
                },
            }),
        };
        if let Some(event) = event {
            inner.container_event(&container.id, event).await?;
            release_if_ended(inner, &container.id).await;
        }
    }
    Ok(())
}

async fn inspect(pod: &PodRecord, monitor: &Monitor) -> Result<monitor_v1::State> {
    let inspect = request::Body::Inspect(monitor_v1::Inspect {});
    match monitor.ask(inspect, Vec::new()).await {
        Ok((reply::Body::State(state), _)) => Ok(state),
        Ok(_) => Err(SandboxError::new(
            Kind::Internal,
            "the monitor's answer does not fit",
        )),
        Err(error) => {
            let text = format!(
                "the monitor of pod sandbox {} does not say what runs",
                pod.id
            );
            Err(SandboxError::caused(Kind::Internal, text, error))
        }
    }
}

/// A container that ended while nobody listened did start.
async fn started_first(inner: &Arc<Inner>, container: &ContainerRecord, since: i64) {
    if container.state == ContainerState::Starting {
        let event = ContainerEvent::Started {
            since,
            pid: 0,
            start_ticks: 0,
        };
        if let Err(error) = inner.container_event(&container.id, event).await {
            tracing::warn!(container = %container.id, error = error.chain(), "its start is not recorded");
        }
    }
}

async fn doubt(inner: &Arc<Inner>, id: &PodId, error: &SandboxError) {
    let (me, id, text) = (inner.clone(), id.clone(), error.chain());
    let written = blocking(move || {
        me.objects.update_pod(&id, |pod| {
            pod.message = text;
            Ok(())
        })
    });
    if let Err(error) = written.await {
        tracing::warn!(error = error.chain(), "a doubt is not recorded");
    }
}

/// The pod's containers and namespaces went down with the node.
async fn end_with_the_node(inner: &Arc<Inner>, pod: &PodRecord) {
    for container in inner.objects.view().containers_of(&pod.id) {
        if !container.state.is_live() {
            continue;
        }
        let event = inner
            .recorded_exit(&container.pod, &container.id)
            .unwrap_or_else(|| ContainerEvent::Exited {
                at: now(),
                exit: Exit {
                    code: UNKNOWN_EXIT,
                    reason: "NodeRestarted".into(),
                    message: "the node went down while the container ran".into(),
                },
            });
        if let Err(error) = inner.container_event(&container.id, event).await {
            tracing::warn!(container = %container.id, error = error.chain(), "its end is not recorded");
        }
    }
}

async fn finish_stop(inner: &Arc<Inner>, id: &PodId) {
    let stopped = inner
        .operation("StopPodSandbox", id.as_str(), id.short(), |me, stage| {
            let id = id.clone();
            async move { me.stop_pod(&id, &stage).await.map(|()| String::new()) }
        })
        .await;
    if let Err(error) = stopped {
        // NOTREADY as it is: the kubelet stops it again.
        tracing::warn!(pod = %id, error = error.chain(), "the pod is not all stopped");
    }
}

/// What the kernel and the disk hold for no record.
async fn sweep(inner: &Arc<Inner>) {
    let me = inner.clone();
    let swept = blocking(move || {
        let view = me.objects.view();
        for id in me.images.prepared() {
            if view.container(&id).is_some() {
                continue;
            }
            if let Ok(id) = id.parse::<ContainerId>()
                && let Err(error) = me.images.remove(&id)
            {
                tracing::warn!(container = %id, error = &*error, "a file system of nobody's stays");
            }
        }
        me.sweep_bundles();
        match me.network.gc_builtin(&|id| me.has_network(id)) {
            Ok(freed) if freed.is_empty() => {}
            Ok(freed) => tracing::info!(?freed, "took back networks of nobody's"),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "networks of nobody's stay"
                );
            }
        }
        Ok(())
    });
    if let Err(error) = swept.await {
        tracing::warn!(error = error.chain(), "not everything was swept");
    }
}

/// A monitor says that a container's first process has ended.
pub(super) async fn container_exited(inner: &Arc<Inner>, exited: &monitor_v1::Exited) {
    let Ok(id) = exited.container_id.parse::<ContainerId>() else {
        return;
    };
    inner.log_ended(exited);
    // The answer to its start may still be on the way.
    inner.launched(&id).await;
    let event = inner
        .explain(&id, exit_event(exited), exited.oom_kills)
        .await;
    match inner.container_event(&id, event).await {
        Ok(container) => {
            tracing::info!(container = %id, pod = %container.pod, code = exited.exit_code,
                oom_kills = exited.oom_kills, "container ended");
            release_if_ended(inner, &id).await;
        }
        Err(error) if error.kind() == Kind::ContainerNotFound => {}
        Err(error) => {
            tracing::warn!(container = %id, error = error.chain(), "the exit is not recorded");
        }
    }
}

/// Kills what the first process left behind and removes the cgroup: off every
/// reply path, and again at removal.
async fn release_if_ended(inner: &Arc<Inner>, id: &ContainerId) {
    let view = inner.objects.view();
    let Some(container) = view.container(id.as_str()) else {
        return;
    };
    if matches!(container.state, ContainerState::Exited { .. })
        && let Err(error) = inner.release_cgroup(container, None).await
    {
        tracing::warn!(container = %id, error = error.chain(), "its cgroup stays until removal");
    }
}

/// The connection to a pod's monitor ended: it is gone, or just the connection.
pub(super) async fn connection_lost(inner: &Arc<Inner>, pod: &PodId) {
    let held = lock(&inner.monitors)
        .get(pod)
        .is_some_and(|monitor| monitor.is_lost());
    if !held {
        // Ended on purpose, or connected anew since.
        return;
    }
    lock(&inner.monitors).remove(pod);
    for _ in 0..RECONNECTS {
        let Some(record) = inner.objects.view().pod(pod.as_str()).cloned() else {
            return;
        };
        if !record.state.is_ready() {
            return;
        }
        match Monitor::connect(&inner.run_dir(pod), pod.clone(), inner.events.clone()).await {
            Ok(monitor) => {
                let monitor = Arc::new(monitor);
                lock(&inner.monitors).insert(pod.clone(), monitor.clone());
                if let Err(error) = reconcile(inner, &record, &monitor).await {
                    doubt(inner, pod, &error).await;
                }
                return;
            }
            // Nobody listens any more.
            Err(MonitorError::Unreachable { .. }) => break,
            Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
        }
    }
    tracing::warn!(%pod, "the pod's monitor is gone");
    monitor_lost(inner, pod).await;
}

/// Without its monitor a pod has no namespaces to offer: what lives is ended,
/// what ended is reported, and the kubelet makes a new one.
async fn monitor_lost(inner: &Arc<Inner>, pod: &PodId) {
    let (me, id) = (inner.clone(), pod.clone());
    let marked = blocking(move || {
        me.objects.update_pod(&id, |pod| {
            if let Some(next) = pod.state.on(&PodEvent::Stop) {
                pod.state = next;
            }
            pod.message = "the pod's monitor ended".into();
            Ok(())
        })
    });
    if let Err(error) = marked.await {
        tracing::warn!(%pod, error = error.chain(), "the loss is not recorded");
    }
    finish_stop(inner, pod).await;
}

fn exit_event(exited: &monitor_v1::Exited) -> ContainerEvent {
    ContainerEvent::Exited {
        at: exited.finished_at,
        exit: exit(exited.exit_code, exited.signal, exited.oom_kills),
    }
}

/// The reason peers report: OOMKilled when the kernel killed anything of the
/// container for memory, else by the exit code.
fn exit(code: i32, signal: i32, oom_kills: u64) -> Exit {
    let (reason, message) = if oom_kills > 0 && code != 0 {
        let kills = match oom_kills {
            1 => "one process was".to_owned(),
            kills => format!("{kills} processes were"),
        };
        (
            "OOMKilled",
            format!("memory ran out; {kills} killed by the kernel"),
        )
    } else if code == 0 {
        ("Completed", String::new())
    } else if signal != 0 {
        ("Error", format!("ended by {}", signal_name(signal)))
    } else {
        ("Error", String::new())
    };
    Exit {
        code,
        reason: reason.into(),
        message,
    }
}

/// "SIGSEGV"; "signal 40" for those without a name.
fn signal_name(signal: i32) -> String {
    let named = rustix::process::Signal::from_named_raw(signal);
    named.map_or_else(
        || format!("signal {signal}"),
        |named| {
            // "Signal::SEGV", with quotes, is how the type prints itself.
            let text = format!("{named:?}");
            let name = text.rsplit("::").next().unwrap_or_default();
            format!("SIG{}", name.trim_matches(|c: char| !c.is_alphanumeric()))
        },
    )
}

impl Inner {
    /// Says of an end for want of memory whose limit it was, as long as the cgroups can tell.
    async fn explain(
        self: &Arc<Self>,
        id: &ContainerId,
        event: ContainerEvent,
        kills: u64,
    ) -> ContainerEvent {
        let ContainerEvent::Exited { at, mut exit } = event else {
            return event;
        };
        let container = self.objects.view().container(id.as_str()).cloned();
        if let Some(container) = container
            && exit.reason == "OOMKilled"
        {
            let me = self.clone();
            let report = blocking(move || {
                let resources = &container.spec.resources;
                Ok(container
                    .cgroup
                    .as_ref()
                    .map(|cgroup| crate::oom::report(&me.cgroups, cgroup, resources, kills)))
            });
            // Without one the plain sentence stays.
            if let Ok(Some(report)) = report.await {
                exit.message = report;
            }
        }
        ContainerEvent::Exited { at, exit }
    }

    /// What the monitor has written about a container's end. Blocking, but only
    /// for a small file.
    pub(super) fn recorded_exit(&self, pod: &PodId, id: &ContainerId) -> Option<ContainerEvent> {
        match record::load::<ExitRecord>(&self.objects.exit_path(pod, id)) {
            Ok(record) => Some(ContainerEvent::Exited {
                at: record.finished_at_ns,
                exit: exit(record.exit_code, record.signal, record.oom_kills),
            }),
            Err(error) if error.is_absent() => None,
            Err(error) => {
                tracing::warn!(container = %id, error = &error as &dyn std::error::Error,
                    "the exit record cannot be read");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_follows_from_code_and_oom_kills() {
        assert_eq!(exit(0, 0, 0).reason, "Completed");
        assert_eq!(exit(1, 0, 0).reason, "Error");
        assert_eq!(exit(137, 9, 1).reason, "OOMKilled");
        assert_eq!(exit(139, 11, 0).message, "ended by SIGSEGV");
        assert_eq!(exit(168, 40, 0).message, "ended by signal 40");
        // A child was killed and the first process coped with it.
        assert_eq!(exit(0, 0, 1).reason, "Completed");
    }
}
