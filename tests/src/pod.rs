//! A pod sandbox, as a test handles it.

use crate::container::Container;
use crate::node::{Node, spec};
use berth_proto::runtime_v1::{
    self as cri, ContainerConfig, ContainerMetadata, CreateContainerRequest, LinuxContainerConfig,
    PodSandboxConfig, PodSandboxStatus,
};
use std::net::IpAddr;
use std::path::Path;
use tonic::Status;

pub struct Pod<'n> {
    pub node: &'n Node,
    pub id: String,
    pub config: PodSandboxConfig,
}

impl<'n> Pod<'n> {
    /// A container of the base image that runs `command`, logs to NAME.log and is
    /// otherwise as the kubelet asks by default. Change what the test is about.
    pub fn container(&self, command: &[&str]) -> ContainerConfig {
        self.container_of(&self.node.base_image(), command)
    }

    /// The same with another image, which has to be there.
    pub fn container_of(&self, image: &str, command: &[&str]) -> ContainerConfig {
        let name = self.node.fresh("c");
        let mut namespaces = crate::node::pod_namespaces();
        if let Some(options) = self.namespace_options() {
            (namespaces.network, namespaces.ipc) = (options.network, options.ipc);
            (namespaces.pid, namespaces.userns_options) =
                (options.pid, options.userns_options.clone());
        }
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.clone(),
                attempt: 0,
            }),
            image: Some(spec(image)),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(cri::LinuxContainerResources::default()),
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces),
                    masked_paths: MASKED.iter().map(|&path| path.to_owned()).collect(),
                    readonly_paths: READONLY.iter().map(|&path| path.to_owned()).collect(),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    fn namespace_options(&self) -> Option<&cri::NamespaceOption> {
        self.config
            .linux
            .as_ref()?
            .security_context
            .as_ref()?
            .namespace_options
            .as_ref()
    }

    pub fn try_create(&self, config: ContainerConfig) -> Result<Container<'n>, Status> {
        let log_path = match config.log_path.as_str() {
            "" => Path::new("").to_owned(),
            path => Path::new(&self.config.log_directory).join(path),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self
            .node
            .wait(self.node.runtime().create_container(request))?
            .container_id;
        Ok(Container {
            node: self.node,
            id,
            log_path,
        })
    }

    #[track_caller]
    pub fn create(&self, config: ContainerConfig) -> Container<'n> {
        self.try_create(config)
            .unwrap_or_else(|err| panic!("CreateContainer: {err}"))
    }

    /// Creates and starts a container of the base image.
    #[track_caller]
    pub fn start(&self, command: &[&str]) -> Container<'n> {
        self.start_as(self.container(command))
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn start_as(&self, config: ContainerConfig) -> Container<'n> {
        let container = self.create(config);
        container
            .start()
            .unwrap_or_else(|err| panic!("StartContainer: {err}"));
        container
    }

    /// What a command printed to standard output in a container of its own; the
    /// command has to end with 0.
    #[track_caller]
    pub fn output(&self, command: &[&str]) -> String {
        self.output_as(self.container(command))
    }

    #[track_caller]
    pub fn output_as(&self, config: ContainerConfig) -> String {
        let container = self.start_as(config);
        let status = container.wait_for_exit();
        let (stdout, stderr) = (container.stdout(), container.stderr());
        assert_eq!(status.exit_code, 0, "stdout: {stdout}\nstderr: {stderr}");
        stdout
    }

    #[track_caller]
    pub fn status(&self) -> PodSandboxStatus {
        self.try_status()
            .unwrap_or_else(|err| panic!("PodSandboxStatus: {err}"))
    }

    pub fn try_status(&self) -> Result<PodSandboxStatus, Status> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .node
            .wait(self.node.runtime().pod_sandbox_status(request))?;
        answer
            .status
            .ok_or_else(|| Status::internal("an answer without a status"))
    }

    pub fn is_ready(&self) -> bool {
        self.status().state() == cri::PodSandboxState::SandboxReady
    }

    #[track_caller]
    pub fn ip(&self) -> IpAddr {
        let network = self.status().network.expect("the pod has a network");
        network
            .ip
            .parse()
            .unwrap_or_else(|err| panic!("{:?}: {err}", network.ip))
    }

    pub fn try_stop(&self) -> Result<(), Status> {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.node
            .wait(self.node.runtime().stop_pod_sandbox(request))
            .map(drop)
    }

    #[track_caller]
    pub fn stop(&self) {
        self.try_stop()
            .unwrap_or_else(|err| panic!("StopPodSandbox: {err}"));
    }

    pub fn try_remove(&self) -> Result<(), Status> {
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.node
            .wait(self.node.runtime().remove_pod_sandbox(request))
            .map(drop)
    }

    /// Stops and removes it.
    #[track_caller]
    pub fn remove(&self) {
        self.stop();
        self.try_remove()
            .unwrap_or_else(|err| panic!("RemovePodSandbox: {err}"));
    }
}

/// What the kubelet masks by default. Source: Kubernetes `securitycontext.ProcMountType`.
pub const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];

/// And makes read-only.
pub const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
