//! ExplainPull: what a pull would do.

use crate::daemon::Daemon;
use berth_image_service::explain::{self, Explanation, HostExplanation};
use berth_proto::admin_v1 as admin;
use std::sync::Arc;
use tonic::Status;

/// Asks every host for the manifest's head and fetches nothing.
pub async fn explain_pull(
    daemon: Arc<Daemon>,
    request: admin::ExplainPullRequest,
) -> Result<admin::ExplainPullResponse, Status> {
    let service = daemon.images.service().clone();
    let of_policy = service.clone();
    let policy = tokio::task::spawn_blocking(move || of_policy.policy())
        .await
        .map_err(|_| Status::internal("reading the policy broke off"))?;
    let found = explain::explain(service.registries(), policy, &request.image, None).await;
    Ok(to_proto(found))
}

/// The service's own words as a message.
pub fn to_proto(explanations: Vec<Explanation>) -> admin::ExplainPullResponse {
    let host = |host: HostExplanation| admin::HostExplanation {
        url: host.url,
        capabilities: host.capabilities,
        said_by: host.said_by,
        tls: host.tls,
        proxy: host.proxy,
        credentials: host.credentials,
        aside: host.aside,
        answer: host.answer,
    };
    let references = explanations
        .into_iter()
        .map(|explanation| admin::PullExplanation {
            reference: explanation.reference,
            because: explanation.because,
            policy: explanation.policy,
            problem: explanation.problem,
            hosts: explanation.hosts.into_iter().map(host).collect(),
        })
        .collect();
    admin::ExplainPullResponse { references }
}
