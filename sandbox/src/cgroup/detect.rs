//! Which hierarchies are mounted where.

use super::{
    Cgroups, Driver, DriverChoice, Error, Hierarchy, Settings, Unified, Version, file, path,
    systemd,
};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, RwLock};

/// Super block options of a cgroup mount that are not controllers.
const OPTIONS: [&str; 12] = [
    "rw",
    "ro",
    "xattr",
    "clone_children",
    "cpuset_v2_mode",
    "noprefix",
    "favordynmods",
    "nofavordynmods",
    "nsdelegate",
    "memory_recursiveprot",
    "memory_localevents",
    "memory_hugetlb_accounting",
];

pub(super) fn detect(settings: Settings) -> Result<Cgroups, Error> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    // Not one of the kernel's little files: a host may have thousands of mounts.
    let text = std::fs::read_to_string(mountinfo).map_err(|source| Error::Read {
        path: mountinfo.to_owned(),
        source,
    })?;
    let (hierarchies, unified) = parse_mounts(&text, &settings.root);
    let nsdelegate = unified.as_ref().is_some_and(|mount| mount.nsdelegate);
    let unified = unified.map(|unified| unified.mount);
    let version = match (&hierarchies[..], &unified) {
        ([], None) => {
            return Err(Error::NotMounted {
                root: settings.root,
            });
        }
        ([], Some(_)) => Version::V2,
        _ => Version::V1,
    };
    let driver = match settings.driver {
        DriverChoice::Cgroupfs => Driver::Cgroupfs,
        DriverChoice::Auto if version == Version::V2 && systemd::is_there() => Driver::Systemd,
        DriverChoice::Auto => Driver::Cgroupfs,
        DriverChoice::Systemd if version == Version::V1 => {
            return Err(Error::SystemdOnV1 {
                root: settings.root,
            });
        }
        DriverChoice::Systemd if systemd::is_there() => Driver::Systemd,
        DriverChoice::Systemd => {
            let comm = file::read(Path::new("/proc/1/comm"))?.trim_end().to_owned();
            return Err(Error::NoSystemd { comm });
        }
    };
    let default_parent = match driver {
        Driver::Cgroupfs => path::normal(&settings.default_parent)?,
        // "/berth" stands for berth.slice.
        Driver::Systemd => {
            let normal = path::normal(&settings.default_parent)?;
            let last = normal.rsplit('/').next().unwrap_or_default();
            let slice = match last.ends_with(".slice") {
                true => last.to_owned(),
                false => format!("{last}.slice"),
            };
            let slice = systemd::slice_of(&slice).ok_or_else(|| Error::NotASlice {
                parent: normal.clone(),
            })?;
            systemd::path_of_slice(slice)
        }
    };
    let unified = match unified {
        Some(mount) => {
            let controllers = file::read(&mount.join("cgroup.controllers"))?;
            let controllers = controllers.split_whitespace().map(str::to_owned).collect();
            Some(Unified { mount, controllers })
        }
        None => None,
    };
    Ok(Cgroups {
        version,
        driver,
        default_parent,
        memory_guard: settings.memory_guard,
        pids_limit: settings.pids_limit,
        hierarchies,
        unified,
        nsdelegate,
        systemd: systemd::Systemd::default(),
        slices: RwLock::default(),
        entered: Mutex::default(),
        ours: Mutex::default(),
    })
}

/// A mount of cgroup2.
#[derive(Debug, PartialEq, Eq)]
struct Mount2 {
    mount: PathBuf,
    /// Whether a cgroup namespace is a border of delegation: the limits of its
    /// first cgroup are not for who is inside. Source: cgroup-v2.rst, "nsdelegate".
    nsdelegate: bool,
}

/// v1 hierarchies and the cgroup2 mount at or beneath `root`. Lines that make no sense are
/// passed over.
///
/// Source: proc_pid_mountinfo(5).
fn parse_mounts(text: &str, root: &Path) -> (Vec<Hierarchy>, Option<Mount2>) {
    let mut hierarchies: Vec<(&str, Hierarchy)> = Vec::new();
    let mut unified = None;
    for line in text.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let mut before = before.split(' ').skip(2);
        let (Some(device), Some(_), Some(mount)) = (before.next(), before.next(), before.next())
        else {
            continue;
        };
        let mut after = after.split(' ');
        let (Some(kind), Some(_), Some(options)) = (after.next(), after.next(), after.next())
        else {
            continue;
        };
        let mount = unescape(mount);
        if !mount.starts_with(root) {
            continue;
        }
        match kind {
            "cgroup2" => {
                let nsdelegate = options.split(',').any(|option| option == "nsdelegate");
                unified = unified.or(Some(Mount2 { mount, nsdelegate }));
            }
            "cgroup" => {
                let controllers: Vec<String> = options
                    .split(',')
                    .filter(|option| {
                        !OPTIONS.contains(option) && !option.starts_with("release_agent=")
                    })
                    .map(str::to_owned)
                    .collect();
                // The same hierarchy may be mounted at several places.
                let known = hierarchies.iter().any(|(other, _)| *other == device);
                if !known && !controllers.is_empty() {
                    hierarchies.push((device, Hierarchy { controllers, mount }));
                }
            }
            _ => {}
        }
    }
    (
        hierarchies
            .into_iter()
            .map(|(_, hierarchy)| hierarchy)
            .collect(),
        unified,
    )
}

/// Space, tab, newline and backslash stand as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|digits| bytes[at] == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)))
            .and_then(|d| {
                u8::try_from(d.iter().fold(0u32, |n, d| n * 8 + u32::from(d - b'0'))).ok()
            });
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/sys/fs/cgroup";

    #[test]
    fn a_hybrid_host_has_both() {
        let text = "\
            31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
            42 31 0:30 / /other/memory rw - cgroup cgroup rw,memory\n\
            rubbish\n43 - cgroup\n";
        let (v1, unified) = parse_mounts(text, Path::new(ROOT));
        let names: Vec<_> = v1.iter().map(|h| h.controllers.join("+")).collect();
        assert_eq!(names, ["cpu+cpuacct", "memory", "name=systemd"]);
        let mount = "/sys/fs/cgroup/unified".into();
        let nsdelegate = true;
        assert_eq!(unified, Some(Mount2 { mount, nsdelegate }));
    }

    #[test]
    fn a_unified_host_has_one() {
        for (options, nsdelegate) in [
            ("rw,nsdelegate,memory_recursiveprot", true),
            ("rw,memory_recursiveprot", false),
            ("rw", false),
        ] {
            let text = format!("29 23 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 {options}\n");
            let (v1, unified) = parse_mounts(&text, Path::new(ROOT));
            assert!(v1.is_empty());
            let mount = ROOT.into();
            assert_eq!(unified, Some(Mount2 { mount, nsdelegate }), "{options}");
        }
    }

    #[test]
    fn octal_escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134\9"), Path::new(r"/a b\\9"));
        assert_eq!(unescape(r"/\777"), Path::new(r"/\777"));
    }
}
