//! The layers of an image: which are missing, and how each comes here.
//!
//! blob ──> channel ──> verify ──> decompress ──> verify the diff ID ──> unpack
//!
//! The network's side is async and continues by itself where a connection or a host fails; the
//! other is one blocking thread for each layer. The channel between them bounds what a layer has
//! in memory.
//!
//! A layer that turns out to lean on its parents (an entry without its parent directories, a hard
//! link to below) while they are not all here holds its stream at that entry: the channel fills,
//! the connection is no longer read, and goes on when the parents of this image are unpacked. A
//! connection that the registry closes meanwhile continues where it was. Who holds takes no
//! permit, and no longer the flight of its diff ID but that of its chain ID, so it waits only for
//! shorter chains, and whoever fetches those waits for still shorter ones: there is no circle,
//! also not over several pulls.

use super::chunks::{Chunk, Chunks, Judged};
use super::error::unpack_kind;
use super::{CHUNKS_AHEAD, Described, Earlier, Fetched, Job, Kind, PullError};
use crate::content::VerifyingReader;
use crate::digest::Digest;
use crate::flight::{Boarding, Flight};
use crate::image::ImageRecord;
use crate::layer::{Ingest, LayerId, LayerInfo, Lease, WaitForParents, chain_id};
use crate::manifest::{Descriptor, LayerPacking, Manifest};
use crate::progress::Stage;
use crate::registry::{Blob, RegistryError, Turn};
use crate::unpack::{Compression, UnpackError};
use berth_store::crash;
use futures_util::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{SemaphorePermit, mpsc, oneshot, watch};

/// The diff IDs of an image whose layers are here or will not come before the others are done.
type Settled = watch::Sender<BTreeSet<Digest>>;

/// What a layer holds while it is fetched.
struct Hold<'a> {
    by_diff_id: Option<Flight<Digest>>,
    /// Once it turned out to lean.
    by_chain: Option<Flight<Digest>>,
    permit: Option<SemaphorePermit<'a>>,
}

/// One distinct layer to fetch.
struct Wanted {
    descriptor: Descriptor,
    compression: Compression,
    /// Of the image's layers up to this one.
    diff_ids: Vec<Digest>,
    /// The layers below, lowest first, where all are here.
    parents: Option<Vec<LayerId>>,
}

impl Job {
    /// Fetches and unpacks what is missing and gives the record to write, everything it names
    /// being on disk and synced.
    pub async fn fetch(self: &Arc<Self>, described: Described) -> Result<Fetched, PullError> {
        self.progress.enter(Stage::Layers);
        let lease = Arc::new(self.layers.lease());
        let diff_ids = &described.config.diff_ids;
        let manifest = &described.manifest;
        let mut wanted = Vec::new();
        let mut asked = BTreeSet::new();
        let mut here = Some(Vec::new());
        for nth in 0..diff_ids.len() {
            let found = self.layers.find(&lease, &diff_ids[..=nth]);
            // The same layer may be there several times; empty ones usually are.
            if asked.insert(&diff_ids[nth]) && found.is_none() {
                wanted.push(wanted_layer(manifest, diff_ids, nth, here.clone()));
            }
            here = here.zip(found).map(|(mut below, found)| {
                below.push(found.id);
                below
            });
        }
        // What is larger as it is sent is larger still when it is unpacked. Not a byte of any
        // layer is fetched then.
        if let Some(limit_bytes) = self.max_layer_bytes
            && let Some(layer) = wanted
                .iter()
                .find(|layer| layer.descriptor.size > limit_bytes)
        {
            return Err(PullError::Unpack {
                image: self.image(),
                layer: layer.descriptor.digest.clone(),
                source: UnpackError::TooLarge { limit_bytes },
            });
        }
        let missing = wanted
            .iter()
            .map(|layer| (layer.descriptor.digest.clone(), layer.descriptor.size));
        self.progress.expect(asked.len() as u32, missing.collect());
        for _ in wanted.len()..asked.len() {
            self.progress.layer_done();
        }
        let mut settled: BTreeSet<Digest> = diff_ids.iter().cloned().collect();
        for layer in &wanted {
            settled.retain(|diff_id| layer.diff_ids.last() != Some(diff_id));
        }
        // Whoever commits the image waits for the disk no more then.
        let documents: Vec<Digest> = described.documents.keys().cloned().collect();
        let content = Arc::clone(&self.content);
        let syncing = tokio::task::spawn_blocking(move || content.sync(&documents));
        self.fetch_layers(&lease, wanted, settled).await?;
        let layers = self.fetch_leaning(&lease, manifest, diff_ids).await?;
        self.progress.enter(Stage::Sync);
        crash::point("pull_image.before_sync");
        syncing
            .await
            .map_err(|_| self.aborted())?
            .map_err(|source| PullError::Content {
                image: self.image(),
                source,
            })?;
        let store = self.layers.clone();
        let ids: Vec<LayerId> = layers.iter().map(|info| info.id.clone()).collect();
        tokio::task::spawn_blocking(move || store.sync(&ids))
            .await
            .map_err(|_| self.aborted())?
            .map_err(|source| PullError::Layers {
                image: self.image(),
                source,
            })?;
        let distinct: BTreeMap<&LayerId, u64> =
            layers.iter().map(|info| (&info.id, info.bytes)).collect();
        let record = ImageRecord {
            id: manifest.config.digest.clone(),
            repo_tags: self.reference.repo_tag().into_iter().collect(),
            repo_digests: BTreeSet::from([self.reference.repo_digest(&described.named)]),
            size_bytes: distinct.values().sum(),
            layers: layers.iter().map(|info| info.id.clone()).collect(),
            config: described.config,
            manifest_digest: described.manifest_digest,
            documents: described.documents.keys().cloned().collect(),
            pinned: false,
            found_as: BTreeSet::new(),
            signatures: Vec::new(),
        };
        Ok(Fetched {
            record,
            documents: described.documents,
            _lease: lease,
        })
    }

