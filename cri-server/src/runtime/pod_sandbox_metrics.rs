//! ListMetricDescriptors, ListPodSandboxMetrics, StreamPodSandboxMetrics.

use super::chunks::{Pieces, pieces};
use crate::daemon::Daemon;
use crate::pod_metrics::{self, FileSystem};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::ContainerState;
use berth_sandbox::pod::PodRecord;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::Status;

/// Every metric that may come.
pub fn list_metric_descriptors() -> cri::ListMetricDescriptorsResponse {
    cri::ListMetricDescriptorsResponse {
        descriptors: pod_metrics::descriptors(),
    }
}

/// Of every ready pod, and its running containers.
pub async fn list_pod_sandbox_metrics(
    daemon: Arc<Daemon>,
    _request: cri::ListPodSandboxMetricsRequest,
) -> Result<cri::ListPodSandboxMetricsResponse, Status> {
    let pod_metrics = collect(&daemon).await?;
    Ok(cri::ListPodSandboxMetricsResponse { pod_metrics })
}

/// The same in pieces.
pub async fn stream_pod_sandbox_metrics(
    daemon: Arc<Daemon>,
    _request: cri::StreamPodSandboxMetricsRequest,
) -> Result<Pieces<cri::StreamPodSandboxMetricsResponse>, Status> {
    let metrics = collect(&daemon).await?;
    Ok(pieces(metrics, |pod_sandbox_metrics| {
        cri::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }
    }))
}

async fn collect(daemon: &Arc<Daemon>) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
    let view = daemon.sandboxes.view();
    let running: Vec<&str> = view
        .containers()
        .filter(|container| matches!(container.state, ContainerState::Running { .. }))
        .map(|container| container.id.as_str())
        .collect();
    let written = daemon.writable.of(&running).await;
    let file_system = FileSystem::of(&daemon.writable.dir());
    let sandboxes = daemon.sandboxes.clone();
    let view = view.clone();
    tokio::task::spawn_blocking(move || {
        let mut pods: Vec<&PodRecord> = view
            .pods()
            .filter(|pod| pod.state.is_ready())
            .map(|pod| &**pod)
            .collect();
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
        let interfaces = sandboxes.interfaces(&pods);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let at = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        let each = pods.iter().zip(&interfaces).map(|(pod, interfaces)| {
            let containers = view.containers_of(&pod.id).filter_map(|container| {
                let sample = sandboxes.sample_container(container)?;
                let written = written.get(container.id.as_str());
                Some(cri::ContainerMetrics {
                    container_id: container.id.to_string(),
                    metrics: pod_metrics::container(pod, container, &sample, written, file_system),
                })
            });
            cri::PodSandboxMetrics {
                pod_sandbox_id: pod.id.to_string(),
                metrics: pod_metrics::pod(pod, at, interfaces),
                container_metrics: containers.collect(),
            }
        });
        each.collect()
    })
    .await
    .map_err(|_| Status::internal("reading the cgroups broke off"))
}
