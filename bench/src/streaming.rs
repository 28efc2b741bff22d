//! What goes through exec and port-forward, over SPDY/3.1 and over WebSocket channels.
//!
//! The client is the tests' and the same for all runtimes; like kubectl's it sends frames
//! as it gets bytes and knows no windows. In the pod `dd` gives and takes. The time is from
//! when the other end is known to run (its first bytes have come) until the last byte has
//! come; starting a command is another benchmark. Every byte is counted: what comes, here;
//! what is sent, by `dd`. Both ends cost as little as they can, for on a small machine they run on
//! the processors that the runtime's own work runs on: blocks that stay in a cache, and a client
//! that looks at no byte.
//!
//! What runtimes differ in is kept out of it. containerd ends the input of a command as soon
//! as one of its outputs is closed, which `> /dev/null` is enough for. It resets the streams
//! of an exec that is over instead of ending them (its error stream too, right behind the
//! status), and has no way to end a channel of a WebSocket, so nothing here needs an end to
//! know that all has come. Its forwarded connections live on for a second after the pod has
//! closed its end; nobody waits for that.
//! Source: k8s.io/apimachinery `httpstream/spdy`, `connection.Close`; containerd 1.6,
//! `pkg/cri/io/exec_io.go`, `pkg/cri/streaming`, `sandbox_portforward_linux.go`.

use super::{Pod, Runtime, Times, cri, milliseconds, pod_config, remove, run_pod, run_pod_as};
use anyhow::{Context as _, Result, ensure};
use berth_tests::streaming::{Command, Ended, Forwarder, Output, Transport, Wanted, websocket};
use clap::Args;
use std::time::{Duration, Instant};

/// What is sent.
#[derive(Args, Clone)]
pub struct Streams {
    /// How much goes each way. Unit: MiB.
    #[arg(long, default_value_t = 256)]
    pub mib: usize,
}

impl Streams {
    fn bytes(&self) -> usize {
        self.mib << 20
    }

    /// Of `dd`.
    fn blocks(&self) -> usize {
        self.bytes() / (DD_KIB << 10)
    }
}

/// The ports of the pod: one gives, one takes.
const GIVES: u16 = 4000;
const TAKES: u16 = 4001;

/// What `dd` gives and takes at a time, in KiB: it stays in a processor's cache.
const DD_KIB: usize = 128;

/// Sends with the largest pieces that clients commonly use.
const PIECE_BYTES: usize = 64 << 10;

/// The newest protocol that all runtimes know over both transports.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// What the command in the pod says when it is there to read.
const READY: &str = "ready\n";

/// One round of exec: a command that only prints, and one that only reads.
pub async fn time_exec(
    runtime: &mut Runtime,
    image: &str,
    round: usize,
    options: &Streams,
) -> Result<Times> {
    let pod = run_pod(runtime, &format!("exec-stream-{round}")).await?;
    let container = super::start(runtime, &pod, image).await?;
    let bytes = options.bytes();
    let mut times = Vec::new();
    for (transport, out, into) in [
        (Transport::Spdy, "exec's output, SPDY", "exec's input, SPDY"),
        (
            Transport::WebSocket,
            "exec's output, WebSocket",
            "exec's input, WebSocket",
        ),
    ] {
        let wanted = Wanted::OUTPUT;
        let url = exec_url(runtime, &container, &gives(options), wanted).await?;
        let work = move || {
            let mut command = Command::open_here(&url, transport, wanted, PROTOCOL)?;
            let took = receive(command.stdout.as_ref(), bytes)?;
            let more = command.stdout.take().map_or(Vec::new(), Output::rest);
            ensure!(more.is_empty(), "{} bytes too many", more.len());
            succeeded(command)?;
            Ok(took)
        };
        times.push((out, apart(work).await.context(out)?));
        let wanted = Wanted {
            stderr: false,
            ..Wanted::ALL
        };
        let url = exec_url(runtime, &container, &takes(options), wanted).await?;
        let work = move || {
            let mut command = Command::open_here(&url, transport, wanted, PROTOCOL)?;
            let mut stdin = command.stdin.take().context("stdin was wanted")?;
            let stdout = command.stdout.as_ref().context("stdout was wanted")?;
            let took = send(stdout, bytes, |piece| stdin.write(piece))?;
            // It may be over, and gone, already.
            let _ = stdin.close();
            succeeded(command)?;
            Ok(took)
        };
        times.push((into, apart(work).await.context(into)?));
    }
    remove(runtime, &pod.id).await?;
    Ok(times)
}

