//! What containers and pods use, as CRI tells it: statistics, metrics, streams.

use berth_proto::runtime_v1 as cri;
use berth_tests::{Container, LinuxConfig, Node, Pod, eventually};
use std::collections::{BTreeMap, BTreeSet};
use tonic::Code;

fn stats(container: &Container<'_>) -> cri::ContainerStats {
    let request = cri::ContainerStatsRequest {
        container_id: container.id.clone(),
    };
    let mut runtime = container.node.runtime();
    let answer = container.node.wait(runtime.container_stats(request));
    answer.expect("ContainerStats").stats.expect("stats")
}

fn list(node: &Node, filter: Option<cri::ContainerStatsFilter>) -> Vec<cri::ContainerStats> {
    let request = cri::ListContainerStatsRequest { filter };
    node.wait(node.runtime().list_container_stats(request))
        .expect("ListContainerStats")
        .stats
}

fn pod_stats(pod: &Pod<'_>) -> cri::LinuxPodSandboxStats {
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let answer = pod.node.wait(pod.node.runtime().pod_sandbox_stats(request));
    let stats = answer.expect("PodSandboxStats").stats.expect("stats");
    stats.linux.expect("linux")
}

fn value(value: Option<cri::UInt64Value>) -> u64 {
    value.expect("a value").value
}

#[test]
fn processor_memory_and_writable_layer_of_a_container_are_told() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&[
        "sh",
        "-c",
        "head -c 3000000 /dev/zero > /written; echo up; while :; do :; done",
    ]);
    config.resources().memory_limit_in_bytes = 64 << 20;
    let container = pod.start_as(config);
    container.wait_for_log("up");
    let stats = eventually("it has used 50 ms and 3 MB", || {
        let stats = stats(&container);
        let used = value(stats.cpu.as_ref()?.usage_core_nano_seconds);
        let written = value(stats.writable_layer.as_ref()?.used_bytes);
        (used > 50_000_000 && written >= 3_000_000).then_some(stats)
    });
    assert_eq!(stats.attributes.unwrap().id, container.id);
    let cpu = stats.cpu.unwrap();
    assert!(cpu.timestamp > 0);
    assert!(value(cpu.usage_nano_cores) > 10_000_000, "{cpu:?}");
    let memory = stats.memory.unwrap();
    assert!(value(memory.usage_bytes) >= value(memory.working_set_bytes));
    assert!(value(memory.available_bytes) <= 64 << 20);
    assert!(value(memory.page_faults) > 0);
    let layer = stats.writable_layer.unwrap();
    let root = node.root().display().to_string();
    assert!(layer.fs_id.unwrap().mountpoint.starts_with(&root));
    assert!(value(layer.inodes_used) >= 1);
    let has_psi = std::path::Path::new("/proc/pressure/cpu").exists()
        && std::fs::read_to_string("/proc/pressure/cpu").is_ok();
    assert!(!has_psi || cpu.psi.is_some() || !berth_tests::node::is_cgroup_v2());
}

#[test]
fn only_running_containers_that_match_are_listed() {
    let node = Node::start();
    let (web, other) = (node.run_pod("web"), node.run_pod("other"));
    let mut config = web.container(&["sleep", "1000"]);
    config.labels.insert("tier".into(), "front".into());
    let labelled = web.start_as(config);
    let plain = web.start(&["sleep", "1000"]);
    let far = other.start(&["sleep", "1000"]);
    let ended = web.start(&["true"]);
    ended.wait_for_exit();
    let created = web.create(web.container(&["true"]));
    let ids = |filter| -> BTreeSet<String> {
        list(&node, filter)
            .into_iter()
            .map(|stats| stats.attributes.unwrap().id)
            .collect()
    };
    let set = |containers: &[&Container<'_>]| -> BTreeSet<String> {
        containers.iter().map(|c| c.id.clone()).collect()
    };
    assert_eq!(ids(None), set(&[&labelled, &plain, &far]));
    let filter = |id: &str, pod: &str, label: Option<(&str, &str)>| {
        Some(cri::ContainerStatsFilter {
            id: id.to_owned(),
            pod_sandbox_id: pod.to_owned(),
            label_selector: label
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into_iter()
                .collect(),
        })
    };
    assert_eq!(ids(filter(&plain.id, "", None)), set(&[&plain]));
    assert_eq!(ids(filter(&plain.id[..13], "", None)), set(&[&plain]));
    assert_eq!(ids(filter("", &other.id, None)), set(&[&far]));
    assert_eq!(
        ids(filter("", "", Some(("tier", "front")))),
        set(&[&labelled])
    );
    assert_eq!(ids(filter("", "", Some(("tier", "back")))), set(&[]));
    // Asked for by ID, one that does not run says who it is and what it has written.
    for idle in [&ended, &created] {
        let stats = stats(idle);
        assert_eq!(stats.attributes.unwrap().id, idle.id);
        assert_eq!((stats.cpu, stats.memory), (None, None));
    }
    let request = cri::ContainerStatsRequest {
        container_id: "0".repeat(64),
    };
    let error = node
        .wait(node.runtime().container_stats(request))
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
}

