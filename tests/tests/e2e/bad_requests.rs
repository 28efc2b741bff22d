//! Requests that make no sense: each gets a clear error, nothing is half made,
//! the daemon is up.

use berth_proto::runtime_v1 as cri;
use berth_tests::node::spec;
use berth_tests::{LinuxConfig, Node, Pod};
use tonic::{Code, Status};

#[track_caller]
fn refused_pod(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Status {
    let node = Node::start();
    let mut config = node.pod_config("web");
    change(&mut config);
    let err = node
        .try_run(config)
        .err()
        .expect("a pod that makes no sense was run");
    assert!(!err.message().is_empty());
    assert_eq!(node.pods(None), []);
    assert_eq!(node.leftovers(), [""; 0]);
    err
}

#[track_caller]
fn refused_container(change: impl FnOnce(&Node, &mut cri::ContainerConfig)) -> Status {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    change(&node, &mut config);
    refused(&pod, config)
}

#[track_caller]
fn refused(pod: &Pod<'_>, config: cri::ContainerConfig) -> Status {
    let err = pod
        .try_create(config)
        .err()
        .expect("a container that makes no sense was made");
    assert!(!err.message().is_empty());
    assert_eq!(pod.node.containers(None), []);
    assert!(pod.is_ready());
    err
}

#[track_caller]
fn invalid(err: &Status) {
    assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");
}

fn metadata(config: &mut cri::PodSandboxConfig) -> &mut cri::PodSandboxMetadata {
    config.metadata.as_mut().unwrap()
}

#[test]
fn a_pod_without_a_config() {
    let node = Node::start();
    let request = cri::RunPodSandboxRequest::default();
    invalid(
        &node
            .wait(node.runtime().run_pod_sandbox(request))
            .unwrap_err(),
    );
}

#[test]
fn a_pod_without_metadata() {
    invalid(&refused_pod(|config| config.metadata = None));
}

#[test]
fn a_pod_without_a_name() {
    invalid(&refused_pod(|config| metadata(config).name.clear()));
}

#[test]
fn a_pod_without_a_namespace() {
    invalid(&refused_pod(|config| metadata(config).namespace.clear()));
}

#[test]
fn a_pod_with_a_handler_nobody_knows() {
    let node = Node::start();
    let request = cri::RunPodSandboxRequest {
        config: Some(node.pod_config("web")),
        runtime_handler: "imaginary".to_owned(),
    };
    let err = node
        .wait(node.runtime().run_pod_sandbox(request))
        .unwrap_err();
    assert!(err.message().contains("imaginary"), "{err}");
    assert_eq!(node.pods(None), []);
}

#[test]
fn a_pod_with_a_log_directory_that_is_not_absolute() {
    invalid(&refused_pod(|config| {
        config.log_directory = "logs".to_owned()
    }));
}

#[test]
fn a_pod_with_a_log_directory_that_climbs() {
    invalid(&refused_pod(|config| {
        config.log_directory.push_str("/../../../etc")
    }));
}

#[test]
fn a_pod_with_a_hostname_too_long_for_the_kernel() {
    invalid(&refused_pod(|config| config.hostname = "h".repeat(65)));
}

#[test]
fn a_pod_with_a_hostname_of_several_lines() {
    invalid(&refused_pod(|config| config.hostname = "a\nb".to_owned()));
}

#[test]
fn a_pod_with_a_name_server_of_several_lines() {
    invalid(&refused_pod(|config| {
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["10.0.0.1\nnameserver 6.6.6.6".to_owned()],
            ..Default::default()
        });
    }));
}

#[test]
fn a_pod_with_a_port_that_is_none() {
    for (host_port, container_port) in [(70_000, 80), (80, 0), (80, -1), (-5, 80)] {
        invalid(&refused_pod(|config| {
            let mapping = cri::PortMapping {
                host_port,
                container_port,
                ..Default::default()
            };
            config.port_mappings = vec![mapping];
        }));
    }
}

#[test]
fn a_pod_with_a_host_address_that_is_none() {
    invalid(&refused_pod(|config| {
        config.port_mappings = vec![cri::PortMapping {
            host_port: 8080,
            container_port: 80,
            host_ip: "localhost; rm -rf /".to_owned(),
            ..Default::default()
        }];
    }));
}

#[test]
fn a_pod_with_a_cgroup_parent_that_climbs() {
    invalid(&refused_pod(|config| {
        config.linux.as_mut().unwrap().cgroup_parent = "/../../escape".to_owned();
    }));
}

#[test]
fn a_pod_with_a_namespace_mode_that_does_not_exist() {
    invalid(&refused_pod(|config| {
        let linux = config.linux.as_mut().unwrap();
        let security = linux.security_context.as_mut().unwrap();
        security.namespace_options.as_mut().unwrap().network = 77;
    }));
}

