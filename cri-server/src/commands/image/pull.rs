//! `berth image pull`: a bar for each layer on a terminal, a line for each elsewhere.

use super::{Outcome, spec};
use crate::commands::client::{self, ClientError};
use berth_proto::admin_v1 as admin;
use berth_proto::runtime_v1 as cri;
use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;
use tonic::transport::Channel;

/// How often to look how far the pull is.
const EVERY: Duration = Duration::from_millis(100);
/// Most layers that have a bar of their own at one time.
const MAX_BARS: usize = 20;
const BAR_CELLS: u64 = 30;

/// Pulls and prints the image's ID. Progress goes to standard error.
pub async fn pull(channel: Channel, reference: String) -> Outcome {
    let mut images = client::images(channel.clone());
    let mut admin = client::admin(channel);
    let request = cri::PullImageRequest {
        image: spec(reference.clone()),
        ..Default::default()
    };
    let pull = images.pull_image(request);
    tokio::pin!(pull);
    let mut shown = Shown::new(std::io::stderr().is_terminal());
    let answer = loop {
        tokio::select! {
            answer = &mut pull => break answer,
            () = tokio::time::sleep(EVERY) => {
                let request = admin::PullProgressRequest { reference: reference.clone() };
                // A daemon that does not know of it still pulls.
                if let Ok(progress) = admin.pull_progress(request).await {
                    shown.show(&progress.into_inner());
                }
            }
        }
    };
    shown.end();
    let answer = answer.map_err(ClientError::from)?;
    writeln!(
        std::io::stdout().lock(),
        "{}",
        answer.into_inner().image_ref
    )?;
    Ok(())
}

/// What stands on the terminal now, or was said already.
struct Shown {
    is_terminal: bool,
    lines: usize,
    stage: String,
    done: BTreeSet<String>,
}

impl Shown {
    fn new(is_terminal: bool) -> Shown {
        Shown {
            is_terminal,
            lines: 0,
            stage: String::new(),
            done: BTreeSet::new(),
        }
    }

    fn show(&mut self, progress: &admin::PullProgressResponse) {
        if progress.stage.is_empty() {
            return;
        }
        let text = if self.is_terminal {
            self.bars(progress)
        } else {
            self.new_lines(progress)
        };
        // Whoever does not read it still gets the image.
        let _ = std::io::stderr().lock().write_all(text.as_bytes());
    }

    fn bars(&mut self, progress: &admin::PullProgressResponse) -> String {
        let lines = bars(progress);
        let mut text = String::new();
        if self.lines > 0 {
            text.push_str(&format!("\x1b[{}A", self.lines));
        }
        for line in &lines {
            text.push_str(&format!("\r\x1b[2K{line}\n"));
        }
        // What is left of a longer picture.
        for _ in lines.len()..self.lines {
            text.push_str("\r\x1b[2K\n");
        }
        self.lines = self.lines.max(lines.len());
        text
    }

    fn new_lines(&mut self, progress: &admin::PullProgressResponse) -> String {
        let mut text = String::new();
        for layer in &progress.missing {
            let is_over = matches!(layer.stage.as_str(), "done" | "shared");
            if is_over && self.done.insert(layer.digest.clone()) {
                let (digest, size) = (short(&layer.digest), mib(layer.bytes_total));
                text.push_str(&format!("layer {digest} {size} MiB {}\n", layer.stage));
            }
        }
        if self.stage != progress.stage {
            self.stage.clone_from(&progress.stage);
            text.push_str(&format!("{}\n", headline(progress)));
        }
        text
    }

    fn end(&self) {
        if self.lines > 0 {
            let _ = std::io::stderr().lock().flush();
        }
    }
}

fn headline(progress: &admin::PullProgressResponse) -> String {
    match progress.layers_total {
        0 => progress.stage.clone(),
        total => format!("{}: {}/{total} layers", progress.stage, progress.layers),
    }
}

fn bars(progress: &admin::PullProgressResponse) -> Vec<String> {
    let mut lines = vec![headline(progress)];
    let active = |layer: &&admin::LayerProgress| layer.stage == "fetching";
    let others = |layer: &&admin::LayerProgress| layer.stage != "fetching";
    let layers = progress.missing.iter().filter(active);
    let layers = layers.chain(progress.missing.iter().filter(others));
    for layer in layers.take(MAX_BARS) {
        let total = layer.bytes_total.max(1);
        let cells = match layer.stage.as_str() {
            "done" | "shared" => BAR_CELLS,
            _ => (layer.bytes.min(total) * BAR_CELLS) / total,
        };
        lines.push(format!(
            "{} [{}{}] {:>6}/{} MiB {}",
            short(&layer.digest),
            "=".repeat(cells as usize),
            " ".repeat((BAR_CELLS - cells) as usize),
            mib(layer.bytes),
            mib(layer.bytes_total),
            layer.stage,
        ));
    }
    if progress.missing.len() > MAX_BARS {
        lines.push(format!("and {} more", progress.missing.len() - MAX_BARS));
    }
    lines
}

fn short(digest: &str) -> &str {
    let hex = digest.split_once(':').map_or(digest, |(_, hex)| hex);
    hex.get(..12).unwrap_or(hex)
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(bytes: u64, stage: &str) -> admin::PullProgressResponse {
        admin::PullProgressResponse {
            stage: "layers".into(),
            layers: 1,
            layers_total: 2,
            missing: vec![admin::LayerProgress {
                digest: format!("sha256:{}", "ab".repeat(32)),
                bytes,
                bytes_total: 2 << 20,
                stage: stage.into(),
            }],
        }
    }

    #[test]
    fn a_bar_grows_with_its_layer() {
        let lines = bars(&progress(1 << 20, "fetching"));
        assert_eq!(lines[0], "layers: 1/2 layers");
        assert_eq!(
            lines[1],
            format!(
                "abababababab [{}{}]    1.0/2.0 MiB fetching",
                "=".repeat(15),
                " ".repeat(15)
            )
        );
    }

    #[test]
    fn without_a_terminal_each_layer_is_told_once() {
        let mut shown = Shown::new(false);
        assert_eq!(
            shown.new_lines(&progress(0, "fetching")),
            "layers: 1/2 layers\n"
        );
        assert_eq!(
            shown.new_lines(&progress(2 << 20, "done")),
            "layer abababababab 2.0 MiB done\n"
        );
        assert_eq!(shown.new_lines(&progress(2 << 20, "done")), "");
    }
}