#[test]
fn a_pods_statistics_are_its_cgroups_and_its_networks() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    eventually("both run", || (container.pids().len() >= 2).then_some(()));
    let stats = eventually("the pod's interface has seen a packet", || {
        let stats = pod_stats(&pod);
        let interface = stats.network.as_ref()?.default_interface.as_ref()?;
        (value(interface.rx_bytes) + value(interface.tx_bytes) > 0).then_some(stats)
    });
    let network = stats.network.unwrap();
    assert_eq!(network.default_interface.unwrap().name, "eth0");
    assert!(value(stats.process.unwrap().process_count) >= 2);
    assert!(value(stats.memory.unwrap().usage_bytes) > 0);
    let cpu = value(stats.cpu.unwrap().usage_core_nano_seconds);
    assert_eq!(stats.containers.len(), 1);
    let own = stats.containers[0].cpu.as_ref().unwrap();
    assert!(cpu > 0 && value(own.usage_core_nano_seconds) <= cpu);

    let list = |id: &str| {
        let filter = Some(cri::PodSandboxStatsFilter {
            id: id.to_owned(),
            ..Default::default()
        });
        let request = cri::ListPodSandboxStatsRequest { filter };
        node.wait(node.runtime().list_pod_sandbox_stats(request))
            .unwrap()
            .stats
    };
    let second = node.run_pod("second");
    assert_eq!(list("").len(), 2);
    assert_eq!(list(&second.id).len(), 1);
    second.stop();
    assert_eq!(list("").len(), 1, "one that is not ready uses nothing");
    let stopped = pod_stats(&second);
    assert_eq!((stopped.cpu, stopped.network), (None, None));
}

fn metrics(node: &Node) -> Vec<cri::PodSandboxMetrics> {
    let request = cri::ListPodSandboxMetricsRequest {};
    node.wait(node.runtime().list_pod_sandbox_metrics(request))
        .expect("ListPodSandboxMetrics")
        .pod_metrics
}

