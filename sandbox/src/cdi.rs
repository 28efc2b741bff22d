//! CDI devices: what a vendor's file says a container needs for a device.
//!
//! ```text
//! vendor.com/gpu=0 ──> *.json, *.yaml in the spec directories ──> Edits ──> OCI spec
//! ```
//!
//! The directories are read anew whenever a container asks for devices, so what
//! a vendor's tool wrote a moment ago counts. The edits become part of the
//! container's record: what is started is what was resolved at its creation.
//! Files in later directories win over those in earlier ones; two files of one
//! directory that define the same device make it ambiguous, and asking for it
//! fails. A file that cannot be read costs only its own devices.
//!
//! Source: CDI specification 1.1.0.

mod edit;
mod file;

pub use edit::apply;
pub use file::{
    ContainerEdits, DeviceNode, File, Hook, IntelRdt, Mount, NetDevice, ParseError, parse,
};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Largest file read. NVIDIA's for a node of sixteen GPUs is some 300 KiB. Unit: bytes.
const MOST_BYTES: u64 = 4 << 20;

/// Most files of one directory.
const MOST_FILES: usize = 1024;

/// Where peers look, the least important first.
/// Source: CDI specification, "CDI specification directories".
pub const DEFAULT_DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// The key of annotations that ask for devices: "cdi.k8s.io/PLUGIN_DEVICE".
const ANNOTATION: &str = "cdi.k8s.io/";

/// Why a container does not get its devices.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// No file defines it.
    #[error("no CDI file in {dirs} defines the device {name}{hint}", dirs = list(dirs))]
    Unknown {
        /// vendor/class=device.
        name: String,
        /// Where was looked.
        dirs: Vec<PathBuf>,
        /// What could not be read, if anything.
        hint: String,
    },
    /// Two files of the same weight define it.
    #[error("the CDI device {name} is defined by {} and by {}", first.display(), second.display())]
    Ambiguous {
        /// vendor/class=device.
        name: String,
        /// One of the files.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The file asks for what is not done here.
    #[error("the CDI device {name} needs {what}, which containers cannot have here")]
    Unsupported {
        /// vendor/class=device.
        name: String,
        /// "Intel RDT".
        what: String,
    },
    /// Not vendor/class=device.
    #[error("the annotation {key} asks for {name:?}, which is no CDI device")]
    BadName {
        /// The annotation.
        key: String,
        /// As given.
        name: String,
    },
    /// A device node that is not on this host.
    #[error("cannot look at the device {} of {name}", path.display())]
    Node {
        /// vendor/class=device.
        name: String,
        /// On the host.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A node that is no device.
    #[error("{} of {name} is no device", path.display())]
    NotADevice {
        /// vendor/class=device.
        name: String,
        /// On the host.
        path: PathBuf,
    },
}

/// Why one file does not count.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what the specification says.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ParseError,
    },
}

fn list(dirs: &[PathBuf]) -> String {
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    dirs.join(", ")
}

/// What the devices of one container change, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edits(pub Vec<ContainerEdits>);

