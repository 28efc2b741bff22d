//! Samples to CRI's statistics.

use crate::writable::Written;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::cgroup::{Pressure, PressureTotals};
use berth_sandbox::container::ContainerRecord;
use berth_sandbox::pod::PodRecord;
use berth_sandbox::stats::{Interface, Sample};
use std::path::Path;

/// CRI's optional number.
pub fn number(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn data(totals: &PressureTotals) -> cri::PsiData {
    cri::PsiData {
        total: totals.total_us,
        avg10: totals.avg10,
        avg60: totals.avg60,
        avg300: totals.avg300,
    }
}

fn pressure(pressure: Option<&Pressure>) -> Option<cri::PsiStats> {
    pressure.map(|pressure| cri::PsiStats {
        full: Some(data(&pressure.full)),
        some: Some(data(&pressure.some)),
    })
}

/// Processor time; `None` where the kernel does not count it.
pub fn cpu(sample: &Sample) -> Option<cri::CpuUsage> {
    let cpu = sample.stats.cpu?;
    Some(cri::CpuUsage {
        timestamp: sample.at,
        usage_core_nano_seconds: number(cpu.usage_ns),
        usage_nano_cores: sample.nano_cores.and_then(number),
        psi: pressure(sample.pressure.cpu.as_ref()),
    })
}

/// Memory; `None` where the kernel does not count it.
pub fn memory(sample: &Sample) -> Option<cri::MemoryUsage> {
    let memory = sample.stats.memory?;
    Some(cri::MemoryUsage {
        timestamp: sample.at,
        working_set_bytes: number(memory.working_set),
        available_bytes: memory.available().and_then(number),
        usage_bytes: number(memory.usage),
        rss_bytes: number(memory.rss),
        page_faults: number(memory.page_faults),
        major_page_faults: number(memory.major_page_faults),
        psi: pressure(sample.pressure.memory.as_ref()),
    })
}

/// Pressure of input and output; `None` where the kernel does not measure it.
pub fn io(sample: &Sample) -> Option<cri::IoUsage> {
    let psi = pressure(sample.pressure.io.as_ref())?;
    Some(cri::IoUsage {
        timestamp: sample.at,
        psi: Some(psi),
    })
}

fn swap(sample: &Sample) -> Option<cri::SwapUsage> {
    let swap = sample.stats.swap?;
    let left = |limit: u64| limit.saturating_sub(swap.usage);
    Some(cri::SwapUsage {
        timestamp: sample.at,
        swap_available_bytes: swap.limit.map(left).and_then(number),
        swap_usage_bytes: number(swap.usage),
    })
}

/// ContainerStats: without a sample (it does not run) only who it is and what it has written.
pub fn container(
    container: &ContainerRecord,
    sample: Option<&Sample>,
    written: Option<&Written>,
    layers: &Path,
) -> cri::ContainerStats {
    let writable_layer = written.map(|written| cri::FilesystemUsage {
        timestamp: written.at,
        fs_id: Some(cri::FilesystemIdentifier {
            mountpoint: layers.to_string_lossy().into_owned(),
        }),
        used_bytes: number(written.bytes),
        inodes_used: number(written.inodes),
    });
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.id.to_string(),
            metadata: Some(cri::ContainerMetadata {
                name: container.spec.name.name.clone(),
                attempt: container.spec.name.attempt,
            }),
            labels: container.spec.labels.clone().into_iter().collect(),
            annotations: container.spec.annotations.clone().into_iter().collect(),
        }),
        cpu: sample.and_then(cpu),
        memory: sample.and_then(memory),
        writable_layer,
        swap: sample.and_then(swap),
        io: sample.and_then(io),
    }
}

/// What the CNI interface is called in a pod; the first one where there is none of that name.
const DEFAULT_INTERFACE: &str = "eth0";

fn network(at: i64, interfaces: &[Interface]) -> Option<cri::NetworkUsage> {
    let usage = |interface: &Interface| cri::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: number(interface.received.bytes),
        rx_errors: number(interface.received.errors),
        tx_bytes: number(interface.sent.bytes),
        tx_errors: number(interface.sent.errors),
    };
    let default = interfaces
        .iter()
        .position(|interface| interface.name == DEFAULT_INTERFACE)
        .unwrap_or(0);
    let first = interfaces.get(default)?;
    let others = interfaces
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != default)
        .map(|(_, interface)| usage(interface));
    Some(cri::NetworkUsage {
        timestamp: at,
        default_interface: Some(usage(first)),
        interfaces: others.collect(),
    })
}

/// PodSandboxStats. `at` is now, in nanoseconds since 1970.
pub fn pod(
    pod: &PodRecord,
    at: i64,
    sample: Option<&Sample>,
    interfaces: &[Interface],
    containers: Vec<cri::ContainerStats>,
) -> cri::PodSandboxStats {
    let name = &pod.spec.name;
    let process = sample.and_then(|sample| {
        let pids = sample.stats.pids?;
        Some(cri::ProcessUsage {
            timestamp: sample.at,
            process_count: number(pids.current),
        })
    });
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: pod.id.to_string(),
            metadata: Some(cri::PodSandboxMetadata {
                name: name.name.clone(),
                uid: name.uid.clone(),
                namespace: name.namespace.clone(),
                attempt: name.attempt,
            }),
            labels: pod.spec.labels.clone().into_iter().collect(),
            annotations: pod.spec.annotations.clone().into_iter().collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: sample.and_then(cpu),
            memory: sample.and_then(memory),
            network: network(at, interfaces),
            process,
            containers,
            io: sample.and_then(io),
        }),
        windows: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_sandbox::stats::Traffic;

    #[test]
    fn the_default_interface_is_the_one_cni_made() {
        let interface = |name: &str, bytes| Interface {
            name: name.into(),
            received: Traffic {
                bytes,
                ..Traffic::default()
            },
            sent: Traffic::default(),
        };
        let usage = network(7, &[interface("net1", 1), interface("eth0", 2)]).unwrap();
        assert_eq!(usage.default_interface.unwrap().rx_bytes, number(2));
        assert_eq!(usage.interfaces[0].name, "net1");
        let usage = network(7, &[interface("net1", 1)]).unwrap();
        assert_eq!(usage.default_interface.unwrap().name, "net1");
        assert_eq!(network(7, &[]), None);
    }

    #[test]
    fn what_the_kernel_does_not_measure_is_absent() {
        let sample = Sample::default();
        assert_eq!(cpu(&sample), None);
        assert_eq!(memory(&sample), None);
        assert_eq!(io(&sample), None);
    }
}
