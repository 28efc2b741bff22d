//! The cgroups of pods and containers: made, limited, measured, emptied and removed.
//!
//! ```text
//! <parent>/                 the pod's: the kubelet's, or made here and recorded in `Parent::made`
//!   berth-<container id>/   the container's: one directory in every v1 hierarchy and in the
//!                           unified one, or a single directory on v2
//! ```
//!
//! Nothing here is needed after a crash but what [`Cgroup`] and [`Parent`] hold, and both are
//! plain data for the records. Everything is level-triggered: the kernel's files are asked
//! again until they say what was wanted or a deadline passes.
//!
//! Source: kernel `Documentation/admin-guide/cgroup-v1/`, `cgroup-v2.rst`; cgroups(7).

mod detect;
mod device;
mod file;
mod freezer;
mod journal;
mod kill;
mod path;
mod pulls;
mod stats;
mod systemd;
mod usage;
mod v1;
mod v2;

pub use device::{DeviceKind, DeviceRule};
pub use journal::Journal;
pub use path::BadPath;
pub use pulls::{PullCgroup, PullSettings, Shortcoming, check_pull_cgroup};
pub use stats::{CpuStats, MemoryStats, PidsStats, Pressure, PressureTotals, Stats, SwapStats};
pub use systemd::{SystemdError, is_there as systemd_is_there};
pub use usage::{DeviceIo, HugepageUsage, Limits};

use crate::container_spec::Resources;
use crate::id::{ContainerId, PodId};
use berth_proto::monitor_v1;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

/// What can go wrong; the system's words are the `source`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no cgroup hierarchy is mounted beneath {root}")]
    NotMounted { root: PathBuf },
    #[error("a container that may write to its cgroup could raise its own limits: {why}")]
    Undelegated { why: &'static str },
    #[error("the systemd cgroup driver needs cgroup v2, and this host mounts v1 beneath {root}")]
    SystemdOnV1 { root: PathBuf },
    #[error(
        "the systemd cgroup driver needs systemd as process 1, which is {comm:?}, and the system bus"
    )]
    NoSystemd { comm: String },
    #[error(
        "the cgroup parent {parent:?} is no slice, and the cgroup driver here is systemd: set \
         cgroupDriver: systemd in the kubelet, or cgroup.driver = \"cgroupfs\" in Berth"
    )]
    NotASlice { parent: String },
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    #[error("waited {waited:?} in vain for {what}")]
    NotInTime { what: String, waited: Duration },
    #[error(transparent)]
    BadPath(#[from] BadPath),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {value:?} to {path}")]
    Write {
        path: PathBuf,
        value: String,
        source: io::Error,
    },
    #[error("cannot make the cgroup {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error(
        "cannot enable {controllers} for the children of a cgroup that has processes itself: \
         {path} (cgroup v2 allows processes only in leaves)"
    )]
    InternalProcesses {
        path: PathBuf,
        controllers: String,
        source: io::Error,
    },
    #[error("{what} was asked for, and this host has no {controller} cgroup controller")]
    NoController {
        controller: &'static str,
        what: &'static str,
    },
    #[error("{key:?} is a cgroup v2 file, and this host mounts cgroup v1")]
    UnifiedOnV1 { key: String },
    #[error("{key:?} is not the name of a cgroup v2 limit")]
    BadUnifiedKey { key: String },
    #[error("{page_size:?} is not a huge page size such as \"2MB\"")]
    BadPageSize { page_size: String },
    #[error("the memory limit {limit} is below what {path} uses: {usage} bytes")]
    BelowUsage {
        path: PathBuf,
        limit: u64,
        usage: u64,
    },
    #[error("cannot restrict the devices of {path}")]
    Devices { path: PathBuf, source: io::Error },
    #[error("a limit of {swap} bytes for memory plus swap is below the memory limit of {memory}")]
    SwapBelowMemory { memory: i64, swap: i64 },
    #[error("a limit for memory plus swap needs a memory limit on cgroup v2")]
    SwapWithoutMemory,
    #[error("{path} still has processes {pids:?} after {waited:?}")]
    StillAlive {
        path: PathBuf,
        pids: Vec<i32>,
        waited: Duration,
    },
    #[error("there is no cgroup freezer at {path}")]
    Missing { path: PathBuf },
    #[error("{path} cannot be frozen: something in it still ran after {waited:?}")]
    StillRunning { path: PathBuf, waited: Duration },
    #[error("cannot remove {}", list(.failures))]
    Remove { failures: Vec<(PathBuf, io::Error)> },
}

