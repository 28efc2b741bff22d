//! Holding everything in a cgroup still.
//!
//! Source: kernel, `cgroup-v2.rst`, "cgroup.freeze"; `cgroup-v1/freezer-subsystem.rst`.

use super::{Cgroup, Error, Version, file};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long until a cgroup that is not frozen yet is looked at again: it takes
/// some microseconds a process.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

impl Cgroup {
    /// Where its freezer's files are; `None` where the host has no freezer.
    pub fn freezer(&self) -> Option<&Path> {
        let directory = self.directory("freezer")?;
        self.state_file(directory).exists().then_some(directory)
    }

    fn state_file(&self, directory: &Path) -> PathBuf {
        directory.join(match self.version {
            Version::V1 => "freezer.state",
            Version::V2 => "cgroup.freeze",
        })
    }

    /// Whether it was told to be frozen. One without a freezer, or that is gone, is not.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn is_frozen(&self) -> Result<bool, Error> {
        let Some(directory) = self.directory("freezer") else {
            return Ok(false);
        };
        let text = file::read_if_there(&self.state_file(directory))?.unwrap_or_default();
        Ok(match self.version {
            // FREEZING is on the way there.
            Version::V1 => text.starts_with('F'),
            Version::V2 => text.trim() == "1",
        })
    }

    /// Freezes everything in it and returns once nothing of it runs any more.
    ///
    /// # Errors
    /// `Missing` without a freezer; `StillRunning` when something (a process in
    /// uninterruptible sleep, say) still ran at the deadline: it is told to go on then.
    pub fn freeze_all(&self, deadline: Duration) -> Result<(), Error> {
        let directory = self.freezer().ok_or_else(|| Error::Missing {
            path: self
                .directory("freezer")
                .map_or_else(PathBuf::new, Path::to_owned),
        })?;
        let (state, frozen) = (
            self.state_file(directory),
            match self.version {
                Version::V1 => "FROZEN",
                Version::V2 => "1",
            },
        );
        let until = Instant::now() + deadline;
        loop {
            // On v1 writing it again is what gets a group on that is stuck half way.
            file::write(&state, frozen)?;
            let done = match self.version {
                Version::V1 => file::read(&state)?.trim() == "FROZEN",
                Version::V2 => file::read(&directory.join("cgroup.events"))?
                    .lines()
                    .any(|line| line == "frozen 1"),
            };
            if done {
                return Ok(());
            }
            if Instant::now() >= until {
                self.thaw()?;
                return Err(Error::StillRunning {
                    path: directory.to_owned(),
                    waited: deadline,
                });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Lets everything in it go on. One without a freezer, or that is gone, is not held.
    ///
    /// # Errors
    /// The file refuses.
    pub fn thaw(&self) -> Result<(), Error> {
        let Some(directory) = self.freezer() else {
            return Ok(());
        };
        let value = match self.version {
            Version::V1 => "THAWED",
            Version::V2 => "0",
        };
        let path = self.state_file(directory);
        match file::write_io(&path, value) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| Error::Write {
                path,
                value: value.to_owned(),
                source,
            }),
        }
    }
}
