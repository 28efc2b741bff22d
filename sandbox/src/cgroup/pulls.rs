//! The cgroup in which layers of images are written.
//!
//! ```text
//! cgroupfs   <path>/                       in every hierarchy with a controller; a writer moves
//!                                          itself in there
//! systemd    <slice>/berth-pull-<n>.scope  one for each writer, which ends with it; the weight
//!                                          is the slice's
//! ```
//! It is made when the daemon starts, again where somebody has removed it, and stays: what it has
//! written is read from its `io.stat`.
//!
//! A weight needs more than a file. It acts where the disk's scheduler is BFQ or, on cgroup v2,
//! where io.cost is on; and pages that are written back later are the cgroup's only on cgroup v2,
//! with the memory controller beside io. What of that is missing is a [`Shortcoming`].
//!
//! Source: kernel, `cgroup-v2.rst`, "IO" and "Writeback"; `block/bfq-iosched.rst`;
//! `cgroup-v1/blkio-controller.rst`.

use super::{BadPath, Cgroup, Cgroups, Driver, Error, Version, file, path, systemd, v2};
use crate::container_spec::Resources;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What `io.weight` takes. Source: kernel, CGROUP_WEIGHT_MIN and CGROUP_WEIGHT_MAX.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;
/// What BFQ takes; 100 is its default as it is io.weight's. Source: kernel, BFQ_MAX_WEIGHT.
const BFQ_WEIGHTS: std::ops::RangeInclusive<u32> = 1..=1000;
/// What CFQ took, and kernels that still have its file; 500 was the default.
const CFQ_WEIGHTS: std::ops::RangeInclusive<u32> = 10..=1000;
const CFQ_FACTOR: u32 = 5;

/// What is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullSettings {
    /// The path beneath every hierarchy's mount; with systemd "/a" stands for a.slice.
    pub path: String,
    /// As in `io.weight`, 1 to 10000; 0: as it is.
    pub io_weight: u32,
}

/// Checks a path for [`PullSettings`] without looking at this host: `parent` is where pods go
/// that name no parent.
///
/// # Errors
/// It climbs, names the root, or is `parent` or around it: processes would be in the way there.
pub fn check_pull_cgroup(path: &str, parent: &str) -> Result<(), String> {
    let own = path::normal(path).map_err(|error: BadPath| error.to_string())?;
    let stem = |path: &str| path.trim_end_matches(".slice").to_owned();
    let within = path::normal(parent)
        .is_ok_and(|parent| path::prefixes(&parent).any(|prefix| stem(prefix) == stem(&own)));
    if within {
        return Err(format!(
            "{own} is where pods go (cgroup.parent, {parent}): name a cgroup of its own"
        ));
    }
    Ok(())
}

/// Why a cgroup for pulls does less than was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shortcoming {
    /// Nothing weighs or counts I/O.
    NoIo { controller: &'static str },
    /// cgroup v2 without the memory controller.
    NoMemory,
    /// cgroup v1.
    Writeback,
    /// The kernel has neither BFQ nor io.cost.
    NoWeightFile { files: &'static str },
    /// No disk of this node does what the files say.
    NoDisk { files: String },
    /// A file refused the weight.
    Refused { path: PathBuf, why: String },
}

impl fmt::Display for Shortcoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shortcoming::NoIo { controller } => write!(
                f,
                "this host has no {controller} cgroup controller: the I/O of pulls is neither \
                 counted nor weighed"
            ),
            Shortcoming::NoMemory => f.write_str(
                "this host has no memory cgroup controller: what pulls write through the page \
                 cache is not counted as theirs",
            ),
            Shortcoming::Writeback => f.write_str(
                "cgroup v1 counts as a pull's only reads and what it begins to write by itself \
                 (files of 64 KiB and more); what the kernel writes back later is nobody's",
            ),
            Shortcoming::NoWeightFile { files } => write!(
                f,
                "the kernel has no weight for I/O here ({files}): it was built without BFQ and \
                 io.cost, or its module bfq is not loaded"
            ),
            Shortcoming::NoDisk { files } => write!(
                f,
                "no disk of this node goes by weights ({files}): none has the BFQ scheduler{}",
                if files.contains("io.weight") {
                    ", and io.cost is on for none"
                } else {
                    ""
                }
            ),
            Shortcoming::Refused { path, why } => {
                write!(f, "{} does not take the weight: {why}", path.display())
            }
        }
    }
}

