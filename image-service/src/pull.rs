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

mod chunks;
pub(crate) mod error;
mod layers;
mod trust;

pub use error::{Earlier, Kind, PullError};

use crate::content::{BadBlob, Content, MAX_DOCUMENT_BYTES};
use crate::digest::Digest;
use crate::flight::{Boarding, Flight, Flights};
use crate::image::ImageRecord;
use crate::layer::{Lease, Store};
use crate::manifest::{self, Document, ImageConfig, Manifest, ManifestError, Platform};
use crate::progress::{Progress, Stage};
use crate::reference::Reference;
use crate::registry::{Registry, RegistryError, Turn};
use berth_store::crash;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::Semaphore;

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

/// What all pulls share.
pub(crate) struct Shared {
    /// Manifests and configs being fetched.
    documents: Flights<Digest>,
    /// Layers being fetched, by diff ID.
    layers: Flights<Digest>,
    /// Those of them that turned out to lean on their parents, by chain ID instead.
    leaning: Flights<Digest>,
    /// Layers at a time, over all pulls.
    layer_permits: Semaphore,
}

impl Shared {
    /// With at most `max_layers` layers fetched at a time.
    pub fn new(max_layers: usize) -> Arc<Shared> {
        Arc::new(Shared {
            documents: Flights::default(),
            layers: Flights::default(),
            leaning: Flights::default(),
            layer_permits: Semaphore::new(max_layers.clamp(1, Semaphore::MAX_PERMITS)),
        })
    }
}

/// What every pull that runs has for itself: one layer at a time that does not count among all
/// pulls' layers. So nobody waits for another registry, which may be as slow as it is allowed to
/// be, and at most a layer for each pull comes to those that are fetched at a time.
pub(crate) fn own_layer() -> Semaphore {
    Semaphore::new(1)
}

/// Everything one pull needs.
pub(crate) struct Job {
    pub shared: Arc<Shared>,
    pub reference: Reference,
    pub registry: Arc<Registry>,
    pub content: Arc<Content>,
    pub layers: Store,
    pub machine: Platform,
    pub max_layer_downloads: usize,
    /// One layer beyond what all pulls together may fetch, see [`own_layer`].
    pub own_permit: Semaphore,
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
                let (bytes, content_type) = self.named_document(digest).await?;
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
        let hosts = self.registry.resolvers();
        self.first_of(hosts, "manifest", |turn| self.resolve_at(turn, tag))
            .await
    }

    /// The manifest that the reference names by digest, once it is clear that we may have it.
    async fn named_document(
        &self,
        digest: &Digest,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        let flight = self.flight(digest).await;
        if let Some(bytes) = self.stored(digest).await {
            drop(flight);
            // That somebody else could pull it, maybe while we waited, does not mean that we may.
            self.admitted(digest).await?;
            return Ok((bytes, None));
        }
        self.fetched_document("manifest", digest, None, true).await
    }

    /// Whether a host would give us the manifest that is here already.
    async fn admitted(&self, digest: &Digest) -> Result<(), PullError> {
        let hosts = self.registry.pullers();
        self.first_of(hosts, "manifest", |turn| async move {
            let admitted = self.registry.admits(turn, digest).await;
            admitted.map_err(|error| self.registry_error("manifest", error))
        })
        .await
    }

    /// What the first of `hosts` gives, or why none did.
    async fn first_of<T, F: Future<Output = Result<T, PullError>>>(
        &self,
        hosts: Result<Vec<Turn>, RegistryError>,
        what: &str,
        ask: impl Fn(Turn) -> F,
    ) -> Result<T, PullError> {
        let hosts = hosts.map_err(|error| self.registry_error(what, error))?;
        let mut earlier = Earlier::default();
        for turn in hosts {
            let error = match ask(turn).await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            if turn.is_last || !error.is_the_hosts() {
                return Err(earlier.into_error(error));
            }
            earlier.note(&error);
        }
        Err(self.aborted())
    }

    async fn resolve_at(
        &self,
        turn: Turn,
        tag: &str,
    ) -> Result<(Digest, Vec<u8>, Option<String>), PullError> {
        let failed = |error| self.registry_error("manifest", error);
        // The tag that did not move costs one small request.
        if let Some(digest) = self.registry.digest_of(turn, tag).await.map_err(failed)?
            && let Some(bytes) = self.stored(&digest).await
        {
            return Ok((digest, bytes, None));
        }
        let document = self
            .registry
            .manifest(turn, tag, MAX_DOCUMENT_BYTES)
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
        let _flight = self.flight(digest).await;
        if let Some(bytes) = self.stored(digest).await {
            return Ok((bytes, None));
        }
        self.fetched_document(what, digest, size, is_manifest).await
    }

    /// The right to fetch a document; whoever fetches it now is waited for.
    async fn flight(&self, digest: &Digest) -> Flight<Digest> {
        loop {
            match self.shared.documents.board(digest) {
                Boarding::Lead(flight) => return flight,
                Boarding::Wait(other) => other.landed().await,
            }
        }
    }

    /// The bytes `digest` names from the first host that has them; kept.
    async fn fetched_document(
        &self,
        what: &str,
        digest: &Digest,
        size: Option<u64>,
        is_manifest: bool,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        let hosts = self.registry.pullers();
        self.first_of(hosts, what, |turn| async move {
            let found = self
                .document_at(turn, what, digest, size, is_manifest)
                .await?;
            self.keep(digest, found.0.clone()).await?;
            Ok(found)
        })
        .await
    }

    async fn document_at(
        &self,
        turn: Turn,
        what: &str,
        digest: &Digest,
        size: Option<u64>,
        is_manifest: bool,
    ) -> Result<(Vec<u8>, Option<String>), PullError> {
        let limit = MAX_DOCUMENT_BYTES;
        let document = if is_manifest {
            self.registry
                .manifest(turn, &digest.to_string(), limit)
                .await
        } else {
            self.registry.small_blob(turn, digest, limit).await
        };
        let document = document.map_err(|error| self.registry_error(what, error))?;
        let found = document.bytes.len() as u64;
        let verified = match size {
            Some(expected) if found < expected => Err(BadBlob::Short { expected, found }),
            Some(expected) if found > expected => Err(BadBlob::Long { expected }),
            _ => digest.verify(&document.bytes).map_err(BadBlob::from),
        };
        verified.map_err(|source| {
            let host = self.registry.name(turn.at).to_owned();
            self.registry.sent_wrong(turn.at, source.to_string());
            self.wrong(what, host, source)
        })?;
        Ok((document.bytes, document.content_type))
    }

    fn wrong(&self, what: &str, host: String, source: BadBlob) -> PullError {
        PullError::Wrong {
            what: what.into(),
            image: self.image(),
            host,
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

impl Described {
    /// What a signature may be for: the index, where there is one, and the manifest.
    fn digests(&self) -> Vec<&Digest> {
        if self.named == self.manifest_digest {
            vec![&self.named]
        } else {
            vec![&self.named, &self.manifest_digest]
        }
    }
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
