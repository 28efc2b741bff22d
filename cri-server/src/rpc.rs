//! What every RPC has in common: a span, a measurement, and work that runs to
//! its end whatever becomes of the caller.

use crate::convert::{Field, Refused};
use crate::metrics::{Metrics, code_name};
use berth_sandbox::error::{Kind, SandboxError};
use std::future::Future;
use std::time::Instant;
use tonic::{Code, Response, Status};
use tracing::Instrument as _;

/// Longest message in either direction, in bytes. Source: the kubelet's own bound
/// (maxMsgSize, k8s.io/cri-client).
pub const MESSAGE_BYTES: usize = 16 << 20;

/// Runs `work` to its end, also when the caller hangs up: what is half done when
/// a kubelet times out would have to be undone, and its retry done again. A panic
/// becomes INTERNAL and ends nothing else.
pub async fn to_the_end<T: Send + 'static>(
    metrics: &Metrics,
    method: &'static str,
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let metrics = metrics.clone();
    let span = tracing::info_span!("rpc", method);
    let begun = Instant::now();
    let inside = async move {
        // A task of its own inside the one that measures, so that a panic is measured too.
        let outcome = match tokio::spawn(work.in_current_span()).await {
            Ok(outcome) => outcome,
            Err(broken) => {
                tracing::error!(error = %broken, "the handler panicked");
                Err(Status::internal(format!(
                    "{method} broke off: a bug in Berth, see its log"
                )))
            }
        };
        let took = begun.elapsed();
        match &outcome {
            Ok(_) => tracing::debug!(?took, "done"),
            Err(status) => {
                let (code, message) = (code_name(status.code()), status.message());
                if matches!(status.code(), Code::NotFound | Code::Unimplemented) {
                    tracing::debug!(?took, code, message, "refused");
                } else {
                    tracing::info!(?took, code, message, "failed");
                }
            }
        }
        metrics.rpc(
            method,
            took,
            outcome.as_ref().map_or_else(Status::code, |_| Code::Ok),
        );
        outcome
    };
    match tokio::spawn(inside.instrument(span)).await {
        Ok(outcome) => outcome.map(Response::new),
        Err(_) => Err(Status::internal(format!(
            "{method} was cut off: the daemon is stopping"
        ))),
    }
}

/// An RPC that this version does not have.
pub fn not_yet(method: &'static str) -> Status {
    Status::unimplemented(format!(
        "{method} is not in Berth {} yet",
        env!("CARGO_PKG_VERSION")
    ))
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        let code = match refused {
            Refused::Invalid { .. } => Code::InvalidArgument,
            Refused::Unsupported { .. } => Code::Unimplemented,
        };
        Status::new(code, refused.to_string())
    }
}

/// The one place that picks a gRPC code for what `sandbox` says.
pub fn status(error: &SandboxError) -> Status {
    let code = match error.kind() {
        Kind::PodNotFound | Kind::ContainerNotFound => Code::NotFound,
        Kind::Invalid => Code::InvalidArgument,
        // Not NOT_FOUND: to the kubelet that means the container itself.
        Kind::WrongState | Kind::Missing => Code::FailedPrecondition,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Unsupported => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    };
    Status::new(code, error.chain())
}

/// An error and its causes, joined by ": ". A library's error that repeats its
/// cause in its own text is not repeated once more.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

/// Seconds of a request; negative is refused.
pub fn seconds(field: &Field<'_>, value: i64) -> Result<std::time::Duration, Refused> {
    u64::try_from(value)
        .map(std::time::Duration::from_secs)
        .map_err(|_| field.invalid(format!("{value} is negative")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::watch;

    #[tokio::test]
    async fn a_panic_becomes_internal() {
        let metrics = Metrics::new().unwrap();
        let status = to_the_end::<()>(&metrics, "Version", async { panic!("on purpose") })
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert!(
            status.message().starts_with("Version broke off"),
            "{status:?}"
        );
    }

    #[tokio::test]
    async fn the_work_of_a_caller_that_hung_up_runs_to_its_end() {
        let metrics = Metrics::new().unwrap();
        let (go, mut gate) = watch::channel(false);
        let (done, mut finished) = watch::channel(false);
        {
            let call = to_the_end(&metrics, "StopPodSandbox", async move {
                gate.wait_for(|open| *open).await.unwrap();
                done.send_replace(true);
                Ok(())
            });
            tokio::select! {
                biased;
                _ = call => panic!("finished before it was let go"),
                () = tokio::task::yield_now() => {}
            }
        }
        go.send_replace(true);
        finished.wait_for(|done| *done).await.unwrap();
    }
}
