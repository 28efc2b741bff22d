//! OOM kills of a container whose cgroup was taken away before it could be asked.
//!
//! systemd removes a scope's cgroup as soon as its last process has ended, and may be faster
//! than this process is at reading it. The pod's cgroup counts what happened inside it and
//! stays: what its count has grown by, and no container of the pod accounts for, was the
//! container's that has just ended.

use super::{Monitor, Phase};
use crate::reaper;
use std::path::Path;

/// The pod's count when its first container was launched, and what ended ones had of it.
#[derive(Default)]
pub(super) struct PodKills {
    before: Option<u64>,
    told: u64,
}

/// The file of the cgroup above; only v2 counts what is inside.
fn above(oom_file: &str) -> Option<String> {
    let file = Path::new(oom_file);
    let name = file.file_name().filter(|name| *name == "memory.events")?;
    let pod = file.parent()?.parent()?;
    Some(pod.join(name).to_string_lossy().into_owned())
}

impl Monitor {
    /// A container is about to run: from here on the pod's count matters.
    pub(super) fn count_from_now(&mut self, oom_file: &str) {
        if self.pod_kills.before.is_none()
            && let Some(file) = above(oom_file)
        {
            self.pod_kills.before = reaper::oom_kills(&file);
        }
    }

    /// How many processes of the container that has just ended were killed for memory.
    pub(super) fn kills_of(&mut self, id: &str) -> u64 {
        let Some(container) = self.containers.get(id) else {
            return 0;
        };
        let kills = match reaper::oom_kills(&container.cgroup.oom_file) {
            Some(kills) => kills.saturating_sub(container.oom_before),
            None => self.unaccounted(id),
        };
        self.pod_kills.told += kills;
        kills
    }

    fn unaccounted(&self, id: &str) -> u64 {
        let oom_file = self
            .containers
            .get(id)
            .map_or("", |container| &container.cgroup.oom_file);
        let now = above(oom_file).and_then(|file| reaper::oom_kills(&file));
        let (Some(now), Some(before)) = (now, self.pod_kills.before) else {
            return 0;
        };
        let of_others: u64 = self
            .containers
            .iter()
            .filter(|(other, container)| *other != id && matches!(container.phase, Phase::Running))
            .map(|(_, container)| {
                reaper::oom_kills(&container.cgroup.oom_file)
                    .unwrap_or(0)
                    .saturating_sub(container.oom_before)
            })
            .sum();
        now.saturating_sub(before)
            .saturating_sub(self.pod_kills.told)
            .saturating_sub(of_others)
    }
}

#[cfg(test)]
mod tests {
    use super::above;

    #[test]
    fn only_v2_counts_what_is_inside() {
        assert_eq!(
            above("/sys/fs/cgroup/p.slice/c.scope/memory.events").as_deref(),
            Some("/sys/fs/cgroup/p.slice/memory.events")
        );
        assert_eq!(above("/sys/fs/cgroup/memory/p/c/memory.oom_control"), None);
        assert_eq!(above(""), None);
    }
}
