//! Times pod starts and execs over CRI, several runtimes side by side.
//!
//! Every round does the same on each socket in turn, so a machine that gets
//! slower gets slower for all of them; what is to be read are the ratios.
//! `network` and `throughput` need no runtime.

mod logs;
mod network;
mod pull;
mod streaming;

use anyhow::{Context as _, Result, bail};
use berth_proto::runtime_v1 as cri;
use clap::{Parser, Subcommand};
use cri::image_service_client::ImageServiceClient;
use cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};

/// Times a runtime over CRI; with several sockets, one against the other.
#[derive(Parser)]
#[command(name = "berth-bench")]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// A runtime's CRI socket; give it again for each runtime.
    #[arg(long = "socket", global = true)]
    sockets: Vec<PathBuf>,
    /// An image with sleep and true in it; a runtime that does not have it pulls it first.
    #[arg(
        long,
        default_value = "registry.k8s.io/e2e-test-images/busybox:1.29-2",
        global = true
    )]
    image: String,
    /// Rounds.
    #[arg(short = 'n', default_value_t = 50, global = true)]
    rounds: usize,
    /// Pods that run meanwhile, on each runtime.
    #[arg(long, default_value_t = 0, global = true)]
    beside: usize,
    /// The parent of the pods' cgroups.
    #[arg(long, default_value = "/berth-bench", global = true)]
    cgroup_parent: String,
}

#[derive(Subcommand, Clone)]
enum What {
    /// RunPodSandbox to StartContainer answered, and each call of it.
    Start,
    /// ExecSync of `true` in a running container.
    Exec,
    /// A container's output until it is in its log.
    Logs(logs::Logs),
    /// What goes through exec: a command's output, and its input.
    ExecStream(streaming::Streams),
    /// What goes through port-forward: out of a port, and into one.
    PortForward(streaming::Streams),
    /// A pull of the image where it is not, and its removal.
    Pull(pull::Pull),
    /// A pod's network: the built-in one and Debian's plugins.
    Network(network::SetUp),
    /// What two pods can send each other: on the built-in network and on a bridge made by hand.
    Throughput(network::Throughput),
}

struct Runtime {
    name: String,
    client: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    parent: String,
    /// Pods that have not been removed.
    pods: Vec<String>,
}

/// Milliseconds of one round, by what was timed.
type Times = Vec<(&'static str, f64)>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match &arguments.what {
        What::Network(options) => return network::set_up(options, arguments.rounds),
        What::Throughput(options) => return network::throughput(options, arguments.rounds),
        What::Start
        | What::Exec
        | What::ExecStream(_)
        | What::PortForward(_)
        | What::Logs(_)
        | What::Pull(_) => {}
    }
    if arguments.sockets.is_empty() {
        bail!("give at least one --socket");
    }
    let mut runtimes = Vec::new();
    for socket in &arguments.sockets {
        runtimes.push(connect(socket, &arguments).await?);
    }
    let outcome = measure(&arguments, &mut runtimes).await;
    // Also after a failure nothing is left running.
    for runtime in &mut runtimes {
        for pod in std::mem::take(&mut runtime.pods) {
            if let Err(error) = remove(runtime, &pod).await {
                eprintln!("{}: cannot remove pod {pod}: {error:#}", runtime.name);
            }
        }
    }
    let times = outcome?;
    let mib = match &arguments.what {
        What::ExecStream(options) | What::PortForward(options) => Some(options.mib),
        _ => None,
    };
    report(&runtimes, &times, mib);
    if let What::Pull(options) = &arguments.what {
        let first = |rounds: &Vec<Times>| median(rounds.iter().map(|round| round[0].1).collect());
        let names = runtimes.iter().map(|runtime| runtime.name.clone());
        let medians: Vec<_> = names.zip(times.iter().map(first)).collect();
        pull::limit(options, &medians)?;
    }
    Ok(())
}

