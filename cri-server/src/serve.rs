//! `berth serve`: the parts are put together, served, and taken apart again.
//! Containers are no part of it: they stay when the daemon goes.

use crate::admin::Admin;
use crate::config::{self, Config, ConfigError, Layout, LogsOnFull, Overrides, Places};
use crate::convert::NodeFacts;
use crate::daemon::Daemon;
use crate::image_source::ImageSource;
use crate::images::Images;
use crate::metrics::Metrics;
use crate::pull_cgroup;
use crate::rpc::MESSAGE_BYTES;
use crate::runtime::Runtime;
use crate::streaming::{Streaming, StreamingError};
use crate::{logging, metrics_http, socket};
use berth_image_service::pinned::Patterns;
use berth_image_service::proxy::ProxyEnvironment;
use berth_image_service::{hosts, service as image_service};
use berth_netplugin::{bridge, network};
use berth_proto::admin_v1::admin_server::AdminServer;
use berth_proto::runtime_v1::image_service_server::ImageServiceServer;
use berth_proto::runtime_v1::runtime_service_server::RuntimeServiceServer;
use berth_sandbox::container_spec::SeccompProfile;
use berth_sandbox::handler::{Handlers, OciRuntime};
use berth_sandbox::service::{LogPolicy, OnFull, Sandboxes, Settings};
use berth_sandbox::{apparmor, cgroup, oci};
use std::error::Error;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

/// How long RPCs that run may still take once the daemon is told to stop. What
/// takes longer is found again by the next daemon: operations are resumable.
const GRACE: Duration = Duration::from_secs(5);

