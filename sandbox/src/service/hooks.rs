//! Hooks of containers of the built-in launcher: the bundle they are told of, and
//! those that the daemon has run.
//!
//! ```text
//! run/bundles/<container>/config.json     the OCI spec, as it is started with
//!                         rootfs          the container's root file system, mounted
//! ```
//!
//! It is there for containers with hooks only, from the start until the poststop
//! hooks have run; that it is there says that they are still due, so they are run
//! at least once, whenever the daemon may die. poststart hooks are run at most once.

use super::foreign::attach;
use super::mounts::pod_mapping;
use super::{Inner, blocking, internal};
use crate::container::{ContainerRecord, ContainerState};
use crate::error::{Kind, Result, SandboxError};
use crate::handler::BUILT_IN;
use crate::hooks::{self, Plan};
use crate::id::ContainerId;
use crate::monitor::Program;
use crate::oci;
use crate::operation::lock;
use crate::pod::PodRecord;
use berth_proto::monitor_v1::{self as proto, feature};
use berth_store::crash;
use berth_sys::mount;
use oci_spec::runtime::Spec;
use prost::Message as _;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// How long a poststop hook may go on once somebody waits for its container to be gone.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(10);

/// Most of what `berth-monitor --hooks` says that is read. Unit: bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The poststop hooks that are being run.
#[derive(Default)]
pub(super) struct Poststops(Mutex<HashMap<ContainerId, Poststop>>);

#[derive(Clone)]
struct Poststop {
    run: Arc<CallOff>,
    done: watch::Receiver<bool>,
}

/// Ends hooks that run: what runs is killed, what does not yet is left out.
#[derive(Default)]
struct CallOff(Mutex<(bool, Option<ChildStdin>)>);

impl CallOff {
    fn call_off(&self) {
        let mut inner = lock(&self.0);
        *inner = (true, None);
    }

    /// Keeps what has to stay open; false when it has been called off.
    fn hold(&self, stdin: ChildStdin) {
        let mut inner = lock(&self.0);
        if !inner.0 {
            inner.1 = Some(stdin);
        }
    }
}

impl Inner {
    /// The hooks of a container, as its record has them.
    pub(super) fn hooks(&self, container: &ContainerRecord) -> Result<Plan> {
        let hooks = hooks::of_devices(&container.cdi);
        let plan = hooks.map_or(Ok(Plan::default()), |hooks| Plan::of_hooks(&hooks));
        plan.map_err(super::create_container::invalid(format!(
            "container {} cannot have its hooks",
            container.spec.name.name
        )))
    }

    /// Refused where the pod's monitor is too old to run them.
    pub(super) fn check_hooks(plan: &Plan, features: u64) -> Result<()> {
        let needed = plan.for_launch("", "").is_some();
        if needed && features & feature::HOOKS == 0 {
            let text = "the pod's monitor is of an earlier version, which runs no OCI hooks: \
                the pod has to be made anew";
            return Err(SandboxError::new(Kind::Unsupported, text));
        }
        Ok(())
    }

