//! One file: JSON, or the YAML that it is part of.
//!
//! Source: CDI specification 1.1.0, "CDI JSON Specification".

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The first version that there is, and the last one whose fields are known here.
const VERSIONS: [(u32, u32, u32); 2] = [(0, 3, 0), (1, 1, 0)];

/// Why a text is no CDI file.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// Neither JSON nor YAML of the specified shape.
    #[error("{0}")]
    Shape(String),
    /// A version that is not known here.
    #[error("cdiVersion {0:?} is none of 0.3.0 to 1.1.0")]
    Version(String),
    /// Not vendor/class.
    #[error("kind {0:?} is not vendor/class")]
    Kind(String),
    /// No name for a device.
    #[error("{0:?} is no device name")]
    Device(String),
    /// The file is about nothing.
    #[error("it has no devices")]
    Empty,
    /// An edit that makes no sense.
    #[error("{field} {value:?} {why}")]
    Edit {
        /// "deviceNodes.path".
        field: &'static str,
        /// As given.
        value: String,
        /// The rule it breaks.
        why: &'static str,
    },
}

/// What a vendor says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct File {
    /// "0.6.0".
    pub cdi_version: String,
    /// vendor/class.
    pub kind: String,
    /// For people.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// At least one.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// What every container with any of the devices gets.
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// What comes behind '='.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// What a container with it gets.
    pub container_edits: ContainerEdits,
}

/// What is changed in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ContainerEdits {
    /// NAME=value.
    pub env: Vec<String>,
    /// Devices to be made, and allowed.
    pub device_nodes: Vec<DeviceNode>,
    /// Network devices to be moved in.
    pub net_devices: Vec<NetDevice>,
    /// Programs to be run.
    pub hooks: Vec<Hook>,
    /// Mounts of host paths.
    pub mounts: Vec<Mount>,
    /// Cache and memory bandwidth.
    pub intel_rdt: Option<IntelRdt>,
    /// Groups of the first process; 0 counts for nothing.
    pub additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    /// In the container.
    pub path: PathBuf,
    /// On the host, where it is another one.
    #[serde(default)]
    pub host_path: Option<PathBuf>,
    /// b, c, u or p; the host's where it is left out.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// The host's where both are left out.
    #[serde(default)]
    pub major: Option<i64>,
    /// See `major`.
    #[serde(default)]
    pub minor: Option<i64>,
    /// Permission bits; the host's where they are left out.
    #[serde(default)]
    pub file_mode: Option<u32>,
    /// Letters of "rwm"; all where they are left out.
    #[serde(default)]
    pub permissions: Option<String>,
    /// Owner; the container's user where it is left out.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group; the container's where it is left out.
    #[serde(default)]
    pub gid: Option<u32>,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    /// On the host.
    pub host_interface_name: String,
    /// In the container.
    pub name: String,
}

/// A program to be run at some moment of the container's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// createRuntime, createContainer, startContainer, poststart, poststop.
    pub hook_name: String,
    /// The program.
    pub path: PathBuf,
    /// Its arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// A host path to be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// On the host.
    pub host_path: String,
    /// In the container.
    pub container_path: PathBuf,
    /// As mount(8) has them.
    #[serde(default)]
    pub options: Vec<String>,
    /// The file system, where it is no bind mount.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
}

/// Cache and memory bandwidth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
#[allow(missing_docs)]
pub struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: String,
    #[serde(rename = "l3CacheSchema")]
    pub l3_cache_schema: String,
    #[serde(rename = "memBwSchema")]
    pub mem_bw_schema: String,
    #[serde(rename = "enableCMT")]
    pub enable_cmt: bool,
    #[serde(rename = "enableMBM")]
    pub enable_mbm: bool,
    #[serde(rename = "schemata")]
    pub schemata: Vec<String>,
    #[serde(rename = "enableMonitoring")]
    pub enable_monitoring: bool,
}

/// A file's content. Unknown fields are errors, as the specification wants.
///
/// # Errors
/// The first thing wrong with it.
pub fn parse(text: &str) -> Result<File, ParseError> {
    // JSON by its own parser, whose errors are better; it is YAML as well.
    let file: File = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|error| ParseError::Shape(error.to_string()))?
    } else {
        serde_saphyr::from_str(text).map_err(|error| ParseError::Shape(error.to_string()))?
    };
    check(&file)?;
    Ok(file)
}

