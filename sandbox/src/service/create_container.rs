//! CreateContainer: record, snapshot, cgroup, created.

use super::{Inner, Sandboxes, blocking, internal, now};
use crate::cgroup::Cgroup;
use crate::container::{ContainerEvent, ContainerRecord, ContainerState};
use crate::container_spec::{ContainerSpec, SeccompProfile};
use crate::error::{Kind, Result, SandboxError};
use crate::id::{ContainerId, PodId};
use crate::image::{ContainerImage, parse_stop_signal};
use crate::operation::Stage;
use crate::pod_spec::{Namespace, PidMode, PodSpec};
use crate::seccomp::Filter;
use crate::{cdi, oci, user};
use berth_store::crash;
use std::path::PathBuf;
use std::sync::Arc;

/// Largest passwd or group file of an image that is read, in bytes.
const ACCOUNTS_BYTES: usize = 1 << 20;

const SIGTERM: i32 = 15;

impl Sandboxes {
    /// Makes a container in a ready pod; the ID of the one that is there already
    /// when one of that name and attempt is made, being made or running.
    ///
    /// # Errors
    /// `PodNotFound`, `WrongState` when the pod is not ready, or what any step
    /// met; nothing is left of the container then.
    pub async fn create_container(
        &self,
        pod: &str,
        spec: ContainerSpec,
        image: ContainerImage,
    ) -> Result<ContainerId> {
        let pod = self.0.pod(pod)?;
        let object = format!("{} {:?}", pod.id, (&spec.name.name, spec.name.attempt));
        let subject = format!("{}/{}", pod.spec.name, spec.name.name);
        let id = self
            .0
            .operation("CreateContainer", object, subject, |me, stage| async move {
                me.create_container(pod.id.clone(), spec, image, stage)
                    .await
                    .map(String::from)
            })
            .await?;
        id.parse().map_err(internal("the operation gave no ID"))
    }
}

impl Inner {
    async fn create_container(
        self: &Arc<Self>,
        pod: PodId,
        spec: ContainerSpec,
        image: ContainerImage,
        stage: Stage,
    ) -> Result<ContainerId> {
        let view = self.objects.view();
        let same = |container: &&Arc<ContainerRecord>| {
            container.spec.name == spec.name
                && matches!(
                    container.state,
                    ContainerState::Created
                        | ContainerState::Starting
                        | ContainerState::Running { .. }
                )
        };
        if let Some(container) = view.containers_of(&pod).find(same) {
            return Ok(container.id.clone());
        }
        let Some(record) = view.pod(pod.as_str()) else {
            return Err(SandboxError::no_pod(pod.as_str()));
        };
        stage.enter("record");
        let of_image = image
            .config
            .stop_signal
            .as_deref()
            .and_then(parse_stop_signal);
        let mut container = ContainerRecord {
            id: ContainerId::random().map_err(internal("no random ID"))?,
            pod,
            log_path: self.log_path(&record.spec, &spec),
            stop_signal: spec.stop_signal.or(of_image).unwrap_or(SIGTERM),
            spec,
            image,
            state: ContainerState::Creating,
            created_at: now(),
            identity: None,
            cdi: cdi::Edits::default(),
            cgroup: None,
            selinux: None,
            message: String::new(),
        };
        let (me, pod) = (self.clone(), record.clone());
        let container = blocking(move || {
            container.selinux = me.labels(&pod, &container)?;
            me.objects.insert_container(container)
        })
        .await?;
        crash::point("create_container.record");
        let made = self.make_container(&container, &stage).await;
        if let Err(error) = made {
            stage.enter("undo");
            // As it is now: the cgroup may be in the record since.
            let now = self
                .objects
                .view()
                .container(container.id.as_str())
                .cloned();
            let undone = self
                .remove_container(&now.unwrap_or(container.clone()), None)
                .await;
            if let Err(failure) = undone {
                self.pending.remove(container, &failure);
            }
            return Err(error);
        }
        Ok(container.id.clone())
    }

