//! Manifests, indexes and configs: what a registry says an image is made of.
//!
//! Index ── platform picked ──> Manifest ──> Config + layers (one diff ID each)
//!
//! Everything here parses bytes whose digest was already verified, but whose author is a
//! stranger: sizes are bounded and what is unknown is refused by name. The structs are our own
//! and not oci-spec's because Docker and Go write `null` for every empty list, which its
//! deserialiser refuses.
//! Source: OCI image-spec 1.1, `manifest.md`, `image-index.md`, `config.md`; Docker image
//! manifest v2 schema 2.

use crate::digest::Digest;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// An OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's index.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// What Docker before 1.13 called its config, in images that are still pulled.
const OLD_DOCKER_CONFIG: &str = "application/octet-stream";
const SCHEMA_1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// What to send as Accept when asking for a manifest.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// Most layers of one image. Source: Linux fs/overlayfs, `OVL_MAX_STACK`.
pub const MAX_LAYERS: usize = 500;
/// Most entries of an index; the largest in use have some dozens.
const MAX_INDEX_ENTRIES: usize = 1024;
/// Most entries of each list or map in a config, far above what execve takes of a hand-made one.
const MAX_CONFIG_ENTRIES: usize = 16 * 1024;

/// Why a manifest, index or config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON it should be.
    #[error("the {what} is not valid")]
    Json {
        /// "manifest", "image config".
        what: &'static str,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// Docker's first format, dead since 2017.
    #[error("the manifest has Docker's schema 1, which is not supported: push the image again")]
    Schema1,
    /// Both a manifest and an index, so that two readers would see two images.
    #[error("the manifest lists both layers and manifests")]
    Ambiguous,
    /// Neither a manifest nor an index.
    #[error("{media_type:?} is not an image manifest or index")]
    MediaType {
        /// What it says it is.
        media_type: String,
    },
    /// An artifact of another kind.
    #[error("it is not a container image: its config is {media_type:?}")]
    NotAnImage {
        /// The config's media type.
        media_type: String,
    },
    /// A layer of a kind that cannot be unpacked.
    #[error("layer {digest} has the unsupported media type {media_type:?}")]
    LayerType {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// More of something than allowed.
    #[error("the {what} are {count}, the most is {most}")]
    TooMany {
        /// "layers", "manifests of the index", ...
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// Layers and diff IDs do not pair.
    #[error("the manifest has {layers} layers, the config {diff_ids} diff IDs")]
    LayerCount {
        /// Of the manifest.
        layers: usize,
        /// Of the config.
        diff_ids: usize,
    },
    /// Nothing for this machine.
    #[error("the image has nothing for {wanted}, only for {offered}")]
    Platform {
        /// This machine.
        wanted: String,
        /// What there is, comma-separated.
        offered: String,
    },
}

/// One blob as a manifest names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// As written in the manifest.
    pub media_type: String,
    /// Digest of the blob as it is sent.
    pub digest: Digest,
    /// Bytes of the blob as it is sent.
    pub size: u64,
}

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerPacking {
    /// Plain tar.
    Tar,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// One image for one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Its config; the digest is the image ID.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<(Descriptor, LayerPacking)>,
}

/// One entry of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The manifest, or a further index.
    pub descriptor: Descriptor,
    /// What it is for; `None` when it does not say.
    pub platform: Option<Platform>,
}

/// What the bytes of a manifest turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Images for several platforms.
    Index(Vec<IndexEntry>),
}

/// Go writes `null` where it means an empty list or nothing.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default, deserialize_with = "null_is_default")]
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

