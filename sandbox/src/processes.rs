//! What a container's processes hold: descriptors, sockets, limits; read from /proc.

use crate::cgroup::Cgroup;
use rustix::fs::{CWD, Mode, OFlags};

/// Processes whose descriptors are looked at: what a container has beyond them is not counted.
const PROCESSES: usize = 256;

/// Descriptors that are looked at to find the sockets among them.
const DESCRIPTORS: usize = 8192;

/// What the processes of a container hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub processes: u64,
    pub descriptors: u64,
    pub sockets: u64,
}

/// What the processes in a cgroup hold now; those that end meanwhile are left out.
pub fn held(cgroup: &Cgroup) -> Held {
    let pids = cgroup.pids().unwrap_or_default();
    let mut held = Held {
        processes: pids.len() as u64,
        ..Held::default()
    };
    let mut left = DESCRIPTORS;
    for pid in pids.iter().take(PROCESSES) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{pid}/fd");
        let Ok(directory) = rustix::fs::openat(CWD, &path, flags, Mode::empty()) else {
            continue;
        };
        let Ok(entries) = rustix::fs::Dir::read_from(&directory) else {
            continue;
        };
        let numbers = entries.flatten().map(|entry| entry.file_name().to_owned());
        for number in numbers.filter(|name| !name.to_bytes().starts_with(b".")) {
            held.descriptors += 1;
            if left == 0 {
                continue;
            }
            left -= 1;
            let is_socket = rustix::fs::readlinkat(&directory, &number, Vec::new())
                .is_ok_and(|to| to.to_bytes().starts_with(b"socket:"));
            held.sockets += u64::from(is_socket);
        }
    }
    held
}

/// How many files the process may open, -1 for as many as it likes; `None` when it is gone.
pub fn soft_open_files(pid: i32) -> Option<i64> {
    parse_soft_open_files(&std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?)
}

fn parse_soft_open_files(limits: &str) -> Option<i64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(-1),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_found() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 4096                 files     \n";
        assert_eq!(parse_soft_open_files(text), Some(1024));
        assert_eq!(
            parse_soft_open_files("Max open files  unlimited unlimited files"),
            Some(-1)
        );
        assert_eq!(parse_soft_open_files(""), None);
        assert!(soft_open_files(std::process::id().cast_signed()).is_some());
    }
}