    async fn make_container(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        stage: &Stage,
    ) -> Result<()> {
        let id = container.id.clone();
        self.pid_target(container)?;
        self.check_profile(container)?;
        stage.enter("snapshot");
        let (me, record) = (self.clone(), container.clone());
        let (identity, cdi) = blocking(move || {
            let cdi = me.cdi(&record)?;
            let image = &record.image.id;
            me.images
                .prepare(&record.id, image, &Self::volume_images(&record))
                .map_err(internal(format!(
                    "cannot prepare the file system of container {}",
                    record.id
                )))?;
            crash::point("create_container.snapshot");
            // A path that an image does not have is refused now and not at the start.
            let view = me.objects.view();
            if let Some(pod) = view.pod(record.pod.as_str()) {
                me.mounted_images(&pod.spec, &record)?;
            }
            Ok((me.identity(&record)?, cdi))
        })
        .await?;

        stage.enter("cgroup");
        let (me, record) = (self.clone(), container.clone());
        blocking(move || {
            let view = me.objects.view();
            let pod = view.pod(record.pod.as_str());
            let pod = pod.ok_or_else(|| SandboxError::no_pod(record.pod.as_str()))?;
            let parent = pod
                .cgroup
                .as_ref()
                .map_or("", |parent| parent.path.as_str());
            // The path is known before it is made, so that a crash in between leaves nothing unknown.
            let planned = me.planned_cgroup(parent, &record.id)?;
            let record = me.objects.update_container(&record.id, |container| {
                container.identity = Some(identity);
                container.cdi = cdi;
                container.cgroup = Some(planned);
                Ok(())
            })?;
            // What cannot be said as an OCI spec is refused now and not at the start.
            me.hooks(&record)?;
            let devices = oci::device_rules(&me.runtime_spec(&record)?.0);
            let text = format!("cannot make the cgroup of container {}", record.id);
            me.cgroups
                .create(parent, &record.id, &record.spec.resources, &devices)
                .map_err(internal(text))?;
            crash::point("create_container.cgroup");
            Ok(())
        })
        .await?;

        stage.enter("created");
        self.container_event(&id, ContainerEvent::Made).await?;
        crash::point("create_container.created");
        Ok(())
    }

    fn planned_cgroup(&self, parent: &str, id: &ContainerId) -> Result<Cgroup> {
        self.cgroups
            .container(parent, id)
            .map_err(invalid(format!("{parent:?} is no cgroup parent")))
    }

    /// What the container's CDI devices change in it, those asked for by
    /// annotations included.
    fn cdi(&self, container: &ContainerRecord) -> Result<cdi::Edits> {
        let spec = &container.spec;
        let text = || format!("container {} cannot have its devices", spec.name.name);
        let mut names = spec.cdi_devices.clone();
        names.extend(cdi::from_annotations(&spec.annotations).map_err(invalid(text()))?);
        cdi::resolve(&self.settings.cdi_dirs, &names).map_err(invalid(text()))
    }

    fn identity(&self, container: &ContainerRecord) -> Result<user::Identity> {
        let read = |path: &str| {
            self.images
                .read_file(&container.image.id, path, ACCOUNTS_BYTES)
                .map_err(internal(format!("cannot read {path} of the image")))
        };
        let (passwd, group) = (read("etc/passwd")?, read("etc/group")?);
        let security = &container.spec.security;
        user::resolve(
            passwd.as_deref(),
            group.as_deref(),
            &container.image.config.user,
            &security.user,
            &security.supplemental_groups,
            security.supplemental_groups_policy,
        )
        .map_err(invalid(format!(
            "container {}: no such user",
            container.spec.name.name
        )))
    }

