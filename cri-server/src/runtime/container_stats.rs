//! ContainerStats, ListContainerStats, StreamContainerStats: what containers use.

use super::chunks::{Pieces, pieces};
use super::find;
use crate::convert::{filter, stats};
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::{ContainerRecord, ContainerState};
use berth_sandbox::stats::Sample;
use std::sync::Arc;
use tonic::Status;

/// One container; without what it uses when it does not run.
pub async fn container_stats(
    daemon: Arc<Daemon>,
    request: cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, Status> {
    let container = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    let stats = of(&daemon, vec![container]).await?.pop();
    Ok(cri::ContainerStatsResponse { stats })
}

/// The running containers that match.
pub async fn list_container_stats(
    daemon: Arc<Daemon>,
    request: cri::ListContainerStatsRequest,
) -> Result<cri::ListContainerStatsResponse, Status> {
    let stats = list(&daemon, request.filter).await?;
    Ok(cri::ListContainerStatsResponse { stats })
}

/// The same in pieces.
pub async fn stream_container_stats(
    daemon: Arc<Daemon>,
    request: cri::StreamContainerStatsRequest,
) -> Result<Pieces<cri::StreamContainerStatsResponse>, Status> {
    let stats = list(&daemon, request.filter).await?;
    Ok(pieces(stats, |container_stats| {
        cri::StreamContainerStatsResponse { container_stats }
    }))
}

async fn list(
    daemon: &Arc<Daemon>,
    wanted: Option<cri::ContainerStatsFilter>,
) -> Result<Vec<cri::ContainerStats>, Status> {
    let wanted = wanted.unwrap_or_default();
    let view = daemon.sandboxes.view();
    let mut containers: Vec<_> = view
        .containers()
        .filter(|container| {
            matches!(container.state, ContainerState::Running { .. })
                && filter::container_stats(&wanted, container)
        })
        .cloned()
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    of(daemon, containers).await
}

/// The statistics of these containers, in their order.
pub async fn of(
    daemon: &Arc<Daemon>,
    containers: Vec<Arc<ContainerRecord>>,
) -> Result<Vec<cri::ContainerStats>, Status> {
    let ids: Vec<&str> = containers.iter().map(|c| c.id.as_str()).collect();
    let written = daemon.writable.of(&ids).await;
    let layers = daemon.writable.dir();
    let sandboxes = daemon.sandboxes.clone();
    tokio::task::spawn_blocking(move || {
        let each = containers.iter().map(|container| {
            let sample: Option<Sample> = sandboxes.sample_container(container);
            let written = written.get(container.id.as_str());
            stats::container(container, sample.as_ref(), written, &layers)
        });
        each.collect()
    })
    .await
    .map_err(|_| Status::internal("reading the cgroups broke off"))
}