/// Threads that do kernel and disk work; each waits for one thing at a time.
const BLOCKING_THREADS: usize = 128;

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("berth serve needs root: it makes namespaces, mounts and cgroups")]
    NotRoot,
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
    #[error("berth-monitor is neither beside this program nor in PATH; set monitor.path")]
    NoMonitor,
    #[error("cannot use the cgroups of this host")]
    Cgroups(#[source] cgroup::Error),
    #[error("cannot have the cgroup for pulls, images.pull_cgroup")]
    PullCgroup(#[source] cgroup::Error),
    #[error("cannot open the pod network")]
    Network(#[source] Box<network::NetworkError>),
    #[error("cannot open the images")]
    Images(#[source] image_service::OpenError),
    #[error("cannot take over the pods")]
    Sandboxes(#[source] berth_sandbox::error::SandboxError),
    #[error(transparent)]
    Streaming(#[from] StreamingError),
    #[error("cannot listen on {address} for metrics")]
    Metrics {
        address: String,
        source: std::io::Error,
    },
    #[error("cannot {what}")]
    Start {
        what: &'static str,
        source: Box<dyn Error + Send + Sync>,
    },
}

pub(crate) fn start<E: Into<Box<dyn Error + Send + Sync>>>(
    what: &'static str,
) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::Start {
        what,
        source: source.into(),
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting; nothing is left running then.
pub fn serve(overrides: &Overrides) -> Result<(), ServeError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ServeError::NotRoot);
    }
    let layout = Layout::find(overrides)?;
    let config = Config::load(&layout)?;
    let log = logging::init(config.log.level, config.log.format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("berth")
        .build()
        .map_err(start("start threads"))?;
    let outcome = runtime.block_on(run(layout, config, log));
    // Blocking work that hangs (a dead disk) must not keep the process.
    runtime.shutdown_timeout(GRACE);
    outcome
}

async fn run(layout: Layout, config: Config, log: logging::Handle) -> Result<(), ServeError> {
    let places = layout.places(&config);
    for dir in [&places.lib, &places.run] {
        socket::make_dir(dir)?;
    }
    // Both: two roots may share one of them by mistake.
    let _lib = socket::lock(&places.lib)?;
    let _run = if places.run == places.lib {
        None
    } else {
        Some(socket::lock(&places.run)?)
    };
    // Signals from here on are ours: one that comes during recovery is not lost.
    let mut terminate = signal(SignalKind::terminate()).map_err(start("hear SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("hear SIGINT"))?;
    let hangup = signal(SignalKind::hangup()).map_err(start("hear SIGHUP"))?;

    let metrics_listener = match config.metrics.address.as_str() {
        "" => None,
        address => {
            Some(
                metrics_http::bind(address)
                    .await
                    .map_err(|source| ServeError::Metrics {
                        address: address.to_owned(),
                        source,
                    })?,
            )
        }
    };
    let mode = config.grpc.socket_mode.0;
    let (streaming, streaming_listener) = bind_streaming(&config).await?;
    let daemon = Arc::new(open(config, places, Arc::new(streaming)).await?);
    let listener = socket::listen(&daemon.places.socket, mode)?;

    tokio::spawn(reload(hangup, layout, log));
    if let Some(listener) = metrics_listener {
        tokio::spawn(metrics_http::serve(listener, daemon.clone()));
    }
    let streaming = daemon.streaming.clone();
    tokio::spawn(streaming.serve(streaming_listener, daemon.sandboxes.clone()));
    macro_rules! bounded {
        ($server:ident, $service:expr) => {
            $server::new($service)
                .max_decoding_message_size(MESSAGE_BYTES)
                .max_encoding_message_size(MESSAGE_BYTES)
        };
    }
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let serving = tonic::transport::Server::builder()
        .add_service(bounded!(RuntimeServiceServer, Runtime::new(daemon.clone())))
        .add_service(bounded!(ImageServiceServer, Images::new(daemon.clone())))
        .add_service(bounded!(AdminServer, Admin::new(daemon.clone())))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            // The sender lives until after the server has ended.
            let _ = stopped.wait_for(|stop| *stop).await;
        });
    let mut serving = tokio::spawn(serving);

    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %daemon.places.socket.display(),
        state = %daemon.places.lib.display(),
        cgroup_driver = ?daemon.sandboxes.cgroups().driver(),
        streaming = %daemon.streaming.address(),
        "serving"
    );
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "cannot tell systemd that the daemon is ready");
    }
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping, containers stay"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping, containers stay"),
        ended = &mut serving => {
            return match ended {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(start("serve")(error)),
                Err(panic) => Err(start("serve")(panic)),
            };
        }
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.send_replace(true);
    let streaming = daemon.streaming.clone();
    let streams = tokio::spawn(async move { streaming.stop().await });
    if tokio::time::timeout(GRACE, serving).await.is_err() {
        tracing::warn!(
            seconds = GRACE.as_secs(),
            "calls are still running; the next start finishes or undoes them"
        );
    }
    // Each says goodbye within seconds; what does not is cut off.
    let _ = tokio::time::timeout(GRACE, streams).await;
    // Gone before the locks: who comes next finds the place free.
    let _ = std::fs::remove_file(&daemon.places.socket);
    Ok(())
}

