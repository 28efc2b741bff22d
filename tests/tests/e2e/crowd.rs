//! Many at once: started side by side, ended in no order.

use berth_proto::runtime_v1::{self as cri, ContainerState};
use berth_tests::Node;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;
use tonic::Code;

/// Containers in all; `BERTH_TEST_CROWD` asks for another number.
fn crowd() -> usize {
    std::env::var("BERTH_TEST_CROWD")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(200)
}

/// Calls at the same time.
const PARALLEL: usize = 20;

/// Containers in a pod.
const PER_POD: usize = 4;

/// Runs `work` for each item, [`PARALLEL`] at a time.
fn in_parallel<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let queue = Mutex::new(items.into_iter());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                loop {
                    let Some(item) = queue.lock().unwrap().next() else {
                        return;
                    };
                    let result = work(item);
                    results.lock().unwrap().push(result);
                }
            });
        }
    });
    results.into_inner().unwrap()
}

/// What the kubelet would call again for, and get right then.
fn retried<T>(mut call: impl FnMut() -> Result<T, tonic::Status>) -> T {
    for _ in 0..3 {
        match call() {
            Ok(answer) => return answer,
            Err(error) if matches!(error.code(), Code::Unavailable | Code::DeadlineExceeded) => {}
            Err(error) => panic!("{error}"),
        }
    }
    call().unwrap_or_else(|error| panic!("also at the fourth time: {error}"))
}

/// A shuffle without a crate: the same for the same length, and in no order.
fn shuffle<T>(items: &mut [T]) {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for at in (1..items.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = usize::try_from(state % (at as u64 + 1)).unwrap();
        items.swap(at, other);
    }
}

#[test]
fn hundreds_start_side_by_side_and_pods_that_end_in_no_order_leave_nothing() {
    let node = Node::start();
    node.base_image();
    let count = crowd();
    let pods = count.div_ceil(PER_POD);
    let begun = Instant::now();
    let pods = in_parallel((0..pods).collect(), |number| {
        let config = node.pod_config(&format!("crowd{number}"));
        let pod = retried(|| node.try_run(config.clone()));
        (pod.id.clone(), pod)
    });
    let pods: HashMap<_, _> = pods.into_iter().collect();
    let ran = begun.elapsed();
    let owners: Vec<&str> = pods
        .keys()
        .flat_map(|id| std::iter::repeat_n(id.as_str(), PER_POD))
        .take(count)
        .collect();
    let started = Instant::now();
    let containers = in_parallel(owners, |owner| {
        let pod = &pods[owner];
        let config = pod.container(&["sh", "-c", "echo up; exec sleep 1000"]);
        let container = retried(|| pod.try_create(config.clone()));
        retried(|| container.start());
        (container.id.clone(), container.log_path.clone())
    });
    eprintln!(
        "crowd: {} pods in {ran:?}, {count} containers in {:?}",
        pods.len(),
        started.elapsed()
    );
    assert_eq!(containers.len(), count);
    let running = node.containers(None);
    assert_eq!(running.len(), count);
    assert!(
        running
            .iter()
            .all(|c| c.state() == ContainerState::ContainerRunning)
    );
    // Each has run what it was to run, and can be reached.
    for (id, _) in containers.iter().step_by(7) {
        assert_eq!(node.container(id).exec(&["echo", "on"]), "on\n");
    }
    for (_, log) in &containers {
        berth_tests::eventually("every one has logged", || {
            std::fs::read_to_string(log)
                .is_ok_and(|text| text.contains("stdout F up"))
                .then_some(())
        });
    }

    let asked = Instant::now();
    let stats = node
        .wait(
            node.runtime()
                .list_container_stats(cri::ListContainerStatsRequest::default()),
        )
        .unwrap();
    let listed = asked.elapsed();
    let metrics = node
        .wait(
            node.runtime()
                .list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}),
        )
        .unwrap();
    eprintln!(
        "crowd: statistics in {listed:?}, metrics in {:?}",
        asked.elapsed() - listed
    );
    assert_eq!(stats.stats.len(), count);
    assert_eq!(metrics.pod_metrics.len(), pods.len());

    let mut ids: Vec<String> = pods.keys().cloned().collect();
    shuffle(&mut ids);
    let ended = Instant::now();
    in_parallel(ids, |id| {
        retried(|| {
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: id.clone(),
            };
            node.wait(node.runtime().stop_pod_sandbox(request))
        });
        for container in node.containers(Some(cri::ContainerFilter {
            pod_sandbox_id: id.clone(),
            ..Default::default()
        })) {
            assert_eq!(container.state(), ContainerState::ContainerExited);
            assert_eq!(node.container(&container.id).status().exit_code, 137);
        }
        retried(|| {
            let request = cri::RemovePodSandboxRequest {
                pod_sandbox_id: id.clone(),
            };
            node.wait(node.runtime().remove_pod_sandbox(request))
        });
    });
    eprintln!("crowd: all removed in {:?}", ended.elapsed());
    assert!(node.pods(None).is_empty() && node.containers(None).is_empty());
    // The node's end looks at the whole machine.
}
