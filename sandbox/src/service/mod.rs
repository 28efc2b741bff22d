//! The pods and containers of this node, and everything that can be done to them.
//!
//! Each verb is a module. A mutating verb is an operation (see [`crate::operation`])
//! made of named stages: the record first, then the kernel, and a crash point
//! behind each, so that what a killed daemon leaves is always found again by
//! `recovery`. Kernel and disk work is done on blocking threads.

mod attach;
mod checkpoint;
mod create_container;
mod exec;
mod exec_session;
mod foreign;
mod hooks;
mod logs;
mod mounts;
mod network_gc;
mod pending;
mod pod_network;
mod recovery;
mod remove;
mod run_pod;
mod scope;
mod selinux;
mod start_container;
mod stats;
mod stop_container;
mod teardown;
mod update_resources;

use crate::cgroup::Cgroups;
use crate::error::{Kind, Result, SandboxError};
use crate::handler::Handlers;
use crate::id::{ContainerId, PodId};
use crate::monitor::{Event, Monitor, Program};
use crate::oci;
use crate::operation::{Key, OperationInfo, Operations, Stage, StageObserver, lock};
use crate::seccomp;
use crate::user_namespace::{Mapped, UserNamespaces};
use crate::view::{Objects, View};
use berth_netplugin::network::Network;
use std::collections::HashMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

pub use attach::{AttachControl, AttachEnd, AttachRequest, AttachSession};
pub use checkpoint::DEFAULT_TIMEOUT as CHECKPOINT_TIMEOUT;
pub use exec::ExecOutput;
pub use exec_session::{ExecControl, ExecExit, ExecRequest, ExecSession};
pub use logs::{LogPolicy, LogTotals, OnFull};
pub use pending::PendingInfo;
pub use pod_network::PodNetwork;

/// Every crash point of this crate, in the order in which they are passed.
pub const CRASH_POINTS: &[&str] = &[
    "run_pod.record",
    "run_pod.files",
    "run_pod.cgroup",
    "run_pod.monitor",
    "run_pod.namespaces",
    "run_pod.network",
    "run_pod.ready",
    "create_container.record",
    "create_container.snapshot",
    "create_container.cgroup",
    "create_container.created",
    "start_container.intent",
    "start_container.bundle",
    "start_container.planned",
    "start_container.launched",
    "start_container.running",
    "start_container.poststart",
    "checkpoint.record",
    "checkpoint.described",
    "checkpoint.frozen",
    "checkpoint.dumping",
    "checkpoint.dumped",
    "checkpoint.copied",
    "checkpoint.thawed",
    "checkpoint.archived",
    "checkpoint.done",
    "stop_container.signalled",
    "stop_container.ended",
    "poststop.run",
    "remove_container.record",
    "remove_container.released",
    "stop_pod.record",
    "stop_pod.containers",
    "stop_pod.network",
    "stop_pod.monitor",
    "stop_pod.files",
    "stop_pod.stopped",
    "remove_pod.record",
    "remove_pod.containers",
];

/// What an image service's errors are here.
pub type ImageError = Box<dyn std::error::Error + Send + Sync>;

/// What pods and containers need of the image service. Every call may block.
pub trait Images: Send + Sync + 'static {
    /// Makes the writable layer of `container` on top of the image, and keeps the
    /// images `volumes` as long as it; again after a crash it is the same one.
    ///
    /// # Errors
    /// The image is not here, or the disk refuses.
    fn prepare(
        &self,
        container: &ContainerId,
        image_id: &str,
        volumes: &[String],
    ) -> std::result::Result<(), ImageError>;

    /// The container's root file system as a detached mount, its owners as `owners`
    /// maps them, its files with the SELinux label `label`.
    ///
    /// # Errors
    /// Nothing was prepared, or the kernel refuses.
    fn mount(
        &self,
        container: &ContainerId,
        owners: Option<&Mapped>,
        label: Option<&str>,
    ) -> std::result::Result<OwnedFd, ImageError>;

    /// An image that was prepared as a volume of the container, or what is at
    /// `sub_path` in it, as a detached mount that cannot be written to.
    ///
    /// # Errors
    /// It was not prepared, has no such path, or the kernel refuses.
    fn mount_volume(
        &self,
        container: &ContainerId,
        image_id: &str,
        sub_path: &str,
        owners: Option<&Mapped>,
        label: Option<&str>,
    ) -> std::result::Result<OwnedFd, ImageError>;

    /// A regular file of the image, symlinks resolved inside it; `None` when there is none.
    ///
    /// # Errors
    /// The file is longer than `max_bytes`, or cannot be read.
    fn read_file(
        &self,
        image_id: &str,
        path: &str,
        max_bytes: usize,
    ) -> std::result::Result<Option<Vec<u8>>, ImageError>;

    /// Writes what the container has added to its image or changed in it to `to`, as a
    /// tar archive, and gives the paths of what it has deleted. It must stand still.
    ///
    /// # Errors
    /// Something cannot be read, or written to `to`.
    fn write_changes(
        &self,
        container: &ContainerId,
        to: &mut dyn std::io::Write,
    ) -> std::result::Result<Vec<String>, ImageError>;

    /// Removes what `prepare` made; what is gone counts as removed.
    ///
    /// # Errors
    /// The disk refuses.
    fn remove(&self, container: &ContainerId) -> std::result::Result<(), ImageError>;

    /// IDs of the containers that something was prepared for.
    fn prepared(&self) -> Vec<String>;
}