fn check(file: &File) -> Result<(), ParseError> {
    let version = version(&file.cdi_version);
    if !version.is_some_and(|version| (VERSIONS[0]..=VERSIONS[1]).contains(&version)) {
        return Err(ParseError::Version(file.cdi_version.clone()));
    }
    if !is_kind(&file.kind) {
        return Err(ParseError::Kind(file.kind.clone()));
    }
    if file.devices.is_empty() {
        return Err(ParseError::Empty);
    }
    check_edits(&file.container_edits)?;
    for (i, device) in file.devices.iter().enumerate() {
        let again = file.devices[..i]
            .iter()
            .any(|other| other.name == device.name);
        if again || !is_device(&device.name) {
            return Err(ParseError::Device(device.name.clone()));
        }
        check_edits(&device.container_edits)?;
    }
    Ok(())
}

fn check_edits(edits: &ContainerEdits) -> Result<(), ParseError> {
    let wrong = |field, value: &str, why| {
        Err(ParseError::Edit {
            field,
            value: value.to_owned(),
            why,
        })
    };
    for variable in &edits.env {
        let name = variable.split_once('=').map(|(name, _)| name);
        if name.is_none_or(str::is_empty) || variable.contains('\0') {
            return wrong("env", variable, "is not NAME=value");
        }
    }
    for node in &edits.device_nodes {
        if !is_inside(&node.path) {
            let path = node.path.to_string_lossy();
            return wrong("deviceNodes.path", &path, "is no absolute path");
        }
        if let Some(kind) = &node.kind
            && !matches!(kind.as_str(), "" | "b" | "c" | "u" | "p")
        {
            return wrong("deviceNodes.type", kind, "is none of b, c, u, p");
        }
        if let Some(letters) = &node.permissions
            && !letters.bytes().all(|b| b"rwm".contains(&b))
        {
            return wrong("deviceNodes.permissions", letters, "is not of r, w, m");
        }
    }
    for mount in &edits.mounts {
        if !is_inside(&mount.container_path) {
            let path = mount.container_path.to_string_lossy();
            return wrong("mounts.containerPath", &path, "is no absolute path");
        }
        if mount.host_path.is_empty() || mount.host_path.contains('\0') {
            return wrong("mounts.hostPath", &mount.host_path, "is no path");
        }
    }
    for hook in &edits.hooks {
        let known = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        if !known.contains(&hook.hook_name.as_str()) {
            return wrong("hooks.hookName", &hook.hook_name, "is no hook of OCI");
        }
        if !hook.path.is_absolute() {
            let path = hook.path.to_string_lossy();
            return wrong("hooks.path", &path, "is no absolute path");
        }
    }
    Ok(())
}

/// An absolute path other than the root, without "..".
fn is_inside(path: &std::path::Path) -> bool {
    use std::path::Component;
    path.is_absolute()
        && path.file_name().is_some()
        && !path.as_os_str().as_encoded_bytes().contains(&0)
        && path.components().all(|part| part != Component::ParentDir)
}

fn version(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text.strip_prefix('v').unwrap_or(text).splitn(3, '.');
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?, next()?))
}

/// vendor/class.
pub(super) fn is_kind(kind: &str) -> bool {
    kind.split_once('/')
        .is_some_and(|(vendor, class)| is_word(vendor, b"_-.", true) && is_word(class, b"_-", true))
}

/// What may stand behind '='.
pub(super) fn is_device(name: &str) -> bool {
    is_word(name, b"_-.:", false)
}

/// Letters, digits and `extra`, which is neither first nor last.
fn is_word(word: &str, extra: &[u8], letter_first: bool) -> bool {
    let bytes = word.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    let first_fits = if letter_first {
        first.is_ascii_alphabetic()
    } else {
        first.is_ascii_alphanumeric()
    };
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || extra.contains(byte);
    first_fits && last.is_ascii_alphanumeric() && bytes.iter().all(fits)
}
