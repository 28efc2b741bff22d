//! One fetch of one thing at a time: who comes second waits, then looks for himself.
//!
//! The one that fetches holds a [`Flight`]; the others wait for it to land, which tells nothing
//! about how it ended. Waiting takes no thread and holds no limit.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// What is being fetched now.
#[derive(Debug)]
pub(crate) struct Flights<K>(Arc<Mutex<HashMap<K, watch::Receiver<()>>>>);

impl<K> Clone for Flights<K> {
    fn clone(&self) -> Self {
        Flights(Arc::clone(&self.0))
    }
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Flights(Arc::default())
    }
}

/// The right to fetch one thing, until dropped.
pub(crate) struct Flight<K: Eq + Hash> {
    flights: Flights<K>,
    key: K,
    _landing: watch::Sender<()>,
}

impl<K: Eq + Hash> Drop for Flight<K> {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
    }
}

/// What became of [`Flights::board`].
pub(crate) enum Boarding<K: Eq + Hash> {
    /// Nobody fetches it: the caller does.
    Lead(Flight<K>),
    /// Somebody does; `landed` says when it is over.
    Wait(Waiting),
}

/// Somebody else's flight.
pub(crate) struct Waiting(watch::Receiver<()>);

impl Waiting {
    /// Until the other one is done, well or not.
    pub async fn landed(mut self) {
        // Nothing is ever sent: the sender's end is the news.
        while self.0.changed().await.is_ok() {}
    }
}

impl<K> Flights<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, watch::Receiver<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone> Flights<K> {
    /// Takes the lead for `key`, or tells whom to wait for.
    pub fn board(&self, key: &K) -> Boarding<K> {
        let mut running = self.lock();
        if let Some(landing) = running.get(key) {
            return Boarding::Wait(Waiting(landing.clone()));
        }
        let (sender, receiver) = watch::channel(());
        running.insert(key.clone(), receiver);
        Boarding::Lead(Flight {
            flights: self.clone(),
            key: key.clone(),
            _landing: sender,
        })
    }
}

impl<K: Eq + Hash> Flights<K> {
    /// Whoever fetches `key` now.
    pub fn running(&self, key: &K) -> Option<Waiting> {
        self.lock().get(key).cloned().map(Waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn one_leads_at_a_time_and_the_next_after_it() {
        let flights: Flights<u32> = Flights::default();
        let (aloft, led) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let each = (0..50).map(|_| {
            let (flights, aloft, led) = (flights.clone(), Arc::clone(&aloft), Arc::clone(&led));
            async move {
                loop {
                    match flights.board(&7) {
                        Boarding::Lead(_flight) => {
                            assert_eq!(aloft.fetch_add(1, Ordering::SeqCst), 0);
                            tokio::task::yield_now().await;
                            aloft.fetch_sub(1, Ordering::SeqCst);
                            led.fetch_add(1, Ordering::SeqCst);
                            return;
                        }
                        Boarding::Wait(waiting) => waiting.landed().await,
                    }
                }
            }
        });
        futures_util::future::join_all(each).await;
        assert_eq!(led.load(Ordering::SeqCst), 50);
        assert!(flights.lock().is_empty());
        let other = flights.board(&1);
        assert!(matches!(flights.board(&2), Boarding::Lead(_)));
        assert!(matches!(flights.board(&1), Boarding::Wait(_)));
        drop(other);
        assert!(matches!(flights.board(&1), Boarding::Lead(_)));
    }
}
