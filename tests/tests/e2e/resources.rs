//! Every limit CRI has, written where the kernel wants it, and changed while the
//! container runs.

use crate::cgroups::{mount_of, path, read};
use berth_proto::runtime_v1 as cri;
use berth_tests::node::{is_cgroup_v2, is_systemd_driver};
use berth_tests::{Container, LinuxConfig, Node, eventually};
use std::fs;
use std::path::{Path, PathBuf};
use tonic::{Code, Status};

fn update(container: &Container<'_>, linux: cri::LinuxContainerResources) -> Result<(), Status> {
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    let mut runtime = container.node.runtime();
    container
        .node
        .wait(runtime.update_container_resources(request))
        .map(drop)
}

fn told(container: &Container<'_>) -> cri::LinuxContainerResources {
    let resources = container.status().resources.expect("resources");
    resources.linux.expect("linux resources")
}

/// What the kernel has of the limits, in CRI's terms.
fn in_force(container: &Container<'_>) -> cri::LinuxContainerResources {
    let number = |text: String| text.parse::<i64>().unwrap_or(-1);
    let mut seen = cri::LinuxContainerResources::default();
    if is_cgroup_v2() {
        let max = read(container, "", "cpu.max");
        let mut words = max.split(' ');
        seen.cpu_quota = number(words.next().unwrap().to_owned());
        seen.cpu_period = number(words.next().unwrap().to_owned());
        seen.memory_limit_in_bytes = number(read(container, "", "memory.max"));
        seen.cpu_shares = number(read(container, "", "cpu.weight"));
        seen.cpuset_cpus = read(container, "", "cpuset.cpus");
    } else {
        seen.cpu_quota = number(read(container, "cpu", "cpu.cfs_quota_us"));
        seen.cpu_period = number(read(container, "cpu", "cpu.cfs_period_us"));
        seen.memory_limit_in_bytes = number(read(container, "memory", "memory.limit_in_bytes"));
        seen.cpu_shares = number(read(container, "cpu", "cpu.shares"));
        seen.cpuset_cpus = read(container, "cpuset", "cpuset.cpus");
    }
    seen
}

const MIB: i64 = 1 << 20;

#[test]
fn every_limit_is_changed_while_the_container_runs_and_told_also_after_a_restart() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 64 * MIB;
    config.resources().cpu_quota = 20_000;
    config.resources().cpu_period = 100_000;
    config.resources().oom_score_adj = 900;
    let container = pod.start_as(config);
    let change = cri::LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 128 * MIB,
        memory_swap_limit_in_bytes: 128 * MIB,
        cpuset_cpus: "0".into(),
        ..Default::default()
    };
    update(&container, change.clone()).unwrap();
    let seen = in_force(&container);
    assert_eq!((seen.cpu_quota, seen.cpu_period), (25_000, 50_000));
    assert_eq!(seen.memory_limit_in_bytes, 128 * MIB);
    assert_eq!(seen.cpu_shares, if is_cgroup_v2() { 59 } else { 512 });
    assert_eq!(seen.cpuset_cpus, "0");
    let expected = cri::LinuxContainerResources {
        oom_score_adj: 900,
        ..change
    };
    assert_eq!(told(&container), expected);
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(told(&container), expected);
    // What is not given stays.
    let quota = cri::LinuxContainerResources {
        cpu_quota: -1,
        ..Default::default()
    };
    update(&container, quota).unwrap();
    let seen = in_force(&container);
    assert_eq!((seen.cpu_quota, seen.cpu_period), (-1, 50_000));
    assert_eq!(seen.memory_limit_in_bytes, 128 * MIB);
}

#[test]
fn an_update_of_which_one_part_is_refused_changes_nothing() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 64 * MIB;
    config.resources().cpu_shares = 256;
    config.resources().cpu_quota = 30_000;
    config.resources().cpu_period = 100_000;
    let container = pod.start_as(config);
    let before = (in_force(&container), told(&container));
    // No machine has that processor: the last of the writes is refused.
    let change = cri::LinuxContainerResources {
        cpu_shares: 2048,
        cpu_quota: 70_000,
        memory_limit_in_bytes: 96 * MIB,
        cpuset_cpus: "4095".into(),
        ..Default::default()
    };
    let error = update(&container, change).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("cpuset"), "{error}");
    assert_eq!((in_force(&container), told(&container)), before);
}

