//! What follows a container's end, in processes of its own: killing what it
//! left in its cgroup, and writing the exit down.
//!
//! ```text
//! init ends ─> sweep (shared PID namespaces only) ─> the log is drained ─> record ─> Exited
//! ```
//!
//! Both may hang (a frozen cgroup, a disk), so neither is done by the waiting
//! loop.

use berth_store::atomic_file::Durability;
use berth_store::exit::ExitRecord;
use berth_store::record;
use berth_sys::{pidfd, process};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a sweep tries: what survives that is in the kernel's hands (state D).
const SWEEP: Duration = Duration::from_secs(10);

/// Pause between two looks at a cgroup that is not empty yet.
const PAUSE: Duration = Duration::from_millis(5);

/// Kills everything in a cgroup until nothing is left in it.
///
/// `kill_file` is the kernel's own way; without it each process in
/// `procs_file` is killed by its pidfd.
pub fn sweep(kill_file: &str, procs_file: &str) -> i32 {
    process::reset_signals();
    if !kill_file.is_empty() {
        let _ = std::fs::write(kill_file, "1");
    }
    if procs_file.is_empty() {
        return 0;
    }
    let deadline = Instant::now() + SWEEP;
    while Instant::now() < deadline {
        match std::fs::read_to_string(procs_file) {
            Ok(text) if text.trim().is_empty() => return 0,
            Ok(text) => kill_each(&text, procs_file),
            // Removed with all that was in it.
            Err(_) => return 0,
        }
        std::thread::sleep(PAUSE);
    }
    1
}

/// Kills the processes listed. A pid is only believed while it is listed after
/// its pidfd was opened: before, it may have become somebody else's.
fn kill_each(text: &str, procs_file: &str) {
    let opened: Vec<_> = parse_pids(text)
        .filter_map(|pid| Some((pid, pidfd::open(pid).ok()?)))
        .collect();
    let again = std::fs::read_to_string(procs_file).unwrap_or_default();
    let listed: Vec<i32> = parse_pids(&again).collect();
    for (pid, fd) in opened {
        if listed.contains(&pid) {
            let _ = pidfd::send_signal(&fd, libc::SIGKILL);
        }
    }
}

/// The pids of a tasks or cgroup.procs file. 0 stands for one of another PID
/// namespace and is passed over.
fn parse_pids(text: &str) -> impl Iterator<Item = i32> + '_ {
    text.lines()
        .filter_map(|line| line.trim().parse().ok())
        .filter(|&pid| pid > 0)
}

/// Writes the record so that it survives a power cut; 0 once it is there.
pub fn write_record(path: &str, mut exit: ExitRecord) -> i32 {
    process::reset_signals();
    exit.boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default();
    let path = Path::new(path);
    if let Some(dir) = path.parent() {
        // The pod's directory is the daemon's; only the last level is made, so
        // that a removed pod is not made again.
        let _ = std::fs::create_dir(dir);
    }
    match record::save(path, &exit, Durability::PowerCut) {
        Ok(()) => 0,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!("berth-monitor: {error}: {}", cause.unwrap_or_default());
            1
        }
    }
}

/// OOM kills as memory.events (v2) or memory.oom_control (v1) say; `None` where
/// they do not, or are gone.
pub fn oom_kills(path: &str) -> Option<u64> {
    if path.is_empty() {
        return None;
    }
    parse_oom_kills(&std::fs::read_to_string(path).ok()?)
}

fn parse_oom_kills(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?
        .trim()
        .parse()
        .ok()
}

/// Start time of `pid` in clock ticks since boot; 0 when it is gone.
pub fn start_ticks(pid: i32) -> u64 {
    let text = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    parse_start_ticks(&text).unwrap_or(0)
}

/// Field 22 of /proc/PID/stat. The name, field 2, may hold anything, so
/// counting begins behind its last bracket. Source: proc_pid_stat(5).
fn parse_start_ticks(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kills_are_read_from_both_versions() {
        let v2 = "low 0\nhigh 0\nmax 3\noom 2\noom_kill 7\noom_group_kill 0\n";
        assert_eq!(parse_oom_kills(v2), Some(7));
        assert_eq!(
            parse_oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            Some(2)
        );
        assert_eq!(parse_oom_kills("under_oom 0\n"), None);
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = b"12 (a ) b) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 0 0";
        assert_eq!(parse_start_ticks(stat), Some(98765));
        assert_eq!(parse_start_ticks(b"12 (x"), None);
        assert_ne!(start_ticks(std::process::id() as i32), 0);
    }

    #[test]
    fn pids_that_are_none_are_passed_over() {
        assert_eq!(parse_pids("12\n0\n\n-3\nx\n7").collect::<Vec<_>>(), [12, 7]);
    }
}
