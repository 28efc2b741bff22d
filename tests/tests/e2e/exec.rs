//! ExecSync: output, exit codes, deadlines, and what it leaves behind.

use berth_proto::runtime_v1 as cri;
use berth_tests::{LinuxConfig, Node, eventually};
use std::time::{Duration, Instant};
use tonic::Code;

#[test]
fn both_outputs_and_the_exit_code_come_back() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let answer = container
        .try_exec(&["sh", "-c", "echo out; echo err >&2; exit 7"], 10)
        .unwrap();
    assert_eq!(answer.stdout, b"out\n");
    assert_eq!(answer.stderr, b"err\n");
    assert_eq!(answer.exit_code, 7);
    let killed = container.try_exec(&["sh", "-c", "kill -9 $$"], 10).unwrap();
    assert_eq!(killed.exit_code, 137);
}

#[test]
fn an_exec_runs_where_the_container_does() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.working_dir = "/www".to_owned();
    config.env("NAME", b"value");
    let container = pod.start_as(config);
    assert_eq!(
        container.exec(&["sh", "-c", "pwd; echo $NAME; hostname"]),
        "/www\nvalue\nweb\n"
    );
    let init = container.init_pid();
    let cgroup = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok();
    container.exec(&["busybox", "mkfifo", "/go"]);
    std::thread::scope(|scope| {
        // Runs until it is told something.
        let running = scope.spawn(|| container.try_exec(&["busybox", "cat", "/go"], 60));
        // It joins one hierarchy after the other.
        eventually(
            "the exec's process is in all of the container's cgroups",
            || {
                let pid = container.pids().into_iter().find(|pid| *pid != init)?;
                (cgroup(pid)? == cgroup(init)?).then_some(())
            },
        );
        container.exec(&["sh", "-c", "echo > /go"]);
        running.join().unwrap().unwrap();
    });
}

/// As systemd, or Docker, in a container does: its processes in a cgroup of their own, and the
/// controllers handed on. The kernel then takes no process beside that one.
#[test]
fn an_exec_works_where_the_container_has_cgroups_inside_its_own() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    // On a hybrid host this is what brings a controller there.
    config.resources().hugepage_limits = vec![cri::HugepageLimit {
        page_size: "2MB".into(),
        limit: 4 << 20,
    }];
    let container = pod.start_as(config);
    let init = container.init_pid();
    let cgroups = node.footprint().cgroups();
    let own = cgroups.into_iter().find(|dir| {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        name.contains(&container.id) && dir.join("cgroup.controllers").exists()
    });
    let own = own.expect("a cgroup in the unified hierarchy");
    let controllers = std::fs::read_to_string(own.join("cgroup.controllers")).unwrap();
    let Some(controller) = controllers.split_whitespace().next() else {
        // This kernel has none for that hierarchy: nothing can be handed on.
        return assert_eq!(container.exec(&["echo", "fine"]), "fine\n");
    };
    let inside = own.join("init");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("cgroup.procs"), init.to_string()).unwrap();
    let handed_on = std::fs::write(own.join("cgroup.subtree_control"), format!("+{controller}"));
    handed_on.expect("nothing else is in it");
    let seen = container.exec(&["cat", "/proc/self/cgroup"]);
    assert!(seen.lines().any(|line| line == "0::/init"), "{seen}");
    container.stop(0).unwrap();
    container.remove().unwrap();
    assert!(!own.exists());
}

#[test]
fn a_deadline_that_passes_ends_the_exec_and_says_so() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let before = Instant::now();
    let err = container.try_exec(&["sleep", "4321"], 1).unwrap_err();
    assert_eq!(err.code(), Code::DeadlineExceeded, "{err:?}");
    assert!(before.elapsed() >= Duration::from_millis(950));
    eventually("the process is gone", || {
        (!container.exec(&["ps"]).contains("4321")).then_some(())
    });
    assert_eq!(container.exec(&["echo", "fine"]), "fine\n");
}

#[test]
fn a_deadline_ends_what_the_exec_started_too() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let err = container
        .try_exec(&["sh", "-c", "sleep 4321 & sleep 4321"], 1)
        .unwrap_err();
    assert_eq!(err.code(), Code::DeadlineExceeded, "{err:?}");
    eventually("its children are gone", || {
        (!container.exec(&["ps"]).contains("4321")).then_some(())
    });
}

#[test]
fn an_exec_whose_child_keeps_the_pipe_is_answered() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let before = Instant::now();
    let answer = container
        .try_exec(&["sh", "-c", "sleep 40 & echo done"], 30)
        .unwrap();
    assert_eq!(answer.stdout, b"done\n");
    assert!(
        before.elapsed() < Duration::from_secs(5),
        "{:?}",
        before.elapsed()
    );
}

#[test]
fn output_beyond_the_limit_is_dropped_and_the_command_is_not_held_up() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let script = "probe spew 20000000; probe spew 20000000 stderr; exit 3";
    let answer = container.try_exec(&["sh", "-c", script], 60).unwrap();
    assert_eq!(answer.exit_code, 3);
    let total = answer.stdout.len() + answer.stderr.len();
    assert!(total < 16 << 20, "{total}");
    assert!(answer.stdout.len() > 1 << 20, "{}", answer.stdout.len());
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let err = container.try_exec(&["/no/such/program"], 10).unwrap_err();
    assert!(err.message().contains("/no/such/program"), "{err}");
}

