//! Emptying a cgroup and taking it away.

use super::{Cgroup, Error, Version, file};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long to wait for word from the kernel before looking again anyway.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Cgroups that a container makes inside its own: deeper than this they are not followed.
const DEEPEST: usize = 64;

impl Cgroup {
    /// Every process in it and in cgroups inside it, from all hierarchies: a process that moved
    /// itself away in one of them is found by the others. What is gone has none.
    ///
    /// # Errors
    /// A `cgroup.procs` cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        let mut pids = BTreeSet::new();
        for directory in self.all() {
            collect_pids(directory, DEEPEST, &mut pids)?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Whether no process is left in any hierarchy.
    ///
    /// # Errors
    /// As [`Cgroup::pids`].
    pub fn is_empty(&self) -> Result<bool, Error> {
        if let Some(unified) = &self.unified
            && let Some(events) = file::read_if_there(&unified.join("cgroup.events"))?
            && populated(&events)
        {
            return Ok(false);
        }
        match self.version {
            Version::V1 => Ok(self.pids()?.is_empty()),
            Version::V2 => Ok(true),
        }
    }

    /// Kills everything in it with SIGKILL and returns once it is empty. What forks meanwhile
    /// is killed as well. A cgroup that is gone is empty.
    ///
    /// # Errors
    /// Processes are left at the deadline (one in uninterruptible sleep, say), or a file of the
    /// cgroup can be neither read nor written.
    pub fn kill_all(&self, deadline: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let watch = Watch::of(self);
        loop {
            if self.is_empty()? {
                return Ok(());
            }
            if !self.kill_by_the_kernel()? || !self.is_empty()? {
                self.kill_one_by_one()?;
            }
            if self.is_empty()? {
                return Ok(());
            }
            let Some(left) = deadline.checked_sub(started.elapsed()) else {
                let path = self
                    .all()
                    .next()
                    .unwrap_or(Path::new(&self.path))
                    .to_owned();
                return Err(Error::StillAlive {
                    path,
                    pids: self.pids()?,
                    waited: started.elapsed(),
                });
            };
            watch.wait(left);
        }
    }

    /// Whether the kernel has `cgroup.kill` (5.14).
    fn kill_by_the_kernel(&self) -> Result<bool, Error> {
        let Some(unified) = &self.unified else {
            return Ok(false);
        };
        let path = unified.join("cgroup.kill");
        match file::write_io(&path, "1") {
            Ok(()) => Ok(true),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) =>
            {
                Ok(false)
            }
            Err(source) => Err(Error::Write {
                path,
                value: "1".to_owned(),
                source,
            }),
        }
    }

    /// Freezes what can be frozen so that nothing forks, kills, and thaws: a frozen process
    /// dies only then, also one that the container's owner froze.
    fn kill_one_by_one(&self) -> Result<(), Error> {
        // Best effort: without the freezer the caller's loop catches what forked away.
        self.freeze(true);
        let killed = self.kill_listed();
        self.freeze(false);
        killed
    }

    fn kill_listed(&self) -> Result<(), Error> {
        let held: Vec<(i32, OwnedFd)> = self
            .pids()?
            .into_iter()
            .filter_map(|pid| {
                let process = Pid::from_raw(pid)?;
                let fd = rustix::process::pidfd_open(process, PidfdFlags::empty()).ok()?;
                Some((pid, fd))
            })
            .collect();
        // A number may have passed to a stranger before its pidfd was opened; what is still
        // listed now was in the cgroup when it was.
        let still = self.pids()?;
        for (pid, fd) in held {
            if still.binary_search(&pid).is_ok() {
                // It may have ended by itself: the loop looks again either way.
                let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
            }
        }
        Ok(())
    }

    fn freeze(&self, frozen: bool) {
        // On v2 and hybrid hosts of kernel 5.2 and later; a kill gets through to frozen ones.
        if self.version == Version::V2 {
            return;
        }
        let Some(directory) = self.directory("freezer") else {
            return;
        };
        let state = directory.join("freezer.state");
        let _ = file::write_io(&state, if frozen { "FROZEN" } else { "THAWED" });
    }

