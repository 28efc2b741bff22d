//! What the running daemon says of itself.

use super::super::client;
use super::{Finding, Node};
use crate::rpc::chain;
use berth_proto::{admin_v1 as admin, runtime_v1 as cri};
use cri::runtime_service_client::RuntimeServiceClient;
use std::time::Duration;

/// How long each answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn answers(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "daemon";
    let mut findings = Vec::new();
    let asked = client::block_on(async {
        let channel = tokio::time::timeout(PATIENCE, client::connect(node.overrides)).await??;
        let mut runtime = RuntimeServiceClient::new(channel.clone());
        let asked = runtime.status(cri::StatusRequest::default());
        let status = tokio::time::timeout(PATIENCE, asked).await??.into_inner();
        findings.push(Finding::good(SUBJECT, "answers"));
        findings.extend(conditions(status.status.unwrap_or_default()));
        let mut service = client::admin(channel);
        let asked = service.operations(admin::OperationsRequest {});
        let left = tokio::time::timeout(PATIENCE, asked).await??.into_inner();
        findings.extend(left.pending.iter().map(|pending| {
            Finding::warning(
                "left over",
                format!(
                    "{}: {}, tried {} times: {}",
                    pending.subject, pending.what, pending.attempts, pending.last_error
                ),
                "",
            )
        }));
        Ok(())
    });
    if let Err(error) = asked {
        findings.push(Finding::warning(
            SUBJECT,
            chain(&*error),
            "start `berth serve`",
        ));
    }
    findings
}

fn conditions(status: cri::RuntimeStatus) -> impl Iterator<Item = Finding> {
    status.conditions.into_iter().map(|condition| {
        let subject = match condition.r#type.as_str() {
            "NetworkReady" => "network",
            _ => "runtime",
        };
        if condition.status {
            Finding::good(subject, "ready")
        } else {
            Finding::problem(
                subject,
                format!("{}: {}", condition.reason, condition.message),
                "pods do not start until it is ready",
            )
        }
    })
}
