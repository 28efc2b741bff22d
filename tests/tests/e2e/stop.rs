//! Ends of containers: signals, grace, what does not want to end, and races.

use crate::cgroups::path;
use berth_proto::runtime_v1::{self as cri, ContainerState, Signal};
use berth_tests::node::is_cgroup_v2;
use berth_tests::{Container, Node, Pod, eventually};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::Code;

/// Runs a pod whose containers have this PID mode.
fn pod_with_pid(node: &Node, mode: cri::NamespaceMode) -> Pod<'_> {
    let mut config = node.pod_config("web");
    let linux = config.linux.as_mut().unwrap();
    let security = linux.security_context.as_mut().unwrap();
    security.namespace_options.as_mut().unwrap().pid = mode.into();
    node.run(config)
}

#[test]
fn each_of_the_66_stop_signals_is_sent_and_told() {
    /// What the kernel lets nobody catch.
    const UNCATCHABLE: [Signal; 2] = [Signal::Sigkill, Signal::Sigstop];
    let node = Node::start();
    let pod = node.run_pod("web");
    for number in 0..=65 {
        let signal = Signal::try_from(number).expect("66 signals");
        // As the kernel numbers it, which the shell's trap takes too; 0 stands for the default.
        let linux = linux_number(signal);
        // A read from a pipe that nobody writes to: a signal ends it at once.
        let script = format!(
            "mkfifo /wait; trap 'exit 7' {linux}; echo up; while :; do read x <> /wait; done"
        );
        let uncatchable = UNCATCHABLE.contains(&signal);
        let script = match uncatchable {
            true => "echo up; sleep 1000",
            false => &script,
        };
        let mut config = pod.container(&["sh", "-c", script]);
        config.stop_signal = number;
        let container = pod.start_as(config);
        container.wait_for_log("up");
        let told = container.status().stop_signal();
        assert_eq!(linux_number(told), linux, "{signal:?} is told as {told:?}");
        container.stop(if uncatchable { 1 } else { 20 }).unwrap();
        let code = container.status().exit_code;
        assert_eq!(code, if uncatchable { 137 } else { 7 }, "{signal:?}");
        container.remove().unwrap();
    }
    assert!(Signal::try_from(66).is_err());
}

/// Source: signal(7), x86 and ARM; SIGRTMIN as the C libraries have it.
fn linux_number(signal: Signal) -> i32 {
    let name = signal.as_str_name().trim_start_matches("SIGNAL_");
    if let Some(above) = name.strip_prefix("SIGRTMINPLUS") {
        return 34 + above.parse::<i32>().unwrap();
    }
    if let Some(below) = name.strip_prefix("SIGRTMAXMINUS") {
        return 64 - below.parse::<i32>().unwrap();
    }
    match name {
        "RUNTIME_DEFAULT" => 15,
        "SIGRTMIN" => 34,
        "SIGRTMAX" => 64,
        "SIGCLD" => 17,
        "SIGPOLL" => 29,
        "SIGIOT" => 6,
        name => name
            .parse::<nix::sys::signal::Signal>()
            .unwrap_or_else(|_| panic!("{name}")) as i32,
    }
}

#[test]
fn exec_works_during_the_grace_period() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "trap 'echo asked' TERM; echo up; while [ ! -e /done ]; do sleep 0.05; done; exit 5",
    ]);
    container.wait_for_log("up");
    let mut runtime = node.runtime();
    let request = cri::StopContainerRequest {
        container_id: container.id.clone(),
        timeout: 60,
    };
    let stop = node.spawn(async move { runtime.stop_container(request).await });
    container.wait_for_log("asked");
    // What a preStop hook that is late, or a probe, would do.
    assert_eq!(container.exec(&["echo", "still here"]), "still here\n");
    container.exec(&["touch", "/done"]);
    node.wait(async { stop.await.unwrap() }).unwrap();
    assert_eq!(container.status().exit_code, 5);
}