impl Shortcoming {
    /// What to do about it; empty where nothing helps.
    pub fn advice(&self) -> &'static str {
        match self {
            Shortcoming::NoIo { .. } | Shortcoming::NoMemory => {
                "the kernel was built or started without (cgroup_disable=)"
            }
            Shortcoming::Writeback => "boot with systemd.unified_cgroup_hierarchy=1",
            Shortcoming::NoWeightFile { .. } => "load the module bfq",
            Shortcoming::NoDisk { .. } => {
                "echo bfq > /sys/block/DISK/queue/scheduler, and make it last by a udev rule"
            }
            Shortcoming::Refused { .. } => "see what the kernel's documentation says of that file",
        }
    }
}

/// Where pulls write.
#[derive(Debug)]
pub struct PullCgroup {
    cgroups: Arc<Cgroups>,
    cgroup: Cgroup,
    /// With systemd: the slice.
    slice: Option<String>,
    io_weight: Option<u32>,
    scopes: AtomicU64,
}

impl PullCgroup {
    /// The one that `settings` name, whether or not it is there; [`PullCgroup::make`] makes it.
    ///
    /// # Errors
    /// A path that is none, or no slice where the driver is systemd.
    pub fn new(cgroups: Arc<Cgroups>, settings: &PullSettings) -> Result<PullCgroup, Error> {
        let path = path::normal(&settings.path)?;
        let slice = match cgroups.driver {
            Driver::Cgroupfs => None,
            Driver::Systemd => {
                let last = path.rsplit('/').next().unwrap_or_default();
                let slice = match last.ends_with(".slice") {
                    true => last.to_owned(),
                    false => format!("{last}.slice"),
                };
                let slice = systemd::slice_of(&slice).ok_or(Error::NotASlice {
                    parent: path.clone(),
                })?;
                Some(slice.to_owned())
            }
        };
        let cgroup = match &slice {
            Some(slice) => cgroups.at(&systemd::path_of_slice(slice))?,
            None => cgroups.at(&path)?,
        };
        Ok(PullCgroup {
            cgroups,
            cgroup,
            slice,
            io_weight: Some(settings.io_weight)
                .filter(|weight| *weight != 0)
                .map(|weight| weight.clamp(*WEIGHTS.start(), *WEIGHTS.end())),
            scopes: AtomicU64::new(0),
        })
    }

    /// Beneath every hierarchy's mount, with a leading slash.
    pub fn path(&self) -> &str {
        self.cgroup.path()
    }

    /// Whether it is there, where processes can be put into it.
    pub fn exists(&self) -> bool {
        self.directories().all(Path::exists)
    }

    /// The directories processes are put into: on a hybrid host those with controllers, the
    /// unified one not, as entering that waits for the whole machine.
    fn directories(&self) -> impl Iterator<Item = &Path> {
        let named = |name: &String| name.starts_with("name=");
        let v1 = self.cgroup.directories.iter();
        let v1 = v1.filter(move |directory| !directory.controllers.iter().all(named));
        let v2 = self.cgroup.unified.as_deref();
        let v2 = v2.filter(|_| self.cgroup.version == Version::V2);
        v1.map(|directory| directory.path.as_path()).chain(v2)
    }

