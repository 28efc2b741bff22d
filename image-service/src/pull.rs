//! Pulling one image, from a reference to a record.
//!
//! ```text
//! tag ── HEAD ──> digest ──> manifest or index ──> config ──┬─> layer ─┐
//!                                                           ├─> layer ─┤  each one stream:
//!                                                           └─> layer ─┤  download, verify,
//!                                                                      │  decompress, verify
//!                                      record <── one syncfs <─────────┘  the diff ID, unpack
//! ```
//! What is here already, by digest or diff ID, is not fetched. Every configured host is tried
//! in its order for each step. A crash before the record leaves no image, and what was unpacked
//! is found again by the next pull.

use crate::content::{BadBlob, Content, ContentError, MAX_DOCUMENT_BYTES, VerifyingReader};
use crate::digest::Digest;
use crate::image::ImageRecord;
use crate::layer::{Ingest, LayerId, LayerInfo, Lease, Store, StoreError};
use crate::manifest::{
    self, Descriptor, Document, ImageConfig, LayerPacking, Manifest, ManifestError, Platform,
};
use crate::progress::{Progress, Stage};
use crate::reference::{BadReference, Reference};
use crate::registry::{Registry, RegistryError};
use crate::unpack::{Compression, UnpackError};
use berth_store::{RecordError, crash};
use bytes::Bytes;
use futures_util::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};

/// The points a pull can be killed at, in order. See [`berth_store::crash`].
pub const CRASH_POINTS: &[&str] = &[
    "pull_image.before_manifest",
    "pull_image.after_config",
    "pull_image.after_first_layer",
    "pull_image.before_sync",
    "pull_image.before_record",
    "pull_image.after_record",
];

/// How many indexes may lie within each other: builders nest one, nobody two.
const MAX_INDEX_DEPTH: usize = 3;
/// Chunks of a layer between the network and the unpacking; hyper's chunks have up to 400 KiB.
const CHUNKS_AHEAD: usize = 8;

/// Why an image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The reference is none.
    #[error("cannot pull the image")]
    Reference(#[from] BadReference),
    /// No host gave what was asked for; this is the last one's reason.
    #[error("cannot get the {what} of {image}{earlier}")]
    Registry {
        /// "manifest", "config", "layer sha256:...".
        what: String,
        /// The reference.
        image: String,
        /// What the hosts before it said.
        earlier: Earlier,
        /// What the last host said.
        source: Box<RegistryError>,
    },
    /// A host gave something else than what was asked for.
    #[error("the {what} of {image} from {host} is wrong{earlier}")]
    Wrong {
        /// "manifest", "config", "layer sha256:...".
        what: String,
        /// The reference.
        image: String,
        /// Who sent it.
        host: String,
        /// What the hosts before it said.
        earlier: Earlier,
        /// What is wrong.
        source: BadBlob,
    },
    /// The manifest, index or config is not one we can use.
    #[error("{image} cannot be used")]
    Manifest {
        /// The reference.
        image: String,
        /// Why.
        source: ManifestError,
    },
    /// A layer could not be unpacked.
    #[error("layer {layer} of {image} cannot be unpacked")]
    Unpack {
        /// The reference.
        image: String,
        /// Digest of the layer as it is sent.
        layer: Digest,
        /// Why.
        source: UnpackError,
    },
    /// The store of layers.
    #[error("cannot store the layers of {image}")]
    Layers {
        /// The reference.
        image: String,
        /// Why.
        source: StoreError,
    },
    /// Manifests and configs could not be stored.
    #[error("cannot store the manifests of {image}")]
    Content {
        /// The reference.
        image: String,
        /// Why.
        source: ContentError,
    },
    /// The image's record could not be written.
    #[error("cannot record {image}")]
    Record {
        /// The reference.
        image: String,
        /// Why.
        source: RecordError,
    },
    /// The pull ended without a result: a bug, or the daemon is going down.
    #[error("the pull of {image} was broken off")]
    Aborted {
        /// The reference.
        image: String,
    },
}

