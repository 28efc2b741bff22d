//! What records look like in CRI's terms, and what filters let through.

use super::{NodeFacts, answer, container_spec, filter, pod_spec};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::{ContainerRecord, ContainerState, Exit};
use berth_sandbox::container_spec::SeccompProfile;
use berth_sandbox::image::ContainerImage;
use berth_sandbox::pod::{PodRecord, PodState};
use berth_sandbox::{ContainerId, PodId};
use serde_json::json;

fn node() -> NodeFacts {
    NodeFacts {
        apparmor: false,
        handlers: Default::default(),
        unset_seccomp: SeccompProfile::Unconfined,
    }
}

fn pod_config() -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "web".into(),
            uid: "a-uid".into(),
            namespace: "default".into(),
            attempt: 3,
        }),
        labels: [
            ("app".to_owned(), "web".to_owned()),
            ("tier".to_owned(), "front".to_owned()),
        ]
        .into(),
        annotations: [("note".to_owned(), "x".to_owned())].into(),
        ..Default::default()
    }
}

fn pod(state: PodState) -> PodRecord {
    let request = cri::RunPodSandboxRequest {
        config: Some(pod_config()),
        runtime_handler: "berth".into(),
    };
    // As from disk: fields that do not matter here take their defaults.
    let record = json!({
        "id": PodId::random().unwrap(),
        "spec": pod_spec(&request, &node()).unwrap(),
        "state": state,
        "created_at": 5,
        "boot_id": "",
        "ips": ["10.187.0.2", "fd00::2"],
    });
    serde_json::from_value(record).unwrap()
}

fn container_config() -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "nginx".into(),
            attempt: 2,
        }),
        image: Some(cri::ImageSpec {
            image: "sha256:aa".into(),
            user_specified_image: "registry.test/nginx:1".into(),
            ..Default::default()
        }),
        mounts: vec![cri::Mount {
            container_path: "/data".into(),
            host_path: "/srv".into(),
            readonly: true,
            recursive_read_only: true,
            mount_options: vec!["noexec".into()],
            ..Default::default()
        }],
        labels: [("app".to_owned(), "web".to_owned())].into(),
        ..Default::default()
    }
}

fn container(state: ContainerState) -> ContainerRecord {
    let pod = pod(PodState::Ready);
    let image = ContainerImage {
        id: "sha256:aa".into(),
        repo_digest: "registry.test/nginx@sha256:bb".into(),
        ..Default::default()
    };
    let record = json!({
        "id": ContainerId::random().unwrap(),
        "pod": pod.id,
        "spec": container_spec(Some(&container_config()), &pod.spec, &node()).unwrap(),
        "image": image,
        "state": state,
        "created_at": 5,
        "log_path": "/var/log/nginx.log",
        "stop_signal": 15,
    });
    serde_json::from_value(record).unwrap()
}

fn exited() -> ContainerState {
    let exit = Exit {
        code: 137,
        reason: "OOMKilled".into(),
        message: "one process".into(),
    };
    ContainerState::Exited {
        since: Some(7),
        at: 9,
        exit,
    }
}

#[test]
fn a_ready_pod_shows_its_addresses_and_a_stopped_one_does_not() {
    let ready = answer::pod_status(&pod(PodState::Ready));
    let network = ready.network.clone().unwrap();
    assert_eq!(network.ip, "10.187.0.2");
    assert_eq!(
        network.additional_ips,
        [cri::PodIp {
            ip: "fd00::2".into()
        }]
    );
    assert_eq!(
        (ready.state(), ready.runtime_handler.as_str()),
        (cri::PodSandboxState::SandboxReady, "berth")
    );
    assert_eq!(ready.metadata, pod_config().metadata);
    for state in [PodState::Stopping, PodState::Stopped, PodState::Removing] {
        let gone = answer::pod_status(&pod(state));
        assert_eq!(gone.state(), cri::PodSandboxState::SandboxNotready);
        assert_eq!(gone.network.unwrap().ip, "");
    }
}