#[test]
fn an_empty_command_is_refused() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    assert_eq!(
        container.try_exec(&[], 10).unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[test]
fn an_exec_in_what_does_not_run_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let created = pod.create(pod.container(&["true"]));
    let err = created.try_exec(&["true"], 10).unwrap_err();
    assert_eq!(err.code(), Code::FailedPrecondition, "{err:?}");
    let exited = pod.start(&["true"]);
    exited.wait_for_exit();
    let err = exited.try_exec(&["true"], 10).unwrap_err();
    assert_eq!(err.code(), Code::FailedPrecondition, "{err:?}");
    let err = node
        .container(&"0".repeat(64))
        .try_exec(&["true"], 10)
        .unwrap_err();
    assert_eq!(err.code(), Code::NotFound, "{err:?}");
}

#[test]
fn an_exec_without_a_deadline_may_take_its_time() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let answer = container
        .try_exec(&["sh", "-c", "sleep 1; echo done"], 0)
        .unwrap();
    assert_eq!(answer.stdout, b"done\n");
}

#[test]
fn an_exec_ends_when_its_container_does() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| container.try_exec(&["sleep", "1000"], 0));
        eventually("the exec runs", || {
            (container.pids().len() >= 2).then_some(())
        });
        container.stop(0).unwrap();
        let answer = running.join().unwrap();
        assert!(answer.map_or(true, |answer| answer.exit_code == 137));
    });
}

#[test]
fn many_execs_at_once_do_not_mix() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    std::thread::scope(|scope| {
        for n in 0..16 {
            let container = &container;
            scope.spawn(move || {
                let text = format!("exec {n}");
                assert_eq!(container.exec(&["echo", &text]), text + "\n");
            });
        }
    });
    assert_eq!(container.pids().len(), 1);
}

#[test]
fn an_exec_may_do_what_its_container_may() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let configure = |command: &[&str]| {
        let mut config = pod.container(command);
        config.env("NAME", b"\xff value");
        let security = config.security();
        security.run_as_user = Some(cri::Int64Value { value: 1234 });
        security.run_as_group = Some(cri::Int64Value { value: 1235 });
        security.supplemental_groups = vec![7, 8];
        security.no_new_privs = true;
        security.capabilities = Some(cri::Capability {
            drop_capabilities: vec!["NET_RAW".into()],
            add_capabilities: vec!["SYS_TIME".into()],
            ..Default::default()
        });
        security.seccomp = Some(cri::SecurityProfile {
            profile_type: cri::security_profile::ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
        config
    };
    let who = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with("NSpid"));
        lines.map(str::to_owned).collect()
    };
    let own = pod.output_as(configure(&["probe", "status"]));
    let env = pod.output_as(configure(&["probe", "env"]));
    let container = pod.start_as(configure(&["sleep", "1000"]));
    let exec = container.exec(&["probe", "status"]);
    assert_eq!(who(&exec), who(&own));
    assert!(own.contains("Uid:\t1234\t1234"), "{own}");
    assert!(own.contains("Seccomp:\t2"), "{own}");
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&container.exec(&["probe", "env"])), sorted(&env));
}

#[test]
fn a_caller_that_hangs_up_leaves_no_exec_behind() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let mut runtime = node.runtime();
    let request = cri::ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: ["sh", "-c", "sleep 4321 & sleep 4321"]
            .map(str::to_owned)
            .into(),
        timeout: 0,
    };
    let call = node.spawn(async move { runtime.exec_sync(request).await });
    eventually("the exec runs", || {
        (container.pids().len() >= 3).then_some(())
    });
    call.abort();
    eventually("it is gone", || (container.pids().len() == 1).then_some(()));
}

#[test]
fn two_hundred_execs_leave_no_process_and_no_descriptor() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let daemon = i32::try_from(node.daemon_pid().unwrap()).unwrap();
    let monitor = monitor_of(&pod.id);
    let fds = |pid: i32| {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    let eight_at_once = |rounds: usize| {
        std::thread::scope(|scope| {
            for n in 0..8 {
                let container = &container;
                scope.spawn(move || {
                    for round in 0..rounds {
                        match round % 3 {
                            0 => assert_eq!(container.exec(&["echo", "x"]), "x\n"),
                            1 => drop(container.try_exec(&["/no/such"], 10).unwrap_err()),
                            _ => {
                                let script = format!("sleep 0.0{n} & exit 3");
                                let answer = container.try_exec(&["sh", "-c", &script], 10);
                                assert_eq!(answer.unwrap().exit_code, 3);
                            }
                        }
                    }
                });
            }
        });
    };
    // What is opened once and kept is open after these.
    eight_at_once(3);
    let before = [fds(daemon), fds(monitor)];
    eight_at_once(25);
    eventually("all processes are gone", || {
        (container.pids().len() == 1).then_some(())
    });
    eventually("all descriptors are closed", || {
        let after = [fds(daemon), fds(monitor)];
        (after[0] <= before[0] && after[1] <= before[1]).then_some(())
    });
}

/// The monitor of a pod.
fn monitor_of(pod: &str) -> i32 {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let own = line
            .split(|byte| *byte == 0)
            .any(|word| word == pod.as_bytes());
        own && line.starts_with(b"berth-monitor")
            && std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() != "berth-log")
    })
    .expect("the pod has a monitor")
}
