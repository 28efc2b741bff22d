//! OCI runtimes as handlers. `tests/handlers` runs the suites of containers over
//! them as well; here is what only they have.

use crate::cgroups;
use berth_proto::runtime_v1 as cri;
use berth_tests::deadline::eventually;
use berth_tests::node::is_cgroup_v2;
use berth_tests::{Container, LinuxConfig as _, Node, Pod};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tonic::Code;

const RUNTIMES: [&str; 2] = ["runc", "crun"];

fn run<'n>(node: &'n Node, handler: &str) -> Pod<'n> {
    let config = node.pod_config(handler);
    let pod = node.try_run_by(handler, config);
    pod.unwrap_or_else(|error| panic!("RunPodSandbox by {handler}: {error}"))
}

/// A program that does something and becomes runc.
fn wrapper(dir: &Path, before: &str) -> PathBuf {
    wrapper_of("runc", dir, before)
}

fn wrapper_of(runtime: &str, dir: &Path, before: &str) -> PathBuf {
    let path = dir.join("wrapper");
    let text = format!("#!/bin/sh\n{before}\nexec {runtime} \"$@\"\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_container_lives_its_life_by_another_runtime() {
    let node = Node::start();
    for handler in RUNTIMES {
        let pod = run(&node, handler);
        assert_eq!(pod.status().runtime_handler, handler);
        let script = "echo out; echo err >&2; trap 'exit 7' TERM; while :; do sleep 0.1; done";
        let container = pod.start(&["sh", "-c", script]);
        container.wait_for_log("out");
        assert_eq!(container.stdout(), "out\n", "{handler}");
        assert_eq!(container.stderr(), "err\n", "{handler}");
        assert_eq!(
            container.exec(&["sh", "-c", "echo $((6 * 7))"]).trim(),
            "42"
        );
        let failed = container.try_exec(&["sh", "-c", "exit 3"], 20).unwrap();
        assert_eq!(failed.exit_code, 3, "{handler}");
        container.stop(20).unwrap();
        assert_eq!(container.status().exit_code, 7, "{handler}");
        container.remove().unwrap();
        pod.remove();
    }
}

#[test]
fn its_containers_outlive_a_killed_daemon() {
    let node = Node::start();
    for handler in RUNTIMES {
        let pod = run(&node, handler);
        let container = pod.start(&[
            "sh",
            "-c",
            "while [ ! -e /go ]; do sleep 0.05; done; exit 5",
        ]);
        let before = container.init_pid();
        node.kill_daemon();
        node.start_daemon();
        assert_eq!(container.init_pid(), before, "{handler}");
        container.exec(&["touch", "/go"]);
        assert_eq!(container.wait_for_exit().exit_code, 5, "{handler}");
        pod.remove();
    }
}

#[test]
fn what_the_image_has_not_got_is_told_by_name() {
    let node = Node::start();
    for handler in RUNTIMES {
        let pod = run(&node, handler);
        let container = pod.create(pod.container(&["/no/such/program"]));
        let error = container.start().expect_err("there is no such program");
        assert!(
            error.message().contains("/no/such/program"),
            "{handler}: {error}"
        );
        let status = container.status();
        assert_eq!(status.reason, "StartError", "{handler}");
        assert_eq!(status.exit_code, 128, "{handler}");
        pod.remove();
    }
}

#[test]
fn an_exec_that_is_killed_leaves_nothing() {
    let node = Node::start();
    for handler in RUNTIMES {
        let pod = run(&node, handler);
        let container = pod.start(&["sleep", "1000"]);
        let error = container.try_exec(&["sh", "-c", "sleep 999 & sleep 998"], 1);
        assert_eq!(
            error.unwrap_err().code(),
            Code::DeadlineExceeded,
            "{handler}"
        );
        eventually("only the container's own process is left", || {
            (container.pids().len() == 1).then_some(())
        });
        pod.remove();
    }
}

/// What the kernel has of a container's limits, and where, without its ID.
fn in_force(container: &Container<'_>) -> Vec<(String, String)> {
    let files: &[(&str, &str)] = match is_cgroup_v2() {
        true => &[
            ("", "memory.max"),
            ("", "memory.swap.max"),
            ("", "memory.high"),
            ("", "cpu.max"),
            ("", "cpu.weight"),
            ("", "pids.max"),
            ("", "cpuset.cpus"),
        ],
        false => &[
            ("memory", "memory.limit_in_bytes"),
            ("cpu", "cpu.shares"),
            ("cpu", "cpu.cfs_quota_us"),
            ("pids", "pids.max"),
            ("cpuset", "cpuset.cpus"),
        ],
    };
    let own = files.iter().filter_map(|(controller, file)| {
        let path = cgroups::path(container, controller, file);
        // A kernel without swap has no file for it.
        let value = fs::read_to_string(&path).ok()?;
        let place = path
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_string_lossy();
        let place = place.replace(&container.id, "ID");
        Some((format!("{place}/{file}"), value.trim().to_owned()))
    });
    own.collect()
}

#[test]
fn limits_are_those_of_the_built_in_handler_also_after_an_update() {
    let node = Node::options().cgroup("pids_limit = 500").start();
    let limits = |memory: i64, shares: i64, quota: i64| cri::LinuxContainerResources {
        memory_limit_in_bytes: memory << 20,
        cpu_shares: shares,
        cpu_quota: quota,
        cpu_period: 50_000,
        ..Default::default()
    };
    let seen = |handler: &str| {
        let pod = run(&node, handler);
        let free = in_force(&pod.start(&["sleep", "1000"]));
        let mut config = pod.container(&["sleep", "1000"]);
        *config.resources() = limits(64, 512, 25_000);
        config.resources().cpuset_cpus = "0".into();
        let container = pod.start_as(config);
        let limited = in_force(&container);
        let request = cri::UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(limits(96, 2048, 40_000)),
            ..Default::default()
        };
        node.wait(node.runtime().update_container_resources(request))
            .unwrap_or_else(|error| panic!("{handler}: {error}"));
        let updated = in_force(&container);
        // It is in there, and no device that is not its own is.
        container.exec(&["sh", "-c", "echo x > /dev/null"]);
        let refused = container
            .try_exec(&["sh", "-c", "mknod /kmsg c 1 11 && cat /kmsg"], 20)
            .unwrap();
        assert_ne!(refused.exit_code, 0, "{handler}");
        pod.remove();
        [free, limited, updated]
    };
    let expected = seen("berth");
    assert_ne!(expected[0], expected[1]);
    assert_ne!(expected[1], expected[2]);
    for handler in RUNTIMES {
        assert_eq!(seen(handler), expected, "{handler}");
    }
}