impl From<RawDescriptor> for Descriptor {
    fn from(raw: RawDescriptor) -> Descriptor {
        Descriptor {
            media_type: raw.media_type,
            digest: raw.digest,
            size: raw.size,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default, deserialize_with = "null_is_default")]
    media_type: String,
    // Kept raw: a descriptor in an algorithm we lack must not hide what the document is.
    #[serde(default)]
    config: Option<serde_json::Value>,
    #[serde(default)]
    layers: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    manifests: Option<Vec<serde_json::Value>>,
    #[serde(default, rename = "fsLayers")]
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Parses a manifest or an index. `content_type` is what the registry called it, used only when
/// the document does not say itself what it is.
///
/// # Errors
/// [`ManifestError`] with what cannot be used.
pub fn parse(content_type: Option<&str>, bytes: &[u8]) -> Result<Document, ManifestError> {
    let json = |source| ManifestError::Json {
        what: "manifest",
        source,
    };
    let raw: RawDocument = serde_json::from_slice(bytes).map_err(json)?;
    let content_type = content_type
        .and_then(|text| text.split(';').next())
        .map_or("", str::trim);
    let media_type = match &*raw.media_type {
        "" => content_type,
        own => own,
    };
    if SCHEMA_1.contains(&media_type) || raw.schema_version == Some(1) || raw.fs_layers.is_some() {
        return Err(ManifestError::Schema1);
    }
    let is_manifest = raw.config.is_some() || raw.layers.is_some();
    if is_manifest && raw.manifests.is_some() {
        return Err(ManifestError::Ambiguous);
    }
    let known = match media_type {
        OCI_INDEX | DOCKER_LIST => !is_manifest,
        OCI_MANIFEST | DOCKER_MANIFEST => raw.manifests.is_none(),
        // Some registries and static file servers have only such a type to offer.
        "" | "application/json" | "application/octet-stream" | "text/plain" => {
            is_manifest || raw.manifests.is_some()
        }
        _ => false,
    };
    if !known {
        return Err(ManifestError::MediaType {
            media_type: clipped(media_type),
        });
    }
    if let Some(config) = raw.config {
        let config: RawDescriptor = serde_json::from_value(config).map_err(json)?;
        let is_known = [OCI_CONFIG, DOCKER_CONFIG].contains(&&*config.media_type)
            || (media_type == DOCKER_MANIFEST && config.media_type == OLD_DOCKER_CONFIG);
        if !is_known {
            return Err(ManifestError::NotAnImage {
                media_type: clipped(&config.media_type),
            });
        }
        let layers = raw.layers.unwrap_or_default();
        bounded("layers", layers.len(), MAX_LAYERS)?;
        let layers = layers.into_iter().map(|layer| {
            let layer: RawDescriptor = serde_json::from_value(layer).map_err(json)?;
            let packing = packing(&layer)?;
            Ok((layer.into(), packing))
        });
        return Ok(Document::Manifest(Manifest {
            config: config.into(),
            layers: layers.collect::<Result<_, ManifestError>>()?,
        }));
    }
    let Some(entries) = raw.manifests else {
        return Err(ManifestError::MediaType {
            media_type: clipped(media_type),
        });
    };
    bounded("manifests of the index", entries.len(), MAX_INDEX_ENTRIES)?;
    let entries = entries.into_iter().map(|entry| {
        let mut entry: RawDescriptor = serde_json::from_value(entry).map_err(json)?;
        Ok(IndexEntry {
            platform: entry.platform.take(),
            descriptor: entry.into(),
        })
    });
    Ok(Document::Index(
        entries.collect::<Result<_, ManifestError>>()?,
    ))
}

fn packing(layer: &RawDescriptor) -> Result<LayerPacking, ManifestError> {
    match &*layer.media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(LayerPacking::Tar),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Ok(LayerPacking::Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(LayerPacking::Zstd),
        other => Err(ManifestError::LayerType {
            digest: layer.digest.clone(),
            media_type: clipped(other),
        }),
    }
}

fn bounded(what: &'static str, count: usize, most: usize) -> Result<(), ManifestError> {
    if count > most {
        return Err(ManifestError::TooMany { what, count, most });
    }
    Ok(())
}

fn clipped(text: &str) -> String {
    text.chars().take(120).collect()
}

/// What an image, or this machine, is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name: `linux`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub os: String,
    /// Go's name: `amd64`, `arm64`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub architecture: String,
    /// Level within the architecture: `v3` of amd64, `v8` of arm64; empty: the lowest.
    #[serde(default, deserialize_with = "null_is_default")]
    pub variant: String,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", clipped(&self.os), clipped(&self.architecture))?;
        if !self.variant.is_empty() {
            write!(f, "/{}", clipped(&self.variant))?;
        }
        Ok(())
    }
}

