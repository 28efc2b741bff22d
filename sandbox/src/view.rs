//! What there is: an immutable snapshot for readers, and the one way to change it.
//!
//! A change is made to a copy of the record, written to disk, and only then
//! swapped into the view, before the call that made it is answered. Readers take
//! the current snapshot and never wait for anything.

use crate::container::{ContainerRecord, ContainerState};
use crate::error::{Kind, Result, SandboxError};
use crate::events::{self, Event, EventKind, Events, Listener};
use crate::id::{ContainerId, PodId};
use crate::operation::lock;
use crate::pod::PodRecord;
use arc_swap::ArcSwap;
use berth_store::atomic_file::{self, Durability};
use berth_store::record;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// Every pod and container at one moment.
#[derive(Clone, Default)]
pub struct View {
    pods: HashMap<String, Arc<PodRecord>>,
    containers: HashMap<String, Arc<ContainerRecord>>,
}

impl View {
    /// The pod with this ID, listed or not.
    pub fn pod(&self, id: &str) -> Option<&Arc<PodRecord>> {
        self.pods.get(id)
    }

    /// The container with this ID, listed or not.
    pub fn container(&self, id: &str) -> Option<&Arc<ContainerRecord>> {
        self.containers.get(id)
    }

    /// All pods, those being made too, in no order.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<PodRecord>> {
        self.pods.values()
    }

    /// All containers, those being made too, in no order.
    pub fn containers(&self) -> impl Iterator<Item = &Arc<ContainerRecord>> {
        self.containers.values()
    }

    /// The containers of one pod, those being made too, in no order.
    pub fn containers_of<'a>(
        &'a self,
        pod: &'a PodId,
    ) -> impl Iterator<Item = &'a Arc<ContainerRecord>> {
        self.containers
            .values()
            .filter(move |container| container.pod == *pod)
    }
}

/// The records on disk and the view of them.
pub(crate) struct Objects {
    /// lib/pods
    dir: PathBuf,
    view: ArcSwap<View>,
    writing: Mutex<()>,
    changed: watch::Sender<()>,
    events: Events,
}

/// What [`Objects::load`] could not read: kept on disk, and said.
pub(crate) struct Unreadable {
    pub path: PathBuf,
    pub error: Box<dyn std::error::Error + Send + Sync>,
}

impl Objects {
    /// Reads every record below `dir`; makes `dir` where it is missing.
    pub fn load(dir: PathBuf) -> Result<(Self, Vec<Unreadable>)> {
        let refuse = |path: &Path, error: std::io::Error| {
            SandboxError::caused(
                Kind::Internal,
                format!("cannot read {}", path.display()),
                error,
            )
        };
        std::fs::create_dir_all(&dir).map_err(|error| refuse(&dir, error))?;
        let mut view = View::default();
        let mut unreadable = Vec::new();
        let mut damaged = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(|error| refuse(&dir, error))? {
            let path = entry.map_err(|error| refuse(&dir, error))?.path();
            match record::load::<PodRecord>(&path.join("pod.rec")) {
                Ok(pod) => {
                    view.pods.insert(pod.id.to_string(), Arc::new(pod));
                }
                // A directory whose record was never written, or was removed first: nothing is in it.
                Err(error) if error.is_absent() => remove_empty(&path),
                Err(error) => {
                    unreadable.push(Unreadable {
                        path: path.clone(),
                        error: error.into(),
                    });
                    damaged.push(path.clone());
                }
            }
            let Ok(entries) = std::fs::read_dir(path.join("containers")) else {
                continue;
            };
            for entry in entries.flatten() {
                let path = entry.path();
                if path.extension().is_none_or(|extension| extension != "rec") {
                    continue;
                }
                match record::load::<ContainerRecord>(&path) {
                    Ok(container) => {
                        view.containers
                            .insert(container.id.to_string(), Arc::new(container));
                    }
                    Err(error) => unreadable.push(Unreadable {
                        path,
                        error: error.into(),
                    }),
                }
            }
        }
        for path in damaged {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let Ok(id) = name.parse::<PodId>() else {
                continue;
            };
            let container = view
                .containers
                .values()
                .find(|container| container.pod == id);
            let labels = container.map(|container| container.spec.labels.clone());
            let cgroup = container.and_then(|container| container.cgroup.as_ref());
            let pod = PodRecord::unreadable(
                id,
                &labels.unwrap_or_default(),
                cgroup
                    .and_then(|cgroup| cgroup.path().rsplit_once('/'))
                    .map(|(parent, _)| parent),
            );
            view.pods.insert(pod.id.to_string(), Arc::new(pod));
        }
        let objects = Self {
            dir,
            view: ArcSwap::from_pointee(view),
            writing: Mutex::new(()),
            changed: watch::Sender::new(()),
            events: Events::default(),
        };
        Ok((objects, unreadable))
    }