#[test]
fn all_metrics_are_described_and_come_with_the_labels_of_their_description() {
    let node = Node::start();
    let descriptors = node
        .wait(
            node.runtime()
                .list_metric_descriptors(cri::ListMetricDescriptorsRequest {}),
        )
        .unwrap()
        .descriptors;
    assert_eq!(descriptors.len(), 56);
    let labels: BTreeMap<String, Vec<String>> = descriptors
        .into_iter()
        .map(|d| (d.name, d.label_keys))
        .collect();
    let pod = node.run_pod("web");
    let mut config = pod.container(&[
        "sh",
        "-c",
        "echo hi > /file; sync; echo up; exec sleep 1000",
    ]);
    let resources = config.resources();
    resources.cpu_period = 100_000;
    resources.cpu_quota = 20_000;
    resources.cpu_shares = 1024;
    resources.memory_limit_in_bytes = 64 << 20;
    resources.memory_swap_limit_in_bytes = 64 << 20;
    let container = pod.start_as(config);
    container.wait_for_log("up");
    let of_pod = metrics(&node).pop().expect("the pod's metrics");
    assert_eq!(of_pod.pod_sandbox_id, pod.id);
    let of_container = &of_pod.container_metrics[0];
    assert_eq!(of_container.container_id, container.id);
    let mut seen: BTreeMap<&str, &cri::Metric> = BTreeMap::new();
    for metric in of_pod.metrics.iter().chain(&of_container.metrics) {
        let keys = labels.get(&metric.name).expect(&metric.name);
        assert_eq!(metric.label_values.len(), keys.len(), "{metric:?}");
        assert!(metric.timestamp > 0);
        seen.insert(&metric.name, metric);
    }
    let absent: Vec<&str> = labels
        .keys()
        .map(String::as_str)
        .filter(|name| !seen.contains_key(name))
        .collect();
    // What a kernel need not have: huge pages' controller, pressure, counting of devices.
    let may_be_absent = |name: &&str| {
        ["hugetlb", "pressure", "blkio", "fs_reads", "fs_writes"]
            .iter()
            .any(|part| name.contains(part))
    };
    assert!(absent.iter().all(may_be_absent), "{absent:?}");
    let label = |metric: &cri::Metric, key: &str| {
        let keys = &labels[&metric.name];
        let at = keys.iter().position(|known| known == key).unwrap();
        metric.label_values[at].clone()
    };
    let usage = seen["container_memory_usage_bytes"];
    assert_eq!(label(usage, "pod"), "web");
    assert_eq!(label(usage, "namespace"), "default");
    assert_eq!(label(usage, "name"), container.id);
    assert!(value(usage.value) > 0);
    for (name, expected) in [
        ("container_spec_memory_limit_bytes", 64 << 20),
        ("container_spec_cpu_quota", 20_000),
        ("container_spec_cpu_period", 100_000),
        ("container_spec_cpu_shares", 1024),
        ("container_processes", 1),
    ] {
        assert_eq!(value(seen[name].value), expected, "{name}");
    }
    assert!(value(seen["container_start_time_seconds"].value) > 1_500_000_000);
    assert!(value(seen["container_file_descriptors"].value) >= 3);
}

/// All messages of a stream, one after the other.
fn collect<T: Send + 'static>(
    node: &Node,
    call: impl Future<Output = Result<tonic::Response<tonic::Streaming<T>>, tonic::Status>>,
) -> Vec<T> {
    let mut stream = node.wait(call).expect("a stream");
    let mut messages = Vec::new();
    while let Some(message) = node
        .wait(async { stream.message().await.map(tonic::Response::new) })
        .expect("a message")
    {
        messages.push(message);
    }
    messages
}

#[test]
fn streamed_lists_say_what_the_lists_say_each_item_once() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    // Large items, so that there are several messages.
    let blob = "x".repeat(200 << 10);
    config.annotations.insert("blob".into(), blob.clone());
    let pods: Vec<_> = (0..8)
        .map(|i| {
            let mut config = config.clone();
            config.metadata.as_mut().unwrap().name = format!("web{i}");
            config.metadata.as_mut().unwrap().uid = format!("uid{i}");
            node.run(config)
        })
        .collect();
    let containers: Vec<_> = pods
        .iter()
        .map(|pod| {
            let mut config = pod.container(&["sleep", "1000"]);
            config.annotations.insert("blob".into(), blob.clone());
            pod.start_as(config)
        })
        .collect();
    let pod_ids: Vec<String> = node.pods(None).into_iter().map(|pod| pod.id).collect();
    let container_ids: Vec<String> = node.containers(None).into_iter().map(|c| c.id).collect();
    assert_eq!(containers.len(), container_ids.len());

    let pieces = collect(
        &node,
        node.runtime()
            .stream_pod_sandboxes(cri::StreamPodSandboxesRequest::default()),
    );
    assert!(pieces.len() > 1, "one message for 1.6 MB");
    assert!(pieces.iter().all(|piece| !piece.pod_sandboxes.is_empty()));
    let streamed: Vec<_> = pieces
        .into_iter()
        .flat_map(|piece| piece.pod_sandboxes)
        .map(|pod| pod.id)
        .collect();
    assert_eq!(streamed, pod_ids);

    let pieces = collect(
        &node,
        node.runtime()
            .stream_containers(cri::StreamContainersRequest::default()),
    );
    let streamed: Vec<_> = pieces
        .into_iter()
        .flat_map(|piece| piece.containers)
        .map(|container| container.id)
        .collect();
    assert_eq!(streamed, container_ids);

    let pieces = collect(
        &node,
        node.runtime()
            .stream_container_stats(cri::StreamContainerStatsRequest::default()),
    );
    let streamed: Vec<_> = pieces
        .into_iter()
        .flat_map(|piece| piece.container_stats)
        .map(|stats| stats.attributes.unwrap().id)
        .collect();
    assert_eq!(streamed, container_ids);

    let pieces = collect(
        &node,
        node.runtime()
            .stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest::default()),
    );
    assert_eq!(
        pieces
            .iter()
            .map(|piece| piece.pod_sandbox_stats.len())
            .sum::<usize>(),
        pods.len()
    );
    let pieces = collect(
        &node,
        node.runtime()
            .stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest::default()),
    );
    assert_eq!(
        pieces
            .iter()
            .map(|piece| piece.pod_sandbox_metrics.len())
            .sum::<usize>(),
        pods.len()
    );
    let none = cri::StreamContainersRequest {
        filter: Some(cri::ContainerFilter {
            id: "0".repeat(64),
            ..Default::default()
        }),
    };
    assert!(
        collect(&node, node.runtime().stream_containers(none)).is_empty(),
        "nothing to tell is no message"
    );
}

