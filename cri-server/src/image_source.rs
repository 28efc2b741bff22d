//! The image service as the rest of the daemon uses it: running pulls for
//! `berth status`, and images in `sandbox`'s terms.

use berth_image_service::auth::Credentials;
use berth_image_service::image::Image;
use berth_image_service::progress::Progress;
use berth_image_service::pull::PullError;
use berth_image_service::service::{ImageService, Pulled};
use berth_image_service::snapshot::{IdMap, IdRange};
use berth_image_service::usage::FsUsage;
use berth_proto::admin_v1 as admin;
use berth_sandbox::ContainerId;
use berth_sandbox::image::{ContainerImage, ImageConfig};
use berth_sandbox::pod_spec::IdMapping;
use berth_sandbox::service::{ImageError, Images};
use berth_sandbox::user_namespace::Mapped;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a measurement of the writable layers counts: the kubelet asks every
/// ten seconds at the most often. Source: evictionMonitoringPeriod, kubelet.
const MEASURED_FOR: Duration = Duration::from_secs(10);

/// One pull of a reference, however many wait for it.
struct Running {
    started_at: SystemTime,
    callers: u32,
    progress: Progress,
}

/// The image service and what it is doing. Cheap to clone.
#[derive(Clone)]
pub struct ImageSource {
    service: ImageService,
    running: Arc<Mutex<BTreeMap<String, Running>>>,
    measured: Arc<Mutex<Option<(Instant, FsUsage)>>>,
}

/// Takes a caller off the list, also when its task is dropped.
struct Waiting<'a> {
    source: &'a ImageSource,
    reference: &'a str,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut running = self.source.lock();
        if let Some(pull) = running.get_mut(self.reference) {
            pull.callers -= 1;
            if pull.callers == 0 {
                running.remove(self.reference);
            }
        }
    }
}

impl ImageSource {
    /// Wraps the service.
    pub fn new(service: ImageService) -> Self {
        Self {
            service,
            running: Arc::default(),
            measured: Arc::default(),
        }
    }

    /// The service itself.
    pub fn service(&self) -> &ImageService {
        &self.service
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls, and whether this caller was the first to ask for it.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
    ) -> Result<(Pulled, bool), Arc<PullError>> {
        let progress = Progress::new();
        let first = {
            let mut running = self.lock();
            let pull = running
                .entry(reference.to_owned())
                .or_insert_with(|| Running {
                    started_at: SystemTime::now(),
                    callers: 0,
                    progress: progress.clone(),
                });
            pull.callers += 1;
            pull.callers == 1
        };
        let _waiting = Waiting {
            source: self,
            reference,
        };
        let pulled = self.service.pull(reference, credentials, &progress).await?;
        Ok((pulled, first))
    }

    /// The pulls that run now.
    pub fn pulls(&self) -> Vec<admin::Operation> {
        let now = |time: SystemTime| {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
        };
        let operation = |(reference, pull): (&String, &Running)| {
            let progress = &pull.progress;
            let stage = match progress.bytes_total() {
                0 => progress.stage().name().to_owned(),
                total => format!(
                    "{} ({}/{} layers, {}/{} MiB)",
                    progress.stage().name(),
                    progress.layers(),
                    progress.layers_total(),
                    progress.bytes() >> 20,
                    total >> 20,
                ),
            };
            admin::Operation {
                kind: "PullImage".to_owned(),
                subject: reference.clone(),
                stage,
                started_at: now(pull.started_at),
                // A pull does not say when its stage began.
                stage_started_at: 0,
                callers: pull.callers,
            }
        };
        self.lock().iter().map(operation).collect()
    }

    /// The image `name` means, as a container keeps it.
    pub fn container_image(&self, name: &str) -> Option<ContainerImage> {
        self.service
            .find(name)
            .map(|image| container_image(&image, name))
    }
}

/// The repository part of a reference: no tag, no digest.
fn repository(reference: &str) -> &str {
    let named = reference.split('@').next().unwrap_or_default();
    match named.rsplit_once(':') {
        // A colon before a slash belongs to a port.
        Some((before, tag)) if !tag.contains('/') => before,
        _ => named,
    }
}

/// `asked` picks among the names of an image that has several: "busybox" stands
/// for docker.io/library/busybox, so the end of the repository is enough.
fn container_image(image: &Image, asked: &str) -> ContainerImage {
    let asked = repository(asked);
    let named = |digest: &&String| {
        let known = repository(digest);
        known
            .strip_suffix(asked)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    };
    let same = image.repo_digests.iter().find(named);
    let config = &image.config;
    ContainerImage {
        id: image.id.clone(),
        repo_digest: same
            .or(image.repo_digests.first())
            .cloned()
            .unwrap_or_else(|| image.id.clone()),
        config: ImageConfig {
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            env: config.env.clone(),
            user: config.user.clone(),
            working_dir: config.working_dir.clone(),
            stop_signal: Some(config.stop_signal.clone()).filter(|signal| !signal.is_empty()),
            volumes: config.volumes.iter().cloned().collect(),
            labels: config.labels.clone(),
        },
    }
}

