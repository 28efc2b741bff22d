//! One private instance of Berth: its own root, network namespace, cgroup and
//! daemon. Dropping it removes every pod through CRI and fails the test when
//! something is left after that.

use crate::binaries;
use crate::container::Container;
use crate::deadline::{PATIENCE, eventually, slowness, within};
use crate::host::Host;
use crate::image::{Format, Image};
use crate::leftovers::{self, Footprint};
use crate::pod::Pod;
use crate::registry::{Access, Registry};
use berth_proto::admin_v1::{OperationsRequest, OperationsResponse, admin_client::AdminClient};
use berth_proto::runtime_v1::image_service_client::ImageServiceClient;
use berth_proto::runtime_v1::runtime_service_client::RuntimeServiceClient;
use berth_proto::runtime_v1::{
    self as cri, ImageSpec, ListContainersRequest, ListPodSandboxRequest, PodSandboxConfig,
    PullImageRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
};
use hyper_util::rt::TokioIo;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

/// No call takes this long when all is well.
const ANSWER: Duration = Duration::from_secs(60);

/// As large as the kubelet's client accepts. Source: kubelet, `maxMsgSize`.
const MESSAGE_BYTES: usize = 16 << 20;

pub struct Node {
    pub host: Arc<Host>,
    footprint: Footprint,
    runtime: Runtime,
    daemon: Mutex<Option<Child>>,
    channel: Mutex<Channel>,
    registry: OnceLock<Registry>,
    base: OnceLock<String>,
    names: AtomicU32,
}

/// How to start one that is not as usual.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// More lines of config.toml.
    config: String,
    /// More lines of its section cgroup.
    cgroup: String,
    /// The I/O weight of the cgroup that layers are written in, where there is one.
    pull_weight: Option<u32>,
    crash_at: Option<String>,
}

impl Options {
    #[must_use]
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self
    }

    /// A line of the section cgroup, which the node writes itself.
    #[must_use]
    pub fn cgroup(mut self, line: &str) -> Self {
        self.cgroup.push_str(line);
        self.cgroup.push('\n');
        self
    }

    /// Layers are written in a cgroup of their own, see [`Node::pull_cgroups`]; weight 0: as the
    /// kernel has it.
    #[must_use]
    pub fn pull_cgroup(mut self, io_weight: u32) -> Self {
        self.pull_weight = Some(io_weight);
        self
    }

    #[must_use]
    pub fn crash_at(mut self, point: &str) -> Self {
        self.crash_at = Some(point.to_owned());
        self
    }

    /// # Panics
    /// When the daemon does not come up.
    pub fn start(self) -> Node {
        let node = Node::prepare_with(&self.config, &self.cgroup);
        if let Some(weight) = self.pull_weight {
            node.write_pull_cgroup(weight);
        }
        node.launch(self.crash_at.as_deref());
        node
    }
}

impl Node {
    /// Starts one with the embedded defaults, save for the cgroup's name.
    ///
    /// # Panics
    /// Without root, and when the daemon does not come up.
    pub fn start() -> Self {
        Options::default().start()
    }

    pub fn options() -> Options {
        Options::default()
    }

    /// One whose daemon dies when it comes to the named point.
    pub fn crash_at(point: &str) -> Self {
        Options::default().crash_at(point).start()
    }

    /// Everything but the daemon.
    pub fn prepare(config: &str) -> Self {
        Self::prepare_with(config, "")
    }