fn list(failures: &[(PathBuf, io::Error)]) -> String {
    let each: Vec<String> = failures
        .iter()
        .map(|(path, error)| format!("{}: {error}", path.display()))
        .collect();
    each.join("; ")
}

/// Which of the kernel's two interfaces limits are written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// Controllers mounted one by one, on a hybrid host with a unified hierarchy beside them.
    V1,
    V2,
}

/// Who makes the cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Driver {
    Cgroupfs,
    Systemd,
}

/// The driver as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverChoice {
    /// systemd where it is process 1 and cgroup v2 is mounted, as it then thinks the cgroups
    /// its own; else cgroupfs. What [`Cgroups::driver`] then says is what the kubelet is told.
    #[default]
    Auto,
    Cgroupfs,
    Systemd,
}

/// What [`Cgroups::detect`] is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where cgroup file systems are mounted.
    pub root: PathBuf,
    pub driver: DriverChoice,
    /// Where pods go whose config names no cgroup parent.
    pub default_parent: String,
    /// Whether a memory limit below what is used is refused on v2, as v1's kernel does.
    pub memory_guard: bool,
    /// Processes a container may have that is given no limit; 0 for as many as it likes.
    pub pids_limit: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/sys/fs/cgroup"),
            driver: DriverChoice::Auto,
            default_parent: "/berth".to_owned(),
            memory_guard: true,
            pids_limit: 0,
        }
    }
}

/// A mounted v1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// "cpu", "cpuacct"; "name=systemd" for a hierarchy without controllers.
    controllers: Vec<String>,
    mount: PathBuf,
}

/// The mounted cgroup2 hierarchy: the only one on v2, beside the others on a hybrid host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unified {
    mount: PathBuf,
    controllers: Vec<String>,
}

/// The host's cgroups, as found at start.
#[derive(Debug)]
pub struct Cgroups {
    version: Version,
    driver: Driver,
    default_parent: String,
    memory_guard: bool,
    pids_limit: u32,
    hierarchies: Vec<Hierarchy>,
    unified: Option<Unified>,
    /// Whether the unified hierarchy is mounted with nsdelegate.
    nsdelegate: bool,
    systemd: systemd::Systemd,
    /// Held to read while something is started in a slice, to write while one is stopped.
    slices: RwLock<()>,
    /// Slices in which somebody else is starting something, by path, and how many are.
    entered: Mutex<BTreeMap<String, usize>>,
    /// Directories of pods that Berth made, so also its to remove: kept here because several
    /// pods may share one, and the last to go is not the one that made it.
    ours: Mutex<BTreeSet<PathBuf>>,
}

/// A pod's cgroup; goes into the pod's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Beneath every hierarchy's mount, with a leading slash.
    pub path: String,
    /// Those of its directories that Berth made, outermost first. The kubelet's are not here.
    pub made: Vec<PathBuf>,
}

/// One v1 directory of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Directory {
    controllers: Vec<String>,
    path: PathBuf,
}

/// A cgroup in all its hierarchies; goes into the container's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    version: Version,
    path: String,
    directories: Vec<Directory>,
    unified: Option<PathBuf>,
    /// systemd's unit; its slice is the last part of the path above.
    #[serde(default)]
    scope: Option<String>,
}

