//! RemoveContainer and RemovePodSandbox.

use super::hooks::LAST_WORDS;
use super::teardown::together;
use super::{Inner, Sandboxes, blocking, internal};
use crate::container::{ContainerEvent, ContainerRecord};
use crate::error::{Kind, Result};
use crate::id::PodId;
use crate::operation::{Stage, lock};
use crate::pod::PodEvent;
use berth_proto::monitor_v1::{self, request};
use berth_store::crash;
use futures_util::future::join_all;
use std::sync::Arc;

impl Sandboxes {
    /// Removes a container, killing it first where it still runs. One that is
    /// gone counts as removed. Its log file stays: that is the kubelet's.
    ///
    /// # Errors
    /// It cannot be killed, or the disk refuses; it can be repeated.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Ok(container) = self.0.container(id) else {
            return Ok(());
        };
        let subject = container.spec.name.name.clone();
        self.0
            .operation("RemoveContainer", id, subject, |me, stage| async move {
                me.remove_container(&container, Some(&stage))
                    .await
                    .map(|()| String::new())
            })
            .await
            .map(drop)
    }

    /// Stops a pod and removes it with its containers. One that is gone counts
    /// as removed.
    ///
    /// # Errors
    /// What could not be stopped or removed; it can be repeated.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let Ok(pod) = self.0.pod(id) else {
            return Ok(());
        };
        let subject = pod.spec.name.to_string();
        self.0
            .operation("RemovePodSandbox", id, subject, |me, stage| async move {
                me.remove_pod(&pod.id, &stage).await.map(|()| String::new())
            })
            .await
            .map(drop)
    }
}

impl Inner {
    /// Removes a container in whatever state, a half-made one too.
    pub(super) async fn remove_container(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        stage: Option<&Stage>,
    ) -> Result<()> {
        let enter = |name| stage.inspect(|stage| stage.enter(name));
        enter("kill");
        // A start that comes between the end of all processes and the record has its way first. A
        // container starts once.
        let mut may_have_started = true;
        loop {
            self.kill_container(container).await?;
            enter("record");
            match self
                .container_event(&container.id, ContainerEvent::Remove)
                .await
            {
                Ok(_) => break,
                Err(error) if error.kind() == Kind::ContainerNotFound => return Ok(()),
                Err(error) if error.kind() == Kind::WrongState && may_have_started => {
                    may_have_started = false;
                    enter("kill");
                }
                Err(error) => return Err(error),
            }
        }
        crash::point("remove_container.record");
        enter("release");
        self.release_cgroup(container, Some(LAST_WORDS)).await?;
        let (me, record) = (self.clone(), container.clone());
        blocking(move || {
            let text = format!("cannot remove the file system of container {}", record.id);
            me.images.remove(&record.id).map_err(internal(text))
        })
        .await?;
        let monitor = lock(&self.monitors).get(&container.pod).cloned();
        if let Some(monitor) = monitor {
            let forget = monitor_v1::Forget {
                container_id: container.id.to_string(),
            };
            // It may never have heard of it; what it still keeps goes with the pod.
            let _ = monitor
                .tell(request::Body::Forget(forget), Vec::new())
                .await;
        }
        crash::point("remove_container.released");
        enter("forget");
        let (me, record) = (self.clone(), container.clone());
        blocking(move || me.objects.remove_container(&record.pod, &record.id)).await
    }

    pub(super) async fn remove_pod(self: &Arc<Self>, id: &PodId, stage: &Stage) -> Result<()> {
        self.stop_pod(id, stage).await?;
        stage.enter("record");
        match self.pod_event(id, PodEvent::Remove).await {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::PodNotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        crash::point("remove_pod.record");
        self.finish_removal(id, Some(stage)).await
    }

    /// The containers, then the record, of a pod that is being removed.
    pub(super) async fn finish_removal(
        self: &Arc<Self>,
        id: &PodId,
        stage: Option<&Stage>,
    ) -> Result<()> {
        stage.inspect(|stage| stage.enter("containers"));
        let view = self.objects.view();
        let removed = join_all(
            view.containers_of(id)
                .map(|container| self.remove_container(container, None)),
        );
        let failures = removed.await.into_iter().filter_map(Result::err).collect();
        if let Some(error) = together(failures, || format!("pod sandbox {id} is not all removed")) {
            return Err(error);
        }
        crash::point("remove_pod.containers");
        let (me, id) = (self.clone(), id.clone());
        blocking(move || me.objects.remove_pod(&id)).await
    }
}
