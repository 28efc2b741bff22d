//! /dev of a container in a user namespace.
//!
//! Nobody in such a namespace may make device nodes, and a tmpfs mounted there
//! would not let them work. So the whole of /dev is made here, on the host's
//! behalf, as one detached tmpfs that belongs to the pod's root:
//!
//! ```text
//! /dev (tmpfs of the host's)  null zero ... dri/card0     owners mapped, modes as asked
//! elsewhere                   a bind of the host's node, found in /sys/dev
//! ```
//!
//! Source: mknod(2), EPERM; user_namespaces(7); sysfs, /sys/dev/{char,block}/MAJOR:MINOR.

use super::options::Options;
use super::{LaunchError, Planner, text};
use crate::user_namespace::Mapping;
use berth_proto::monitor_v1::{DeviceNode, MountStep};
use berth_sys::Errno;
use berth_sys::mount;
use oci_spec::runtime::Mount;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

/// Where containers have their devices.
const DEV: &str = "/dev";

impl Planner {
    /// /dev, and the nodes below it, which are taken out of `nodes`.
    pub(super) fn dev(
        &mut self,
        mount: &Mount,
        options: &Options,
        mapping: &Mapping,
        nodes: &mut Vec<DeviceNode>,
    ) -> Result<(), LaunchError> {
        let owner = Owner::root(mapping);
        let mut data = options.data.clone();
        data.push(format!("uid={},gid={}", owner.0.as_raw(), owner.1.as_raw()));
        let failed = |path: &str, source| LaunchError::Device {
            path: path.into(),
            source,
        };
        let tmpfs =
            mount::new_labelled_fs("tmpfs", "tmpfs", &data.join(","), &self.label, options.set)
                .map_err(|source| failed(DEV, source))?;
        let below = |node: &DeviceNode| Path::new(&node.path).starts_with(DEV);
        let (ours, others) = nodes.drain(..).partition::<Vec<_>, _>(|node| {
            below(node) && FileType::from_raw_mode(node.kind) != FileType::Fifo
        });
        *nodes = others;
        for node in &ours {
            make(&tmpfs, node, mapping, owner).map_err(|source| failed(&node.path, source))?;
        }
        let fd = self.fds.push(tmpfs)?;
        self.steps.push(MountStep {
            target: text("a mount's target", mount.destination())?,
            fd: Some(fd),
            propagation: options.propagation_bits(),
            ..MountStep::default()
        });
        Ok(())
    }

    /// Nodes that are not on a /dev of ours: the host's own, bound.
    pub(super) fn bind_nodes(&mut self, nodes: Vec<DeviceNode>) -> Result<(), LaunchError> {
        for node in nodes {
            let failed = |source| LaunchError::Device {
                path: node.path.clone().into(),
                source,
            };
            let copy = host_node(&node)
                .and_then(|host| mount::clone_tree_at(host, false))
                .map_err(failed)?;
            let private = mount::Change {
                propagation: Some(mount::Propagation::Private),
                ..Default::default()
            };
            mount::set_attr(&copy, private, false).map_err(failed)?;
            let fd = self.fds.push(copy)?;
            self.steps.push(MountStep {
                target: node.path,
                fd: Some(fd),
                file: true,
                ..MountStep::default()
            });
        }
        Ok(())
    }
}

/// IDs of the host.
#[derive(Clone, Copy)]
struct Owner(Uid, Gid);

impl Owner {
    fn root(mapping: &Mapping) -> Self {
        let (uid, gid) = (mapping.uid(0), mapping.gid(0));
        Self(
            Uid::from_raw(uid.unwrap_or(0)),
            Gid::from_raw(gid.unwrap_or(0)),
        )
    }
}

fn make(tmpfs: &OwnedFd, node: &DeviceNode, mapping: &Mapping, root: Owner) -> Result<(), Errno> {
    let path = Path::new(&node.path)
        .strip_prefix(DEV)
        .map_err(|_| Errno::INVAL)?;
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let mut dir = tmpfs
        .as_fd()
        .try_clone_to_owned()
        .map_err(|_| Errno::MFILE)?;
    for part in path.parent().into_iter().flatten() {
        match rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(&dir, part, Some(root.0), Some(root.1), flags)?;
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = rustix::fs::openat(&dir, part, flags, Mode::empty())?;
    }
    let mode = Mode::from_raw_mode(node.mode & 0o7777);
    let number = rustix::fs::makedev(node.major, node.minor);
    let kind = FileType::from_raw_mode(node.kind);
    match rustix::fs::mknodat(&dir, name, kind, mode, number) {
        // The later of two requests for one path has replaced the earlier one.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    // Without the daemon's umask.
    rustix::fs::chmodat(&dir, name, mode, AtFlags::empty())?;
    let uid = mapping.uid(node.uid).map_or(root.0, Uid::from_raw);
    let gid = mapping.gid(node.gid).map_or(root.1, Gid::from_raw);
    rustix::fs::chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// The host's node of a device's number.
fn host_node(node: &DeviceNode) -> Result<OwnedFd, Errno> {
    let kind = FileType::from_raw_mode(node.kind);
    let class = match kind {
        FileType::CharacterDevice => "char",
        FileType::BlockDevice => "block",
        _ => return Err(Errno::INVAL),
    };
    let uevent = format!("/sys/dev/{class}/{}:{}/uevent", node.major, node.minor);
    let text = std::fs::read_to_string(uevent).map_err(|_| Errno::NODEV)?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = PathBuf::from(DEV).join(name.ok_or(Errno::NODEV)?);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let host = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&host)?;
    let number = rustix::fs::makedev(node.major, node.minor);
    if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_rdev != number {
        return Err(Errno::NODEV);
    }
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_spec::IdMapping;

    fn node(path: &str, uid: u32) -> DeviceNode {
        DeviceNode {
            path: path.into(),
            kind: FileType::CharacterDevice.as_raw_mode(),
            major: 1,
            minor: 5,
            mode: 0o620,
            uid,
            gid: 5,
        }
    }

    #[test]
    fn nodes_belong_to_who_they_would_belong_to_inside() {
        let range = IdMapping {
            container_id: 0,
            host_id: 70_000,
            length: 1000,
        };
        let mapping = Mapping {
            uids: vec![range],
            gids: vec![range],
        };
        let tmpfs = mount::new_fs("tmpfs", "tmpfs", "mode=755", 0).unwrap();
        let root = Owner::root(&mapping);
        make(&tmpfs, &node("/dev/a/b/zero", 12), &mapping, root).unwrap();
        make(&tmpfs, &node("/dev/a/zero", 4000), &mapping, root).unwrap();
        let look = |path: &str| {
            let stat = rustix::fs::statat(&tmpfs, path, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777)
        };
        assert_eq!(look("a/b/zero"), (70_012, 70_005, 0o620));
        assert_eq!(look("a/zero"), (70_000, 70_005, 0o620));
        assert_eq!(look("a/b"), (70_000, 70_000, 0o755));
        let file = rustix::fs::openat(&tmpfs, "a/zero", OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(rustix::io::read(file, &mut [1; 4]), Ok(4));
    }

    #[test]
    fn the_hosts_node_is_found_by_number() {
        let zero = host_node(&node("/x", 0)).unwrap();
        let stat = rustix::fs::fstat(&zero).unwrap();
        assert_eq!(rustix::fs::minor(stat.st_rdev), 5);
        let mut gone = node("/x", 0);
        gone.minor = 250;
        assert_eq!(host_node(&gone).unwrap_err(), Errno::NODEV);
    }
}