/// Added to the rank of an image for the machine's own architecture.
const OWN_ARCHITECTURE: u32 = 10_000;
/// The highest level of 32-bit arm, that of an arm64 processor.
const ARM_V8: u32 = 80;

impl Platform {
    /// What this machine can run, with the highest variant of its processor.
    pub fn host() -> Platform {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", amd64_variant()),
            "aarch64" => ("arm64", "v8"),
            "x86" => ("386", ""),
            "arm" => ("arm", "v7"),
            "powerpc64" => ("ppc64le", ""),
            "loongarch64" => ("loong64", ""),
            other => (other, ""),
        };
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.into(),
        }
    }

    /// How well this machine runs an image for `image`: more is better, `None` not at all. An
    /// image of the smaller sister (386 on amd64, 32-bit arm on arm64) comes behind every one of
    /// the machine's own; whether this very arm64 processor runs 32 bits nobody asks.
    ///
    /// Source: containerd's `platforms` module, which decides the same for its default matcher.
    pub fn rank(&self, image: &Platform) -> Option<u32> {
        if !image.os.eq_ignore_ascii_case(&self.os) {
            return None;
        }
        let (own, most) = self.normal()?;
        let (other, level) = image.normal()?;
        match (&*own, &*other) {
            (own, other) if own == other => (level <= most).then_some(OWN_ARCHITECTURE + level),
            ("amd64", "386") => Some(0),
            ("arm64", "arm") => (level <= ARM_V8).then_some(level),
            _ => None,
        }
    }

    /// The architecture by its usual name, and the variant as a number: ten for each whole one.
    /// The variant nobody wrote is the architecture's usual one; `None` for one that is none.
    fn normal(&self) -> Option<(String, u32)> {
        let written = self.architecture.to_ascii_lowercase();
        let (architecture, usual) = match &*written {
            "x86_64" | "x86-64" | "amd64" => ("amd64", "1"),
            "i386" | "386" => ("386", "0"),
            "aarch64" | "arm64" => ("arm64", "8"),
            "armhf" | "arm" => ("arm", "7"),
            "armel" => ("arm", "6"),
            other => (other, "0"),
        };
        let variant = self.variant.to_ascii_lowercase();
        let variant = match variant.strip_prefix('v').unwrap_or(&variant) {
            // Their names say it all.
            _ if matches!(&*written, "i386" | "armhf" | "armel") => usual,
            "" => usual,
            variant => variant,
        };
        let (whole, part) = variant.split_once('.').unwrap_or((variant, "0"));
        let number = |text: &str| text.parse::<u32>().ok().filter(|&number| number < 100);
        let level = number(whole)? * 10 + number(part)?.min(9);
        Some((architecture.to_owned(), level))
    }
}

/// The x86-64 level of this processor. Source: x86-64 psABI 1.0, 3.1.1, table 3.1.
#[cfg(target_arch = "x86_64")]
fn amd64_variant() -> &'static str {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b") && has!("popcnt") && has!("sse4.2") && has!("ssse3");
    let v3 = has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe")
        && has!("xsave");
    let v4 = has!("avx512f")
        && has!("avx512bw")
        && has!("avx512cd")
        && has!("avx512dq")
        && has!("avx512vl");
    match (v2, v3, v4) {
        (true, true, true) => "v4",
        (true, true, false) => "v3",
        (true, false, _) => "v2",
        (false, _, _) => "",
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_variant() -> &'static str {
    ""
}

