//! What is mounted for a container besides what its runtime spec says: its root
//! file system and image volumes, and with whose owners.

use super::create_container::invalid;
use super::{Inner, internal};
use crate::apparmor;
use crate::container::{ContainerRecord, ContainerState};
use crate::container_spec::{AppArmorProfile, MountRequest};
use crate::error::{Kind, Result, SandboxError};
use crate::oci;
use crate::pod_spec::{PidMode, PodSpec};
use crate::user_namespace::{Mapped, Mapping};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The pod's own mapping, where it has a user namespace.
pub(super) fn pod_mapping(pod: &PodSpec) -> Option<Mapping> {
    pod.namespaces.user.as_ref().map(Mapping::from)
}

/// What an image volume's owners are mapped by: its own mapping, else the pod's.
fn volume_mapping(pod: &PodSpec, mount: &MountRequest) -> Option<Mapping> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return pod_mapping(pod);
    }
    Some(Mapping {
        uids: mount.uid_mappings.clone(),
        gids: mount.gid_mappings.clone(),
    })
}

/// The SELinux label of all that is mounted for the container.
fn mount_label(container: &ContainerRecord) -> Option<&str> {
    let labels = container.selinux.as_ref()?;
    Some(labels.mount.as_str()).filter(|label| !label.is_empty())
}

impl Inner {
    /// A user namespace with these maps.
    pub(super) fn mapped(&self, mapping: &Mapping) -> Result<Mapped> {
        self.user_namespaces
            .of(&self.program, mapping)
            .map_err(internal("cannot map owners"))
    }

    /// Refused where this node has no user namespaces for pods.
    pub(super) fn check_user_namespace(&self, pod: &PodSpec) -> Result<()> {
        match (&pod.namespaces.user, &self.user_namespaces_missing) {
            (Some(_), Some(why)) => {
                let text = format!("this node cannot run pods in user namespaces: {why}");
                Err(SandboxError::new(Kind::Unsupported, text))
            }
            _ => Ok(()),
        }
    }

    /// The container's root file system, detached.
    pub(super) fn rootfs(&self, pod: &PodSpec, container: &ContainerRecord) -> Result<OwnedFd> {
        let mapped = pod_mapping(pod).map(|mapping| self.mapped(&mapping));
        let mapped = mapped.transpose()?;
        self.images
            .mount(&container.id, mapped.as_ref(), mount_label(container))
            .map_err(internal(format!(
                "cannot mount the file system of container {}",
                container.id
            )))
    }

    /// IDs of the images that the container has as volumes.
    pub(super) fn volume_images(container: &ContainerRecord) -> Vec<String> {
        let mounts = container.spec.mounts.iter();
        let mut all: Vec<String> = mounts
            .filter(|mount| mount.image.is_some())
            .map(|mount| mount.image_id.clone())
            .collect();
        all.sort();
        all.dedup();
        all
    }

    /// What the spec calls the sources of image volumes; nothing is at these paths.
    pub(super) fn image_volumes(&self, container: &ContainerRecord) -> BTreeMap<String, PathBuf> {
        let dir = self.run_dir(&container.pod).join("volumes");
        let mounts = container.spec.mounts.iter().enumerate();
        mounts
            .filter(|(_, mount)| mount.image.is_some())
            .map(|(i, mount)| {
                let path = dir.join(container.id.as_str()).join(i.to_string());
                (mount.container_path.clone(), path)
            })
            .collect()
    }

    /// The image volumes by their mount points, detached.
    pub(super) fn mounted_images(
        &self,
        pod: &PodSpec,
        container: &ContainerRecord,
    ) -> Result<BTreeMap<PathBuf, OwnedFd>> {
        let mut all = BTreeMap::new();
        for mount in &container.spec.mounts {
            let Some(image) = &mount.image else { continue };
            let target = oci::mount_target(&mount.container_path)
                .map_err(invalid("an image cannot be mounted"))?;
            let mapped = volume_mapping(pod, mount).map(|mapping| self.mapped(&mapping));
            let mapped = mapped.transpose()?;
            let fd = self
                .images
                .mount_volume(
                    &container.id,
                    &mount.image_id,
                    &mount.image_sub_path,
                    mapped.as_ref(),
                    mount_label(container),
                )
                // The kubelet looks for this word. Source: cri-api, pkg/errors.
                .map_err(invalid(format!(
                    "ImageVolumeMountFailed: cannot mount the image {} at {}",
                    image.image, mount.container_path
                )))?;
            all.insert(target, fd);
        }
        Ok(all)
    }

    /// Refused where the kernel does not have the profile that is asked for.
    pub(super) fn check_profile(&self, container: &ContainerRecord) -> Result<()> {
        match &container.spec.security.apparmor {
            AppArmorProfile::Localhost(name) if self.settings.defaults.apparmor => {
                apparmor::check_loaded(name).map_err(invalid(format!(
                    "container {} cannot be confined",
                    container.spec.name.name
                )))
            }
            // Without AppArmor the request was refused as it came.
            AppArmorProfile::Localhost(_)
            | AppArmorProfile::RuntimeDefault
            | AppArmorProfile::Unconfined => Ok(()),
        }
    }

    /// The container whose PID namespace is to be joined; `None` where it is not
    /// another container's.
    ///
    /// # Errors
    /// `ContainerNotFound` or `WrongState` where it is not a running one of the pod.
    pub(super) fn pid_target(
        &self,
        container: &ContainerRecord,
    ) -> Result<Option<std::sync::Arc<ContainerRecord>>> {
        let PidMode::Target(id) = &container.spec.security.pid else {
            return Ok(None);
        };
        let view = self.objects.view();
        let target = view.container(id).filter(|other| {
            other.state.is_listed() && other.pod == container.pod && other.id != container.id
        });
        let target = target.ok_or_else(|| {
            let text = format!("the pod has no container {id}, whose PID namespace is asked for");
            SandboxError::new(Kind::ContainerNotFound, text)
        })?;
        match target.state {
            ContainerState::Running { .. } => Ok(Some(target.clone())),
            _ => {
                let text =
                    format!("container {id}, whose PID namespace is asked for, does not run");
                Err(SandboxError::new(Kind::WrongState, text))
            }
        }
    }
}
