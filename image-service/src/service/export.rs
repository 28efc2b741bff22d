//! Images into an archive: an OCI layout in a tar file that `docker load` takes as well.
//!
//! Layers are put together again from what was kept when they were unpacked, uncompressed and
//! bit by bit as they were: the image keeps its ID. The manifest is a new one, as the compressed
//! blobs are not kept; those the image had are in the archive too, so that an import knows it by
//! its registry digests again.
//! Source: OCI image-spec 1.1, `image-layout.md`.

use super::ImageService;
use super::import::REPO_DIGESTS;
use crate::digest::Digest;
use crate::image::Image;
use crate::layer::LayerId;
use crate::manifest::{OCI_INDEX, OCI_MANIFEST};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::Arc;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Source: POSIX.1-2017, `pax`, "ustar Interchange Format".
const TAR_BLOCK: u64 = 512;

/// Why images cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No such image.
    #[error("there is no image {image}")]
    NoImage {
        /// By what name it was asked for.
        image: String,
    },
    /// What an export needs was not kept.
    #[error("the image {image} cannot be exported: {why}")]
    NotKept {
        /// Which.
        image: String,
        /// What is missing.
        why: String,
    },
    /// Reading the store, or writing the archive.
    #[error("the export broke off")]
    Io(#[from] io::Error),
}

/// A layer to be written.
struct Layer {
    id: LayerId,
    diff_id: Digest,
    size: u64,
}

/// An image to be written.
struct Planned {
    image: Arc<Image>,
    config: (Digest, Vec<u8>),
    manifest: Vec<u8>,
    layers: Vec<Layer>,
    documents: Vec<(Digest, Vec<u8>)>,
    names: Vec<String>,
}

impl ImageService {
    /// Writes the images `names` mean into one archive. Blocking. An image asked for by a tag has
    /// that tag in the archive, one asked for otherwise all it has.
    ///
    /// # Errors
    /// [`ExportError`]; what was written is no archive then.
    pub fn export(&self, names: &[String], out: impl Write) -> Result<(), ExportError> {
        let lease = self.0.layers.lease();
        let mut planned: Vec<Planned> = Vec::new();
        for name in names {
            let image = self.find(name).ok_or_else(|| ExportError::NoImage {
                image: name.chars().take(300).collect(),
            })?;
            let asked = name
                .parse::<crate::reference::Reference>()
                .ok()
                .and_then(|reference| reference.repo_tag());
            let tags = match asked {
                Some(tag) if image.repo_tags.contains(&tag) => vec![tag],
                _ => image.repo_tags.clone(),
            };
            if let Some(known) = planned.iter_mut().find(|known| known.image.id == image.id) {
                known.names.extend(tags);
                continue;
            }
            if let Some(gone) = image.layers.iter().find(|id| !lease.hold(id)) {
                return Err(ExportError::NotKept {
                    image: image.id.clone(),
                    why: format!("its layer {gone} is gone"),
                });
            }
            planned.push(self.plan(image, tags)?);
        }
        let mut archive = ArchiveWriter {
            out,
            written: BTreeSet::new(),
        };
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.file("index.json", index(&planned).to_string().as_bytes())?;
        archive.file("manifest.json", docker(&planned).to_string().as_bytes())?;
        for image in &planned {
            archive.blob(&Digest::sha256(&image.manifest), &image.manifest)?;
            archive.blob(&image.config.0, &image.config.1)?;
            for (digest, bytes) in &image.documents {
                archive.blob(digest, bytes)?;
            }
            for layer in &image.layers {
                if archive.begin(&layer.diff_id, layer.size)? {
                    let out = &mut archive.out;
                    let written = self
                        .0
                        .layers
                        .write_archive(&layer.id, &mut |part| out.write_all(part))?;
                    if written.is_none() {
                        return Err(io::Error::other("a layer was removed meanwhile").into());
                    }
                    archive.pad(layer.size)?;
                }
            }
        }
        archive.out.write_all(&[0; 2 * TAR_BLOCK as usize])?;
        archive.out.flush()?;
        Ok(())
    }