/// Every round's times, by runtime.
async fn measure(arguments: &Arguments, runtimes: &mut [Runtime]) -> Result<Vec<Vec<Times>>> {
    let mut all: Vec<Vec<Times>> = vec![Vec::new(); runtimes.len()];
    for runtime in &mut *runtimes {
        pull(runtime, &arguments.image)
            .await
            .with_context(|| format!("cannot pull {} on {}", arguments.image, runtime.name))?;
        for number in 0..arguments.beside {
            let pod = run_pod(runtime, &format!("beside-{number}")).await?;
            start(runtime, &pod, &arguments.image).await?;
        }
    }
    // The first round warms caches and is not counted.
    for round in 0..=arguments.rounds {
        for (runtime, all) in runtimes.iter_mut().zip(&mut all) {
            let times = match &arguments.what {
                What::Start => time_start(runtime, &arguments.image, round).await,
                What::Exec => time_exec(runtime, &arguments.image, round).await,
                What::ExecStream(options) => {
                    streaming::time_exec(runtime, &arguments.image, round, options).await
                }
                What::PortForward(options) => {
                    streaming::time_forward(runtime, &arguments.image, round, options).await
                }
                What::Pull(options) => pull::time(runtime, &arguments.image, options).await,
                What::Logs(options) => logs::time(runtime, &arguments.image, round, options).await,
                What::Network(_) | What::Throughput(_) => bail!("these are measured apart"),
            };
            let times = times.with_context(|| format!("round {round} on {}", runtime.name))?;
            if round > 0 {
                all.push(times);
            }
        }
    }
    Ok(all)
}

async fn connect(socket: &Path, arguments: &Arguments) -> Result<Runtime> {
    let path = socket.to_owned();
    let dial = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            tokio::net::UnixStream::connect(path)
                .await
                .map(TokioIo::new)
        }
    });
    let channel = Endpoint::from_static("http://cri.invalid")
        // The largest pull, on a slow disk.
        .timeout(Duration::from_secs(900))
        .connect_with_connector(dial)
        .await
        .with_context(|| format!("nobody answers at {}", socket.display()))?;
    let images = ImageServiceClient::new(channel.clone());
    let mut client = RuntimeServiceClient::new(channel);
    let version = version(&mut client)
        .await
        .with_context(|| format!("{} says nothing of itself", socket.display()))?;
    let name = format!("{} {}", version.runtime_name, version.runtime_version);
    Ok(Runtime {
        name,
        client,
        images,
        parent: arguments.cgroup_parent.clone(),
        pods: Vec::new(),
    })
}

/// Asks until there is an answer: containerd listens before it can give one.
async fn version(client: &mut RuntimeServiceClient<Channel>) -> Result<cri::VersionResponse> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match client.version(cri::VersionRequest::default()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if Instant::now() >= until => return Err(status.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn pull(runtime: &mut Runtime, image: &str) -> Result<()> {
    let spec = cri::ImageSpec {
        image: image.into(),
        ..Default::default()
    };
    let request = cri::ImageStatusRequest {
        image: Some(spec.clone()),
        verbose: false,
    };
    let known = runtime.images.image_status(request).await?.into_inner();
    if known.image.is_none() {
        let request = cri::PullImageRequest {
            image: Some(spec),
            ..Default::default()
        };
        runtime.images.pull_image(request).await?;
    }
    Ok(())
}

struct Pod {
    id: String,
    config: cri::PodSandboxConfig,
}

async fn run_pod(runtime: &mut Runtime, name: &str) -> Result<Pod> {
    let config = pod_config(runtime, name);
    run_pod_as(runtime, config).await
}

fn pod_config(runtime: &Runtime, name: &str) -> cri::PodSandboxConfig {
    let unique = format!("{name}-{}", std::process::id());
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: unique.clone(),
            uid: unique,
            namespace: "bench".into(),
            attempt: 0,
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: runtime.parent.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn run_pod_as(runtime: &mut Runtime, config: cri::PodSandboxConfig) -> Result<Pod> {
    let request = cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        ..Default::default()
    };
    let id = runtime
        .client
        .run_pod_sandbox(request)
        .await?
        .into_inner()
        .pod_sandbox_id;
    runtime.pods.push(id.clone());
    Ok(Pod { id, config })
}

fn container(pod: &Pod, image: &str) -> cri::CreateContainerRequest {
    let seccomp = cri::SecurityProfile {
        profile_type: cri::security_profile::ProfileType::RuntimeDefault.into(),
        localhost_ref: String::new(),
    };
    let security = cri::LinuxContainerSecurityContext {
        seccomp: Some(seccomp),
        ..Default::default()
    };
    cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            command: vec!["sleep".into(), "1000".into()],
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }),
        sandbox_config: Some(pod.config.clone()),
    }
}

