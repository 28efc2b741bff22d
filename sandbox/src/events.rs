//! What happens to pods and containers, told to whoever listens.
//!
//! An event is made where a record is swapped into the view, so it is told once,
//! in order, and says what the view says. Nothing is kept for nobody: without a
//! listener no event is made. A listener that does not keep up is told how much
//! it missed; what it shall do then is list.
//!
//! Source: CRI `GetContainerEvents`; KEP-3386.

use crate::container::{ContainerRecord, ContainerState};
use crate::pod::{PodRecord, PodState};
use std::sync::Arc;
use tokio::sync::broadcast;

/// Events that a listener may be behind. A node starts a few hundred containers
/// at once at most, with three events each.
const BEHIND: usize = 1024;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// Something that happened to a container, or to a sandbox, which CRI counts among them.
#[derive(Clone, Debug)]
pub struct Event {
    pub kind: EventKind,
    /// The container's ID, or the sandbox's.
    pub id: String,
    /// Nanoseconds since 1970.
    pub at: i64,
    /// The sandbox as it is now, or was last; `None` when its record cannot be found.
    pub pod: Option<Arc<PodRecord>>,
    /// The sandbox's containers as they are now, those being made left out.
    pub containers: Vec<Arc<ContainerRecord>>,
}

/// Why a listener hears no more.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Deaf {
    #[error("{missed} events were missed: list the containers and listen again")]
    Behind { missed: u64 },
    #[error("the daemon is stopping")]
    Over,
}

/// Hears every event from when it was made.
pub struct Listener(broadcast::Receiver<Arc<Event>>);

impl Listener {
    /// The next event.
    ///
    /// # Errors
    /// `Behind` when it did not keep up, `Over` when there will be none.
    pub async fn next(&mut self) -> Result<Arc<Event>, Deaf> {
        self.0.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(missed) => Deaf::Behind { missed },
            broadcast::error::RecvError::Closed => Deaf::Over,
        })
    }
}

/// Where events are told.
pub(crate) struct Events(broadcast::Sender<Arc<Event>>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(BEHIND))
    }
}

impl Events {
    pub fn listen(&self) -> Listener {
        Listener(self.0.subscribe())
    }

    pub fn is_heard(&self) -> bool {
        self.0.receiver_count() > 0
    }

    pub fn tell(&self, event: Event) {
        // Without a listener there is nobody to tell.
        let _ = self.0.send(Arc::new(event));
    }
}

/// What a container's new state says to a listener that knew the old one.
pub(crate) fn of_container(
    old: Option<&ContainerState>,
    new: Option<&ContainerState>,
) -> Option<EventKind> {
    use ContainerState as S;
    match (old, new) {
        (Some(S::Creating) | None, Some(S::Created)) => Some(EventKind::Created),
        (Some(S::Starting | S::Created), Some(S::Running { .. })) => Some(EventKind::Started),
        (Some(S::Created | S::Starting | S::Running { .. }), Some(S::Exited { .. })) => {
            Some(EventKind::Stopped)
        }
        (Some(S::Removing { last }), None) if **last != S::Creating => Some(EventKind::Deleted),
        _ => None,
    }
}

/// The same for a sandbox: it starts with being made.
pub(crate) fn of_pod(old: Option<&PodState>, new: Option<&PodState>) -> &'static [EventKind] {
    use PodState as S;
    match (old, new) {
        (_, Some(S::Ready)) if old != Some(&S::Ready) => &[EventKind::Created, EventKind::Started],
        (Some(S::Ready), Some(S::Stopping | S::Stopped)) => &[EventKind::Stopped],
        (Some(S::Removing), None) => &[EventKind::Deleted],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Exit;

    #[test]
    fn every_step_of_a_life_is_told_once() {
        use ContainerState as S;
        let running = S::Running {
            since: 1,
            pid: 2,
            start_ticks: 3,
        };
        let exited = S::Exited {
            since: Some(1),
            at: 2,
            exit: Exit {
                code: 0,
                reason: "Completed".into(),
                message: String::new(),
            },
        };
        let removing = S::Removing {
            last: Box::new(exited.clone()),
        };
        let life = [
            Some(S::Creating),
            Some(S::Created),
            Some(S::Starting),
            Some(running),
            Some(exited.clone()),
            Some(exited),
            Some(removing),
            None,
        ];
        let told: Vec<_> = life
            .windows(2)
            .filter_map(|pair| of_container(pair[0].as_ref(), pair[1].as_ref()))
            .collect();
        use EventKind as K;
        assert_eq!(told, [K::Created, K::Started, K::Stopped, K::Deleted]);
        // What was never listed was never there.
        let undone = S::Removing {
            last: Box::new(S::Creating),
        };
        assert_eq!(of_container(Some(&undone), None), None);
    }

    #[test]
    fn a_sandbox_is_created_and_started_at_once() {
        use PodState as S;
        assert_eq!(of_pod(Some(&S::Creating), Some(&S::Ready)).len(), 2);
        assert_eq!(of_pod(Some(&S::Ready), Some(&S::Ready)), []);
        assert_eq!(
            of_pod(Some(&S::Ready), Some(&S::Stopping)),
            [EventKind::Stopped]
        );
        assert_eq!(of_pod(Some(&S::Stopping), Some(&S::Stopped)), []);
        assert_eq!(of_pod(Some(&S::Removing), None), [EventKind::Deleted]);
        assert_eq!(of_pod(Some(&S::Creating), None), []);
    }

    #[tokio::test]
    async fn who_does_not_keep_up_is_told_how_much_was_missed() {
        let events = Events::default();
        let mut listener = events.listen();
        for _ in 0..BEHIND + 5 {
            events.tell(Event {
                kind: EventKind::Created,
                id: String::new(),
                at: 0,
                pod: None,
                containers: Vec::new(),
            });
        }
        assert_eq!(
            listener.next().await.unwrap_err(),
            Deaf::Behind { missed: 5 }
        );
        assert!(listener.next().await.is_ok(), "the rest is still there");
    }
}
