//! Where a pod's network is, for who wants to talk to its ports.

use super::Sandboxes;
use crate::error::{Kind, Result, SandboxError};
use crate::pod_spec::Namespace;
use std::path::PathBuf;

/// The network that a pod's containers see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// The node's own.
    Host,
    /// A namespace, pinned at this path until the pod is stopped.
    Own(PathBuf),
}

impl Sandboxes {
    /// Where the network of a ready pod is.
    ///
    /// # Errors
    /// `PodNotFound`; `WrongState` when the pod is not ready.
    pub fn pod_network(&self, id: &str) -> Result<PodNetwork> {
        let pod = self.0.pod(id)?;
        if !pod.state.is_ready() {
            let text = format!("pod sandbox {} is not ready", pod.id);
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        Ok(match pod.spec.namespaces.network {
            Namespace::Pod => PodNetwork::Own(self.netns_path(&pod.id)),
            Namespace::Node => PodNetwork::Host,
        })
    }
}
