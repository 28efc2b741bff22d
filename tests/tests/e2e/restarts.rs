//! The daemon is killed and comes back; nothing that runs notices.

use berth_proto::runtime_v1::ContainerState;
use berth_tests::{LinuxConfig, Node, eventually};
use std::fs;

#[test]
fn a_running_container_outlives_a_killed_daemon() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sleeper = pod.start(&["sleep", "1000"]);
    let before = (sleeper.init_pid(), sleeper.status(), pod.status(), pod.ip());
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(
        (sleeper.init_pid(), sleeper.status(), pod.status(), pod.ip()),
        before
    );
    assert_eq!(sleeper.exec(&["echo", "still here"]), "still here\n");
    sleeper.stop(1).unwrap();
    pod.remove();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn logs_are_written_while_the_daemon_is_away() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let talker = pod.start(&[
        "sh",
        "-c",
        "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.02; done",
    ]);
    talker.wait_for_log("line 2");
    node.kill_daemon();
    let seen = talker.log().len();
    eventually("more is logged without a daemon", || {
        (talker.log().len() > seen + 10).then_some(())
    });
    node.start_daemon();
    let numbers: Vec<u32> = talker
        .log()
        .iter()
        .map(|l| l.text.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(
        numbers,
        (1..=numbers.len() as u32).collect::<Vec<_>>(),
        "not a line is lost"
    );
}

#[test]
fn what_ended_while_the_daemon_was_away_is_known_with_its_exit_code() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let gate = node.root().join("gate");
    fs::create_dir(&gate).unwrap();
    let script = "until test -e /gate/open; do sleep 0.02; done; exit 42";
    let mut config = pod.container(&["sh", "-c", script]);
    config.mount(&gate, "/gate");
    let container = pod.start_as(config);
    let mut config = pod.container(&[
        "sh",
        "-c",
        "until test -e /gate/open; do sleep 0.02; done; probe eat 200000000",
    ]);
    config.mount(&gate, "/gate");
    config.resources().memory_limit_in_bytes = 32 << 20;
    config.resources().memory_swap_limit_in_bytes = 32 << 20;
    let hungry = pod.start_as(config);
    let pids = [container.init_pid(), hungry.init_pid()];
    node.kill_daemon();
    fs::write(gate.join("open"), "").unwrap();
    eventually("both have ended", || {
        pids.iter()
            .all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
            .then_some(())
    });
    node.start_daemon();
    let status = container.wait_for_exit();
    assert_eq!((status.exit_code, status.reason.as_str()), (42, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at > 0);
    let status = hungry.wait_for_exit();
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
}

#[test]
fn every_state_is_known_again() {
    let node = Node::start();
    let (ready, stopped) = (node.run_pod("ready"), node.run_pod("stopped"));
    let created = ready.create(ready.container(&["sleep", "1000"]));
    let exited = ready.start(&["sh", "-c", "exit 3"]);
    exited.wait_for_exit();
    stopped.stop();
    let before = (node.pods(None), node.containers(None));
    node.kill_daemon();
    node.start_daemon();
    let sorted = |(mut pods, mut containers): (Vec<_>, Vec<_>)| {
        pods.sort_by(|a: &berth_proto::runtime_v1::PodSandbox, b| a.id.cmp(&b.id));
        containers.sort_by(|a: &berth_proto::runtime_v1::Container, b| a.id.cmp(&b.id));
        (pods, containers)
    };
    assert_eq!(
        sorted((node.pods(None), node.containers(None))),
        sorted(before)
    );
    assert!(ready.is_ready() && !stopped.is_ready());
    assert_eq!(exited.status().exit_code, 3);
    created.start().unwrap();
    assert_eq!(created.state(), ContainerState::ContainerRunning);
}

#[test]
fn a_host_port_works_on_while_the_daemon_is_away() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.port_mappings = vec![berth_proto::runtime_v1::PortMapping {
        host_port: 12010,
        container_port: 8080,
        ..Default::default()
    }];
    let pod = node.run(config);
    let server = pod.start(&["probe", "serve", "8080", "hello"]);
    server.wait_for_log("listening");
    node.kill_daemon();
    let connects = || {
        node.host
            .enter(|| std::net::TcpStream::connect(("127.0.0.1", 12010)).is_ok())
    };
    assert!(connects());
    node.start_daemon();
    assert!(connects());
    pod.remove();
    assert!(!connects());
}

#[test]
fn a_daemon_killed_many_times_loses_nothing() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sleeper = pod.start(&["sleep", "1000"]);
    let pid = sleeper.init_pid();
    for round in 0..5 {
        let code = pod.start(&["sh", "-c", &format!("exit {round}")]);
        node.kill_daemon();
        node.start_daemon();
        assert_eq!(code.wait_for_exit().exit_code, round);
        assert_eq!(sleeper.init_pid(), pid);
    }
    assert_eq!(node.containers(None).len(), 6);
}

#[test]
fn a_monitor_that_died_takes_its_containers_and_is_told() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let parent = fs::read_to_string(format!("/proc/{}/status", container.init_pid())).unwrap();
    let parent = parent
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .unwrap();
    let monitor = nix::unistd::Pid::from_raw(parent.trim().parse().unwrap());
    nix::sys::signal::kill(monitor, nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = container.wait_for_exit();
    assert!(
        status.reason == "MonitorLost" || status.exit_code == 137,
        "{status:?}"
    );
    assert_eq!(container.pids(), [0; 0]);
    pod.remove();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_damaged_record_costs_itself_alone() {
    let node = Node::start();
    let (hurt, well) = (node.run_pod("hurt"), node.run_pod("well"));
    let container = well.start(&["sleep", "1000"]);
    node.kill_daemon();
    let record = node.root().join("lib/pods").join(&hurt.id).join("pod.rec");
    let whole = fs::read(&record).unwrap();
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0xff;
    fs::write(&record, &damaged).unwrap();
    node.start_daemon();
    assert!(well.is_ready());
    assert_eq!(container.state(), ContainerState::ContainerRunning);
    assert!(
        node.log().contains(&hurt.id),
        "the damage is told:\n{}",
        node.log()
    );
    assert!(
        node.operations()
            .pending
            .iter()
            .any(|p| p.subject.contains(&hurt.id))
    );
    // What could not be read was kept as it is: mended, the pod is back.
    assert_eq!(fs::read(&record).unwrap(), damaged);
    node.kill_daemon();
    fs::write(&record, whole).unwrap();
    node.start_daemon();
    assert!(hurt.is_ready());
    hurt.remove();
}
