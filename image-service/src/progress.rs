//! How far a pull is, for metrics and `berth status`, read at any time without waiting.

use arc_swap::ArcSwap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What a pull is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing yet.
    #[default]
    Waiting,
    /// Asking what the reference means, and for the manifest.
    Manifest,
    /// Fetching the config.
    Config,
    /// Fetching, checking and unpacking layers.
    Layers,
    /// Having everything reach the disk.
    Sync,
    /// Writing the image's record.
    Record,
    /// Over, well or not.
    Done,
}

impl Stage {
    const ALL: [Stage; 7] = [
        Stage::Waiting,
        Stage::Manifest,
        Stage::Config,
        Stage::Layers,
        Stage::Sync,
        Stage::Record,
        Stage::Done,
    ];

    /// One word, for labels.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Waiting => "waiting",
            Stage::Manifest => "manifest",
            Stage::Config => "config",
            Stage::Layers => "layers",
            Stage::Sync => "sync",
            Stage::Record => "record",
            Stage::Done => "done",
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    stage: AtomicU8,
    bytes: AtomicU64,
    bytes_total: AtomicU64,
    layers: AtomicU32,
    layers_total: AtomicU32,
}

/// The counters of one pull; clones show the same pull, also when that joined another's.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<ArcSwap<Counters>>);

impl Progress {
    /// A pull that has not begun.
    pub fn new() -> Progress {
        Progress::default()
    }

    /// What it is doing.
    pub fn stage(&self) -> Stage {
        Stage::ALL[usize::from(self.0.load().stage.load(Ordering::Relaxed))]
    }

    /// Compressed layer bytes received so far. Goes back where a layer is fetched anew.
    pub fn bytes(&self) -> u64 {
        self.0.load().bytes.load(Ordering::Relaxed)
    }

    /// Compressed bytes of the layers that are to be fetched; 0 until the manifest is here.
    pub fn bytes_total(&self) -> u64 {
        self.0.load().bytes_total.load(Ordering::Relaxed)
    }

    /// Layers that are unpacked, those that were here before included.
    pub fn layers(&self) -> u32 {
        self.0.load().layers.load(Ordering::Relaxed)
    }

    /// Layers of the image; 0 until the manifest is here.
    pub fn layers_total(&self) -> u32 {
        self.0.load().layers_total.load(Ordering::Relaxed)
    }

    /// From now on shows what `running` shows.
    pub(crate) fn follow(&self, running: &Progress) {
        self.0.store(running.0.load_full());
    }

    pub(crate) fn enter(&self, stage: Stage) {
        self.0.load().stage.store(stage as u8, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, layers: u32, bytes: u64) {
        let counters = self.0.load();
        counters.layers_total.store(layers, Ordering::Relaxed);
        counters.bytes_total.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.0.load().bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn thrown_away(&self, bytes: u64) {
        self.0.load().bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn layer_done(&self) {
        self.0.load().layers.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_joins_sees_the_pull_that_runs() {
        let (running, joined) = (Progress::new(), Progress::new());
        let seen = joined.clone();
        running.enter(Stage::Layers);
        joined.follow(&running);
        running.expect(2, 10);
        running.received(7);
        running.thrown_away(3);
        running.layer_done();
        assert_eq!(seen.stage(), Stage::Layers);
        assert_eq!((seen.bytes(), seen.bytes_total()), (4, 10));
        assert_eq!((seen.layers(), seen.layers_total()), (1, 2));
        for stage in Stage::ALL {
            running.enter(stage);
            assert_eq!(seen.stage(), stage);
        }
    }
}
