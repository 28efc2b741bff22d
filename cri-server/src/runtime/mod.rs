//! The CRI RuntimeService: one file per verb.

mod attach;
mod checkpoint_container;
pub mod chunks;
mod container_stats;
mod container_status;
mod create_container;
mod exec;
mod exec_sync;
mod find;
mod get_container_events;
mod image_policy;
mod list_containers;
mod list_pod_sandbox;
mod pod_sandbox_metrics;
mod pod_sandbox_stats;
mod pod_sandbox_status;
mod port_forward;
mod remove_container;
mod remove_pod_sandbox;
mod reopen_container_log;
mod run_pod_sandbox;
mod runtime_config;
mod start_container;
mod status;
mod stop_container;
mod stop_pod_sandbox;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;
mod version;

use crate::daemon::Daemon;
use crate::rpc::{not_yet, to_the_end};
use berth_proto::runtime_v1 as cri;
use cri::runtime_service_server::RuntimeService;
use std::sync::Arc;
use tonic::{Request, Response, Status, async_trait};

/// The service on the socket.
pub struct Runtime {
    daemon: Arc<Daemon>,
}

impl Runtime {
    /// The service of this daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

/// Methods whose module has an async function of the method's arguments.
macro_rules! work {
    ($self:ident, $method:literal, $request:ident, $function:path) => {{
        let daemon = $self.daemon.clone();
        let work = $function(daemon, $request.into_inner());
        to_the_end(&$self.daemon.metrics, $method, work).await
    }};
}

/// Methods that only read the snapshot.
macro_rules! read {
    ($self:ident, $method:literal, |$daemon:ident| $answer:expr) => {{
        let $daemon = $self.daemon.clone();
        to_the_end(&$self.daemon.metrics, $method, async move { Ok($answer) }).await
    }};
}

/// Methods of later versions: they are measured, and name themselves.
macro_rules! later {
    ($self:ident, $method:literal, $answer:ty) => {{
        let refusal = async { Err::<$answer, Status>(not_yet($method)) };
        to_the_end(&$self.daemon.metrics, $method, refusal).await
    }};
}

#[async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _request: Request<cri::VersionRequest>,
    ) -> Result<Response<cri::VersionResponse>, Status> {
        read!(self, "Version", |_daemon| version::version())
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Result<Response<cri::RunPodSandboxResponse>, Status> {
        work!(
            self,
            "RunPodSandbox",
            request,
            run_pod_sandbox::run_pod_sandbox
        )
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Result<Response<cri::StopPodSandboxResponse>, Status> {
        work!(
            self,
            "StopPodSandbox",
            request,
            stop_pod_sandbox::stop_pod_sandbox
        )
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Result<Response<cri::RemovePodSandboxResponse>, Status> {
        work!(
            self,
            "RemovePodSandbox",
            request,
            remove_pod_sandbox::remove_pod_sandbox
        )
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Result<Response<cri::PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        read!(self, "PodSandboxStatus", |daemon| {
            pod_sandbox_status::pod_sandbox_status(&daemon, &request)?
        })
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Result<Response<cri::ListPodSandboxResponse>, Status> {
        let request = request.into_inner();
        read!(self, "ListPodSandbox", |daemon| {
            list_pod_sandbox::list_pod_sandbox(&daemon, request)
        })
    }

    type StreamPodSandboxesStream = chunks::Pieces<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let request = request.into_inner();
        read!(self, "StreamPodSandboxes", |daemon| {
            list_pod_sandbox::stream_pod_sandboxes(&daemon, request)
        })
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Result<Response<cri::CreateContainerResponse>, Status> {
        work!(
            self,
            "CreateContainer",
            request,
            create_container::create_container
        )
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Result<Response<cri::StartContainerResponse>, Status> {
        work!(
            self,
            "StartContainer",
            request,
            start_container::start_container
        )
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Result<Response<cri::StopContainerResponse>, Status> {
        work!(
            self,
            "StopContainer",
            request,
            stop_container::stop_container
        )
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Result<Response<cri::RemoveContainerResponse>, Status> {
        work!(
            self,
            "RemoveContainer",
            request,
            remove_container::remove_container
        )
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Result<Response<cri::ListContainersResponse>, Status> {
        let request = request.into_inner();
        read!(self, "ListContainers", |daemon| {
            list_containers::list_containers(&daemon, request)
        })
    }

    type StreamContainersStream = chunks::Pieces<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let request = request.into_inner();
        read!(self, "StreamContainers", |daemon| {
            list_containers::stream_containers(&daemon, request)
        })
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        read!(self, "ContainerStatus", |daemon| {
            container_status::container_status(&daemon, &request).await?
        })
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Result<Response<cri::UpdateContainerResourcesResponse>, Status> {
        work!(
            self,
            "UpdateContainerResources",
            request,
            update_container_resources::update_container_resources
        )
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Result<Response<cri::ReopenContainerLogResponse>, Status> {
        work!(
            self,
            "ReopenContainerLog",
            request,
            reopen_container_log::reopen_container_log
        )
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Result<Response<cri::ExecSyncResponse>, Status> {
        // Dropped with this future when the caller hangs up.
        let (_here, caller) = tokio::sync::oneshot::channel();
        let work = exec_sync::exec_sync(self.daemon.clone(), request.into_inner(), caller);
        to_the_end(&self.daemon.metrics, "ExecSync", work).await
    }

    async fn exec(
        &self,
        request: Request<cri::ExecRequest>,
    ) -> Result<Response<cri::ExecResponse>, Status> {
        let request = request.into_inner();
        read!(self, "Exec", |daemon| exec::exec(&daemon, request)?)
    }

    async fn attach(
        &self,
        request: Request<cri::AttachRequest>,
    ) -> Result<Response<cri::AttachResponse>, Status> {
        let request = request.into_inner();
        read!(self, "Attach", |daemon| attach::attach(&daemon, &request)?)
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Result<Response<cri::PortForwardResponse>, Status> {
        let request = request.into_inner();
        read!(self, "PortForward", |daemon| port_forward::port_forward(
            &daemon, &request
        )?)
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Result<Response<cri::ContainerStatsResponse>, Status> {
        work!(
            self,
            "ContainerStats",
            request,
            container_stats::container_stats
        )
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Result<Response<cri::ListContainerStatsResponse>, Status> {
        work!(
            self,
            "ListContainerStats",
            request,
            container_stats::list_container_stats
        )
    }

    type StreamContainerStatsStream = chunks::Pieces<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        work!(
            self,
            "StreamContainerStats",
            request,
            container_stats::stream_container_stats
        )
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Result<Response<cri::PodSandboxStatsResponse>, Status> {
        work!(
            self,
            "PodSandboxStats",
            request,
            pod_sandbox_stats::pod_sandbox_stats
        )
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Result<Response<cri::ListPodSandboxStatsResponse>, Status> {
        work!(
            self,
            "ListPodSandboxStats",
            request,
            pod_sandbox_stats::list_pod_sandbox_stats
        )
    }

    type StreamPodSandboxStatsStream = chunks::Pieces<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        work!(
            self,
            "StreamPodSandboxStats",
            request,
            pod_sandbox_stats::stream_pod_sandbox_stats
        )
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<cri::UpdateRuntimeConfigResponse>, Status> {
        work!(
            self,
            "UpdateRuntimeConfig",
            request,
            update_runtime_config::update_runtime_config
        )
    }

    async fn status(
        &self,
        request: Request<cri::StatusRequest>,
    ) -> Result<Response<cri::StatusResponse>, Status> {
        work!(self, "Status", request, status::status)
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Result<Response<cri::CheckpointContainerResponse>, Status> {
        work!(
            self,
            "CheckpointContainer",
            request,
            checkpoint_container::checkpoint_container
        )
    }

    async fn checkpoint_pod(
        &self,
        _request: Request<cri::CheckpointPodRequest>,
    ) -> Result<Response<cri::CheckpointPodResponse>, Status> {
        later!(self, "CheckpointPod", cri::CheckpointPodResponse)
    }

    async fn restore_pod(
        &self,
        _request: Request<cri::RestorePodRequest>,
    ) -> Result<Response<cri::RestorePodResponse>, Status> {
        later!(self, "RestorePod", cri::RestorePodResponse)
    }

    type GetContainerEventsStream = get_container_events::Events;

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        read!(self, "GetContainerEvents", |daemon| {
            get_container_events::get_container_events(&daemon)
        })
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Result<Response<cri::ListMetricDescriptorsResponse>, Status> {
        read!(self, "ListMetricDescriptors", |_daemon| {
            pod_sandbox_metrics::list_metric_descriptors()
        })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<cri::ListPodSandboxMetricsResponse>, Status> {
        work!(
            self,
            "ListPodSandboxMetrics",
            request,
            pod_sandbox_metrics::list_pod_sandbox_metrics
        )
    }

    type StreamPodSandboxMetricsStream = chunks::Pieces<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        work!(
            self,
            "StreamPodSandboxMetrics",
            request,
            pod_sandbox_metrics::stream_pod_sandbox_metrics
        )
    }

    async fn runtime_config(
        &self,
        _request: Request<cri::RuntimeConfigRequest>,
    ) -> Result<Response<cri::RuntimeConfigResponse>, Status> {
        read!(self, "RuntimeConfig", |daemon| {
            runtime_config::runtime_config(&daemon)
        })
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<cri::UpdatePodSandboxResourcesResponse>, Status> {
        work!(
            self,
            "UpdatePodSandboxResources",
            request,
            update_pod_sandbox_resources::update_pod_sandbox_resources
        )
    }
}
