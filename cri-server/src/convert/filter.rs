//! Filters of the list calls: every criterion given must hold.

use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::ContainerRecord;
use berth_sandbox::pod::PodRecord;
use std::collections::{BTreeMap, HashMap};

/// An ID, whole or its beginning; empty matches all.
fn id_matches(wanted: &str, id: &str) -> bool {
    id.starts_with(wanted)
}

fn labels_match(wanted: &HashMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether `pod` is among those asked for.
pub fn pod(filter: &cri::PodSandboxFilter, pod: &PodRecord) -> bool {
    let state = i32::from(super::answer::pod_state(&pod.state));
    id_matches(&filter.id, pod.id.as_str())
        && filter.state.is_none_or(|wanted| wanted.state == state)
        && labels_match(&filter.label_selector, &pod.spec.labels)
}

/// Whether `pod` is among those whose statistics are asked for.
pub fn pod_stats(filter: &cri::PodSandboxStatsFilter, pod: &PodRecord) -> bool {
    id_matches(&filter.id, pod.id.as_str())
        && labels_match(&filter.label_selector, &pod.spec.labels)
}

/// Whether `container` is among those whose statistics are asked for.
pub fn container_stats(filter: &cri::ContainerStatsFilter, container: &ContainerRecord) -> bool {
    id_matches(&filter.id, container.id.as_str())
        && id_matches(&filter.pod_sandbox_id, container.pod.as_str())
        && labels_match(&filter.label_selector, &container.spec.labels)
}

/// Whether `container` is among those asked for.
pub fn container(filter: &cri::ContainerFilter, container: &ContainerRecord) -> bool {
    let state = i32::from(super::answer::container_state(&container.state));
    id_matches(&filter.id, container.id.as_str())
        && id_matches(&filter.pod_sandbox_id, container.pod.as_str())
        && filter.state.is_none_or(|wanted| wanted.state == state)
        && labels_match(&filter.label_selector, &container.spec.labels)
}
