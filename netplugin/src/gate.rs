//! What may run at the same time: one thing for a pod, any number of pods, and
//! GC alone.
//!
//! Source: CNI specification 1.1.0, section 2, "Lifecycle & Ordering": no
//! parallel operations for one container, and no ADD or DEL while GC runs.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The gate that every run of plugins for a pod, and every GC, goes through.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Pods that plugins are being run for.
    busy: BTreeSet<String>,
    collecting: bool,
}

impl Gate {
    /// Waits until nothing else is done for the pod, and no GC runs.
    pub fn pod(&self, id: &str) -> Pass<'_> {
        let mut state = self.state();
        while state.collecting || state.busy.contains(id) {
            state = self.wait(state, Duration::MAX);
        }
        state.busy.insert(id.into());
        Pass {
            gate: self,
            id: Some(id.into()),
        }
    }

    /// Waits until nothing is done for any pod; `None` when something still is
    /// after `patience`. Pods do not wait for who waits here: a plugin that
    /// hangs holds back GC, and nobody else.
    pub fn alone(&self, patience: Duration) -> Option<Pass<'_>> {
        let end = Instant::now() + patience;
        let mut state = self.state();
        while state.collecting || !state.busy.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.wait(state, left);
        }
        state.collecting = true;
        Some(Pass {
            gate: self,
            id: None,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Open until it is dropped.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    /// Whose; `None` is GC's.
    id: Option<String>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        match &self.id {
            Some(id) => _ = state.busy.remove(id),
            None => state.collecting = false,
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const SOON: Duration = Duration::from_millis(20);
    const LATE: Duration = Duration::from_secs(20);

    #[test]
    fn pods_do_not_wait_for_each_other_and_gc_waits_for_all() {
        let gate = Gate::default();
        let (a, b) = (gate.pod("a"), gate.pod("b"));
        assert!(gate.alone(SOON).is_none());
        drop(a);
        assert!(gate.alone(SOON).is_none());
        drop(b);
        assert!(gate.alone(SOON).is_some());
    }

    #[test]
    fn one_pod_waits_for_itself_and_for_gc() {
        let gate = Gate::default();
        let takes: [fn(&Gate) -> Pass<'_>; 2] = [
            |gate| gate.pod("a"),
            |gate| gate.alone(LATE).expect("nobody else is there"),
        ];
        for take in takes {
            let first = take(&gate);
            std::thread::scope(|scope| {
                let (told, hears) = mpsc::channel();
                let gate = &gate;
                scope.spawn(move || {
                    drop(gate.pod("a"));
                    told.send(()).unwrap();
                });
                assert!(hears.recv_timeout(SOON).is_err());
                drop(first);
                hears.recv_timeout(LATE).unwrap();
            });
        }
    }
}
