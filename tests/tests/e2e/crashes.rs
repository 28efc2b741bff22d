//! The sweep: the daemon dies at every named point of every call, comes back,
//! the call is repeated and undone; nothing is left, nothing is refused as taken.

use super::checkpoints;
use berth_proto::runtime_v1::ContainerState;
use berth_tests::{Format, Image, Layer, Node, Packing};

/// The points of one call, as `berth debug crash-points` lists them: "POINT" or
/// "CALL POINT" a line, where a point's name begins with its call's.
pub fn points(node: &Node, prefixes: &[&str]) -> Vec<String> {
    let output = node.berth(&["debug", "crash-points"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let points: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .filter(|point| prefixes.iter().any(|prefix| point.starts_with(prefix)))
        .map(str::to_owned)
        .collect();
    assert!(!points.is_empty(), "no point of {prefixes:?} in\n{text}");
    points
}

/// Runs `sweep` for each point with a node that dies there.
fn sweep(prefixes: &[&str], round: impl Fn(&Node, &str)) {
    let points = points(&Node::start(), prefixes);
    for point in points {
        println!("crash at {point}");
        let node = Node::start();
        round(&node, &point);
        node.remove_all_pods().unwrap();
        assert_eq!(node.leftovers(), [""; 0], "crash at {point}");
    }
}

/// Restarts the daemon so that it dies at `point`, makes the call that shall hit
/// it, and brings the daemon back.
fn crash(node: &Node, point: &str, call: impl FnOnce()) {
    node.start_daemon_to_crash_at(Some(point));
    call();
    if node.is_running() {
        // A point that this machine's way does not lead past (another cgroup
        // version, say) is no failure: the call has then simply succeeded.
        println!("  not reached here");
    }
    node.start_daemon();
}

#[test]
fn run_pod_sandbox_survives_a_crash_anywhere() {
    sweep(&["run_pod.", "network"], |node, point| {
        let config = node.pod_config("web");
        crash(node, point, || _ = node.try_run(config.clone()));
        assert!(node.pods(None).len() <= 1, "crash at {point}");
        let pod = node
            .try_run(config)
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert!(pod.is_ready(), "crash at {point}");
        assert_eq!(node.pods(None).len(), 1, "crash at {point}");
        assert_eq!(pod.output(&["probe", "args", "runs"]), "runs\ncwd /\n");
        pod.remove();
    });
}

#[test]
fn a_pod_that_was_never_finished_leaves_nothing_even_without_a_retry() {
    sweep(&["run_pod."], |node, point| {
        crash(node, point, || _ = node.try_run(node.pod_config("web")));
        node.remove_all_pods().unwrap();
        assert_eq!(node.leftovers(), [""; 0], "crash at {point}");
    });
}

#[test]
fn create_container_survives_a_crash_anywhere() {
    sweep(&["create_container."], |node, point| {
        let pod = node.run_pod("web");
        let config = pod.container(&["sleep", "1000"]);
        crash(node, point, || _ = pod.try_create(config.clone()));
        let container = pod
            .try_create(config)
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert_eq!(node.containers(None).len(), 1, "crash at {point}");
        container
            .start()
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert_eq!(container.state(), ContainerState::ContainerRunning);
        container.remove().unwrap();
        pod.remove();
    });
}

#[test]
fn start_container_survives_a_crash_anywhere() {
    sweep(&["start_container."], |node, point| {
        let pod = node.run_pod("web");
        let container = pod.create(pod.container(&["sleep", "1000"]));
        crash(node, point, || _ = container.start());
        // It may have come to run before the crash, or not: CRI starts once.
        match container.state() {
            ContainerState::ContainerRunning => {}
            ContainerState::ContainerCreated => {
                container
                    .start()
                    .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
            }
            state => panic!("crash at {point}: {state:?}"),
        }
        assert_eq!(
            container.exec(&["echo", "runs"]),
            "runs\n",
            "crash at {point}"
        );
        container.stop(1).unwrap();
        container.remove().unwrap();
        pod.remove();
    });
}

#[test]
fn stop_pod_sandbox_survives_a_crash_anywhere() {
    sweep(
        &["stop_pod.", "stop_container.", "network"],
        |node, point| {
            let pod = node.run_pod("web");
            let container = pod.start(&["sleep", "1000"]);
            crash(node, point, || _ = pod.try_stop());
            pod.try_stop()
                .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
            assert!(!pod.is_ready(), "crash at {point}");
            assert_eq!(
                container.state(),
                ContainerState::ContainerExited,
                "crash at {point}"
            );
            pod.remove();
        },
    );
}

#[test]
fn a_checkpoint_survives_a_crash_anywhere() {
    sweep(&["checkpoint."], |node, point| {
        let pod = node.try_run_by("", node.pod_config("web")).unwrap();
        let container = checkpoints::counter(&pod);
        let location = checkpoints::place(node);
        let mut answer = Ok(());
        crash(node, point, || {
            answer = checkpoints::checkpoint(&container, &location);
        });
        // Every point lies on the way, so no answer came; or CRIU does not work here.
        answer.unwrap_err();
        assert_eq!(checkpoints::beside(&location), [""; 0], "crash at {point}");
        checkpoints::goes_on(&container);
        if checkpoints::works(&container, &location) {
            checkpoints::checkpoint(&container, &location)
                .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
            assert!(location.exists(), "crash at {point}");
            checkpoints::goes_on(&container);
        }
        pod.remove();
    });
}

#[test]
fn removing_survives_a_crash_anywhere() {
    sweep(&["remove_pod.", "remove_container."], |node, point| {
        let pod = node.run_pod("web");
        pod.start(&["sleep", "1000"]);
        crash(node, point, || _ = pod.try_remove());
        pod.try_remove()
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert_eq!(node.pods(None), []);
        assert_eq!(node.containers(None), []);
    });
}

#[test]
fn pull_image_survives_a_crash_anywhere() {
    sweep(&["pull"], |node, point| {
        let layers = ["one", "two"].map(|name| Layer::new().file(name, 0o644, vec![b'x'; 300_000]));
        let image = layers
            .iter()
            .fold(Image::builder(Format::Oci), |b, layer| {
                b.layer(layer, Packing::Gzip)
            })
            .build();
        let reference = node.push("things/one", "1", &image);
        crash(node, point, || _ = node.pull(&reference));
        // Whole or not there.
        if let Some(found) = node.image(&reference) {
            assert_eq!(found.id, image.id(), "crash at {point}");
        }
        let id = node
            .pull(&reference)
            .unwrap_or_else(|err| panic!("crash at {point}: {err}"));
        assert_eq!(id, image.id());
        assert_eq!(node.list_images().len(), 1, "crash at {point}");
        node.remove_image(&reference).unwrap();
        berth_tests::eventually(&format!("crash at {point}: the space is free"), || {
            let images = node.image_fs();
            (images.used_bytes?.value < 200_000).then_some(())
        });
    });
}
