//! What a node still holds on the machine, found from outside: in /proc, in the
//! mount table, in the cgroup trees, in the host's network namespace and below
//! the node's root. Berth is not asked.

use crate::host::Host;
use crate::node::PULLS;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a node's traces are: enough to find and to remove them, also after the
/// test that made them was killed.
#[derive(Clone, Debug)]
pub struct Footprint {
    pub root: PathBuf,
    /// Name of the cgroup everything of the node is below.
    pub cgroup: String,
}

impl Footprint {
    /// Folders of cgroups of the node, parents before children, in every hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for top in cgroup_mounts() {
            // Where the daemon itself is not at the top, the parent lies a few levels down.
            find_folder(&top, &self.cgroup, 3, &mut found);
        }
        let parents = found.clone();
        for parent in parents {
            descend(&parent, &mut found);
        }
        found
    }

    /// Processes in those cgroups.
    pub fn cgroup_processes(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = self
            .cgroups()
            .iter()
            .flat_map(|dir| processes_of(dir))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Pids of the node that are nobody's child any more: monitors and what they
    /// started, found by the root in what they were given or hold open, or by
    /// their cgroup. `except` is the daemon.
    pub fn processes(&self, except: Option<u32>) -> Vec<i32> {
        let mut pids = self.cgroup_processes();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            if is_berths(&entry.path()) && self.is_named_by(&entry.path()) {
                pids.push(pid);
            }
        }
        pids.sort_unstable();
        pids.dedup();
        let except = except.map(|pid| pid.cast_signed());
        // A zombie is its parent's to collect and holds nothing.
        pids.retain(|pid| Some(*pid) != except && !is_zombie(*pid));
        pids
    }

    /// Whether a process has the root in its arguments, environment or open files.
    fn is_named_by(&self, proc: &Path) -> bool {
        let root = self.root.as_os_str().as_encoded_bytes();
        let in_text = |file: &str| {
            fs::read(proc.join(file))
                .is_ok_and(|text| text.windows(root.len()).any(|part| part == root))
        };
        let mut files = fs::read_dir(proc.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        in_text("cmdline")
            || in_text("environ")
            || files.any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(&self.root)))
    }

    /// Mount points below the root, deepest last. `/proc/self/mountinfo` is the
    /// machine's table: tests run in its mount namespace.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
        points
            .filter(|point| point.starts_with(&self.root))
            .collect()
    }

    /// Entries of a folder of the node's, relative to its root.
    pub fn entries(&self, below: &str) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(below))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.map(|e| e.file_name().display().to_string());
        // Locks and the like stay.
        names
            .filter(|name| !name.starts_with('.'))
            .map(|name| format!("{below}/{name}"))
            .collect()
    }

    /// Kills, unmounts and removes all of it. Goes on past failures: what cannot
    /// be removed is found by the next run.
    pub fn erase(&self) {
        // What forks while it is being killed leaves children.
        for _ in 0..100 {
            let pids = self.processes(None);
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let slice = format!("{}.slice", self.cgroup);
        if Path::new("/sys/fs/cgroup").join(&slice).exists() {
            // systemd's own to remove, with all the slices in it.
            _ = Command::new("systemctl").args(["stop", &slice]).status();
        }
        for mount in self.mounts().iter().rev() {
            _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for dir in self.cgroups().iter().rev() {
            _ = fs::remove_dir(dir);
        }
        for dir in self.cgroups().iter().rev() {
            _ = fs::remove_dir(dir);
        }
        if self.mounts().is_empty() {
            _ = fs::remove_dir_all(&self.root);
        }
    }
}

/// Everything that should not be there once every pod is gone and the daemon
/// still runs as `daemon`; one line each.
pub fn list(footprint: &Footprint, host: &Host, daemon: Option<u32>) -> Vec<String> {
    let mut left = Vec::new();
    for pid in footprint.processes(daemon) {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        left.push(format!(
            "process {pid}: {}",
            command.replace('\0', " ").trim_end()
        ));
    }
    left.extend(
        footprint
            .mounts()
            .iter()
            .map(|m| format!("mount {}", m.display())),
    );
    let slice = format!("{}.slice", footprint.cgroup);
    for dir in footprint.cgroups() {
        // The parent itself is made once and stays, and so is what layers are written in.
        let name = dir.file_name().and_then(|name| name.to_str());
        if name != Some(&footprint.cgroup) && name != Some(&slice) && !is_for_pulls(&dir) {
            left.push(format!("cgroup {}", dir.display()));
        }
    }
    for link in host.links() {
        if !["lo", "up0", "up0far", BRIDGE].contains(&link.as_str()) {
            left.push(format!("link {link}"));
        }
    }
    left.extend(
        host.nft_elements()
            .into_iter()
            .map(|e| format!("nftables element {e}")),
    );
    for (what, below) in [
        ("record", "lib/pods"),
        ("writable layer", "lib/containers"),
        ("sandbox", "run/sandboxes"),
        ("lease", "lib/network/leases"),
        ("attachment", "lib/network/attachments"),
        ("undo", "lib/undo"),
    ] {
        left.extend(
            footprint
                .entries(below)
                .into_iter()
                .map(|e| format!("{what} {e}")),
        );
    }
    left
}

/// Whether that folder is the cgroup that a node's layers are written in, not one within it.
pub(crate) fn is_for_pulls(cgroup: &Path) -> bool {
    let name = cgroup.file_name().and_then(|name| name.to_str());
    let stem = name.map(|name| name.strip_suffix(".slice").unwrap_or(name));
    stem.is_some_and(|stem| stem.rsplit('-').next() == Some(PULLS))
}

/// The built-in network's bridge: made with the first pod, kept from then on.
const BRIDGE: &str = "berth0";

/// By what it was called: the program itself may lie where nobody can name it.
fn is_berths(proc: &Path) -> bool {
    let arguments = fs::read(proc.join("cmdline")).unwrap_or_default();
    let program = arguments
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let program = String::from_utf8_lossy(program);
    program
        .rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with("berth"))
}

fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_none_or(|rest| rest.starts_with('Z') || rest.is_empty())
}

/// Mount points of every cgroup hierarchy, v1 and v2.
pub fn cgroup_mounts() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroup = |line: &str| {
        let (mount, source) = line.split_once(" - ")?;
        let kind = source.split(' ').next()?;
        let point = mount.split(' ').nth(4)?;
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(point))
    };
    table.lines().filter_map(cgroup).collect()
}

/// Pids in one cgroup, not in those below it.
pub fn processes_of(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // 0 is a process outside this PID namespace.
    text.lines()
        .filter_map(|pid| pid.parse().ok())
        .filter(|pid| *pid > 0)
        .collect()
}

fn find_folder(dir: &Path, name: &str, depth: usize, found: &mut Vec<PathBuf>) {
    for child in folders(dir) {
        let slice = child
            .file_name()
            .and_then(|n| n.to_str()?.strip_suffix(".slice"));
        if child.file_name().is_some_and(|n| n == name) || slice == Some(name) {
            found.push(child);
        } else if depth > 0 {
            find_folder(&child, name, depth - 1, found);
        }
    }
}

fn descend(dir: &Path, found: &mut Vec<PathBuf>) {
    for child in folders(dir) {
        found.push(child.clone());
        descend(&child, found);
    }
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// The inode of a process's network namespace.
pub fn netns_of(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net"))
        .ok()
        .map(|meta| meta.ino())
}
