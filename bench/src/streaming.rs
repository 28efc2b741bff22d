//! What goes through exec and port-forward, over SPDY/3.1.
//!
//! The client is the tests' and the same for all runtimes; like kubectl's it sends frames
//! as it gets bytes and knows no windows.

use super::{Pod, Runtime, Times, cri, milliseconds, remove, run_pod};
use anyhow::{Context as _, Result, ensure};
use berth_tests::streaming::{Command, Ended, Forwarder, Transport, Wanted};
use clap::Args;
use std::time::{Duration, Instant};

/// What is sent.
#[derive(Args, Clone)]
pub struct Streams {
    /// How much goes each way. Unit: MiB.
    #[arg(long, default_value_t = 256)]
    mib: usize,
}

/// The ports of the pod: one gives, one takes.
const GIVES: u16 = 4000;
const TAKES: u16 = 4001;

/// Sends with the largest pieces that clients commonly use.
const PIECE_BYTES: usize = 64 << 10;

/// One round of exec: a command that only prints, and one that only reads.
pub async fn time_exec(
    runtime: &mut Runtime,
    image: &str,
    round: usize,
    options: &Streams,
) -> Result<Times> {
    let pod = run_pod(runtime, &format!("exec-stream-{round}")).await?;
    let container = super::start(runtime, &pod, image).await?;
    let bytes = options.mib << 20;
    let count = bytes.to_string();
    let out = exec_url(
        runtime,
        &container,
        &["head", "-c", &count, "/dev/zero"],
        Wanted::OUTPUT,
    )
    .await?;
    let printed = timed(move || {
        let command =
            Command::open_here(&out, Transport::Spdy, Wanted::OUTPUT, "v4.channel.k8s.io")?;
        let stdout = command.stdout.as_ref().context("stdout was wanted")?;
        let mut got = 0;
        while let Some(piece) = stdout.next()? {
            got += piece.len();
        }
        ensure!(got == bytes, "{got} bytes of {bytes}");
        Ok(())
    })
    .await?;
    let into = exec_url(
        runtime,
        &container,
        &["sh", "-c", "cat > /dev/null"],
        Wanted::ALL,
    )
    .await?;
    let read = timed(move || {
        let mut command =
            Command::open_here(&into, Transport::Spdy, Wanted::ALL, "v4.channel.k8s.io")?;
        let piece = vec![0; PIECE_BYTES];
        let mut stdin = command.stdin.take().context("stdin was wanted")?;
        for _ in 0..bytes / PIECE_BYTES {
            stdin.write(&piece)?;
        }
        stdin.close()?;
        let finished = command.finish()?;
        ensure!(finished.ended == Ended::Code(0), "{:?}", finished.ended);
        Ok(())
    })
    .await?;
    remove(runtime, &pod.id).await?;
    Ok(vec![("exec's output", printed), ("exec's input", read)])
}

/// One round of port-forward: a connection that only gives, and one that only takes.
pub async fn time_forward(
    runtime: &mut Runtime,
    image: &str,
    round: usize,
    options: &Streams,
) -> Result<Times> {
    let pod = run_pod(runtime, &format!("port-forward-{round}")).await?;
    let bytes = options.mib << 20;
    let script = format!(
        "nc -ll -p {GIVES} -e head -c {bytes} /dev/zero & nc -ll -p {TAKES} -e sh -c 'cat > /dev/null; echo all'"
    );
    serve(runtime, &pod, image, &script).await?;
    let url = forward_url(runtime, &pod.id).await?;
    let gave = timed(move || {
        let forwarder = Forwarder::open_here(&url, Transport::Spdy)?;
        let forwarded = forwarder.connect(GIVES)?;
        let mut got = 0;
        while let Some(piece) = forwarded.from.next()? {
            got += piece.len();
        }
        ensure!(got == bytes, "{got} bytes of {bytes}");
        Ok(())
    })
    .await?;
    let url = forward_url(runtime, &pod.id).await?;
    let took = timed(move || {
        let forwarder = Forwarder::open_here(&url, Transport::Spdy)?;
        let forwarded = forwarder.connect(TAKES)?;
        let piece = vec![0; PIECE_BYTES];
        for _ in 0..bytes / PIECE_BYTES {
            forwarded.to.write(&piece)?;
        }
        forwarded.to.close()?;
        let said = forwarded.from.all()?;
        ensure!(said == b"all\n", "{said:?}");
        Ok(())
    })
    .await?;
    remove(runtime, &pod.id).await?;
    Ok(vec![("from a port", gave), ("to a port", took)])
}

/// Milliseconds that `work` takes, on a thread of its own.
async fn timed(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<f64> {
    let timed = move || {
        let begin = Instant::now();
        work().map(|()| milliseconds(begin))
    };
    tokio::task::spawn_blocking(timed).await?
}

async fn exec_url(
    runtime: &mut Runtime,
    container: &str,
    command: &[&str],
    wanted: Wanted,
) -> Result<String> {
    let request = cri::ExecRequest {
        container_id: container.to_owned(),
        cmd: command.iter().map(|&word| word.to_owned()).collect(),
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    Ok(runtime.client.exec(request).await?.into_inner().url)
}

async fn forward_url(runtime: &mut Runtime, pod: &str) -> Result<String> {
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: Vec::new(),
    };
    Ok(runtime.client.port_forward(request).await?.into_inner().url)
}

/// Starts the servers and waits until both listen.
async fn serve(runtime: &mut Runtime, pod: &Pod, image: &str, script: &str) -> Result<()> {
    let mut request = super::container(pod, image);
    if let Some(config) = &mut request.config {
        config.command = ["sh", "-c", script].map(str::to_owned).to_vec();
    }
    let created = runtime.client.create_container(request).await?;
    let container_id = created.into_inner().container_id;
    let request = cri::StartContainerRequest {
        container_id: container_id.clone(),
    };
    runtime.client.start_container(request).await?;
    // In hexadecimal, as /proc/net/tcp has them; 0A is LISTEN.
    let script = format!(
        "cat /proc/net/tcp /proc/net/tcp6 | grep -q ':{GIVES:04X} .* 0A ' && cat /proc/net/tcp /proc/net/tcp6 | grep -q ':{TAKES:04X} .* 0A '"
    );
    for _ in 0..100 {
        let request = cri::ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            timeout: 10,
        };
        if runtime
            .client
            .exec_sync(request)
            .await?
            .into_inner()
            .exit_code
            == 0
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("nobody listens in the pod")
}