    /// All of `wanted`, some at a time, the lowest first; but those that lean on a layer that is
    /// several times in the image, and leans itself. After the first failure the others stop,
    /// also those that wait for it, and none is under way any more when this returns.
    async fn fetch_layers(
        self: &Arc<Self>,
        lease: &Arc<Lease>,
        wanted: Vec<Wanted>,
        settled: BTreeSet<Digest>,
    ) -> Result<(), PullError> {
        let (stop, stopped) = watch::channel(false);
        let settled = Arc::new(watch::Sender::new(settled));
        let downloads = wanted.into_iter().map(|layer| {
            let (job, lease, stopped) = (Arc::clone(self), Arc::clone(lease), stopped.clone());
            let settled = Arc::clone(&settled);
            async move {
                let fetched = job
                    .fetch_layer(lease, &layer, Some(&*settled), stopped)
                    .await;
                settled.send_modify(|settled| settled.extend(layer.diff_ids.last().cloned()));
                fetched
            }
        });
        let mut downloads =
            futures_util::stream::iter(downloads).buffer_unordered(self.max_layer_downloads.max(1));
        let mut first_error = None;
        let mut first_done = true;
        while let Some(result) = downloads.next().await {
            match result {
                Ok(_) => {
                    self.progress.layer_done();
                    if std::mem::take(&mut first_done) {
                        crash::point("pull_image.after_first_layer");
                    }
                }
                Err(PullError::Unpack {
                    source: UnpackError::LeansOnParents,
                    ..
                }) => {}
                // Those stopped because of the first only say so.
                Err(error) if first_error.is_none() => {
                    first_error = Some(error);
                    stop.send_replace(true);
                }
                Err(_) => {}
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// What is still missing, lowest first, each above its parents; gives all layers.
    async fn fetch_leaning(
        &self,
        lease: &Arc<Lease>,
        manifest: &Manifest,
        diff_ids: &[Digest],
    ) -> Result<Vec<LayerInfo>, PullError> {
        let (_stop, stopped) = watch::channel(false);
        let mut layers: Vec<LayerInfo> = Vec::new();
        for nth in 0..diff_ids.len() {
            let info = match self.layers.find(lease, &diff_ids[..=nth]) {
                Some(info) => info,
                None => {
                    let below = layers.iter().map(|info| info.id.clone()).collect();
                    let layer = wanted_layer(manifest, diff_ids, nth, Some(below));
                    let lease = Arc::clone(lease);
                    let fetched = self.fetch_layer(lease, &layer, None, stopped.clone());
                    let info = fetched.await?;
                    self.progress.layer_done();
                    info
                }
            };
            layers.push(info);
        }
        Ok(layers)
    }

    /// One layer, unless it is here or becomes so meanwhile: only one pull at a time fetches it.
    /// With `settled`, one that leans waits for the layers below it.
    async fn fetch_layer(
        &self,
        lease: Arc<Lease>,
        layer: &Wanted,
        settled: Option<&Settled>,
        mut stopped: watch::Receiver<bool>,
    ) -> Result<LayerInfo, PullError> {
        let what = format!("layer {}", layer.descriptor.digest);
        let (Some(diff_id), Some(chain_id)) = (layer.diff_ids.last(), chain_id(&layer.diff_ids))
        else {
            return Err(self.aborted());
        };
        let mut hold = loop {
            let other = match self.shared.layers.board(diff_id) {
                // One that leans takes this flight before it gives up the other.
                Boarding::Lead(flight) => match self.shared.leaning.running(&chain_id) {
                    Some(other) => other,
                    None => {
                        break Hold {
                            by_diff_id: Some(flight),
                            by_chain: None,
                            permit: None,
                        };
                    }
                },
                Boarding::Wait(other) => other,
            };
            tokio::select! {
                () = other.landed() => {}
                () = told_to_stop(&mut stopped) => return Err(self.aborted()),
            }
        };
        if let Some(info) = self.layers.find(&lease, &layer.diff_ids) {
            self.progress.found_here(&layer.descriptor.digest);
            return Ok(info);
        }
        let hosts = self
            .registry
            .pullers()
            .map_err(|error| self.registry_error(&what, error))?;
        let mut earlier = Earlier::default();
        let mut attempts = Attempts::new(hosts);
        while let Some(hosts) = attempts.next() {
            if *stopped.borrow() {
                return Err(self.aborted());
            }
            if hold.permit.is_none() {
                hold.permit = tokio::select! {
                    permit = self.permit() => permit,
                    () = told_to_stop(&mut stopped) => return Err(self.aborted()),
                };
            }
            let to = (layer, settled, &mut hold);
            let fetched = self.fetch_layer_from(&hosts, &what, &lease, to, &mut stopped);
            let failed = match fetched.await {
                Ok(info) => return Ok(info),
                Err(failed) => failed,
            };
            earlier.0.extend(failed.said);
            if !matches!(failed.error, PullError::Wrong { .. }) {
                return Err(earlier.into_error(failed.error));
            }
            // What is wrong is somebody's fault; whose, only a host alone can show.
            for at in &failed.senders {
                self.registry.sent_wrong(*at, failed.error.to_string());
            }
            attempts.was_wrong(&failed.senders);
            if attempts.is_over() {
                return Err(earlier.into_error(failed.error));
            }
            earlier.note(&failed.error);
        }
        Err(self.aborted())
    }

    async fn fetch_layer_from<'a>(
        &'a self,
        hosts: &[Turn],
        what: &str,
        lease: &Arc<Lease>,
        (layer, settled, hold): (&Wanted, Option<&Settled>, &mut Hold<'a>),
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<LayerInfo, Failed> {
        let Descriptor { digest, size, .. } = &layer.descriptor;
        let (chunks, received) = mpsc::channel(CHUNKS_AHEAD);
        let (begin, begun) = oneshot::channel();
        let verdict = Arc::new(Mutex::new(None));
        let mut reader = Judged {
            inner: VerifyingReader::new(Chunks::new(begin, received), digest, *size),
            verdict: Arc::clone(&verdict),
        };
        let (ask, asked) = oneshot::channel();
        let ask = settled.map(|_| Mutex::new(Some(ask)));
        let (store, lease_there) = (self.layers.clone(), Arc::clone(lease));
        let (diff_ids, parents) = (layer.diff_ids.clone(), layer.parents.clone());
        let (compression, limit_bytes) = (layer.compression, self.max_layer_bytes);
        let blob_bytes = *size;
        let unpacking = tokio::task::spawn_blocking(move || {
            let ingest = Ingest {
                diff_ids: &diff_ids,
                parents: parents.as_deref(),
                compression,
                limit_bytes,
            };
            let wait = ask.map(|ask| move || ask_for_parents(&ask));
            let wait = wait.as_ref().map(|wait| wait as &WaitForParents<'_>);
            let unpacked =
                store.unpack_waiting(&lease_there, ingest, wait, Some(blob_bytes), &mut reader);
            if unpacked.as_ref().is_err_and(is_of_the_content) {
                // Only the end of the blob tells whether the image or the host is to blame.
                let _ = io::copy(&mut reader, &mut io::sink());
            }
            unpacked
        });
        let mut blob = self.registry.blob(hosts, digest, *size);
        let mut told = stopped.clone();
        let lent = async {
            // Also over when the other end is done without having asked.
            if let (Ok(answer), Some(settled)) = (asked.await, settled) {
                let lent = self.lend_parents(lease, layer, settled, hold);
                let lent = tokio::select! {
                    lent = lent => lent,
                    () = told_to_stop(&mut told) => None,
                };
                let _ = answer.send(lent);
            }
        };
        let passed = async {
            // Until the first read it may turn out that another pull unpacks the same layer.
            match begun.await {
                Ok(()) => self.pass_on(&mut blob, digest, &chunks, stopped).await,
                Err(_) => Ok(0),
            }
        };
        let sent = both(passed, lent).await;
        // Dropped only now: without the end mark the reader fails, and the store commits nothing.
        drop(chunks);
        let failed = |error| Failed {
            error,
            senders: blob.senders().clone(),
            said: blob.said().to_vec(),
        };
        let unpacked = unpacking.await.map_err(|_| failed(self.aborted()))?;
        let verdict = verdict
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let counted = match &sent {
            Ok(bytes) | Err((bytes, _)) => *bytes,
        };
        let error = match (unpacked, sent, verdict) {
            (Ok(info), _, _) => {
                self.progress.unpacked(digest);
                return Ok(info);
            }
            (Err(_), Err((_, Some(error))), _) => self.registry_error(what, error),
            (Err(_), Err((_, None)), _) => self.aborted(),
            (Err(_), Ok(_), Some(bad)) => {
                let names = blob.senders().iter().map(|at| self.registry.name(*at));
                self.wrong(what, names.collect::<Vec<_>>().join(" and "), bad)
            }
            (Err(source), Ok(_), None) => PullError::Unpack {
                image: self.image(),
                layer: digest.clone(),
                source,
            },
        };
        self.progress.thrown_away(digest, counted);
        Err(failed(error))
    }

    /// One of all pulls' layers at a time, or else this pull's own.
    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            biased;
            permit = self.shared.layer_permits.acquire() => permit.ok(),
            permit = self.own_permit.acquire() => permit.ok(),
        }
    }

    /// The layers below `layer`, lowest first, once all of them are here; `None` where they will
    /// not be while it waits, or it is here itself. Holds no permit meanwhile, only the flight of
    /// the chain ID, see the module.
    async fn lend_parents<'a>(
        &'a self,
        lease: &Lease,
        layer: &Wanted,
        settled: &Settled,
        hold: &mut Hold<'a>,
    ) -> Option<Vec<LayerId>> {
        let chain_id = chain_id(&layer.diff_ids)?;
        hold.permit = None;
        while hold.by_chain.is_none() {
            match self.shared.leaning.board(&chain_id) {
                Boarding::Lead(flight) => hold.by_chain = Some(flight),
                Boarding::Wait(other) => {
                    hold.by_diff_id = None;
                    other.landed().await;
                }
            }
        }
        hold.by_diff_id = None;
        if self.layers.find(lease, &layer.diff_ids).is_some() {
            return None;
        }
        let mut settled = settled.subscribe();
        let mut below = Vec::new();
        for nth in 0..layer.diff_ids.len() - 1 {
            loop {
                let is_settled = settled.borrow_and_update().contains(&layer.diff_ids[nth]);
                if let Some(info) = self.layers.find(lease, &layer.diff_ids[..=nth]) {
                    below.push(info.id);
                    break;
                }
                if is_settled {
                    return None;
                }
                settled.changed().await.ok()?;
            }
        }
        hold.permit = self.permit().await;
        Some(below)
    }

    /// Downloads a blob and sends it to its reader; gives the bytes sent, on failure with the
    /// reason unless it was told to stop.
    async fn pass_on(
        &self,
        blob: &mut Blob,
        digest: &Digest,
        chunks: &mpsc::Sender<Chunk>,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<u64, (u64, Option<RegistryError>)> {
        let mut bytes = 0;
        loop {
            let next = tokio::select! {
                next = blob.next() => next,
                () = told_to_stop(stopped) => return Err((bytes, None)),
            };
            let chunk = match next {
                Ok(Some(chunk)) => chunk,
                Ok(None) => {
                    let _ = chunks.send(Chunk::End).await;
                    return Ok(bytes);
                }
                Err(error) => return Err((bytes, Some(error))),
            };
            let count = chunk.len() as u64;
            if chunks.send(Chunk::Bytes(chunk)).await.is_err() {
                // The reader is done with it, well or not; it says so itself.
                return Ok(bytes);
            }
            bytes += count;
            self.progress.received(digest, count);
        }
    }
}

/// What the unpacking of a layer gets that needs its parents.
type Lent = Option<Vec<LayerId>>;

/// The blocking end of `lend_parents`.
fn ask_for_parents(
    ask: &Mutex<Option<oneshot::Sender<oneshot::Sender<Lent>>>>,
) -> Result<Vec<LayerId>, UnpackError> {
    let (answer, answered) = oneshot::channel();
    let ask = ask.lock().unwrap_or_else(PoisonError::into_inner).take();
    ask.and_then(|ask| ask.send(answer).ok())
        .and_then(|()| answered.blocking_recv().ok().flatten())
        .ok_or(UnpackError::LeansOnParents)
}

/// What `passed` gives; `lent` is given up where that failed, and else brought to its end.
async fn both<T, E>(
    passed: impl Future<Output = Result<T, E>>,
    lent: impl Future<Output = ()>,
) -> Result<T, E> {
    let (mut passed, mut lent) = (pin!(passed), pin!(lent));
    let mut is_lent = false;
    loop {
        tokio::select! {
            passed = &mut passed => {
                if passed.is_ok() && !is_lent {
                    lent.await;
                }
                return passed;
            }
            () = &mut lent, if !is_lent => is_lent = true,
        }
    }
}

/// Why a layer did not come, and from whom.
struct Failed {
    error: PullError,
    senders: BTreeSet<usize>,
    said: Vec<String>,
}

/// Which hosts to ask together for one layer, until one gives the right one.
struct Attempts {
    hosts: Vec<Turn>,
    /// After several hosts together gave a wrong one, each is asked alone.
    one_by_one: bool,
}

impl Attempts {
    fn new(hosts: Vec<Turn>) -> Attempts {
        Attempts {
            hosts,
            one_by_one: false,
        }
    }

    fn next(&self) -> Option<Vec<Turn>> {
        let count = if self.one_by_one { 1 } else { self.hosts.len() };
        let turns: Vec<Turn> = self
            .hosts
            .iter()
            .take(count)
            .enumerate()
            .map(|(nth, turn)| Turn {
                at: turn.at,
                is_last: nth + 1 == count,
            })
            .collect();
        (!turns.is_empty()).then_some(turns)
    }

    fn was_wrong(&mut self, senders: &BTreeSet<usize>) {
        if senders.len() > 1 && !self.one_by_one {
            self.one_by_one = true;
            return;
        }
        self.hosts.retain(|turn| !senders.contains(&turn.at));
        if senders.is_empty() {
            // Nobody sent anything: an empty answer, by the first.
            self.hosts.drain(..self.hosts.len().min(1));
        }
    }

    fn is_over(&self) -> bool {
        self.hosts.is_empty()
    }
}

/// True where the bytes themselves are bad, and not the disk or the network.
fn is_of_the_content(error: &UnpackError) -> bool {
    unpack_kind(error) == Kind::BadImage
        && !matches!(
            error,
            UnpackError::Read { .. } | UnpackError::LeansOnParents | UnpackError::TooLarge { .. }
        )
}

async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    if stopped.wait_for(|stop| *stop).await.is_err() {
        // Whoever could tell is gone.
        std::future::pending::<()>().await;
    }
}

fn wanted_layer(
    manifest: &Manifest,
    diff_ids: &[Digest],
    nth: usize,
    parents: Option<Vec<LayerId>>,
) -> Wanted {
    // One layer for each diff ID: `ImageConfig::check` saw to it.
    let (descriptor, packing) = &manifest.layers[nth];
    Wanted {
        descriptor: descriptor.clone(),
        compression: match packing {
            LayerPacking::Tar => Compression::None,
            LayerPacking::Gzip => Compression::Gzip,
            LayerPacking::Zstd => Compression::Zstd,
        },
        diff_ids: diff_ids[..=nth].to_vec(),
        parents,
    }
}