    /// Makes it and gives it its weight. Where it is there it gets its weight again. Blocks.
    ///
    /// # Errors
    /// It cannot be made, or no process could be in it.
    pub fn make(&self) -> Result<Vec<Shortcoming>, Error> {
        if let Some(slice) = &self.slice {
            let systemd = &self.cgroups.systemd;
            systemd.start_weighted_slice(slice, self.io_weight.map(u64::from))?;
            for directory in self.directories() {
                systemd::until_there(directory)?;
            }
            return Ok(self.shortcomings());
        }
        for hierarchy in &self.cgroups.hierarchies {
            let cpuset = hierarchy.controls("cpuset");
            for prefix in path::prefixes(self.path()) {
                let directory = hierarchy.mount.join(&prefix[1..]);
                let wanted = self.directories().any(|own| own.starts_with(&directory));
                if wanted {
                    file::make_directory(&directory)?;
                    if cpuset {
                        super::v1::inherit_cpuset(&directory, &hierarchy.mount)?;
                    }
                }
            }
        }
        if let Some(unified) = &self.cgroups.unified
            && self.cgroup.version == Version::V2
        {
            let parent = self
                .path()
                .rsplit_once('/')
                .map_or("", |(parent, _)| parent);
            for prefix in path::prefixes(self.path()) {
                file::make_directory(&unified.mount.join(&prefix[1..]))?;
            }
            // io, and memory: it is whose memory a page is that says whose I/O its writing is.
            v2::enable(&unified.mount, parent, &unified.controllers)?;
        }
        let mut shortcomings = self.shortcomings();
        if let Some(weight) = self.io_weight {
            for (path, value) in self.weights(weight) {
                if let Err(error) = file::write_io(&path, &value) {
                    let why = error.to_string();
                    shortcomings.push(Shortcoming::Refused { path, why });
                }
            }
        }
        Ok(shortcomings)
    }

    /// The files that are there for a weight, each with what it stands for in there.
    fn weights(&self, weight: u32) -> Vec<(PathBuf, String)> {
        let (directory, names) = match self.cgroup.version {
            Version::V1 => (self.cgroup.directory("blkio"), V1_FILES),
            Version::V2 => (self.cgroup.directory("io"), V2_FILES),
        };
        let files = directory.into_iter().flat_map(|directory| {
            names.iter().map(move |(name, range, factor)| {
                let value = (weight * factor).clamp(*range.start(), *range.end());
                (directory.join(name), value.to_string())
            })
        });
        files.filter(|(path, _)| path.exists()).collect()
    }

    /// What keeps it from doing all that was asked for. Changes nothing; of the weight's files it
    /// says something only where the cgroup is there.
    pub fn shortcomings(&self) -> Vec<Shortcoming> {
        let controllers = self.cgroups.controllers();
        let (controller, files) = match self.cgroup.version {
            Version::V1 => ("blkio", "blkio.bfq.weight or blkio.weight"),
            Version::V2 => ("io", "io.weight or io.bfq.weight"),
        };
        let has = |name: &str| match self.cgroup.version {
            Version::V1 => self.cgroup.directory(name).is_some(),
            Version::V2 => controllers.contains(name),
        };
        let mut found = Vec::new();
        if !has(controller) {
            found.push(Shortcoming::NoIo { controller });
            return found;
        }
        match self.cgroup.version {
            Version::V1 => found.push(Shortcoming::Writeback),
            Version::V2 if !has("memory") => found.push(Shortcoming::NoMemory),
            Version::V2 => {}
        }
        let (Some(weight), true) = (self.io_weight, self.exists()) else {
            return found;
        };
        let weights = self.weights(weight);
        let names: Vec<_> = weights
            .iter()
            .filter_map(|(path, _)| path.file_name()?.to_str())
            .collect();
        if names.is_empty() {
            found.push(Shortcoming::NoWeightFile { files });
        } else if !goes_by_weights(&names, self.cost_settings().as_deref(), &schedulers()) {
            let files = names.join(", ");
            found.push(Shortcoming::NoDisk { files });
        }
        found
    }

    /// Which disks io.cost is on for.
    fn cost_settings(&self) -> Option<String> {
        let unified = self.cgroups.unified.as_ref()?;
        file::read(&unified.mount.join("io.cost.qos")).ok()
    }

