//! What pods and containers use now: samples for ContainerStats, PodSandboxStats
//! and the metrics.
//!
//! A sample is a handful of reads of the kernel's files, made when it is asked
//! for. Only the rate of processor time needs a memory: the sample before.

use crate::cgroup::{self, Cgroup, Pressure};
use crate::container::{ContainerRecord, ContainerState};
use crate::operation::lock;
use crate::pod::PodRecord;
use crate::pod_spec::Namespace;
use crate::service::Sandboxes;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A rate over less than this says more about the scheduler than about the load:
/// until then the last one stands.
const RATE_OVER: Duration = Duration::from_millis(500);

/// Pressure of each resource; `None` where the kernel does not measure it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressures {
    pub cpu: Option<Pressure>,
    pub memory: Option<Pressure>,
    pub io: Option<Pressure>,
}

/// What one cgroup uses at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Nanoseconds since 1970.
    pub at: i64,
    pub stats: cgroup::Stats,
    /// Processor time per time now, in billionths of a processor; `None` until it is known.
    pub nano_cores: Option<u64>,
    pub pressure: Pressures,
}

/// Counters of one network interface since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub received: Traffic,
    pub sent: Traffic,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// The sample before, for rates.
#[derive(Clone, Copy, Debug)]
struct Before {
    at: i64,
    usage_ns: u64,
    nano_cores: Option<u64>,
}

/// What is remembered between samples.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<HashMap<String, Before>>);

/// Entries beyond the objects there are, before those that went are dropped.
const SPARE_ENTRIES: usize = 256;

impl Rates {
    /// The rate of `id` now. `since` is when the cgroup began to be used, in nanoseconds
    /// since 1970: the first rate is the mean since then.
    fn rate(&self, id: &str, at: i64, usage_ns: u64, since: Option<i64>) -> Option<u64> {
        let mut known = lock(&self.0);
        let before = known.get(id).copied();
        let start = before.map(|b| (b.at, b.usage_ns)).or(since.map(|s| (s, 0)));
        let (began, used) = start?;
        let elapsed = u64::try_from(at.saturating_sub(began)).unwrap_or(0);
        if let Some(before) = before
            && u128::from(elapsed) < RATE_OVER.as_nanos()
        {
            return before.nano_cores;
        }
        // A counter that went back is a new cgroup.
        let grown = usage_ns.checked_sub(used).unwrap_or(usage_ns);
        let rate = u128::from(grown) * 1_000_000_000 / u128::from(elapsed.max(1));
        let nano_cores = (elapsed > 0).then(|| u64::try_from(rate).unwrap_or(u64::MAX));
        known.insert(
            id.to_owned(),
            Before {
                at,
                usage_ns,
                nano_cores,
            },
        );
        nano_cores
    }

    /// Drops what is not among `live` any more, once there is enough of it.
    fn tidy(&self, live: usize, is_live: impl Fn(&str) -> bool) {
        let mut known = lock(&self.0);
        if known.len() > live + SPARE_ENTRIES {
            known.retain(|id, _| is_live(id));
        }
    }
}

impl Sandboxes {
    /// What a container uses now; `None` when it does not run, or ends this moment. Blocking,
    /// for about a dozen reads.
    pub fn sample_container(&self, container: &ContainerRecord) -> Option<Sample> {
        let ContainerState::Running { since, .. } = &container.state else {
            return None;
        };
        let cgroup = container.cgroup.as_ref()?;
        self.sample(container.id.as_str(), cgroup, Some(*since))
    }

    /// What everything in a pod's cgroup uses now; `None` when it is not there. Blocking.
    pub fn sample_pod(&self, pod: &PodRecord) -> Option<Sample> {
        let cgroup = self.pod_cgroup(pod)?;
        self.sample(pod.id.as_str(), &cgroup, Some(pod.created_at))
    }

    /// The cgroup that a pod's containers are beneath.
    pub fn pod_cgroup(&self, pod: &PodRecord) -> Option<Cgroup> {
        let parent = pod.cgroup.as_ref()?;
        self.cgroups().at(&parent.path).ok()
    }

