//! The pod network as the rest of Berth sees it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What happens while the CNI configuration directory holds no configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Pods get the built-in bridge.
    #[default]
    Builtin,
    /// The network is not ready until a configuration appears: what a node
    /// needs whose CNI plugin is installed by a DaemonSet.
    Wait,
}

/// How pods are networked.
#[derive(Clone, Debug)]
pub struct NetworkSettings {
    /// What to do without a CNI configuration.
    pub mode: Mode,
    /// Where CNI configurations are looked for; need not exist.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for, first match wins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// How long one CNI plugin may take.
    pub plugin_deadline: Duration,
    /// The built-in network.
    pub bridge: crate::bridge::Settings,
}

/// Whether pods can be networked now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkStatus {
    /// CRI's NetworkReady.
    pub ready: bool,
    /// One CamelCase word; empty when ready.
    pub reason: String,
    /// A sentence for a person; empty when ready.
    pub message: String,
}

/// The pod an attachment belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// The sandbox's ID: what leases and links are known by.
    pub id: &'a str,
    /// The pod's name in Kubernetes.
    pub name: &'a str,
    /// Its namespace in Kubernetes.
    pub namespace: &'a str,
    /// Its UID in Kubernetes.
    pub uid: &'a str,
}

/// The transport of a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the host that leads to a port of the pod.
///
/// Its JSON is what the CNI capability `portMappings` wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// 1 to 65535.
    pub host_port: u16,
    /// 1 to 65535.
    pub container_port: u16,
    /// The transport.
    pub protocol: Protocol,
    /// Only this address of the host; `None`, 0.0.0.0 and :: are all of them
    /// (the latter two of one family).
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// What is wanted for a pod.
#[derive(Clone, Copy, Debug)]
pub struct AttachRequest<'a> {
    /// Whose attachment it is.
    pub pod: Pod<'a>,
    /// The pod's network namespace: a path that can be opened, such as the pin.
    pub netns: &'a Path,
    /// Host ports.
    pub port_mappings: &'a [PortMapping],
    /// The pod's annotations: given to plugins that ask for them.
    pub annotations: &'a BTreeMap<String, String>,
    /// The pod's cgroup as CRI names it, for plugins that ask; may be empty.
    pub cgroup_parent: &'a str,
}

/// What is to be taken back.
#[derive(Clone, Copy, Debug)]
pub struct DetachRequest<'a> {
    /// Whose attachment it is.
    pub pod: Pod<'a>,
    /// The pod's network namespace; `None` when it is gone.
    pub netns: Option<&'a Path>,
}

/// What a pod got.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachResult {
    /// Primary address first.
    pub ips: Vec<IpAddr>,
    /// What [`Network::detach`] wants back, and what `crictl inspectp` shows:
    /// opaque, small, to be kept with the pod's record.
    pub record: serde_json::Value,
}

/// Why a pod could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The network is not ready; the status says the same.
    #[error("the network is not ready: {message}")]
    NotReady {
        /// What [`NetworkStatus::reason`] says.
        reason: String,
        /// What [`NetworkStatus::message`] says.
        message: String,
    },
}

/// The pods' network. Cheap to share; every method may be called from many threads.
#[derive(Debug)]
pub struct Network {
    settings: NetworkSettings,
}

impl Network {
    /// The network that `settings` describe. Nothing of the kernel is touched yet.
    ///
    /// # Errors
    /// State below `bridge.state_dir` that cannot be made or read.
    pub fn open(settings: NetworkSettings) -> Result<Self, NetworkError> {
        Ok(Self { settings })
    }

    /// Whether pods can be networked now; looks anew each time and never blocks long.
    pub fn status(&self) -> NetworkStatus {
        NetworkStatus {
            ready: false,
            reason: "NetworkNotBuilt".into(),
            message: format!(
                "the bridge {} is not built yet",
                self.settings.bridge.bridge
            ),
        }
    }

    /// Gives the pod its network. Asked again for the same pod it makes the
    /// links anew and gives the same addresses.
    ///
    /// # Errors
    /// Whatever keeps the pod from its network; nothing is left behind then.
    pub fn attach(&self, _request: &AttachRequest<'_>) -> Result<AttachResult, NetworkError> {
        Err(self.not_ready())
    }

    /// Takes the pod's network back; one without any is fine, also after a
    /// restart and with the namespace gone. When it returns, the link is down
    /// and off the bridge and host ports and addresses are free.
    ///
    /// # Errors
    /// All steps are tried; what failed. Calling again is safe.
    pub fn detach(
        &self,
        _request: &DetachRequest<'_>,
        _record: Option<&serde_json::Value>,
    ) -> Result<(), NetworkError> {
        Err(self.not_ready())
    }

    /// Takes back what belongs to pods other than `live`, and says whose it was.
    ///
    /// # Errors
    /// All of them are tried; what failed.
    pub fn gc(&self, _live: &[&str]) -> Result<Vec<String>, NetworkError> {
        Err(self.not_ready())
    }

    fn not_ready(&self) -> NetworkError {
        let NetworkStatus {
            reason, message, ..
        } = self.status();
        NetworkError::NotReady { reason, message }
    }
}