async fn start(runtime: &mut Runtime, pod: &Pod, image: &str) -> Result<String> {
    let created = runtime
        .client
        .create_container(container(pod, image))
        .await?;
    let container_id = created.into_inner().container_id;
    let request = cri::StartContainerRequest {
        container_id: container_id.clone(),
    };
    runtime.client.start_container(request).await?;
    Ok(container_id)
}

async fn remove(runtime: &mut Runtime, pod: &str) -> Result<()> {
    let pod_sandbox_id = pod.to_owned();
    runtime
        .client
        .stop_pod_sandbox(cri::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        })
        .await?;
    runtime
        .client
        .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id })
        .await?;
    runtime.pods.retain(|known| known != pod);
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

async fn time_start(runtime: &mut Runtime, image: &str, round: usize) -> Result<Times> {
    let begin = Instant::now();
    let pod = run_pod(runtime, &format!("start-{round}")).await?;
    let ran = milliseconds(begin);
    let created = runtime
        .client
        .create_container(container(&pod, image))
        .await?;
    let made = milliseconds(begin);
    let request = cri::StartContainerRequest {
        container_id: created.into_inner().container_id,
    };
    runtime.client.start_container(request).await?;
    let whole = milliseconds(begin);
    let begin = Instant::now();
    remove(runtime, &pod.id).await?;
    Ok(vec![
        ("pod start", whole),
        ("  RunPodSandbox", ran),
        ("  CreateContainer", made - ran),
        ("  StartContainer", whole - made),
        ("stop and remove", milliseconds(begin)),
    ])
}

async fn time_exec(runtime: &mut Runtime, image: &str, round: usize) -> Result<Times> {
    let pod = run_pod(runtime, &format!("exec-{round}")).await?;
    let container_id = start(runtime, &pod, image).await?;
    let begin = Instant::now();
    let request = cri::ExecSyncRequest {
        container_id,
        cmd: vec!["true".into()],
        timeout: 10,
    };
    let answer = runtime.client.exec_sync(request).await?.into_inner();
    let took = milliseconds(begin);
    remove(runtime, &pod.id).await?;
    if answer.exit_code != 0 {
        bail!("the command ended with {}", answer.exit_code);
    }
    Ok(vec![("exec of true", took)])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the medians, and how much that is a second where each time is that of `mib` MiB.
fn report(runtimes: &[Runtime], all: &[Vec<Times>], mib: Option<usize>) {
    let medians: Vec<Vec<(&str, f64)>> = all
        .iter()
        .map(|rounds| {
            let names = rounds[0].iter().map(|(name, _)| *name).enumerate();
            names
                .map(|(at, name)| (name, median(rounds.iter().map(|r| r[at].1).collect())))
                .collect()
        })
        .collect();
    println!(
        "medians of {} rounds, in ms where nothing else is said",
        all[0].len()
    );
    for (runtime, medians) in runtimes.iter().zip(&medians) {
        println!("\n{}", runtime.name);
        for (name, value) in medians {
            match mib {
                Some(mib) => {
                    let speed = mib as f64 * 1000.0 / value;
                    println!("{name:<30}{value:>9.2}{speed:>9.0} MiB/s");
                }
                None => println!("{name:<30}{value:>9.2}"),
            }
        }
    }
    for (runtime, other) in runtimes.iter().zip(&medians).skip(1) {
        println!("\n{} / {}", runtime.name, runtimes[0].name);
        for ((name, value), (_, first)) in other.iter().zip(&medians[0]) {
            println!("{name:<30}{:>8.1} x", value / first);
        }
    }
}