    fn sample(&self, id: &str, cgroup: &Cgroup, since: Option<i64>) -> Option<Sample> {
        // One that went away while it was read has nothing to say.
        let stats = cgroup.stats().ok()?;
        let cpu = stats.cpu?;
        let at = now();
        let pressure = |resource| cgroup.pressure(resource).ok().flatten();
        let view = self.view();
        let live = view.pods().count() + view.containers().count();
        let rates = self.rates();
        let nano_cores = rates.rate(id, at, cpu.usage_ns, since);
        rates.tidy(live, |id| {
            view.container(id).is_some() || view.pod(id).is_some()
        });
        Some(Sample {
            at,
            stats,
            nano_cores,
            pressure: Pressures {
                cpu: pressure("cpu"),
                memory: pressure("memory"),
                io: pressure("io"),
            },
        })
    }

    /// The interfaces of each pod but loopback; empty for one on the host's network and for
    /// one whose network is gone. Blocking: one thread enters each namespace in turn.
    pub fn interfaces(&self, pods: &[&PodRecord]) -> Vec<Vec<Interface>> {
        let paths: Vec<Option<PathBuf>> = pods
            .iter()
            .map(|pod| {
                let own = pod.spec.namespaces.network == Namespace::Pod && pod.state.is_ready();
                own.then(|| self.netns_path(&pod.id))
            })
            .collect();
        if paths.iter().all(Option::is_none) {
            return vec![Vec::new(); pods.len()];
        }
        let read = || {
            let each = |path: &Option<PathBuf>| -> std::io::Result<Vec<Interface>> {
                let Some(path) = path else {
                    return Ok(Vec::new());
                };
                let netns = File::open(path)?;
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
                // The thread's own: /proc/net is that of the process's first thread.
                let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
                Ok(parse_net_dev(&text))
            };
            let read: Vec<Vec<Interface>> = paths
                .iter()
                .map(|path| each(path).unwrap_or_default())
                .collect();
            read
        };
        // The thread ends in whatever namespace it came to: nobody else finds itself there.
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns-stats".into())
                .spawn_scoped(scope, read)
                .ok()
                .and_then(|thread| thread.join().ok())
        })
        .unwrap_or_else(|| vec![Vec::new(); pods.len()])
    }
}

/// Source: proc_pid_net(5), dev: eight numbers received, eight sent.
fn parse_net_dev(text: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        let traffic = |at: usize| {
            Some(Traffic {
                bytes: *numbers.get(at)?,
                packets: *numbers.get(at + 1)?,
                errors: *numbers.get(at + 2)?,
                dropped: *numbers.get(at + 3)?,
            })
        };
        Some(Interface {
            name: name.trim().to_owned(),
            received: traffic(0)?,
            sent: traffic(8)?,
        })
    };
    text.lines()
        .filter_map(line)
        .filter(|interface| interface.name != "lo")
        .collect()
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_rate_is_of_the_time_since_the_sample_before() {
        let rates = Rates::default();
        // Half a processor since the start.
        assert_eq!(
            rates.rate("a", 2 * SECOND, 1_000_000_000, Some(0)),
            Some(500_000_000)
        );
        // Too soon: as before.
        assert_eq!(
            rates.rate("a", 2 * SECOND + 1000, 1_100_000_000, Some(0)),
            Some(500_000_000)
        );
        assert_eq!(
            rates.rate("a", 3 * SECOND, 3_000_000_000, Some(0)),
            Some(2_000_000_000)
        );
        // A cgroup made anew counts from 0.
        assert_eq!(rates.rate("a", 4 * SECOND, 100, Some(0)), Some(100));
        assert_eq!(rates.rate("b", SECOND, 5, None), None);
    }

    #[test]
    fn what_is_gone_is_forgotten_in_time() {
        let rates = Rates::default();
        for i in 0..SPARE_ENTRIES + 2 {
            rates.rate(&i.to_string(), SECOND, 1, Some(0));
        }
        rates.tidy(1, |id| id == "7");
        assert_eq!(lock(&rates.0).len(), 1);
    }

    #[test]
    fn interfaces_are_parsed_and_loopback_left_out() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
                lo:  100  1 0 0 0 0 0 0 100 1 0 0 0 0 0 0\n  \
              eth0: 7000 70 2 3 0 0 0 0 5000 50 4 5 0 0 0 0\nbad: 1 2\n";
        let found = parse_net_dev(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        let expected = Traffic {
            bytes: 5000,
            packets: 50,
            errors: 4,
            dropped: 5,
        };
        assert_eq!(found[0].sent, expected);
        assert_eq!(found[0].received.dropped, 3);
    }
}