    /// The OCI runtime spec of a container, made anew from its record, and its
    /// environment as bytes.
    ///
    /// Plugins of the NRI kind would see and change the spec at the end of this,
    /// before it is final; what they changed would have to be in the record.
    pub(super) fn runtime_spec(
        &self,
        container: &ContainerRecord,
    ) -> Result<(oci_spec::runtime::Spec, Vec<Vec<u8>>)> {
        let view = self.objects.view();
        let pod = view.pod(container.pod.as_str());
        let pod = pod.ok_or_else(|| SandboxError::no_pod(container.pod.as_str()))?;
        let identity = match &container.identity {
            Some(identity) => identity,
            None => {
                let text = format!("container {} has no user yet", container.id);
                return Err(SandboxError::new(Kind::WrongState, text));
            }
        };
        let files = crate::pod_files::at(&self.run_dir(&pod.id), &pod.spec);
        let mut namespaces = self.namespaces(&pod.id, &pod.spec);
        if let PidMode::Target(_) = &container.spec.security.pid {
            // Gone is also a state it may be in by now: its first process says which.
            let target = self.pid_target(container).ok().flatten();
            let pid = target.and_then(|target| target.state.pid());
            let of = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
            namespaces.pid = Some(PathBuf::from(format!("/proc/{of}/ns/pid")));
        }
        let input = oci::Input {
            pod_id: &pod.id,
            pod: &pod.spec,
            container_id: &container.id,
            container: &container.spec,
            image: &container.image,
            identity,
            files: &files,
            namespaces: &namespaces,
            cgroup_path: container.cgroup.as_ref().map_or("", Cgroup::path),
            image_volumes: &self.image_volumes(container),
            selinux: container.selinux.as_ref(),
            defaults: &self.settings.defaults,
            host_devices: self
                .oci_runtime(&pod.spec)?
                .is_none_or(|runtime| !runtime.privileged_without_host_devices),
        };
        let mut built = oci::build(&input).map_err(invalid(format!(
            "container {} cannot be run",
            container.spec.name.name
        )))?;
        cdi::apply(&container.cdi, &mut built);
        Ok((built.spec, built.raw_env))
    }

    /// Where the pod's own namespaces can be joined. Only the network's has a
    /// path; the monitor holds the others and joins them itself.
    fn namespaces(&self, id: &PodId, spec: &PodSpec) -> oci::Namespaces {
        let own_net = spec.namespaces.network == Namespace::Pod;
        let held = |kind: &str| PathBuf::from(format!("/proc/self/ns/{kind}"));
        oci::Namespaces {
            network: own_net.then(|| self.run_dir(id).join("netns")),
            ipc: (spec.namespaces.ipc == Namespace::Pod).then(|| held("ipc")),
            uts: own_net.then(|| held("uts")),
            pid: (spec.namespaces.pid == PidMode::Pod).then(|| held("pid")),
            user: spec.namespaces.user.as_ref().map(|_| held("user")),
        }
    }

    /// The seccomp filter a container with this spec gets, if any.
    pub(super) fn seccomp_filter(
        &self,
        container: &ContainerRecord,
        spec: &oci_spec::runtime::Spec,
    ) -> Result<Option<Arc<Filter>>> {
        let security = &container.spec.security;
        if security.privileged {
            return Ok(None);
        }
        let caps = oci::bounding_set(spec);
        let filter = match &security.seccomp {
            SeccompProfile::Unconfined => return Ok(None),
            SeccompProfile::RuntimeDefault => self
                .seccomp
                .compile_default(caps)
                .map_err(internal("cannot compile the default seccomp profile")),
            SeccompProfile::Localhost(path) => {
                self.seccomp
                    .compile_file(path, caps)
                    .map_err(invalid(format!(
                        "cannot use the seccomp profile {}",
                        path.display()
                    )))
            }
        };
        filter.map(Some)
    }
}

pub(super) fn invalid<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    text: impl Into<String>,
) -> impl FnOnce(E) -> SandboxError {
    let text = text.into();
    move |error| SandboxError::caused(Kind::Invalid, text, error)
}
