//! Which of a container's mounts are its own, and which come from outside.
//!
//! | mount | becomes |
//! |---|---|
//! | the root | nothing: who restores gives another |
//! | proc, sysfs, tmpfs, devpts, mqueue that were mounted in there | CRIU's to make again |
//! | cgroup, of a cgroup namespace of its own | CRIU's to make again |
//! | the host's null over a masked file | external, "/dev/null" |
//! | anything else | external, named by its mount point |
//!
//! Source: proc_pid_mountinfo(5); criu(8), "--external mnt".

use std::collections::{BTreeMap, BTreeSet};

/// File systems that CRIU makes anew, with what is in them where that matters.
const REMADE: [&str; 5] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue"];

/// One line of a mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// "major:minor" of the file system.
    pub device: String,
    /// Which part of the file system it is.
    pub root: String,
    /// Where it is.
    pub point: String,
    /// "overlay".
    pub fs_type: String,
}

/// The lines of a mountinfo that can be understood.
pub fn parse(mountinfo: &str) -> Vec<MountLine> {
    let line = |line: &str| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        Some(MountLine {
            device: fields.next()?.to_owned(),
            root: unescape(fields.next()?),
            point: unescape(fields.next()?),
            fs_type: fs.split(' ').next()?.to_owned(),
        })
    };
    mountinfo.lines().filter_map(line).collect()
}

/// Space, tab, newline and backslash are octal in there.
fn unescape(text: &str) -> String {
    let mut plain = text.to_owned();
    for (code, what) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        plain = plain.replace(code, what);
    }
    plain
}

/// The keys of what comes from outside, by mount point.
///
/// `host` is the host's mountinfo; `binds` are the mount points of the spec's bind
/// mounts, `masked` its masked paths.
pub fn external(
    container: &[MountLine],
    host: &[MountLine],
    binds: &BTreeSet<String>,
    masked: &BTreeSet<String>,
    own_cgroup_namespace: bool,
) -> BTreeMap<String, String> {
    let known: BTreeSet<&str> = host.iter().map(|mount| mount.device.as_str()).collect();
    let is_own = |mount: &MountLine| {
        if mount.fs_type.starts_with("cgroup") {
            return own_cgroup_namespace;
        }
        REMADE.contains(&mount.fs_type.as_str())
            && !known.contains(mount.device.as_str())
            && !binds.contains(&mount.point)
    };
    let key = |mount: &MountLine| {
        if masked.contains(&mount.point) && mount.root.ends_with("/null") {
            "/dev/null".to_owned()
        } else {
            mount.point.clone()
        }
    };
    container
        .iter()
        .filter(|mount| mount.point != "/" && !is_own(mount))
        .map(|mount| (mount.point.clone(), key(mount)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_containers_own_is_left_to_criu() {
        let host = parse(
            "22 1 254:0 / / rw - ext4 /dev/vda rw\n23 22 0:5 / /dev rw - devtmpfs udev rw\n\
             24 22 0:40 / /run/shm rw - tmpfs shm rw\n25 22 0:30 / /sys/fs/cgroup rw - cgroup2 c rw\n",
        );
        let container = parse(
            "90 80 0:70 / / rw - overlay overlay rw\n91 90 0:71 / /proc rw - proc proc rw\n\
             92 90 0:72 / /dev rw - tmpfs tmpfs rw\n93 92 0:40 / /dev/shm rw - tmpfs shm rw\n\
             94 90 254:0 /etc/h /etc/hosts rw - ext4 /dev/vda rw\n\
             95 91 0:5 /null /proc/kcore ro - devtmpfs udev rw\n\
             96 91 0:71 /sys /proc/sys ro - proc proc rw\n\
             97 90 0:30 / /sys/fs/cgroup ro - cgroup2 c rw\n\
             98 90 0:80 / /a\\040b ro - overlay overlay ro\n",
        );
        let set = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect();
        let (binds, masked) = (set(&["/etc/hosts", "/dev/shm"]), set(&["/proc/kcore"]));
        let found = external(&container, &host, &binds, &masked, true);
        let expected = [
            ("/a b", "/a b"),
            ("/dev/shm", "/dev/shm"),
            ("/etc/hosts", "/etc/hosts"),
            ("/proc/kcore", "/dev/null"),
        ];
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|(point, key)| ((*point).to_owned(), (*key).to_owned()))
            .collect();
        assert_eq!(found, expected);
        let shared = external(&container, &host, &binds, &masked, false);
        assert!(shared.contains_key("/sys/fs/cgroup"));
    }
}
