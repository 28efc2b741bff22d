//! Images from an archive: an OCI layout, or what `docker save` writes, plain or compressed.
//!
//! ```text
//! stream ── tar ──> DIR/import-<random>/<n>, hashed ── index.json or manifest.json ──┐
//!                                                                                    v
//!                                                record <── one sync <── layers unpacked
//! ```
//! What the archive names may stand anywhere in it, so its files are put aside first; they are
//! gone when the import ends, and at the next start after a crash. An image is imported whole
//! or not at all; what is here already is not unpacked again.
//! Source: OCI image-spec 1.1, `image-layout.md`; Docker image spec 1.2, "Combined Image JSON +
//! Filesystem Changeset Format".

mod contents;
mod spool;

use super::{CommitError, ImageService, OpenError};
use crate::digest::Digest;
use crate::image::ImageRecord;
use crate::layer::{Ingest, LayerInfo, StoreError};
use crate::manifest::ManifestError;
use crate::reference::{BadReference, Reference};
use crate::unpack::{Compression, UnpackError};
use berth_store::crash;
pub(super) use contents::REPO_DIGESTS;
use contents::{Found, Packed};
use spool::Spool;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const SPOOL: &str = "import-";

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// The name of the image, where the archive has one image; with a tag of the archive's where
    /// this has none.
    pub name: Option<String>,
}

/// An image that was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its ID.
    pub image_id: String,
    /// The tags it has now by this import; may be none.
    pub names: Vec<String>,
}

/// Why an archive cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It is no archive, or a damaged one.
    #[error("the archive cannot be read")]
    Archive(#[source] UnpackError),
    /// It has too many files for what it claims to be.
    #[error("the archive has more than {most} files")]
    TooManyFiles {
        /// How many it may have.
        most: usize,
    },
    /// There is no room for it, say.
    #[error("cannot {action} {path}")]
    Io {
        /// "create", "write", "read".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It has neither of what names images.
    #[error("the archive has neither an index.json (OCI) nor a manifest.json (docker save)")]
    NoIndex,
    /// What names images is not valid.
    #[error("the archive's {file} is not valid")]
    Index {
        /// `index.json` or `manifest.json`.
        file: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It names a file that it does not have.
    #[error("the archive has no {what}")]
    Missing {
        /// A path or a digest.
        what: String,
    },
    /// A file that is not what its name says, or too large to be one.
    #[error("the archive's {what} is wrong: {why}")]
    Wrong {
        /// A path or a digest.
        what: String,
        /// In what way.
        why: String,
    },
    /// A manifest or config that cannot be used.
    #[error("the archive's image {image} cannot be used")]
    Manifest {
        /// Its name, or the digest of its manifest or config.
        image: String,
        /// Why.
        source: ManifestError,
    },
    /// No image for this machine.
    #[error("the archive has no image for {machine}")]
    NoImage {
        /// This machine.
        machine: String,
    },
    /// The name asked for.
    #[error("the image cannot have this name")]
    Name(#[from] BadReference),
    /// One name for several images.
    #[error("the archive has {count} images, so one name cannot be given")]
    OneName {
        /// How many.
        count: usize,
    },
    /// A layer could not be unpacked.
    #[error("layer {layer} of the image {image} cannot be unpacked")]
    Unpack {
        /// The image.
        image: String,
        /// The diff ID.
        layer: Digest,
        /// Why.
        source: UnpackError,
    },
    /// The store of layers.
    #[error("cannot store the layers")]
    Layers(#[from] StoreError),
    /// The documents, or the image's record.
    #[error("cannot record the image")]
    Record(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Removes what imports left that did not end.
pub(super) fn remove_leftovers(lib: &Path) -> Result<(), OpenError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io {
            action,
            path,
            source,
        }
    };
    for entry in std::fs::read_dir(lib).map_err(io("list", lib))? {
        let entry = entry.map_err(io("list", lib))?;
        if entry.file_name().to_string_lossy().starts_with(SPOOL) {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(io("clean", &path))?;
        }
    }
    Ok(())
}

impl ImageService {
    /// Imports every image of the archive that runs on this machine. Blocking.
    ///
    /// # Errors
    /// [`ImportError`]. The images before the one that failed are there.
    pub fn import(
        &self,
        archive: impl Read + Send,
        options: &ImportOptions,
    ) -> Result<Vec<Imported>, ImportError> {
        let spool = Spool::fill(&self.0.settings.lib, SPOOL, archive)?;
        crash::point("import.spooled");
        let found = contents::images(&spool, &self.0.machine, options)?;
        let mut imported = Vec::with_capacity(found.len());
        for image in found {
            imported.push(self.import_one(&spool, image)?);
        }
        Ok(imported)
    }

    fn import_one(&self, spool: &Spool, image: Found) -> Result<Imported, ImportError> {
        let lease = self.0.layers.lease();
        let diff_ids = &image.config.diff_ids;
        let mut layers: Vec<LayerInfo> = Vec::with_capacity(diff_ids.len());
        for (nth, packed) in image.layers.iter().enumerate() {
            let info = match self.0.layers.find(&lease, &diff_ids[..=nth]) {
                Some(info) => info,
                None => {
                    let parents: Vec<_> = layers.iter().map(|info| info.id.clone()).collect();
                    let ingest = Ingest {
                        diff_ids: &diff_ids[..=nth],
                        parents: Some(&parents),
                        compression: packed.compression,
                        limit_bytes: self.0.settings.max_layer_bytes,
                    };
                    let blob = spool.open(&packed.file)?;
                    self.0
                        .layers
                        .unpack(&lease, ingest, blob)
                        .map_err(|source| ImportError::Unpack {
                            image: image.label.clone(),
                            layer: diff_ids[nth].clone(),
                            source,
                        })?
                }
            };
            layers.push(info);
        }
        crash::point("import.unpacked");
        self.0.layers.settle()?;
        let distinct: BTreeMap<_, u64> = layers.iter().map(|info| (&info.id, info.bytes)).collect();
        let tags: BTreeSet<String> = image.names.iter().filter_map(Reference::repo_tag).collect();
        let mut repo_digests: BTreeSet<String> = image.repo_digests;
        if let Some(named) = &image.named {
            repo_digests.extend(image.names.iter().map(|name| name.repo_digest(named)));
        }
        let record = ImageRecord {
            id: image.id.clone(),
            repo_tags: tags.clone(),
            repo_digests,
            size_bytes: distinct.values().sum(),
            layers: layers.iter().map(|info| info.id.clone()).collect(),
            config: image.config,
            manifest_digest: image.manifest_digest,
            documents: image.documents.keys().cloned().collect(),
            pinned: false,
            found_as: BTreeSet::new(),
            signatures: Vec::new(),
        };
        self.commit(record, &image.documents)
            .map_err(|error| match error {
                CommitError::Content(error) => ImportError::Record(Box::new(error)),
                CommitError::Record(error) => ImportError::Record(Box::new(error)),
            })?;
        Ok(Imported {
            image_id: image.id.to_string(),
            names: tags.into_iter().collect(),
        })
    }
}

/// How a layer's file is compressed, by its first bytes.
fn packing(spool: &Spool, file: &spool::Spooled) -> Result<Packed, ImportError> {
    let mut start = Vec::with_capacity(4);
    spool
        .open(file)?
        .take(4)
        .read_to_end(&mut start)
        .map_err(|source| ImportError::Io {
            action: "read",
            path: spool.dir().to_owned(),
            source,
        })?;
    Ok(Packed {
        file: file.clone(),
        compression: Compression::of_magic(&start),
    })
}
