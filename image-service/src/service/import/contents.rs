//! What images an archive has, by its `index.json` or `manifest.json`.

use super::spool::{Spool, Spooled};
use super::{ImportError, ImportOptions, packing};
use crate::digest::Digest;
use crate::manifest::{
    self, Document, ImageConfig, IndexEntry, Manifest, ManifestError, OCI_MANIFEST, Platform,
};
use crate::pull::Documents;
use crate::reference::Reference;
use crate::unpack::Compression;
use serde::Deserialize;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

const INDEX: &str = "index.json";
const MANIFESTS: &str = "manifest.json";
/// The whole name. Source: containerd, `images.AnnotationImageName`.
const FULL_NAME: &str = "io.containerd.image.name";
/// The tag, or the whole name. Source: OCI image-spec, `annotations.md`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Ours: the registry digests an exported image had, separated by spaces; each counts only
/// with a manifest of that digest in the archive that leads to the image.
pub(in crate::service) const REPO_DIGESTS: &str = "dev.berth.image.repo-digests";
/// How many indexes may lie within each other.
const MAX_INDEX_DEPTH: usize = 3;

/// A layer's file.
pub(super) struct Packed {
    pub file: Spooled,
    pub compression: Compression,
}

/// One image of the archive.
pub(super) struct Found {
    /// What to call it in a message.
    pub label: String,
    pub id: Digest,
    pub config: ImageConfig,
    pub layers: Vec<Packed>,
    pub names: Vec<Reference>,
    /// The digest its name leads to; `None` where no registry has it.
    pub named: Option<Digest>,
    pub repo_digests: BTreeSet<String>,
    pub manifest_digest: Digest,
    pub documents: Documents,
}

#[derive(Deserialize)]
struct RawIndex {
    manifests: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEntry {
    #[serde(default)]
    media_type: Option<String>,
    digest: Digest,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Every image of the archive for `machine`.
pub(super) fn images(
    spool: &Spool,
    machine: &Platform,
    options: &ImportOptions,
) -> Result<Vec<Found>, ImportError> {
    let docker: Vec<DockerEntry> = match spool.named(MANIFESTS) {
        Some(file) => json(MANIFESTS, &spool.read(MANIFESTS, file)?)?,
        None => Vec::new(),
    };
    let mut found = match spool.named(INDEX) {
        Some(file) => oci_images(spool, machine, &spool.read(INDEX, file)?, &docker)?,
        None if docker.is_empty() => return Err(ImportError::NoIndex),
        None => {
            let images = docker
                .iter()
                .map(|entry| docker_image(spool, machine, entry));
            images.collect::<Result<_, _>>()?
        }
    };
    if found.is_empty() {
        return Err(ImportError::NoImage {
            machine: machine.to_string(),
        });
    }
    if let Some(name) = &options.name {
        let count = found.len();
        let [only] = &mut found[..] else {
            return Err(ImportError::OneName { count });
        };
        let name: Reference = name.parse()?;
        only.repo_digests.clear();
        only.names = vec![name];
    }
    Ok(found)
}

fn json<'a, T: Deserialize<'a>>(file: &str, bytes: &'a [u8]) -> Result<T, ImportError> {
    serde_json::from_slice(bytes).map_err(|source| ImportError::Index {
        file: file.to_owned(),
        source,
    })
}

/// A stranger's name: one that is none is left out, with a warning.
fn reference(name: &str) -> Option<Reference> {
    match name.parse() {
        Ok(reference) => Some(reference),
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a name of an imported image is left out"
            );
            None
        }
    }
}