#[test]
fn ids_that_are_paths_name_nothing() {
    let node = Node::start();
    for id in [
        "../../../etc",
        "/etc/passwd",
        "a/../b",
        ".",
        "..",
        "\0",
        "Ä",
        &"f".repeat(5000),
    ] {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let err = node
            .wait(node.runtime().pod_sandbox_status(request))
            .unwrap_err();
        assert!(
            matches!(err.code(), Code::NotFound | Code::InvalidArgument),
            "{id:?}: {err:?}"
        );
        assert!(
            err.message().len() < 1000,
            "{} bytes of message",
            err.message().len()
        );
        let err = node.container(id).try_status().unwrap_err();
        assert!(
            matches!(err.code(), Code::NotFound | Code::InvalidArgument),
            "{id:?}: {err:?}"
        );
        // What is not there is removed already.
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        if let Err(err) = node.wait(node.runtime().remove_pod_sandbox(request)) {
            invalid(&err);
        }
        if let Err(err) = node.container(id).remove() {
            invalid(&err);
        }
    }
    assert!(node.root().join("etc/config.toml").exists());
}

#[test]
fn an_empty_id() {
    let node = Node::start();
    let status = cri::PodSandboxStatusRequest::default();
    let err = node
        .wait(node.runtime().pod_sandbox_status(status))
        .unwrap_err();
    assert!(
        matches!(err.code(), Code::NotFound | Code::InvalidArgument),
        "{err:?}"
    );
    // It must not be the beginning of every ID.
    let pod = node.run_pod("web");
    let stop = cri::StopPodSandboxRequest::default();
    _ = node.wait(node.runtime().stop_pod_sandbox(stop));
    let remove = cri::RemovePodSandboxRequest::default();
    _ = node.wait(node.runtime().remove_pod_sandbox(remove));
    assert!(pod.is_ready());
    let container = pod.start(&["sleep", "1000"]);
    _ = node.container("").stop(0);
    _ = node.container("").remove();
    assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
}

#[test]
fn a_container_without_a_config() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    invalid(
        &node
            .wait(node.runtime().create_container(request))
            .unwrap_err(),
    );
}

#[test]
fn a_container_without_metadata() {
    invalid(&refused_container(|_, config| config.metadata = None));
}

#[test]
fn a_container_without_a_name() {
    invalid(&refused_container(|_, config| {
        config.metadata.as_mut().unwrap().name.clear()
    }));
}

#[test]
fn a_container_without_an_image() {
    invalid(&refused_container(|_, config| config.image = None));
}

#[test]
fn a_container_with_an_image_nobody_pulled() {
    let err = refused_container(|_, config| {
        config.image = Some(spec("127.0.0.1:1/never/pulled:1"));
    });
    assert_eq!(err.code(), Code::NotFound, "{err:?}");
    assert!(err.message().contains("never/pulled"), "{err}");
}

#[test]
fn a_container_in_a_pod_that_is_not_there() {
    let node = Node::start();
    let mut pod = node.run_pod("web");
    let config = pod.container(&["true"]);
    pod.id = "0".repeat(64);
    assert_eq!(pod.try_create(config).err().unwrap().code(), Code::NotFound);
}

#[test]
fn a_container_in_a_pod_that_was_stopped() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let config = pod.container(&["true"]);
    pod.stop();
    let err = pod.try_create(config).err().expect("the pod is stopped");
    assert_eq!(err.code(), Code::FailedPrecondition, "{err:?}");
}

#[test]
fn a_container_with_a_log_path_that_climbs() {
    invalid(&refused_container(|_, config| {
        config.log_path = "../../../etc/cron.d/x".to_owned()
    }));
}

#[test]
fn a_container_with_an_absolute_log_path() {
    invalid(&refused_container(|_, config| {
        config.log_path = "/etc/cron.d/x".to_owned()
    }));
}

#[test]
fn a_container_whose_log_path_is_a_symlink_out_of_the_folder() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let victim = node.root().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let mut config = pod.container(&["echo", "overwritten"]);
    config.log_path = "link.log".to_owned();
    let logs = std::path::Path::new(&pod.config.log_directory);
    std::os::unix::fs::symlink(&victim, logs.join("link.log")).unwrap();
    if let Ok(container) = pod.try_create(config)
        && container.start().is_ok()
    {
        container.wait_for_exit();
    }
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn a_container_with_a_mount_without_a_target() {
    invalid(&refused_container(|_, config| _ = config.mount("/etc", "")));
}

#[test]
fn a_container_with_a_mount_without_a_source() {
    invalid(&refused_container(|_, config| _ = config.mount("", "/mnt")));
}

#[test]
fn a_container_with_a_mount_target_that_is_not_absolute() {
    invalid(&refused_container(|_, config| {
        _ = config.mount("/etc", "mnt")
    }));
}

#[test]
fn a_container_with_a_mount_target_that_climbs() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let outside = node.root().join("climbed");
    let mut config = pod.container(&["true"]);
    let up = "../".repeat(20);
    config.mount(
        "/etc",
        &format!("/{up}{}", outside.strip_prefix("/").unwrap().display()),
    );
    // Refused, or held inside.
    if let Ok(container) = pod.try_create(config) {
        _ = container.start();
    }
    assert!(!outside.exists());
}

#[test]
fn a_container_with_a_mount_source_that_is_not_absolute() {
    invalid(&refused_container(|_, config| {
        _ = config.mount("etc", "/mnt")
    }));
}

