//! Values of the metrics, for one pod or one container.

use super::families as f;
use super::families::Family;
use crate::writable::Written;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::cgroup::{Cgroup, Pressure};
use berth_sandbox::container::{ContainerRecord, ContainerState};
use berth_sandbox::pod::PodRecord;
use berth_sandbox::processes;
use berth_sandbox::stats::{Interface, Sample};
use std::collections::BTreeMap;

/// The file system that writable layers are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    pub bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

impl FileSystem {
    /// Of the one that `path` is on.
    pub fn of(path: &std::path::Path) -> Self {
        let Ok(stat) = rustix::fs::statvfs(path) else {
            return Self::default();
        };
        Self {
            bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            inodes: stat.f_files,
            inodes_free: stat.f_ffree,
        }
    }
}

/// Samples of one object as they come together.
struct Samples {
    at: i64,
    labels: [String; 6],
    metrics: Vec<cri::Metric>,
}

impl Samples {
    fn add(&mut self, family: Family, value: u64) {
        self.add_labelled(family, &[], value);
    }

    fn add_labelled(&mut self, family: Family, labels: &[&str], value: u64) {
        debug_assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
        let labels = labels.iter().map(|label| (*label).to_owned());
        self.metrics.push(cri::Metric {
            name: family.name.to_owned(),
            timestamp: self.at,
            metric_type: family.kind.into(),
            label_values: self.labels.iter().cloned().chain(labels).collect(),
            value: Some(cri::UInt64Value { value }),
        });
    }

    /// Pressure totals: somebody waited, everybody did.
    fn add_pressure(&mut self, waiting: Family, stalled: Family, pressure: Option<&Pressure>) {
        if let Some(pressure) = pressure {
            self.add(waiting, pressure.some.total_us / 1_000_000);
            self.add(stalled, pressure.full.total_us / 1_000_000);
        }
    }
}

/// What is the pod's: its network.
pub fn pod(pod: &PodRecord, at: i64, interfaces: &[Interface]) -> Vec<cri::Metric> {
    let cgroup = pod.cgroup.as_ref().map(|parent| parent.path.clone());
    let mut samples = Samples {
        at,
        labels: [
            cgroup.unwrap_or_default(),
            pod.id.to_string(),
            String::new(),
            pod.spec.name.namespace.clone(),
            pod.spec.name.name.clone(),
            String::new(),
        ],
        metrics: Vec::new(),
    };
    for interface in interfaces {
        let name = [interface.name.as_str()];
        let (rx, tx) = (interface.received, interface.sent);
        for (family, value) in [
            (f::RX_BYTES, rx.bytes),
            (f::RX_PACKETS, rx.packets),
            (f::RX_DROPPED, rx.dropped),
            (f::RX_ERRORS, rx.errors),
            (f::TX_BYTES, tx.bytes),
            (f::TX_PACKETS, tx.packets),
            (f::TX_DROPPED, tx.dropped),
            (f::TX_ERRORS, tx.errors),
        ] {
            samples.add_labelled(family, &name, value);
        }
    }
    samples.metrics
}

/// What a running container uses; reads what is not in `sample` itself. Blocking.
pub fn container(
    pod: &PodRecord,
    container: &ContainerRecord,
    sample: &Sample,
    written: Option<&Written>,
    file_system: FileSystem,
) -> Vec<cri::Metric> {
    let (ContainerState::Running { since, pid, .. }, Some(cgroup)) =
        (&container.state, &container.cgroup)
    else {
        return Vec::new();
    };
    let mut samples = Samples {
        at: sample.at,
        labels: [
            cgroup.path().to_owned(),
            container.id.to_string(),
            container.spec.image.image.clone(),
            pod.spec.name.namespace.clone(),
            pod.spec.name.name.clone(),
            container.spec.name.name.clone(),
        ],
        metrics: Vec::with_capacity(64),
    };
    samples.add(f::LAST_SEEN, seconds(sample.at));
    samples.add(f::START_TIME, seconds(*since));
    processor_and_memory(&mut samples, sample);
    samples.add(
        f::OOM_EVENTS,
        cgroup.oom_kills().ok().flatten().unwrap_or(0),
    );
    for huge in cgroup.hugepages().unwrap_or_default() {
        samples.add_labelled(f::HUGETLB_USAGE, &[&huge.page_size], huge.usage);
        samples.add_labelled(f::HUGETLB_MAX, &[&huge.page_size], huge.max);
    }
    samples.add(f::FS_LIMIT, file_system.bytes);
    samples.add(f::FS_INODES, file_system.inodes);
    samples.add(f::FS_INODES_FREE, file_system.inodes_free);
    samples.add(f::FS_USAGE, written.map_or(0, |written| written.bytes));
    devices(&mut samples, cgroup);
    let held = processes::held(cgroup);
    samples.add(f::PROCESSES, held.processes);
    samples.add(f::FILE_DESCRIPTORS, held.descriptors);
    samples.add(f::SOCKETS, held.sockets);
    let pids = sample.stats.pids.unwrap_or_default();
    samples.add(f::THREADS, pids.current);
    samples.add(f::THREADS_MAX, pids.limit.unwrap_or(0));
    if let Some(open_files) = processes::soft_open_files(*pid) {
        // CRI's value has no sign: "none" comes out as the largest there is.
        samples.add_labelled(f::ULIMITS, &["max_open_files"], open_files.cast_unsigned());
    }
    limits(&mut samples, cgroup);
    samples.metrics
}