fn oci_images(
    spool: &Spool,
    machine: &Platform,
    index: &[u8],
    docker: &[DockerEntry],
) -> Result<Vec<Found>, ImportError> {
    let index: RawIndex = json(INDEX, index)?;
    let mut found: Vec<Found> = Vec::new();
    for entry in index.manifests {
        // Attestations, and other machines' images.
        if let Some(platform) = &entry.platform
            && machine.rank(platform).is_none()
        {
            continue;
        }
        let annotations = entry.annotations.clone().unwrap_or_default();
        let label = annotations
            .get(FULL_NAME)
            .or_else(|| annotations.get(REF_NAME))
            .cloned()
            .unwrap_or_else(|| entry.digest.to_string());
        let Some(mut image) = oci_image(spool, machine, &entry, &label)? else {
            continue;
        };
        if let Some(name) = annotations.get(FULL_NAME) {
            image.names.extend(reference(name));
        } else if let Some(name) = annotations.get(REF_NAME)
            && name.contains(['/', ':'])
        {
            image.names.extend(reference(name));
        }
        for tagged in docker {
            let config = spool.named(&tagged.config).map(|file| &file.digest);
            if config == Some(&image.id) {
                let tags = tagged.repo_tags.iter().flatten();
                image.names.extend(tags.filter_map(|name| reference(name)));
            }
        }
        if let Some(claimed) = annotations.get(REPO_DIGESTS) {
            take_repo_digests(spool, claimed, &mut image)?;
            if !image.repo_digests.is_empty() {
                // No registry has the manifest that our export wrote.
                image.named = None;
            }
        }
        image.names.sort_by_key(Reference::to_string);
        image.names.dedup();
        match found.iter_mut().find(|known| known.id == image.id) {
            Some(known) => {
                known.names.extend(image.names);
                known.documents.extend(image.documents);
                known.repo_digests.extend(image.repo_digests);
            }
            None => found.push(image),
        }
    }
    Ok(found)
}

/// `None` where the entry has nothing for this machine, or is no image.
fn oci_image(
    spool: &Spool,
    machine: &Platform,
    entry: &RawEntry,
    label: &str,
) -> Result<Option<Found>, ImportError> {
    let unusable = |source| ImportError::Manifest {
        image: label.to_owned(),
        source,
    };
    let mut digest = entry.digest.clone();
    let mut media_type = entry.media_type.clone();
    let mut documents = Documents::new();
    let mut depth = 0;
    let manifest = loop {
        let bytes = document(spool, &digest)?;
        let parsed = manifest::parse(media_type.as_deref(), &bytes).map_err(unusable)?;
        documents.insert(digest.clone(), bytes);
        let entries = match parsed {
            Document::Manifest(manifest) => break manifest,
            Document::Index(entries) => entries,
        };
        depth += 1;
        if depth > MAX_INDEX_DEPTH {
            return Err(unusable(ManifestError::TooMany {
                what: "nested indexes",
                count: depth,
                most: MAX_INDEX_DEPTH,
            }));
        }
        let Some(next) = pick(&entries, machine, spool)? else {
            return Ok(None);
        };
        digest = next.descriptor.digest.clone();
        media_type = Some(next.descriptor.media_type.clone());
    };
    let bytes = document(spool, &manifest.config.digest)?;
    let config = manifest::parse_config(&bytes).map_err(unusable)?;
    config.check(&manifest, machine).map_err(unusable)?;
    documents.insert(manifest.config.digest.clone(), bytes);
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for (layer, _) in &manifest.layers {
        layers.push(packing(spool, &blob(spool, &layer.digest)?)?);
    }
    Ok(Some(Found {
        label: label.to_owned(),
        id: manifest.config.digest.clone(),
        config,
        layers,
        names: Vec::new(),
        named: Some(entry.digest.clone()),
        repo_digests: BTreeSet::new(),
        manifest_digest: digest,
        documents,
    }))
}

/// The best entry for the machine; a partial copy of an index has not all of them.
fn pick<'a>(
    entries: &'a [IndexEntry],
    machine: &Platform,
    spool: &Spool,
) -> Result<Option<&'a IndexEntry>, ImportError> {
    let mut rest: Vec<IndexEntry> = Vec::new();
    for entry in entries {
        if spool.blob(&entry.descriptor.digest)?.is_some() {
            rest.push(entry.clone());
        }
    }
    let Ok(best) = manifest::pick(&rest, machine) else {
        return Ok(None);
    };
    Ok(entries.iter().find(|entry| *entry == best))
}

