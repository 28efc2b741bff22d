//! StartContainer: intent, plan, launch, running.

use super::scope::Held;
use super::{Inner, Sandboxes, blocking, internal, now};
use crate::cgroup::Cgroup;
use crate::container::{ContainerEvent, ContainerRecord, ContainerState, Exit};
use crate::error::{Kind, Result, SandboxError};
use crate::hooks::Plan;
use crate::id::ContainerId;
use crate::launch::{self, Extra};
use crate::monitor::{Monitor, MonitorError};
use crate::oci;
use crate::operation::{Stage, lock};
use crate::pod::PodRecord;
use crate::pod_spec::{Namespace, PidMode};
use crate::selinux::Labels;
use berth_proto::monitor_v1::{self, feature, reply, request};
use berth_store::crash;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// What StartError is reported with, as peers do.
pub(super) const START_ERROR: i32 = 128;

impl Sandboxes {
    /// Starts a created container; one that runs counts as started.
    ///
    /// # Errors
    /// `WrongState` when it has ended or its pod is not ready; what any step
    /// met: the container is Exited then, with reason StartError.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.0.container(id)?;
        let subject = container.spec.name.name.clone();
        self.0
            .operation("StartContainer", id, subject, |me, stage| async move {
                me.start_container(&container, &stage)
                    .await
                    .map(|()| String::new())
            })
            .await
            .map(drop)
    }
}

impl Inner {
    async fn start_container(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        stage: &Stage,
    ) -> Result<()> {
        let id = &container.id;
        let view = self.objects.view();
        let current = view.container(id.as_str());
        let current = current.ok_or_else(|| SandboxError::no_container(id.as_str()))?;
        if matches!(current.state, ContainerState::Running { .. }) {
            return Ok(());
        }
        match view.pod(container.pod.as_str()) {
            Some(pod) if pod.state.is_ready() => {}
            Some(_) | None => {
                let text = format!("pod sandbox {} is not ready", container.pod);
                return Err(SandboxError::new(Kind::WrongState, text));
            }
        }
        stage.enter("intent");
        let container = self.container_event(id, ContainerEvent::Start).await?;
        crash::point("start_container.intent");
        // Until the outcome is on record: in between the start must not be called off.
        let launching = Launching(self, id);
        let started = self.launch(&container, stage).await;
        let (event, outcome) = match started {
            Ok(started) => {
                let event = ContainerEvent::Started {
                    since: started.started_at,
                    pid: started.pid,
                    start_ticks: started.start_ticks,
                };
                (event, Ok(()))
            }
            Err(error) => {
                let exit = Exit {
                    code: START_ERROR,
                    reason: "StartError".into(),
                    message: error.chain(),
                };
                (ContainerEvent::Exited { at: now(), exit }, Err(error))
            }
        };
        let pid = match &event {
            ContainerEvent::Started { pid, .. } => *pid,
            _ => 0,
        };
        let recorded = self.container_event(id, event).await;
        crash::point("start_container.running");
        if outcome.is_err()
            && let Err(error) = self.release_cgroup(&container, None).await
        {
            tracing::warn!(container = %id, error = error.chain(), "its cgroup stays until removal");
        }
        recorded?;
        if outcome.is_ok() {
            drop(launching);
            stage.enter("poststart");
            self.poststart(&container, pid).await;
            crash::point("start_container.poststart");
        }
        outcome
    }

    async fn launch(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        stage: &Stage,
    ) -> Result<monitor_v1::Started> {
        stage.enter("plan");
        let monitor = self.monitor(&container.pod)?;
        let (me, record) = (self.clone(), container.clone());
        let pod = self.pod(container.pod.as_str())?;
        // Held until the answer is here: then init is in the scope.
        let runtime = self.runtime_for_monitor(&pod.spec, container, &monitor)?;
        let hooks = self.hooks(container)?;
        // Only who runs hooks or another runtime is told where they can be joined.
        let held = match runtime.is_some() || !hooks.is_empty() {
            true => Inner::held_namespaces(&monitor).await?,
            false => BTreeMap::new(),
        };
        let (message, fds, _held, hooked) = match runtime {
            None => {
                Inner::check_hooks(&hooks, monitor.hello.features)?;
                let hooked = hooks.for_launch("", "").is_some();
                let plan = hooks.clone();
                let planned = blocking(move || me.plan(&record, &plan, &held)).await;
                // Called off meanwhile: what was missing had been taken away.
                let (message, fds, held) =
                    planned.map_err(|error| self.called_off(&container.id).unwrap_or(error))?;
                (message, fds, held, hooked)
            }
            Some(runtime) => {
                let planned = blocking(move || me.plan_foreign(&pod, &record, runtime, &held));
                let (message, held, hooked) = planned.await?;
                (message, Vec::new(), held, hooked)
            }
        };
        let foreign = message.oci_runtime.is_some();
        crash::point("start_container.planned");
        stage.enter(if hooked { "hooks" } else { "launch" });
        self.begin_launch(&container.id, hooked).await?;
        let (answer, _) = monitor
            .ask_within(request::Body::Launch(message), fds, hooks.longest_start())
            .await
            .map_err(|error| {
                launch_error(
                    error,
                    "cannot start the container",
                    container.selinux.as_ref(),
                )
            })?;
        crash::point("start_container.launched");
        if foreign {
            self.settle_limits(container).await;
        }
        match answer {
            reply::Body::Started(started) => Ok(started),
            _ => Err(SandboxError::new(
                Kind::Internal,
                "the monitor's answer does not fit",
            )),
        }
    }

