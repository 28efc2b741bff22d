//! Edits carried out on an OCI spec.

use super::{CdiError, ContainerEdits, DeviceNode, Edits, Mount};
use crate::oci::Built;
use oci_spec::runtime as oci;
use rustix::fs::{major, minor};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Takes from the host's node what the file leaves out.
pub(super) fn complete(name: &str, node: &mut DeviceNode) -> Result<(), CdiError> {
    let path = node.host_path.clone().unwrap_or_else(|| node.path.clone());
    let kind = node.kind.as_deref().unwrap_or_default();
    let numbered = node.major.is_some() || node.minor.is_some() || kind == "p";
    if !kind.is_empty() && numbered {
        node.major.get_or_insert(0);
        node.minor.get_or_insert(0);
        return Ok(());
    }
    let meta = std::fs::metadata(&path).map_err(|source| CdiError::Node {
        name: name.to_owned(),
        path: path.clone(),
        source,
    })?;
    let found = match meta.file_type() {
        kind if kind.is_block_device() => "b",
        kind if kind.is_char_device() => "c",
        kind if kind.is_fifo() => "p",
        _ => "",
    };
    let fits = kind.is_empty() || kind == found || (kind == "u" && found == "c");
    if found.is_empty() || !fits {
        return Err(CdiError::NotADevice {
            name: name.to_owned(),
            path,
        });
    }
    node.kind = Some(found.to_owned());
    if !numbered {
        node.major = Some(i64::from(major(meta.rdev())));
        node.minor = Some(i64::from(minor(meta.rdev())));
    }
    node.file_mode.get_or_insert(meta.mode() & 0o7777);
    Ok(())
}

/// Carries the edits out, in order; later ones win.
pub fn apply(edits: &Edits, built: &mut Built) {
    for edits in &edits.0 {
        for variable in &edits.env {
            set_env(built, variable);
        }
        for node in &edits.device_nodes {
            add_device(&mut built.spec, node);
        }
        for mount in &edits.mounts {
            add_mount(&mut built.spec, mount);
        }
        add_groups(&mut built.spec, edits);
    }
    if let Some(hooks) = crate::hooks::of_devices(edits) {
        built.spec.set_hooks(Some(hooks));
    }
}

/// Replaces the variable of that name, else appends it.
fn set_env(built: &mut Built, variable: &str) {
    let Some(process) = built.spec.process_mut() else {
        return;
    };
    let mut env = process.env().clone().unwrap_or_default();
    let name = variable.split_once('=').map_or(variable, |(name, _)| name);
    let same = |entry: &String| entry.split_once('=').is_some_and(|(n, _)| n == name);
    match env.iter().position(same) {
        Some(at) => {
            env[at] = variable.to_owned();
            built.raw_env[at] = variable.as_bytes().to_vec();
        }
        None => {
            env.push(variable.to_owned());
            built.raw_env.push(variable.as_bytes().to_vec());
        }
    }
    process.set_env(Some(env));
}

fn add_device(spec: &mut oci::Spec, node: &DeviceNode) {
    let user = spec
        .process()
        .as_ref()
        .map(|process| process.user().clone());
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    let kind = match node.kind.as_deref() {
        Some("b") => oci::LinuxDeviceType::B,
        Some("p") => oci::LinuxDeviceType::P,
        _ => oci::LinuxDeviceType::C,
    };
    let (major, minor) = (node.major.unwrap_or(0), node.minor.unwrap_or(0));
    let mut device = oci::LinuxDevice::default();
    device
        .set_path(node.path.clone())
        .set_typ(kind)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(Some(node.file_mode.unwrap_or(0o666)))
        .set_uid(Some(
            node.uid.or_else(|| Some(user.as_ref()?.uid())).unwrap_or(0),
        ))
        .set_gid(Some(
            node.gid.or_else(|| Some(user.as_ref()?.gid())).unwrap_or(0),
        ));
    let mut devices = linux.devices().clone().unwrap_or_default();
    devices.retain(|other| other.path() != device.path());
    devices.push(device);
    linux.set_devices(Some(devices));
    if kind == oci::LinuxDeviceType::P {
        return;
    }
    let mut rule = oci::LinuxDeviceCgroup::default();
    let access = node
        .permissions
        .clone()
        .filter(|letters| !letters.is_empty());
    rule.set_allow(true)
        .set_typ(Some(kind))
        .set_major(Some(major))
        .set_minor(Some(minor))
        .set_access(Some(access.unwrap_or_else(|| "rwm".into())));
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
}

/// Puts a mount in place of that at the same target, else before the first one
/// that it would hide, else last.
fn add_mount(spec: &mut oci::Spec, mount: &Mount) {
    let target: &Path = &mount.container_path;
    let mut options = mount.options.clone();
    let mut kind = mount.kind.clone().unwrap_or_default();
    if matches!(kind.as_str(), "" | "bind" | "none") {
        kind = "bind".to_owned();
        if !options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
        {
            options.push("rbind".to_owned());
        }
    }
    let mut added = oci::Mount::default();
    added
        .set_destination(target.to_owned())
        .set_source(Some(PathBuf::from(&mount.host_path)))
        .set_typ(Some(kind))
        .set_options(Some(options));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.retain(|other| other.destination() != target);
    let hidden = mounts
        .iter()
        .position(|other| other.destination().starts_with(target));
    mounts.insert(hidden.unwrap_or(mounts.len()), added);
    spec.set_mounts(Some(mounts));
}

fn add_groups(spec: &mut oci::Spec, edits: &ContainerEdits) {
    let Some(process) = spec.process_mut() else {
        return;
    };
    let mut user = process.user().clone();
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        if !groups.contains(gid) {
            groups.push(*gid);
        }
    }
    user.set_additional_gids(Some(groups));
    process.set_user(user);
}