#[test]
fn a_shorter_grace_overtakes_a_longer_one() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "trap '' TERM; echo up; while :; do sleep 1; done",
    ]);
    container.wait_for_log("up");
    let mut runtime = node.runtime();
    let request = cri::StopContainerRequest {
        container_id: container.id.clone(),
        timeout: 3600,
    };
    let long = node.spawn(async move { runtime.stop_container(request).await });
    container.stop(0).unwrap();
    node.wait(async { long.await.unwrap() }).unwrap();
    assert_eq!(container.status().exit_code, 137);
}

#[test]
fn everything_ends_with_the_container_whoever_shares_its_pid_namespace() {
    let node = Node::start();
    for mode in [cri::NamespaceMode::Pod, cri::NamespaceMode::Node] {
        let pod = pod_with_pid(&node, mode);
        let container = pod.start(&[
            "sh",
            "-c",
            "trap '' TERM; setsid sh -c 'trap \"\" TERM; sleep 1000' & (sleep 1000 & sleep 1000) & \
             echo up; while :; do sleep 1; done",
        ]);
        let sibling = pod.start(&["sleep", "1000"]);
        container.wait_for_log("up");
        eventually("its children run", || {
            (container.pids().len() >= 5).then_some(())
        });
        container.stop(0).unwrap();
        assert_eq!(container.pids(), [0; 0], "{mode:?}");
        assert_eq!(sibling.state(), ContainerState::ContainerRunning);
        pod.remove();
    }
}

#[test]
fn an_end_by_a_signal_is_told_with_its_name() {
    let node = Node::start();
    // With the host's PID namespace signals do what they do by default.
    let pod = pod_with_pid(&node, cri::NamespaceMode::Node);
    for (signal, code, name) in [
        ("TERM", 143, "SIGTERM"),
        ("SEGV", 139, "SIGSEGV"),
        ("KILL", 137, "SIGKILL"),
    ] {
        let container = pod.start(&["sh", "-c", &format!("kill -{signal} $$; sleep 1000")]);
        let status = container.wait_for_exit();
        assert_eq!((status.exit_code, status.reason.as_str()), (code, "Error"));
        assert_eq!(status.message, format!("ended by {name}"));
    }
}

/// Freezes a container's cgroup, as `crictl pause` of other runtimes and operators do.
fn freeze(file: PathBuf, frozen: bool) {
    let text = match (is_cgroup_v2(), frozen) {
        (true, true) => "1",
        (true, false) => "0",
        (false, true) => "FROZEN",
        (false, false) => "THAWED",
    };
    fs::write(&file, text).unwrap_or_else(|err| panic!("{}: {err}", file.display()));
}

fn freezer(container: &Container<'_>) -> PathBuf {
    match is_cgroup_v2() {
        true => path(container, "", "cgroup.freeze"),
        false => path(container, "freezer", "freezer.state"),
    }
}

#[test]
fn a_frozen_container_is_stopped() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    eventually("both run", || (container.pids().len() >= 2).then_some(()));
    freeze(freezer(&container), true);
    container.stop(1).unwrap();
    assert_eq!(container.status().exit_code, 137);
    assert_eq!(container.pids(), [0; 0]);
}

#[test]
fn a_container_that_cannot_end_keeps_nobody_else_waiting_and_ends_when_it_can() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    // Frozen above its own cgroup: on v1 not even SIGKILL gets through, as to a process in
    // uninterruptible sleep.
    let own = freezer(&container);
    let above = own.parent().unwrap().parent().unwrap();
    let above = above.join(own.file_name().unwrap());
    freeze(above.clone(), true);
    let mut runtime = node.runtime();
    let request = cri::StopContainerRequest {
        container_id: container.id.clone(),
        timeout: 0,
    };
    let stop = node.spawn(async move { runtime.stop_container(request).await });
    if !is_cgroup_v2() {
        eventually("the stop tries to kill", || {
            let operations = node.operations().operations;
            operations
                .iter()
                .any(|o| o.kind == "StopContainer" && o.stage == "kill")
                .then_some(())
        });
        assert_eq!(container.state(), ContainerState::ContainerRunning);
        let other = node.run_pod("other");
        assert_eq!(other.output(&["echo", "on"]), "on\n");
        other.remove();
    }
    freeze(above, false);
    node.wait(async { stop.await.unwrap() }).unwrap();
    assert_eq!(container.status().exit_code, 137);
}