/// Device names asked for by annotations, in the order of their keys.
///
/// # Errors
/// `BadName`.
pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Vec<String>, CdiError> {
    let mut names = Vec::new();
    for (key, value) in annotations
        .iter()
        .filter(|(key, _)| key.starts_with(ANNOTATION))
    {
        for name in value.split(',').map(str::trim) {
            if !is_name(name) {
                return Err(CdiError::BadName {
                    key: key.clone(),
                    name: name.to_owned(),
                });
            }
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Whether this is a fully qualified device name: vendor/class=device.
///
/// Source: CDI specification, "Kind" and "Device name".
pub fn is_name(name: &str) -> bool {
    let parts = name.split_once('=');
    parts.is_some_and(|(kind, device)| file::is_kind(kind) && file::is_device(device))
}

/// The edits of these devices, each file's common ones once.
///
/// Blocks on the disk.
///
/// # Errors
/// The first device that cannot be had.
pub fn resolve(dirs: &[PathBuf], names: &[String]) -> Result<Edits, CdiError> {
    let mut edits = Edits::default();
    if names.is_empty() {
        return Ok(edits);
    }
    let (files, bad) = read_all(dirs);
    let mut common = BTreeSet::new();
    let mut given = BTreeSet::new();
    for name in names.iter().filter(|name| given.insert(name.as_str())) {
        let found = find(&files, name)?.ok_or_else(|| CdiError::Unknown {
            name: name.clone(),
            dirs: dirs.to_vec(),
            hint: hint(&bad),
        })?;
        if common.insert(&found.from.path) {
            supported(name, &found.from.file.container_edits)?;
            edits
                .0
                .push(complete(name, &found.from.file.container_edits)?);
        }
        supported(name, found.edits)?;
        edits.0.push(complete(name, found.edits)?);
    }
    edits.0.retain(|edits| *edits != ContainerEdits::default());
    Ok(edits)
}

fn hint(bad: &[FileError]) -> String {
    match bad {
        [] => String::new(),
        [first] => format!(" ({first})"),
        [first, rest @ ..] => format!(" ({first}, and {} more)", rest.len()),
    }
}

/// A file that was read.
struct Source {
    path: PathBuf,
    /// Position of its directory.
    weight: usize,
    file: File,
}

struct Found<'a> {
    from: &'a Source,
    edits: &'a ContainerEdits,
}

/// The definition of the greatest weight; two of the same weight are an error.
fn find<'a>(files: &'a [Source], name: &str) -> Result<Option<Found<'a>>, CdiError> {
    let Some((kind, device)) = name.split_once('=') else {
        return Ok(None);
    };
    let mut best: Option<Found<'a>> = None;
    for from in files.iter().filter(|from| from.file.kind == kind) {
        let devices = from.file.devices.iter();
        for found in devices.filter(|found| found.name == device) {
            match &best {
                Some(best) if best.from.weight > from.weight => continue,
                Some(best) if best.from.weight == from.weight => {
                    return Err(CdiError::Ambiguous {
                        name: name.to_owned(),
                        first: best.from.path.clone(),
                        second: from.path.clone(),
                    });
                }
                Some(_) | None => {}
            }
            best = Some(Found {
                from,
                edits: &found.container_edits,
            });
        }
    }
    Ok(best)
}

/// All files of these directories, and what is wrong with the others. A
/// directory that is not there has none.
fn read_all(dirs: &[PathBuf]) -> (Vec<Source>, Vec<FileError>) {
    let (mut files, mut bad) = (Vec::new(), Vec::new());
    for (weight, dir) in dirs.iter().enumerate() {
        let paths = match names(dir) {
            Ok(paths) => paths,
            Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                bad.push(FileError::Read {
                    path: dir.clone(),
                    source,
                });
                continue;
            }
        };
        for path in paths {
            match read(&path) {
                Ok(file) => files.push(Source { path, weight, file }),
                Err(error) => {
                    tracing::warn!(%error, "a CDI file does not count");
                    bad.push(error);
                }
            }
        }
    }
    (files, bad)
}

fn names(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir)?.take(MOST_FILES) {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if matches!(ending, Some("json" | "yaml")) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<File, FileError> {
    let failed = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if !meta.is_file() || meta.len() > MOST_BYTES {
        let why = format!("not a file of at most {MOST_BYTES} bytes");
        return Err(failed(io::Error::other(why)));
    }
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MOST_BYTES)
        .read_to_string(&mut text)
        .map_err(failed)?;
    parse(&text).map_err(|source| FileError::Parse {
        path: path.to_owned(),
        source,
    })
}

/// Whether all is done here that these edits ask for.
fn supported(name: &str, edits: &ContainerEdits) -> Result<(), CdiError> {
    let what = if edits.intel_rdt.is_some() {
        "Intel RDT".to_owned()
    } else if let Some(device) = edits.net_devices.first() {
        format!("the network device {}", device.host_interface_name)
    } else {
        return Ok(());
    };
    Err(CdiError::Unsupported {
        name: name.to_owned(),
        what,
    })
}

/// The edits with what they leave out of device nodes taken from the host's.
fn complete(name: &str, edits: &ContainerEdits) -> Result<ContainerEdits, CdiError> {
    let mut edits = edits.clone();
    for node in &mut edits.device_nodes {
        edit::complete(name, node)?;
    }
    Ok(edits)
}

#[cfg(test)]
mod tests;
