//! Why the kernel killed for want of memory: whose limit it was, how large, how
//! much was in use. Asked while the container's cgroup is still there.
//!
//! Source: kernel `cgroup-v2.rst` (memory.events.local), `cgroup-v1/memory.rst`.

use crate::cgroup::{Cgroup, Cgroups};
use crate::container_spec::Resources;

/// How near to its limit a v1 cgroup must have been to have hit it: the kernel charges in
/// batches. Source: MEMCG_CHARGE_BATCH, 64 pages, on each processor.
const BATCHES: u64 = 64 * 4096 * 16;

/// Whose memory ran out.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    Container,
    Pod,
    /// A cgroup above the pod's.
    Above(String),
}

/// What one cgroup says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    path: String,
    /// 0 for none.
    limit: u64,
    peak: u64,
    /// How often its own limit left nothing but to kill; `None` on v1.
    ooms: Option<u64>,
}

impl Seen {
    fn of(cgroup: &Cgroup) -> Option<Self> {
        let memory = cgroup.memory_stats().ok()??;
        Some(Self {
            path: cgroup.path().to_owned(),
            limit: cgroup.limits().ok()?.memory,
            peak: memory.max_usage.unwrap_or(memory.usage),
            ooms: cgroup.limit_ooms().ok()?,
        })
    }

    fn hit(&self) -> bool {
        match self.ooms {
            Some(ooms) => ooms > 0,
            None => self.limit > 0 && self.peak.saturating_add(BATCHES) >= self.limit,
        }
    }
}

/// A sentence for people about `kills` processes of the container killed for memory. Reads the
/// cgroups, so it blocks for a moment. `asked` are the container's limits, for where its cgroup
/// is gone already.
pub fn report(cgroups: &Cgroups, cgroup: &Cgroup, asked: &Resources, kills: u64) -> String {
    let mut seen = Vec::new();
    let mut path = cgroup.path();
    while !path.is_empty() {
        let level = match path == cgroup.path() {
            true => Seen::of(cgroup),
            false => cgroups.at(path).ok().as_ref().and_then(Seen::of),
        };
        seen.push(level);
        path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    explain(&seen, asked, kills)
}

/// `seen` is the container's, the pod's, and what is above; `None` for what is gone.
fn explain(seen: &[Option<Seen>], asked: &Resources, kills: u64) -> String {
    let level = seen.iter().enumerate().find_map(|(at, level)| {
        let level = level.as_ref().filter(|level| level.hit())?;
        let whose = match at {
            0 => Level::Container,
            1 => Level::Pod,
            _ => Level::Above(level.path.clone()),
        };
        Some((whose, level))
    });
    let own = seen.first().and_then(Option::as_ref);
    let killed = match kills {
        1 => "one process was killed".to_owned(),
        kills => format!("{kills} processes were killed"),
    };
    let limit = asked.memory_limit_bytes.filter(|limit| *limit > 0);
    let whose = match (level, own, limit) {
        (Some((whose, level)), own, _) => {
            let used = match (&whose, own) {
                (Level::Container, _) | (_, None) => String::new(),
                (_, Some(own)) => format!(", the container used up to {}", size(own.peak)),
            };
            let text = match whose {
                Level::Container => "the container's memory limit".to_owned(),
                Level::Pod => "the pod's memory limit".to_owned(),
                Level::Above(path) => format!("the memory limit of {path}"),
            };
            let limit = format!("{text} of {} was reached", size(level.limit));
            format!("{limit} (peak {}{used})", size(level.peak))
        }
        // Its cgroup is gone: what is known is what it was to be limited to.
        (None, None, Some(limit)) => {
            let limit = size(limit.unsigned_abs());
            format!("memory ran out; the container's limit is {limit}")
        }
        (None, own, _) => {
            let used = own.map_or(String::new(), |own| {
                format!(" (the container used up to {})", size(own.peak))
            });
            let whose = "no memory limit of the container or its pod was reached: the node was \
                         short of memory";
            format!("{whose}{used}")
        }
    };
    format!("{whose}; {killed} by the kernel")
}

/// "64.0 MiB"; smaller than one in KiB.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1.0 {
        format!("{} KiB", bytes >> 10)
    } else if mib < 10_240.0 {
        format!("{mib:.1} MiB")
    } else {
        format!("{:.1} GiB", mib / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(path: &str, limit: u64, peak: u64, ooms: Option<u64>) -> Option<Seen> {
        Some(Seen {
            path: path.into(),
            limit: limit << 20,
            peak: peak << 20,
            ooms,
        })
    }

    fn asked(limit: i64) -> Resources {
        Resources {
            memory_limit_bytes: Some(limit << 20),
            ..Resources::default()
        }
    }

    #[test]
    fn the_innermost_limit_that_was_hit_is_named() {
        let container = explain(
            &[seen("/p/c", 32, 32, Some(1)), seen("/p", 64, 64, Some(1))],
            &asked(32),
            2,
        );
        assert_eq!(
            container,
            "the container's memory limit of 32.0 MiB was reached (peak 32.0 MiB); \
             2 processes were killed by the kernel"
        );
        let pod = explain(
            &[seen("/p/c", 0, 20, None), seen("/p", 64, 63, None)],
            &asked(0),
            1,
        );
        assert_eq!(
            pod,
            "the pod's memory limit of 64.0 MiB was reached (peak 63.0 MiB, the container used \
             up to 20.0 MiB); one process was killed by the kernel"
        );
        let above = explain(
            &[
                seen("/k/p/c", 32, 20, Some(0)),
                seen("/k/p", 64, 30, Some(0)),
                seen("/k", 100, 100, Some(3)),
            ],
            &asked(32),
            1,
        );
        assert!(
            above.starts_with("the memory limit of /k of 100.0 MiB"),
            "{above}"
        );
    }

    #[test]
    fn without_a_limit_hit_it_was_the_node() {
        let node = explain(
            &[seen("/p/c", 64, 20, None), seen("/p", 0, 30, None)],
            &asked(64),
            1,
        );
        assert!(node.contains("the node was short of memory"), "{node}");
        assert!(node.contains("up to 20.0 MiB"), "{node}");
    }

    #[test]
    fn a_cgroup_that_is_gone_leaves_what_was_asked_for() {
        let gone = explain(&[None, None], &asked(64), 1);
        assert!(gone.contains("the container's limit is 64.0 MiB"), "{gone}");
        assert_eq!(size(12 << 30), "12.0 GiB");
        assert_eq!(size(4096), "4 KiB");
    }
}