#[test]
fn a_fork_bomb_is_stopped_with_all_it_has_made() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sleeper = pod.start(&["sleep", "1000"]);
    // The kubelet limits the pod; the bomb goes off within that.
    let own = path(&sleeper, "pids", "pids.max");
    let of_pod = own.parent().unwrap().parent().unwrap().join("pids.max");
    fs::write(&of_pod, "400").unwrap();
    let bomb = pod.start(&["sh", "-c", "f() { f & f & sleep 1; }; while :; do f; done"]);
    eventually("it has grown", || (bomb.pids().len() > 150).then_some(()));
    let begun = Instant::now();
    bomb.stop(0).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(15) * berth_tests::deadline::slowness());
    assert_eq!(bomb.pids(), [0; 0]);
    assert_eq!(sleeper.state(), ContainerState::ContainerRunning);
}

#[test]
fn starting_again_is_no_second_start_and_starting_what_ended_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.create(pod.container(&["sh", "-c", "echo one; sleep 1000"]));
    let calls = (0..8)
        .map(|_| {
            let mut runtime = node.runtime();
            let container_id = container.id.clone();
            async move {
                runtime
                    .start_container(cri::StartContainerRequest { container_id })
                    .await
            }
        })
        .collect();
    for answer in node.wait_all(calls) {
        answer.unwrap();
    }
    container.wait_for_log("one");
    assert_eq!(container.stdout(), "one\n");
    container.stop(0).unwrap();
    assert_eq!(
        container.start().unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[test]
fn starts_stops_and_removals_at_once_always_end_with_nothing_left() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for round in 0..24 {
        let container = pod.create(pod.container(&["sleep", "1000"]));
        let id = || container.id.clone();
        let (mut first, mut second, mut third) = (node.runtime(), node.runtime(), node.runtime());
        let (start, stop, remove) = (
            cri::StartContainerRequest { container_id: id() },
            cri::StopContainerRequest {
                container_id: id(),
                timeout: 0,
            },
            cri::RemoveContainerRequest { container_id: id() },
        );
        let start = node.spawn(async move { first.start_container(start).await.map(drop) });
        // A little later each round, so that each stage of the start is met once.
        let pause = Duration::from_micros(250 * round);
        let stop = node.spawn(async move {
            tokio::time::sleep(pause).await;
            second.stop_container(stop).await.map(drop)
        });
        let remove = node.spawn(async move {
            tokio::time::sleep(pause).await;
            third.remove_container(remove).await.map(drop)
        });
        // A start may have come too late; a stop and a removal never fail.
        let started = node.wait(async { start.await.unwrap().map(tonic::Response::new) });
        if let Err(error) = started {
            assert!(
                matches!(error.code(), Code::FailedPrecondition | Code::NotFound),
                "{error}"
            );
        }
        node.wait(async { stop.await.unwrap().map(tonic::Response::new) })
            .unwrap();
        node.wait(async { remove.await.unwrap().map(tonic::Response::new) })
            .unwrap();
        assert!(node.containers(None).is_empty());
        assert_eq!(container.pids(), [0; 0]);
    }
}

#[test]
fn a_program_that_is_not_there_is_said_in_plain_words() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for (command, words) in [
        (&["/foo"][..], "exec: /foo: no such file in the image"),
        (&["foo"], "exec: foo: not found in $PATH"),
        (&["/etc/passwd"], "exec: /etc/passwd: permission denied"),
    ] {
        let container = pod.create(pod.container(command));
        let error = container.start().unwrap_err();
        assert!(error.message().contains(words), "{error}");
        let status = container.status();
        assert_eq!(
            (status.reason.as_str(), status.exit_code),
            ("StartError", 128)
        );
        assert!(status.message.contains(words), "{}", status.message);
    }
}