#[test]
fn a_runtime_without_systemd_mode_is_given_the_cgroup() {
    let dir = tempfile::tempdir().unwrap();
    let seen = dir.path().join("seen");
    let before = format!(
        "for word; do [ $word = create ] && cp config.json {0} && echo \"$@\" > {0}.words; done",
        seen.display()
    );
    // runc may refuse a cgroup that somebody is in, crun a host of version 1.
    let runtime = if is_cgroup_v2() { "crun" } else { "runc" };
    let path = wrapper_of(runtime, dir.path(), &before);
    let config = format!("[handlers.plain]\npath = {path:?}\nsystemd_cgroup = false\n");
    let node = Node::options().config(&config).start();
    let pod = run(&node, "plain");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 64 << 20;
    let container = pod.start_as(config);
    let of_plain = in_force(&container);
    let words = fs::read_to_string(seen.with_extension("words")).unwrap();
    assert!(!words.contains("systemd"), "{words}");
    let spec: Value = serde_json::from_str(&fs::read_to_string(&seen).unwrap()).unwrap();
    let given = spec["linux"]["cgroupsPath"].as_str().unwrap();
    assert!(
        given.starts_with('/') && given.contains(&container.id),
        "{given}"
    );
    assert_eq!(container.exec(&["echo", "in"]), "in\n");
    pod.remove();
    let pod = run(&node, "berth");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 64 << 20;
    assert_eq!(of_plain, in_force(&pod.start_as(config)));
}

fn mapping() -> Vec<cri::IdMapping> {
    vec![cri::IdMapping {
        host_id: 196_608,
        container_id: 0,
        length: 65_536,
    }]
}

/// A pod with a user namespace is asked for.
fn in_user_namespace(node: &Node) -> cri::PodSandboxConfig {
    let mut config = node.pod_config(&node.fresh("mapped"));
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    let options = security.namespace_options.get_or_insert_default();
    options.userns_options = Some(cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: mapping(),
        gids: mapping(),
    });
    config
}

