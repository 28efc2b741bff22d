//! What statistics and events need of the service.

use super::Sandboxes;
use crate::events::Listener;
use crate::id::PodId;
use crate::stats::Rates;
use std::path::PathBuf;

impl Sandboxes {
    /// Hears what happens to pods and containers from now on.
    pub fn listen(&self) -> Listener {
        self.0.objects.listen()
    }

    pub(crate) fn rates(&self) -> &Rates {
        &self.0.rates
    }

    /// Where the pod's network namespace is pinned.
    pub(crate) fn netns_path(&self, id: &PodId) -> PathBuf {
        self.0.run_dir(id).join("netns")
    }
}