/// What kind of failure a pull ended with, for the caller's own codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked for is malformed: the reference or the credentials.
    Invalid,
    /// The registry does not have it.
    NotFound,
    /// Credentials are missing or wrong.
    Unauthorized,
    /// Credentials do not allow it.
    Denied,
    /// The registry asks for patience.
    TooManyRequests,
    /// The registry cannot be reached or fails.
    Unavailable,
    /// The configuration of the registry, or of this node's trust in it.
    Configuration,
    /// What came is not what was asked for, or not an image we can use.
    BadImage,
    /// This node could not store it.
    Local,
}

fn registry_kind(error: &RegistryError) -> Kind {
    match error {
        RegistryError::Credentials(_) => Kind::Invalid,
        RegistryError::NotFound { .. } => Kind::NotFound,
        // A token service in trouble says nothing about the credentials.
        RegistryError::Unauthorized { .. } if error.is_transient() => Kind::Unavailable,
        RegistryError::Unauthorized { .. } => Kind::Unauthorized,
        RegistryError::Denied { .. } => Kind::Denied,
        RegistryError::TooManyRequests { .. } => Kind::TooManyRequests,
        RegistryError::Server { .. }
        | RegistryError::Status { .. }
        | RegistryError::Tls { .. }
        | RegistryError::Unreachable { .. }
        | RegistryError::Stalled { .. }
        | RegistryError::Redirect { .. } => Kind::Unavailable,
        RegistryError::TooLarge { .. } | RegistryError::Length { .. } => Kind::BadImage,
        RegistryError::NoHost { .. }
        | RegistryError::Hosts { .. }
        | RegistryError::Certificate { .. }
        | RegistryError::Client { .. } => Kind::Configuration,
    }
}

fn unpack_kind(error: &UnpackError) -> Kind {
    match error {
        UnpackError::Read { .. }
        | UnpackError::Decompress { .. }
        | UnpackError::OtherCompression { .. }
        | UnpackError::TrailingBytes { .. }
        | UnpackError::Truncated { .. }
        | UnpackError::TooLarge { .. }
        | UnpackError::Header { .. }
        | UnpackError::Path { .. }
        | UnpackError::LinkTarget { .. }
        | UnpackError::Xattr { .. }
        | UnpackError::Unsupported { .. }
        | UnpackError::LeansOnParents
        | UnpackError::DiffId { .. } => Kind::BadImage,
        UnpackError::Entry { .. }
        | UnpackError::Store { .. }
        | UnpackError::Record { .. }
        | UnpackError::Parents { .. } => Kind::Local,
    }
}

impl PullError {
    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        match self {
            PullError::Reference(_) => Kind::Invalid,
            PullError::Registry { source, .. } => registry_kind(source),
            PullError::Wrong { .. } | PullError::Manifest { .. } => Kind::BadImage,
            PullError::Unpack { source, .. } => unpack_kind(source),
            PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Aborted { .. } => Kind::Local,
        }
    }

    pub(crate) fn from_registry(what: &str, image: &str, source: RegistryError) -> PullError {
        PullError::Registry {
            what: what.into(),
            image: image.into(),
            earlier: Earlier::default(),
            source: Box::new(source),
        }
    }

    /// What the registry said, where it is the registry that refused.
    pub fn registry(&self) -> Option<&RegistryError> {
        match self {
            PullError::Registry { source, .. } => Some(source),
            PullError::Reference(_)
            | PullError::Wrong { .. }
            | PullError::Manifest { .. }
            | PullError::Unpack { .. }
            | PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Aborted { .. } => None,
        }
    }

    /// True when another host may do better.
    fn is_the_hosts(&self) -> bool {
        matches!(self, PullError::Registry { .. } | PullError::Wrong { .. })
    }
}