#[test]
fn pods_in_user_namespaces_work_where_the_handler_says_so() {
    let node = Node::start();
    let status = node
        .wait(node.runtime().status(cri::StatusRequest::default()))
        .unwrap();
    let says = |name: &str| {
        let handler = status.runtime_handlers.iter().find(|h| h.name == name);
        handler.unwrap().features.unwrap().user_namespaces
    };
    // Its command "features" is there since 1.1.
    assert!(says("runc"));
    assert!(!says("crun"), "with it they do not start");
    let volume = node.root().join("closed/volume");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    fs::set_permissions(volume.parent().unwrap(), fs::Permissions::from_mode(0o700)).unwrap();
    for handler in RUNTIMES.into_iter().filter(|name| says(name)) {
        let pod = node.try_run_by(handler, in_user_namespace(&node)).unwrap();
        let mut config = pod.container(&["sh", "-c", "echo again > /dev/stdout; sleep 1000"]);
        config.security().run_as_user = Some(cri::Int64Value { value: 1000 });
        let mount = config.mount(&volume, "/mapped");
        (mount.uid_mappings, mount.gid_mappings) = (mapping(), mapping());
        config.mount(&volume, "/plain");
        let container = pod.start_as(config);
        container.wait_for_log("again");
        let map = container.exec(&["cat", "/proc/self/uid_map"]);
        let map: Vec<_> = map.split_whitespace().collect();
        assert_eq!(map, ["0", "196608", "65536"], "{handler}");
        for (path, owner) in [
            ("/bin/busybox", "0:0"),
            ("/mapped/file", "0:0"),
            ("/plain/file", "65534:65534"),
        ] {
            let seen = container.exec(&["stat", "-c", "%u:%g", path]);
            assert_eq!(seen.trim(), owner, "{handler}: {path}");
        }
        let user = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        let other = pod.start(&["sleep", "1000"]);
        assert_eq!(user(container.init_pid()), user(other.init_pid()));
        let owned = fs::read_to_string(format!("/proc/{}/status", container.init_pid())).unwrap();
        assert!(owned.contains("Uid:\t197608\t"), "{handler}: {owned}");
        pod.remove();
    }
}

#[test]
fn what_it_cannot_do_is_refused_and_unknown_handlers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let silent = "for word; do [ $word = features ] && exit 1; done";
    let path = wrapper(dir.path(), silent);
    let config = format!("[handlers.silent]\npath = {path:?}\n");
    let node = Node::options().config(&config).start();
    let error = node
        .try_run_by("kata", node.pod_config("web"))
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("kata"), "{error}");
    let error = node
        .try_run_by("silent", in_user_namespace(&node))
        .err()
        .unwrap();
    assert!(error.message().contains("silent"), "{error}");
    assert!(error.message().contains("features"), "{error}");
}

#[test]
fn a_configured_runtime_gets_its_options_annotations_and_base_spec() {
    let dir = tempfile::tempdir().unwrap();
    let seen = dir.path().join("seen");
    let path = wrapper(
        dir.path(),
        &format!(
            "for word; do [ $word = create ] && cp config.json {}; done",
            seen.display()
        ),
    );
    let base = dir.path().join("base.json");
    fs::write(
        &base,
        json!({"linux": {"sysctl": {"net.core.somaxconn": "77"}}}).to_string(),
    )
    .unwrap();
    let config = format!(
        "[handlers.special]\npath = {path:?}\nroot = {root:?}\nannotations = [\"told/*\"]\nbase_spec = {base:?}\n",
        root = dir.path().join("root"),
    );
    let node = Node::options().config(&config).start();
    let mut config = node.pod_config("web");
    config.annotations.insert("told/yes".into(), "1".into());
    config.annotations.insert("other".into(), "2".into());
    let pod = node.try_run_by("special", config).unwrap();
    let answer = pod.output(&["cat", "/proc/sys/net/core/somaxconn"]);
    assert_eq!(answer.trim(), "77");
    let spec: Value = serde_json::from_str(&fs::read_to_string(&seen).unwrap()).unwrap();
    assert_eq!(spec["annotations"]["told/yes"], "1");
    assert_eq!(spec["annotations"].get("other"), None);
    assert_eq!(
        spec["annotations"]["io.kubernetes.cri.container-type"],
        "container"
    );
    assert!(
        spec["linux"]["seccomp"].is_null(),
        "nobody asked for a profile"
    );
    pod.remove();
}

#[test]
fn a_runtime_that_fails_is_quoted_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let before = "for word; do [ $word = start ] && { echo '{\"level\":\"error\",\"msg\":\"no wind today\"}' > \
        \"$4\"; exit 1; }; done";
    let path = wrapper(dir.path(), before);
    let node = Node::options()
        .config(&format!("[handlers.moody]\npath = {path:?}\n"))
        .start();
    let pod = run(&node, "moody");
    let container = pod.create(pod.container(&["true"]));
    let error = container.start().expect_err("the runtime refuses");
    assert!(error.message().contains("no wind today"), "{error}");
    assert_eq!(container.pids(), Vec::<i32>::new());
    pod.remove();
}
