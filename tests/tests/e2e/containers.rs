//! The life of a container, and what its process is given.

use berth_proto::runtime_v1::{
    self as cri, ContainerFilter, ContainerState, ContainerStateValue, Signal,
};
use berth_tests::node::spec;
use berth_tests::{Format, Image, Layer, LinuxConfig, Node, Packing, eventually};
use serde_json::json;
use std::collections::HashMap;
use std::time::Instant;
use tonic::Code;

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

#[test]
fn created_started_exited_removed() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.create(pod.container(&["sleep", "1000"]));
    let status = container.status();
    assert_eq!(status.state(), ContainerState::ContainerCreated);
    assert!(status.created_at > 1_600_000_000_000_000_000);
    assert_eq!((status.started_at, status.finished_at), (0, 0));
    assert_eq!(container.pids(), [0; 0]);

    container.start().unwrap();
    let status = container.status();
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert!(status.started_at >= status.created_at);
    assert_eq!(status.finished_at, 0);

    container.stop(1).unwrap();
    let status = container.status();
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert!(status.finished_at >= status.started_at);

    container.remove().unwrap();
    assert_eq!(container.try_status().unwrap_err().code(), Code::NotFound);
    assert_eq!(node.containers(None), []);
}

#[test]
fn a_status_says_what_was_asked_for() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.labels = HashMap::from([("app".to_owned(), "web".to_owned())]);
    config.annotations = HashMap::from([("note".to_owned(), "kept".to_owned())]);
    config.resources().memory_limit_in_bytes = 64 << 20;
    config.resources().cpu_shares = 512;
    config.mount("/proc/version", "/mnt/version").readonly = true;
    let container = pod.start_as(config.clone());
    let status = container.status();
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert_eq!(status.log_path, container.log_path.display().to_string());
    assert_eq!(status.image.unwrap().image, node.base_image());
    let mount = status
        .mounts
        .iter()
        .find(|m| m.container_path == "/mnt/version")
        .unwrap();
    assert!(
        mount.readonly && mount.host_path == "/proc/version",
        "{mount:?}"
    );
    let resources = status.resources.unwrap().linux.unwrap();
    assert_eq!(
        (resources.memory_limit_in_bytes, resources.cpu_shares),
        (64 << 20, 512)
    );
    let user = status.user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.gid), (0, 0));
    assert_eq!(status.stop_signal, i32::from(Signal::Sigterm));
}

#[test]
fn exit_codes_and_reasons_are_told() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for (command, code, reason) in [
        (&["true"][..], 0, "Completed"),
        (&["sh", "-c", "exit 42"], 42, "Error"),
        (&["sh", "-c", "(exit 143); exit $?"], 143, "Error"),
        // The first process of a PID namespace gets no signal it does not handle.
        (&["sh", "-c", "kill -TERM $$; exit 3"], 3, "Error"),
    ] {
        let status = pod.start(command).wait_for_exit();
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (code, reason),
            "{command:?}"
        );
        assert!(status.finished_at >= status.started_at);
    }
}

#[test]
fn a_container_killed_from_outside_ends_with_its_signal() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let pid = nix::unistd::Pid::from_raw(container.init_pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = container.wait_for_exit();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
}

#[test]
fn a_container_that_needs_more_memory_than_it_may_have_is_oom_killed() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "eat", "200000000"]);
    config.resources().memory_limit_in_bytes = 32 << 20;
    config.resources().memory_swap_limit_in_bytes = 32 << 20;
    let status = pod.start_as(config).wait_for_exit();
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
}

#[test]
fn an_oom_kill_of_any_process_of_the_container_is_told() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sh", "-c", "probe eat 200000000; exit 7"]);
    config.resources().memory_limit_in_bytes = 32 << 20;
    config.resources().memory_swap_limit_in_bytes = 32 << 20;
    let status = pod.start_as(config).wait_for_exit();
    // With memory.oom.group the shell dies as well.
    assert!(matches!(status.exit_code, 7 | 137), "{status:?}");
    assert_eq!(status.reason, "OOMKilled");
}