#[test]
fn a_memory_limit_below_what_is_used_is_refused_and_nobody_is_killed() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "eat", "50000000"]);
    config.resources().memory_limit_in_bytes = 128 * MIB;
    config.resources().memory_swap_limit_in_bytes = 128 * MIB;
    let container = pod.start_as(config);
    container.wait_for_log("ate");
    let less = cri::LinuxContainerResources {
        memory_limit_in_bytes: 16 * MIB,
        memory_swap_limit_in_bytes: 16 * MIB,
        cpu_shares: 2048,
        ..Default::default()
    };
    let error = update(&container, less).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("below what"), "{error}");
    assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
    assert_eq!(in_force(&container).memory_limit_in_bytes, 128 * MIB);
    assert_eq!(told(&container).memory_limit_in_bytes, 128 * MIB);
    assert_eq!(told(&container).cpu_shares, 0);
}

#[test]
fn without_the_guard_v2_takes_any_memory_limit() {
    if !is_cgroup_v2() {
        // v1's kernel refuses by itself: the test above.
        return assert!(mount_of("memory").exists());
    }
    let node = Node::options().cgroup("memory_guard = false").start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "eat", "50000000"]);
    config.resources().memory_limit_in_bytes = 128 * MIB;
    config.resources().memory_swap_limit_in_bytes = 128 * MIB;
    let container = pod.start_as(config);
    container.wait_for_log("ate");
    let less = cri::LinuxContainerResources {
        memory_limit_in_bytes: 16 * MIB,
        memory_swap_limit_in_bytes: 16 * MIB,
        ..Default::default()
    };
    // It may be told that the container ended over it, or not yet.
    let _ = update(&container, less);
    assert_eq!(container.wait_for_exit().reason, "OOMKilled");
}

#[test]
fn devices_are_as_they_were_after_an_update() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let tried = |container: &Container<'_>| {
        let answer = container
            .try_exec(
                &[
                    "sh",
                    "-c",
                    "mknod /tmp/mem c 1 1 2>/dev/null; cat /dev/null && echo null; \
                     head -c1 /tmp/mem >/dev/null 2>&1 && echo mem; true",
                ],
                20,
            )
            .unwrap();
        String::from_utf8(answer.stdout).unwrap()
    };
    assert_eq!(tried(&container), "null\n");
    let change = cri::LinuxContainerResources {
        cpu_shares: 300,
        ..Default::default()
    };
    update(&container, change).unwrap();
    assert_eq!(tried(&container), "null\n");
}

#[test]
fn a_daemon_reload_of_systemd_changes_neither_limits_nor_devices() {
    if !is_systemd_driver() {
        // Nobody but the daemon has a say in its cgroups.
        return assert!(mount_of("memory").exists());
    }
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 64 * MIB;
    config.resources().cpu_quota = 33_000;
    config.resources().cpu_period = 70_000;
    config.resources().cpu_shares = 300;
    // As the kubelet says how much swap there is, and with its feature MemoryQoS.
    for (file, value) in [("memory.high", 80 * MIB), ("memory.swap.max", 8 * MIB)] {
        let unified = &mut config.resources().unified;
        unified.insert(file.to_owned(), value.to_string());
    }
    let container = pod.start_as(config);
    let raw = || ["memory.high", "memory.swap.max"].map(|file| read(&container, "", file));
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 * MIB,
        ..Default::default()
    };
    update(&container, change).unwrap();
    let try_device = "mknod /mem c 1 1 2>/dev/null; cat /dev/null && echo null; \
                      head -c1 /mem >/dev/null 2>&1 && echo mem; true";
    let before = in_force(&container);
    assert_eq!((before.cpu_quota, before.cpu_period), (33_000, 70_000));
    let raw_before = [80 * MIB, 8 * MIB].map(|bytes| bytes.to_string());
    assert_eq!(raw(), raw_before, "a new limit leaves the others");
    let systemctl = |args: &[&str]| {
        let done = std::process::Command::new("systemctl").args(args).status();
        assert!(done.expect("systemctl").success(), "{args:?}");
    };
    systemctl(&["daemon-reload"]);
    // And something that has systemd look at its cgroups anew.
    systemctl(&["start", "systemd-tmpfiles-clean.service"]);
    assert_eq!(in_force(&container), before);
    assert_eq!(raw(), raw_before);
    assert_eq!(container.exec(&["sh", "-c", try_device]), "null\n");
    assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
}