impl Cgroups {
    /// What this host has, read from /proc/self/mountinfo.
    ///
    /// # Errors
    /// No cgroup file system beneath `settings.root`, the systemd driver where it cannot work,
    /// a default parent that is no path.
    pub fn detect(settings: Settings) -> Result<Self, Error> {
        detect::detect(settings)
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// What RuntimeConfig has to say.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// Whether a container that may write to its cgroup can have cgroups of its own
    /// in it without changing the limits it was given.
    ///
    /// # Errors
    /// `Undelegated` with what is in the way.
    pub fn delegates(&self) -> Result<(), Error> {
        match (self.version, self.nsdelegate) {
            (Version::V2, true) => Ok(()),
            (Version::V2, false) => Err(Error::Undelegated {
                why: "cgroup2 is mounted without the option nsdelegate",
            }),
            (Version::V1, _) => Err(Error::Undelegated {
                why: "this host has cgroup v1",
            }),
        }
    }

    /// Where pods go whose config names no parent.
    pub fn default_parent(&self) -> &str {
        &self.default_parent
    }

    /// Names of the controllers that can be used, from all hierarchies.
    pub fn controllers(&self) -> BTreeSet<&str> {
        let v1 = self.hierarchies.iter().flat_map(|h| &h.controllers);
        let v2 = self.unified.iter().flat_map(|u| &u.controllers);
        v1.chain(v2)
            .map(String::as_str)
            .filter(|name| !name.starts_with("name="))
            .collect()
    }

    /// Handle of the cgroup at `path`, whether or not it exists: a pod's, for its statistics.
    ///
    /// # Errors
    /// `path` climbs, or holds what no cgroup name can.
    pub fn at(&self, path: &str) -> Result<Cgroup, Error> {
        let path = path::normal(path)?;
        let below = |mount: &Path| mount.join(&path[1..]);
        Ok(Cgroup {
            version: self.version,
            directories: self
                .hierarchies
                .iter()
                .map(|h| Directory {
                    controllers: h.controllers.clone(),
                    path: below(&h.mount),
                })
                .collect(),
            unified: self.unified.as_ref().map(|u| below(&u.mount)),
            scope: None,
            path,
        })
    }

    /// Handle of a container's cgroup beneath `parent` (empty: the default one), whether or not
    /// it exists.
    ///
    /// # Errors
    /// `parent` is no path; with systemd, no slice.
    pub fn container(&self, parent: &str, container: &ContainerId) -> Result<Cgroup, Error> {
        let parent = if parent.is_empty() {
            &self.default_parent
        } else {
            parent
        };
        match self.driver {
            Driver::Cgroupfs => {
                let parent = path::normal(parent)?;
                self.at(&format!("{parent}/berth-{container}"))
            }
            Driver::Systemd => {
                let parent = systemd::path_of_slice(self.slice(parent)?);
                let unit = format!("berth-{container}.scope");
                let mut cgroup = self.at(&format!("{parent}/{unit}"))?;
                cgroup.scope = Some(unit);
                Ok(cgroup)
            }
        }
    }

    /// The parent of a pod whose config names none: one of its own in the default one.
    pub fn own_parent(&self, pod: &PodId) -> String {
        match self.driver {
            Driver::Cgroupfs => format!("{}/pod-{pod}", self.default_parent),
            Driver::Systemd => {
                let slice = self.slice(&self.default_parent).unwrap_or("berth.slice");
                let stem = slice.strip_suffix(".slice").unwrap_or(slice);
                systemd::path_of_slice(&format!("{stem}-pod{pod}.slice"))
            }
        }
    }

    fn slice<'a>(&self, parent: &'a str) -> Result<&'a str, Error> {
        systemd::slice_of(parent).ok_or_else(|| Error::NotASlice {
            parent: parent.chars().take(300).collect(),
        })
    }

    fn ensure_slice(&self, parent: &str) -> Result<Parent, Error> {
        let slice = self.slice(parent)?;
        let path = path::normal(&systemd::path_of_slice(slice))?;
        let Some(directory) = self.prefixes(&path).last() else {
            return Ok(Parent {
                path,
                made: Vec::new(),
            });
        };
        // Starting one and stopping one must not meet, see `remove_slices`.
        let _starting = self.slices.read().unwrap_or_else(PoisonError::into_inner);
        let mut ours = BTreeSet::new();
        if !directory.exists() {
            self.systemd.start_slice(slice)?;
            systemd::until_there(&directory)?;
            ours.insert(directory.clone());
        }
        let mut known = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        known.append(&mut ours);
        let made = known.get(&directory).cloned();
        Ok(Parent {
            path,
            made: made.into_iter().collect(),
        })
    }

    /// Stops a pod's slice, where Berth started it and nothing is in it any more. The slices
    /// that one is in stay: systemd would stop with them what has just begun in there.
    fn remove_slices(&self, parent: &Parent) -> Result<(), Error> {
        for directory in parent.made.iter().rev() {
            let Some(unit) = directory.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            // Nothing is started between the look and the stop.
            let _stopping = self.slices.write().unwrap_or_else(PoisonError::into_inner);
            let inhabited = std::fs::read_dir(directory).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            });
            if inhabited || self.is_entered(&parent.path) {
                // Another pod's: that one's record owns it as well.
                continue;
            }
            self.systemd.stop(unit)?;
            systemd::until_gone(directory, SYSTEMD_TIDIES)?;
            let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
            ours.remove(directory);
        }
        Ok(())
    }

    /// Makes the scope of a container that starts, around the process `holder`, and limits it.
    /// Without systemd its cgroup is there already, and nothing is done.
    ///
    /// # Errors
    /// systemd refuses, or what [`Cgroups::create`] says of limits; the scope goes with `holder`.
    pub fn open_scope(
        &self,
        cgroup: &Cgroup,
        holder: u32,
        resources: &Resources,
        devices: &[DeviceRule],
    ) -> Result<(), Error> {
        let (Some(unit), Some(directory)) = (&cgroup.scope, &cgroup.unified) else {
            return Ok(());
        };
        let slice = cgroup.slice();
        let _starting = self.slices.read().unwrap_or_else(PoisonError::into_inner);
        self.systemd.start_scope(
            unit,
            &format!("Berth container {unit}"),
            slice,
            holder,
            &self.with_defaults(resources),
        )?;
        systemd::until_entered(holder, &cgroup.path)?;
        systemd::until_there(directory)?;
        if let Some((parent, _)) = cgroup.path.rsplit_once('/') {
            self.count_huge_pages(parent, resources);
        }
        let resources = self.with_defaults(resources);
        self.apply(cgroup, &resources, &mut Journal::forgetful())?;
        if !devices.is_empty() {
            device::apply(cgroup, devices)?;
        }
        Ok(())
    }

    /// Keeps the slice of a container whose scope a runtime is about to make from being stopped
    /// as an empty one, as long as what is returned lives. Blocks while one is being stopped.
    pub fn enter_slice(self: &Arc<Self>, cgroup: &Cgroup) -> Entered {
        let _starting = self.slices.read().unwrap_or_else(PoisonError::into_inner);
        let slice = cgroup.parent_path().to_owned();
        let mut entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        *entered.entry(slice.clone()).or_default() += 1;
        Entered {
            cgroups: self.clone(),
            slice,
        }
    }

    fn is_entered(&self, slice: &str) -> bool {
        let entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        entered.contains_key(slice)
    }

    /// Gives a container that an OCI runtime has just started the limits that Berth's own
    /// launcher would have given it: on v2 runtimes differ in what they make of shares and of
    /// what is not limited, and systemd is told, so that it does not undo it. On v1 all agree.
    ///
    /// # Errors
    /// As [`Cgroups::update`]; one that has ended meanwhile is none.
    pub fn settle(&self, cgroup: &Cgroup, resources: &Resources) -> Result<(), Error> {
        let (Version::V2, Some(directory)) = (cgroup.version, &cgroup.unified) else {
            return Ok(());
        };
        let resources = self.with_defaults(resources);
        let told = match &cgroup.scope {
            Some(unit) => self.systemd.set_limits(unit, &resources, true),
            None => Ok(()),
        };
        let written = told.map_err(Error::from).and_then(|()| {
            // No guard: the runtime has set the same already.
            v2::apply(directory, &resources, false, &mut Journal::forgetful())
        });
        written.or_else(|error| match cgroup.exists() {
            true => Err(error),
            false => Ok(()),
        })
    }

    /// What an OCI runtime is to be told of the limits of a container whose scope it makes: what
    /// Berth does by itself elsewhere is said. `None` where it is given a cgroup that is limited.
    ///
    /// # Errors
    /// A raw file that is none of a limit.
    pub fn said_to_runtime(
        &self,
        cgroup: &Cgroup,
        resources: &Resources,
    ) -> Result<Option<Resources>, Error> {
        if cgroup.scope.is_none() {
            return Ok(None);
        }
        v2::check_unified(resources)?;
        let mut said = self.with_defaults(resources);
        // A scope has a limit of its own where none is said.
        said.pids_limit = match said.pids_limit {
            Some(limit @ 1..) => Some(limit),
            Some(_) => Some(-1),
            None if said.unified.contains_key("pids.max") => None,
            None => Some(-1),
        };
        // No word on swap means none.
        let memory = said.memory_limit_bytes.filter(|limit| *limit > 0);
        let swap = said.memory_swap_limit_bytes.filter(|swap| *swap != 0);
        said.memory_swap_limit_bytes = swap.or(memory);
        Ok(Some(said))
    }

    /// What a container is limited to that is given no limit.
    fn with_defaults(&self, resources: &Resources) -> Resources {
        let mut resources = resources.clone();
        let own = resources.unified.contains_key("pids.max");
        if resources.pids_limit.is_none() && self.pids_limit > 0 && !own {
            resources.pids_limit = Some(self.pids_limit.into());
        }
        resources
    }

    /// Removes a container's cgroup that nothing is in any more; with systemd it is systemd
    /// that does, and is told to where it does not by itself.
    ///
    /// # Errors
    /// As [`Cgroup::remove`].
    pub fn release(&self, cgroup: &Cgroup, deadline: Duration) -> Result<(), Error> {
        if let (Some(unit), Some(directory)) = (&cgroup.scope, &cgroup.unified)
            && systemd::until_gone(directory, SYSTEMD_NOTICES).is_err()
        {
            self.systemd.stop(unit)?;
            // What is still there then is removed by hand, or said.
            let _ = systemd::until_gone(directory, SYSTEMD_TIDIES);
        }
        cgroup.remove(deadline)
    }

    /// Sees to it that a pod's cgroup exists in every hierarchy. Empty stands for the default
    /// parent. With the kubelet it does already, but for the unified hierarchy of a hybrid host.
    ///
    /// # Errors
    /// A bad path, or what the kernel says; then nothing stays behind.
    pub fn ensure_parent(&self, parent: &str) -> Result<Parent, Error> {
        let parent = if parent.is_empty() {
            &self.default_parent
        } else {
            parent
        };
        if self.driver == Driver::Systemd {
            return self.ensure_slice(parent);
        }
        let path = path::normal(parent)?;
        let mut made = Vec::new();
        match self.make_path(&path, &mut made) {
            Ok(()) => {
                let ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
                let made = self
                    .prefixes(&path)
                    .filter(|dir| ours.contains(dir))
                    .collect();
                Ok(Parent { path, made })
            }
            Err(error) => {
                // The first error is the answer; a directory that stays is empty and in `ours`.
                let _ = self.remove_parent(&Parent { path, made });
                Err(error)
            }
        }
    }

    /// Says after a restart that `parent` came out of a record, so that its directories are
    /// known to be Berth's.
    pub fn adopt_parent(&self, parent: &Parent) {
        let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        ours.extend(parent.made.iter().cloned());
    }

    /// Removes what Berth made of a pod's cgroup and nobody uses any more. Succeeds where it is
    /// gone, and where another pod is still beneath it: that one's record owns it as well.
    ///
    /// # Errors
    /// Each directory that the kernel would not let go.
    pub fn remove_parent(&self, parent: &Parent) -> Result<(), Error> {
        if self.driver == Driver::Systemd {
            return self.remove_slices(parent);
        }
        let mut failures = Vec::new();
        let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        for path in parent.made.iter().rev() {
            match rustix::fs::rmdir(path) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {
                    ours.remove(path);
                }
                Err(rustix::io::Errno::BUSY | rustix::io::Errno::NOTEMPTY) => {}
                Err(errno) => failures.push((path.clone(), errno.into())),
            }
        }
        if failures.is_empty() {
            Ok(())
        } else {
            Err(Error::Remove { failures })
        }
    }

    /// Every directory of `path`, outermost first, in each hierarchy.
    fn prefixes<'a>(&'a self, path: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
        let v1 = self.hierarchies.iter().map(|h| h.mount.as_path());
        let v2 = self.unified.iter().map(|u| u.mount.as_path());
        v1.chain(v2)
            .flat_map(move |mount| path::prefixes(path).map(move |prefix| mount.join(&prefix[1..])))
    }

    fn make_path(&self, path: &str, made: &mut Vec<PathBuf>) -> Result<(), Error> {
        for hierarchy in &self.hierarchies {
            let cpuset = hierarchy.controllers.iter().any(|name| name == "cpuset");
            for prefix in path::prefixes(path) {
                let directory = hierarchy.mount.join(&prefix[1..]);
                self.make_parent_directory(&directory, made)?;
                if cpuset {
                    v1::inherit_cpuset(&directory, &hierarchy.mount)?;
                }
            }
        }
        if let Some(unified) = &self.unified {
            for prefix in path::prefixes(path) {
                self.make_parent_directory(&unified.mount.join(&prefix[1..]), made)?;
            }
            if self.version == Version::V2 {
                v2::enable(&unified.mount, path, &unified.controllers)?;
            }
        }
        Ok(())
    }

    fn make_parent_directory(&self, path: &Path, made: &mut Vec<PathBuf>) -> Result<(), Error> {
        // Held over the mkdir: a remover must not find the directory made and not yet ours.
        let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        if file::make_directory(path)? {
            ours.insert(path.to_owned());
            made.push(path.to_owned());
        }
        Ok(())
    }

    /// Makes a container's cgroup beneath `parent` (empty: the default one) and writes its
    /// limits. Made again after a crash, it is the same one. An empty list of device rules
    /// leaves the parent's. On v2 the rules become a program in the kernel.
    ///
    /// # Errors
    /// What cannot be limited on this host, or what the kernel says; then nothing stays behind.
    pub fn create(
        &self,
        parent: &str,
        container: &ContainerId,
        resources: &Resources,
        devices: &[DeviceRule],
    ) -> Result<Cgroup, Error> {
        let cgroup = self.container(parent, container)?;
        if self.driver == Driver::Systemd {
            // A scope lives only with a process in it: it is made when the container starts.
            return Ok(cgroup);
        }
        let parent = cgroup
            .path
            .rsplit_once('/')
            .map_or(String::new(), |(parent, _)| parent.to_owned());
        let result = self.make(&parent, &cgroup, resources, devices);
        if result.is_err() {
            // The first error is the answer; the caller's record lets recovery try again.
            let _ = cgroup.remove(UNDO_DEADLINE);
        }
        result.map(|()| cgroup)
    }

    fn make(
        &self,
        parent: &str,
        cgroup: &Cgroup,
        resources: &Resources,
        devices: &[DeviceRule],
    ) -> Result<(), Error> {
        for directory in cgroup.all() {
            match file::make_directory(directory) {
                Err(Error::Make { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    self.ensure_parent(parent)?;
                    file::make_directory(directory)?;
                }
                other => {
                    other?;
                }
            }
        }
        if let Some(unified) = &self.unified {
            if self.version == Version::V2 {
                v2::enable(&unified.mount, parent, &unified.controllers)?;
            } else {
                self.count_huge_pages(parent, resources);
            }
        }
        if let Some(cpuset) = self.hierarchies.iter().find(|h| h.controls("cpuset"))
            && let Some(directory) = cgroup.directory("cpuset")
        {
            v1::inherit_cpuset(directory, &cpuset.mount)?;
        }
        let resources = self.with_defaults(resources);
        self.apply(cgroup, &resources, &mut Journal::forgetful())?;
        if !devices.is_empty() {
            device::apply(cgroup, devices)?;
        }
        Ok(())
    }

    /// Has the unified hierarchy count the huge pages of what is beneath `parent`, where they
    /// are limited and nobody else sees to that: v1's other controllers are not there, and
    /// systemd does not know this one, so it leaves it alone. A parent with processes forbids
    /// it; huge pages then stay unlimited, as on every host without the controller.
    fn count_huge_pages(&self, parent: &str, resources: &Resources) {
        let Some(unified) = &self.unified else { return };
        let known = unified.controllers.iter().any(|name| name == "hugetlb");
        if known && !resources.hugepages.is_empty() {
            let _ = v2::enable(&unified.mount, parent, &["hugetlb".to_owned()]);
        }
    }

    /// Changes the limits that are given and leaves the others, all or none of them; `after` are
    /// those that hold then. What is returned takes it back.
    ///
    /// # Errors
    /// What cannot be limited on this host, a memory limit below what is used now, or what the
    /// kernel says; then everything is as it was.
    pub fn update(
        &self,
        cgroup: &Cgroup,
        change: &Resources,
        after: &Resources,
    ) -> Result<Journal, Error> {
        if cgroup.scope.is_some() && !cgroup.exists() {
            // Not started: it is limited when it is.
            return Ok(Journal::keeping());
        }
        let mut journal = Journal::keeping();
        let written = self.apply(cgroup, change, &mut journal);
        let told = written.and_then(|()| match &cgroup.scope {
            Some(unit) => {
                self.systemd.set_limits(unit, after, false)?;
                // It writes the files anew, and rounds. The guard has had its say.
                let exact = match &cgroup.unified {
                    Some(directory) => {
                        v2::apply(directory, after, false, &mut Journal::forgetful())
                    }
                    None => Ok(()),
                };
                // One that ended meanwhile has no limits any more.
                exact.or_else(|error| match cgroup.exists() {
                    true => Err(error),
                    false => Ok(()),
                })
            }
            None => Ok(()),
        });
        match told {
            Ok(()) => Ok(journal),
            Err(error) => {
                if let Err(kept) = journal.roll_back() {
                    // Two errors, one answer: the first is what the caller asked about.
                    tracing::warn!(
                        error = &kept as &dyn std::error::Error,
                        "a limit could not be brought back to what it was"
                    );
                }
                Err(error)
            }
        }
    }

    fn apply(
        &self,
        cgroup: &Cgroup,
        resources: &Resources,
        journal: &mut Journal,
    ) -> Result<(), Error> {
        match (cgroup.version, &cgroup.unified) {
            (Version::V2, Some(directory)) => {
                v2::apply(directory, resources, self.memory_guard, journal)
            }
            (Version::V1 | Version::V2, _) => v1::apply(cgroup, resources, journal),
        }
    }
}