#[test]
fn the_images_command_runs_unless_another_is_asked_for() {
    let node = Node::start();
    let image = Image::builder(Format::Oci)
        .base()
        .run("Entrypoint", json!(["probe", "args"]))
        .run("Cmd", json!(["from", "image"]))
        .run("WorkingDir", json!("/var"))
        .build();
    let reference = node.push("entry", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let run = |command: &[&str], args: &[&str]| {
        let mut config = pod.container(command);
        config.args = words(args);
        config.image = Some(spec(&reference));
        pod.output_as(config)
    };
    // Source: CRI ContainerConfig.command and args.
    assert_eq!(run(&[], &[]), "from\nimage\ncwd /var\n");
    assert_eq!(run(&[], &["mine"]), "mine\ncwd /var\n");
    assert_eq!(run(&["probe", "args", "x"], &[]), "x\ncwd /var\n");
    assert_eq!(run(&["probe", "args"], &["a b", ""]), "a b\n\ncwd /var\n");
}

#[test]
fn a_container_without_any_command_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let err = pod
        .try_create(pod.container(&[]))
        .err()
        .expect("there is nothing to run");
    assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");
    assert_eq!(node.containers(None), []);
}

#[test]
fn environment_is_the_images_then_the_containers_and_values_are_bytes() {
    let node = Node::start();
    let image = Image::builder(Format::Oci)
        .base()
        .run("Env", json!(["PATH=/bin", "FROM=image", "BOTH=image"]))
        .build();
    let reference = node.push("env", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "env"]);
    config.image = Some(spec(&reference));
    config.env("BOTH", b"mine");
    config.env("BYTES", b"\xff\xfe");
    config.env("with.dots and-dashes", b"a=b");
    config.env("EMPTY", b"");
    let text = pod.output_as(config);
    let hex = |value: &str| {
        value
            .bytes()
            .map(|b| format!("{b:02x}"))
            .collect::<String>()
    };
    for line in [
        format!("FROM={}", hex("image")),
        format!("BOTH={}", hex("mine")),
        "BYTES=fffe".to_owned(),
        "EMPTY=".to_owned(),
        format!("PATH={}", hex("/bin")),
        format!("HOSTNAME={}", hex("web")),
    ] {
        assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
    }
    assert_eq!(text.matches("BOTH=").count(), 1, "{text}");
    assert!(
        !text.contains("BERTH"),
        "nothing of the daemon's environment: {text}"
    );
}

#[test]
fn the_working_directory_is_made_where_it_is_missing() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "args"]);
    config.working_dir = "/srv/made/here".to_owned();
    assert_eq!(pod.output_as(config), "cwd /srv/made/here\n");
}

#[test]
fn a_program_that_is_not_there_fails_the_start_and_names_itself() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.create(pod.container(&["/no/such/program"]));
    let err = container.start().unwrap_err();
    assert!(err.message().contains("/no/such/program"), "{err}");
    let status = container.status();
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_ne!(status.exit_code, 0);
    assert!(status.reason.contains("Error"), "{status:?}");
    assert_eq!(container.pids(), [0; 0]);
    container.remove().unwrap();
}

#[test]
fn a_program_that_may_not_be_run_fails_the_start_and_names_itself() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.create(pod.container(&["/etc/passwd"]));
    let err = container.start().unwrap_err();
    assert!(err.message().contains("/etc/passwd"), "{err}");
}

