//! What is asked for when a container is: CRI's ContainerConfig, parsed.
//!
//! Everything in here has been validated by whoever made it; it is also the
//! part of the container's record that never changes.

use crate::pod_spec::{IdMapping, Namespace, PidMode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What makes a container the same one inside its sandbox.
///
/// Source: CRI `ContainerMetadata`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerName {
    pub name: String,
    pub attempt: u32,
}

/// A container as asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: ContainerName,
    pub image: ImageRequest,
    /// Replaces the image's entrypoint (and its command) unless empty.
    pub command: Vec<String>,
    /// Replaces the image's command unless empty.
    pub args: Vec<String>,
    /// Empty: the image's, or "/".
    pub working_dir: String,
    pub env: Vec<EnvVar>,
    pub mounts: Vec<MountRequest>,
    pub devices: Vec<DeviceRequest>,
    pub cdi_devices: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Relative to the pod's log directory, without "..": checked. Empty: no log.
    pub log_path: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    pub resources: Resources,
    pub security: SecurityContext,
    /// Linux signal number; `None`: the image's, or SIGTERM.
    pub stop_signal: Option<i32>,
}

/// CRI `ImageSpec`, kept whole because ContainerStatus gives it back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// A reference or an image ID.
    pub image: String,
    pub user_specified_image: String,
    pub runtime_handler: String,
    pub annotations: BTreeMap<String, String>,
}

/// The value is bytes: nothing says that it is UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    pub name: String,
    pub value: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// Absolute path in the container.
    pub container_path: String,
    /// Absolute path on the host; empty when `image` is given.
    pub host_path: PathBuf,
    pub image: Option<ImageRequest>,
    /// The ID of `image` on this node; empty without one.
    #[serde(default)]
    pub image_id: String,
    pub image_sub_path: String,
    pub readonly: bool,
    pub recursive_readonly: bool,
    pub selinux_relabel: bool,
    pub propagation: Propagation,
    pub uid_mappings: Vec<IdMapping>,
    pub gid_mappings: Vec<IdMapping>,
    /// "noexec", "nodev", "nosuid".
    pub options: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRequest {
    pub host_path: PathBuf,
    pub container_path: String,
    /// Letters of "rwm".
    pub permissions: String,
}

/// cgroup limits; `None` means not given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Microseconds.
    pub cpu_period: Option<u64>,
    /// Microseconds per period; negative for no limit.
    pub cpu_quota: Option<i64>,
    /// v1 shares, 2 to 262144; turned into a weight on v2.
    pub cpu_shares: Option<u64>,
    pub memory_limit_bytes: Option<i64>,
    /// Memory plus swap, as on v1; negative for no limit.
    pub memory_swap_limit_bytes: Option<i64>,
    pub oom_score_adj: Option<i32>,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    pub pids_limit: Option<i64>,
    pub hugepages: Vec<HugepageLimit>,
    /// Raw cgroup v2 files.
    pub unified: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugepageLimit {
    /// As in the cgroup file's name: "2MB".
    pub page_size: String,
    pub limit_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityContext {
    pub privileged: bool,
    pub capabilities: Capabilities,
    pub network: Namespace,
    pub ipc: Namespace,
    pub pid: PidMode,
    pub user: RunAs,
    pub supplemental_groups: Vec<u32>,
    pub supplemental_groups_policy: GroupsPolicy,
    pub readonly_rootfs: bool,
    pub no_new_privs: bool,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub seccomp: SeccompProfile,
    pub apparmor: AppArmorProfile,
    pub selinux: Option<SelinuxLabel>,
}

/// Names without CAP_, upper case; "ALL" stands for every one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub add: Vec<String>,
    pub drop: Vec<String>,
    pub add_ambient: Vec<String>,
}

/// Who the first process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunAs {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Looked up in the image's passwd; used when `uid` is not given.
    pub username: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupsPolicy {
    /// The image's groups of the user and those asked for.
    Merge,
    /// Only those asked for.
    Strict,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompProfile {
    RuntimeDefault,
    Unconfined,
    /// Absolute path of a profile on this node.
    Localhost(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AppArmorProfile {
    RuntimeDefault,
    Unconfined,
    /// The name of a loaded profile.
    Localhost(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelinuxLabel {
    pub user: String,
    pub role: String,
    pub r#type: String,
    pub level: String,
}