#[test]
fn what_happens_to_a_container_is_told_in_order_with_the_states_of_then() {
    let node = Node::start();
    let base = node.base_image();
    let mut events = node
        .wait(
            node.runtime()
                .get_container_events(cri::GetEventsRequest {}),
        )
        .expect("GetContainerEvents");
    let pod = node.run_pod("web");
    let container = pod.start_as(pod.container_of(&base, &["sh", "-c", "exit 3"]));
    container.wait_for_exit();
    container.remove().unwrap();
    pod.remove();
    use cri::ContainerEventType as E;
    let expected = [
        (&pod.id, E::ContainerCreatedEvent),
        (&pod.id, E::ContainerStartedEvent),
        (&container.id, E::ContainerCreatedEvent),
        (&container.id, E::ContainerStartedEvent),
        (&container.id, E::ContainerStoppedEvent),
        (&container.id, E::ContainerDeletedEvent),
        (&pod.id, E::ContainerStoppedEvent),
        (&pod.id, E::ContainerDeletedEvent),
    ];
    let mut last = 0;
    for (id, kind) in expected {
        let event = node
            .wait(async { events.message().await.map(tonic::Response::new) })
            .expect("a message")
            .expect("an event");
        assert_eq!(
            (&event.container_id, event.container_event_type()),
            (id, kind)
        );
        assert!(event.created_at >= last);
        last = event.created_at;
        let status = event.pod_sandbox_status.expect("the sandbox's status");
        assert_eq!(status.id, pod.id);
        if id == &container.id && kind == E::ContainerStoppedEvent {
            assert_eq!(event.containers_statuses[0].exit_code, 3);
        }
        if id == &container.id && kind == E::ContainerDeletedEvent {
            assert!(event.containers_statuses.is_empty());
        }
    }
}

#[test]
fn a_listener_that_does_not_read_is_told_that_it_missed_something_and_holds_nobody_up() {
    let node = Node::start();
    let base = node.base_image();
    let mut idle = node
        .wait(
            node.runtime()
                .get_container_events(cri::GetEventsRequest {}),
        )
        .expect("GetContainerEvents");
    let pod = node.run_pod("web");
    // Each tells of the pod with labels of 60 KB: what the connection holds is soon full.
    let mut config = pod.container_of(&base, &["true"]);
    for n in 0..6 {
        config
            .annotations
            .insert(format!("blob{n}"), "x".repeat(10_000));
    }
    // Created and deleted, 600 times: more than what is kept for a listener.
    for _ in 0..600 {
        let container = pod.create(config.clone());
        container.remove().unwrap();
    }
    let error = loop {
        match node.wait(async { idle.message().await.map(tonic::Response::new) }) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::DataLoss, "{error}");
    assert!(error.message().contains("missed"), "{error}");
}
