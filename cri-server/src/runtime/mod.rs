//! The CRI RuntimeService: one file per verb.

mod container_status;
mod create_container;
mod exec_sync;
mod find;
mod list_containers;
mod list_pod_sandbox;
mod pod_sandbox_status;
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

/// Streams that are not there yet.
type NoStream<T> = tokio_stream::Empty<Result<T, Status>>;

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

/// One that answers with a stream; the type is the trait's to name.
macro_rules! later_stream {
    ($self:ident, $method:literal, $item:ty) => {{
        let refused = later!($self, $method, ());
        refused.map(|_| Response::new(tokio_stream::empty::<Result<$item, Status>>()))
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

    type StreamPodSandboxesStream = NoStream<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        _request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        later_stream!(self, "StreamPodSandboxes", cri::StreamPodSandboxesResponse)
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

    type StreamContainersStream = NoStream<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        _request: Request<cri::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        later_stream!(self, "StreamContainers", cri::StreamContainersResponse)
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        read!(self, "ContainerStatus", |daemon| {
            container_status::container_status(&daemon, &request)?
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
        work!(self, "ExecSync", request, exec_sync::exec_sync)
    }

    async fn exec(
        &self,
        _request: Request<cri::ExecRequest>,
    ) -> Result<Response<cri::ExecResponse>, Status> {
        later!(self, "Exec", cri::ExecResponse)
    }

    async fn attach(
        &self,
        _request: Request<cri::AttachRequest>,
    ) -> Result<Response<cri::AttachResponse>, Status> {
        later!(self, "Attach", cri::AttachResponse)
    }

    async fn port_forward(
        &self,
        _request: Request<cri::PortForwardRequest>,
    ) -> Result<Response<cri::PortForwardResponse>, Status> {
        later!(self, "PortForward", cri::PortForwardResponse)
    }

    async fn container_stats(
        &self,
        _request: Request<cri::ContainerStatsRequest>,
    ) -> Result<Response<cri::ContainerStatsResponse>, Status> {
        later!(self, "ContainerStats", cri::ContainerStatsResponse)
    }

    async fn list_container_stats(
        &self,
        _request: Request<cri::ListContainerStatsRequest>,
    ) -> Result<Response<cri::ListContainerStatsResponse>, Status> {
        later!(self, "ListContainerStats", cri::ListContainerStatsResponse)
    }

    type StreamContainerStatsStream = NoStream<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        _request: Request<cri::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        later_stream!(
            self,
            "StreamContainerStats",
            cri::StreamContainerStatsResponse
        )
    }

    async fn pod_sandbox_stats(
        &self,
        _request: Request<cri::PodSandboxStatsRequest>,
    ) -> Result<Response<cri::PodSandboxStatsResponse>, Status> {
        later!(self, "PodSandboxStats", cri::PodSandboxStatsResponse)
    }

    async fn list_pod_sandbox_stats(
        &self,
        _request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Result<Response<cri::ListPodSandboxStatsResponse>, Status> {
        later!(
            self,
            "ListPodSandboxStats",
            cri::ListPodSandboxStatsResponse
        )
    }

    type StreamPodSandboxStatsStream = NoStream<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        _request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        later_stream!(
            self,
            "StreamPodSandboxStats",
            cri::StreamPodSandboxStatsResponse
        )
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<cri::UpdateRuntimeConfigResponse>, Status> {
        let request = request.into_inner();
        read!(self, "UpdateRuntimeConfig", |daemon| {
            update_runtime_config::update_runtime_config(&daemon, request)?
        })
    }

    async fn status(
        &self,
        request: Request<cri::StatusRequest>,
    ) -> Result<Response<cri::StatusResponse>, Status> {
        work!(self, "Status", request, status::status)
    }

    async fn checkpoint_container(
        &self,
        _request: Request<cri::CheckpointContainerRequest>,
    ) -> Result<Response<cri::CheckpointContainerResponse>, Status> {
        later!(
            self,
            "CheckpointContainer",
            cri::CheckpointContainerResponse
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

    type GetContainerEventsStream = NoStream<cri::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        later_stream!(self, "GetContainerEvents", cri::ContainerEventResponse)
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Result<Response<cri::ListMetricDescriptorsResponse>, Status> {
        later!(
            self,
            "ListMetricDescriptors",
            cri::ListMetricDescriptorsResponse
        )
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<cri::ListPodSandboxMetricsResponse>, Status> {
        later!(
            self,
            "ListPodSandboxMetrics",
            cri::ListPodSandboxMetricsResponse
        )
    }

    type StreamPodSandboxMetricsStream = NoStream<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        later_stream!(
            self,
            "StreamPodSandboxMetrics",
            cri::StreamPodSandboxMetricsResponse
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
        _request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<cri::UpdatePodSandboxResourcesResponse>, Status> {
        later!(
            self,
            "UpdatePodSandboxResources",
            cri::UpdatePodSandboxResourcesResponse
        )
    }
}
