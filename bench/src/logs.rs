//! How fast a container's output gets into its log, and what that costs.
//!
//! A container copies a file of equal lines to its stdout; the time is from the
//! answer to StartContainer until the last line is in the log. The CPU is what
//! the runtime's own processes took, the start included.

use super::{Runtime, Times, pod_config, run_pod_as};
use anyhow::{Context as _, Result, bail};
use berth_proto::runtime_v1 as cri;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for a log to be whole.
const PATIENCE: Duration = Duration::from_secs(300);

/// Ticks a second in /proc/PID/stat. Source: time(7), USER_HZ, 100 on every architecture.
const TICKS: f64 = 100.0;

/// What the last line says.
const LAST: &str = "this is the end";

/// How much is written.
#[derive(clap::Args, Clone)]
pub struct Logs {
    /// MiB of lines.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Bytes of a line, its newline included.
    #[arg(long, default_value_t = 100)]
    line: usize,
    /// Where the lines and the logs are kept; a file system in memory measures runtimes only.
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
}

/// A directory that goes when this does.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One round.
pub async fn time(
    runtime: &mut Runtime,
    image: &str,
    round: usize,
    options: &Logs,
) -> Result<Times> {
    let scratch = Scratch(
        options
            .dir
            .join(format!("berth-bench-{}", std::process::id())),
    );
    fs::create_dir_all(&scratch.0)?;
    let input = scratch.0.join("lines");
    let bytes = write_lines(&input, options)?;
    let mut config = pod_config(runtime, &format!("logs-{round}"));
    config.log_directory = scratch.0.display().to_string();
    let pod = run_pod_as(runtime, config).await?;
    let mut request = super::container(&pod, image);
    if let Some(config) = &mut request.config {
        let script = format!("cat /lines; echo {LAST}; exec sleep 1000");
        config.command = vec!["sh".into(), "-c".into(), script];
        config.log_path = "main.log".into();
        config.mounts.push(cri::Mount {
            container_path: "/lines".into(),
            host_path: input.display().to_string(),
            readonly: true,
            ..Default::default()
        });
    }
    let created = runtime.client.create_container(request).await?;
    let before = cpu(&runtime.name);
    let request = cri::StartContainerRequest {
        container_id: created.into_inner().container_id,
    };
    runtime.client.start_container(request).await?;
    let log = scratch.0.join("main.log");
    let begin = Instant::now();
    while !is_whole(&log) {
        if begin.elapsed() > PATIENCE {
            bail!("the log is not whole after {} s", PATIENCE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let took = begin.elapsed().as_secs_f64();
    let spent = cpu(&runtime.name) - before;
    super::remove(runtime, &pod.id).await?;
    let mib = bytes as f64 / f64::from(1 << 20);
    Ok(vec![
        ("log of all lines", took * 1000.0),
        ("  MiB/s", mib / took),
        ("  CPU of the runtime, ms/MiB", spent * 1000.0 / mib),
    ])
}

fn write_lines(path: &Path, options: &Logs) -> Result<usize> {
    let mut line = vec![b'x'; options.line.max(1)];
    line[options.line.max(1) - 1] = b'\n';
    let block = line.repeat((1 << 20) / line.len() + 1);
    let mut file = fs::File::create(path).context("cannot write the lines")?;
    let mut written = 0;
    while written < options.mib << 20 {
        file.write_all(&block)?;
        written += block.len();
    }
    Ok(written)
}

fn is_whole(log: &Path) -> bool {
    let Ok(mut file) = fs::File::open(log) else {
        return false;
    };
    let mut end = String::new();
    let tail = -(LAST.len() as i64 + 1);
    file.seek(SeekFrom::End(tail)).is_ok()
        && file.read_to_string(&mut end).is_ok()
        && end.trim_end() == LAST
}

/// Seconds of CPU that the processes of a runtime have taken so far: those that
/// are called as it is, and for CRI-O its monitors.
fn cpu(runtime: &str) -> f64 {
    let name = runtime.split(' ').next().unwrap_or_default();
    let names: &[&str] = match name {
        "cri-o" => &["crio", "conmon"],
        other => &[other],
    };
    let Ok(processes) = fs::read_dir("/proc") else {
        return 0.0;
    };
    let stats = processes
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let own = stats.filter_map(|stat| {
        // PID (NAME) S ..., and fields 14 and 15 are what it took.
        let (head, rest) = stat.rsplit_once(") ")?;
        let (_, comm) = head.split_once('(')?;
        let bench = comm.starts_with("berth-bench");
        if bench || !names.iter().any(|name| comm.starts_with(name)) {
            return None;
        }
        let fields: Vec<f64> = rest
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse().ok())
            .collect();
        Some(fields.iter().sum::<f64>())
    });
    own.sum::<f64>() / TICKS
}