/// What the hosts tried before the last one said, for the message.
#[derive(Debug, Default)]
pub struct Earlier(Vec<String>);

impl fmt::Display for Earlier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for said in &self.0 {
            write!(f, "; before that: {said}")?;
        }
        Ok(())
    }
}

impl Earlier {
    /// Remembers why a host was passed over, and puts all of them into the last one's error.
    fn note(&mut self, error: &PullError) {
        tracing::info!(error = error as &dyn StdError, "trying the next host");
        let cause = error.source().map(ToString::to_string);
        self.0.push(cause.unwrap_or_else(|| error.to_string()));
    }

    fn into_error(self, mut error: PullError) -> PullError {
        match &mut error {
            PullError::Registry { earlier, .. } | PullError::Wrong { earlier, .. } => {
                *earlier = self;
            }
            PullError::Reference(_)
            | PullError::Manifest { .. }
            | PullError::Unpack { .. }
            | PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Aborted { .. } => {}
        }
        error
    }
}

/// Everything one pull needs.
pub(crate) struct Job {
    pub reference: Reference,
    pub registry: Arc<Registry>,
    pub content: Arc<Content>,
    pub layers: Store,
    pub machine: Platform,
    pub max_layer_downloads: usize,
    pub max_layer_bytes: Option<u64>,
    pub progress: Progress,
}

impl Job {
    fn image(&self) -> String {
        self.reference.to_string()
    }

    fn registry_error(&self, what: &str, source: RegistryError) -> PullError {
        PullError::from_registry(what, &self.image(), source)
    }

    fn manifest_error(&self, source: ManifestError) -> PullError {
        PullError::Manifest {
            image: self.image(),
            source,
        }
    }

    /// Finds out what the image is: manifest and config, checked against each other.
    pub async fn describe(&self) -> Result<Described, PullError> {
        self.progress.enter(Stage::Manifest);
        crash::point("pull_image.before_manifest");
        let (mut digest, mut bytes, mut content_type) = match self.reference.digest() {
            Some(digest) => {
                let (bytes, content_type) = self.document("manifest", digest, None, true).await?;
                (digest.clone(), bytes, content_type)
            }
            None => self.resolve().await?,
        };
        let named = digest.clone();
        let mut documents = Documents::from([(digest.clone(), bytes.clone())]);
        let mut depth = 0;
        let manifest = loop {
            let document = manifest::parse(content_type.as_deref(), &bytes)
                .map_err(|source| self.manifest_error(source))?;
            let entries = match document {
                Document::Manifest(manifest) => break manifest,
                Document::Index(entries) => entries,
            };
            depth += 1;
            if depth > MAX_INDEX_DEPTH {
                return Err(self.manifest_error(ManifestError::TooMany {
                    what: "nested indexes",
                    count: depth,
                    most: MAX_INDEX_DEPTH,
                }));
            }
            let entry = manifest::pick(&entries, &self.machine)
                .map_err(|source| self.manifest_error(source))?;
            let next = &entry.descriptor;
            (bytes, _) = self
                .document("manifest", &next.digest, Some(next.size), true)
                .await?;
            content_type = Some(next.media_type.clone());
            digest = next.digest.clone();
            documents.insert(digest.clone(), bytes.clone());
        };
        self.progress.enter(Stage::Config);
        let config = &manifest.config;
        let (bytes, _) = self
            .document("config", &config.digest, Some(config.size), false)
            .await?;
        let config =
            manifest::parse_config(&bytes).map_err(|source| self.manifest_error(source))?;
        config
            .check(&manifest, &self.machine)
            .map_err(|source| self.manifest_error(source))?;
        documents.insert(manifest.config.digest.clone(), bytes);
        crash::point("pull_image.after_config");
        Ok(Described {
            named,
            manifest_digest: digest,
            manifest,
            config,
            documents,
        })
    }