    /// Removes it in every hierarchy, with the cgroups a container made inside. Succeeds where it
    /// is gone. A directory that is busy (a process has just ended) is tried until the deadline.
    ///
    /// # Errors
    /// Each directory that stayed, with the kernel's reason; the others are gone.
    pub fn remove(&self, deadline: Duration) -> Result<(), Error> {
        let started = Instant::now();
        let watch = Watch::of(self);
        loop {
            let failures: Vec<(PathBuf, io::Error)> = self
                .all()
                .filter_map(|path| {
                    let errno = remove_tree(path, DEEPEST).err()?;
                    Some((path.to_owned(), errno.into()))
                })
                .collect();
            if failures.is_empty() {
                return Ok(());
            }
            let busy =
                |(_, error): &(PathBuf, io::Error)| error.kind() == io::ErrorKind::ResourceBusy;
            match deadline.checked_sub(started.elapsed()) {
                Some(left) if failures.iter().any(busy) => watch.wait(left),
                _ => return Err(Error::Remove { failures }),
            }
        }
    }
}

fn remove_tree(path: &Path, depth: usize) -> Result<(), Errno> {
    match rustix::fs::rmdir(path) {
        Err(Errno::BUSY | Errno::NOTEMPTY) if depth > 0 => {}
        Err(Errno::NOENT) => return Ok(()),
        other => return other,
    }
    for child in children(path) {
        // The answer is that of the directory itself.
        let _ = remove_tree(&child, depth - 1);
    }
    match rustix::fs::rmdir(path) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Directories directly inside; none where it is gone.
fn children(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn collect_pids(directory: &Path, depth: usize, pids: &mut BTreeSet<i32>) -> Result<(), Error> {
    match file::read_if_there(&directory.join("cgroup.procs")) {
        Ok(None) => return Ok(()),
        Ok(Some(text)) => {
            // 0 stands for a process of another PID namespace: not ours to name.
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse::<i32>().ok())
                    .filter(|p| *p > 0),
            );
        }
        // A threaded cgroup inside: its processes are listed by the domain above it.
        Err(Error::Read { source, .. })
            if source.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    // A cgroup without cgroups inside has two links where the kernel counts them; where it does
    // not, reading the directory finds out.
    let flat = rustix::fs::stat(directory).is_ok_and(|stat| stat.st_nlink == 2);
    if depth > 0 && !flat {
        for child in children(directory) {
            collect_pids(&child, depth - 1, pids)?;
        }
    }
    Ok(())
}

fn populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// Wakes when the kernel says that the unified cgroup filled or emptied, else by time.
struct Watch(Option<OwnedFd>);

impl Watch {
    fn of(cgroup: &Cgroup) -> Self {
        let open = |path: &Path| {
            rustix::fs::open(
                path.join("cgroup.events"),
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        Self(cgroup.unified.as_deref().and_then(|path| open(path).ok()))
    }

    /// Returns after an event, after `LOOK_AGAIN` or after `left`, whichever comes first.
    fn wait(&self, left: Duration) {
        let mut wait = left.min(LOOK_AGAIN);
        let mut polled = Vec::new();
        match &self.0 {
            Some(fd) => {
                // Reading re-arms the poll; a change from here on wakes it.
                let mut text = [0u8; 256];
                match rustix::io::pread(fd, &mut text, 0) {
                    Ok(got) if std::str::from_utf8(&text[..got]).is_ok_and(populated) => {
                        polled.push(PollFd::new(fd, PollFlags::PRI));
                    }
                    // Empty here, or gone: what is waited for is in another hierarchy.
                    _ => wait = wait.min(Duration::from_millis(2)),
                }
            }
            None => wait = wait.min(Duration::from_millis(5)),
        }
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        // Woken early or not at all: the caller looks again.
        let _ = rustix::event::poll(&mut polled, Some(&timeout));
    }
}
