//! What is mounted in a container, and in which order.

use super::{Defaults, Input, OciError, id_mappings};
use crate::container_spec::{ContainerSpec, MountRequest, Propagation};
use crate::image::ContainerImage;
use crate::pod_spec::UserNamespace;
use oci_spec::runtime::Mount;
use std::path::{Component, Path, PathBuf};

/// Most mounts a container may ask for: each takes a descriptor when it starts,
/// of which one message carries 250; the rest is for what every container has.
pub(super) const MOST: usize = 224;

/// The group of terminals. Source: what the peers and devpts users agree on.
const TTY_GROUP: u32 = 5;

/// What may be mounted over below /proc: what lxcfs gives. Anything else there
/// would let a container fake what its own runtime reads and writes.
///
/// Source: lxcfs(1); runc refuses the rest too.
const PROC_FILES: [&str; 8] = [
    "cpuinfo",
    "diskstats",
    "loadavg",
    "meminfo",
    "slabinfo",
    "stat",
    "swaps",
    "uptime",
];

/// Options of CRI `Mount.mount_options` that are passed on.
const OPTIONS: [&str; 3] = ["noexec", "nodev", "nosuid"];

/// Options of what we mount for the container and what is no place for programs.
const GUARDED: [&str; 3] = ["nosuid", "noexec", "nodev"];

/// Everything that is mounted, in order.
pub(super) fn build(input: &Input<'_>) -> Result<Vec<Mount>, OciError> {
    if input.container.mounts.len() > MOST {
        return Err(OciError::TooManyMounts {
            count: input.container.mounts.len(),
        });
    }
    let mut asked: Vec<(PathBuf, Mount)> = Vec::new();
    for request in &input.container.mounts {
        let target = target(&request.container_path)?;
        let mount = requested(input, request, &target)?;
        // The last of equal targets would hide the others anyway.
        asked.retain(|(known, _)| *known != target);
        asked.push((target, mount));
    }
    let covered = |path: &Path| asked.iter().any(|(target, _)| path.starts_with(target));
    let mut all = file_systems(input);
    all.retain(|mount| !covered(mount.destination()));

    let mut bound: Vec<(PathBuf, Mount)> = pod_files(input)
        .into_iter()
        .map(|mount| (mount.destination().clone(), mount))
        .filter(|(target, _)| asked.iter().all(|(known, _)| known != target))
        .collect();
    bound.append(&mut asked);
    bound.sort_by_key(|(target, _)| target.components().count());
    all.extend(bound.into_iter().map(|(_, mount)| mount));
    Ok(all)
}

fn mount(target: &str, typ: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(target.into())
        .set_typ(Some(typ.into()))
        .set_source(Some(source.into()))
        .set_options(Some(
            options.iter().map(|&option| option.to_owned()).collect(),
        ));
    mount
}

