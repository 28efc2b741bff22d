//! What Prometheus is shown.
//!
//! Labels are small closed sets: methods, gRPC codes, stages, states; never IDs
//! or names. Gauges of pods and containers are read from the view when asked.

use berth_proto::runtime_v1 as cri;
use berth_sandbox::service::LogTotals;
use berth_sandbox::view::View;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;

/// Buckets for what should take milliseconds and must not take minutes, in seconds.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0,
];

/// Every family, and the registry they are in. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<Families>);

struct Families {
    registry: Registry,
    rpc_seconds: HistogramVec,
    rpc_errors: IntCounterVec,
    stage_seconds: HistogramVec,
    pull_seconds: Histogram,
    pulls: IntCounterVec,
    pull_bytes: IntCounter,
    events_missed: IntCounter,
    log_lines: IntCounter,
    log_bytes: IntCounter,
    log_dropped_lines: IntCounter,
    log_dropped_bytes: IntCounter,
    pods: IntGaugeVec,
    containers: IntGaugeVec,
}

impl Metrics {
    /// All families at zero.
    ///
    /// # Errors
    /// Two families of one name: a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let seconds =
            |name: &str, help: &str| HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        let build_info = IntGaugeVec::new(
            Opts::new("berth_build_info", "1, with the version as a label."),
            &["version"],
        )?;
        build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        registry.register(Box::new(build_info))?;
        let families = Families {
            rpc_seconds: HistogramVec::new(
                seconds(
                    "berth_rpc_duration_seconds",
                    "How long RPCs took until their work was done.",
                ),
                &["method"],
            )?,
            rpc_errors: IntCounterVec::new(
                Opts::new(
                    "berth_rpc_errors_total",
                    "RPCs that ended with an error, by gRPC code.",
                ),
                &["method", "code"],
            )?,
            stage_seconds: HistogramVec::new(
                seconds(
                    "berth_operation_stage_duration_seconds",
                    "How long the stages of operations took.",
                ),
                &["operation", "stage"],
            )?,
            pull_seconds: Histogram::with_opts(seconds(
                "berth_image_pull_duration_seconds",
                "How long image pulls took, failed ones included.",
            ))?,
            pulls: IntCounterVec::new(
                Opts::new("berth_image_pulls_total", "Image pulls by their result."),
                &["result"],
            )?,
            pull_bytes: IntCounter::new(
                "berth_image_pull_bytes_total",
                "Compressed bytes of layers received by pulls.",
            )?,
            events_missed: IntCounter::new(
                "berth_container_events_missed_total",
                "Events that listeners of GetContainerEvents did not keep up with.",
            )?,
            log_lines: IntCounter::new(
                "berth_container_log_lines_total",
                "Lines written to containers' logs; one in parts counts once.",
            )?,
            log_bytes: IntCounter::new(
                "berth_container_log_bytes_total",
                "Bytes of containers' output written to their logs.",
            )?,
            log_dropped_lines: IntCounter::new(
                "berth_container_log_dropped_lines_total",
                "Lines of containers' output that are not in their logs.",
            )?,
            log_dropped_bytes: IntCounter::new(
                "berth_container_log_dropped_bytes_total",
                "Bytes of containers' output that are not in their logs.",
            )?,
            pods: IntGaugeVec::new(
                Opts::new("berth_pods", "Pod sandboxes by state."),
                &["state"],
            )?,
            containers: IntGaugeVec::new(
                Opts::new("berth_containers", "Containers by state."),
                &["state"],
            )?,
            registry,
        };
        let registry = &families.registry;
        registry.register(Box::new(families.rpc_seconds.clone()))?;
        registry.register(Box::new(families.rpc_errors.clone()))?;
        registry.register(Box::new(families.stage_seconds.clone()))?;
        registry.register(Box::new(families.pull_seconds.clone()))?;
        registry.register(Box::new(families.pulls.clone()))?;
        registry.register(Box::new(families.pull_bytes.clone()))?;
        registry.register(Box::new(families.events_missed.clone()))?;
        registry.register(Box::new(families.log_lines.clone()))?;
        registry.register(Box::new(families.log_bytes.clone()))?;
        registry.register(Box::new(families.log_dropped_lines.clone()))?;
        registry.register(Box::new(families.log_dropped_bytes.clone()))?;
        registry.register(Box::new(families.pods.clone()))?;
        registry.register(Box::new(families.containers.clone()))?;
        for result in ["ok", "error"] {
            // There from the start, so that a rate of failures is 0 and not absent.
            families.pulls.with_label_values(&[result]);
        }
        Ok(Self(Arc::new(families)))
    }

    /// An RPC's work is done.
    pub fn rpc(&self, method: &'static str, took: Duration, code: Code) {
        self.0
            .rpc_seconds
            .with_label_values(&[method])
            .observe(took.as_secs_f64());
        if code != Code::Ok {
            self.0
                .rpc_errors
                .with_label_values(&[method, code_name(code)])
                .inc();
        }
    }

    /// A stage of an operation has ended.
    pub fn stage(&self, operation: &'static str, stage: &'static str, took: Duration) {
        self.0
            .stage_seconds
            .with_label_values(&[operation, stage])
            .observe(took.as_secs_f64());
    }

    /// A pull has ended.
    pub fn pull(&self, took: Duration, bytes: u64, ok: bool) {
        self.0.pull_seconds.observe(took.as_secs_f64());
        self.0.pull_bytes.inc_by(bytes);
        self.0
            .pulls
            .with_label_values(&[if ok { "ok" } else { "error" }])
            .inc();
    }

    /// A listener of GetContainerEvents did not keep up.
    pub fn events_missed(&self, count: u64) {
        self.0.events_missed.inc_by(count);
    }

    /// What containers have logged so far.
    pub fn logs(&self, totals: &LogTotals) {
        let rise = |counter: &IntCounter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        rise(&self.0.log_lines, totals.lines);
        rise(&self.0.log_bytes, totals.bytes);
        rise(&self.0.log_dropped_lines, totals.dropped_lines);
        rise(&self.0.log_dropped_bytes, totals.dropped_bytes);
    }

    /// Everything in Prometheus' text format, pods and containers as `view` has them.
    ///
    /// # Errors
    /// What the encoder says; in practice never.
    pub fn render(&self, view: &View) -> prometheus::Result<String> {
        use crate::convert::answer;
        for state in [
            cri::PodSandboxState::SandboxReady,
            cri::PodSandboxState::SandboxNotready,
        ] {
            let count = view
                .pods()
                .filter(|pod| pod.state.is_listed() && answer::pod_state(&pod.state) == state)
                .count();
            let label = match state {
                cri::PodSandboxState::SandboxReady => "ready",
                cri::PodSandboxState::SandboxNotready => "not_ready",
            };
            self.0.pods.with_label_values(&[label]).set(gauge(count));
        }
        for (state, label) in [
            (cri::ContainerState::ContainerCreated, "created"),
            (cri::ContainerState::ContainerRunning, "running"),
            (cri::ContainerState::ContainerExited, "exited"),
        ] {
            let count = view
                .containers()
                .filter(|c| c.state.is_listed() && answer::container_state(&c.state) == state)
                .count();
            self.0
                .containers
                .with_label_values(&[label])
                .set(gauge(count));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A gRPC code as its specification writes it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_family() {
        let metrics = Metrics::new().unwrap();
        metrics.rpc("Version", Duration::from_millis(1), Code::Ok);
        metrics.rpc("ContainerStatus", Duration::from_millis(1), Code::NotFound);
        metrics.stage("RunPodSandbox", "network", Duration::from_millis(2));
        metrics.pull(Duration::from_secs(1), 42, true);
        let mut totals = LogTotals {
            lines: 7,
            dropped_lines: 1,
            ..LogTotals::default()
        };
        metrics.logs(&totals);
        // Another scrape at the same time was quicker with newer ones.
        totals.lines = 6;
        metrics.logs(&totals);
        let text = metrics.render(&View::default()).unwrap();
        for line in [
            "berth_build_info{version=\"0.1.0\"} 1",
            "berth_rpc_duration_seconds_count{method=\"Version\"} 1",
            "berth_rpc_errors_total{code=\"NOT_FOUND\",method=\"ContainerStatus\"} 1",
            "berth_operation_stage_duration_seconds_count{operation=\"RunPodSandbox\",stage=\"network\"} 1",
            "berth_image_pulls_total{result=\"error\"} 0",
            "berth_image_pulls_total{result=\"ok\"} 1",
            "berth_image_pull_bytes_total 42",
            "berth_container_log_lines_total 7",
            "berth_container_log_dropped_lines_total 1",
            "berth_pods{state=\"ready\"} 0",
            "berth_containers{state=\"running\"} 0",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