#[test]
fn a_container_starts_once() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "echo up; exec sleep 1000"]);
    container.wait_for_log("up");
    let pid = container.init_pid();
    // A retry of a call that was answered too late joins what it started.
    container.start().unwrap();
    assert_eq!(container.init_pid(), pid);
    assert_eq!(container.stdout(), "up\n");
    container.stop(0).unwrap();
    assert_eq!(
        container.start().unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[test]
fn stop_sends_the_signal_then_kills_after_the_grace_period() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let polite = pod.start(&[
        "sh",
        "-c",
        "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done",
    ]);
    polite.wait_for_log("up");
    polite.stop(20).unwrap();
    let status = polite.status();
    assert_eq!(status.exit_code, 5);
    assert_eq!(polite.stdout(), "up\nbye\n");

    let stubborn = pod.start(&[
        "sh",
        "-c",
        "trap '' TERM; echo up; while :; do sleep 1; done",
    ]);
    stubborn.wait_for_log("up");
    let before = Instant::now();
    stubborn.stop(1).unwrap();
    assert!(
        before.elapsed().as_millis() >= 950,
        "{:?}",
        before.elapsed()
    );
    assert_eq!(stubborn.status().exit_code, 137);
}

#[test]
fn a_stop_right_after_the_start_is_heard_once_the_program_listens() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let late = pod.start(&[
        "sh",
        "-c",
        "sleep 0.3; trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done",
    ]);
    late.stop(60).unwrap();
    assert_eq!(late.status().exit_code, 7);
}

#[test]
fn a_stop_without_grace_kills_at_once() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "trap '' TERM; echo up; while :; do sleep 1; done",
    ]);
    container.wait_for_log("up");
    container.stop(0).unwrap();
    assert_eq!(container.status().exit_code, 137);
}

#[test]
fn stopping_again_and_stopping_what_never_ran_succeeds() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    container.stop(1).unwrap();
    let code = container.status().exit_code;
    container.stop(1).unwrap();
    assert_eq!(container.status().exit_code, code);
    let created = pod.create(pod.container(&["true"]));
    created.stop(1).unwrap();
    node.container(&"0".repeat(64)).stop(1).unwrap();
}

#[test]
fn the_stop_signal_is_the_containers_then_the_images() {
    let node = Node::start();
    let image = Image::builder(Format::Oci)
        .base()
        .run("StopSignal", json!("SIGUSR1"))
        .build();
    let reference = node.push("signal", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let script = "trap 'exit 11' USR1; trap 'exit 12' USR2; trap 'exit 13' TERM; \
                  echo up; while :; do sleep 0.05; done";
    let run = |signal: Option<Signal>| {
        let mut config = pod.container(&["sh", "-c", script]);
        config.image = Some(spec(&reference));
        if let Some(signal) = signal {
            config.stop_signal = signal.into();
        }
        let container = pod.start_as(config);
        container.wait_for_log("up");
        let effective = container.status().stop_signal();
        container.stop(20).unwrap();
        (effective, container.status().exit_code)
    };
    assert_eq!(run(None), (Signal::Sigusr1, 11));
    assert_eq!(run(Some(Signal::Sigusr2)), (Signal::Sigusr2, 12));
}

#[test]
fn everything_a_container_started_ends_with_it() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "setsid sleep 1000 & setsid sleep 1000 & echo up; sleep 1000",
    ]);
    container.wait_for_log("up");
    eventually("the children run", || {
        (container.pids().len() >= 3).then_some(())
    });
    container.stop(0).unwrap();
    assert_eq!(container.pids(), [0; 0]);
}

#[test]
fn a_container_whose_first_process_ended_is_exited_whatever_is_left() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    // Without a PID namespace of its own nothing else ends the child.
    let security = config
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap();
    security.namespace_options.as_mut().unwrap().pid = cri::NamespaceMode::Node.into();
    let pod = node.run(config);
    let container = pod.start(&["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & exit 4"]);
    assert_eq!(container.wait_for_exit().exit_code, 4);
    container.remove().unwrap();
    assert_eq!(container.pids(), [0; 0]);
}

#[test]
fn removing_a_running_container_kills_it() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let pid = container.init_pid();
    container.remove().unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(node.containers(None), []);
    container.remove().unwrap();
    node.container(&"0".repeat(64)).remove().unwrap();
}

