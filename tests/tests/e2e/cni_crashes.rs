//! The sweep of `crashes.rs` with the network made by CNI plugins: wherever the
//! daemon dies, no address, rule or record of theirs is left.

use crate::cni::{Plugins, configure, portmap, remains};
use crate::crashes::points;
use berth_proto::runtime_v1 as cri;
use berth_tests::{Node, eventually};

fn sweep(prefixes: &[&str], round: impl Fn(&Node, &str)) {
    let plugins = Plugins::new();
    // One node for all: what a round leaves is found by the next one too.
    let node = plugins.node("");
    configure(
        &node,
        "1.0.0",
        &[plugins.bridge(&["10.66.0.0/24"]), portmap()],
    );
    for point in points(&node, prefixes) {
        println!("crash at {point}");
        round(&node, &point);
        node.remove_all_pods().unwrap();
        assert_eq!(node.leftovers(), [""; 0], "crash at {point}");
        eventually(
            &format!("crash at {point}: nothing is left of the plugins"),
            || remains(&node, &plugins).is_empty().then_some(()),
        );
    }
}

/// The daemon dies at `point`, which the call has to lead past, and comes back.
fn crash(node: &Node, point: &str, call: impl FnOnce()) {
    node.start_daemon_to_crash_at(Some(point));
    call();
    node.wait_for_crash();
    node.start_daemon();
}

fn config(node: &Node) -> cri::PodSandboxConfig {
    let mut config = node.pod_config("web");
    config.port_mappings = vec![cri::PortMapping {
        host_port: 12_200,
        container_port: 80,
        ..Default::default()
    }];
    config
}

#[test]
fn run_pod_sandbox_with_plugins_survives_a_crash_anywhere() {
    sweep(
        &[
            "run_pod.namespaces",
            "run_pod.network",
            "run_pod.ready",
            "network-add",
        ],
        |node, point| {
            crash(node, point, || _ = node.try_run(config(node)));
            let pod = node
                .try_run(config(node))
                .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
            assert!(pod.is_ready(), "crash at {point}");
            assert_eq!(node.pods(None).len(), 1, "crash at {point}");
            pod.remove();
        },
    );
}

#[test]
fn a_pod_with_plugins_that_was_never_finished_leaves_nothing() {
    sweep(&["run_pod.network", "network-add"], |node, point| {
        crash(node, point, || _ = node.try_run(config(node)));
    });
}

#[test]
fn stop_pod_sandbox_with_plugins_survives_a_crash_anywhere() {
    sweep(&["stop_pod.", "network-deleted"], |node, point| {
        let pod = node.run(config(node));
        crash(node, point, || _ = pod.try_stop());
        pod.try_stop()
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert!(!pod.is_ready(), "crash at {point}");
        pod.remove();
    });
}
