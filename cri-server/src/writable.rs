//! How much containers have written, measured in the background.
//!
//! A walk over what a container wrote takes as long as it likes, so nobody waits
//! for it longer than a moment: who asks gets the last measurement, with the
//! time it was made at. One walk at a time; what took long is measured less often.

use berth_image_service::service::ImageService;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Mutex as Turn;

/// How long a measurement counts: the kubelet asks every ten seconds at the most
/// often. Source: evictionMonitoringPeriod, kubelet.
const COUNTS_FOR: Duration = Duration::from_secs(10);

/// How much of the time may go into measuring one layer: a walk that took a
/// second is repeated after twenty.
const REST: u32 = 20;

/// How long who asks waits for a round that runs.
const PATIENCE: Duration = Duration::from_millis(200);

/// What one container has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Nanoseconds since 1970: when it was measured.
    pub at: i64,
    pub bytes: u64,
    pub inodes: u64,
}

struct Measured {
    written: Option<Written>,
    again: Instant,
}

type Known = Arc<Mutex<HashMap<String, Measured>>>;

/// The last measurement of each container.
pub struct WritableLayers {
    service: ImageService,
    known: Known,
    turn: Arc<Turn<()>>,
}

impl WritableLayers {
    /// Knows nothing yet.
    pub fn new(service: ImageService) -> Self {
        Self {
            service,
            known: Known::default(),
            turn: Arc::default(),
        }
    }

    /// Where the layers are.
    pub fn dir(&self) -> PathBuf {
        self.service.snapshots().dir().to_owned()
    }

    /// What each of the containers has written, as far as it is known within a moment.
    pub async fn of(&self, containers: &[&str]) -> HashMap<String, Written> {
        let now = Instant::now();
        let due: Vec<String> = {
            let known = lock(&self.known);
            let is_due = |id: &&&str| known.get(**id).is_none_or(|measured| measured.again <= now);
            containers
                .iter()
                .filter(is_due)
                .map(|id| (*id).to_owned())
                .collect()
        };
        if !due.is_empty() {
            let round = tokio::spawn(measure(
                self.service.clone(),
                self.known.clone(),
                self.turn.clone(),
                due,
            ));
            // It goes on without us.
            let _ = tokio::time::timeout(PATIENCE, round).await;
        }
        let known = lock(&self.known);
        let each = containers.iter().filter_map(|id| {
            let written = known.get(*id)?.written.clone()?;
            Some(((*id).to_owned(), written))
        });
        each.collect()
    }
}

async fn measure(service: ImageService, known: Known, turn: Arc<Turn<()>>, due: Vec<String>) {
    // Somebody else's round is likely to measure the same.
    let Ok(turn) = turn.try_lock_owned() else {
        return;
    };
    let round = move || {
        let _turn = turn;
        for id in due {
            let begun = Instant::now();
            // One that is removed meanwhile has written nothing any more.
            let written = service.snapshots().usage(&id).ok().map(|sums| Written {
                at: now(),
                bytes: sums.bytes,
                inodes: sums.inodes,
            });
            let rest = COUNTS_FOR.max(begun.elapsed().saturating_mul(REST));
            let again = Instant::now() + rest;
            lock(&known).insert(id, Measured { written, again });
        }
        let forget = Instant::now();
        // What nobody asked for since is most likely gone.
        lock(&known).retain(|_, measured| measured.again + COUNTS_FOR * REST > forget);
    };
    // A panic in there is a bug, and the next round tries again.
    let _ = tokio::task::spawn_blocking(round).await;
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}
