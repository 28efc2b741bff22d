//! What a network's plugins say of themselves (VERSION, STATUS), asked beside
//! who wants to know: a plugin that hangs must not hold back the node's status.

use crate::client::{Client, CniError};
use crate::network::NotReady;
use crate::spec::{NetworkList, code};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The last answer, and whether one is on its way.
#[derive(Debug, Default)]
pub(crate) struct Readiness {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asking: bool,
    /// How often somebody was asked.
    asked: u64,
    /// How many of these have ended.
    ended: u64,
    answer: Option<(NetworkList, Result<(), NotReady>)>,
}

impl Readiness {
    /// Asks the plugins of `list` anew and waits for at most `patience`; after
    /// that it is what they said last, and not ready where they never said.
    ///
    /// # Errors
    /// Why pods should not be sent here.
    pub fn ask(
        self: &Arc<Self>,
        client: &Arc<Client>,
        list: &NetworkList,
        patience: Duration,
    ) -> Result<(), NotReady> {
        let end = Instant::now() + patience;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // One that runs already may have asked before what is true now was.
        let wanted = state.asked + 1;
        while state.ended < wanted {
            if !state.asking {
                state.asking = true;
                state.asked += 1;
                let (me, client, list) = (self.clone(), client.clone(), list.clone());
                let thread = std::thread::Builder::new().name("cni-status".into());
                let started = thread.spawn(move || {
                    let answer = ready(&client, &list);
                    let mut state = me.state.lock().unwrap_or_else(PoisonError::into_inner);
                    state.asking = false;
                    state.ended += 1;
                    state.answer = Some((list, answer));
                    me.changed.notify_all();
                });
                if let Err(error) = started {
                    state.asking = false;
                    state.asked -= 1;
                    let message = format!("cannot ask the CNI plugins how they are: {error}");
                    return Err(NotReady::new("CNIPluginUnknown", message));
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        match &state.answer {
            Some((of, answer)) if of == list => answer.clone(),
            _ => {
                let message = format!(
                    "the CNI plugins of network {} have not said for {patience:?} how they are",
                    list.name
                );
                Err(NotReady::new("CNIPluginSilent", message))
            }
        }
    }
}

/// Source: section 5 for the codes.
fn ready(client: &Client, list: &NetworkList) -> Result<(), NotReady> {
    let asked = client
        .negotiate(list.clone())
        .and_then(|list| client.status(&list));
    asked.map_err(|error| {
        let reason = match (&error, error.code()) {
            (_, Some(code::LIMITED)) => "CNIPluginLimited",
            (CniError::Missing { .. }, _) => "CNIPluginMissing",
            (CniError::Version { .. }, _) => "CNIVersionUnsupported",
            (CniError::Plugin { .. } | CniError::Run { .. } | CniError::Nonsense { .. }, _) => {
                "CNIPluginNotReady"
            }
        };
        NotReady::new(reason, crate::network::chain(&error))
    })
}