/// How long systemd gets to notice that a scope is empty, before it is told.
const SYSTEMD_NOTICES: Duration = Duration::from_secs(2);

/// How long it gets to remove the cgroup of a unit that it was told to stop.
const SYSTEMD_TIDIES: Duration = Duration::from_secs(10);

/// How long a half-made cgroup is tried to be removed; it is empty, so once would do.
const UNDO_DEADLINE: Duration = Duration::from_millis(100);

impl Hierarchy {
    fn controls(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// See [`Cgroups::enter_slice`].
#[derive(Debug)]
pub struct Entered {
    cgroups: Arc<Cgroups>,
    slice: String,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let entered = self.cgroups.entered.lock();
        let mut entered = entered.unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = entered.get_mut(&self.slice) {
            *count -= 1;
            if *count == 0 {
                entered.remove(&self.slice);
            }
        }
    }
}

impl Cgroup {
    /// Beneath every hierarchy's mount, with a leading slash.
    pub fn path(&self) -> &str {
        &self.path
    }

    fn parent_path(&self) -> &str {
        let split = self.path.rsplit_once('/');
        split.map_or("", |(parent, _)| parent)
    }

    fn slice(&self) -> &str {
        let last = self.parent_path().rsplit('/').next();
        last.unwrap_or_default()
    }

