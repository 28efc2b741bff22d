//! The record of one pod sandbox and what may happen to it.
//!
//! ```text
//! Creating ── all steps done ──> Ready ── stop ──> Stopping ── all given back ──> Stopped ── remove ──> gone
//!     │                            │                                                 ^
//!     └── a step failed: undone    └── the node restarted, the monitor is lost ──────┘
//! ```
//!
//! A record in Creating is on disk before anything is made, and is not listed:
//! after a crash it is undone. One in Stopping is finished in the background.
//! Source: CRI `PodSandboxState`.

use crate::cgroup::Parent;
use crate::id::PodId;
use crate::pod_spec::{PodName, PodNamespaces, PodSecurity, PodSpec};
use crate::selinux::Labels;
use berth_store::Record;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

/// Where a pod is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// Being made; never listed.
    Creating,
    /// Its namespaces and its network are there.
    Ready,
    /// Being taken apart; NOTREADY already.
    Stopping,
    /// Nothing in the kernel belongs to it any more.
    Stopped,
    /// Being removed; NOTREADY until its record is gone.
    Removing,
}

/// What happens to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEvent {
    /// Every step of RunPodSandbox is done.
    Made,
    /// StopPodSandbox, or its namespaces were lost.
    Stop,
    /// Everything has been given back.
    Stopped,
    /// RemovePodSandbox.
    Remove,
}

impl PodState {
    /// The state after `event`, or `None` where that cannot happen.
    #[must_use]
    pub fn on(&self, event: &PodEvent) -> Option<PodState> {
        use PodState as S;
        match (self, event) {
            (S::Creating, PodEvent::Made) => Some(S::Ready),
            (S::Creating | S::Ready | S::Stopping, PodEvent::Stop) => Some(S::Stopping),
            (S::Stopping, PodEvent::Stopped) => Some(S::Stopped),
            // Stopping what is stopped is not an error.
            (S::Stopped, PodEvent::Stop | PodEvent::Stopped) => Some(S::Stopped),
            (S::Removing, PodEvent::Stop | PodEvent::Stopped) => Some(S::Removing),
            (S::Stopped | S::Removing, PodEvent::Remove) => Some(S::Removing),
            (S::Creating | S::Ready | S::Stopping, PodEvent::Remove)
            | (S::Ready | S::Stopping | S::Stopped | S::Removing, PodEvent::Made)
            | (S::Creating | S::Ready, PodEvent::Stopped) => None,
        }
    }

    /// Whether lists and status show it.
    pub fn is_listed(&self) -> bool {
        !matches!(self, PodState::Creating)
    }

    /// CRI's SANDBOX_READY.
    pub fn is_ready(&self) -> bool {
        matches!(self, PodState::Ready)
    }
}

/// A pod, as on disk at `lib/pods/<id>/pod.rec`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodRecord {
    pub id: PodId,
    pub spec: PodSpec,
    pub state: PodState,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// /proc/sys/kernel/random/boot_id when it was made: after a reboot nothing
    /// in the kernel belongs to it.
    pub boot_id: String,
    /// The pod's addresses, the primary one first; empty on the host's network.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// What the network needs to take the attachment back.
    #[serde(default)]
    pub network: Option<serde_json::Value>,
    /// The cgroup that containers are made below.
    #[serde(default)]
    pub cgroup: Option<Parent>,
    /// Its SELinux labels; `None` on a node without, and of pods made before it had them.
    #[serde(default)]
    pub selinux: Option<Labels>,
    /// What is not certain about the state, for people; empty when nothing is.
    #[serde(default)]
    pub message: String,
    /// Made up for a record that cannot be read; the file stays until the pod is stopped.
    #[serde(skip)]
    pub unreadable: bool,
}

impl PodRecord {
    /// What can be said of a pod whose record is damaged: the ID, and what the
    /// labels of one of its containers say of its name. It is not ready, so the
    /// kubelet stops it and makes a new one, and nothing of it is lost to view.
    pub fn unreadable(id: PodId, labels: &BTreeMap<String, String>, parent: Option<&str>) -> Self {
        let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
        let known = |key: &&String| POD_LABELS.contains(&key.as_str());
        let name = PodName {
            name: label(POD_LABELS[0]),
            namespace: label(POD_LABELS[1]),
            uid: label(POD_LABELS[2]),
            attempt: 0,
        };
        let labels = labels.iter().filter(|(key, _)| known(key));
        Self {
            id,
            spec: PodSpec {
                name,
                hostname: String::new(),
                log_directory: PathBuf::new(),
                dns: None,
                port_mappings: Vec::new(),
                labels: labels
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect(),
                annotations: BTreeMap::new(),
                cgroup_parent: String::new(),
                sysctls: BTreeMap::new(),
                namespaces: PodNamespaces::default(),
                overhead: None,
                resources: None,
                security: PodSecurity::default(),
                runtime_handler: String::new(),
            },
            state: PodState::Stopping,
            created_at: 0,
            boot_id: String::new(),
            ips: Vec::new(),
            network: None,
            cgroup: parent.map(|path| Parent {
                path: path.to_owned(),
                made: Vec::new(),
            }),
            selinux: None,
            message: "the pod's record cannot be read".into(),
            unreadable: true,
        }
    }
}

/// What the kubelet labels a pod's sandbox and its containers with.
const POD_LABELS: [&str; 3] = [
    "io.kubernetes.pod.name",
    "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.uid",
];

impl Record for PodRecord {
    const KIND: &'static str = "pod";
    const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out_of_removing_and_nothing_back_to_ready() {
        let events = [
            PodEvent::Made,
            PodEvent::Stop,
            PodEvent::Stopped,
            PodEvent::Remove,
        ];
        for event in &events {
            assert!(matches!(
                PodState::Removing.on(event),
                None | Some(PodState::Removing)
            ));
            for state in [PodState::Ready, PodState::Stopping, PodState::Stopped] {
                assert_ne!(
                    state.on(event),
                    Some(PodState::Ready),
                    "{state:?} {event:?}"
                );
            }
        }
    }

    #[test]
    fn stop_is_allowed_in_every_state() {
        use PodState as S;
        for state in [S::Creating, S::Ready, S::Stopping, S::Stopped, S::Removing] {
            assert!(
                state
                    .on(&PodEvent::Stop)
                    .is_some_and(|next| !next.is_ready()),
                "{state:?}"
            );
        }
    }
}