#[test]
fn a_container_of_a_removed_ones_name_is_a_new_container() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let config = pod.container(&["true"]);
    let first = pod.create(config.clone());
    let id = first.id.clone();
    first.remove().unwrap();
    assert_ne!(pod.create(config).id, id);
}

#[test]
fn containers_are_listed_by_id_pod_state_and_labels() {
    let node = Node::start();
    let (one, two) = (node.run_pod("one"), node.run_pod("two"));
    let mut config = one.container(&["sleep", "1000"]);
    config.labels = HashMap::from([("app".to_owned(), "a".to_owned())]);
    let running = one.start_as(config);
    let created = one.create(one.container(&["true"]));
    let exited = two.start(&["true"]);
    exited.wait_for_exit();
    let list = |filter: ContainerFilter| {
        let mut ids: Vec<_> = node
            .containers(Some(filter))
            .into_iter()
            .map(|container| container.id)
            .collect();
        ids.sort();
        ids
    };
    let sorted = |ids: &[&str]| {
        let mut ids = words(ids);
        ids.sort();
        ids
    };
    let state = |state: ContainerState| {
        Some(ContainerStateValue {
            state: state.into(),
        })
    };
    let all = ContainerFilter::default();
    assert_eq!(
        list(all.clone()),
        sorted(&[&running.id, &created.id, &exited.id])
    );
    assert_eq!(
        list(ContainerFilter {
            id: running.id[..12].to_owned(),
            ..all.clone()
        }),
        sorted(&[&running.id])
    );
    assert_eq!(
        list(ContainerFilter {
            pod_sandbox_id: one.id.clone(),
            ..all.clone()
        }),
        sorted(&[&running.id, &created.id])
    );
    assert_eq!(
        list(ContainerFilter {
            state: state(ContainerState::ContainerExited),
            ..all.clone()
        }),
        sorted(&[&exited.id])
    );
    assert_eq!(
        list(ContainerFilter {
            label_selector: HashMap::from([("app".to_owned(), "a".to_owned())]),
            state: state(ContainerState::ContainerRunning),
            pod_sandbox_id: one.id.clone(),
            ..all
        }),
        sorted(&[&running.id])
    );
}

#[test]
fn a_container_writes_to_a_layer_of_its_own() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let writer = pod.start(&[
        "sh",
        "-c",
        "echo mine > /etc/passwd; rm /bin/wget; sleep 1000",
    ]);
    eventually("it has written", || {
        (writer.exec(&["cat", "/etc/passwd"]) == "mine\n").then_some(())
    });
    let other = pod.output(&["sh", "-c", "cat /etc/passwd; ls /bin/wget"]);
    assert!(
        other.starts_with("root:") && other.ends_with("/bin/wget\n"),
        "{other}"
    );
}

#[test]
fn an_image_with_nothing_but_a_program_runs() {
    let node = Node::start();
    let layer = Layer::new().file("probe", 0o755, berth_tests::image::PROBE);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Zstd)
        .run("Entrypoint", json!(["/probe"]))
        .run("Cmd", json!(["args", "alone"]))
        .build();
    let reference = node.push("scratch", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&[]);
    config.image = Some(spec(&reference));
    assert_eq!(pod.output_as(config), "alone\ncwd /\n");
}

#[test]
fn a_short_lived_container_is_never_lost() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for n in 0..20 {
        let code = n.to_string();
        let status = pod
            .start(&["sh", "-c", &format!("echo {n}; exit {code}")])
            .wait_for_exit();
        assert_eq!(status.exit_code, n);
    }
}

#[test]
fn dozens_of_containers_start_at_once() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let containers: Vec<_> = (0..24)
        .map(|_| pod.create(pod.container(&["sleep", "1000"])))
        .collect();
    let calls = containers
        .iter()
        .map(|container| {
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
    assert!(
        containers
            .iter()
            .all(|c| c.state() == ContainerState::ContainerRunning)
    );
}