    fn prepare_with(config: &str, cgroup: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests need root: they run containers"
        );
        erase_remains_of_the_dead();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("{}{}-{number}", PREFIX, std::process::id());
        let root = temp().join(&name);
        fs::create_dir(&root).expect("cannot make the node's root");
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).expect("chmod");
        let footprint = Footprint {
            root: root.clone(),
            cgroup: cgroup_of(&name),
        };
        fs::create_dir_all(root.join("etc")).expect("cannot make the node's etc");
        fs::write(
            root.join("etc/config.toml"),
            format!(
                "{config}\n[cgroup]\nparent = \"/{}\"\n{}{cgroup}\n{}",
                footprint.cgroup,
                driver(),
                crun_on_a_mixed_host(&root),
            ),
        )
        .expect("cannot write config.toml");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("cannot start tokio");
        let channel = {
            let _inside = runtime.enter();
            connect(root.join("run/berth.sock"))
        };
        let node = Self {
            host: Arc::new(Host::new().expect("cannot make the test's host")),
            footprint,
            runtime,
            daemon: Mutex::new(None),
            channel: Mutex::new(channel),
            registry: OnceLock::new(),
            base: OnceLock::new(),
            names: AtomicU32::new(0),
        };
        if std::env::var_os("BERTH_TEST_PULL_CGROUP").is_some() {
            node.write_pull_cgroup(0);
        }
        node
    }

    fn write_pull_cgroup(&self, io_weight: u32) {
        let dir = self.root().join("etc/conf.d");
        fs::create_dir_all(&dir).expect("cannot make conf.d");
        let separator = if is_systemd_driver() { "-" } else { "/" };
        let text = format!(
            "[images]\npull_cgroup = \"/{}{separator}{PULLS}\"\npull_io_weight = {io_weight}\n",
            self.footprint.cgroup
        );
        fs::write(dir.join("pull-cgroup.toml"), text).expect("cannot write pull-cgroup.toml");
    }

    /// The folders of the cgroup that layers are written in, in each hierarchy that has it.
    pub fn pull_cgroups(&self) -> Vec<PathBuf> {
        let found = self.footprint.cgroups().into_iter();
        found.filter(|dir| leftovers::is_for_pulls(dir)).collect()
    }

    /// The processes that write layers now, once for each hierarchy.
    pub fn layer_writers(&self) -> Vec<Vec<i32>> {
        let in_all = |dir: &PathBuf| {
            let children = fs::read_dir(dir).into_iter().flatten().flatten();
            let scopes = children
                .map(|child| child.path())
                .filter(|path| path.is_dir());
            let dirs = scopes.chain([dir.clone()]);
            dirs.flat_map(|dir| leftovers::processes_of(&dir)).collect()
        };
        self.pull_cgroups().iter().map(in_all).collect()
    }

    pub fn root(&self) -> &Path {
        &self.footprint.root
    }

    pub fn footprint(&self) -> &Footprint {
        &self.footprint
    }

    pub fn socket(&self) -> PathBuf {
        self.root().join("run/berth.sock")
    }

    /// A name no other object of this node has.
    pub fn fresh(&self, what: &str) -> String {
        format!("{what}-{}", self.names.fetch_add(1, Ordering::SeqCst) + 1)
    }

    // The daemon.

    fn launch(&self, crash_at: Option<&str>) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("cannot open the daemon's log");
        let mut command = Command::new(binaries::berth());
        command
            .args(["serve", "--root"])
            .arg(self.root())
            .env("RUST_BACKTRACE", "1")
            .env_remove("BERTH_CRASH_AT")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup"))
            .stderr(log);
        if let Some(point) = crash_at {
            command.env("BERTH_CRASH_AT", point);
        }
        let child = self
            .host
            .enter(|| command.spawn())
            .expect("cannot run berth");
        *lock(&self.daemon) = Some(child);
        self.wait_until_it_answers(crash_at.is_some());
    }

    fn wait_until_it_answers(&self, may_crash: bool) {
        let channel = {
            let _inside = self.runtime.enter();
            connect(self.socket())
        };
        *lock(&self.channel) = channel;
        let up = within(PATIENCE, || {
            if !self.is_running() {
                return Some(false);
            }
            let version = cri::VersionRequest::default();
            self.wait(self.runtime().version(version))
                .is_ok()
                .then_some(true)
        });
        match up {
            Some(true) => {}
            Some(false) if may_crash => {}
            Some(false) => panic!("berth serve ended at its start:\n{}", self.log()),
            None => panic!("berth serve does not answer:\n{}", self.log()),
        }
    }

    /// Whether the daemon is there; it may have died at a crash point.
    pub fn is_running(&self) -> bool {
        let mut daemon = lock(&self.daemon);
        daemon
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    pub fn daemon_pid(&self) -> Option<u32> {
        lock(&self.daemon).as_ref().map(Child::id)
    }

    /// SIGKILL, as a crash or the OOM killer would.
    pub fn kill_daemon(&self) {
        let child = lock(&self.daemon).take();
        if let Some(mut child) = child {
            child.kill().expect("cannot kill the daemon");
            child.wait().expect("cannot wait for the daemon");
        }
    }

    /// SIGTERM, as systemd would; its exit status.
    pub fn stop_daemon(&self) -> std::process::ExitStatus {
        let mut child = lock(&self.daemon).take().expect("the daemon runs");
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("kill");
        eventually("the daemon ends on SIGTERM", || {
            child.try_wait().expect("wait")
        })
    }

    /// Starts it (again).
    pub fn start_daemon(&self) {
        self.start_daemon_to_crash_at(None);
    }

    pub fn start_daemon_to_crash_at(&self, point: Option<&str>) {
        self.kill_daemon();
        self.launch(point);
    }

    /// Waits until the daemon has died at its crash point.
    pub fn wait_for_crash(&self) {
        eventually("the daemon dies at its crash point", || {
            (!self.is_running()).then_some(())
        });
    }

    fn log_path(&self) -> PathBuf {
        self.root().join("daemon.log")
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// What a `berth` command printed that was told this node's root.
    pub fn berth(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binaries::berth());
        command
            .args(args)
            .arg("--root")
            .arg(self.root())
            .stdin(Stdio::null());
        self.host
            .enter(|| command.output())
            .expect("cannot run berth")
    }

    // CRI.

    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(lock(&self.channel).clone())
            .max_decoding_message_size(MESSAGE_BYTES)
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(lock(&self.channel).clone())
            .max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Waits for an answer.
    ///
    /// # Panics
    /// When there is none for a minute.
    pub fn wait<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let limit = ANSWER * slowness();
        let answer = self
            .runtime
            .block_on(async { tokio::time::timeout(limit, call).await });
        answer
            .unwrap_or_else(|_| panic!("no answer for {limit:?}; the daemon said:\n{}", self.log()))
            .map(Response::into_inner)
    }

    /// Waits for several calls that run at the same time.
    pub fn wait_all<T: Send + 'static>(
        &self,
        calls: Vec<impl Future<Output = Result<Response<T>, Status>> + Send + 'static>,
    ) -> Vec<Result<T, Status>> {
        let tasks: Vec<_> = calls
            .into_iter()
            .map(|call| self.runtime.spawn(call))
            .collect();
        tasks
            .into_iter()
            .map(|task| self.wait(async { task.await.expect("a call does not panic") }))
            .collect()
    }

    /// Runs a future beside the test.
    pub fn spawn<T: Send + 'static>(
        &self,
        call: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.spawn(call)
    }

    /// What is running and what is left to do in the background.
    pub fn operations(&self) -> OperationsResponse {
        let mut admin = AdminClient::new(lock(&self.channel).clone());
        self.wait(admin.operations(OperationsRequest::default()))
            .expect("Operations")
    }

    // Images.

    /// The open registry of this node, started with the first call.
    pub fn registry(&self) -> &Registry {
        self.registry.get_or_init(|| {
            let registry = self.another_registry(Access::Open);
            self.trust_plain_http(&registry);
            registry
        })
    }

    /// One more way into the same data. Nothing is configured for it.
    pub fn another_registry(&self, access: Access) -> Registry {
        Registry::start(&self.host, &self.root().join("registry"), access)
            .expect("cannot start a registry")
    }

    /// certs.d/HOST:PORT/hosts.toml that names an http server.
    pub fn trust_plain_http(&self, registry: &Registry) {
        let host = format!("127.0.0.1:{}", registry.port);
        self.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    }

    /// Writes certs.d/HOST/hosts.toml.
    pub fn hosts_toml(&self, host: &str, text: &str) {
        let dir = self.root().join("etc/certs.d").join(host);
        fs::create_dir_all(&dir).expect("cannot make certs.d");
        fs::write(dir.join("hosts.toml"), text).expect("cannot write hosts.toml");
    }

    /// The reference of the base image (busybox and our probe), pulled.
    pub fn base_image(&self) -> String {
        self.base
            .get_or_init(|| {
                let image = Image::builder(Format::Oci).base().build();
                let reference = self.registry().push("base", "1", &image).expect("push");
                self.pull(&reference).expect("cannot pull the base image");
                reference
            })
            .clone()
    }

    /// Pushes an image to the open registry; its reference.
    pub fn push(&self, repository: &str, tag: &str, image: &Image) -> String {
        self.registry().push(repository, tag, image).expect("push")
    }

    /// The ID a pull answers with.
    pub fn pull(&self, reference: &str) -> Result<String, Status> {
        self.pull_with(reference, None)
    }

    pub fn pull_with(
        &self,
        reference: &str,
        auth: Option<cri::AuthConfig>,
    ) -> Result<String, Status> {
        let request = PullImageRequest {
            image: Some(spec(reference)),
            auth,
            sandbox_config: None,
        };
        self.wait(self.images().pull_image(request))
            .map(|answer| answer.image_ref)
    }

    pub fn image(&self, reference: &str) -> Option<cri::Image> {
        let request = cri::ImageStatusRequest {
            image: Some(spec(reference)),
            verbose: false,
        };
        self.wait(self.images().image_status(request))
            .expect("ImageStatus")
            .image
    }

    pub fn list_images(&self) -> Vec<cri::Image> {
        let request = cri::ListImagesRequest::default();
        self.wait(self.images().list_images(request))
            .expect("ListImages")
            .images
    }

    /// What the images take on disk.
    pub fn image_fs(&self) -> cri::FilesystemUsage {
        let request = cri::ImageFsInfoRequest::default();
        let info = self
            .wait(self.images().image_fs_info(request))
            .expect("ImageFsInfo");
        info.image_filesystems
            .into_iter()
            .next()
            .expect("an image file system")
    }

    pub fn remove_image(&self, reference: &str) -> Result<(), Status> {
        let request = cri::RemoveImageRequest {
            image: Some(spec(reference)),
        };
        self.wait(self.images().remove_image(request)).map(drop)
    }

    // Pods.

    /// What a pod named so is asked for with: its own network, logs below the root.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.root().join("logs").join(name).display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(pod_namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a pod.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn run_pod(&self, name: &str) -> Pod<'_> {
        self.run(self.pod_config(name))
    }

    #[track_caller]
    pub fn run(&self, config: PodSandboxConfig) -> Pod<'_> {
        self.try_run(config)
            .unwrap_or_else(|err| panic!("RunPodSandbox: {err}"))
    }

    pub fn try_run(&self, config: PodSandboxConfig) -> Result<Pod<'_>, Status> {
        // The suites of containers are run over other handlers as well: `tests/handlers`.
        let handler = std::env::var("BERTH_TEST_HANDLER").unwrap_or_default();
        self.try_run_by(&handler, config)
    }

    /// The same with a runtime handler of the test's choice.
    pub fn try_run_by(&self, handler: &str, config: PodSandboxConfig) -> Result<Pod<'_>, Status> {
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = self
            .wait(self.runtime().run_pod_sandbox(request))?
            .pod_sandbox_id;
        Ok(Pod {
            node: self,
            id,
            config,
        })
    }

    pub fn pods(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let request = ListPodSandboxRequest { filter };
        self.wait(self.runtime().list_pod_sandbox(request))
            .expect("ListPodSandbox")
            .items
    }

    pub fn containers(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let request = ListContainersRequest { filter };
        self.wait(self.runtime().list_containers(request))
            .expect("ListContainers")
            .containers
    }

    /// A handle of a container known by ID.
    pub fn container(&self, id: &str) -> Container<'_> {
        Container {
            node: self,
            id: id.to_owned(),
            log_path: PathBuf::new(),
        }
    }

    /// Stops and removes every pod there is.
    ///
    /// # Errors
    /// Every call that failed.
    pub fn remove_all_pods(&self) -> Result<(), Vec<Status>> {
        let mut failures = Vec::new();
        for pod in self.pods(None) {
            let stop = StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            let remove = RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            failures.extend(self.wait(self.runtime().stop_pod_sandbox(stop)).err());
            failures.extend(self.wait(self.runtime().remove_pod_sandbox(remove)).err());
        }
        if failures.is_empty() {
            Ok(())
        } else {
            Err(failures)
        }
    }

    /// What is left on the machine of pods that are gone: empty when all is well.
    /// What CRI allows to end after the answer gets a moment to.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        within(Duration::from_secs(5), || {
            left = leftovers::list(&self.footprint, &self.host, self.daemon_pid());
            if self.is_running() {
                let operations = self.operations();
                left.extend(
                    operations
                        .operations
                        .iter()
                        .map(|o| format!("operation {o:?}")),
                );
                left.extend(operations.pending.iter().map(|p| format!("pending {p:?}")));
            }
            left.is_empty().then_some(())
        });
        left
    }

    fn orderly_end(&self) -> Vec<String> {
        if !self.is_running() {
            self.start_daemon();
        }
        let mut problems = Vec::new();
        if let Err(failures) = self.remove_all_pods() {
            problems.extend(failures.iter().map(|err| format!("removing a pod: {err}")));
        }
        problems.extend(
            self.leftovers()
                .into_iter()
                .map(|left| format!("left behind: {left}")),
        );
        problems
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let problems = if std::thread::panicking() {
            Vec::new()
        } else {
            // A daemon that does not even start must not leave the machine dirty.
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.orderly_end()))
                .unwrap_or_else(|_| vec!["the orderly end failed, see above".to_owned()])
        };
        if std::thread::panicking() || !problems.is_empty() {
            eprintln!("--- the daemon's log\n{}---", self.log());
        }
        self.kill_daemon();
        drop(self.registry.take());
        self.footprint.erase();
        assert!(problems.is_empty(), "{}", problems.join("\n"));
    }
}

