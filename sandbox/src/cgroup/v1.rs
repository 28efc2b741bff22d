//! Limits on cgroup v1.

use super::{Cgroup, Error, Journal, file, v2};
use crate::container_spec::Resources;
use std::io;
use std::path::Path;

/// What the kernel takes for `cpu.shares`. Source: kernel/sched/sched.h, MIN_SHARES, MAX_SHARES.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

pub(super) fn apply(
    cgroup: &Cgroup,
    resources: &Resources,
    journal: &mut Journal,
) -> Result<(), Error> {
    if let Some(key) = resources.unified.keys().next() {
        return Err(Error::UnifiedOnV1 { key: key.clone() });
    }
    cpu(cgroup, resources, journal)?;
    memory(cgroup, resources, journal)?;
    if let Some(limit) = resources.pids_limit {
        let directory = need(cgroup, "pids", "a limit of processes")?;
        journal.write(&directory.join("pids.max"), &v2::pids(limit))?;
    }
    for (name, value) in [
        ("cpuset.cpus", &resources.cpuset_cpus),
        ("cpuset.mems", &resources.cpuset_mems),
    ] {
        if !value.is_empty() {
            let directory = need(cgroup, "cpuset", "a set of processors or memory nodes")?;
            journal.write(&directory.join(name), value)?;
        }
    }
    hugetlb(cgroup, resources, journal)
}

fn need<'a>(
    cgroup: &'a Cgroup,
    controller: &'static str,
    what: &'static str,
) -> Result<&'a Path, Error> {
    cgroup
        .directory(controller)
        .ok_or(Error::NoController { controller, what })
}

fn cpu(cgroup: &Cgroup, resources: &Resources, journal: &mut Journal) -> Result<(), Error> {
    // CRI cannot say "not given" but by 0.
    let shares = resources.cpu_shares.filter(|shares| *shares != 0);
    let period = resources.cpu_period.filter(|period| *period != 0);
    let quota = resources.cpu_quota.filter(|quota| *quota != 0);
    if shares.is_none() && period.is_none() && quota.is_none() {
        return Ok(());
    }
    let directory = need(cgroup, "cpu", "a share of processor time")?;
    if let Some(shares) = shares {
        let shares = shares.clamp(*SHARES.start(), *SHARES.end());
        journal.write(&directory.join("cpu.shares"), &shares.to_string())?;
    }
    let period_file = directory.join("cpu.cfs_period_us");
    let mut period_late = None;
    if let Some(period) = period {
        match journal.write(&period_file, &period.to_string()) {
            // With the old quota this period would be more than the parent has: quota first.
            Err(Error::Write { source, .. })
                if quota.is_some() && source.kind() == io::ErrorKind::InvalidInput =>
            {
                period_late = Some(period);
            }
            other => other?,
        }
    }
    if let Some(quota) = quota {
        journal.write(
            &directory.join("cpu.cfs_quota_us"),
            &quota.max(-1).to_string(),
        )?;
    }
    if let Some(period) = period_late {
        journal.write(&period_file, &period.to_string())?;
    }
    Ok(())
}

fn memory(cgroup: &Cgroup, resources: &Resources, journal: &mut Journal) -> Result<(), Error> {
    let limit = resources.memory_limit_bytes.filter(|limit| *limit != 0);
    // No word on swap means none, as the other runtimes have it.
    let swap = resources
        .memory_swap_limit_bytes
        .filter(|swap| *swap != 0)
        .or(limit);
    if limit.is_none() && swap.is_none() {
        return Ok(());
    }
    if let (Some(memory @ 1..), Some(swap @ 1..)) = (limit, swap)
        && swap < memory
    {
        return Err(Error::SwapBelowMemory { memory, swap });
    }
    let directory = need(cgroup, "memory", "a memory limit")?;
    let limit_file = directory.join("memory.limit_in_bytes");
    let swap_file = directory.join("memory.memsw.limit_in_bytes");
    let write_limit = |journal: &mut Journal| match limit {
        Some(limit) => shrink(journal, &limit_file, limit, directory),
        None => Ok(()),
    };
    let Some(current) = file::read_if_there(&swap_file)? else {
        // The kernel does not count swap (swapaccount=0): what is left is the memory limit.
        return write_limit(journal);
    };
    let write_swap = |journal: &mut Journal| match swap {
        Some(swap) => shrink(journal, &swap_file, swap, directory),
        None => Ok(()),
    };
    // At no moment may memory be above memory plus swap: grow the sum first, shrink it last.
    let current: u64 = current.trim().parse().unwrap_or(u64::MAX);
    let grows = swap.is_some_and(|swap| u64::try_from(swap).map_or(true, |swap| swap > current));
    if grows {
        write_swap(journal)?;
        write_limit(journal)
    } else {
        write_limit(journal)?;
        write_swap(journal)
    }
}

fn shrink(journal: &mut Journal, path: &Path, limit: i64, directory: &Path) -> Result<(), Error> {
    match journal.write(path, &limit.max(-1).to_string()) {
        Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
            let usage = file::read(&directory.join("memory.usage_in_bytes"))?;
            Err(Error::BelowUsage {
                path: directory.to_owned(),
                limit: u64::try_from(limit).unwrap_or_default(),
                usage: usage.trim().parse().unwrap_or_default(),
            })
        }
        other => other,
    }
}

/// A host without the controller is no error: the kubelet sends a limit of 0 for every page size
/// whether or not the pod asks for huge pages.
fn hugetlb(cgroup: &Cgroup, resources: &Resources, journal: &mut Journal) -> Result<(), Error> {
    let Some(directory) = cgroup.directory("hugetlb") else {
        return match &cgroup.unified {
            Some(unified) => v2::hugetlb(unified, resources, journal),
            None => Ok(()),
        };
    };
    for huge in &resources.hugepages {
        let size = v2::page_size(huge)?;
        let limit = huge.limit_bytes.to_string();
        journal.write(
            &directory.join(format!("hugetlb.{size}.limit_in_bytes")),
            &limit,
        )?;
        let reserved = directory.join(format!("hugetlb.{size}.rsvd.limit_in_bytes"));
        if reserved.exists() {
            journal.write(&reserved, &limit)?;
        }
    }
    Ok(())
}

/// Fills in an empty `cpuset.cpus` and `cpuset.mems` from the nearest parent that has some: with
/// either empty no process can be attached.
pub(super) fn inherit_cpuset(directory: &Path, mount: &Path) -> Result<(), Error> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        inherit(directory, mount, name)?;
    }
    Ok(())
}

fn inherit(directory: &Path, mount: &Path, name: &str) -> Result<String, Error> {
    let path = directory.join(name);
    let own = file::read(&path)?;
    if !own.trim().is_empty() || directory == mount {
        return Ok(own);
    }
    let Some(parent) = directory.parent() else {
        return Ok(own);
    };
    let value = inherit(parent, mount, name)?;
    file::write(&path, value.trim())?;
    Ok(value)
}
