//! Limits on cgroup v2.

use super::{Error, file, path};
use crate::container_spec::{HugepageLimit, Resources};
use std::io;
use std::path::Path;

/// Controllers that containers are limited by; others are left to whoever wants them.
const WANTED: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// Enables what `available` has of the controllers in `path` and everything above it, for the
/// children. Only reads, and only the innermost file, where that is so already.
pub(super) fn enable(mount: &Path, path: &str, available: &[String]) -> Result<(), Error> {
    let control = |path: &str| {
        mount
            .join(path.trim_start_matches('/'))
            .join("cgroup.subtree_control")
    };
    if missing(&control(path), available)?.is_empty() {
        return Ok(());
    }
    for prefix in [""].into_iter().chain(path::prefixes(path)) {
        let file = control(prefix);
        let controllers = missing(&file, available)?;
        if controllers.is_empty() {
            continue;
        }
        file::write(&file, &controllers).map_err(|error| match error {
            Error::Write {
                path,
                value,
                source,
            } if source.kind() == io::ErrorKind::ResourceBusy => Error::InternalProcesses {
                path,
                controllers: value,
                source,
            },
            other => other,
        })?;
    }
    Ok(())
}

/// "+cpu +pids", or empty.
fn missing(control: &Path, available: &[String]) -> Result<String, Error> {
    let enabled = file::read(control)?;
    let enabled: Vec<&str> = enabled.split_whitespace().collect();
    let missing: Vec<String> = available
        .iter()
        .filter(|name| WANTED.contains(&name.as_str()) && !enabled.contains(&name.as_str()))
        .map(|name| format!("+{name}"))
        .collect();
    Ok(missing.join(" "))
}

pub(super) fn apply(directory: &Path, resources: &Resources) -> Result<(), Error> {
    cpu(directory, resources)?;
    memory(directory, resources)?;
    if let Some(limit) = resources.pids_limit {
        set(
            directory,
            "pids.max",
            &pids(limit),
            "pids",
            "a limit of processes",
        )?;
    }
    for (name, value) in [
        ("cpuset.cpus", &resources.cpuset_cpus),
        ("cpuset.mems", &resources.cpuset_mems),
    ] {
        if !value.is_empty() {
            set(
                directory,
                name,
                value,
                "cpuset",
                "a set of processors or memory nodes",
            )?;
        }
    }
    hugetlb(directory, resources)?;
    for (key, value) in &resources.unified {
        // A file of this cgroup that a controller made, and nothing that moves processes.
        let good = key.contains('.')
            && !key.starts_with("cgroup.")
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !good {
            return Err(Error::BadUnifiedKey { key: key.clone() });
        }
        file::write(&directory.join(key), value)?;
    }
    Ok(())
}

fn set(
    directory: &Path,
    name: &str,
    value: &str,
    controller: &'static str,
    what: &'static str,
) -> Result<(), Error> {
    file::write(&directory.join(name), value).map_err(|error| match error {
        Error::Write { ref source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Error::NoController { controller, what }
        }
        other => other,
    })
}

/// Zero and below is no limit.
pub(super) fn pids(limit: i64) -> String {
    if limit > 0 {
        limit.to_string()
    } else {
        "max".to_owned()
    }
}

/// cgroup v1 shares (2 to 262144) as a v2 weight (1 to 10000).
///
/// Source: Kubernetes KEP-2254: weight = 1 + ((shares - 2) * 9999) / 262142. runc since 1.3.2
/// and crun since 1.23 use a curve that keeps 1024 shares at weight 100; containers compete only
/// with those of their own pod, and among them the line keeps the proportions that were asked for.
pub(super) fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