impl ImageSource {
    /// What images take of the disk, and what containers' writable layers do. Blocking.
    pub fn usage(&self) -> (FsUsage, FsUsage) {
        (self.service.fs_usage(), self.writable_usage())
    }

    /// Walks the writable layers, but not again for as long as the kubelet's own pace allows.
    fn writable_usage(&self) -> FsUsage {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, usage)) = &*measured
            && at.elapsed() < MEASURED_FOR
        {
            return usage.clone();
        }
        let snapshots = self.service.snapshots();
        let mut usage = FsUsage {
            mountpoint: snapshots.dir().to_owned(),
            used_bytes: 0,
            inodes: 0,
        };
        match snapshots.footprint() {
            Ok(sums) => {
                usage.used_bytes = sums.bytes;
                usage.inodes = sums.inodes;
            }
            Err(error) => tracing::warn!(
                error = crate::rpc::chain(&error),
                "the writable layers cannot be measured"
            ),
        }
        *measured = Some((Instant::now(), usage.clone()));
        usage
    }
}

/// `sandbox`'s mapping in the image service's terms.
fn id_map(owners: &Mapped) -> IdMap {
    let range = |range: &IdMapping| IdRange {
        inside: range.container_id,
        outside: range.host_id,
        length: range.length,
    };
    IdMap {
        user_namespace: owners.namespace.clone(),
        uids: owners.mapping.uids.iter().map(range).collect(),
        gids: owners.mapping.gids.iter().map(range).collect(),
    }
}

impl Images for ImageSource {
    fn prepare(
        &self,
        container: &ContainerId,
        image_id: &str,
        volumes: &[String],
    ) -> Result<(), ImageError> {
        let service = &self.service;
        Ok(service.prepare_with_volumes(container.as_str(), image_id, volumes)?)
    }

    fn mount(
        &self,
        container: &ContainerId,
        owners: Option<&Mapped>,
        label: Option<&str>,
    ) -> Result<OwnedFd, ImageError> {
        let id = container.as_str();
        Ok(match owners {
            None => self.service.mount_rootfs(id, label)?,
            Some(owners) => self
                .service
                .mount_rootfs_mapped(id, &id_map(owners), label)?,
        })
    }

    fn mount_volume(
        &self,
        container: &ContainerId,
        image_id: &str,
        sub_path: &str,
        owners: Option<&Mapped>,
        label: Option<&str>,
    ) -> Result<OwnedFd, ImageError> {
        let (id, map) = (container.as_str(), owners.map(id_map));
        let service = &self.service;
        Ok(service.mount_volume(id, image_id, sub_path, map.as_ref(), label)?)
    }

    fn read_file(
        &self,
        image_id: &str,
        path: &str,
        max_bytes: usize,
    ) -> Result<Option<Vec<u8>>, ImageError> {
        Ok(self
            .service
            .read_file_in_image(image_id, path, max_bytes as u64)?)
    }

    fn write_changes(
        &self,
        container: &ContainerId,
        to: &mut dyn std::io::Write,
    ) -> Result<Vec<String>, ImageError> {
        let snapshots = self.service.snapshots();
        Ok(snapshots.write_changes(container.as_str(), to)?)
    }

    fn remove(&self, container: &ContainerId) -> Result<(), ImageError> {
        Ok(self.service.remove_container(container.as_str())?)
    }

    fn prepared(&self) -> Vec<String> {
        self.service.snapshots().list().unwrap_or_else(|error| {
            tracing::warn!(
                error = crate::rpc::chain(&error),
                "the writable layers cannot be listed"
            );
            Vec::new()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(repo_digests: &[&str]) -> Image {
        Image {
            id: "sha256:aa".into(),
            repo_tags: Vec::new(),
            repo_digests: repo_digests
                .iter()
                .map(|digest| (*digest).to_owned())
                .collect(),
            size_bytes: 0,
            config: Default::default(),
            manifest_digest: berth_image_service::digest::Digest::sha256(b""),
            layers: Vec::new(),
            uid: None,
            username: String::new(),
            pinned: false,
        }
    }

    #[test]
    fn the_digest_is_of_the_repository_that_was_asked_for() {
        let image = image(&[
            "a.test:5000/x/app@sha256:11",
            "docker.io/library/busybox@sha256:22",
        ]);
        for (asked, digest) in [
            ("busybox", "docker.io/library/busybox@sha256:22"),
            ("busybox:1.36", "docker.io/library/busybox@sha256:22"),
            (
                "docker.io/library/busybox@sha256:22",
                "docker.io/library/busybox@sha256:22",
            ),
            ("a.test:5000/x/app", "a.test:5000/x/app@sha256:11"),
            ("a.test:5000/x/app:2", "a.test:5000/x/app@sha256:11"),
            ("sha256:aa", "a.test:5000/x/app@sha256:11"),
        ] {
            assert_eq!(
                container_image(&image, asked).repo_digest,
                digest,
                "{asked}"
            );
        }
    }

    #[test]
    fn an_image_of_no_registry_is_named_by_its_id() {
        assert_eq!(container_image(&image(&[]), "aa").repo_digest, "sha256:aa");
    }
}
