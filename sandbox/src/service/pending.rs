//! What could not be given back at once: tried again in the background until it
//! is, and shown by `berth status` until then.

use super::Inner;
use crate::container::ContainerRecord;
use crate::error::SandboxError;
use crate::id::PodId;
use crate::operation::lock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long until the next round; a step that fails has mostly been waiting for
/// something outside, so sooner would not help.
const ROUND: Duration = Duration::from_secs(5);

/// Longest pause between two tries at a network: each runs the plugins again,
/// and one whose plugin is gone for good costs no more than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// How many networks are tried at the same time; plugins that hang take long.
const NETWORKS: usize = 8;

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
    Detach,
    /// Remove a half-made container.
    Remove(Arc<ContainerRecord>),
    /// A record that cannot be read: nothing can be done but to say so.
    Unreadable,
}

struct Entry {
    task: Task,
    info: PendingInfo,
    /// Not before.
    next: Instant,
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

    pub fn detach(&self, pod: &str, error: &SandboxError) {
        self.put(pod.to_owned(), "take the network back", Task::Detach, error);
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
        let pause = match task {
            Task::Detach => (ROUND * (1 << (attempts - 1).min(6))).min(LONGEST_PAUSE),
            Task::Undo(_) | Task::Remove(_) | Task::Unreadable => Duration::ZERO,
        };
        let next = Instant::now() + pause;
        entries.insert(subject, Entry { task, info, next });
    }

    pub fn list(&self) -> Vec<PendingInfo> {
        lock(&self.0)
            .values()
            .map(|entry| entry.info.clone())
            .collect()
    }
}

/// Tries everything again each [`ROUND`], networks less and less often, until the
/// service is gone.
pub(super) async fn work(inner: Weak<Inner>) {
    let networks = Arc::new(Semaphore::new(NETWORKS));
    loop {
        tokio::time::sleep(ROUND).await;
        let Some(inner) = inner.upgrade() else { return };
        let now = Instant::now();
        let tasks: Vec<(String, Task)> = lock(&inner.pending.0)
            .iter()
            .filter(|(_, entry)| entry.next <= now)
            .map(|(subject, entry)| (subject.clone(), entry.task.clone()))
            .collect();
        for (subject, task) in tasks {
            if let Task::Detach = task {
                // Beside the rest: its plugins may take minutes.
                let Ok(turn) = networks.clone().try_acquire_owned() else {
                    continue;
                };
                if let Some(entry) = lock(&inner.pending.0).get_mut(&subject) {
                    entry.next = now + LONGEST_PAUSE * 2;
                }
                let inner = inner.clone();
                tokio::spawn(async move {
                    match inner.retry_detach(&subject).await {
                        Ok(()) => _ = lock(&inner.pending.0).remove(&subject),
                        Err(error) => inner.pending.detach(&subject, &error),
                    }
                    drop(turn);
                });
                continue;
            }
            let attempts = |inner: &Inner| {
                lock(&inner.pending.0)
                    .get(&subject)
                    .map(|e| e.info.attempts)
            };
            let before = attempts(&inner);
            match task {
                Task::Undo(pod) => inner.undo_pod(&pod).await,
                Task::Remove(container) => {
                    if let Err(error) = inner.remove_container(&container, None).await {
                        inner.pending.remove(container, &error);
                    }
                }
                Task::Unreadable | Task::Detach => continue,
            }
            // Not tried and failed again: done.
            if attempts(&inner) == before {
                lock(&inner.pending.0).remove(&subject);
            }
        }
    }
}