fn cpu(directory: &Path, resources: &Resources) -> Result<(), Error> {
    const WHAT: &str = "a share of processor time";
    if let Some(shares) = resources.cpu_shares.filter(|shares| *shares != 0) {
        set(
            directory,
            "cpu.weight",
            &weight(shares).to_string(),
            "cpu",
            WHAT,
        )?;
    }
    let period = resources.cpu_period.filter(|period| *period != 0);
    let quota = resources.cpu_quota.filter(|quota| *quota != 0);
    let value = match (quota, period) {
        (None, None) => return Ok(()),
        (Some(quota @ 1..), Some(period)) => format!("{quota} {period}"),
        (Some(_), Some(period)) => format!("max {period}"),
        // The kernel keeps the period.
        (Some(quota @ 1..), None) => quota.to_string(),
        (Some(_), None) => "max".to_owned(),
        (None, Some(period)) => {
            let current = file::read(&directory.join("cpu.max"))?;
            format!(
                "{} {period}",
                current.split_whitespace().next().unwrap_or("max")
            )
        }
    };
    set(directory, "cpu.max", &value, "cpu", WHAT)
}

/// A limit as the kernel's files have it: negative is none.
fn bytes(limit: i64) -> String {
    u64::try_from(limit).map_or_else(|_| "max".to_owned(), |limit| limit.to_string())
}

/// The swap alone of a limit for memory plus swap.
fn above(memory: i64, swap: i64) -> Result<String, Error> {
    match swap - memory {
        ..0 => Err(Error::SwapBelowMemory { memory, swap }),
        alone => Ok(alone.to_string()),
    }
}

fn memory(directory: &Path, resources: &Resources) -> Result<(), Error> {
    let limit = resources.memory_limit_bytes.filter(|limit| *limit != 0);
    // No word on swap means none, as the other runtimes have it.
    let swap = resources.memory_swap_limit_bytes.filter(|swap| *swap != 0);
    let swap = match (limit, swap) {
        (None, None) => return Ok(()),
        (Some(limit), None) => if limit < 0 { "max" } else { "0" }.to_owned(),
        (None, Some(swap)) if swap > 0 => {
            let current = file::read(&directory.join("memory.max"))?;
            above(
                current
                    .trim()
                    .parse()
                    .map_err(|_| Error::SwapWithoutMemory)?,
                swap,
            )?
        }
        (Some(limit), Some(swap)) if limit > 0 && swap > 0 => above(limit, swap)?,
        // Without a limit of one of them there is none for the sum.
        (_, Some(_)) => "max".to_owned(),
    };
    if let Some(limit @ 1..) = limit {
        // The kernel would kill at once; v1 refuses, and so is it refused here.
        let usage = file::read_if_there(&directory.join("memory.current"))?;
        let usage: u64 = usage.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let limit = limit.unsigned_abs();
        if usage > limit {
            return Err(Error::BelowUsage {
                path: directory.to_owned(),
                limit,
                usage,
            });
        }
    }
    // Absent where the kernel has no swap.
    let swap_file = directory.join("memory.swap.max");
    if swap_file.exists() {
        file::write(&swap_file, &swap)?;
    }
    match limit {
        Some(limit) => set(
            directory,
            "memory.max",
            &bytes(limit),
            "memory",
            "a memory limit",
        ),
        None => Ok(()),
    }
}

/// The page size, checked because it becomes part of a file's name.
pub(super) fn page_size(huge: &HugepageLimit) -> Result<&str, Error> {
    let size = &huge.page_size;
    if !size.is_empty() && size.bytes().all(|b| b.is_ascii_alphanumeric()) {
        Ok(size)
    } else {
        Err(Error::BadPageSize {
            page_size: size.clone(),
        })
    }
}

/// See `v1::hugetlb` on why a missing controller is no error.
pub(super) fn hugetlb(directory: &Path, resources: &Resources) -> Result<(), Error> {
    for huge in &resources.hugepages {
        let size = page_size(huge)?;
        let limit = huge.limit_bytes.to_string();
        for name in [
            format!("hugetlb.{size}.max"),
            format!("hugetlb.{size}.rsvd.max"),
        ] {
            let file = directory.join(name);
            if file.exists() {
                file::write(&file, &limit)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::weight;

    #[test]
    fn weights_are_on_the_line() {
        let pairs = [
            (0, 1),
            (2, 1),
            (1024, 39),
            (2048, 79),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ];
        for (shares, expected) in pairs {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }
}
