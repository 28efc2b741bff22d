//! Limits on cgroup v2.

use super::{Error, Journal, file, path};
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

/// `guard`: a memory limit that could only be met by killing is refused.
pub(super) fn apply(
    directory: &Path,
    resources: &Resources,
    guard: bool,
    journal: &mut Journal,
) -> Result<(), Error> {
    cpu(directory, resources, journal)?;
    memory(directory, resources, guard, journal)?;
    if let Some(limit) = resources.pids_limit {
        set(
            journal,
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
                journal,
                directory,
                name,
                value,
                "cpuset",
                "a set of processors or memory nodes",
            )?;
        }
    }
    hugetlb(directory, resources, journal)?;
    check_unified(resources)?;
    for (key, value) in &resources.unified {
        journal.write(&directory.join(key), value)?;
    }
    Ok(())
}

/// Whether every raw file is one of this cgroup that a controller made, and none that moves
/// processes.
pub(super) fn check_unified(resources: &Resources) -> Result<(), Error> {
    for key in resources.unified.keys() {
        let good = key.contains('.')
            && !key.starts_with("cgroup.")
            && key
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !good {
            return Err(Error::BadUnifiedKey { key: key.clone() });
        }
    }
    Ok(())
}

fn set(
    journal: &mut Journal,
    directory: &Path,
    name: &str,
    value: &str,
    controller: &'static str,
    what: &'static str,
) -> Result<(), Error> {
    journal
        .write(&directory.join(name), value)
        .map_err(|error| match error {
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

/// cgroup v1 shares (2 to 262144) as a v2 weight (1 to 10000): a curve through both ends and
/// through the two defaults, 1024 and 100, so that a container with one CPU's worth of shares
/// stands to the rest of the host as it did on v1.
///
/// Source: the curve that runc since 1.3.2 and crun since 1.23 agree on
/// (opencontainers/cgroups, ConvertCPUSharesToCgroupV2Value).
pub(super) fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            // Whatever the last bits of a logarithm are, 1024 shares are 100.
            let weight = (10f64.powf(exponent) - 1e-9).ceil();
            (weight as u64).clamp(1, 10_000)
        }
    }
}

/// The shares that a weight stands for, for those who still count in shares.
pub(super) fn shares(weight: u64) -> u64 {
    let weight = weight.clamp(1, 10_000) as f64;
    let exponent = weight.log10() + 7.0 / 34.0;
    let log = ((125.0f64 * 125.0 + 4.0 * 612.0 * exponent).sqrt() - 125.0) / 2.0;
    (log.exp2().round() as u64).clamp(2, 262_144)
}

fn cpu(directory: &Path, resources: &Resources, journal: &mut Journal) -> Result<(), Error> {
    const WHAT: &str = "a share of processor time";
    if let Some(shares) = resources.cpu_shares.filter(|shares| *shares != 0) {
        set(
            journal,
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
    set(journal, directory, "cpu.max", &value, "cpu", WHAT)
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

fn memory(
    directory: &Path,
    resources: &Resources,
    guard: bool,
    journal: &mut Journal,
) -> Result<(), Error> {
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
    if let Some(limit @ 1..) = limit
        && guard
    {
        // The kernel would kill at once; v1's refuses, and so is it refused here.
        let usage = unreclaimable(directory)?;
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
        journal.write(&swap_file, &swap)?;
    }
    match limit {
        Some(limit) => set(
            journal,
            directory,
            "memory.max",
            &bytes(limit),
            "memory",
            "a memory limit",
        ),
        None => Ok(()),
    }
}

/// Memory in use that could not be had back by dropping caches: what v1's kernel would find
/// when it tries, before it refuses a limit.
fn unreclaimable(directory: &Path) -> Result<u64, Error> {
    let current = file::read_if_there(&directory.join("memory.current"))?;
    let current: u64 = current
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let stat = file::read_if_there(&directory.join("memory.stat"))?.unwrap_or_default();
    let field = |name| super::stats::field(&stat, name).unwrap_or(0);
    let droppable = field("active_file") + field("inactive_file") + field("slab_reclaimable");
    Ok(current.saturating_sub(droppable))
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
pub(super) fn hugetlb(
    directory: &Path,
    resources: &Resources,
    journal: &mut Journal,
) -> Result<(), Error> {
    for huge in &resources.hugepages {
        let size = page_size(huge)?;
        let limit = huge.limit_bytes.to_string();
        for name in [
            format!("hugetlb.{size}.max"),
            format!("hugetlb.{size}.rsvd.max"),
        ] {
            let file = directory.join(name);
            if file.exists() {
                journal.write(&file, &limit)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{shares, weight};

    #[test]
    fn weights_are_on_the_curve() {
        let pairs = [
            (0, 1),
            (2, 1),
            (102, 17),
            (256, 35),
            (512, 59),
            (1024, 100),
            (2048, 174),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ];
        for (shares, expected) in pairs {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn more_shares_are_never_less_weight_and_weights_lead_back() {
        let mut last = 0;
        for shares in 2..=262_144 {
            let now = weight(shares);
            assert!(now >= last, "{shares}");
            last = now;
        }
        assert_eq!([1, 100, 10_000].map(shares), [2, 1024, 262_144]);
    }
}
