//! Networks of pods that are gone: what a crash, a plugin that failed or a
//! reboot left is taken back at the start and every now and then, beside all
//! else.

use super::{Inner, blocking};
use crate::error::{Kind, Result, SandboxError};
use crate::pod::PodState;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// GC at once, then each `settings.network_gc`, until the service is gone.
pub(super) async fn work(inner: Weak<Inner>) {
    let mut next = Duration::ZERO;
    loop {
        tokio::time::sleep(next).await;
        let Some(inner) = inner.upgrade() else { return };
        collect(&inner).await;
        next = inner.settings.network_gc;
    }
}

async fn collect(inner: &Arc<Inner>) {
    let me = inner.clone();
    let done = blocking(move || {
        let collected = me.network.gc(&|id| me.has_network(id));
        if !collected.freed.is_empty() {
            tracing::info!(pods = ?collected.freed, "took back networks of nobody's");
        }
        for (id, error) in collected.failed {
            me.pending.detach(&id, &unreturned(&id, error));
        }
        if let Err(error) = collected.rest {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "not all networks could be looked over");
        }
        Ok(())
    });
    if let Err(error) = done.await {
        tracing::warn!(error = error.chain(), "the networks are not looked over");
    }
}

fn unreturned(id: &str, error: berth_netplugin::NetworkError) -> SandboxError {
    let text = format!("cannot take the network of pod sandbox {id} back");
    SandboxError::caused(Kind::Internal, text, error)
}

impl Inner {
    /// True for pods that may be using their network. A pod whose record cannot
    /// be read is one: its folder is there.
    pub(super) fn has_network(&self, id: &str) -> bool {
        match self.objects.view().pod(id) {
            Some(pod) => pod.state != PodState::Stopped,
            None => self.settings.lib.join("pods").join(id).exists(),
        }
    }

    /// Another try at the network of a pod that has been let go.
    pub(super) async fn retry_detach(self: &Arc<Self>, id: &str) -> Result<()> {
        let (me, id) = (self.clone(), id.to_owned());
        blocking(move || {
            let again = me.network.retry(&id);
            again.map_err(|error| unreturned(&id, error))
        })
        .await
    }
}
