//! SELinux labels of pods and containers, and of the volumes that ask for them.

use super::create_container::invalid;
use super::{Inner, internal};
use crate::container::ContainerRecord;
use crate::container_spec::ContainerSpec;
use crate::error::Result;
use crate::launch;
use crate::oci;
use crate::pod::PodRecord;
use crate::pod_spec::{Namespace, PidMode};
use crate::selinux::relabel::{self, Relabel};
use crate::selinux::{Asked, Labels, Pair};
use crate::view::View;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pods and containers with one of these, "true", have volumes whose root is right
/// left as they are.
///
/// Source: CRI-O, `TrySkipVolumeSELinuxLabel`, in both of its spellings.
const TRUSTING: [&str; 2] = [
    "io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel",
    "try-skip-volume-selinux-label.crio.io",
];

/// The pairs of categories that pods and containers have.
fn taken(view: &View) -> HashSet<Pair> {
    let pods = view.pods().map(|pod| &pod.selinux);
    let containers = view.containers().map(|container| &container.selinux);
    let labels = pods.chain(containers).flatten();
    labels.filter_map(Labels::pair).collect()
}

/// Whether what it runs is an init system by its name.
///
/// Source: CRI-O, which goes by the same names.
fn runs_init(spec: &ContainerSpec, entrypoint: &[String], cmd: &[String]) -> bool {
    let given = spec.command.first();
    let program = given
        .or(entrypoint.first())
        .or(spec.args.first())
        .or(cmd.first());
    program.is_some_and(|program| {
        matches!(program.as_str(), "/sbin/init" | "/usr/sbin/init")
            || Path::new(program)
                .file_name()
                .is_some_and(|name| name == "systemd")
    })
}

impl Inner {
    /// Adds a pod with its labels, whose categories are no other's. Blocking.
    pub(super) fn insert_labelled(&self, mut pod: PodRecord) -> Result<Arc<PodRecord>> {
        let Some(selinux) = &self.settings.selinux else {
            return self.objects.insert_pod(pod);
        };
        let _choosing = selinux.choosing();
        let taken = taken(&self.objects.view());
        // An ID is random, which is all that a beginning has to be.
        let digits = pod.id.as_str().get(..16).unwrap_or_default();
        let seed = u64::from_str_radix(digits, 16).unwrap_or(0);
        let labels = selinux
            .of_pod(pod.spec.security.selinux.as_ref(), seed, &taken)
            .map_err(invalid(format!("pod {} cannot be labelled", pod.spec.name)))?;
        pod.selinux = Some(labels);
        self.objects.insert_pod(pod)
    }

    /// The labels of a container that is about to be made; `None` without SELinux.
    pub(super) fn labels(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
    ) -> Result<Option<Labels>> {
        let (Some(selinux), Some(pods)) = (&self.settings.selinux, &pod.selinux) else {
            return Ok(None);
        };
        let security = &container.spec.security;
        let config = &container.image.config;
        let kvm = self.oci_runtime(&pod.spec)?.is_some_and(|runtime| {
            let name = runtime.path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("kata")
        });
        let asked = Asked {
            label: security.selinux.as_ref(),
            privileged: security.privileged,
            with_host: security.pid == PidMode::Node || security.ipc == Namespace::Node,
            init: runs_init(&container.spec, &config.entrypoint, &config.cmd),
            kvm,
        };
        let labels = selinux.of_container(pods, asked);
        labels.map(Some).map_err(invalid(format!(
            "container {} cannot be labelled",
            container.spec.name.name
        )))
    }

    /// The sources of the mounts that ask to be relabelled, relabelled and open, by
    /// their targets; those of a pod without labels are not asked for.
    ///
    /// Blocks for as long as the volumes have files, but ends with the start.
    pub(super) fn relabelled(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
    ) -> Result<BTreeMap<PathBuf, OwnedFd>> {
        let mut opened = BTreeMap::new();
        let Some(labels) = &container.selinux else {
            return Ok(opened);
        };
        if labels.keeps_volumes() {
            return Ok(opened);
        }
        let annotations = [&pod.spec.annotations, &container.spec.annotations];
        let trust_root = annotations.iter().any(|all| {
            let value = |key: &&str| all.get(*key).is_some_and(|value| value == "true");
            TRUSTING.iter().any(value)
        });
        let mounts = container.spec.mounts.iter();
        for mount in mounts.filter(|mount| mount.selinux_relabel && mount.image.is_none()) {
            let failed = || format!("cannot relabel {}", mount.host_path.display());
            let target = oci::mount_target(&mount.container_path).map_err(invalid(failed()))?;
            let source =
                launch::open_source(&mount.host_path, &target).map_err(internal(failed()))?;
            relabel::check_allowed(source.as_fd()).map_err(invalid(failed()))?;
            let goes_on = || self.called_off(&container.id).is_none();
            let how = Relabel {
                attribute: relabel::ATTRIBUTE,
                label: &labels.mount,
                trust_root,
                goes_on: &goes_on,
            };
            let done = relabel::relabel(source.as_fd(), &how).map_err(internal(failed()))?;
            tracing::debug!(
                container = %container.id,
                volume = %mount.host_path.display(),
                changed = done.changed,
                right = done.right,
                unsupported = done.unsupported,
                "relabelled"
            );
            opened.insert(target, source);
        }
        Ok(opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_init_system_is_known_by_its_name() {
        let spec = |command: &[&str]| {
            let mut spec = crate::oci::tests::Sample::new().container;
            spec.command = command.iter().map(|&word| word.to_owned()).collect();
            spec.args.clear();
            spec
        };
        let runs = |command: &[&str], entrypoint: &str| {
            runs_init(&spec(command), &[entrypoint.to_owned()], &[])
        };
        assert!(runs(&["/sbin/init"], "sh"));
        assert!(runs(&["/lib/systemd/systemd"], "sh"));
        assert!(runs(&[], "/usr/sbin/init"));
        assert!(!runs(&["sh"], "/sbin/init"));
        assert!(!runs(&["/app/init"], "sh"));
    }
}
