//! How far a pull is, for metrics and `berth status`, read at any time without waiting.

use crate::digest::Digest;
use arc_swap::ArcSwap;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// How far one layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerStage {
    /// For its turn, or for another pull that fetches it.
    Waiting,
    /// Being fetched and unpacked.
    Fetching,
    /// Unpacked.
    Done,
    /// Another pull had it meanwhile.
    Shared,
}

/// One layer that was not here when the pull began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// Of the layer as it is sent.
    pub digest: Digest,
    /// Compressed bytes received so far.
    pub bytes: u64,
    /// Compressed bytes in all.
    pub bytes_total: u64,
    /// What becomes of it.
    pub stage: LayerStage,
}

#[derive(Debug, Default)]
struct Counters {
    /// What is to be fetched, in the image's order, lowest first.
    missing: Mutex<Vec<LayerProgress>>,
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

    /// The layers that were not here when the pull began, lowest first; empty until the manifest
    /// is here.
    pub fn missing_layers(&self) -> Vec<LayerProgress> {
        self.0.load().missing().clone()
    }

    /// From now on shows what `running` shows.
    pub(crate) fn follow(&self, running: &Progress) {
        self.0.store(running.0.load_full());
    }

    pub(crate) fn enter(&self, stage: Stage) {
        self.0.load().stage.store(stage as u8, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, layers: u32, missing: Vec<(Digest, u64)>) {
        let counters = self.0.load();
        let bytes = missing.iter().map(|(_, bytes)| bytes).sum();
        counters.layers_total.store(layers, Ordering::Relaxed);
        counters.bytes_total.store(bytes, Ordering::Relaxed);
        let waiting = |(digest, bytes_total)| LayerProgress {
            digest,
            bytes: 0,
            bytes_total,
            stage: LayerStage::Waiting,
        };
        *counters.missing() = missing.into_iter().map(waiting).collect();
    }

    pub(crate) fn received(&self, layer: &Digest, bytes: u64) {
        let counters = self.0.load();
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        counters.with(layer, |layer| {
            layer.bytes += bytes;
            layer.stage = LayerStage::Fetching;
        });
    }

    pub(crate) fn thrown_away(&self, layer: &Digest, bytes: u64) {
        let counters = self.0.load();
        counters.bytes.fetch_sub(bytes, Ordering::Relaxed);
        counters.with(layer, |layer| {
            layer.bytes = layer.bytes.saturating_sub(bytes);
            layer.stage = LayerStage::Waiting;
        });
    }

    pub(crate) fn unpacked(&self, layer: &Digest) {
        let counters = self.0.load();
        counters.with(layer, |layer| layer.stage = LayerStage::Done);
    }

    /// Another pull has fetched it: its bytes are not to come any more.
    pub(crate) fn found_here(&self, layer: &Digest) {
        let counters = self.0.load();
        counters.with(layer, |layer| {
            if layer.stage != LayerStage::Shared {
                let bytes = layer.bytes_total;
                counters.bytes_total.fetch_sub(bytes, Ordering::Relaxed);
            }
            layer.stage = LayerStage::Shared;
        });
    }

    pub(crate) fn layer_done(&self) {
        self.0.load().layers.fetch_add(1, Ordering::Relaxed);
    }
}

impl Counters {
    fn missing(&self) -> MutexGuard<'_, Vec<LayerProgress>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, digest: &Digest, change: impl FnOnce(&mut LayerProgress)) {
        let mut missing = self.missing();
        if let Some(layer) = missing.iter_mut().find(|layer| layer.digest == *digest) {
            change(layer);
        }
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
        let (one, two) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
        running.expect(3, vec![(one.clone(), 10), (two.clone(), 5)]);
        running.received(&one, 7);
        running.thrown_away(&one, 3);
        running.found_here(&two);
        running.layer_done();
        let layers = seen.missing_layers();
        assert_eq!((layers[0].bytes, layers[0].stage), (4, LayerStage::Waiting));
        assert_eq!(layers[1].stage, LayerStage::Shared);
        running.unpacked(&one);
        assert_eq!(seen.missing_layers()[0].stage, LayerStage::Done);
        assert_eq!(seen.stage(), Stage::Layers);
        assert_eq!((seen.bytes(), seen.bytes_total()), (4, 10));
        assert_eq!((seen.layers(), seen.layers_total()), (1, 3));
        for stage in Stage::ALL {
            running.enter(stage);
            assert_eq!(seen.stage(), stage);
        }
    }
}
