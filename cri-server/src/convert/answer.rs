//! Records to CRI's answers.
//!
//! What is half made is not listed; what is being removed shows as it was.

use super::security::id_mapping;
use super::{image, mount, resources, signal};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::{ContainerRecord, ContainerState};
use berth_sandbox::pod::{PodRecord, PodState};
use berth_sandbox::pod_spec::{IdMapping, Namespace, PidMode, PodNamespaces, UserNamespace};
use berth_sandbox::view::shown;

/// READY only while every part of the sandbox is there.
pub fn pod_state(state: &PodState) -> cri::PodSandboxState {
    match state.is_ready() {
        true => cri::PodSandboxState::SandboxReady,
        false => cri::PodSandboxState::SandboxNotready,
    }
}

/// A start under way still shows as CREATED: the call has not been answered.
pub fn container_state(state: &ContainerState) -> cri::ContainerState {
    match shown(state) {
        ContainerState::Creating | ContainerState::Created | ContainerState::Starting => {
            cri::ContainerState::ContainerCreated
        }
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } => cri::ContainerState::ContainerExited,
        // `shown` never nests; whatever it was, it runs no more.
        ContainerState::Removing { .. } => cri::ContainerState::ContainerExited,
    }
}

fn metadata(pod: &PodRecord) -> cri::PodSandboxMetadata {
    let name = &pod.spec.name;
    cri::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

fn namespaces(namespaces: &PodNamespaces) -> cri::NamespaceOption {
    let mode = |namespace| match namespace {
        Namespace::Pod => cri::NamespaceMode::Pod.into(),
        Namespace::Node => cri::NamespaceMode::Node.into(),
    };
    let mappings = |mappings: &[IdMapping]| mappings.iter().map(id_mapping).collect();
    let user = |user: &UserNamespace| cri::UserNamespace {
        mode: cri::NamespaceMode::Pod.into(),
        uids: mappings(&user.uids),
        gids: mappings(&user.gids),
    };
    let (pid, target_id) = match &namespaces.pid {
        PidMode::Pod => (cri::NamespaceMode::Pod, String::new()),
        PidMode::Container => (cri::NamespaceMode::Container, String::new()),
        PidMode::Node => (cri::NamespaceMode::Node, String::new()),
        PidMode::Target(id) => (cri::NamespaceMode::Target, id.clone()),
    };
    cri::NamespaceOption {
        network: mode(namespaces.network),
        pid: pid.into(),
        ipc: mode(namespaces.ipc),
        target_id,
        userns_options: namespaces.user.as_ref().map(user),
    }
}

/// An entry of ListPodSandbox.
pub fn pod(pod: &PodRecord) -> cri::PodSandbox {
    cri::PodSandbox {
        id: pod.id.to_string(),
        metadata: Some(metadata(pod)),
        state: pod_state(&pod.state).into(),
        created_at: pod.created_at,
        labels: pod.spec.labels.clone().into_iter().collect(),
        annotations: pod.spec.annotations.clone().into_iter().collect(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

/// PodSandboxStatus. The addresses stay after the pod has stopped only as long as it is ready.
pub fn pod_status(pod: &PodRecord) -> cri::PodSandboxStatus {
    let ready = pod.state.is_ready();
    let mut ips = pod.ips.iter().filter(|_| ready).map(ToString::to_string);
    let network = cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    };
    let namespaces = cri::Namespace {
        options: Some(namespaces(&pod.spec.namespaces)),
    };
    cri::PodSandboxStatus {
        id: pod.id.to_string(),
        metadata: Some(metadata(pod)),
        state: pod_state(&pod.state).into(),
        created_at: pod.created_at,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(namespaces),
        }),
        labels: pod.spec.labels.clone().into_iter().collect(),
        annotations: pod.spec.annotations.clone().into_iter().collect(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

fn container_metadata(container: &ContainerRecord) -> cri::ContainerMetadata {
    cri::ContainerMetadata {
        name: container.spec.name.name.clone(),
        attempt: container.spec.name.attempt,
    }
}

/// An entry of ListContainers.
pub fn container(container: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.pod.to_string(),
        metadata: Some(container_metadata(container)),
        image: Some(image::to_cri(&container.spec.image)),
        image_ref: container.image.repo_digest.clone(),
        state: container_state(&container.state).into(),
        created_at: container.created_at,
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        image_id: container.image.id.clone(),
    }
}

/// ContainerStatus.
pub fn container_status(container: &ContainerRecord) -> cri::ContainerStatus {
    let spec = &container.spec;
    let state = shown(&container.state);
    let (started_at, finished_at, exit) = match state {
        ContainerState::Running { since, .. } => (*since, 0, None),
        ContainerState::Exited { since, at, exit } => (since.unwrap_or(0), *at, Some(exit)),
        ContainerState::Creating
        | ContainerState::Created
        | ContainerState::Starting
        | ContainerState::Removing { .. } => (0, 0, None),
    };
    let said = exit.map(|exit| exit.message.as_str()).unwrap_or_default();
    let message = match (said, container.message.as_str()) {
        (said, "") => said.to_owned(),
        ("", doubt) => doubt.to_owned(),
        (said, doubt) => format!("{said}; {doubt}"),
    };
    cri::ContainerStatus {
        id: container.id.to_string(),
        metadata: Some(container_metadata(container)),
        state: container_state(state).into(),
        created_at: container.created_at,
        started_at,
        finished_at,
        exit_code: exit.map_or(0, |exit| exit.code),
        image: Some(image::to_cri(&spec.image)),
        image_ref: container.image.repo_digest.clone(),
        reason: exit.map(|exit| exit.reason.clone()).unwrap_or_default(),
        message,
        labels: spec.labels.clone().into_iter().collect(),
        annotations: spec.annotations.clone().into_iter().collect(),
        mounts: spec.mounts.iter().map(mount::to_cri).collect(),
        log_path: container.log_path.to_string_lossy().into_owned(),
        resources: Some(cri::ContainerResources {
            linux: Some(resources::to_cri(&spec.resources)),
            windows: None,
        }),
        image_id: container.image.id.clone(),
        user: container
            .identity
            .as_ref()
            .map(|identity| cri::ContainerUser {
                linux: Some(cri::LinuxContainerUser {
                    uid: identity.uid.into(),
                    gid: identity.gid.into(),
                    supplemental_groups: identity
                        .groups
                        .iter()
                        .map(|gid| i64::from(*gid))
                        .collect(),
                }),
            }),
        stop_signal: signal::from_number(container.stop_signal).into(),
    }
}