/// Opens everything; recovery of what an earlier daemon left is part of it.
async fn open(
    config: Config,
    places: Places,
    streaming: Arc<Streaming>,
) -> Result<Daemon, ServeError> {
    let metrics = Metrics::new().map_err(start("make the metrics"))?;
    let unset_seccomp = match config.runtime.unset_seccomp {
        config::UnsetSeccomp::Unconfined => SeccompProfile::Unconfined,
        config::UnsetSeccomp::RuntimeDefault => SeccompProfile::RuntimeDefault,
    };
    let handlers = handlers(&config, &places);
    let facts = NodeFacts::detect(unset_seccomp, handlers.clone());
    let cgroups = cgroup::Cgroups::detect(cgroup_settings(&config)).map_err(ServeError::Cgroups)?;
    let cgroups = Arc::new(cgroups);
    let network = Arc::new(
        network::Network::open(network_settings(&config, &places))
            .map_err(|error| ServeError::Network(Box::new(error)))?,
    );
    let mut settings = image_settings(&config, &places);
    settings.writers = pull_cgroup::writers(&config, &cgroups).await?;
    let images = tokio::task::spawn_blocking(move || image_service::ImageService::open(settings))
        .await
        .map_err(start("open the images"))?
        .map_err(ServeError::Images)?;
    let rate = u64::from(config.images.scrub_mib_per_second) << 20;
    if let (hours @ 1.., Some(bytes_per_second)) =
        (config.images.scrub_every_hours, NonZeroU64::new(rate))
    {
        images.begin_scrubbing(image_service::Scrubbing {
            every: Duration::from_secs(u64::from(hours) * 60 * 60),
            bytes_per_second,
        });
    }
    let images = ImageSource::new(images);
    let mut defaults = oci::Defaults::default();
    // Checked when the configuration was read.
    let _ = config.containers.apply(&mut defaults);
    let nofile = (config.runtime.nofile_soft, config.runtime.nofile_hard);
    defaults.rlimits.insert(oci::Rlimit::Nofile, nofile);
    if facts.apparmor {
        defaults.apparmor = true;
        match tokio::task::spawn_blocking(apparmor::load_default).await {
            Ok(Ok(())) => defaults.apparmor_profile = Some(apparmor::DEFAULT_PROFILE.to_owned()),
            Ok(Err(error)) => tracing::warn!(
                error = crate::rpc::chain(&error),
                "no default AppArmor profile: containers that ask for it are unconfined"
            ),
            Err(error) => return Err(start("load the AppArmor profile")(error)),
        }
    }
    let settings = Settings {
        lib: places.lib.clone(),
        run: places.run.clone(),
        monitor: monitor_program(&config.monitor.path).ok_or(ServeError::NoMonitor)?,
        log_line_bytes: config.runtime.log_line_bytes,
        log_policy: LogPolicy {
            on_full: match config.logs.on_full {
                LogsOnFull::Block => OnFull::Block,
                LogsOnFull::Drop => OnFull::Drop,
            },
            bytes_per_second: config.logs.bytes_per_second,
            file_bytes: config.logs.file_bytes,
        },
        defaults: defaults.within_host_limits(),
        handlers,
        cdi_dirs: config.runtime.cdi_spec_dirs.clone(),
        host_resolv_conf: PathBuf::from("/etc/resolv.conf"),
        network_gc: Duration::from_secs(config.network.gc_seconds.into()),
    };
    let observer = {
        let metrics = metrics.clone();
        Arc::new(move |operation, stage, took| metrics.stage(operation, stage, took))
    };
    let sandboxes = Sandboxes::open(
        settings,
        network.clone(),
        cgroups,
        Arc::new(images.clone()),
        observer,
    )
    .await
    .map_err(ServeError::Sandboxes)?;
    Ok(Daemon::new(
        config, places, facts, sandboxes, images, network, metrics, streaming,
    ))
}

async fn bind_streaming(config: &Config) -> Result<(Streaming, TcpListener), ServeError> {
    let settings = config.streaming.settings();
    // Checked when the configuration was read.
    let settings = settings.map_err(|(key, problem)| ConfigError::Value { key, problem })?;
    Ok(Streaming::bind(&settings).await?)
}

/// The OCI runtimes of this node.
pub fn handlers(config: &Config, places: &Places) -> Handlers {
    let path: Vec<PathBuf> =
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let in_path = |name: &str| {
        let found = path.iter().map(|dir| dir.join(name)).find(|p| p.is_file());
        found.unwrap_or_else(|| PathBuf::from(name))
    };
    let configured = config.handlers.iter().map(|(name, handler)| {
        let runtime = OciRuntime {
            path: match handler.path.as_os_str().is_empty() {
                true => in_path(name),
                false => handler.path.clone(),
            },
            root: handler.root.clone(),
            options: handler.options.clone(),
            privileged_without_host_devices: handler.privileged_without_host_devices,
            annotations: handler.annotations.clone(),
            base_spec: Some(handler.base_spec.clone()).filter(|p| !p.as_os_str().is_empty()),
            ..OciRuntime::default()
        };
        (name.clone(), runtime)
    });
    Handlers::new(configured.collect(), &path, &places.run.join("handlers"))
}

/// What the configuration says of cgroups.
pub fn cgroup_settings(config: &Config) -> cgroup::Settings {
    cgroup::Settings {
        driver: match config.cgroup.driver {
            config::CgroupDriver::Auto => cgroup::DriverChoice::Auto,
            config::CgroupDriver::Cgroupfs => cgroup::DriverChoice::Cgroupfs,
            config::CgroupDriver::Systemd => cgroup::DriverChoice::Systemd,
        },
        default_parent: config.cgroup.parent.clone(),
        memory_guard: config.cgroup.memory_guard,
        pids_limit: config.cgroup.pids_limit,
        ..cgroup::Settings::default()
    }
}

