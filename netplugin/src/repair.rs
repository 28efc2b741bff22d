//! Rules that somebody flushed (`nft flush ruleset`, a firewall's reload) are
//! written again when the node is next asked how it is, which the kubelet does
//! every few seconds.
//!
//! Looking takes microseconds. Writing runs `nft`, which may wait for others: a
//! thread does it, one at a time, and who asks waits for it only so long.

use crate::bridge::Bridge;
use crate::network::{NotReady, chain};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

const REASON: &str = "BuiltinNetworkNotReady";

/// Whether the rules are being written, and how it went the last time.
#[derive(Debug, Default)]
pub(crate) struct Repair {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    writing: bool,
    failure: Option<String>,
}

impl Repair {
    /// Makes sure of the rules of `bridge`, once there is that bridge; waits for
    /// at most `patience`.
    ///
    /// # Errors
    /// They are not there, or not yet.
    pub fn ensure(
        self: &Arc<Self>,
        bridge: &Arc<Bridge>,
        patience: Duration,
    ) -> Result<(), NotReady> {
        let look = || bridge.lacks_rules();
        let unknown = |error| NotReady::new(REASON, chain(&error));
        if !look().map_err(unknown)? {
            return Ok(());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.writing {
            state.writing = true;
            let (me, bridge) = (self.clone(), bridge.clone());
            let thread = std::thread::Builder::new().name("rules".into());
            let started = thread.spawn(move || me.write(&bridge));
            if let Err(error) = started {
                state.writing = false;
                let message =
                    format!("the nftables rules are gone: no thread to write them: {error}");
                return Err(NotReady::new(REASON, message));
            }
        }
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| state.writing);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let why = match (state.writing, &state.failure) {
            (true, _) => format!("writing them takes longer than {patience:?}"),
            (false, Some(failure)) => failure.clone(),
            (false, None) => return Ok(()),
        };
        let table = bridge.table();
        let message = format!("the nftables table {table} is gone: {why}");
        Err(NotReady::new(REASON, message))
    }

    fn write(&self, bridge: &Bridge) {
        let written = bridge.write_rules();
        if written.is_ok() {
            let table = bridge.table();
            tracing::warn!(table, "the nftables table was gone and is written again");
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.writing = false;
        state.failure = written.err().map(|error| chain(&error));
        self.changed.notify_all();
    }
}
