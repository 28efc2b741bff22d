//! `berth status`: what the daemon is doing now.

use super::{Outcome, client};
use crate::config::Overrides;
use berth_proto::admin_v1 as admin;
use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Runs `berth status`.
pub fn status(places: &Overrides) -> Outcome {
    client::block_on(async {
        let mut client = client::admin(client::connect(places).await?);
        let answer = client
            .operations(admin::OperationsRequest {})
            .await
            .map_err(client::ClientError::from)?
            .into_inner();
        write!(
            std::io::stdout().lock(),
            "{}",
            show(&answer, SystemTime::now())
        )?;
        Ok(())
    })
}

/// How long ago a time in nanoseconds since 1970 is, in seconds; "-" for 0.
fn ago(nanoseconds: i64, now: SystemTime) -> String {
    let Some(at) = u64::try_from(nanoseconds).ok().filter(|at| *at > 0) else {
        return "-".into();
    };
    let passed = now
        .duration_since(UNIX_EPOCH + Duration::from_nanos(at))
        .unwrap_or_default();
    format!("{:.1}s", passed.as_secs_f64())
}

fn show(answer: &admin::OperationsResponse, now: SystemTime) -> String {
    let mut text = String::new();
    if answer.operations.is_empty() {
        text.push_str("no operation is running\n");
    } else {
        let mut rows = vec![
            [
                "OPERATION",
                "SUBJECT",
                "STAGE",
                "IN STAGE",
                "IN ALL",
                "CALLERS",
            ]
            .map(str::to_owned),
        ];
        rows.extend(answer.operations.iter().map(|operation| {
            [
                operation.kind.clone(),
                operation.subject.clone(),
                operation.stage.clone(),
                ago(operation.stage_started_at, now),
                ago(operation.started_at, now),
                operation.callers.to_string(),
            ]
        }));
        text.push_str(&table(&rows));
    }
    if !answer.pending.is_empty() {
        text.push_str("\nleft to do in the background:\n");
        let mut rows = vec![["SUBJECT", "WHAT", "TRIES", "LAST ERROR"].map(str::to_owned)];
        rows.extend(answer.pending.iter().map(|pending| {
            [
                pending.subject.clone(),
                pending.what.clone(),
                pending.attempts.to_string(),
                pending.last_error.clone(),
            ]
        }));
        text.push_str(&table(&rows));
    }
    text
}

/// Columns as wide as their widest cell, two spaces apart.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_what_is_pending_are_shown() {
        let now = UNIX_EPOCH + Duration::from_secs(100);
        let answer = admin::OperationsResponse {
            operations: vec![admin::Operation {
                kind: "RunPodSandbox".into(),
                subject: "default/web".into(),
                stage: "network".into(),
                started_at: 90_000_000_000,
                stage_started_at: 98_500_000_000,
                callers: 2,
            }],
            pending: vec![admin::Pending {
                subject: "a pod".into(),
                what: "give the network back".into(),
                last_error: "CNI DEL failed".into(),
                attempts: 3,
            }],
        };
        let text = show(&answer, now);
        assert!(
            text.contains("RunPodSandbox  default/web  network  1.5s      10.0s   2\n"),
            "{text}"
        );
        assert!(
            text.contains("a pod    give the network back  3      CNI DEL failed\n"),
            "{text}"
        );
        assert_eq!(show(&Default::default(), now), "no operation is running\n");
    }
}
