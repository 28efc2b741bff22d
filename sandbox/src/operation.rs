//! Mutating calls as operations that can be joined.
//!
//! caller ──┐
//! caller ──┴─ key ──> one running task, in a named stage ──> one outcome for all
//!
//! A kubelet that timed out and calls again attaches to what still runs; "name
//! is reserved" does not exist. The task belongs to nobody's connection: it runs
//! to its end. What it meant is in the object's record before the kernel is
//! touched, so after a crash `recovery` undoes or finishes it.

use crate::error::{Kind, Result, SandboxError};
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;
use tracing::Instrument as _;

/// What makes two calls the same operation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The RPC's name.
    pub kind: &'static str,
    /// The object: a name or an ID.
    pub object: String,
}

/// What a finished operation hands to everybody who waited: an ID, or nothing.
pub type Outcome = Result<String>;

/// Called with kind, stage and how long the stage took, when a stage ends.
pub type StageObserver = dyn Fn(&'static str, &'static str, Duration) + Send + Sync;

/// One running operation, for `berth status`.
#[derive(Clone, Debug)]
pub struct OperationInfo {
    /// The RPC's name.
    pub kind: &'static str,
    /// What it is about, for people.
    pub subject: String,
    /// What it is doing.
    pub stage: &'static str,
    /// When it began.
    pub started_at: SystemTime,
    /// When its stage began.
    pub stage_started_at: SystemTime,
    /// How many calls wait for it.
    pub callers: u32,
}

struct Running {
    kind: &'static str,
    subject: String,
    started_at: SystemTime,
    stage: Mutex<(&'static str, SystemTime, Instant)>,
    callers: AtomicU32,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// The operations that are running now.
#[derive(Clone)]
pub struct Operations {
    running: Arc<Mutex<HashMap<Key, Arc<Running>>>>,
    observer: Arc<StageObserver>,
}

/// Handed to an operation's work: it says which stage it has reached.
#[derive(Clone)]
pub struct Stage {
    running: Arc<Running>,
    observer: Arc<StageObserver>,
}

impl Stage {
    /// The operation is in the stage `name` from now on.
    pub fn enter(&self, name: &'static str) {
        let mut stage = lock(&self.running.stage);
        (self.observer)(self.running.kind, stage.0, stage.2.elapsed());
        *stage = (name, SystemTime::now(), Instant::now());
        drop(stage);
        tracing::debug!(kind = self.running.kind, stage = name, subject = %self.running.subject);
    }
}

struct Waiting<'a>(&'a Running);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Operations {
    /// None running. `observer` hears how long each stage took.
    pub fn new(observer: Arc<StageObserver>) -> Self {
        Self {
            running: Arc::default(),
            observer,
        }
    }