/// The kernel's file systems.
///
/// Source: OCI runtime-spec, `config-linux.md`, "Default Filesystems".
fn file_systems(input: &Input<'_>) -> Vec<Mount> {
    let privileged = input.container.security.privileged;
    let write = if privileged { "rw" } else { "ro" };
    let user = input.pod.namespaces.user.as_ref();
    let group = format!("gid={TTY_GROUP}");
    let mut terminals = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    if user.is_none_or(|user| maps_group(user, TTY_GROUP)) {
        terminals.push(&group);
    }
    let guarded = |more: &[&'static str]| [&GUARDED[..], more].concat();
    // sysfs shows the network namespace that it is mounted in, and who may not
    // manage that one may not mount it: then it is the host's, bound.
    let sys = if user.is_some() && input.namespaces.network.is_none() {
        let recursive = if privileged { "rw" } else { "rro" };
        mount(
            "/sys",
            "bind",
            "/sys",
            &guarded(&["rbind", "rprivate", recursive]),
        )
    } else {
        mount("/sys", "sysfs", "sysfs", &guarded(&[write]))
    };
    let write_cgroup = if input.defaults.writable_cgroup {
        "rw"
    } else {
        write
    };
    let cgroup = mount(
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &guarded(&["relatime", write_cgroup]),
    );
    vec![
        mount("/proc", "proc", "proc", &guarded(&[])),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount("/dev/pts", "devpts", "devpts", &terminals),
        mount("/dev/mqueue", "mqueue", "mqueue", &guarded(&[])),
        sys,
        cgroup,
    ]
}

fn maps_group(user: &UserNamespace, group: u32) -> bool {
    let covers = |m: &crate::pod_spec::IdMapping| {
        group
            .checked_sub(m.container_id)
            .is_some_and(|offset| offset < m.length)
    };
    user.gids.iter().any(covers)
}

/// What all containers of the pod share.
fn pod_files(input: &Input<'_>) -> Vec<Mount> {
    let write = if input.container.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    let bind = |target: &str, source: &Path, write| {
        let mut bind = mount(
            target,
            "bind",
            "",
            &["rbind", "rprivate", "nosuid", "nodev", "noexec", write],
        );
        bind.set_source(Some(source.to_owned()));
        bind
    };
    let files = input.files;
    let mut all = vec![
        bind("/dev/shm", &files.shm, "rw"),
        bind("/etc/resolv.conf", &files.resolv_conf, write),
        bind("/etc/hostname", &files.hostname, write),
        bind("/etc/hosts", &files.hosts, write),
    ];
    let localtime = input.defaults.localtime.as_ref();
    all.extend(localtime.map(|file| bind("/etc/localtime", file, "ro")));
    all
}

/// The directories that the image calls volumes and nothing is mounted at: made
/// in the container's own layer, over what the image has there.
///
/// Source: OCI image-spec, `config.md`, "Volumes".
pub(crate) fn volume_directories(
    container: &ContainerSpec,
    image: &ContainerImage,
    defaults: &Defaults,
) -> Vec<String> {
    if !defaults.volume_directories {
        return Vec::new();
    }
    let mounts = container.mounts.iter();
    let asked: Vec<_> = mounts
        .filter_map(|mount| target(&mount.container_path).ok())
        .collect();
    let volumes = image.config.volumes.iter();
    // What an image says is a stranger's: a path that cannot be one is passed over.
    volumes
        .filter_map(|path| target(path).ok())
        .filter(|path| !asked.iter().any(|mounted| path.starts_with(mounted)))
        .filter(|path| {
            !["/proc", "/sys", "/dev"]
                .iter()
                .any(|own| path.starts_with(own))
        })
        .filter_map(|path| path.to_str().map(str::to_owned))
        .take(MOST)
        .collect()
}

/// `path` without ".", ".." and double slashes, as a place to mount at.
pub(crate) fn target(path: &str) -> Result<PathBuf, OciError> {
    let bad = |why| OciError::BadTarget {
        target: path.chars().take(200).collect(),
        why,
    };
    if path.contains('\0') {
        return Err(bad("it holds a NUL byte"));
    }
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if clean == Path::new("/") {
        return Err(bad("the root is the image's"));
    }
    match clean.strip_prefix("/proc") {
        Ok(rest) if rest == Path::new("") => Ok(clean),
        Ok(rest) if PROC_FILES.iter().any(|file| rest == Path::new(file)) => Ok(clean),
        Ok(rest) if rest == Path::new("net/dev") => Ok(clean),
        Ok(_) => Err(bad("/proc is the kernel's")),
        Err(_) => Ok(clean),
    }
}

/// One CRI mount.
fn requested(input: &Input<'_>, request: &MountRequest, target: &Path) -> Result<Mount, OciError> {
    let name = || request.container_path.clone();
    if request.recursive_readonly {
        let broken = |why| OciError::BadRecursiveReadonly {
            target: name(),
            why,
        };
        if !request.readonly {
            return Err(broken("not read-only"));
        }
        if request.propagation != Propagation::Private {
            return Err(broken("its propagation is not private"));
        }
    }
    let source = match &request.image {
        None => request.host_path.clone(),
        Some(image) => {
            let prepared = input.image_volumes.get(&request.container_path);
            prepared.cloned().ok_or_else(|| OciError::ImageNotMounted {
                image: image.image.clone(),
                target: name(),
            })?
        }
    };
    let mut options = vec![
        "rbind",
        match request.propagation {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        },
        match (
            request.readonly || request.image.is_some(),
            request.recursive_readonly,
        ) {
            (_, true) => "rro",
            (true, false) => "ro",
            (false, false) => "rw",
        },
    ];
    for option in &request.options {
        match OPTIONS.iter().find(|known| *known == option) {
            Some(known) => options.push(known),
            None => {
                return Err(OciError::BadOption {
                    target: name(),
                    option: option.clone(),
                });
            }
        }
    }
    // An overlay cannot be mapped: an image's layers are, before they become one.
    let mapped = request.image.is_none()
        && !(request.uid_mappings.is_empty() && request.gid_mappings.is_empty());
    if mapped {
        options.push("ridmap");
    }
    let mut out = mount("", "bind", "", &options);
    out.set_destination(target.to_owned())
        .set_source(Some(source));
    if mapped {
        out.set_uid_mappings(Some(id_mappings(&request.uid_mappings)?))
            .set_gid_mappings(Some(id_mappings(&request.gid_mappings)?));
    }
    Ok(out)
}

/// How the root has to pass mounts on so that other runtimes can do what the
/// mounts ask for. Ours does not need it: each mount has its own.
pub(super) fn rootfs_propagation(mounts: &[Mount]) -> Option<String> {
    let any = |wanted: &str| {
        mounts
            .iter()
            .any(|m| m.options().iter().flatten().any(|option| option == wanted))
    };
    ["rshared", "rslave"]
        .into_iter()
        .find(|wanted| any(wanted))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cleaned() {
        for (given, clean) in [
            ("/a/./b//c/", "/a/b/c"),
            ("/a/../b", "/b"),
            ("a/b", "/a/b"),
            ("/../../x", "/x"),
            ("/proc", "/proc"),
            ("/proc/meminfo", "/proc/meminfo"),
            ("/process", "/process"),
        ] {
            assert_eq!(target(given).unwrap(), Path::new(clean));
        }
    }

    #[test]
    fn some_places_are_nothing_to_mount_at() {
        for given in ["", "/", "/a/..", "/proc/self/attr", "/x/../proc/1", "/a\0b"] {
            assert!(
                matches!(target(given), Err(OciError::BadTarget { .. })),
                "{given:?}"
            );
        }
    }
}