    /// What the tag means: digest, bytes and type of its manifest.
    async fn resolve(&self) -> Result<(Digest, Vec<u8>, Option<String>), PullError> {
        let tag = self.reference.tag().unwrap_or_default();
        let hosts = self
            .registry
            .resolvers()
            .map_err(|error| self.registry_error("manifest", error))?;
        let mut earlier = Earlier::default();
        let last = hosts.len() - 1;
        for (nth, at) in hosts.into_iter().enumerate() {
            let error = match self.resolve_at(at, tag).await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            if nth == last || !error.is_the_hosts() {
                return Err(earlier.into_error(error));
            }
            earlier.note(&error);
        }
        Err(self.aborted())
    }

    async fn resolve_at(
        &self,
        at: usize,
        tag: &str,
    ) -> Result<(Digest, Vec<u8>, Option<String>), PullError> {
        let failed = |error| self.registry_error("manifest", error);
        // The tag that did not move costs one small request.
        if let Some(digest) = self.registry.digest_of(at, tag).await.map_err(failed)?
            && let Some(bytes) = self.stored(&digest).await
        {
            return Ok((digest, bytes, None));
        }
        let document = self
            .registry
            .manifest(at, tag, MAX_DOCUMENT_BYTES)
            .await
            .map_err(failed)?;
        let digest = Digest::sha256(&document.bytes);
        self.keep(&digest, document.bytes.clone()).await?;
        Ok((digest, document.bytes, document.content_type))
    }

    /// The bytes `digest` names, from here or from the first host that has them.
    async fn document(
        &self,
        what: &str,
        digest: &Digest,
        size: Option<u64>,
        is_manifest: bool,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        if let Some(bytes) = self.stored(digest).await {
            return Ok((bytes, None));
        }
        let hosts = self
            .registry
            .pullers()
            .map_err(|error| self.registry_error(what, error))?;
        let mut earlier = Earlier::default();
        let last = hosts.len() - 1;
        for (nth, at) in hosts.into_iter().enumerate() {
            let error = match self.document_at(at, what, digest, size, is_manifest).await {
                Ok((bytes, content_type)) => {
                    self.keep(digest, bytes.clone()).await?;
                    return Ok((bytes, content_type));
                }
                Err(error) => error,
            };
            if nth == last || !error.is_the_hosts() {
                return Err(earlier.into_error(error));
            }
            earlier.note(&error);
        }
        Err(self.aborted())
    }

    async fn document_at(
        &self,
        at: usize,
        what: &str,
        digest: &Digest,
        size: Option<u64>,
        is_manifest: bool,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        let limit = MAX_DOCUMENT_BYTES;
        let document = if is_manifest {
            self.registry.manifest(at, &digest.to_string(), limit).await
        } else {
            self.registry.small_blob(at, digest, limit).await
        };
        let document = document.map_err(|error| self.registry_error(what, error))?;
        let found = document.bytes.len() as u64;
        let verified = match size {
            Some(expected) if found < expected => Err(BadBlob::Short { expected, found }),
            Some(expected) if found > expected => Err(BadBlob::Long { expected }),
            _ => digest.verify(&document.bytes).map_err(BadBlob::from),
        };
        verified.map_err(|source| self.wrong(what, at, source))?;
        Ok((document.bytes, document.content_type))
    }

    fn wrong(&self, what: &str, at: usize, source: BadBlob) -> PullError {
        PullError::Wrong {
            what: what.into(),
            image: self.image(),
            host: self.registry.name(at).into(),
            earlier: Earlier::default(),
            source,
        }
    }

    async fn stored(&self, digest: &Digest) -> Option<Vec<u8>> {
        let (content, digest) = (Arc::clone(&self.content), digest.clone());
        tokio::task::spawn_blocking(move || content.get(&digest))
            .await
            .ok()?
    }

