//! What `berth status` and `berth image` ask, on the same socket as CRI.

pub mod explain;
mod images;

use crate::daemon::Daemon;
use crate::rpc::to_the_end;
use berth_proto::admin_v1 as admin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::{Request, Response, Status, Streaming, async_trait};

/// The service on the socket.
pub struct Admin {
    daemon: Arc<Daemon>,
}

impl Admin {
    /// The service of this daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[async_trait]
impl admin::admin_server::Admin for Admin {
    async fn operations(
        &self,
        _request: Request<admin::OperationsRequest>,
    ) -> Result<Response<admin::OperationsResponse>, Status> {
        let daemon = self.daemon.clone();
        let work = async move {
            let operation = |info: berth_sandbox::operation::OperationInfo| admin::Operation {
                kind: info.kind.to_owned(),
                subject: info.subject,
                stage: info.stage.to_owned(),
                started_at: nanoseconds(info.started_at),
                stage_started_at: nanoseconds(info.stage_started_at),
                callers: info.callers,
            };
            let mut operations: Vec<_> = daemon
                .sandboxes
                .operations()
                .into_iter()
                .map(operation)
                .collect();
            operations.extend(daemon.images.pulls());
            operations.sort_by_key(|operation| operation.started_at);
            let pending = |info: berth_sandbox::service::PendingInfo| admin::Pending {
                subject: info.subject,
                what: info.what.to_owned(),
                last_error: info.last_error,
                attempts: info.attempts,
            };
            let pending = daemon
                .sandboxes
                .pending()
                .into_iter()
                .map(pending)
                .collect();
            Ok(admin::OperationsResponse {
                operations,
                pending,
            })
        };
        to_the_end(&self.daemon.metrics, "Operations", work).await
    }

    async fn explain_pull(
        &self,
        request: Request<admin::ExplainPullRequest>,
    ) -> Result<Response<admin::ExplainPullResponse>, Status> {
        let work = explain::explain_pull(self.daemon.clone(), request.into_inner());
        to_the_end(&self.daemon.metrics, "ExplainPull", work).await
    }

    async fn pull_progress(
        &self,
        request: Request<admin::PullProgressRequest>,
    ) -> Result<Response<admin::PullProgressResponse>, Status> {
        let daemon = self.daemon.clone();
        let work = async move { Ok(images::progress(&daemon, &request.into_inner())) };
        to_the_end(&self.daemon.metrics, "PullProgress", work).await
    }

    async fn import_images(
        &self,
        request: Request<Streaming<admin::ImportImagesRequest>>,
    ) -> Result<Response<admin::ImportImagesResponse>, Status> {
        let work = images::import(self.daemon.clone(), request.into_inner());
        to_the_end(&self.daemon.metrics, "ImportImages", work).await
    }

    type ExportImagesStream = images::Answers<admin::ExportImagesResponse>;

    async fn export_images(
        &self,
        request: Request<admin::ExportImagesRequest>,
    ) -> Result<Response<Self::ExportImagesStream>, Status> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        let work = async move { Ok(images::export(daemon, request)) };
        to_the_end(&self.daemon.metrics, "ExportImages", work).await
    }

    async fn prune_images(
        &self,
        request: Request<admin::PruneImagesRequest>,
    ) -> Result<Response<admin::PruneImagesResponse>, Status> {
        let work = images::prune(self.daemon.clone(), request.into_inner());
        to_the_end(&self.daemon.metrics, "PruneImages", work).await
    }

    type VerifyImagesStream = images::Answers<admin::VerifyImagesResponse>;

    async fn verify_images(
        &self,
        request: Request<admin::VerifyImagesRequest>,
    ) -> Result<Response<Self::VerifyImagesStream>, Status> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        let work = async move { Ok(images::verify(daemon, request)) };
        to_the_end(&self.daemon.metrics, "VerifyImages", work).await
    }
}
