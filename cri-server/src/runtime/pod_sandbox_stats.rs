//! PodSandboxStats, ListPodSandboxStats, StreamPodSandboxStats: what pods use, as
//! their cgroups and network namespaces have it.

use super::chunks::{Pieces, pieces};
use super::{container_stats, find};
use crate::convert::{filter, stats};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::ContainerState;
use berth_sandbox::pod::PodRecord;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::Status;

/// One pod; of one that is not ready only who it is.
pub async fn pod_sandbox_stats(
    daemon: Arc<Daemon>,
    request: cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, Status> {
    let pod = find::pod_record(&daemon.sandboxes.view(), &request.pod_sandbox_id)?;
    let stats = of(&daemon, vec![pod]).await?.pop();
    Ok(cri::PodSandboxStatsResponse { stats })
}

/// The ready pods that match.
pub async fn list_pod_sandbox_stats(
    daemon: Arc<Daemon>,
    request: cri::ListPodSandboxStatsRequest,
) -> Result<cri::ListPodSandboxStatsResponse, Status> {
    let stats = list(&daemon, request.filter).await?;
    Ok(cri::ListPodSandboxStatsResponse { stats })
}

/// The same in pieces.
pub async fn stream_pod_sandbox_stats(
    daemon: Arc<Daemon>,
    request: cri::StreamPodSandboxStatsRequest,
) -> Result<Pieces<cri::StreamPodSandboxStatsResponse>, Status> {
    let stats = list(&daemon, request.filter).await?;
    Ok(pieces(stats, |pod_sandbox_stats| {
        cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
    }))
}

async fn list(
    daemon: &Arc<Daemon>,
    wanted: Option<cri::PodSandboxStatsFilter>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    let wanted = wanted.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut pods: Vec<_> = view
        .pods()
        .filter(|pod| pod.state.is_ready() && filter::pod_stats(&wanted, pod))
        .cloned()
        .collect();
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    of(daemon, pods).await
}

async fn of(
    daemon: &Arc<Daemon>,
    pods: Vec<Arc<PodRecord>>,
) -> Result<Vec<cri::PodSandboxStats>, Status> {
    let view = daemon.sandboxes.view();
    let running: Vec<_> = pods
        .iter()
        .flat_map(|pod| view.containers_of(&pod.id))
        .filter(|container| matches!(container.state, ContainerState::Running { .. }))
        .cloned()
        .collect();
    let owners: Vec<String> = running.iter().map(|c| c.pod.to_string()).collect();
    let mut containers: HashMap<String, Vec<cri::ContainerStats>> = HashMap::new();
    for (pod, stats) in owners
        .into_iter()
        .zip(container_stats::of(daemon, running).await?)
    {
        containers.entry(pod).or_default().push(stats);
    }
    let sandboxes = daemon.sandboxes.clone();
    tokio::task::spawn_blocking(move || {
        let borrowed: Vec<&PodRecord> = pods.iter().map(|pod| &**pod).collect();
        let interfaces = sandboxes.interfaces(&borrowed);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        let each = pods.iter().zip(&interfaces).map(|(pod, interfaces)| {
            let sample = match pod.state.is_ready() {
                true => sandboxes.sample_pod(pod),
                false => None,
            };
            let containers = containers.remove(pod.id.as_str()).unwrap_or_default();
            stats::pod(pod, at, sample.as_ref(), interfaces, containers)
        });
        each.collect()
    })
    .await
    .map_err(|_| Status::internal("reading the cgroups broke off"))
}