    /// Lets the process `pid` in, which does nothing yet: puts it there, or gives the files that
    /// it has to write "0" to, from its only thread. Blocks.
    ///
    /// # Errors
    /// What the kernel or systemd says.
    pub fn admit(&self, pid: u32) -> Result<Vec<PathBuf>, Error> {
        if !self.exists() {
            self.make()?;
        }
        let Some(slice) = &self.slice else {
            let file = match self.cgroup.version {
                // Unlike `cgroup.procs` it does not wait for every fork on the machine.
                Version::V1 => "tasks",
                Version::V2 => "cgroup.procs",
            };
            return Ok(self.directories().map(|d| d.join(file)).collect());
        };
        let number = self.scopes.fetch_add(1, Ordering::Relaxed);
        let unit = format!("berth-pull-{}-{number}.scope", std::process::id());
        self.cgroups.systemd.start_scope(
            &unit,
            "Berth writes a layer of an image",
            slice,
            pid,
            &Resources::default(),
        )?;
        systemd::until_entered(pid, &format!("{}/{unit}", self.path()))?;
        Ok(Vec::new())
    }
}

type WeightFile = (&'static str, std::ops::RangeInclusive<u32>, u32);

/// Each with its range and what its default is to io.weight's, 100: the same share stays the
/// same share, as far as the range goes.
const V1_FILES: &[WeightFile] = &[
    ("blkio.bfq.weight", BFQ_WEIGHTS, 1),
    ("blkio.weight", CFQ_WEIGHTS, CFQ_FACTOR),
];
const V2_FILES: &[WeightFile] = &[("io.weight", WEIGHTS, 1), ("io.bfq.weight", BFQ_WEIGHTS, 1)];

/// What each disk's scheduler file says.
fn schedulers() -> Vec<String> {
    let disks = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten();
    disks
        .filter_map(|disk| file::read(&disk.path().join("queue/scheduler")).ok())
        .collect()
}

/// Whether there is a disk for one of the files: `cost` is the root's `io.cost.qos`.
fn goes_by_weights(files: &[&str], cost: Option<&str>, schedulers: &[String]) -> bool {
    let bfq = files.iter().any(|name| name.contains("bfq"));
    let by_bfq = bfq && schedulers.iter().any(|text| text.contains("[bfq]"));
    let by_cost = files.contains(&"io.weight")
        && cost.is_some_and(|text| text.split_whitespace().any(|word| word == "enable=1"));
    by_bfq || by_cost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_of_pods_is_none_for_pulls() {
        check_pull_cgroup("/berth-pulls", "/berth").unwrap();
        check_pull_cgroup("berth-pulls.slice", "/berth").unwrap();
        check_pull_cgroup("/berth/pulls", "/berth").unwrap();
        for (path, parent) in [
            ("/berth", "/berth"),
            ("berth.slice", "/berth"),
            ("/node", "/node/berth"),
            ("/a/../b", "/berth"),
            ("/", "/berth"),
        ] {
            check_pull_cgroup(path, parent).unwrap_err();
        }
    }

    #[test]
    fn a_weight_acts_where_a_disk_goes_by_it() {
        let plain = ["[none] mq-deadline kyber bfq \n".to_owned()];
        let bfq = ["none mq-deadline kyber [bfq]\n".to_owned()];
        assert!(!goes_by_weights(
            &["io.weight", "io.bfq.weight"],
            None,
            &plain
        ));
        assert!(goes_by_weights(&["io.bfq.weight"], None, &bfq));
        assert!(!goes_by_weights(&["io.weight"], None, &bfq));
        let on = Some("8:0 enable=1 ctrl=auto\n");
        assert!(goes_by_weights(&["io.weight"], on, &plain));
        assert!(!goes_by_weights(&["io.bfq.weight"], on, &plain));
        let off = Some("8:0 enable=0\n");
        assert!(!goes_by_weights(&["io.weight"], off, &plain));
    }
}
