//! What is asked for when a pod sandbox is: CRI's PodSandboxConfig, parsed.
//!
//! Everything in here has been validated by whoever made it; it is also the
//! part of the pod's record that never changes.

use crate::container_spec::{Resources, SeccompProfile, SelinuxLabel};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// What makes a sandbox the same one: a second RunPodSandbox with an equal name
/// joins the first.
///
/// Source: CRI `PodSandboxMetadata`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodName {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub attempt: u32,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod sandbox as asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: PodName,
    /// Empty: the host's (host network) or the first 63 bytes of the pod's name.
    pub hostname: String,
    /// Absolute; empty when containers have no log files.
    pub log_directory: PathBuf,
    pub dns: Option<Dns>,
    pub port_mappings: Vec<PortMapping>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// As CRI gave it: "/kubepods/burstable/podX", or "...slice" with systemd.
    pub cgroup_parent: String,
    /// By dotted name: "net.ipv4.ip_unprivileged_port_start".
    pub sysctls: BTreeMap<String, String>,
    pub namespaces: PodNamespaces,
    pub overhead: Option<Resources>,
    pub resources: Option<Resources>,
    pub security: PodSecurity,
    /// The handler's name, as given; empty for the default one.
    pub runtime_handler: String,
}

/// What resolv.conf of the pod holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    /// Never 0: mappings without a host port are dropped while parsing.
    pub host_port: u16,
    pub host_ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// Which namespaces the pod has of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNamespaces {
    pub network: Namespace,
    pub ipc: Namespace,
    pub pid: PidMode,
    /// Mappings of the pod's user namespace; `None` for the host's.
    pub user: Option<UserNamespace>,
}

impl Default for PodNamespaces {
    fn default() -> Self {
        Self {
            network: Namespace::Pod,
            ipc: Namespace::Pod,
            pid: PidMode::Container,
            user: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Namespace {
    /// The pod's own.
    Pod,
    /// The host's.
    Node,
}

/// Whose PID namespace a container runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    /// One that the pod's containers share.
    Pod,
    /// Each container's own.
    Container,
    /// The host's.
    Node,
    /// That of the container with this ID.
    Target(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IdMapping {
    pub container_id: u32,
    pub host_id: u32,
    pub length: u32,
}

/// The sandbox's own security settings; they matter to pods with a process of
/// their own (a shared PID namespace's init) and to other runtimes' sandboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSecurity {
    pub run_as_user: Option<u32>,
    pub run_as_group: Option<u32>,
    pub supplemental_groups: Vec<u32>,
    pub readonly_rootfs: bool,
    pub privileged: bool,
    pub seccomp: Option<SeccompProfile>,
    pub selinux: Option<SelinuxLabel>,
}
