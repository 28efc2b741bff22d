//! Which hosts are set aside for a while because they failed.
//!
//! A host that cannot be reached, stalls or answers 5xx goes to the end of the order, for longer
//! with each failure in a row, or for as long as its `Retry-After` says; the first success puts
//! it back. It is still asked when nobody else has what is wanted, so a registry whose every
//! host is in trouble behaves as if nothing were remembered. Kept in memory: a restart forgets.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the first failure sets a host aside; each further one doubles it.
const FIRST: Duration = Duration::from_secs(10);
/// The longest time aside, also where Retry-After wants more.
const LONGEST: Duration = Duration::from_secs(300);
/// Most hosts remembered; each is one an operator configured, or a registry that was asked for.
const MAX_HOSTS: usize = 1024;

#[derive(Clone, Debug)]
struct Trouble {
    until: Instant,
    failures: u32,
    why: String,
}

/// What is remembered of hosts, by `scheme://host:port/path`.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<HashMap<String, Trouble>>);

impl Health {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Trouble>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets `host` aside. Failures while it is aside already do not count again: many layers
    /// fail at the same moment.
    pub fn failed(&self, host: &str, retry_after: Option<Duration>, why: String, now: Instant) {
        let mut hosts = self.lock();
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(host) {
            hosts.retain(|_, trouble| trouble.until > now);
            if hosts.len() >= MAX_HOSTS {
                hosts.clear();
            }
        }
        let trouble = hosts.entry(host.to_owned()).or_insert(Trouble {
            until: now,
            failures: 0,
            why: String::new(),
        });
        if trouble.until > now {
            return;
        }
        let aside = match retry_after {
            Some(wanted) => wanted,
            None => FIRST.saturating_mul(1 << trouble.failures.min(10)),
        };
        trouble.failures += 1;
        trouble.until = now + aside.min(LONGEST);
        trouble.why = why;
    }

    /// `host` did what it was asked for.
    pub fn succeeded(&self, host: &str) {
        self.lock().remove(host);
    }

    /// For how long `host` is still set aside, and why; `None` when it is not.
    pub fn aside(&self, host: &str, now: Instant) -> Option<(Duration, String)> {
        let hosts = self.lock();
        let trouble = hosts.get(host)?;
        let left = trouble.until.checked_duration_since(now)?;
        (!left.is_zero()).then(|| (left, trouble.why.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_aside_for_longer_each_time_until_it_succeeds() {
        let health = Health::default();
        let mut now = Instant::now();
        for expected in [10, 20, 40, 80, 160, 300, 300] {
            health.failed("a", None, "why".into(), now);
            // Another layer's failure at the same moment.
            health.failed("a", None, "other".into(), now);
            let (left, why) = health.aside("a", now).unwrap();
            assert_eq!((left.as_secs(), &*why), (expected, "why"));
            now += left;
            assert_eq!(health.aside("a", now), None);
        }
        assert_eq!(health.aside("b", now), None);
        health.succeeded("a");
        health.failed("a", Some(Duration::from_secs(3)), "429".into(), now);
        assert_eq!(health.aside("a", now).unwrap().0.as_secs(), 3);
        health.failed("b", Some(Duration::from_secs(9999)), "429".into(), now);
        assert_eq!(health.aside("b", now).unwrap().0, LONGEST);
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let health = Health::default();
        let now = Instant::now();
        for n in 0..3 * MAX_HOSTS {
            health.failed(&n.to_string(), None, String::new(), now);
        }
        assert!(health.lock().len() <= MAX_HOSTS);
    }
}