    /// Joins the operation `key` where it runs, else begins it with `work`;
    /// returns its outcome. Dropping the returned future leaves the work running.
    ///
    /// # Errors
    /// Those of `work`; `Internal` if it panicked.
    pub async fn join_or_begin<F, W>(&self, key: Key, subject: String, work: W) -> Outcome
    where
        W: FnOnce(Stage) -> F,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let running = self.find_or_spawn(key, subject, work);
        running.callers.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&running);
        let mut outcome = running.outcome.clone();
        let lost = || SandboxError::new(Kind::Internal, format!("{} was abandoned", running.kind));
        let ready = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| lost())?;
        ready.clone().unwrap_or_else(|| Err(lost()))
    }

    fn find_or_spawn<F, W>(&self, key: Key, subject: String, work: W) -> Arc<Running>
    where
        W: FnOnce(Stage) -> F,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let mut map = lock(&self.running);
        if let Some(running) = map.get(&key) {
            tracing::info!(kind = key.kind, %subject, "joined the running operation");
            return running.clone();
        }
        let (sender, outcome) = watch::channel(None);
        let now = SystemTime::now();
        let running = Arc::new(Running {
            kind: key.kind,
            subject,
            started_at: now,
            stage: Mutex::new(("begin", now, Instant::now())),
            callers: AtomicU32::new(0),
            outcome,
        });
        map.insert(key.clone(), running.clone());
        drop(map);

        let stage = Stage {
            running: running.clone(),
            observer: self.observer.clone(),
        };
        let last = stage.clone();
        let task = tokio::spawn(work(stage).in_current_span());
        let map = self.running.clone();
        tokio::spawn(async move {
            let kind = key.kind;
            let outcome = task.await.unwrap_or_else(|panic| {
                Err(SandboxError::caused(
                    Kind::Internal,
                    format!("{kind} broke off"),
                    panic,
                ))
            });
            last.enter("end");
            // Out of the map first: who comes after the outcome is known begins anew
            // and finds the object in its new state.
            lock(&map).remove(&key);
            sender.send_replace(Some(outcome));
        });
        running
    }

    /// What is running, oldest first.
    pub fn list(&self) -> Vec<OperationInfo> {
        let mut list: Vec<OperationInfo> = lock(&self.running)
            .values()
            .map(|running| {
                let stage = lock(&running.stage);
                OperationInfo {
                    kind: running.kind,
                    subject: running.subject.clone(),
                    stage: stage.0,
                    started_at: running.started_at,
                    stage_started_at: stage.1,
                    callers: running.callers.load(Ordering::Relaxed),
                }
            })
            .collect();
        list.sort_by_key(|operation| operation.started_at);
        list
    }
}

/// Every critical section in this crate leaves its data whole at each step, so
/// a panic elsewhere is no reason to stop.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn operations() -> Operations {
        Operations::new(Arc::new(|_, _, _| {}))
    }

    fn key() -> Key {
        Key {
            kind: "RunPodSandbox",
            object: "uid/web/0".into(),
        }
    }

    #[tokio::test]
    async fn calls_with_the_same_key_share_one_outcome() {
        let operations = operations();
        let begun = Arc::new(AtomicUsize::new(0));
        let (go, gate) = watch::channel(false);
        let call = || {
            let (begun, mut gate) = (begun.clone(), gate.clone());
            operations.join_or_begin(key(), "web".into(), move |stage| async move {
                begun.fetch_add(1, Ordering::Relaxed);
                stage.enter("waiting");
                gate.wait_for(|open| *open).await.unwrap();
                Ok("id".to_owned())
            })
        };
        let (one, two) = tokio::join!(async { tokio::join!(call(), call()) }, async {
            while operations
                .list()
                .first()
                .is_none_or(|o| o.stage != "waiting" || o.callers != 2)
            {
                tokio::task::yield_now().await;
            }
            go.send_replace(true);
        });
        let ((), (first, second)) = (two, one);
        assert_eq!(
            (first.unwrap(), second.unwrap()),
            ("id".to_owned(), "id".to_owned())
        );
        assert_eq!(begun.load(Ordering::Relaxed), 1);
        assert!(operations.list().is_empty());
    }

    #[tokio::test]
    async fn a_caller_that_hangs_up_leaves_the_work_running() {
        let operations = operations();
        let (done, mut finished) = watch::channel(false);
        let (go, mut gate) = watch::channel(false);
        {
            let call = operations.join_or_begin(key(), "web".into(), move |_| async move {
                gate.wait_for(|open| *open).await.unwrap();
                done.send_replace(true);
                Ok(String::new())
            });
            tokio::select! {
                biased;
                _ = call => panic!("finished before it was let go"),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_eq!(operations.list().len(), 1);
        go.send_replace(true);
        finished.wait_for(|done| *done).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_an_error_for_the_callers_and_frees_the_key() {
        let operations = operations();
        let error = operations
            .join_or_begin(key(), "web".into(), |_| async {
                panic!("broken on purpose")
            })
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Internal);
        let again = operations.join_or_begin(key(), "web".into(), |_| async { Ok("id".into()) });
        assert_eq!(again.await.unwrap(), "id");
    }
}