    /// Lays the bundle out for hooks and gives the root file system to be launched:
    /// the one that is mounted there, once more.
    ///
    /// Blocks.
    pub(super) fn make_hook_bundle(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        mut spec: Spec,
        held: &BTreeMap<String, PathBuf>,
    ) -> Result<OwnedFd> {
        let failed = || format!("cannot make the bundle of container {}", container.id);
        self.clear_bundle(container).map_err(internal(failed()))?;
        let dir = self.bundle(container);
        let make = |dir: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(dir)
        };
        make(&dir).map_err(internal(failed()))?;
        self.join_namespaces(&mut spec, container, held)?;
        let text = serde_json::to_string(&spec).map_err(internal(failed()))?;
        // The environment is in there: for the host's root, and to be read by the pod's.
        let reader = pod_mapping(&pod.spec).and_then(|mapping| mapping.gid(0));
        let lay_out = || -> io::Result<()> {
            make(&dir.join("rootfs"))?;
            let path = dir.join("config.json");
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o640)
                .open(&path)?;
            std::os::unix::fs::fchown(&file, None, Some(reader.unwrap_or(0)))?;
            file.write_all(text.as_bytes())
        };
        lay_out().map_err(internal(failed()))?;
        let rootfs = self.rootfs(&pod.spec, container)?;
        attach(&rootfs, &dir.join("rootfs")).map_err(internal(failed()))?;
        // Kernels before 6.15 copy a mount only once it is attached.
        let rootfs = mount::clone_tree(&dir.join("rootfs"), false).map_err(internal(failed()))?;
        crash::point("start_container.bundle");
        Ok(rootfs)
    }

    /// The state that the hooks of a container read.
    pub(super) fn hook_state(
        &self,
        container: &ContainerRecord,
        status: Option<&str>,
        pid: Option<i32>,
    ) -> String {
        let view = self.objects.view();
        let annotations = view
            .pod(container.pod.as_str())
            .map(|pod| oci::annotations(&pod.id, &pod.spec, &container.spec));
        let id = container.id.as_str();
        let annotations = annotations.unwrap_or_default();
        hooks::state(id, &self.bundle(container), &annotations, status, pid)
    }

    /// Whether poststop hooks of the built-in launcher may be due.
    pub(super) fn has_hook_bundle(&self, container: &ContainerRecord) -> bool {
        let view = self.objects.view();
        let built_in = view
            .pod(container.pod.as_str())
            .is_none_or(|pod| BUILT_IN.contains(&pod.spec.runtime_handler.as_str()));
        built_in && self.bundle(container).exists()
    }

    /// Has the poststart hooks run. They end when the container does; what fails is
    /// told and changes nothing.
    pub(super) async fn poststart(self: &Arc<Self>, container: &ContainerRecord, pid: i32) {
        // Checked when it was planned.
        let plan = self.hooks(container).unwrap_or_default();
        if plan.poststart.is_empty() {
            return;
        }
        let request = proto::RunHooks {
            kind: "poststart".into(),
            bundle: self.bundle(container).to_string_lossy().into_owned(),
            state: self.hook_state(container, Some("running"), Some(pid)),
            hooks: plan.poststart,
        };
        let run = Arc::<CallOff>::default();
        let mut outcome = run_hooks(&self.program, request, &run);
        let ended = self.objects.ended(&container.id);
        let outcome = tokio::select! {
            outcome = &mut outcome => outcome,
            () = ended => {
                run.call_off();
                outcome.await
            }
        };
        self.tell(container, "poststart", outcome).await;
    }

    /// Has the poststop hooks run where they are due and takes the bundle away.
    /// Several callers wait for the same run; one with `patience` has it broken off
    /// once that has passed.
    pub(super) async fn poststop(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        patience: Option<Duration>,
    ) -> Result<()> {
        let mut running = self.begin_poststop(container);
        let ended = async {
            // An error means that it has broken off.
            let _ = running.done.wait_for(|done| *done).await;
        };
        match patience {
            None => ended.await,
            Some(patience) => {
                if tokio::time::timeout(patience, ended).await.is_err() {
                    running.run.call_off();
                    let _ = running.done.wait_for(|done| *done).await;
                }
            }
        }
        let (me, container) = (self.clone(), container.clone());
        blocking(move || {
            let text = format!("cannot remove the bundle of container {}", container.id);
            me.clear_bundle(&container).map_err(internal(text))
        })
        .await
    }

    fn begin_poststop(self: &Arc<Self>, container: &Arc<ContainerRecord>) -> Poststop {
        let mut all = lock(&self.poststops.0);
        if let Some(running) = all.get(&container.id) {
            return running.clone();
        }
        let (finished, done) = watch::channel(false);
        let running = Poststop {
            run: Arc::default(),
            done,
        };
        all.insert(container.id.clone(), running.clone());
        drop(all);
        let (me, container, run) = (self.clone(), container.clone(), running.run.clone());
        tokio::spawn(async move {
            // One that waited may have been the last, and this one have come after it.
            let (asked, record) = (me.clone(), container.clone());
            let due = blocking(move || Ok(asked.has_hook_bundle(&record)));
            if due.await.unwrap_or(false) {
                me.run_poststop(&container, &run).await;
                let (me, container) = (me.clone(), container.clone());
                let cleared = blocking(move || {
                    me.clear_bundle(&container)
                        .map_err(internal("cannot remove a bundle"))
                });
                if let Err(error) = cleared.await {
                    tracing::warn!(error = error.chain(), "a bundle stays until removal");
                }
            }
            lock(&me.poststops.0).remove(&container.id);
            finished.send_replace(true);
        });
        running
    }

    async fn run_poststop(self: &Arc<Self>, container: &ContainerRecord, run: &Arc<CallOff>) {
        let plan = self.hooks(container).unwrap_or_default();
        if plan.poststop.is_empty() {
            return;
        }
        let request = proto::RunHooks {
            kind: "poststop".into(),
            bundle: self.bundle(container).to_string_lossy().into_owned(),
            state: self.hook_state(container, Some("stopped"), None),
            hooks: plan.poststop,
        };
        let outcome = run_hooks(&self.program, request, run).await;
        crash::point("poststop.run");
        self.tell(container, "poststop", outcome).await;
    }

    /// Logs what failed and says it in the container's status.
    async fn tell(
        self: &Arc<Self>,
        container: &ContainerRecord,
        kind: &str,
        outcome: std::result::Result<io::Result<Vec<proto::Failure>>, oneshot::error::RecvError>,
    ) {
        let failures = match outcome {
            Ok(Ok(failures)) => failures.iter().map(hooks::told).collect(),
            Ok(Err(error)) => vec![format!("{kind} hooks cannot be run: {error}")],
            Err(_) => vec![format!("{kind} hooks cannot be run: it broke off")],
        };
        if failures.is_empty() {
            return;
        }
        let text = failures.join("; ");
        tracing::warn!(container = %container.id, failures = text, "a hook failed");
        let (me, id) = (self.clone(), container.id.clone());
        let recorded = blocking(move || {
            me.objects.update_container(&id, |container| {
                let message = match &mut container.state {
                    ContainerState::Exited { exit, .. } => &mut exit.message,
                    _ => &mut container.message,
                };
                if !message.is_empty() {
                    message.push_str("; ");
                }
                message.push_str(&text);
                Ok(())
            })
        });
        match recorded.await {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::ContainerNotFound => {}
            Err(error) => tracing::warn!(error = error.chain(), "a failed hook is not recorded"),
        }
    }
}

