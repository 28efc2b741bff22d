//! The metrics: name, meaning, kind, labels.

use berth_proto::runtime_v1 as cri;

/// Labels of every metric: the cgroup, the container's ID (the sandbox's for what is
/// the pod's), the image, and what Kubernetes calls it.
const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// As Prometheus sees it.
    pub name: &'static str,
    help: &'static str,
    /// Whether it only grows.
    pub kind: cri::MetricType,
    /// Labels beside those every metric has.
    pub labels: &'static [&'static str],
}

const fn counter(
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
) -> Family {
    Family {
        name,
        help,
        kind: cri::MetricType::Counter,
        labels,
    }
}

const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Family {
    Family {
        name,
        help,
        kind: cri::MetricType::Gauge,
        labels,
    }
}

/// Declares the metrics and the list of them.
macro_rules! families {
    ($($constant:ident = $kind:ident($name:literal, $help:literal, $labels:expr);)*) => {
        $(pub(super) const $constant: Family = $kind($name, $help, &$labels);)*

        /// Every metric there is.
        const ALL: [Family; 56] = [$($constant),*];
    };
}

families! {
    CPU_USER = counter(
        "container_cpu_user_seconds_total",
        "Processor time spent in user mode, in seconds.",
        []
    );
    CPU_SYSTEM = counter(
        "container_cpu_system_seconds_total",
        "Processor time spent in the kernel, in seconds.",
        []
    );
    CPU_USAGE = counter(
        "container_cpu_usage_seconds_total",
        "Processor time used, in seconds.",
        ["cpu"]
    );
    CPU_PERIODS = counter(
        "container_cpu_cfs_periods_total",
        "Periods in which a quota of processor time was in force.",
        []
    );
    CPU_THROTTLED_PERIODS = counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the quota of processor time ran out.",
        []
    );
    CPU_THROTTLED = counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time spent waiting because the quota of processor time had run out, in seconds.",
        []
    );
    MEMORY_CACHE = gauge(
        "container_memory_cache",
        "Page cache, in bytes.",
        []
    );
    MEMORY_RSS = gauge(
        "container_memory_rss",
        "Anonymous memory, in bytes.",
        []
    );
    MEMORY_KERNEL = gauge(
        "container_memory_kernel_usage",
        "Memory of the kernel's own on behalf of the container, in bytes.",
        []
    );
    MEMORY_MAPPED = gauge(
        "container_memory_mapped_file",
        "Memory of mapped files, in bytes.",
        []
    );
    MEMORY_SWAP = gauge(
        "container_memory_swap",
        "Swap in use, in bytes.",
        []
    );
    MEMORY_FAILCNT = counter(
        "container_memory_failcnt",
        "How often the memory limit was hit.",
        []
    );
    MEMORY_USAGE = gauge(
        "container_memory_usage_bytes",
        "Memory in use, whatever it is used for, in bytes.",
        []
    );
    MEMORY_MAX = gauge(
        "container_memory_max_usage_bytes",
        "The most memory that was ever in use, in bytes.",
        []
    );
    MEMORY_WORKING_SET = gauge(
        "container_memory_working_set_bytes",
        "Memory in use less what could be dropped at once, in bytes.",
        []
    );
    MEMORY_FAILURES = counter(
        "container_memory_failures_total",
        "Page faults, by whether a disk had to be read for them.",
        ["failure_type", "scope"]
    );
    OOM_EVENTS = counter(
        "container_oom_events_total",
        "Processes the kernel has killed for want of memory.",
        []
    );
    HUGETLB_USAGE = gauge(
        "container_hugetlb_usage_bytes",
        "Huge pages in use, in bytes.",
        ["pagesize"]
    );
    HUGETLB_MAX = gauge(
        "container_hugetlb_max_usage_bytes",
        "The most huge pages that were ever in use, in bytes.",
        ["pagesize"]
    );
    FS_INODES_FREE = gauge(
        "container_fs_inodes_free",
        "Free inodes of the file system of the writable layer.",
        []
    );
    FS_INODES = gauge(
        "container_fs_inodes_total",
        "Inodes of the file system of the writable layer.",
        []
    );
    FS_LIMIT = gauge(
        "container_fs_limit_bytes",
        "Size of the file system of the writable layer, in bytes.",
        []
    );
    FS_USAGE = gauge(
        "container_fs_usage_bytes",
        "What the container has written to its writable layer, in bytes.",
        []
    );
    FS_READ_BYTES = counter(
        "container_fs_reads_bytes_total",
        "Bytes read from a device.",
        ["device"]
    );
    FS_READS = counter(
        "container_fs_reads_total",
        "Reads from a device.",
        ["device"]
    );
    FS_WRITTEN_BYTES = counter(
        "container_fs_writes_bytes_total",
        "Bytes written to a device.",
        ["device"]
    );
    FS_WRITES = counter(
        "container_fs_writes_total",
        "Writes to a device.",
        ["device"]
    );
    BLKIO = counter(
        "container_blkio_device_usage_total",
        "Bytes read from and written to a device.",
        ["device", "major", "minor", "operation"]
    );
    RX_BYTES = counter(
        "container_network_receive_bytes_total",
        "Bytes received.",
        ["interface"]
    );
    RX_PACKETS = counter(
        "container_network_receive_packets_total",
        "Packets received.",
        ["interface"]
    );
    RX_DROPPED = counter(
        "container_network_receive_packets_dropped_total",
        "Packets dropped while receiving.",
        ["interface"]
    );
    RX_ERRORS = counter(
        "container_network_receive_errors_total",
        "Errors while receiving.",
        ["interface"]
    );
    TX_BYTES = counter(
        "container_network_transmit_bytes_total",
        "Bytes sent.",
        ["interface"]
    );
    TX_PACKETS = counter(
        "container_network_transmit_packets_total",
        "Packets sent.",
        ["interface"]
    );
    TX_DROPPED = counter(
        "container_network_transmit_packets_dropped_total",
        "Packets dropped while sending.",
        ["interface"]
    );
    TX_ERRORS = counter(
        "container_network_transmit_errors_total",
        "Errors while sending.",
        ["interface"]
    );
    FILE_DESCRIPTORS = gauge(
        "container_file_descriptors",
        "Open file descriptors.",
        []
    );
    PROCESSES = gauge(
        "container_processes",
        "Processes.",
        []
    );
    SOCKETS = gauge(
        "container_sockets",
        "Open sockets.",
        []
    );
    THREADS = gauge(
        "container_threads",
        "Threads.",
        []
    );
    THREADS_MAX = gauge(
        "container_threads_max",
        "Threads there may be; 0 for no limit.",
        []
    );
    ULIMITS = gauge(
        "container_ulimits_soft",
        "Soft limits of the first process; -1 for none.",
        ["ulimit"]
    );
    LAST_SEEN = gauge(
        "container_last_seen",
        "When the container was last seen, in seconds since 1970.",
        []
    );
    START_TIME = gauge(
        "container_start_time_seconds",
        "When the container was started, in seconds since 1970.",
        []
    );
    SPEC_PERIOD = gauge(
        "container_spec_cpu_period",
        "Length of the period of a quota of processor time, in microseconds.",
        []
    );
    SPEC_QUOTA = gauge(
        "container_spec_cpu_quota",
        "Processor time per period, in microseconds.",
        []
    );
    SPEC_SHARES = gauge(
        "container_spec_cpu_shares",
        "Share of processor time, as cgroup v1 counts it.",
        []
    );
    SPEC_MEMORY = gauge(
        "container_spec_memory_limit_bytes",
        "Memory limit in bytes; 0 for none.",
        []
    );
    SPEC_RESERVATION = gauge(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is kept for the container, in bytes; 0 for none.",
        []
    );
    SPEC_SWAP = gauge(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together, in bytes; 0 for none.",
        []
    );
    PRESSURE_CPU_WAITING = counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Time in which some process waited for a processor, in seconds.",
        []
    );
    PRESSURE_CPU_STALLED = counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Time in which every process waited for a processor, in seconds.",
        []
    );
    PRESSURE_MEMORY_WAITING = counter(
        "container_pressure_memory_waiting_seconds_total",
        "Time in which some process waited for memory, in seconds.",
        []
    );
    PRESSURE_MEMORY_STALLED = counter(
        "container_pressure_memory_stalled_seconds_total",
        "Time in which every process waited for memory, in seconds.",
        []
    );
    PRESSURE_IO_WAITING = counter(
        "container_pressure_io_waiting_seconds_total",
        "Time in which some process waited for input or output, in seconds.",
        []
    );
    PRESSURE_IO_STALLED = counter(
        "container_pressure_io_stalled_seconds_total",
        "Time in which every process waited for input or output, in seconds.",
        []
    );
}

/// What ListMetricDescriptors answers.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let descriptor = |family: &Family| cri::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS
            .iter()
            .chain(family.labels)
            .map(|label| (*label).to_owned())
            .collect(),
    };
    ALL.iter().map(descriptor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_every_metric_has_a_meaning() {
        let descriptors = descriptors();
        let names: BTreeSet<&str> = descriptors.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names.len(), 56);
        assert!(names.iter().all(|name| name.starts_with("container_")));
        assert!(descriptors.iter().all(|d| d.help.ends_with('.')));
    }
}
