//! Limits, as the kernel has them.

use berth_tests::leftovers::cgroup_mounts;
use berth_tests::node::is_cgroup_v2;
use berth_tests::{Container, LinuxConfig, Node};
use std::path::{Path, PathBuf};

/// What a file of the container's cgroup says: of the controller's hierarchy on
/// v1, of the one there is on v2.
pub fn read(container: &Container<'_>, controller: &str, file: &str) -> String {
    let file = path(container, controller, file);
    let text = std::fs::read_to_string(&file);
    text.unwrap_or_else(|err| panic!("{}: {err}", file.display()))
        .trim()
        .to_owned()
}

/// Where that file is.
pub fn path(container: &Container<'_>, controller: &str, file: &str) -> PathBuf {
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", container.init_pid())).unwrap();
    let path = text
        .lines()
        .find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            let path = fields.next()?;
            let wanted = if is_cgroup_v2() {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|name| name == controller)
            };
            wanted.then(|| path.trim_start_matches('/').to_owned())
        })
        .unwrap_or_else(|| panic!("no {controller} in {text}"));
    mount_of(controller).join(path).join(file)
}

pub fn mount_of(controller: &str) -> PathBuf {
    if is_cgroup_v2() {
        return PathBuf::from("/sys/fs/cgroup");
    }
    let named = |path: &&PathBuf| {
        path.file_name().is_some_and(|name| {
            name.to_string_lossy()
                .split(',')
                .any(|part| part == controller)
        })
    };
    cgroup_mounts()
        .iter()
        .find(named)
        .cloned()
        .unwrap_or_else(|| panic!("no {controller}"))
}

#[test]
fn memory_cpu_and_cpuset_limits_are_set() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    let resources = config.resources();
    resources.memory_limit_in_bytes = 64 << 20;
    resources.cpu_period = 100_000;
    resources.cpu_quota = 25_000;
    resources.cpu_shares = 512;
    resources.cpuset_cpus = "0".to_owned();
    let container = pod.start_as(config);
    let memory = (64u64 << 20).to_string();
    if is_cgroup_v2() {
        assert_eq!(read(&container, "", "memory.max"), memory);
        assert_eq!(read(&container, "", "cpu.max"), "25000 100000");
        // Not the plain proportion everywhere: newer runtimes bend the curve.
        let weight: u64 = read(&container, "", "cpu.weight").parse().unwrap();
        assert!((15..=70).contains(&weight), "{weight}");
        assert_eq!(read(&container, "", "cpuset.cpus"), "0");
    } else {
        assert_eq!(read(&container, "memory", "memory.limit_in_bytes"), memory);
        assert_eq!(read(&container, "cpu", "cpu.cfs_quota_us"), "25000");
        assert_eq!(read(&container, "cpu", "cpu.cfs_period_us"), "100000");
        assert_eq!(read(&container, "cpu", "cpu.shares"), "512");
        assert_eq!(read(&container, "cpuset", "cpuset.cpus"), "0");
    }
}

#[test]
fn without_limits_there_are_none() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    if is_cgroup_v2() {
        assert_eq!(read(&container, "", "memory.max"), "max");
        assert!(read(&container, "", "cpu.max").starts_with("max"));
    } else {
        let limit: u64 = read(&container, "memory", "memory.limit_in_bytes")
            .parse()
            .unwrap();
        assert!(limit > 1 << 50);
        assert_eq!(read(&container, "cpu", "cpu.cfs_quota_us"), "-1");
    }
}

#[test]
fn raw_cgroup_v2_files_are_written() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config
        .resources()
        .unified
        .insert("pids.max".to_owned(), "77".to_owned());
    if is_cgroup_v2() {
        let container = pod.start_as(config);
        assert_eq!(read(&container, "", "pids.max"), "77");
    } else {
        let outcome = pod
            .try_create(config)
            .and_then(|container| container.start());
        let err = outcome.expect_err("there is no such file on v1");
        assert!(
            err.message().contains("pids.max") || err.message().contains("unified"),
            "{err}"
        );
    }
}

#[test]
fn a_fork_bomb_ends_at_the_pids_limit() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sh", "-c", "for i in $(seq 50); do sleep 100 & done; wait"]);
    if !is_cgroup_v2() {
        // CRI has no pids limit of its own; the kubelet sets the pod's.
        return assert!(mount_of("pids").exists());
    }
    config
        .resources()
        .unified
        .insert("pids.max".to_owned(), "20".to_owned());
    let container = pod.start_as(config);
    berth_tests::eventually("it cannot fork", || {
        container.stderr().contains("fork").then_some(())
    });
    assert!(container.pids().len() <= 20);
}

#[test]
fn the_oom_score_is_set_or_clamped() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let score = |wanted: i64| {
        let mut config = pod.container(&["cat", "/proc/self/oom_score_adj"]);
        config.resources().oom_score_adj = wanted;
        pod.output_as(config).trim().parse::<i64>().unwrap()
    };
    assert_eq!(score(500), 500);
    // Lower than its own the daemon may set only with CAP_SYS_RESOURCE.
    let mine = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let low = score(-500);
    assert!(
        low == -500 || low == mine.trim().parse::<i64>().unwrap(),
        "{low}"
    );
}

#[test]
fn every_process_is_in_the_containers_cgroup_in_every_hierarchy() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    berth_tests::eventually("both run", || (container.pids().len() >= 2).then_some(()));
    for pid in container.pids() {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        for line in text.lines() {
            let controllers = line.split(':').nth(1).unwrap_or_default();
            // A named v1 hierarchy without controllers limits nothing.
            let limits = !controllers.starts_with("name=");
            assert!(!limits || line.contains(&node.footprint().cgroup), "{line}");
        }
    }
}

#[test]
fn a_monitor_is_outside_its_pods_cgroup() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let monitors: Vec<_> = node
        .footprint()
        .processes(node.daemon_pid())
        .into_iter()
        .filter(|pid| !container.pids().contains(pid))
        .collect();
    assert!(!monitors.is_empty(), "somebody is the container's parent");
    for pid in monitors {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(!text.contains(&container.id), "{pid}: {text}");
        assert!(
            !text.contains(&pod.id),
            "the kubelet kills what is in there: {text}"
        );
    }
}

#[test]
fn a_removed_containers_cgroup_is_gone() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let of_container = |dirs: &[PathBuf]| {
        dirs.iter()
            .any(|dir| dir.display().to_string().contains(&container.id))
    };
    assert!(of_container(&node.footprint().cgroups()));
    container.remove().unwrap();
    assert!(!of_container(&node.footprint().cgroups()));
    assert!(Path::new("/sys/fs/cgroup").exists());
}
