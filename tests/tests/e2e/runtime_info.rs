//! Version, Status, RuntimeConfig, and what is not there yet.

use berth_proto::runtime_v1 as cri;
use berth_tests::Node;
use tonic::Code;

#[test]
fn version_names_berth_and_the_cri_version() {
    let node = Node::start();
    let version = node
        .wait(node.runtime().version(cri::VersionRequest::default()))
        .unwrap();
    assert_eq!(version.runtime_name, "berth");
    assert_eq!(version.runtime_version, "0.1.0");
    assert_eq!(version.runtime_api_version, "v1");
    let command = node.berth(&["--version"]);
    let printed = String::from_utf8_lossy(&command.stdout).into_owned();
    assert!(printed.contains("0.1.0"), "{printed}");
}

#[test]
fn a_node_on_its_defaults_is_ready() {
    let node = Node::start();
    let answer = node
        .wait(node.runtime().status(cri::StatusRequest { verbose: true }))
        .unwrap();
    let conditions = answer.status.unwrap().conditions;
    for kind in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|c| c.r#type == kind);
        let condition = condition.unwrap_or_else(|| panic!("no condition {kind}"));
        assert!(condition.status, "{condition:?}");
    }
    assert!(
        answer
            .runtime_handlers
            .iter()
            .any(|handler| handler.name.is_empty())
    );
    assert!(answer.features.unwrap().supplemental_groups_policy);
}

#[test]
fn a_node_that_waits_for_a_cni_configuration_says_so() {
    let node = Node::options()
        .config("[network]\ndefault = \"wait\"\n")
        .start();
    let answer = node
        .wait(node.runtime().status(cri::StatusRequest::default()))
        .unwrap();
    let conditions = answer.status.unwrap().conditions;
    let network = conditions
        .iter()
        .find(|c| c.r#type == "NetworkReady")
        .unwrap();
    assert!(!network.status);
    assert!(
        !network.reason.is_empty() && !network.message.is_empty(),
        "{network:?}"
    );
    let runtime = conditions
        .iter()
        .find(|c| c.r#type == "RuntimeReady")
        .unwrap();
    assert!(runtime.status, "{runtime:?}");
}

#[test]
fn the_cgroup_driver_is_told() {
    let node = Node::start();
    let answer = node
        .wait(
            node.runtime()
                .runtime_config(cri::RuntimeConfigRequest::default()),
        )
        .unwrap();
    let expected = match berth_tests::node::is_systemd_driver() {
        true => cri::CgroupDriver::Systemd,
        false => cri::CgroupDriver::Cgroupfs,
    };
    assert_eq!(answer.linux.unwrap().cgroup_driver(), expected);
}

#[test]
fn a_call_that_comes_later_is_unimplemented_and_names_itself() {
    let node = Node::start();
    let err = node
        .wait(
            node.runtime()
                .checkpoint_pod(cri::CheckpointPodRequest::default()),
        )
        .unwrap_err();
    assert_eq!(err.code(), Code::Unimplemented);
    assert!(err.message().contains("CheckpointPod"), "{err}");
    let err = node
        .wait(
            node.runtime()
                .restore_pod(cri::RestorePodRequest::default()),
        )
        .unwrap_err();
    assert_eq!(err.code(), Code::Unimplemented);
    assert!(err.message().contains("RestorePod"), "{err}");
}

#[test]
fn the_socket_is_for_root_and_its_group_alone() {
    use std::os::unix::fs::PermissionsExt;
    let node = Node::start();
    let mode = std::fs::metadata(node.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o660);
}

#[test]
fn a_daemon_told_to_stop_ends_with_0_and_leaves_its_pods_running() {
    let node = Node::start();
    let sleeper = node.run_pod("web").start(&["sleep", "1000"]);
    let before = sleeper.init_pid();
    assert!(node.stop_daemon().success());
    assert_eq!(sleeper.init_pid(), before);
    node.start_daemon();
    assert_eq!(sleeper.state(), cri::ContainerState::ContainerRunning);
}

#[test]
fn two_daemons_do_not_share_a_root() {
    let node = Node::start();
    let second = node.berth(&["serve"]);
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!said.trim().is_empty());
    // And the first has not noticed.
    node.wait(node.runtime().version(cri::VersionRequest::default()))
        .unwrap();
}
