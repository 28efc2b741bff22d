//! What could not be given back at once: tried again in the background until it
//! is, and shown by `berth status` until then.

use super::Inner;
use crate::container::ContainerRecord;
use crate::error::SandboxError;
use crate::id::PodId;
use crate::operation::lock;
use crate::pod::PodRecord;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// How long until the next round; a step that fails has mostly been waiting for
/// something outside, so sooner would not help.
const ROUND: Duration = Duration::from_secs(5);

/// Something left to do, for `berth status`.
#[derive(Clone, Debug)]
pub struct PendingInfo {
    /// The pod or container.
    pub subject: String,
    /// What is to be done.
    pub what: &'static str,
    /// Why the last try failed.
    pub last_error: String,
    /// Tries so far.
    pub attempts: u32,
}

#[derive(Clone)]
enum Task {
    /// Take a half-made pod apart and forget it.
    Undo(PodId),
    /// Take the network of a pod back that may be gone itself.
    Detach(Arc<PodRecord>),
    /// Remove a half-made container.
    Remove(Arc<ContainerRecord>),
    /// A record that cannot be read: nothing can be done but to say so.
    Unreadable,
}

struct Entry {
    task: Task,
    info: PendingInfo,
}

/// What is left to do.
#[derive(Default)]
pub(super) struct Pending(Mutex<BTreeMap<String, Entry>>);

impl Pending {
    pub fn undo(&self, pod: PodId, error: &SandboxError) {
        self.put(
            pod.to_string(),
            "undo the pod sandbox",
            Task::Undo(pod),
            error,
        );
    }

    pub fn detach(&self, pod: Arc<PodRecord>, error: &SandboxError) {
        self.put(
            pod.id.to_string(),
            "take the network back",
            Task::Detach(pod),
            error,
        );
    }

    pub fn remove(&self, container: Arc<ContainerRecord>, error: &SandboxError) {
        self.put(
            container.id.to_string(),
            "remove the container",
            Task::Remove(container),
            error,
        );
    }

    pub fn unreadable(&self, path: &std::path::Path, error: &SandboxError) {
        self.put(
            path.display().to_string(),
            "a record cannot be read",
            Task::Unreadable,
            error,
        );
    }

    fn put(&self, subject: String, what: &'static str, task: Task, error: &SandboxError) {
        tracing::warn!(%subject, what, error = error.chain(), "left to do in the background");
        let mut entries = lock(&self.0);
        let attempts = entries
            .get(&subject)
            .map_or(1, |entry| entry.info.attempts + 1);
        let info = PendingInfo {
            subject: subject.clone(),
            what,
            last_error: error.chain(),
            attempts,
        };
        entries.insert(subject, Entry { task, info });
    }

    pub fn list(&self) -> Vec<PendingInfo> {
        lock(&self.0)
            .values()
            .map(|entry| entry.info.clone())
            .collect()
    }
}

/// Tries everything again each [`ROUND`], until the service is gone.
pub(super) async fn work(inner: Weak<Inner>) {
    loop {
        tokio::time::sleep(ROUND).await;
        let Some(inner) = inner.upgrade() else { return };
        let tasks: Vec<(String, Task)> = lock(&inner.pending.0)
            .iter()
            .map(|(subject, entry)| (subject.clone(), entry.task.clone()))
            .collect();
        for (subject, task) in tasks {
            let attempts = |inner: &Inner| {
                lock(&inner.pending.0)
                    .get(&subject)
                    .map(|e| e.info.attempts)
            };
            let before = attempts(&inner);
            match task {
                Task::Undo(pod) => inner.undo_pod(&pod).await,
                Task::Detach(pod) => {
                    if let Err(error) = inner.detach(&pod).await {
                        inner.pending.detach(pod, &error);
                    }
                }
                Task::Remove(container) => {
                    if let Err(error) = inner.remove_container(&container, None).await {
                        inner.pending.remove(container, &error);
                    }
                }
                Task::Unreadable => continue,
            }
            // Not tried and failed again: done.
            if attempts(&inner) == before {
                lock(&inner.pending.0).remove(&subject);
            }
        }
    }
}
