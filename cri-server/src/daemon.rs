//! What every RPC of the running daemon shares.

use crate::config::{Config, Places};
use crate::convert::NodeFacts;
use crate::image_source::ImageSource;
use crate::metrics::Metrics;
use berth_netplugin::network::Network;
use berth_sandbox::service::Sandboxes;
use std::sync::{Arc, Mutex, PoisonError};

/// The parts of a running daemon.
pub struct Daemon {
    pub config: Config,
    pub places: Places,
    pub facts: NodeFacts,
    pub sandboxes: Sandboxes,
    pub images: ImageSource,
    pub network: Arc<Network>,
    pub metrics: Metrics,
    /// What the kubelet said this node's pods get their addresses from; empty until it does.
    pod_cidr: Mutex<String>,
}

impl Daemon {
    /// A daemon of these parts.
    pub fn new(
        config: Config,
        places: Places,
        facts: NodeFacts,
        sandboxes: Sandboxes,
        images: ImageSource,
        network: Arc<Network>,
        metrics: Metrics,
    ) -> Self {
        Self {
            config,
            places,
            facts,
            sandboxes,
            images,
            network,
            metrics,
            pod_cidr: Mutex::default(),
        }
    }

    /// What the kubelet said with UpdateRuntimeConfig.
    pub fn pod_cidr(&self) -> String {
        self.pod_cidr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps what the kubelet said; returns what it said before.
    pub fn set_pod_cidr(&self, cidr: String) -> String {
        std::mem::replace(
            &mut self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner),
            cidr,
        )
    }
}