/// How pods and containers are made here.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Durable state; pods go below `pods`.
    pub lib: PathBuf,
    /// State until reboot; sandboxes go below `sandboxes`.
    pub run: PathBuf,
    /// The berth-monitor program.
    pub monitor: PathBuf,
    /// Longest log line in bytes before it is split.
    pub log_line_bytes: u32,
    /// How much containers may log.
    pub log_policy: LogPolicy,
    /// What containers get that ask for nothing else.
    pub defaults: oci::Defaults,
    /// SELinux, where pods are to have labels.
    pub selinux: Option<Arc<crate::selinux::Selinux>>,
    /// What pods may name as their runtime handler.
    pub handlers: Handlers,
    /// Directories of CDI files, the least important first.
    pub cdi_dirs: Vec<PathBuf>,
    /// The host's resolv.conf, for pods without a DNS configuration.
    pub host_resolv_conf: PathBuf,
    /// How often networks of pods that are gone are looked for.
    pub network_gc: Duration,
}

/// The pods and containers of this node. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes(Arc<Inner>);

struct Inner {
    settings: Settings,
    boot_id: String,
    objects: Objects,
    operations: Operations,
    program: Program,
    monitors: Mutex<HashMap<PodId, Arc<Monitor>>>,
    /// Containers whose Launch the monitor may have: their start ends by itself.
    /// One that is not here yet is still being planned, which may take for ever.
    /// True: hooks are run on the way, and it is not waited for but called off.
    launching: Mutex<HashMap<ContainerId, bool>>,
    poststops: hooks::Poststops,
    events: mpsc::UnboundedSender<(PodId, Event)>,
    network: Arc<Network>,
    cgroups: Arc<Cgroups>,
    images: Arc<dyn Images>,
    seccomp: seccomp::Compiler,
    pending: pending::Pending,
    log_book: logs::LogBook,
    user_namespaces: UserNamespaces,
    /// Why pods cannot have user namespaces here; `None` when they can.
    user_namespaces_missing: Option<String>,
    rates: crate::stats::Rates,
    updates: update_resources::Updates,
    checkpoints: checkpoint::Checkpoints,
}

impl Sandboxes {
    /// Reads the records, takes over what still runs and undoes what was left half made.
    ///
    /// # Errors
    /// The records' directory cannot be read, or the monitor program is missing.
    /// A record that cannot be read is no error: it is kept and reported.
    pub async fn open(
        settings: Settings,
        network: Arc<Network>,
        cgroups: Arc<Cgroups>,
        images: Arc<dyn Images>,
        observer: Arc<StageObserver>,
    ) -> Result<Self> {
        let (events, heard) = mpsc::unbounded_channel();
        let (inner, unreadable) = blocking(move || {
            let internal = |text: &str| {
                let text = text.to_owned();
                move |error: std::io::Error| SandboxError::caused(Kind::Internal, text, error)
            };
            let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map_err(internal("cannot read this boot's ID"))?;
            std::fs::create_dir_all(settings.run.join("sandboxes"))
                .map_err(internal("cannot make the sandboxes' directory"))?;
            let program = Program::open(&settings.monitor)
                .map_err(|e| SandboxError::caused(Kind::Internal, "no monitor, no pods", e))?;
            let (objects, unreadable) = Objects::load(settings.lib.join("pods"))?;
            let user_namespaces = UserNamespaces::default();
            let checked = user_namespaces.check(&program, &settings.lib);
            let user_namespaces_missing = checked.err().map(|error| chain(&error));
            if let Some(why) = &user_namespaces_missing {
                tracing::warn!(why, "pods cannot have user namespaces");
            }
            let inner = Inner {
                boot_id: boot_id.trim().to_owned(),
                objects,
                operations: Operations::new(observer),
                program,
                monitors: Mutex::default(),
                launching: Mutex::default(),
                poststops: hooks::Poststops::default(),
                events,
                network,
                cgroups,
                images,
                seccomp: seccomp::Compiler::new().map_err(|error| {
                    SandboxError::caused(Kind::Internal, "no seccomp, no containers", error)
                })?,
                pending: pending::Pending::default(),
                log_book: logs::LogBook::default(),
                user_namespaces,
                user_namespaces_missing,
                rates: crate::stats::Rates::default(),
                updates: update_resources::Updates::default(),
                checkpoints: checkpoint::Checkpoints::default(),
                settings,
            };
            Ok((inner, unreadable))
        })
        .await?;
        let sandboxes = Self(Arc::new(inner));
        tokio::spawn(listen(Arc::downgrade(&sandboxes.0), heard));
        recovery::recover(&sandboxes.0, unreadable).await;
        tokio::spawn(pending::work(Arc::downgrade(&sandboxes.0)));
        tokio::spawn(network_gc::work(Arc::downgrade(&sandboxes.0)));
        Ok(sandboxes)
    }