    /// The current snapshot.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Told at every change of the view.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Told what happens to pods and containers from now on.
    pub fn listen(&self) -> Listener {
        self.events.listen()
    }

    /// Tells listeners; `pod` is the record to show where the view has it no more.
    fn tell(&self, kinds: &[EventKind], id: &str, pod: &PodId, gone: Option<&Arc<PodRecord>>) {
        if kinds.is_empty() || !self.events.is_heard() {
            return;
        }
        let view = self.view.load();
        for &kind in kinds {
            self.events.tell(Event {
                kind,
                id: id.to_owned(),
                at: now(),
                pod: view.pod(pod.as_str()).or(gone).cloned(),
                containers: view
                    .containers_of(pod)
                    .filter(|container| container.state.is_listed())
                    .cloned()
                    .collect(),
            });
        }
    }

    pub fn pod_dir(&self, id: &PodId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    pub fn exit_path(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.pod_dir(pod).join("exits").join(format!("{id}.rec"))
    }

    fn container_path(&self, pod: &PodId, id: &ContainerId) -> PathBuf {
        self.pod_dir(pod)
            .join("containers")
            .join(format!("{id}.rec"))
    }

    /// Adds a pod: its directories and its record. Blocking.
    pub fn insert_pod(&self, pod: PodRecord) -> Result<Arc<PodRecord>> {
        let dir = self.pod_dir(&pod.id);
        for dir in [dir.join("containers"), dir.join("exits")] {
            std::fs::create_dir_all(&dir).map_err(|error| {
                SandboxError::caused(
                    Kind::Internal,
                    format!("cannot make {}", dir.display()),
                    error,
                )
            })?;
        }
        let _writing = lock(&self.writing);
        self.put_pod(pod)
    }

    /// Adds a container. Blocking.
    pub fn insert_container(&self, container: ContainerRecord) -> Result<Arc<ContainerRecord>> {
        let _writing = lock(&self.writing);
        // Checked under the lock: a pod that is being stopped gets no more containers.
        match self.view.load().pod(container.pod.as_str()) {
            Some(pod) if pod.state.is_ready() => {}
            Some(_) => {
                let text = format!("pod sandbox {} is not ready", container.pod);
                return Err(SandboxError::new(Kind::WrongState, text));
            }
            None => return Err(SandboxError::no_pod(container.pod.as_str())),
        }
        self.put_container(container)
    }

    /// Changes a pod's record. Blocking.
    pub fn update_pod(
        &self,
        id: &PodId,
        change: impl FnOnce(&mut PodRecord) -> Result<()>,
    ) -> Result<Arc<PodRecord>> {
        let _writing = lock(&self.writing);
        let old = self.view.load().pod(id.as_str()).cloned();
        let old = old.ok_or_else(|| SandboxError::no_pod(id.as_str()))?;
        let mut new = (*old).clone();
        change(&mut new)?;
        if new == *old {
            return Ok(old);
        }
        self.put_pod(new)
    }

    /// Changes a container's record. Blocking.
    pub fn update_container(
        &self,
        id: &ContainerId,
        change: impl FnOnce(&mut ContainerRecord) -> Result<()>,
    ) -> Result<Arc<ContainerRecord>> {
        let _writing = lock(&self.writing);
        let old = self.view.load().container(id.as_str()).cloned();
        let old = old.ok_or_else(|| SandboxError::no_container(id.as_str()))?;
        let mut new = (*old).clone();
        change(&mut new)?;
        if new == *old {
            return Ok(old);
        }
        self.put_container(new)
    }

    /// Forgets a pod whose containers are gone. Blocking.
    pub fn remove_pod(&self, id: &PodId) -> Result<()> {
        let _writing = lock(&self.writing);
        let dir = self.pod_dir(id);
        // The record first: a directory without one is nothing.
        record::remove(&dir.join("pod.rec"), Durability::ProcessEnd).map_err(internal)?;
        match std::fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let text = format!("cannot remove {}", dir.display());
                return Err(SandboxError::caused(Kind::Internal, text, error));
            }
        }
        let old = self.view.load().pod(id.as_str()).cloned();
        self.publish(|view| {
            view.pods.remove(id.as_str());
            view.containers.retain(|_, container| container.pod != *id);
        });
        let kinds = events::of_pod(old.as_ref().map(|pod| &pod.state), None);
        self.tell(kinds, id.as_str(), id, old.as_ref());
        Ok(())
    }

    /// Forgets a container. Blocking.
    pub fn remove_container(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        let _writing = lock(&self.writing);
        let record = self.container_path(pod, id);
        record::remove(&record, Durability::ProcessEnd).map_err(internal)?;
        record::remove(&self.exit_path(pod, id), Durability::ProcessEnd).map_err(internal)?;
        let old = self.view.load().container(id.as_str()).cloned();
        self.publish(|view| {
            view.containers.remove(id.as_str());
        });
        let kind = events::of_container(old.as_ref().map(|container| &container.state), None);
        self.tell(kind.as_slice(), id.as_str(), pod, None);
        Ok(())
    }

    fn put_pod(&self, pod: PodRecord) -> Result<Arc<PodRecord>> {
        let path = self.pod_dir(&pod.id).join("pod.rec");
        record::save(&path, &pod, Durability::ProcessEnd).map_err(internal)?;
        let pod = Arc::new(pod);
        let old = self.view.load().pod(pod.id.as_str()).cloned();
        self.publish(|view| {
            view.pods.insert(pod.id.to_string(), pod.clone());
        });
        let kinds = events::of_pod(old.as_ref().map(|pod| &pod.state), Some(&pod.state));
        self.tell(kinds, pod.id.as_str(), &pod.id, None);
        Ok(pod)
    }

    fn put_container(&self, container: ContainerRecord) -> Result<Arc<ContainerRecord>> {
        let path = self.container_path(&container.pod, &container.id);
        record::save(&path, &container, Durability::ProcessEnd).map_err(internal)?;
        let container = Arc::new(container);
        let old = self.view.load().container(container.id.as_str()).cloned();
        self.publish(|view| {
            view.containers
                .insert(container.id.to_string(), container.clone());
        });
        let before = old.as_ref().map(|container| &container.state);
        let kind = events::of_container(before, Some(&container.state));
        self.tell(kind.as_slice(), container.id.as_str(), &container.pod, None);
        Ok(container)
    }

    fn publish(&self, change: impl FnOnce(&mut View)) {
        let mut view = (**self.view.load()).clone();
        change(&mut view);
        self.view.store(Arc::new(view));
        self.changed.send_replace(());
    }

    /// Waits until the container is not live any more, or is gone.
    pub async fn ended(&self, id: &ContainerId) {
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            let live = self
                .view
                .load()
                .container(id.as_str())
                .is_some_and(|c| c.state.is_live());
            if !live {
                return;
            }
            // The sender lives as long as `self`.
            let _ = changes.changed().await;
        }
    }
}

/// A container's state as its readers see it: what is being removed shows as it was.
pub fn shown(state: &ContainerState) -> &ContainerState {
    match state {
        ContainerState::Removing { last } => last,
        ContainerState::Creating
        | ContainerState::Created
        | ContainerState::Starting
        | ContainerState::Running { .. }
        | ContainerState::Exited { .. } => state,
    }
}

/// Nanoseconds since 1970.
fn now() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn internal(error: berth_store::RecordError) -> SandboxError {
    SandboxError::caused(Kind::Internal, "the record cannot be kept", error)
}
/// Removes what a daemon left that was killed while it made or forgot a pod. Where
/// there are records of containers it stays: somebody has to look at it.
fn remove_empty(dir: &Path) {
    let containers = std::fs::read_dir(dir.join("containers"));
    let records = containers.into_iter().flatten().flatten();
    let mut names = records.map(|entry| entry.file_name());
    let kept = names.any(|name| !atomic_file::is_temporary(&name.to_string_lossy()));
    if !kept && let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(dir = %dir.display(), error = &error as &dyn std::error::Error, "an empty directory stays");
    }
}