    async fn keep(&self, digest: &Digest, bytes: Vec<u8>) -> Result<(), PullError> {
        let (content, digest) = (Arc::clone(&self.content), digest.clone());
        tokio::task::spawn_blocking(move || content.put(&digest, &bytes))
            .await
            .map_err(|_| self.aborted())?
            .map_err(|source| PullError::Content {
                image: self.image(),
                source,
            })
    }

    fn aborted(&self) -> PullError {
        PullError::Aborted {
            image: self.image(),
        }
    }
}

/// What an image turned out to be, before any layer is fetched.
pub(crate) struct Described {
    /// What the reference means: an index where there is one.
    named: Digest,
    manifest_digest: Digest,
    manifest: Manifest,
    config: ImageConfig,
    documents: Documents,
}

/// Manifests, indexes and the config of an image.
pub(crate) type Documents = BTreeMap<Digest, Vec<u8>>;

/// An image that is whole and durable and not recorded yet. Collection leaves its layers alone
/// while this lives.
pub(crate) struct Fetched {
    pub record: ImageRecord,
    pub documents: Documents,
    _lease: Arc<Lease>,
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
        let bytes = wanted.iter().map(|layer| layer.descriptor.size).sum();
        self.progress.expect(asked.len() as u32, bytes);
        for _ in wanted.len()..asked.len() {
            self.progress.layer_done();
        }
        self.fetch_layers(&lease, wanted).await?;
        let layers = self.fetch_leaning(&lease, manifest, diff_ids).await?;
        self.progress.enter(Stage::Sync);
        crash::point("pull_image.before_sync");
        let store = self.layers.clone();
        tokio::task::spawn_blocking(move || store.sync())
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
        };
        Ok(Fetched {
            record,
            documents: described.documents,
            _lease: lease,
        })
    }

    /// All of `wanted`, some at a time, but those that turn out to lean on their parents. After
    /// the first failure the others stop, and none is under way any more when this returns.
    async fn fetch_layers(
        self: &Arc<Self>,
        lease: &Arc<Lease>,
        wanted: Vec<Wanted>,
    ) -> Result<(), PullError> {
        let (stop, stopped) = watch::channel(false);
        let downloads = wanted.into_iter().map(|layer| {
            let (job, lease, stopped) = (Arc::clone(self), Arc::clone(lease), stopped.clone());
            async move { job.fetch_layer(lease, &layer, stopped).await }
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
                    let info = self.fetch_layer(lease, &layer, stopped.clone()).await?;
                    self.progress.layer_done();
                    info
                }
            };
            layers.push(info);
        }
        Ok(layers)
    }

    async fn fetch_layer(
        &self,
        lease: Arc<Lease>,
        layer: &Wanted,
        mut stopped: watch::Receiver<bool>,
    ) -> Result<LayerInfo, PullError> {
        let what = format!("layer {}", layer.descriptor.digest);
        let hosts = self
            .registry
            .pullers()
            .map_err(|error| self.registry_error(&what, error))?;
        let mut earlier = Earlier::default();
        let last = hosts.len() - 1;
        for (nth, at) in hosts.into_iter().enumerate() {
            if *stopped.borrow() {
                break;
            }
            let fetched = self.fetch_layer_at(at, &what, &lease, layer, &mut stopped);
            let error = match fetched.await {
                Ok(info) => return Ok(info),
                Err(error) => error,
            };
            if nth == last || !error.is_the_hosts() {
                return Err(earlier.into_error(error));
            }
            earlier.note(&error);
        }
        Err(self.aborted())
    }

    async fn fetch_layer_at(
        &self,
        at: usize,
        what: &str,
        lease: &Arc<Lease>,
        layer: &Wanted,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<LayerInfo, PullError> {
        let Descriptor { digest, size, .. } = &layer.descriptor;
        let (chunks, received) = mpsc::channel(CHUNKS_AHEAD);
        let (begin, begun) = oneshot::channel();
        let verdict = Arc::new(Mutex::new(None));
        let reader = Judged {
            inner: VerifyingReader::new(Chunks::new(begin, received), digest, *size),
            verdict: Arc::clone(&verdict),
        };
        let (store, lease) = (self.layers.clone(), Arc::clone(lease));
        let (diff_ids, parents) = (layer.diff_ids.clone(), layer.parents.clone());
        let (compression, limit_bytes) = (layer.compression, self.max_layer_bytes);
        let unpacking = tokio::task::spawn_blocking(move || {
            let ingest = Ingest {
                diff_ids: &diff_ids,
                parents: parents.as_deref(),
                compression,
                limit_bytes,
            };
            store.unpack(&lease, ingest, reader)
        });
        // Until the first read it may turn out that another pull unpacks the same layer.
        let sent = match begun.await {
            Ok(()) => self.pass_on(at, &layer.descriptor, &chunks, stopped).await,
            Err(_) => Ok(0),
        };
        // Dropped only now: without the end mark the reader fails, and the store commits nothing.
        drop(chunks);
        let unpacked = unpacking.await.map_err(|_| self.aborted())?;
        let verdict = verdict
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let counted = match &sent {
            Ok(bytes) | Err((bytes, _)) => *bytes,
        };
        let error = match (unpacked, sent, verdict) {
            (Ok(info), _, _) => return Ok(info),
            (Err(_), Err((_, Some(error))), _) => self.registry_error(what, error),
            (Err(_), Err((_, None)), _) => self.aborted(),
            (Err(_), Ok(_), Some(bad)) => self.wrong(what, at, bad),
            (Err(source), Ok(_), None) => PullError::Unpack {
                image: self.image(),
                layer: digest.clone(),
                source,
            },
        };
        self.progress.thrown_away(counted);
        Err(error)
    }

    /// Downloads a blob and sends it to its reader; gives the bytes sent, on failure with the
    /// reason unless it was told to stop.
    async fn pass_on(
        &self,
        at: usize,
        blob: &Descriptor,
        chunks: &mpsc::Sender<Chunk>,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<u64, (u64, Option<RegistryError>)> {
        let mut bytes = 0;
        let mut blob = tokio::select! {
            blob = self.registry.blob(at, &blob.digest, blob.size) => {
                blob.map_err(|error| (bytes, Some(error)))?
            }
            () = told_to_stop(stopped) => return Err((bytes, None)),
        };
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
            self.progress.received(count);
        }
    }
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

enum Chunk {
    Bytes(Bytes),
    /// The body ended as it should. A channel that closes without it was cut.
    End,
}

/// The blocking end of a download, which begins with the first read.
struct Chunks {
    begin: Option<oneshot::Sender<()>>,
    received: mpsc::Receiver<Chunk>,
    current: Bytes,
    ended: bool,
}

impl Chunks {
    fn new(begin: oneshot::Sender<()>, received: mpsc::Receiver<Chunk>) -> Chunks {
        Chunks {
            begin: Some(begin),
            received,
            current: Bytes::new(),
            ended: false,
        }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(begin) = self.begin.take() {
            let _ = begin.send(());
        }
        while self.current.is_empty() && !self.ended {
            match self.received.blocking_recv() {
                Some(Chunk::Bytes(bytes)) => self.current = bytes,
                Some(Chunk::End) => self.ended = true,
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the download was cut",
                    ));
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

/// Keeps what is wrong with the blob: the unpacking wraps the reader's error in its own.
struct Judged<R> {
    inner: VerifyingReader<R>,
    verdict: Arc<Mutex<Option<BadBlob>>>,
}

impl<R: Read> Read for Judged<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            if !error.get_ref().is_some_and(|inner| inner.is::<BadBlob>()) {
                return error;
            }
            let kind = error.kind();
            let text = error.to_string();
            if let Some(bad) = error
                .into_inner()
                .and_then(|e| e.downcast::<BadBlob>().ok())
            {
                let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
                verdict.get_or_insert(*bad);
            }
            io::Error::new(kind, text)
        })
    }
}