fn blob(spool: &Spool, digest: &Digest) -> Result<Spooled, ImportError> {
    spool.blob(digest)?.ok_or_else(|| ImportError::Missing {
        what: format!("blob {digest}"),
    })
}

fn document(spool: &Spool, digest: &Digest) -> Result<Vec<u8>, ImportError> {
    spool.read(&digest.to_string(), &blob(spool, digest)?)
}

/// Takes over the registry digests that manifests in the archive prove.
fn take_repo_digests(spool: &Spool, claimed: &str, image: &mut Found) -> Result<(), ImportError> {
    for name in claimed.split(' ').filter(|name| !name.is_empty()) {
        let Some(reference) = reference(name) else {
            continue;
        };
        let Some(digest) = reference.digest() else {
            continue;
        };
        let mut seen = Documents::new();
        if leads_to(spool, digest, &image.id, 0, &mut seen)? {
            image.documents.extend(seen);
            image.repo_digests.insert(reference.repo_digest(digest));
        }
    }
    Ok(())
}

fn leads_to(
    spool: &Spool,
    digest: &Digest,
    config: &Digest,
    depth: usize,
    seen: &mut Documents,
) -> Result<bool, ImportError> {
    if depth > MAX_INDEX_DEPTH {
        return Ok(false);
    }
    let Some(file) = spool.blob(digest)? else {
        return Ok(false);
    };
    let bytes = spool.read(&digest.to_string(), &file)?;
    let leads = match manifest::parse(None, &bytes) {
        Ok(Document::Manifest(manifest)) => manifest.config.digest == *config,
        Ok(Document::Index(entries)) => {
            let mut leads = false;
            for entry in entries {
                leads |= leads_to(spool, &entry.descriptor.digest, config, depth + 1, seen)?;
            }
            leads
        }
        Err(_) => false,
    };
    if leads {
        seen.insert(digest.clone(), bytes);
    }
    Ok(leads)
}

fn docker_image(
    spool: &Spool,
    machine: &Platform,
    entry: &DockerEntry,
) -> Result<Found, ImportError> {
    let file = |name: &str| {
        spool.named(name).ok_or_else(|| ImportError::Missing {
            what: name.to_owned(),
        })
    };
    let config_file = file(&entry.config)?;
    let bytes = spool.read(&entry.config, config_file)?;
    let label = entry
        .repo_tags
        .iter()
        .flatten()
        .next()
        .cloned()
        .unwrap_or_else(|| config_file.digest.to_string());
    let mut layers = Vec::with_capacity(entry.layers.len());
    for name in &entry.layers {
        layers.push(packing(spool, file(name)?)?);
    }
    // Such an archive has no manifest, so it gets one of what is there.
    let written = written_manifest(config_file, &layers);
    let unusable = |source| ImportError::Manifest {
        image: label.clone(),
        source,
    };
    let manifest: Manifest =
        match manifest::parse(Some(OCI_MANIFEST), &written).map_err(unusable)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(_) => return Err(ImportError::NoIndex),
        };
    let config = manifest::parse_config(&bytes).map_err(unusable)?;
    config.check(&manifest, machine).map_err(unusable)?;
    let manifest_digest = Digest::sha256(&written);
    let names = entry.repo_tags.iter().flatten();
    Ok(Found {
        id: config_file.digest.clone(),
        config,
        layers,
        names: names.filter_map(|name| reference(name)).collect(),
        named: None,
        repo_digests: BTreeSet::new(),
        documents: Documents::from([
            (config_file.digest.clone(), bytes),
            (manifest_digest.clone(), written),
        ]),
        manifest_digest,
        label,
    })
}

fn written_manifest(config: &Spooled, layers: &[Packed]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let suffix = match layer.compression {
                Compression::None => "",
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
            };
            json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
                "digest": layer.file.digest,
                "size": layer.file.size,
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest,
            "size": config.size,
        },
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}