    /// After an OCI runtime's start.
    async fn settle_limits(self: &Arc<Self>, container: &Arc<ContainerRecord>) {
        let (me, record) = (self.clone(), container.clone());
        let settled = blocking(move || {
            let Some(cgroup) = &record.cgroup else {
                return Ok(());
            };
            // As they are by now: an update may have come since.
            let view = me.objects.view();
            let known = view.container(record.id.as_str());
            let resources = known.map_or(&record.spec.resources, |known| &known.spec.resources);
            let settled = me.cgroups.settle(cgroup, resources);
            settled.map_err(internal("cannot set the limits anew"))
        });
        if let Err(error) = settled.await {
            // Those that the runtime has set hold.
            tracing::warn!(container = %container.id, error = error.chain(),
                "limits stay as the runtime understands them");
        }
    }

    /// From here on the start cannot be called off, unless it has been.
    async fn begin_launch(self: &Arc<Self>, id: &ContainerId, hooked: bool) -> Result<()> {
        let (me, id) = (self.clone(), id.clone());
        blocking(move || {
            let mut launching = lock(&me.launching);
            if let Some(error) = me.called_off(&id) {
                return Err(error);
            }
            launching.insert(id, hooked);
            Ok(())
        })
        .await
    }

    /// What to say of a start that somebody called off; `None` while it may go on.
    pub(super) fn called_off(&self, id: &ContainerId) -> Option<SandboxError> {
        let view = self.objects.view();
        let container = view.container(id.as_str());
        if container.is_some_and(|container| container.state == ContainerState::Starting) {
            return None;
        }
        let text = format!("container {id} was stopped while it was being started");
        Some(SandboxError::new(Kind::WrongState, text))
    }

    /// Calls off a start that is still being planned, or has its hooks run: a volume
    /// or a hook that hangs must not keep a pod from going.
    pub(super) async fn call_off(self: &Arc<Self>, id: &ContainerId) -> Result<()> {
        let launching = lock(&self.launching).get(id).copied();
        match launching {
            None => self.call_off_plan(id).await,
            Some(false) => Ok(()),
            Some(true) => {
                let view = self.objects.view();
                let pod = view.container(id.as_str()).map(|container| &container.pod);
                if let Some(Ok(monitor)) = pod.map(|pod| self.monitor(pod)) {
                    call_off_launch(&monitor, id).await;
                }
                Ok(())
            }
        }
    }

    async fn call_off_plan(self: &Arc<Self>, id: &ContainerId) -> Result<()> {
        let (me, id) = (self.clone(), id.clone());
        blocking(move || {
            let launching = lock(&me.launching);
            if launching.contains_key(&id) {
                return Ok(());
            }
            let exit = Exit {
                code: START_ERROR,
                reason: "StartError".into(),
                message: "stopped while it was being started".into(),
            };
            me.objects
                .update_container(&id, |container| {
                    if container.state == ContainerState::Starting
                        && let Some(next) = container
                            .state
                            .on(&ContainerEvent::Exited { at: now(), exit })
                    {
                        container.state = next;
                    }
                    Ok(())
                })
                .map(drop)
        })
        .await
    }

