//! What every RPC of the running daemon shares.

use crate::config::{Config, Places};
use crate::convert::NodeFacts;
use crate::image_source::ImageSource;
use crate::metrics::Metrics;
use crate::streaming::Streaming;
use crate::writable::WritableLayers;
use berth_netplugin::network::Network;
use berth_sandbox::service::Sandboxes;
use std::sync::Arc;

/// The parts of a running daemon.
pub struct Daemon {
    pub config: Config,
    pub places: Places,
    pub facts: NodeFacts,
    pub sandboxes: Sandboxes,
    pub images: ImageSource,
    pub network: Arc<Network>,
    pub metrics: Metrics,
    pub streaming: Arc<Streaming>,
    pub writable: WritableLayers,
}

impl Daemon {
    /// A daemon of these parts.
    #[allow(
        clippy::too_many_arguments,
        reason = "called once; these are the parts"
    )]
    pub fn new(
        config: Config,
        places: Places,
        facts: NodeFacts,
        sandboxes: Sandboxes,
        images: ImageSource,
        network: Arc<Network>,
        metrics: Metrics,
        streaming: Arc<Streaming>,
    ) -> Self {
        let writable = WritableLayers::new(images.service().clone());
        Self {
            config,
            places,
            facts,
            sandboxes,
            images,
            network,
            metrics,
            streaming,
            writable,
        }
    }
}
