//! Looks at everything stored from time to time, slowly, and soon after the node came up.

use super::ImageService;
use crate::layer::{Finding, Pace};
use berth_store::atomic_file::Durability;
use berth_store::{Record, record};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often it is looked whether a scrub is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
const RECORD: &str = "scrub.rec";

/// When and how fast to scrub.
#[derive(Clone, Copy, Debug)]
pub struct Scrubbing {
    /// From the end of one to the begin of the next.
    pub every: Duration,
    /// Read no faster than this.
    pub bytes_per_second: NonZeroU64,
}

/// The last scrub that came to its end.
#[derive(Serialize, Deserialize)]
struct ScrubRecord {
    /// Seconds since 1970.
    ended_at: u64,
    /// The kernel's boot it was in: what was written just before a power cut needs a look.
    boot_id: String,
    damaged: u64,
}

impl Record for ScrubRecord {
    const KIND: &'static str = "scrub";
    const VERSION: u32 = 1;
}

impl ImageService {
    /// Scrubs in the background from now on, as long as any handle of this service is there.
    pub fn begin_scrubbing(&self, scrubbing: Scrubbing) {
        let service = Arc::downgrade(&self.0);
        let spawned = thread::Builder::new()
            .name("image-scrub".into())
            .spawn(move || scrub_on(&service, scrubbing));
        if let Err(error) = spawned {
            super::warn(&error, "no thread to scrub the images");
        }
    }

    /// Scrubs now if that is due, by when the last one ended and in which boot; whether it was.
    /// Blocking, for as long as reading everything takes at that pace.
    pub fn scrub_if_due(&self, scrubbing: Scrubbing) -> bool {
        let is_due = self.is_due(scrubbing);
        if is_due {
            self.scrub(scrubbing);
        }
        is_due
    }

    fn scrub_record(&self) -> PathBuf {
        self.0.settings.lib.join(RECORD)
    }

    fn is_due(&self, scrubbing: Scrubbing) -> bool {
        let Ok(last) = record::load::<ScrubRecord>(&self.scrub_record()) else {
            return true;
        };
        let since = now().saturating_sub(last.ended_at);
        last.boot_id != self.0.layers.boot_id() || since >= scrubbing.every.as_secs()
    }

    fn scrub(&self, scrubbing: Scrubbing) {
        tracing::info!("scrubbing the images");
        let (mut bytes, mut damaged) = (0, 0);
        let mut pace = Pace::limited(scrubbing.bytes_per_second);
        self.verify(&mut pace, &mut |verified| {
            match verified.finding {
                Finding::Whole { bytes: read } => bytes += read,
                Finding::Damaged(_) | Finding::Gone => damaged += 1,
                Finding::Unknown => {}
            }
            true
        });
        tracing::info!(bytes, damaged, "scrubbed the images");
        let record = ScrubRecord {
            ended_at: now(),
            boot_id: self.0.layers.boot_id().to_owned(),
            damaged,
        };
        if let Err(error) = record::save(&self.scrub_record(), &record, Durability::ProcessEnd) {
            super::warn(&error, "the scrub is not recorded and will be repeated");
        }
    }
}

fn scrub_on(service: &Weak<super::Inner>, scrubbing: Scrubbing) {
    loop {
        // Not in the way of a start.
        thread::sleep(LOOK_EVERY);
        let Some(inner) = service.upgrade() else {
            return;
        };
        ImageService(inner).scrub_if_due(scrubbing);
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