/// What the image service is opened with; also for explaining a pull without a daemon.
pub fn image_settings(config: &Config, places: &Places) -> image_service::Settings {
    let mut settings =
        image_service::Settings::new(places.images.clone(), places.containers.clone());
    settings.certs_d = places.certs_d.clone();
    settings.registries_conf = Some(places.registries_conf.clone());
    settings.auth_file = Some(places.auth_file.clone());
    settings.policy = Some(places.policy.clone());
    settings.fallback = match config.images.fallback {
        config::Fallback::Origin => hosts::Fallback::Origin,
        config::Fallback::Never => hosts::Fallback::Never,
    };
    settings.proxies = ProxyEnvironment::of_this_process();
    settings.pinned = Patterns::new(config.images.pinned.clone());
    settings.max_pulls = config.images.max_parallel_pulls as usize;
    settings.max_layer_downloads = config.images.max_parallel_downloads as usize;
    settings.max_layers = config.images.max_parallel_layers as usize;
    settings.timeouts.min_rate = config.images.min_bytes_per_second;
    settings
}

fn network_settings(config: &Config, places: &Places) -> network::NetworkSettings {
    let subnet = |wanted: fn(&str) -> bool| {
        let found = config.network.subnets.iter().find(|subnet| wanted(subnet));
        // Checked when the configuration was read.
        found.and_then(|subnet| subnet.parse().ok())
    };
    network::NetworkSettings {
        mode: match config.network.default {
            config::DefaultNetwork::Builtin => network::Mode::Builtin,
            config::DefaultNetwork::Wait => network::Mode::Wait,
        },
        cni_conf_dir: places.cni_conf_dir.clone(),
        cni_bin_dirs: config.network.cni_bin_dirs.clone(),
        plugin_deadline: Duration::from_secs(config.network.cni_timeout_seconds.into()),
        cni_network: Some(config.network.cni_network.clone()).filter(|name| !name.is_empty()),
        cni_template: Some(config.network.cni_template.clone())
            .filter(|path| !path.as_os_str().is_empty()),
        handler_conf_dirs: config.network.handler_dirs().collect(),
        primary: match config.network.primary_family {
            config::PrimaryFamily::Ipv4 => network::Primary::Ipv4,
            config::PrimaryFamily::Ipv6 => network::Primary::Ipv6,
            config::PrimaryFamily::AsGiven => network::Primary::AsGiven,
        },
        bridge: bridge::Settings {
            bridge: config.network.bridge.clone(),
            ipv4: subnet(|subnet| !subnet.contains(':')),
            ipv6: subnet(|subnet| subnet.contains(':')),
            mtu: Some(config.network.mtu).filter(|mtu| *mtu != 0),
            masquerade: config.network.masquerade,
            no_masquerade: config
                .network
                .no_masquerade
                .iter()
                .filter_map(|net| net.parse().ok())
                .collect(),
            hairpin: config.network.hairpin,
            state_dir: places.lib.join("network"),
        },
    }
}

/// The configured program, else the one beside this one, else the first in PATH.
pub fn monitor_program(configured: &Path) -> Option<PathBuf> {
    const NAME: &str = "berth-monitor";
    if !configured.as_os_str().is_empty() {
        return Some(configured.to_owned());
    }
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| own.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(NAME))
        .find(|program| program.is_file())
}

/// SIGHUP reads the log level again and changes nothing else.
async fn reload(mut hangup: tokio::signal::unix::Signal, layout: Layout, log: logging::Handle) {
    while hangup.recv().await.is_some() {
        let layout = layout.clone();
        let read = tokio::task::spawn_blocking(move || Config::load(&layout)).await;
        match read {
            Ok(Ok(config)) => {
                log.set_level(config.log.level);
                tracing::info!(level = %config.log.level, "SIGHUP: log level read again");
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    error = crate::rpc::chain(&error),
                    "SIGHUP: the configuration is bad, nothing changed"
                );
            }
            Err(_) => tracing::warn!("SIGHUP: reading the configuration broke off"),
        }
    }
}