#[test]
fn a_containers_times_and_exit_follow_its_state() {
    let shown = |state| {
        let status = answer::container_status(&container(state));
        (
            status.state(),
            status.started_at,
            status.finished_at,
            status.exit_code,
            status.reason,
        )
    };
    let running = ContainerState::Running {
        since: 7,
        pid: 1,
        start_ticks: 1,
    };
    let none = String::new;
    assert_eq!(
        shown(ContainerState::Created),
        (cri::ContainerState::ContainerCreated, 0, 0, 0, none())
    );
    assert_eq!(
        shown(ContainerState::Starting),
        (cri::ContainerState::ContainerCreated, 0, 0, 0, none())
    );
    assert_eq!(
        shown(running.clone()),
        (cri::ContainerState::ContainerRunning, 7, 0, 0, none())
    );
    let ended = (
        cri::ContainerState::ContainerExited,
        7,
        9,
        137,
        "OOMKilled".to_owned(),
    );
    assert_eq!(shown(exited()), ended);
    assert_eq!(
        shown(ContainerState::Removing {
            last: Box::new(exited())
        }),
        ended
    );
}

#[test]
fn doubt_is_told_and_does_not_hide_what_the_exit_said() {
    let mut record = container(exited());
    record.message = "the monitor was lost".into();
    assert_eq!(
        answer::container_status(&record).message,
        "one process; the monitor was lost"
    );
    record.state = ContainerState::Created;
    assert_eq!(
        answer::container_status(&record).message,
        "the monitor was lost"
    );
}

#[test]
fn a_container_names_its_image_in_all_three_ways() {
    let record = container(ContainerState::Created);
    let (listed, status) = (
        answer::container(&record),
        answer::container_status(&record),
    );
    for (image, image_ref, image_id) in [
        (listed.image.unwrap(), listed.image_ref, listed.image_id),
        (status.image.unwrap(), status.image_ref, status.image_id),
    ] {
        assert_eq!(image, container_config().image.unwrap());
        assert_eq!(image_ref, "registry.test/nginx@sha256:bb");
        assert_eq!(image_id, "sha256:aa");
    }
    assert_eq!(status.mounts, container_config().mounts);
    assert_eq!(status.stop_signal, i32::from(cri::Signal::Sigterm));
}

#[test]
fn every_criterion_of_a_pod_filter_must_hold() {
    let pod = pod(PodState::Ready);
    let id = pod.id.to_string();
    let passes = |id: &str, state: Option<cri::PodSandboxState>, labels: &[(&str, &str)]| {
        let wanted = cri::PodSandboxFilter {
            id: id.to_owned(),
            state: state.map(|state| cri::PodSandboxStateValue {
                state: state.into(),
            }),
            label_selector: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        };
        filter::pod(&wanted, &pod)
    };
    let ready = Some(cri::PodSandboxState::SandboxReady);
    assert!(passes("", None, &[]));
    assert!(passes(&id, ready, &[("app", "web"), ("tier", "front")]));
    assert!(passes(&id[..10], None, &[]));
    assert!(!passes("../x", None, &[]));
    assert!(!passes(
        &id,
        Some(cri::PodSandboxState::SandboxNotready),
        &[]
    ));
    assert!(!passes(&id, ready, &[("app", "web"), ("tier", "back")]));
    assert!(!passes(&id, ready, &[("absent", "")]));
}

#[test]
fn every_criterion_of_a_container_filter_must_hold() {
    let record = container(exited());
    let base = cri::ContainerFilter {
        id: record.id.to_string(),
        state: Some(cri::ContainerStateValue {
            state: cri::ContainerState::ContainerExited.into(),
        }),
        pod_sandbox_id: record.pod.short().to_owned(),
        label_selector: [("app".to_owned(), "web".to_owned())].into(),
    };
    assert!(filter::container(&base, &record));
    assert!(filter::container(&cri::ContainerFilter::default(), &record));
    for other in [
        cri::ContainerFilter {
            id: "f".repeat(64),
            ..base.clone()
        },
        cri::ContainerFilter {
            pod_sandbox_id: "f".repeat(64),
            ..base.clone()
        },
        cri::ContainerFilter {
            state: Some(cri::ContainerStateValue {
                state: cri::ContainerState::ContainerRunning.into(),
            }),
            ..base.clone()
        },
        cri::ContainerFilter {
            label_selector: [("app".to_owned(), "db".to_owned())].into(),
            ..base.clone()
        },
    ] {
        assert!(!filter::container(&other, &record), "{other:?}");
    }
}