    fn plan(
        &self,
        container: &ContainerRecord,
        hooks: &Plan,
        namespaces: &BTreeMap<String, PathBuf>,
    ) -> Result<(monitor_v1::Launch, Vec<OwnedFd>, Held)> {
        let view = self.objects.view();
        let pod = view.pod(container.pod.as_str());
        let pod = pod.ok_or_else(|| SandboxError::no_pod(container.pod.as_str()))?;
        let (spec, raw_env) = self.runtime_spec(container)?;
        let seccomp = self.seccomp_filter(container, &spec)?;
        let rootfs = match hooks.is_empty() {
            true => self.rootfs(&pod.spec, container)?,
            false => self.make_hook_bundle(pod, container, spec.clone(), namespaces)?,
        };
        let prepared = self.mounted_images(&pod.spec, container)?;
        let user_namespaces = launch::mappings(&spec)
            .iter()
            .chain(super::mounts::pod_mapping(&pod.spec).iter())
            .map(|mapping| self.mapped(mapping))
            .collect::<Result<_>>()?;
        let opened = self.relabelled(pod, container)?;
        let target = self.pid_target(container)?;
        make_log_directory(container)?;
        let cgroup = cgroup_of(container)?;
        // Last of what may fail: from here on it costs the kernel something.
        let held = self.hold_scope(container, &oci::device_rules(&spec))?;
        let namespaces = &pod.spec.namespaces;
        let own_net = namespaces.network == Namespace::Pod;
        let (program, flags) = seccomp
            .as_deref()
            .map_or((&[][..], 0), |filter| (&filter.program[..], filter.flags));
        let planned = launch::plan(
            &spec,
            Extra {
                container_id: container.id.to_string(),
                cgroup: cgroup.for_monitor(),
                rootfs,
                raw_env,
                seccomp: Arc::from(program),
                log_path: container.log_path.clone(),
                log_line_bytes: self.settings.log_line_bytes,
                stdin: container.spec.stdin,
                stdin_once: container.spec.stdin_once,
                exit_record: self.objects.exit_path(&container.pod, &container.id),
                join_net: own_net,
                join_uts: own_net,
                join_ipc: namespaces.ipc == Namespace::Pod,
                join_pid: container.spec.security.pid == PidMode::Pod,
                join_user: namespaces.user.is_some(),
                target_container_id: target.map_or(String::new(), |target| target.id.to_string()),
                user_namespaces,
                directories: oci::volume_directories(
                    &container.spec,
                    &container.image,
                    &self.settings.defaults,
                ),
                prepared,
                opened,
            },
        );
        let (mut message, fds) = planned.map_err(internal(format!(
            "cannot plan the start of container {}",
            container.spec.name.name
        )))?;
        if let Some(process) = &mut message.process {
            process.seccomp_flags = flags;
        }
        message.log_policy = Some(self.settings.log_policy.for_monitor());
        if !hooks.is_empty() {
            let bundle = self.bundle(container);
            let state = self.hook_state(container, None, None);
            message.hooks = hooks.for_launch(&bundle.to_string_lossy(), &state);
        }
        Ok((message, fds, held))
    }
}

impl Inner {
    /// The same for an OCI runtime, whose bundle says most of it.
    fn plan_foreign(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        runtime: monitor_v1::OciRuntime,
        held: &BTreeMap<String, PathBuf>,
    ) -> Result<(monitor_v1::Launch, Held, bool)> {
        make_log_directory(container)?;
        let cgroup = cgroup_of(container)?;
        let bundle = self.make_bundle(pod, container, held)?;
        let scope = self.hold_foreign_scope(pod, container, cgroup)?;
        let launch = monitor_v1::Launch {
            container_id: container.id.to_string(),
            process: Some(monitor_v1::Process {
                tty: container.spec.tty,
                stream_owner: bundle.stream_owner,
                ..Default::default()
            }),
            cgroup: Some(cgroup.for_monitor()),
            new_pid: container.spec.security.pid == PidMode::Container,
            log_path: container.log_path.to_string_lossy().into_owned(),
            log_line_bytes: self.settings.log_line_bytes,
            log_policy: Some(self.settings.log_policy.for_monitor()),
            stdin: container.spec.stdin,
            stdin_once: container.spec.stdin_once,
            exit_record: self
                .objects
                .exit_path(&container.pod, &container.id)
                .to_string_lossy()
                .into_owned(),
            oci_runtime: Some(runtime),
            ..Default::default()
        };
        Ok((launch, scope, bundle.hooked))
    }

    /// The scope of a container whose runtime does not make it, or the slice for one that does.
    fn hold_foreign_scope(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        cgroup: &Cgroup,
    ) -> Result<Held> {
        match self.oci_runtime(&pod.spec)? {
            Some(runtime) if runtime.joins_scope => {
                let (spec, _) = self.runtime_spec(container)?;
                self.hold_scope(container, &oci::device_rules(&spec))
            }
            Some(_) | None => Ok(Held::slice_of(&self.cgroups, cgroup)),
        }
    }
}