/// Has `berth-monitor --hooks` run them; what failed. A thread of its own waits:
/// hooks that take their time must not use up those that others need.
fn run_hooks(
    program: &Program,
    request: proto::RunHooks,
    run: &Arc<CallOff>,
) -> oneshot::Receiver<io::Result<Vec<proto::Failure>>> {
    let (sender, receiver) = oneshot::channel();
    let mut command = program.command();
    command
        .arg("--hooks")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let run = run.clone();
    let mut work = move || {
        let mut child = command.spawn()?;
        let tell = |child: &mut Child| -> io::Result<Vec<proto::Failure>> {
            let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
                return Err(io::ErrorKind::BrokenPipe.into());
            };
            let bytes = request.encode_to_vec();
            let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
            stdin.write_all(&length.to_le_bytes())?;
            stdin.write_all(&bytes)?;
            run.hold(stdin);
            let mut answer = Vec::new();
            stdout.take(MOST_BYTES).read_to_end(&mut answer)?;
            let answer = proto::HooksRun::decode(&*answer).map_err(io::Error::other)?;
            Ok(answer.failures)
        };
        let told = tell(&mut child);
        run.call_off();
        let ended = child.wait()?;
        match ended.success() {
            true => told,
            false => told.and(Err(io::Error::other(format!(
                "berth-monitor --hooks: {ended}"
            )))),
        }
    };
    let spawned = std::thread::Builder::new()
        .name("hooks".into())
        .stack_size(256 << 10)
        .spawn(move || drop(sender.send(work())));
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for hooks");
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_monitor_is_asked_only_for_what_it_knows() {
        let earlier = feature::BASE | feature::ATTACH | feature::OCI_RUNTIME;
        let one = || vec![proto::Hook::default()];
        let needed = Plan {
            create_container: one(),
            ..Plan::default()
        };
        // These are run without it.
        let after = Plan {
            poststart: one(),
            poststop: one(),
            ..Plan::default()
        };
        let error = Inner::check_hooks(&needed, earlier).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.chain().contains("earlier version"), "{error}");
        Inner::check_hooks(&needed, earlier | feature::HOOKS).unwrap();
        Inner::check_hooks(&after, earlier).unwrap();
        Inner::check_hooks(&Plan::default(), 0).unwrap();
    }
}