/// The entry of an index that suits `machine` best; of equals the first.
///
/// # Errors
/// [`ManifestError::Platform`] when none does.
pub fn pick<'a>(
    entries: &'a [IndexEntry],
    machine: &Platform,
) -> Result<&'a IndexEntry, ManifestError> {
    let mut best: Option<(u32, &IndexEntry)> = None;
    for entry in entries {
        // An entry that does not say is tried last; its config will tell.
        let rank = match &entry.platform {
            None => Some(0),
            Some(platform) => machine.rank(platform).map(|rank| rank + 1),
        };
        if let Some(rank) = rank
            && best.is_none_or(|(best, _)| rank > best)
        {
            best = Some((rank, entry));
        }
    }
    best.map(|(_, entry)| entry)
        .ok_or_else(|| ManifestError::Platform {
            wanted: machine.to_string(),
            offered: offered(entries),
        })
}

fn offered(entries: &[IndexEntry]) -> String {
    let mut names: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        // What builders call their attestations.
        .filter(|platform| platform.os != "unknown")
        .take(20)
        .map(Platform::to_string)
        .collect();
    names.dedup();
    if names.is_empty() {
        return "nothing".into();
    }
    names.join(", ")
}

/// What an image says about how to run it. Lists are empty and texts are "" when not given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What it is for.
    pub platform: Platform,
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments, or the whole command.
    pub cmd: Vec<String>,
    /// `user[:group]`, names or numbers.
    pub user: String,
    /// Where the program starts; absolute.
    pub working_dir: String,
    /// `SIGTERM` or a number.
    pub stop_signal: String,
    /// Paths the image wants a volume at.
    pub volumes: BTreeSet<String>,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// `port/protocol`.
    pub exposed_ports: BTreeSet<String>,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawRun {
    #[serde(default, deserialize_with = "null_is_default")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    cmd: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    user: String,
    #[serde(default, deserialize_with = "null_is_default")]
    working_dir: String,
    #[serde(default, deserialize_with = "null_is_default")]
    stop_signal: String,
    #[serde(default, deserialize_with = "null_is_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(default, deserialize_with = "null_is_default")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "null_is_default")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
}

#[derive(Default, Deserialize)]
struct RawRootfs {
    #[serde(default, deserialize_with = "null_is_default")]
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default, deserialize_with = "null_is_default")]
    config: RawRun,
    #[serde(default, deserialize_with = "null_is_default")]
    rootfs: RawRootfs,
}

/// Parses an image config.
///
/// # Errors
/// [`ManifestError::Json`] and [`ManifestError::TooMany`].
pub fn parse_config(bytes: &[u8]) -> Result<ImageConfig, ManifestError> {
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|source| ManifestError::Json {
        what: "image config",
        source,
    })?;
    let run = raw.config;
    for (what, count) in [
        ("variables of the image config", run.env.len()),
        ("words of the image's entrypoint", run.entrypoint.len()),
        ("words of the image's command", run.cmd.len()),
        ("volumes of the image config", run.volumes.len()),
        ("labels of the image config", run.labels.len()),
        ("ports of the image config", run.exposed_ports.len()),
    ] {
        bounded(what, count, MAX_CONFIG_ENTRIES)?;
    }
    bounded("diff IDs", raw.rootfs.diff_ids.len(), MAX_LAYERS)?;
    Ok(ImageConfig {
        platform: raw.platform,
        env: run.env,
        entrypoint: run.entrypoint,
        cmd: run.cmd,
        user: run.user,
        working_dir: run.working_dir,
        stop_signal: run.stop_signal,
        volumes: run.volumes.into_keys().collect(),
        labels: run.labels,
        exposed_ports: run.exposed_ports.into_keys().collect(),
        diff_ids: raw.rootfs.diff_ids,
    })
}