#[test]
fn a_created_container_is_updated_and_started_with_the_new_limits() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 32 * MIB;
    let container = pod.create(config);
    let change = cri::LinuxContainerResources {
        memory_limit_in_bytes: 48 * MIB,
        oom_score_adj: 700,
        ..Default::default()
    };
    update(&container, change).unwrap();
    container.start().unwrap();
    assert_eq!(in_force(&container).memory_limit_in_bytes, 48 * MIB);
    let score = container.exec(&["cat", "/proc/1/oom_score_adj"]);
    assert_eq!(score.trim(), "700");
}

#[test]
fn what_has_ended_or_never_was_cannot_be_updated() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let ended = pod.start(&["true"]);
    ended.wait_for_exit();
    let change = cri::LinuxContainerResources {
        cpu_shares: 300,
        ..Default::default()
    };
    let error = update(&ended, change.clone()).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let nobody = node.container(&"0".repeat(64));
    assert_eq!(update(&nobody, change).unwrap_err().code(), Code::NotFound);
}

#[test]
fn many_updates_at_once_leave_record_and_kernel_of_one_mind() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let calls = (1..=16)
        .map(|n| {
            let mut runtime = node.runtime();
            let request = cri::UpdateContainerResourcesRequest {
                container_id: container.id.clone(),
                linux: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: (32 + n) * MIB,
                    memory_swap_limit_in_bytes: (32 + n) * MIB,
                    ..Default::default()
                }),
                ..Default::default()
            };
            async move { runtime.update_container_resources(request).await }
        })
        .collect();
    for answer in node.wait_all(calls) {
        answer.unwrap();
    }
    assert_eq!(
        in_force(&container).memory_limit_in_bytes,
        told(&container).memory_limit_in_bytes
    );
}

#[test]
fn a_pods_resources_are_kept() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let request = |id: &str, shares| cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.to_owned(),
        overhead: None,
        resources: Some(cri::LinuxContainerResources {
            cpu_shares: shares,
            ..Default::default()
        }),
    };
    let call = |request| {
        node.wait(node.runtime().update_pod_sandbox_resources(request))
            .map(drop)
    };
    call(request(&pod.id, 512)).unwrap();
    assert_eq!(
        call(request(&pod.id, -1)).unwrap_err().code(),
        Code::InvalidArgument
    );
    assert_eq!(
        call(request(&"0".repeat(64), 1)).unwrap_err().code(),
        Code::NotFound
    );
    let record =
        std::fs::read_to_string(node.root().join("lib/pods").join(&pod.id).join("pod.rec"))
            .unwrap();
    assert!(record.contains("\"cpu_shares\":512"), "{record}");
}

#[test]
fn a_limit_for_memory_and_swap_together_is_the_kernels_swap() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().memory_limit_in_bytes = 32 * MIB;
    config.resources().memory_swap_limit_in_bytes = 48 * MIB;
    let container = pod.start_as(config);
    assert_eq!(told(&container).memory_swap_limit_in_bytes, 48 * MIB);
    assert_eq!(in_force(&container).memory_limit_in_bytes, 32 * MIB);
    // Whether the kernel counts swap does not depend on what we wrote.
    let (counts, file, expected) = match is_cgroup_v2() {
        true => (
            Path::new("/proc/swaps").exists(),
            "memory.swap.max",
            16 * MIB,
        ),
        false => {
            let file = "memory.memsw.limit_in_bytes";
            (mount_of("memory").join(file).exists(), file, 48 * MIB)
        }
    };
    match counts {
        true => assert_eq!(read(&container, "memory", file), expected.to_string()),
        false => assert!(!path(&container, "memory", file).exists()),
    }
}