/// crun refuses hosts whose unified hierarchy has controllers beside those of
/// version 1, whatever its options say. There it runs where it does not see that
/// hierarchy: the section of the configuration that has it so; empty elsewhere.
fn crun_on_a_mixed_host(root: &Path) -> String {
    let controllers = fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
    if !controllers.is_ok_and(|names| !names.trim().is_empty()) {
        return String::new();
    }
    let path = root.join("etc/crun");
    let script = "#!/bin/sh\nexec unshare --mount --propagation slave sh -c \\\n  \
        'umount /sys/fs/cgroup/unified && exec crun \"$@\"' crun \"$@\"\n";
    fs::write(&path, script).expect("cannot write the wrapper of crun");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    format!("[handlers.crun]\npath = {path:?}\n")
}

/// A test that has failed elsewhere does not keep another thread from its clean-up.
fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Namespaces as the kubelet asks for by default.
pub fn pod_namespaces() -> cri::NamespaceOption {
    cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

pub fn spec(reference: &str) -> ImageSpec {
    ImageSpec {
        image: reference.to_owned(),
        ..Default::default()
    }
}

const PREFIX: &str = "berth-test-";

/// How the cgroup is called that layers are written in.
pub(crate) const PULLS: &str = "pulls";

/// The name of a node's cgroup: without dashes, which would nest a systemd slice.
fn cgroup_of(name: &str) -> String {
    name.replace('-', "_")
}

/// The cgroup driver that `BERTH_TEST_CGROUP_DRIVER` asks for, as a line of config.toml.
fn driver() -> String {
    std::env::var("BERTH_TEST_CGROUP_DRIVER")
        .map(|driver| format!("driver = \"{driver}\"\n"))
        .unwrap_or_default()
}

/// Whether the daemon makes cgroups through systemd here.
pub fn is_systemd_driver() -> bool {
    match std::env::var("BERTH_TEST_CGROUP_DRIVER") {
        Ok(driver) => driver == "systemd",
        Err(_) => is_cgroup_v2() && Path::new("/run/dbus/system_bus_socket").exists(),
    }
}

/// Whether the machine has the unified hierarchy with every controller.
pub fn is_cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Below it every node has its root. Not in root's home, which is closed to the
/// users of a user namespace.
fn temp() -> PathBuf {
    std::env::var_os("BERTH_TEST_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from)
}

/// A test run that was killed left its nodes; their names say whose they were.
fn erase_remains_of_the_dead() {
    for entry in fs::read_dir(temp()).into_iter().flatten().flatten() {
        let name = entry.file_name().display().to_string();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        let Some(pid) = owner.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new("/proc").join(pid.to_string()).exists() {
            Footprint {
                root: entry.path(),
                cgroup: cgroup_of(&name),
            }
            .erase();
        }
    }
}

fn connect(socket: PathBuf) -> Channel {
    Endpoint::from_static("http://berth").connect_with_connector_lazy(tower::service_fn(
        move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        },
    ))
}