#[test]
fn a_container_with_a_propagation_that_does_not_exist() {
    invalid(&refused_container(|_, config| {
        config.mount("/etc", "/mnt").propagation = 9
    }));
}

#[test]
fn a_container_with_a_mount_option_nobody_knows() {
    let err = refused_container(|_, config| {
        config.mount("/etc", "/mnt").mount_options = vec!["turbo".to_owned()];
    });
    assert!(err.message().contains("turbo"), "{err}");
}

#[test]
fn a_container_with_a_device_that_is_not_there() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.devices = vec![cri::Device {
        host_path: "/dev/no-such-device".to_owned(),
        container_path: "/dev/mine".to_owned(),
        permissions: "rwm".to_owned(),
    }];
    let outcome = pod
        .try_create(config)
        .and_then(|container| container.start());
    let err = outcome.expect_err("there is no such device");
    assert!(err.message().contains("/dev/no-such-device"), "{err}");
}

#[test]
fn a_container_with_device_permissions_that_are_none() {
    invalid(&refused_container(|_, config| {
        config.devices = vec![cri::Device {
            host_path: "/dev/null".to_owned(),
            container_path: "/dev/mine".to_owned(),
            permissions: "rwx".to_owned(),
        }];
    }));
}

#[test]
fn a_container_with_negative_memory() {
    invalid(&refused_container(|_, config| {
        config.resources().memory_limit_in_bytes = -7
    }));
}

#[test]
fn a_container_with_an_oom_score_out_of_range() {
    invalid(&refused_container(|_, config| {
        config.resources().oom_score_adj = 5000
    }));
}

#[test]
fn a_container_with_a_cpuset_that_is_none() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.resources().cpuset_cpus = "0-; echo".to_owned();
    let outcome = pod
        .try_create(config)
        .and_then(|container| container.start());
    let err = outcome.expect_err("not a set of CPUs");
    assert!(err.message().contains("cpuset"), "{err}");
}

#[test]
fn a_container_with_a_raw_cgroup_file_that_is_a_path() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    let path = "../../../../../../tmp/berth-escape".to_owned();
    config.resources().unified.insert(path, "1".to_owned());
    let outcome = pod
        .try_create(config)
        .and_then(|container| container.start());
    outcome.expect_err("not a name of a file of a cgroup");
    assert!(!std::path::Path::new("/tmp/berth-escape").exists());
}

#[test]
fn a_container_with_an_environment_variable_without_a_name() {
    invalid(&refused_container(|_, config| config.env("", b"value")));
}

#[test]
fn a_container_with_an_environment_value_that_holds_a_nul() {
    invalid(&refused_container(|_, config| config.env("NAME", b"a\0b")));
}

#[test]
fn a_container_with_an_argument_that_holds_a_nul() {
    invalid(&refused_container(|_, config| {
        config.args = vec!["a\0b".to_owned()]
    }));
}

#[test]
fn a_container_with_a_uid_that_is_none() {
    for uid in [-1, 1 << 40] {
        invalid(&refused_container(|_, config| {
            config.security().run_as_user = Some(cri::Int64Value { value: uid });
        }));
    }
}

#[test]
fn a_container_with_a_stop_signal_that_does_not_exist() {
    invalid(&refused_container(|_, config| config.stop_signal = 999));
}

#[test]
fn starting_what_is_not_there() {
    let node = Node::start();
    let err = node.container(&"0".repeat(64)).start().unwrap_err();
    assert_eq!(err.code(), Code::NotFound, "{err:?}");
}

#[test]
fn a_negative_grace_period() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    // Refused, or no grace: never an endless one.
    if let Err(err) = container.stop(-5) {
        invalid(&err);
        assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
    }
}

#[test]
fn image_references_that_are_none() {
    let node = Node::start();
    for reference in [
        "",
        "127.0.0.1:1/UPPER:1",
        "a//b",
        "../../etc",
        "name:tag:tag",
        "name@sha256:short",
        "a b",
        ":",
    ] {
        let err = node.pull(reference).expect_err("no reference");
        invalid(&err);
        let status = cri::ImageStatusRequest {
            image: Some(spec(reference)),
            verbose: false,
        };
        if let Err(err) = node.wait(node.images().image_status(status)) {
            invalid(&err);
        }
    }
    let err = node
        .wait(node.images().pull_image(cri::PullImageRequest::default()))
        .unwrap_err();
    invalid(&err);
}

#[test]
fn a_message_larger_than_anybody_sends_is_refused_and_the_daemon_lives() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config
        .annotations
        .insert("huge".to_owned(), "x".repeat(20 << 20));
    assert!(node.try_run(config).is_err());
    assert_eq!(node.pods(None), []);
}

#[test]
fn bytes_that_are_no_grpc_do_not_hurt() {
    use std::io::Write;
    let node = Node::start();
    let mut stream = std::os::unix::net::UnixStream::connect(node.socket()).unwrap();
    _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
    let mut other = std::os::unix::net::UnixStream::connect(node.socket()).unwrap();
    _ = other.write_all(&[0xff; 100_000]);
    node.wait(node.runtime().version(cri::VersionRequest::default()))
        .unwrap();
}