    /// Everything there is, at this moment. Never waits.
    pub fn view(&self) -> Arc<View> {
        self.0.objects.view()
    }

    /// Told at every change of the view.
    pub fn changes(&self) -> tokio::sync::watch::Receiver<()> {
        self.0.objects.changes()
    }

    /// The operations that run now, oldest first.
    pub fn operations(&self) -> Vec<OperationInfo> {
        self.0.operations.list()
    }

    /// What is left to do in the background.
    pub fn pending(&self) -> Vec<PendingInfo> {
        self.0.pending.list()
    }

    /// The cgroups that containers are put into.
    pub fn cgroups(&self) -> &Cgroups {
        &self.0.cgroups
    }

    /// The OCI runtime spec of a container as it is started with, the values of its
    /// environment left out. Blocking: it looks at devices.
    ///
    /// # Errors
    /// `ContainerNotFound`, or what was asked for is not there any more.
    pub fn runtime_spec(&self, id: &str) -> Result<serde_json::Value> {
        let container = self.0.container(id)?;
        let (mut spec, _) = self.0.runtime_spec(&container)?;
        if let Some(process) = spec.process_mut()
            && let Some(env) = process.env_mut()
        {
            for entry in env {
                let name = entry.split('=').next().unwrap_or_default();
                *entry = format!("{name}=[redacted]");
            }
        }
        serde_json::to_value(&spec).map_err(internal("the spec is no JSON"))
    }

    /// Why pods cannot have user namespaces on this node; `None` when they can.
    pub fn user_namespaces_missing(&self) -> Option<&str> {
        self.0.user_namespaces_missing.as_deref()
    }
}

impl Inner {
    fn container(&self, id: &str) -> Result<Arc<crate::container::ContainerRecord>> {
        let view = self.objects.view();
        let listed = view
            .container(id)
            .filter(|container| container.state.is_listed());
        listed
            .cloned()
            .ok_or_else(|| SandboxError::no_container(id))
    }

    fn pod(&self, id: &str) -> Result<Arc<crate::pod::PodRecord>> {
        let view = self.objects.view();
        let listed = view.pod(id).filter(|pod| pod.state.is_listed());
        listed.cloned().ok_or_else(|| SandboxError::no_pod(id))
    }

    fn monitor(&self, pod: &PodId) -> Result<Arc<Monitor>> {
        lock(&self.monitors).get(pod).cloned().ok_or_else(|| {
            SandboxError::new(Kind::Internal, format!("pod sandbox {pod} has no monitor"))
        })
    }

    fn run_dir(&self, pod: &PodId) -> PathBuf {
        self.settings.run.join("sandboxes").join(pod.as_str())
    }

    fn log_path(&self, pod: &crate::PodSpec, container: &crate::ContainerSpec) -> PathBuf {
        if pod.log_directory.as_os_str().is_empty() || container.log_path.as_os_str().is_empty() {
            return PathBuf::new();
        }
        pod.log_directory.join(&container.log_path)
    }

    /// One operation on `object`, joined where it runs already.
    async fn operation<F>(
        self: &Arc<Self>,
        kind: &'static str,
        object: impl Into<String>,
        subject: impl Into<String>,
        work: impl FnOnce(Arc<Self>, Stage) -> F,
    ) -> Result<String>
    where
        F: Future<Output = Result<String>> + Send + 'static,
    {
        let key = Key {
            kind,
            object: object.into(),
        };
        let me = self.clone();
        self.operations
            .join_or_begin(key, subject.into(), move |stage| work(me, stage))
            .await
    }
}

/// Hears what monitors say, until the service is gone.
async fn listen(inner: std::sync::Weak<Inner>, mut heard: mpsc::UnboundedReceiver<(PodId, Event)>) {
    while let Some((pod, event)) = heard.recv().await {
        let Some(inner) = inner.upgrade() else { return };
        // Each on its own: one may have to wait for a start to settle.
        tokio::spawn(async move {
            match event {
                Event::Exited(exited) => recovery::container_exited(&inner, &exited).await,
                Event::Lost => recovery::connection_lost(&inner, &pod).await,
            }
        });
    }
}

/// Runs kernel or disk work on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
        .await
        .unwrap_or_else(|panic| {
            Err(SandboxError::caused(
                Kind::Internal,
                "the work broke off",
                panic,
            ))
        })
}

/// Runs work to its end, also when the caller hangs up.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(internal("the work broke off"))
}

/// Nanoseconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn internal<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    text: impl Into<String>,
) -> impl FnOnce(E) -> SandboxError {
    let text = text.into();
    move |error| SandboxError::caused(Kind::Internal, text, error)
}

/// An error and its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