    fn plan(&self, image: Arc<Image>, names: Vec<String>) -> Result<Planned, ExportError> {
        let not_kept = |why: String| ExportError::NotKept {
            image: image.id.clone(),
            why,
        };
        let again = "pull it again, then it is kept";
        let id: Digest = image
            .id
            .parse()
            .map_err(|_| not_kept("its ID is no digest".into()))?;
        let config = self
            .0
            .content
            .get(&id)
            .ok_or_else(|| not_kept(format!("its configuration is not here; {again}")))?;
        let mut layers = Vec::with_capacity(image.layers.len());
        for layer in &image.layers {
            let info = self
                .0
                .layers
                .info(layer)
                .ok_or_else(|| not_kept(format!("its layer {layer} is gone")))?;
            let size = self.0.layers.archive_bytes(layer)?.ok_or_else(|| {
                not_kept(format!(
                    "how the archive of its layer {} was is not known; its entries replace each \
                     other, or it was unpacked by an earlier version",
                    info.diff_id
                ))
            })?;
            layers.push(Layer {
                id: layer.clone(),
                diff_id: info.diff_id,
                size,
            });
        }
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|layer| json!({"mediaType": LAYER, "digest": layer.diff_id, "size": layer.size}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": CONFIG, "digest": id, "size": config.len()},
            "layers": descriptors,
        });
        let records = self.0.images.load();
        let documents = records.by_id.get(&image.id).into_iter();
        let documents = documents
            .flat_map(|(record, _)| record.documents.iter())
            .filter_map(|digest| Some((digest.clone(), self.0.content.get(digest)?)))
            .collect();
        Ok(Planned {
            config: (id, config),
            manifest: manifest.to_string().into_bytes(),
            layers,
            documents,
            names,
            image,
        })
    }
}

fn index(images: &[Planned]) -> Value {
    let mut entries = Vec::new();
    for planned in images {
        let names: Vec<Option<&String>> = match &planned.names[..] {
            [] => vec![None],
            names => names.iter().map(Some).collect(),
        };
        for name in names {
            let mut annotations = serde_json::Map::new();
            if let Some(name) = name {
                annotations.insert("io.containerd.image.name".into(), json!(name));
                let tag = name.rsplit(':').next().unwrap_or_default();
                annotations.insert("org.opencontainers.image.ref.name".into(), json!(tag));
            }
            if !planned.image.repo_digests.is_empty() {
                let digests = planned.image.repo_digests.join(" ");
                annotations.insert(REPO_DIGESTS.into(), json!(digests));
            }
            let platform = &planned.image.config.platform;
            entries.push(json!({
                "mediaType": OCI_MANIFEST,
                "digest": Digest::sha256(&planned.manifest),
                "size": planned.manifest.len(),
                "annotations": annotations,
                "platform": platform,
            }));
        }
    }
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
}

fn docker(images: &[Planned]) -> Value {
    let entries: Vec<Value> = images
        .iter()
        .map(|planned| {
            let layers: Vec<String> = planned
                .layers
                .iter()
                .map(|layer| blob_name(&layer.diff_id))
                .collect();
            json!({
                "Config": blob_name(&planned.config.0),
                "RepoTags": planned.names,
                "Layers": layers,
            })
        })
        .collect();
    json!(entries)
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

struct ArchiveWriter<W: Write> {
    out: W,
    /// The blobs that are there already.
    written: BTreeSet<Digest>,
}

impl<W: Write> ArchiveWriter<W> {
    fn header(&mut self, name: &str, size: u64) -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = size.next_multiple_of(TAR_BLOCK) - size;
        self.out
            .write_all(&[0; TAR_BLOCK as usize][..padding as usize])
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.header(name, bytes.len() as u64)?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    fn blob(&mut self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        if self.begin(digest, bytes.len() as u64)? {
            self.out.write_all(bytes)?;
            self.pad(bytes.len() as u64)?;
        }
        Ok(())
    }

    /// `false` where the blob is there already.
    fn begin(&mut self, digest: &Digest, size: u64) -> io::Result<bool> {
        if !self.written.insert(digest.clone()) {
            return Ok(false);
        }
        self.header(&blob_name(digest), size)?;
        Ok(true)
    }
}
