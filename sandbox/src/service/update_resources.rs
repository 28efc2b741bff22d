//! UpdateContainerResources and UpdatePodSandboxResources.
//!
//! All or nothing: the kernel's files first, then the record; where either
//! refuses, both are as they were. After a crash in between the record has the
//! old limits and the kernel may have the new ones; the kubelet, which compares
//! the record with what it wants, sends them again.

use super::{Inner, Sandboxes, blocking, internal};
use crate::cgroup;
use crate::container::{ContainerRecord, ContainerState};
use crate::container_spec::{HugepageLimit, Resources};
use crate::error::{Kind, Result, SandboxError};
use crate::operation::lock;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex};

/// Where the kubelet says on cgroup v2 how much swap a container may have.
///
/// Source: KEP-2400.
const RAW_SWAP: &str = "memory.swap.max";

/// One update of a container at a time; those of different containers do not wait
/// for each other.
#[derive(Default)]
pub(super) struct Updates(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Updates {
    async fn turn(&self, id: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = lock(&self.0).entry(id.to_owned()).or_default().clone();
        turn.lock_owned().await
    }

    /// Forgets those that nobody holds or waits for.
    fn tidy(&self) {
        lock(&self.0).retain(|_, turn| Arc::strong_count(turn) > 1);
    }
}

impl Sandboxes {
    /// Changes the limits of a container that are given and leaves the others.
    ///
    /// # Errors
    /// `ContainerNotFound`; `WrongState` when it has ended, or when a memory limit is below
    /// what it uses; `Unsupported` for what this host cannot limit. Nothing has changed then.
    pub async fn update_container_resources(&self, id: &str, given: Resources) -> Result<()> {
        let container = self.0.container(id)?;
        let subject = container.spec.name.name.clone();
        // A call that asks for the same may wait for this one's outcome; another may not.
        let mut hasher = DefaultHasher::new();
        format!("{given:?}").hash(&mut hasher);
        let object = format!("{id} {:016x}", hasher.finish());
        self.0
            .operation(
                "UpdateContainerResources",
                object,
                subject,
                |me, stage| async move {
                    stage.enter("turn");
                    let turn = me.updates.turn(container.id.as_str()).await;
                    // Its cgroup may be about to be made.
                    me.launched(&container.id).await;
                    stage.enter("update");
                    let outcome = me.update_container_resources(&container, given).await;
                    drop(turn);
                    me.updates.tidy();
                    outcome.map(|()| String::new())
                },
            )
            .await
            .map(drop)
    }

    /// Keeps what the kubelet has set a pod's own cgroup to.
    ///
    /// # Errors
    /// `PodNotFound`, or the record cannot be written.
    pub async fn update_pod_resources(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<()> {
        let pod = self.0.pod(id)?;
        let me = self.0.clone();
        blocking(move || {
            me.objects
                .update_pod(&pod.id, |pod| {
                    if overhead.is_some() {
                        pod.spec.overhead = overhead;
                    }
                    if resources.is_some() {
                        pod.spec.resources = resources;
                    }
                    Ok(())
                })
                .map(drop)
        })
        .await
    }
}

impl Inner {
    async fn update_container_resources(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        given: Resources,
    ) -> Result<()> {
        let (me, id) = (self.clone(), container.id.clone());
        blocking(move || {
            let view = me.objects.view();
            let container = view
                .container(id.as_str())
                .ok_or_else(|| SandboxError::no_container(id.as_str()))?;
            let running = match &container.state {
                ContainerState::Created => false,
                ContainerState::Starting | ContainerState::Running { .. } => true,
                ContainerState::Creating
                | ContainerState::Exited { .. }
                | ContainerState::Removing { .. } => {
                    let text = format!("container {id} has ended: it has no limits to change");
                    return Err(SandboxError::new(Kind::WrongState, text));
                }
            };
            let (merged, change) = merge(&container.spec.resources, given, running);
            let done = match &container.cgroup {
                Some(cgroup) => Some(
                    me.cgroups
                        .update(cgroup, &change, &merged)
                        .map_err(|error| refused(&id, error))?,
                ),
                None => None,
            };
            let kept = me.objects.update_container(&id, |container| {
                if !matches!(
                    container.state,
                    ContainerState::Created
                        | ContainerState::Starting
                        | ContainerState::Running { .. }
                ) {
                    let text = format!("container {id} ended while its limits were changed");
                    return Err(SandboxError::new(Kind::WrongState, text));
                }
                container.spec.resources = merged;
                Ok(())
            });
            match kept {
                Ok(_) => Ok(()),
                Err(error) => {
                    if let Some(journal) = done
                        && let Err(stays) = journal.roll_back()
                    {
                        tracing::warn!(container = %id, error = &stays as &dyn std::error::Error,
                            "limits that could not be recorded stay in force");
                    }
                    Err(error)
                }
            }
        })
        .await
    }
}

fn refused(id: &crate::ContainerId, error: cgroup::Error) -> SandboxError {
    let kind = match &error {
        // Later it may fit: the kubelet tries again.
        cgroup::Error::BelowUsage { .. } => Kind::WrongState,
        cgroup::Error::NoController { .. } | cgroup::Error::UnifiedOnV1 { .. } => Kind::Unsupported,
        cgroup::Error::BadUnifiedKey { .. }
        | cgroup::Error::BadPageSize { .. }
        | cgroup::Error::SwapBelowMemory { .. }
        | cgroup::Error::SwapWithoutMemory => Kind::Invalid,
        // The kernel says so of values: processors there are none of, a quota above the pod's.
        cgroup::Error::Write { source, .. }
            if matches!(
                source.kind(),
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::PermissionDenied
            ) || source.raw_os_error() == Some(rustix::io::Errno::RANGE.raw_os_error()) =>
        {
            Kind::Invalid
        }
        _ => Kind::Internal,
    };
    let text = format!("cannot change the limits of container {id}; all are as they were");
    match kind {
        Kind::Internal => internal(text)(error),
        kind => SandboxError::caused(kind, text, error),
    }
}

/// The limits that hold afterwards, and the part of them to be written.
///
/// CRI says "leave it" by 0 and by absence. A memory limit without a word on swap keeps the
/// swap there is beside it, whichever of its two ways said how much. The OOM score belongs to processes, which have it from their start.
fn merge(old: &Resources, given: Resources, running: bool) -> (Resources, Resources) {
    let mut change = given;
    if let (Some(memory @ 1..), None) = (change.memory_limit_bytes, change.memory_swap_limit_bytes)
    {
        change.memory_swap_limit_bytes = match (old.memory_limit_bytes, old.memory_swap_limit_bytes)
        {
            (_, Some(..0)) => Some(-1),
            (Some(before @ 1..), Some(sum)) => Some(memory + (sum - before).max(0)),
            (_, _) => None,
        };
    }
    let raw_swap = old.unified.get_key_value(RAW_SWAP);
    if let (Some(_), None, Some((file, value))) = (
        change.memory_limit_bytes,
        change.memory_swap_limit_bytes,
        raw_swap,
    ) {
        let file = change.unified.entry(file.clone());
        file.or_insert_with(|| value.clone());
    }
    let mut hugepages: Vec<HugepageLimit> = old.hugepages.clone();
    for limit in &change.hugepages {
        match hugepages
            .iter_mut()
            .find(|known| known.page_size == limit.page_size)
        {
            Some(known) => known.limit_bytes = limit.limit_bytes,
            None => hugepages.push(limit.clone()),
        }
    }
    let text = |new: &String, old: &String| if new.is_empty() { old } else { new }.clone();
    let mut unified = old.unified.clone();
    unified.extend(change.unified.clone());
    let merged = Resources {
        cpu_period: change.cpu_period.or(old.cpu_period),
        cpu_quota: change.cpu_quota.or(old.cpu_quota),
        cpu_shares: change.cpu_shares.or(old.cpu_shares),
        memory_limit_bytes: change.memory_limit_bytes.or(old.memory_limit_bytes),
        memory_swap_limit_bytes: change
            .memory_swap_limit_bytes
            .or(old.memory_swap_limit_bytes),
        oom_score_adj: match running {
            true => old.oom_score_adj,
            false => change.oom_score_adj.or(old.oom_score_adj),
        },
        cpuset_cpus: text(&change.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(&change.cpuset_mems, &old.cpuset_mems),
        pids_limit: change.pids_limit.or(old.pids_limit),
        hugepages,
        unified,
    };
    (merged, change)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(limit: Option<i64>, swap: Option<i64>) -> Resources {
        Resources {
            memory_limit_bytes: limit,
            memory_swap_limit_bytes: swap,
            ..Resources::default()
        }
    }

    #[test]
    fn what_is_not_given_stays() {
        let old = Resources {
            cpu_shares: Some(512),
            cpu_quota: Some(20_000),
            cpuset_cpus: "0".into(),
            oom_score_adj: Some(900),
            ..memory(Some(64), None)
        };
        let given = Resources {
            cpu_quota: Some(-1),
            oom_score_adj: Some(100),
            ..Resources::default()
        };
        let (merged, change) = merge(&old, given.clone(), true);
        assert_eq!(change, given);
        assert_eq!(
            merged,
            Resources {
                cpu_quota: Some(-1),
                ..old.clone()
            }
        );
        assert_eq!(merge(&old, given, false).0.oom_score_adj, Some(100));
    }

    #[test]
    fn the_swap_beside_a_new_memory_limit_is_what_it_was() {
        for (old, given, sum) in [
            ((Some(64), None), (Some(128), None), None),
            ((Some(64), Some(64)), (Some(128), None), Some(128)),
            ((Some(64), Some(96)), (Some(128), None), Some(160)),
            ((Some(64), Some(-1)), (Some(128), None), Some(-1)),
            ((Some(64), Some(96)), (Some(128), Some(128)), Some(128)),
        ] {
            let (merged, _) = merge(&memory(old.0, old.1), memory(given.0, given.1), true);
            assert_eq!(merged.memory_swap_limit_bytes, sum, "{old:?} {given:?}");
            assert_eq!(merged.memory_limit_bytes, given.0);
        }
    }

    #[test]
    fn a_new_memory_limit_leaves_swap_that_was_given_as_a_raw_file() {
        let swap = |value: &str| [(RAW_SWAP.to_owned(), value.to_owned())].into();
        let old = Resources {
            unified: swap("1024"),
            ..memory(Some(64), None)
        };
        // Else the write of a limit without a word on swap would be "none".
        let (_, change) = merge(&old, memory(Some(128), None), true);
        assert_eq!(change.unified, swap("1024"));
        let (_, change) = merge(&old, memory(Some(128), Some(128)), true);
        assert!(change.unified.is_empty());
        let given = Resources {
            unified: swap("2048"),
            ..memory(Some(128), None)
        };
        assert_eq!(merge(&old, given, true).1.unified, swap("2048"));
        let (_, change) = merge(&old, memory(None, None), true);
        assert!(change.unified.is_empty());
    }

    #[test]
    fn huge_pages_and_raw_files_are_merged_by_name() {
        let huge = |size: &str, limit_bytes| HugepageLimit {
            page_size: size.into(),
            limit_bytes,
        };
        let old = Resources {
            hugepages: vec![huge("2MB", 1), huge("1GB", 2)],
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        };
        let given = Resources {
            hugepages: vec![huge("1GB", 3), huge("64KB", 4)],
            unified: [("memory.low".to_owned(), "2".to_owned())].into(),
            ..Resources::default()
        };
        let (merged, _) = merge(&old, given, true);
        assert_eq!(
            merged.hugepages,
            [huge("2MB", 1), huge("1GB", 3), huge("64KB", 4)]
        );
        assert_eq!(merged.unified.len(), 2);
    }
}
