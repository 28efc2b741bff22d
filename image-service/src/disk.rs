//! Full disks: recognised in an error, and named.

use rustix::io::Errno;
use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Whether `error`, or what caused it, is that a file system or a quota is full.
pub fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let errno = error.downcast_ref::<Errno>().copied().or_else(|| {
            error
                .downcast_ref::<io::Error>()
                .and_then(Errno::from_io_error)
        });
        if matches!(errno, Some(Errno::NOSPC | Errno::DQUOT)) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Says that the file system of `dir` is full, and which one that is: `the file system of
/// /var/lib/berth/images (/dev/sda1 on /var, 10240 MiB, 655360 inodes) is full`. What is free is
/// not told: whoever failed for lack of it has given back what it had by now.
pub fn describe(dir: &Path) -> String {
    let mount = fs::metadata(dir)
        .ok()
        .zip(fs::read_to_string("/proc/self/mountinfo").ok())
        .and_then(|(metadata, table)| mount_of(&table, metadata.dev()));
    let mut known = Vec::new();
    if let Some((device, point)) = mount {
        known.push(format!("{device} on {point}"));
    }
    if let Ok(stat) = rustix::fs::statvfs(dir) {
        let mib = stat.f_blocks.saturating_mul(stat.f_frsize) >> 20;
        known.push(format!("{mib} MiB"));
        known.push(format!("{} inodes", stat.f_files));
    }
    let known = match &known[..] {
        [] => String::new(),
        known => format!(" ({})", known.join(", ")),
    };
    format!("the file system of {}{known} is full", dir.display())
}

/// Device and mount point of the device number, by mountinfo's text.
/// Source: proc_pid_mountinfo(5).
fn mount_of(table: &str, device: u64) -> Option<(String, String)> {
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    table.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let fields: Vec<&str> = before.split(' ').collect();
        if fields.get(2) != Some(&number.as_str()) {
            return None;
        }
        let source = after.split(' ').nth(1)?;
        Some((source.to_owned(), (*fields.get(4)?).to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_below_other_errors() {
        let full = |errno: Errno| {
            is_full(&crate::layer::StoreError {
                action: "sync",
                path: "/x".into(),
                source: errno,
            })
        };
        assert!(full(Errno::NOSPC));
        assert!(full(Errno::DQUOT));
        assert!(!full(Errno::IO));
        assert!(is_full(&io::Error::from(Errno::NOSPC)));
    }

    #[test]
    fn the_mount_is_found_by_its_device() {
        let table = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                     30 22 7:3 / /mnt/x rw - ext4 /dev/loop3 rw\n";
        let device = rustix::fs::makedev(7, 3);
        let found = mount_of(table, device);
        assert_eq!(found, Some(("/dev/loop3".into(), "/mnt/x".into())));
        assert_eq!(mount_of(table, rustix::fs::makedev(9, 9)), None);
        let text = describe(Path::new("/proc/self"));
        assert!(text.starts_with("the file system of /proc/self"), "{text}");
    }
}