/// One round of port-forward: a connection that only gives, and one that only takes.
pub async fn time_forward(
    runtime: &mut Runtime,
    image: &str,
    round: usize,
    options: &Streams,
) -> Result<Times> {
    let mut config = pod_config(runtime, &format!("port-forward-{round}"));
    // A new namespace has the machine's; see `against-containerd`.
    if let Some(linux) = &mut config.linux {
        let name = "net.ipv4.tcp_congestion_control".to_owned();
        linux.sysctls.insert(name, "reno".into());
    }
    let pod = run_pod_as(runtime, config).await?;
    let bytes = options.bytes();
    let word = |words: [String; 3]| format!("sh -c '{}'", words[2]);
    let script = format!(
        "nc -ll -p {GIVES} -e {} & nc -ll -p {TAKES} -e {}",
        word(gives(options)),
        word(takes(options)),
    );
    serve(runtime, &pod, image, &script).await?;
    let mut times = Vec::new();
    let url = forward_url(runtime, &pod.id, &[]).await?;
    let gave = apart(move || {
        let forwarder = Forwarder::open_here(&url, Transport::Spdy)?;
        let forwarded = forwarder.connect(GIVES)?;
        receive(Some(&forwarded.from), bytes)
    });
    times.push(("from a port, SPDY", gave.await.context("from a port")?));
    let url = forward_url(runtime, &pod.id, &[]).await?;
    let took = apart(move || {
        let forwarder = Forwarder::open_here(&url, Transport::Spdy)?;
        let forwarded = forwarder.connect(TAKES)?;
        send(&forwarded.from, bytes, |piece| forwarded.to.write(piece))
    });
    times.push(("to a port, SPDY", took.await.context("to a port")?));
    let url = forward_url(runtime, &pod.id, &[GIVES]).await?;
    let gave = apart(move || {
        let (_connection, from) = channel(&url, GIVES)?;
        receive(Some(&from), bytes)
    });
    times.push(("from a port, WebSocket", gave.await.context("from a port")?));
    let url = forward_url(runtime, &pod.id, &[TAKES]).await?;
    let took = apart(move || {
        let (connection, from) = channel(&url, TAKES)?;
        let to = connection.sender(0);
        send(&from, bytes, |piece| to.write(piece))
    });
    times.push(("to a port, WebSocket", took.await.context("to a port")?));
    remove(runtime, &pod.id).await?;
    Ok(times)
}

/// The command that gives.
fn gives(options: &Streams) -> [String; 3] {
    shell(&format!(
        "exec dd if=/dev/zero bs={DD_KIB}k count={} status=none",
        options.blocks()
    ))
}

/// The command that takes, as much as it is to get: it waits for no end. The shell stays, as
/// containerd ends the input of a command when the first of its outputs is closed.
fn takes(options: &Streams) -> [String; 3] {
    shell(&format!(
        "echo ready; dd of=/dev/null bs={DD_KIB}k iflag=fullblock count={} 2>&1; echo all",
        options.blocks()
    ))
}

fn shell(script: &str) -> [String; 3] {
    ["sh", "-c", script].map(str::to_owned)
}

/// Takes `bytes` bytes; the milliseconds from the first to the last.
fn receive(from: Option<&Output>, bytes: usize) -> Result<f64> {
    let from = from.context("output was wanted")?;
    let got = from.next()?.map_or(0, |piece| piece.len());
    let begin = Instant::now();
    from.count(bytes.checked_sub(got).context("too many bytes")?)?;
    Ok(milliseconds(begin))
}

/// Sends `bytes` bytes; the milliseconds from when [`takes`] reads until it has them all.
fn send(from: &Output, bytes: usize, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<f64> {
    let piece = vec![0; PIECE_BYTES];
    from.until(READY)?;
    let begin = Instant::now();
    for _ in 0..bytes / PIECE_BYTES {
        write(&piece)?;
    }
    let said = from.until("all\n")?;
    let took = milliseconds(begin);
    // Whole blocks, and blocks that were not.
    let all = format!("{}+0 records out", bytes / (DD_KIB << 10));
    ensure!(said.contains(&all), "{said}");
    Ok(took)
}

/// The command's last word is that it went well.
fn succeeded(command: Command) -> Result<()> {
    let ended = Ended::parse(&command.error.rest())?;
    ensure!(ended == Ended::Code(0), "{ended:?}");
    Ok(())
}

/// A connection with one port: two channels, for its data and for errors.
fn channel(url: &str, port: u16) -> Result<(websocket::Connection, Output)> {
    let (connection, events) = websocket::Connection::open(url, PROTOCOL, 2)?;
    let from = events.into_iter().map(Output::from).next();
    let from = from.context("two channels")?;
    // Each channel begins with its port.
    let first = from.next()?.context("a port")?;
    ensure!(first == port.to_le_bytes()[..], "{first:?}");
    Ok((connection, from))
}

/// What `work` gives, from a thread of its own.
async fn apart(work: impl FnOnce() -> Result<f64> + Send + 'static) -> Result<f64> {
    tokio::task::spawn_blocking(work).await?
}

async fn exec_url(
    runtime: &mut Runtime,
    container: &str,
    command: &[String],
    wanted: Wanted,
) -> Result<String> {
    let request = cri::ExecRequest {
        container_id: container.to_owned(),
        cmd: command.to_vec(),
        tty: wanted.tty,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
    };
    Ok(runtime.client.exec(request).await?.into_inner().url)
}

async fn forward_url(runtime: &mut Runtime, pod: &str, ports: &[u16]) -> Result<String> {
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: ports.iter().map(|&port| port.into()).collect(),
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
