//! /sys/fs/cgroup of a container.

use super::options::Options;
use super::{LaunchError, Planner, text};
use berth_proto::monitor_v1::MountStep;
use berth_sys::mount::{self, Change, Propagation, attr};
use oci_spec::runtime::Mount;
use rustix::fs::Mode;
use std::path::{Path, PathBuf};

/// Where the host has its cgroups.
const HOST: &str = "/sys/fs/cgroup";

impl Planner {
    pub(super) fn cgroup(&mut self, mount: &Mount, options: &Options) -> Result<(), LaunchError> {
        // A hybrid host has both: v1's files, and the unified hierarchy's directory.
        let v2 = self.cgroup.tasks_files.is_empty();
        match (v2, self.own_cgroup_namespace) {
            (true, true) => self.cgroup_v2(mount, options),
            // Mounting the hierarchy from the first cgroup namespace would set
            // its options, which are one for the whole host.
            (true, false) => {
                self.bind_directory(Path::new(HOST), mount.destination(), options, true)
            }
            (false, _) => self.cgroup_v1(mount, options),
        }
    }

    fn cgroup_v2(&mut self, mount: &Mount, options: &Options) -> Result<(), LaunchError> {
        self.steps.push(MountStep {
            target: text("a mount's target", mount.destination())?,
            fs_type: "cgroup2".into(),
            source: "cgroup".into(),
            flags: options.flags(),
            ..MountStep::default()
        });
        Ok(())
    }

    /// A directory of controllers' names, and the container's cgroup at each.
    fn cgroup_v1(&mut self, mount: &Mount, options: &Options) -> Result<(), LaunchError> {
        let mut hierarchies = Vec::new();
        let v1 = self
            .cgroup
            .tasks_files
            .iter()
            .filter_map(|tasks| Path::new(tasks).parent());
        let unified =
            Some(Path::new(&self.cgroup.directory)).filter(|dir| !dir.as_os_str().is_empty());
        for directory in v1.chain(unified) {
            hierarchies.push(hierarchy(directory, &self.cgroup_path)?);
        }
        let target = mount.destination().clone();
        let names = names(&hierarchies, &self.label)
            .map_err(|(attempt, source)| LaunchError::CgroupDirectory { attempt, source })?;
        let index = self.fds.push(names)?;
        self.steps.push(MountStep {
            target: text("a mount's target", &target)?,
            fd: Some(index),
            ..MountStep::default()
        });
        for Hierarchy { name, directory } in &hierarchies {
            self.bind_directory(directory, &target.join(name), options, false)?;
        }
        Ok(())
    }
}

/// A v1 hierarchy, or the unified one beside them.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    /// What its mount point is called: "memory", "cpu,cpuacct", "unified".
    name: String,
    /// The container's cgroup in it.
    directory: PathBuf,
}

/// Which hierarchy a cgroup's directory is in: MOUNT/NAME/CGROUP.
fn hierarchy(directory: &Path, cgroup: &Path) -> Result<Hierarchy, LaunchError> {
    let wrong = || LaunchError::Cgroup {
        path: directory.to_owned(),
        cgroup: cgroup.to_owned(),
    };
    let depth = cgroup
        .strip_prefix("/")
        .unwrap_or(cgroup)
        .components()
        .count();
    let mount = directory.ancestors().nth(depth).ok_or_else(wrong)?;
    let name = mount
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(wrong)?;
    if !directory.ends_with(cgroup.strip_prefix("/").unwrap_or(cgroup)) {
        return Err(wrong());
    }
    Ok(Hierarchy {
        name: name.to_owned(),
        directory: directory.to_owned(),
    })
}

/// A read-only tmpfs with a directory for each hierarchy and, where several
/// controllers share one, a link for each of them.
fn names(
    hierarchies: &[Hierarchy],
    label: &str,
) -> Result<std::os::fd::OwnedFd, (&'static str, berth_sys::Errno)> {
    let attrs = attr::NOSUID | attr::NODEV | attr::NOEXEC;
    let tmpfs = mount::new_labelled_fs("tmpfs", "tmpfs", "mode=755,size=64k", label, attrs)
        .map_err(|e| ("mount a tmpfs", e))?;
    for Hierarchy { name, .. } in hierarchies {
        rustix::fs::mkdirat(&tmpfs, name, Mode::from_raw_mode(0o755))
            .map_err(|e| ("make a directory", e))?;
        for controller in name.split(',').filter(|controller| controller != name) {
            rustix::fs::symlinkat(name, &tmpfs, controller).map_err(|e| ("make a link", e))?;
        }
    }
    let change = Change {
        set: attr::RDONLY,
        propagation: Some(Propagation::Private),
        ..Change::default()
    };
    mount::set_attr(&tmpfs, change, false).map_err(|e| ("make it read-only", e))?;
    Ok(tmpfs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{AtFlags, FileType};

    #[test]
    fn a_cgroups_directory_names_its_hierarchy() {
        let cgroup = Path::new("/kubepods/pod1/berth-a");
        let path = "/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/berth-a";
        let found = hierarchy(Path::new(path), cgroup).unwrap();
        assert_eq!(found.name, "cpu,cpuacct");
        assert!(found.directory.ends_with("berth-a"));
        for wrong in ["/sys/fs/cgroup/cpu/other/pod1/berth-b", "/berth-a", "/"] {
            hierarchy(Path::new(wrong), cgroup).unwrap_err();
        }
    }

    #[test]
    fn the_directory_of_names_is_read_only_and_has_links() {
        let of = |name: &str| Hierarchy {
            name: name.into(),
            directory: PathBuf::new(),
        };
        let tmpfs = names(&[of("memory"), of("cpu,cpuacct")], "").unwrap();
        let kind = |name: &str| {
            let stat = rustix::fs::statat(&tmpfs, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            FileType::from_raw_mode(stat.st_mode)
        };
        assert_eq!(kind("memory"), FileType::Directory);
        assert_eq!(kind("cpu,cpuacct"), FileType::Directory);
        assert_eq!(kind("cpuacct"), FileType::Symlink);
        let refused = rustix::fs::mkdirat(&tmpfs, "x", Mode::from_raw_mode(0o755));
        assert_eq!(refused, Err(rustix::io::Errno::ROFS));
    }
}