    /// Slice, prefix and name as OCI runtimes want them in systemd mode ("a.slice:berth:ID"),
    /// which make the same scope of it; `None` with the driver cgroupfs.
    ///
    /// Source: runc `docs/systemd.md`; crun(1), `--systemd-cgroup`.
    pub fn for_systemd_mode(&self) -> Option<String> {
        let name = self.scope.as_ref()?.strip_suffix(".scope")?;
        let (prefix, name) = name.split_once('-')?;
        Some(format!("{}:{prefix}:{name}", self.slice()))
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// Where the files of a controller lie, if the host has it.
    pub fn directory(&self, controller: &str) -> Option<&Path> {
        match self.version {
            Version::V1 => self
                .directories
                .iter()
                .find(|d| d.controllers.iter().any(|name| name == controller))
                .map(|d| d.path.as_path()),
            Version::V2 => self.unified.as_deref(),
        }
    }

    /// Its directory in the cgroup2 hierarchy; also there on a hybrid host.
    pub fn unified(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Its directories, the unified one last.
    fn all(&self) -> impl Iterator<Item = &Path> {
        let v1 = self.directories.iter().map(|d| d.path.as_path());
        v1.chain(self.unified.as_deref())
    }

    /// Whether any of it is there.
    pub fn exists(&self) -> bool {
        self.all().any(Path::exists)
    }

    /// What the monitor has to know to start a process in here.
    pub fn for_monitor(&self) -> monitor_v1::Cgroup {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        // On a hybrid host too the unified hierarchy is entered by clone3: writing to a
        // cgroup.procs waits 4 to 20 ms for every other fork and exit on the machine.
        let directory = self.unified.clone().map(text).unwrap_or_default();
        let tasks_files = self
            .directories
            .iter()
            .map(|d| text(d.path.join("tasks")))
            .collect();
        // A scope may not be there yet; its slice is, and has the same files.
        let has = |directory: &Path| directory.join("cgroup.kill").exists();
        let kill_file = self
            .unified
            .iter()
            .find(|path| has(path) || self.scope.is_some() && path.parent().is_some_and(has))
            .map(|path| path.join("cgroup.kill"));
        monitor_v1::Cgroup {
            tasks_files,
            directory,
            oom_file: self.oom_file().map(text).unwrap_or_default(),
            kill_file: kill_file.map(text).unwrap_or_default(),
        }
    }

    fn oom_file(&self) -> Option<PathBuf> {
        let name = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        self.directory("memory")
            .map(|directory| directory.join(name))
    }
}

#[cfg(test)]
mod tests;
