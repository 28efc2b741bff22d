//! Device nodes of a container and the rules that go with them.

use super::OciError;
use crate::cgroup::{DeviceKind, DeviceRule};
use crate::container_spec::{ContainerSpec, DeviceRequest};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{major, minor};
use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Most devices one directory may stand for. A large storage node has some
/// thousand below /dev; a mistaken path has no end.
pub(super) const MOST: usize = 16_384;

/// Deepest directory looked into below the one asked for; /dev has four levels.
const DEEPEST: usize = 8;

/// What every container has, by major and minor.
///
/// Source: OCI runtime-spec, `config-linux.md`, "Default Devices".
const ALWAYS: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Parts of the host's /dev that a container has its own of.
const OWN: [&str; 6] = ["ptmx", "pts", "shm", "mqueue", "fd", "console"];

/// The nodes by path, each once, and the cgroup's rules in order.
pub(super) fn build(
    container: &ContainerSpec,
    host_devices: bool,
    owner: Option<(u32, u32)>,
) -> Result<(Vec<LinuxDevice>, Vec<DeviceRule>), OciError> {
    let mut nodes = BTreeMap::new();
    let mut put = |device: LinuxDevice| nodes.insert(device.path().clone(), device);
    for device in &ALWAYS {
        put(always(device));
    }
    let mut rules = DeviceRule::defaults();
    let all = container.security.privileged && host_devices;
    if all {
        for device in below(Path::new("/dev"), Path::new("/dev"))? {
            put(device);
        }
        rules = vec![DeviceRule::everything()];
    }
    for request in &container.devices {
        let access = access(request)?;
        for device in expand(request)? {
            if !all {
                rules.push(rule(&device, access));
            }
            put(owned(device, owner));
        }
    }
    Ok((nodes.into_values().collect(), rules))
}

/// The device, given to `owner` if there is one.
fn owned(mut device: LinuxDevice, owner: Option<(u32, u32)>) -> LinuxDevice {
    if let Some((uid, gid)) = owner {
        device.set_uid(Some(uid)).set_gid(Some(gid));
    }
    device
}

fn always(&(path, major, minor): &(&str, i64, i64)) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device
        .set_path(path.into())
        .set_typ(LinuxDeviceType::C)
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(Some(0o666))
        .set_uid(Some(0))
        .set_gid(Some(0));
    device
}

fn access(request: &DeviceRequest) -> Result<&str, OciError> {
    match request.permissions.as_str() {
        "" => Ok("rwm"),
        letters if letters.bytes().all(|b| b"rwm".contains(&b)) => Ok(letters),
        letters => Err(OciError::BadDevicePermissions {
            path: request.host_path.clone(),
            permissions: letters.to_owned(),
        }),
    }
}

fn rule(device: &LinuxDevice, access: &str) -> DeviceRule {
    DeviceRule {
        allow: true,
        kind: match device.typ() {
            LinuxDeviceType::B => DeviceKind::Block,
            LinuxDeviceType::A | LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::P => {
                DeviceKind::Char
            }
        },
        major: u32::try_from(device.major()).ok(),
        minor: u32::try_from(device.minor()).ok(),
        access: access.to_owned(),
    }
}

/// The devices that a request stands for: one, or all below a directory.
/// A symbolic link asked for is followed, those found in a directory are not.
fn expand(request: &DeviceRequest) -> Result<Vec<LinuxDevice>, OciError> {
    let host = &request.host_path;
    let inside = match request.container_path.as_str() {
        "" => host.clone(),
        path => PathBuf::from(path),
    };
    let metadata = fs::metadata(host).map_err(|source| OciError::Device {
        path: host.clone(),
        source,
    })?;
    if metadata.is_dir() {
        return below(host, &inside);
    }
    let device = node(&metadata, inside).ok_or(OciError::NotADevice { path: host.clone() })?;
    Ok(vec![device])
}

/// The node that `metadata` describes, at `path` in the container; `None` for
/// what is no device.
fn node(metadata: &Metadata, path: PathBuf) -> Option<LinuxDevice> {
    let kind = metadata.file_type();
    let typ = match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) => LinuxDeviceType::C,
        (_, true) => LinuxDeviceType::B,
        (false, false) => return None,
    };
    let mut device = LinuxDevice::default();
    device
        .set_path(path)
        .set_typ(typ)
        .set_major(major(metadata.rdev()).into())
        .set_minor(minor(metadata.rdev()).into())
        .set_file_mode(Some(metadata.mode() & 0o7777))
        .set_uid(Some(metadata.uid()))
        .set_gid(Some(metadata.gid()));
    Some(device)
}

/// All devices below `host`, sorted by path so that equal requests make equal
/// specs. Devices come and go: one that is gone by now is passed over.
fn below(host: &Path, inside: &Path) -> Result<Vec<LinuxDevice>, OciError> {
    let mut found = Vec::new();
    let mut directories = vec![(host.to_owned(), inside.to_owned(), 0)];
    while let Some((host, inside, depth)) = directories.pop() {
        let failed = |source| OciError::Device {
            path: host.clone(),
            source,
        };
        let entries = match fs::read_dir(&host) {
            Ok(entries) => entries,
            Err(error) if depth > 0 && error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if OWN.iter().any(|own| *own == name) {
                continue;
            }
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() && depth < DEEPEST {
                directories.push((entry.path(), inside.join(&name), depth + 1));
            } else if let Some(device) = node(&metadata, inside.join(&name)) {
                found.push(device);
            }
            if found.len() + directories.len() > MOST {
                return Err(OciError::TooManyDevices { path: host });
            }
        }
    }
    found.sort_by(|a, b| a.path().cmp(b.path()));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, inside: &str, permissions: &str) -> DeviceRequest {
        DeviceRequest {
            host_path: host.into(),
            container_path: inside.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn a_symbolic_link_to_a_device_is_that_device() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        let devices = expand(&request(link.to_str().unwrap(), "/dev/mine", "r")).unwrap();
        let [device] = &devices[..] else {
            panic!("{devices:?}")
        };
        assert_eq!(device.path(), Path::new("/dev/mine"));
        assert_eq!((device.major(), device.minor()), (1, 3));
        assert_eq!(rule(device, "r").access, "r");
    }

    #[test]
    fn a_directory_stands_for_its_devices() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("link")).unwrap();
        for name in ["zero", "sub/full"] {
            let kind = rustix::fs::FileType::CharacterDevice;
            let device = rustix::fs::makedev(1, 5);
            let mode = rustix::fs::Mode::from_raw_mode(0o640);
            let path = dir.path().join(name);
            rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, device).unwrap();
        }
        let devices = expand(&request(dir.path().to_str().unwrap(), "/dev/x", "")).unwrap();
        let paths: Vec<_> = devices
            .iter()
            .map(|device| device.path().as_path())
            .collect();
        assert_eq!(
            paths,
            [Path::new("/dev/x/sub/full"), Path::new("/dev/x/zero")]
        );
        assert_eq!(devices[0].file_mode(), Some(0o640));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        assert!(matches!(
            expand(&request(path, "/dev/x", "")),
            Err(OciError::NotADevice { .. })
        ));
        let gone = expand(&request("/nonexistent/device", "/dev/x", ""));
        assert!(matches!(gone, Err(OciError::Device { .. })));
        access(&request("/dev/null", "", "rx")).unwrap_err();
    }
}