#[test]
fn the_default_limit_of_processes_is_the_configurations_unless_another_is_given() {
    let node = Node::options().cgroup("pids_limit = 123").start();
    let pod = node.run_pod("web");
    let limit = |container: &Container<'_>| read(container, "pids", "pids.max");
    assert_eq!(limit(&pod.start(&["sleep", "1000"])), "123");
    if is_cgroup_v2() {
        let mut config = pod.container(&["sleep", "1000"]);
        config
            .resources()
            .unified
            .insert("pids.max".into(), "77".into());
        assert_eq!(limit(&pod.start_as(config)), "77");
    }
}

#[test]
fn limits_of_huge_pages_are_written_where_the_kernel_has_them() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.resources().hugepage_limits = vec![cri::HugepageLimit {
        page_size: "2MB".into(),
        limit: 4 << 20,
    }];
    let container = pod.start_as(config);
    assert_eq!(told(&container).hugepage_limits[0].limit, 4 << 20);
    // "ID:CONTROLLERS:PATH"; the unified hierarchy, also a hybrid host's, has no names there.
    let text = fs::read_to_string(format!("/proc/{}/cgroup", container.init_pid())).unwrap();
    let mut written = Vec::new();
    let mut expected = 0;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (names, path) = (fields.next().unwrap(), fields.next().unwrap());
        let (mount, file) = match names {
            "" => (unified_mount(), "hugetlb.2MB.max"),
            names if names.split(',').any(|name| name == "hugetlb") => {
                (mount_of("hugetlb"), "hugetlb.2MB.limit_in_bytes")
            }
            _ => continue,
        };
        let has = !names.is_empty()
            || fs::read_to_string(mount.join("cgroup.controllers"))
                .is_ok_and(|all| all.split_whitespace().any(|name| name == "hugetlb"));
        // A controller counts the sizes that the processor has.
        expected += usize::from(has && Path::new(PAGES_OF_2_MIB).exists());
        let file = mount.join(path.trim_start_matches('/')).join(file);
        written.extend(fs::read_to_string(file).map(|limit| limit.trim().to_owned()));
    }
    assert_eq!(written, vec!["4194304"; expected], "{text}");
}

const PAGES_OF_2_MIB: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Where cgroup v2 is mounted: alone, or beside v1's hierarchies.
fn unified_mount() -> PathBuf {
    match is_cgroup_v2() {
        true => PathBuf::from("/sys/fs/cgroup"),
        false => PathBuf::from("/sys/fs/cgroup/unified"),
    }
}

#[test]
fn an_oom_kill_says_whose_limit_it_was() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["probe", "eat", "200000000"]);
    config.resources().memory_limit_in_bytes = 32 * MIB;
    config.resources().memory_swap_limit_in_bytes = 32 * MIB;
    let status = pod.start_as(config).wait_for_exit();
    assert_eq!(status.reason, "OOMKilled");
    assert!(
        status.message.contains("32.0 MiB") && status.message.contains("container's"),
        "{}",
        status.message
    );
}

#[test]
fn an_oom_kill_by_the_pods_limit_says_so() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sleeper = pod.start(&["sleep", "1000"]);
    // As the kubelet does: the limit is the pod's cgroup's.
    let own = path(
        &sleeper,
        "memory",
        if is_cgroup_v2() {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        },
    );
    let of_pod = own
        .parent()
        .and_then(|dir| dir.parent())
        .unwrap()
        .join(own.file_name().unwrap());
    if is_cgroup_v2() {
        let swap = of_pod.with_file_name("memory.swap.max");
        if swap.exists() {
            std::fs::write(swap, "0").unwrap();
        }
    }
    std::fs::write(&of_pod, (48 * MIB).to_string()).unwrap();
    let eater = pod.start(&["probe", "eat", "200000000"]);
    let status = eventually("the eater or the sleeper is killed", || {
        [&eater, &sleeper]
            .into_iter()
            .map(|container| container.status())
            .find(|status| status.state() == cri::ContainerState::ContainerExited)
    });
    assert_eq!(status.reason, "OOMKilled", "{status:?}");
    assert!(
        status.message.contains("pod's memory limit of 48.0 MiB"),
        "{}",
        status.message
    );
}
