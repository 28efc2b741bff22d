//! Retries join what is running; the first config wins; nothing is "reserved".

use berth_proto::runtime_v1 as cri;
use berth_tests::{LinuxConfig, Node};

fn run(
    node: &Node,
    config: &cri::PodSandboxConfig,
) -> impl Future<Output = Result<tonic::Response<cri::RunPodSandboxResponse>, tonic::Status>>
+ Send
+ 'static {
    let (mut runtime, config) = (node.runtime(), Some(config.clone()));
    async move {
        let request = cri::RunPodSandboxRequest {
            config,
            runtime_handler: String::new(),
        };
        runtime.run_pod_sandbox(request).await
    }
}

#[test]
fn the_same_pod_asked_for_many_times_at_once_is_one_pod() {
    let node = Node::start();
    let config = node.pod_config("web");
    let answers = node.wait_all((0..8).map(|_| run(&node, &config)).collect());
    let mut ids: Vec<_> = answers
        .into_iter()
        .map(|a| a.unwrap().pod_sandbox_id)
        .collect();
    ids.dedup();
    assert_eq!(ids.len(), 1);
    assert_eq!(node.pods(None).len(), 1);
}

#[test]
fn a_pod_asked_for_again_is_the_one_that_runs() {
    let node = Node::start();
    let config = node.pod_config("web");
    let first = node.run(config.clone());
    let second = node.run(config);
    assert_eq!(first.id, second.id);
}

#[test]
fn a_caller_that_hung_up_finds_its_pod_when_it_asks_again() {
    let node = Node::start();
    let config = node.pod_config("web");
    let call = node.spawn(run(&node, &config));
    berth_tests::eventually("the call is on its way", || {
        let running = node
            .operations()
            .operations
            .iter()
            .any(|o| o.kind == "RunPodSandbox");
        (running || !node.pods(None).is_empty()).then_some(())
    });
    call.abort();
    let pod = node.run(config);
    assert!(pod.is_ready());
    assert_eq!(node.pods(None).len(), 1);
}

#[test]
fn a_retry_with_another_random_path_joins_and_the_first_config_wins() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let source = |name: &str| {
        let path = node.root().join(name);
        std::fs::write(&path, name).unwrap();
        path
    };
    let (first, second) = (source("termination-1"), source("termination-2"));
    let base = pod.container(&["sleep", "1000"]);
    let with = |path: &std::path::Path| {
        let mut config = base.clone();
        config.mount(path, "/dev/termination-log");
        config.log_path = format!("{}.log", path.file_name().unwrap().display());
        config
    };
    let one = pod.create(with(&first));
    let two = pod.create(with(&second));
    assert_eq!(one.id, two.id);
    assert_eq!(node.containers(None).len(), 1);
    one.start().unwrap();
    let status = one.status();
    let mount = status
        .mounts
        .iter()
        .find(|m| m.container_path == "/dev/termination-log")
        .unwrap();
    assert_eq!(mount.host_path, first.display().to_string());
    assert!(
        status.log_path.ends_with("termination-1.log"),
        "{}",
        status.log_path
    );
    assert_eq!(one.exec(&["cat", "/dev/termination-log"]), "termination-1");
}

#[test]
fn the_same_container_asked_for_many_times_at_once_is_one_container() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let config = pod.container(&["sleep", "1000"]);
    let calls = (0..8)
        .map(|_| {
            let mut runtime = node.runtime();
            let request = cri::CreateContainerRequest {
                pod_sandbox_id: pod.id.clone(),
                config: Some(config.clone()),
                sandbox_config: Some(pod.config.clone()),
            };
            async move { runtime.create_container(request).await }
        })
        .collect();
    let mut ids: Vec<_> = node
        .wait_all(calls)
        .into_iter()
        .map(|a| a.unwrap().container_id)
        .collect();
    ids.dedup();
    assert_eq!(ids.len(), 1);
    assert_eq!(node.containers(None).len(), 1);
}

#[test]
fn stops_and_removes_of_one_pod_at_once_all_succeed() {
    let node = Node::start();
    let pod = node.run_pod("web");
    pod.start(&["sleep", "1000"]);
    let stops = (0..4)
        .map(|_| {
            let mut runtime = node.runtime();
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            async move { runtime.stop_pod_sandbox(request).await }
        })
        .collect();
    for answer in node.wait_all(stops) {
        answer.unwrap();
    }
    let removes = (0..4)
        .map(|_| {
            let mut runtime = node.runtime();
            let request = cri::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            async move { runtime.remove_pod_sandbox(request).await }
        })
        .collect();
    for answer in node.wait_all(removes) {
        answer.unwrap();
    }
    assert_eq!(node.pods(None), []);
}

#[test]
fn a_failed_pod_can_be_asked_for_again_at_once() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    let linux = config.linux.get_or_insert_default();
    linux
        .sysctls
        .insert("net.ipv4.no_such_thing".to_owned(), "1".to_owned());
    assert!(node.try_run(config).is_err());
    assert_eq!(node.pods(None), [], "half-made objects are not listed");
    let pod = node.run_pod("web");
    assert!(pod.is_ready());
}

#[test]
fn what_an_answer_tells_is_in_the_next_list() {
    let node = Node::start();
    for _ in 0..5 {
        let pod = node.run_pod(&node.fresh("pod"));
        assert!(node.pods(None).iter().any(|p| p.id == pod.id));
        let container = pod.create(pod.container(&["sleep", "1000"]));
        assert!(node.containers(None).iter().any(|c| c.id == container.id));
        container.start().unwrap();
        assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
        container.stop(0).unwrap();
        assert_eq!(container.state(), cri::ContainerState::ContainerExited);
        container.remove().unwrap();
        assert!(!node.containers(None).iter().any(|c| c.id == container.id));
        pod.remove();
        assert!(!node.pods(None).iter().any(|p| p.id == pod.id));
    }
}

#[test]
fn status_shows_what_is_running_in_which_stage() {
    let node = Node::start();
    let container = node.run_pod("web").start(&[
        "sh",
        "-c",
        "trap '' TERM; echo up; while :; do sleep 1; done",
    ]);
    container.wait_for_log("up");
    let mut runtime = node.runtime();
    let request = cri::StopContainerRequest {
        container_id: container.id.clone(),
        timeout: 3,
    };
    let call = node.spawn(async move { runtime.stop_container(request).await });
    let seen = berth_tests::eventually("the stop is shown", || {
        node.operations()
            .operations
            .into_iter()
            .find(|o| o.kind == "StopContainer")
    });
    assert!(!seen.stage.is_empty() && seen.started_at > 0, "{seen:?}");
    let printed = node.berth(&["status"]);
    let text = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(
        printed.status.success() && text.contains("StopContainer"),
        "{text}"
    );
    berth_tests::eventually("the stop is done", || call.is_finished().then_some(()));
}