/// Has the monitor kill what is on its way to the container's program. The start
/// ends by itself then; a monitor that cannot runs no hooks either.
pub(super) async fn call_off_launch(monitor: &Monitor, id: &ContainerId) {
    if monitor.hello.features & feature::HOOKS == 0 {
        return;
    }
    let call_off = monitor_v1::CallOff {
        container_id: id.to_string(),
    };
    let told = monitor.tell(request::Body::CallOff(call_off), Vec::new());
    if let Err(error) = told.await {
        tracing::warn!(container = %id, error = &error as &dyn std::error::Error, "its start is not called off");
    }
}

fn make_log_directory(container: &ContainerRecord) -> Result<()> {
    match container.log_path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => std::fs::create_dir_all(dir).map_err(internal(
            format!("cannot make the log directory {}", dir.display()),
        )),
        Some(_) | None => Ok(()),
    }
}

fn cgroup_of(container: &ContainerRecord) -> Result<&Cgroup> {
    container.cgroup.as_ref().ok_or_else(|| {
        let text = format!("container {} has no cgroup", container.id);
        SandboxError::new(Kind::Internal, text)
    })
}

/// Takes the container out of [`Inner::launching`] at the end of its start.
struct Launching<'a>(&'a Inner, &'a ContainerId);

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        lock(&self.0.launching).remove(self.1);
    }
}

/// A monitor's refusal as a user understands it. `labels` are the container's.
pub(super) fn launch_error(
    error: MonitorError,
    text: &str,
    labels: Option<&Labels>,
) -> SandboxError {
    const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
    const EACCES: i32 = rustix::io::Errno::ACCESS.raw_os_error();
    const ENOEXEC: i32 = rustix::io::Errno::NOEXEC.raw_os_error();
    const ENOTDIR: i32 = rustix::io::Errno::NOTDIR.raw_os_error();
    if let MonitorError::Refused {
        stage,
        errno,
        detail,
        not_found: false,
    } = &error
    {
        let why = match (stage.as_str(), *errno) {
            ("exec", ENOENT) if detail.contains('/') => {
                "no such file in the image, or the interpreter it names is not there"
            }
            ("exec", ENOENT) => "no such program",
            ("exec", EACCES) => "permission denied: not a program that this user may run",
            ("exec", ENOEXEC) => {
                "not a program for this machine: another architecture, or a script without #!"
            }
            ("chdir", ENOENT | ENOTDIR) => "the working directory is not there",
            ("chdir", EACCES) => "this user may not enter the working directory",
            _ => "",
        };
        if !why.is_empty() {
            let mut text = match detail.contains("PATH") {
                // It says so itself.
                true => format!("{text}: {stage}: {detail}"),
                false => format!("{text}: {stage}: {detail}: {why}"),
            };
            // The policy's refusal is the same errno.
            if let Some(labels) = labels
                && (stage.as_str(), *errno) == ("exec", EACCES)
                && !labels.process.is_empty()
            {
                text += &format!(
                    "; or SELinux does not let Berth run it as {} (see its audit log)",
                    labels.process
                );
            }
            return SandboxError::new(Kind::Missing, text);
        }
    }
    let kind = match &error {
        MonitorError::Refused {
            not_found: true, ..
        } => Kind::WrongState,
        MonitorError::Refused { .. }
        | MonitorError::Spawn { .. }
        | MonitorError::Unreachable { .. }
        | MonitorError::Lost
        | MonitorError::Silent
        | MonitorError::Unexpected
        | MonitorError::TooLarge { .. } => Kind::Internal,
    };
    SandboxError::caused(kind, text, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_be_run_says_why() {
        let labelled = |stage: &str, errno, detail: &str, labels: Option<Labels>| {
            let error = MonitorError::Refused {
                stage: stage.into(),
                errno,
                detail: detail.into(),
                not_found: false,
            };
            launch_error(error, "cannot start the container", labels.as_ref()).chain()
        };
        let refused = |stage: &str, errno, detail: &str| labelled(stage, errno, detail, None);
        assert!(
            refused("exec", 2, "/foo").contains("exec: /foo: no such file in the image"),
            "{}",
            refused("exec", 2, "/foo")
        );
        assert!(
            refused("exec", 2, "foo: not found in $PATH")
                .ends_with("exec: foo: not found in $PATH")
        );
        assert!(refused("exec", 8, "/foo").contains("another architecture"));
        assert!(!refused("exec", 13, "/foo").contains("SELinux"));
        let labels = Labels {
            process: "system_u:system_r:container_t:s0:c1,c2".into(),
            mount: "system_u:object_r:container_file_t:s0:c1,c2".into(),
        };
        let said = labelled("exec", 13, "/foo", Some(labels));
        assert!(
            said.contains("may run; or SELinux") && said.contains("container_t:s0:c1,c2"),
            "{said}"
        );
        assert!(refused("mount", 2, "/x").starts_with("cannot start the container: mount /x: "));
    }
}