fn processor_and_memory(samples: &mut Samples, sample: &Sample) {
    const NS: u64 = 1_000_000_000;
    let cpu = sample.stats.cpu.unwrap_or_default();
    samples.add(f::CPU_USER, cpu.user_ns / NS);
    samples.add(f::CPU_SYSTEM, cpu.system_ns / NS);
    samples.add_labelled(f::CPU_USAGE, &["total"], cpu.usage_ns / NS);
    samples.add(f::CPU_PERIODS, cpu.periods);
    samples.add(f::CPU_THROTTLED_PERIODS, cpu.throttled_periods);
    samples.add(f::CPU_THROTTLED, cpu.throttled_ns / NS);

    let memory = sample.stats.memory.unwrap_or_default();
    for (family, value) in [
        (f::MEMORY_CACHE, memory.cache),
        (f::MEMORY_RSS, memory.rss),
        (f::MEMORY_KERNEL, memory.kernel),
        (f::MEMORY_MAPPED, memory.mapped_file),
        (f::MEMORY_SWAP, sample.stats.swap.unwrap_or_default().usage),
        (f::MEMORY_FAILCNT, memory.limit_hits),
        (f::MEMORY_USAGE, memory.usage),
        (f::MEMORY_MAX, memory.max_usage.unwrap_or(memory.usage)),
        (f::MEMORY_WORKING_SET, memory.working_set),
    ] {
        samples.add(family, value);
    }
    for (kind, scope, value) in [
        ("pgfault", "container", memory.own_page_faults),
        ("pgmajfault", "container", memory.own_major_page_faults),
        ("pgfault", "hierarchy", memory.page_faults),
        ("pgmajfault", "hierarchy", memory.major_page_faults),
    ] {
        samples.add_labelled(f::MEMORY_FAILURES, &[kind, scope], value);
    }
    let pressure = &sample.pressure;
    for (waiting, stalled, pressure) in [
        (
            f::PRESSURE_CPU_WAITING,
            f::PRESSURE_CPU_STALLED,
            &pressure.cpu,
        ),
        (
            f::PRESSURE_MEMORY_WAITING,
            f::PRESSURE_MEMORY_STALLED,
            &pressure.memory,
        ),
        (f::PRESSURE_IO_WAITING, f::PRESSURE_IO_STALLED, &pressure.io),
    ] {
        samples.add_pressure(waiting, stalled, pressure.as_ref());
    }
}

fn devices(samples: &mut Samples, cgroup: &Cgroup) {
    let mut names = BTreeMap::new();
    for io in cgroup.io().unwrap_or_default() {
        let name = names
            .entry((io.major, io.minor))
            .or_insert_with(|| device_name(io.major, io.minor));
        let name = name.as_str();
        samples.add_labelled(f::FS_READ_BYTES, &[name], io.read_bytes);
        samples.add_labelled(f::FS_READS, &[name], io.reads);
        samples.add_labelled(f::FS_WRITTEN_BYTES, &[name], io.written_bytes);
        samples.add_labelled(f::FS_WRITES, &[name], io.writes);
        let (major, minor) = (io.major.to_string(), io.minor.to_string());
        for (operation, value) in [("Read", io.read_bytes), ("Write", io.written_bytes)] {
            samples.add_labelled(f::BLKIO, &[name, &major, &minor, operation], value);
        }
    }
}

fn limits(samples: &mut Samples, cgroup: &Cgroup) {
    let limits = cgroup.limits().unwrap_or_default();
    samples.add(f::SPEC_PERIOD, limits.cpu_period);
    samples.add(f::SPEC_SHARES, limits.cpu_shares);
    samples.add(f::SPEC_MEMORY, limits.memory);
    samples.add(f::SPEC_RESERVATION, limits.memory_reservation);
    samples.add(f::SPEC_SWAP, limits.memory_and_swap);
    if limits.cpu_quota > 0 {
        samples.add(f::SPEC_QUOTA, limits.cpu_quota);
    }
}

/// "/dev/sda", or the numbers where the kernel has no name.
fn device_name(major: u32, minor: u32) -> String {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let uevent = uevent.unwrap_or_default();
    let name = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

fn seconds(ns: i64) -> u64 {
    u64::try_from(ns / 1_000_000_000).unwrap_or(0)
}
