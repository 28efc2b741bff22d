//! What the daemon and the monitors hold, to be compared with itself later: descriptors,
//! threads, processes.

use berth_tests::{Node, within};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Long enough for what is cut off to be noticed and put away.
const SETTLED: Duration = Duration::from_secs(20);

/// What a node's processes hold, by process and kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Holdings(BTreeMap<String, usize>);

impl Holdings {
    /// What they hold once that has not changed for a moment.
    pub fn of(node: &Node) -> Self {
        let mut last = None;
        let settled = within(SETTLED, || {
            let now = Self::now(node);
            let same = last.as_ref() == Some(&now);
            last = Some(now);
            // What is on its way out takes a moment.
            std::thread::sleep(Duration::from_millis(100));
            same.then_some(())
        });
        assert!(settled.is_some(), "never the same twice: {last:?}");
        last.expect("looked at least once")
    }

    fn now(node: &Node) -> Self {
        let mut all = BTreeMap::new();
        let daemon = node.daemon_pid().expect("the daemon runs");
        let pids = node.footprint().processes(Some(daemon));
        for pid in pids.into_iter().chain([daemon.cast_signed()]) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let name = format!("{} {pid}", name.trim());
            let mut count = |what: String| *all.entry(format!("{name}: {what}")).or_insert(0) += 1;
            for fd in fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten()
                .flatten()
            {
                if let Ok(target) = fs::read_link(fd.path()) {
                    let target = target.display().to_string();
                    // Not which pipe, but that it is one.
                    count(target.split('[').next().unwrap_or_default().to_owned());
                }
            }
            for task in fs::read_dir(format!("/proc/{pid}/task"))
                .into_iter()
                .flatten()
                .flatten()
            {
                let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                // Those of the pool for blocking work come and go.
                if comm.trim() != "berth" {
                    count(format!("thread {}", comm.trim()));
                }
            }
        }
        Self(all)
    }

    /// They hold the same again, soon.
    #[track_caller]
    pub fn again(&self, node: &Node) {
        let mut now = Self::now(node);
        let same = within(SETTLED, || {
            now = Self::now(node);
            (now == *self).then_some(())
        });
        if same.is_none() {
            let changed: Vec<String> = now
                .0
                .iter()
                .filter(|(what, count)| self.0.get(*what) != Some(*count))
                .map(|(what, count)| {
                    format!("{what}: {count}, was {}", self.0.get(what).unwrap_or(&0))
                })
                .chain(
                    self.0
                        .iter()
                        .filter(|(what, _)| !now.0.contains_key(*what))
                        .map(|(what, count)| format!("{what}: gone, was {count}")),
                )
                .collect();
            panic!(
                "something is held that was not before:\n{}",
                changed.join("\n")
            );
        }
    }
}