impl ImageConfig {
    /// Checks that this config is for `machine` and pairs with `manifest`'s layers.
    ///
    /// # Errors
    /// [`ManifestError::Platform`], [`ManifestError::LayerCount`].
    pub fn check(&self, manifest: &Manifest, machine: &Platform) -> Result<(), ManifestError> {
        // Images made by hand say nothing; they get the benefit of the doubt.
        let silent = self.platform.architecture.is_empty() && self.platform.os.is_empty();
        if !silent && machine.rank(&self.platform).is_none() {
            return Err(ManifestError::Platform {
                wanted: machine.to_string(),
                offered: self.platform.to_string(),
            });
        }
        if self.diff_ids.len() != manifest.layers.len() {
            return Err(ManifestError::LayerCount {
                layers: manifest.layers.len(),
                diff_ids: self.diff_ids.len(),
            });
        }
        Ok(())
    }

    /// The user as CRI wants it: a number, or a name, or neither where the image names none.
    pub fn cri_user(&self) -> (Option<i64>, String) {
        let user = self.user.split(':').next().unwrap_or_default();
        match user.parse::<u32>() {
            Ok(uid) => (Some(uid.into()), String::new()),
            Err(_) => (None, user.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn descriptor(media_type: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{HEX}"), "size": 7})
    }

    fn machine(variant: &str) -> Platform {
        Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            variant: variant.into(),
        }
    }

    fn entry(os: &str, architecture: &str, variant: &str) -> IndexEntry {
        IndexEntry {
            descriptor: Descriptor {
                media_type: OCI_MANIFEST.into(),
                digest: Digest::sha256(format!("{os}{architecture}{variant}").as_bytes()),
                size: 1,
            },
            platform: Some(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.into(),
            }),
        }
    }

    fn read(value: serde_json::Value) -> Result<Document, ManifestError> {
        parse(None, value.to_string().as_bytes())
    }

    #[test]
    fn both_families_of_manifests_are_read() {
        for (kind, config, layer, packing) in [
            (
                OCI_MANIFEST,
                OCI_CONFIG,
                "application/vnd.oci.image.layer.v1.tar",
                LayerPacking::Tar,
            ),
            (
                OCI_MANIFEST,
                OCI_CONFIG,
                "application/vnd.oci.image.layer.v1.tar+zstd",
                LayerPacking::Zstd,
            ),
            (
                DOCKER_MANIFEST,
                DOCKER_CONFIG,
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                LayerPacking::Gzip,
            ),
        ] {
            let document = read(json!({
                "schemaVersion": 2, "mediaType": kind,
                "config": descriptor(config), "layers": [descriptor(layer)],
            }));
            let Document::Manifest(manifest) = document.unwrap() else {
                panic!("not a manifest");
            };
            assert_eq!(manifest.layers[0].1, packing);
            assert_eq!(manifest.config.size, 7);
        }
        let old = |kind| {
            read(json!({
                "schemaVersion": 2, "mediaType": kind,
                "config": descriptor("application/octet-stream"), "layers": [],
            }))
        };
        assert!(matches!(old(DOCKER_MANIFEST), Ok(Document::Manifest(_))));
        assert!(matches!(
            old(OCI_MANIFEST),
            Err(ManifestError::NotAnImage { .. })
        ));
        let index = json!({"schemaVersion": 2, "manifests": [descriptor(OCI_MANIFEST)]});
        assert!(matches!(read(index), Ok(Document::Index(entries)) if entries.len() == 1));
    }

    #[test]
    fn a_null_is_an_empty_list() {
        let document = read(json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG), "layers": null, "annotations": null,
        }));
        assert!(matches!(document, Ok(Document::Manifest(m)) if m.layers.is_empty()));
        let config = parse_config(
            br#"{"os":"linux","architecture":"amd64","config":{"Env":null,"Cmd":["sh"],"Volumes":{"/v":{}},
            "Labels":null,"ExposedPorts":{"80/tcp":{}}},"rootfs":{"type":"layers","diff_ids":null},"history":null}"#,
        )
        .unwrap();
        assert_eq!(config.cmd, ["sh"]);
        assert!(config.volumes.contains("/v") && config.exposed_ports.contains("80/tcp"));
        assert_eq!(parse_config(b"{}").unwrap(), ImageConfig::default());
        assert_eq!(
            parse_config(br#"{"config":null,"rootfs":null}"#).unwrap(),
            ImageConfig::default()
        );
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let layer = "application/vnd.oci.image.layer.v1.tar";
        let whole = json!({"config": descriptor(OCI_CONFIG), "layers": [descriptor(layer)]});
        assert!(matches!(
            read(json!({"schemaVersion": 1})),
            Err(ManifestError::Schema1)
        ));
        assert!(matches!(
            read(json!({"fsLayers": []})),
            Err(ManifestError::Schema1)
        ));
        assert!(matches!(
            parse(
                Some("application/vnd.docker.distribution.manifest.v1+prettyjws; charset=utf-8"),
                b"{}"
            ),
            Err(ManifestError::Schema1)
        ));
        let mut both = whole.clone();
        both["manifests"] = json!([]);
        assert!(matches!(read(both), Err(ManifestError::Ambiguous)));
        let mut odd = whole.clone();
        odd["mediaType"] = json!("application/x-odd");
        assert!(matches!(read(odd), Err(ManifestError::MediaType { .. })));
        let mut lying = whole.clone();
        lying["mediaType"] = json!(OCI_INDEX);
        assert!(matches!(read(lying), Err(ManifestError::MediaType { .. })));
        assert!(matches!(
            read(json!({"a": 1})),
            Err(ManifestError::MediaType { .. })
        ));
        let artifact =
            json!({"config": descriptor("application/vnd.oci.empty.v1+json"), "layers": []});
        assert!(matches!(
            read(artifact),
            Err(ManifestError::NotAnImage { .. })
        ));
        let sealed = json!({
            "config": descriptor(OCI_CONFIG),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")],
        });
        assert!(matches!(read(sealed), Err(ManifestError::LayerType { .. })));
        let many =
            json!({"config": descriptor(OCI_CONFIG), "layers": vec![descriptor(layer); 501]});
        assert!(matches!(read(many), Err(ManifestError::TooMany { .. })));
        for bytes in [&b""[..], b"[", b"[]", b"null", b"{\"layers\":3}", b"\xff"] {
            assert!(parse(Some(OCI_MANIFEST), bytes).is_err());
        }
        let deep = "[".repeat(100_000);
        assert!(parse(Some(OCI_MANIFEST), deep.as_bytes()).is_err());
    }

    #[test]
    fn the_best_platform_is_picked() {
        let entries = [
            entry("windows", "amd64", ""),
            entry("linux", "arm64", "v8"),
            entry("linux", "amd64", ""),
            entry("linux", "amd64", "v3"),
            entry("linux", "amd64", "v9"),
            entry("unknown", "unknown", ""),
        ];
        assert_eq!(pick(&entries, &machine("")).unwrap(), &entries[2]);
        assert_eq!(pick(&entries, &machine("v2")).unwrap(), &entries[2]);
        assert_eq!(pick(&entries, &machine("v4")).unwrap(), &entries[3]);
        let error = pick(&entries[..2], &machine("v4")).unwrap_err().to_string();
        assert_eq!(
            error,
            "the image has nothing for linux/amd64/v4, only for windows/amd64, linux/arm64/v8"
        );
        let mut silent = entry("", "", "");
        silent.platform = None;
        let entries = [silent.clone(), entries[2].clone()];
        assert_eq!(pick(&entries, &machine("")).unwrap(), &entries[1]);
        assert_eq!(pick(&entries[..1], &machine("")).unwrap(), &silent);
    }

    #[test]
    fn platforms_suit_as_containerds_matcher_says() {
        let platform = |text: &str| {
            let mut parts = text.split('/').map(str::to_owned);
            let mut next = || parts.next().unwrap_or_default();
            Platform {
                os: next(),
                architecture: next(),
                variant: next(),
            }
        };
        // Best first; what stands in one place suits equally well.
        let suits: [(&str, &[&[&str]]); 5] = [
            (
                "linux/amd64/v3",
                &[
                    &["linux/amd64/v3", "Linux/x86-64/3"],
                    &["linux/amd64/v2"],
                    &["linux/amd64", "linux/x86_64", "linux/amd64/v1"],
                    &["linux/386", "linux/i386", "linux/i386/i686"],
                ],
            ),
            (
                "linux/amd64",
                &[&["linux/amd64", "linux/amd64/v1"], &["linux/386"]],
            ),
            (
                "linux/arm64/v8",
                &[
                    &[
                        "linux/arm64",
                        "linux/aarch64",
                        "linux/arm64/v8",
                        "linux/arm64/8",
                    ],
                    &["linux/arm/v8", "linux/arm/8"],
                    &["linux/arm", "linux/arm/v7", "linux/arm/7", "linux/armhf"],
                    &["linux/arm/v6", "linux/armel"],
                    &["linux/arm/v5"],
                ],
            ),
            (
                "linux/arm/v6",
                &[&["linux/arm/v6", "linux/armel"], &["linux/arm/v5"]],
            ),
            ("linux/s390x", &[&["linux/s390x"]]),
        ];
        for (machine, places) in suits {
            let machine = platform(machine);
            let ranks = places.iter().map(|place| {
                let ranks: Vec<_> = place
                    .iter()
                    .map(|name| machine.rank(&platform(name)))
                    .collect();
                assert!(
                    ranks.iter().all(|rank| *rank == ranks[0]),
                    "{place:?}: {ranks:?}"
                );
                ranks[0].unwrap_or_else(|| panic!("{machine}: {place:?}"))
            });
            assert!(ranks.is_sorted_by(|one, next| one > next), "{machine}");
        }
        for (machine, image) in [
            ("linux/amd64/v3", "linux/amd64/v4"),
            ("linux/amd64", "linux/amd64/v2"),
            ("linux/amd64", "windows/amd64"),
            ("linux/amd64", "linux/arm64"),
            ("linux/amd64", "linux/amd64/x"),
            ("linux/amd64", "linux/amd64/v99999999999"),
            ("linux/arm64/v8", "linux/arm64/v8.1"),
            ("linux/arm64/v8", "linux/arm64/v9"),
            ("linux/arm64/v8", "linux/arm/v9"),
            ("linux/arm/v7", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v8"),
            ("linux/386", "linux/amd64"),
            ("linux/s390x", "linux/386"),
        ] {
            assert_eq!(
                platform(machine).rank(&platform(image)),
                None,
                "{image} on {machine}"
            );
        }
    }

    #[test]
    fn a_config_must_pair_with_its_manifest() {
        let manifest = Manifest {
            config: entry("", "", "").descriptor,
            layers: Vec::new(),
        };
        let mut config = ImageConfig {
            platform: machine(""),
            ..ImageConfig::default()
        };
        config.check(&manifest, &machine("v3")).unwrap();
        config.diff_ids.push(Digest::sha256(b""));
        assert!(matches!(
            config.check(&manifest, &machine("")),
            Err(ManifestError::LayerCount {
                layers: 0,
                diff_ids: 1
            })
        ));
        config.platform.architecture = "s390x".into();
        assert!(matches!(
            config.check(&manifest, &machine("")),
            Err(ManifestError::Platform { .. })
        ));
    }

    #[test]
    fn the_user_is_a_number_or_a_name() {
        for (user, uid, name) in [
            ("", None, ""),
            ("1000", Some(1000), ""),
            ("1000:50", Some(1000), ""),
            ("0", Some(0), ""),
            ("www:50", None, "www"),
            ("-1", None, "-1"),
            ("99999999999", None, "99999999999"),
        ] {
            let config = ImageConfig {
                user: user.into(),
                ..ImageConfig::default()
            };
            assert_eq!(config.cri_user(), (uid, name.to_owned()), "{user}");
        }
    }
}
