//! Pod sandboxes: run, stop, remove, status, lists, and what a pod's containers share.

use berth_proto::runtime_v1::{self as cri, NamespaceMode, PodSandboxFilter, PodSandboxState};
use berth_tests::{LinuxConfig, Node};
use std::collections::HashMap;
use tonic::Code;

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn security(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

fn namespaces(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    security(config).namespace_options.get_or_insert_default()
}

#[test]
fn a_pod_that_runs_is_ready_and_says_what_it_was_asked_for() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.labels = labels(&[("app", "web"), ("tier", "front")]);
    config.annotations = labels(&[("note", "a value, with {json}: \"quoted\"")]);
    let pod = node.run(config.clone());
    let status = pod.status();
    assert_eq!(status.id, pod.id);
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert!(
        status.created_at > 1_600_000_000_000_000_000,
        "nanoseconds: {}",
        status.created_at
    );
    let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(options.network(), NamespaceMode::Pod);
    assert_eq!(options.ipc(), NamespaceMode::Pod);
    assert_eq!(options.pid(), NamespaceMode::Container);
}

#[test]
fn a_stopped_pod_is_not_ready_and_still_listed_until_it_is_removed() {
    let node = Node::start();
    let pod = node.run_pod("web");
    pod.stop();
    assert_eq!(pod.status().state(), PodSandboxState::SandboxNotready);
    assert_eq!(node.pods(None).len(), 1);
    pod.try_remove().unwrap();
    assert_eq!(node.pods(None), []);
    assert_eq!(pod.try_status().unwrap_err().code(), Code::NotFound);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn stopping_and_removing_again_succeeds() {
    let node = Node::start();
    let pod = node.run_pod("web");
    pod.stop();
    pod.stop();
    pod.try_remove().unwrap();
    pod.try_remove().unwrap();
    pod.try_stop().unwrap();
}

#[test]
fn removing_a_pod_that_runs_stops_it_first() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    pod.try_remove().unwrap();
    assert_eq!(node.pods(None), []);
    assert_eq!(node.containers(None), []);
    assert_eq!(container.try_status().unwrap_err().code(), Code::NotFound);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn stopping_a_pod_ends_its_containers() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let obedient = pod.start(&["sleep", "1000"]);
    let stubborn = pod.start(&["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
    pod.stop();
    assert_eq!(obedient.state(), cri::ContainerState::ContainerExited);
    assert_eq!(stubborn.state(), cri::ContainerState::ContainerExited);
    assert_eq!(obedient.pids(), [0; 0]);
    assert_eq!(stubborn.pids(), [0; 0]);
}

#[test]
fn pods_are_listed_by_id_state_and_labels() {
    let node = Node::start();
    let run = |name: &str, pairs: &[(&str, &str)]| {
        let mut config = node.pod_config(name);
        config.labels = labels(pairs);
        node.run(config)
    };
    let one = run("one", &[("app", "a"), ("tier", "front")]);
    let two = run("two", &[("app", "a"), ("tier", "back")]);
    let three = run("three", &[("app", "b")]);
    three.stop();
    let list = |filter: PodSandboxFilter| {
        let mut names: Vec<_> = node
            .pods(Some(filter))
            .into_iter()
            .map(|pod| pod.metadata.unwrap().name)
            .collect();
        names.sort();
        names
    };
    let state = |state: PodSandboxState| {
        Some(cri::PodSandboxStateValue {
            state: state.into(),
        })
    };
    let all = PodSandboxFilter::default();
    assert_eq!(list(all.clone()), ["one", "three", "two"]);
    assert_eq!(
        list(PodSandboxFilter {
            id: one.id.clone(),
            ..all.clone()
        }),
        ["one"]
    );
    assert_eq!(
        list(PodSandboxFilter {
            id: two.id[..10].to_owned(),
            ..all.clone()
        }),
        ["two"]
    );
    assert_eq!(
        list(PodSandboxFilter {
            id: "0".repeat(64),
            ..all.clone()
        }),
        [""; 0]
    );
    assert_eq!(
        list(PodSandboxFilter {
            label_selector: labels(&[("app", "a")]),
            ..all.clone()
        }),
        ["one", "two"]
    );
    assert_eq!(
        list(PodSandboxFilter {
            label_selector: labels(&[("app", "a"), ("tier", "back")]),
            ..all.clone()
        }),
        ["two"]
    );
    assert_eq!(
        list(PodSandboxFilter {
            state: state(PodSandboxState::SandboxReady),
            ..all.clone()
        }),
        ["one", "two"]
    );
    assert_eq!(
        list(PodSandboxFilter {
            state: state(PodSandboxState::SandboxNotready),
            label_selector: labels(&[("app", "a")]),
            ..all
        }),
        [""; 0]
    );
}

#[test]
fn a_pod_may_be_named_by_the_beginning_of_its_id() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id[..12].to_owned(),
        verbose: true,
    };
    let answer = node
        .wait(node.runtime().pod_sandbox_status(request))
        .unwrap();
    assert_eq!(answer.status.unwrap().id, pod.id);
    assert!(!answer.info.is_empty());
}

#[test]
fn the_hostname_is_the_pods() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.hostname = "harbour".to_owned();
    let pod = node.run(config);
    assert_eq!(pod.output(&["hostname"]), "harbour\n");
    assert_eq!(pod.output(&["cat", "/etc/hostname"]), "harbour\n");
    assert_eq!(pod.output(&["sh", "-c", "echo $HOSTNAME"]), "harbour\n");
    assert_ne!(
        std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(),
        "harbour\n"
    );
}

#[test]
fn resolv_conf_holds_what_the_pod_was_given() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.dns_config = Some(cri::DnsConfig {
        servers: vec!["10.96.0.10".to_owned(), "fd00::a".to_owned()],
        searches: vec![
            "default.svc.cluster.local".to_owned(),
            "cluster.local".to_owned(),
        ],
        options: vec!["ndots:5".to_owned(), "timeout:1".to_owned()],
    });
    let pod = node.run(config);
    assert_eq!(
        pod.output(&["cat", "/etc/resolv.conf"]),
        "search default.svc.cluster.local cluster.local\n\
         nameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 timeout:1\n"
    );
}

#[test]
fn without_dns_settings_it_is_the_hosts_resolv_conf() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    assert_eq!(pod.output(&["cat", "/etc/resolv.conf"]), host);
}

#[test]
fn sysctls_hold_in_the_pod_and_nowhere_else() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.linux.as_mut().unwrap().sysctls = labels(&[
        ("kernel.shm_rmid_forced", "1"),
        ("net.ipv4.ip_local_port_range", "1024 65000"),
        ("kernel.msgmax", "8193"),
    ]);
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/{name}")).unwrap();
    let before = read("kernel/msgmax");
    let pod = node.run(config);
    assert_eq!(
        pod.output(&["cat", "/proc/sys/kernel/shm_rmid_forced"]),
        "1\n"
    );
    assert_eq!(
        pod.output(&["cat", "/proc/sys/net/ipv4/ip_local_port_range"]),
        "1024\t65000\n"
    );
    assert_eq!(pod.output(&["cat", "/proc/sys/kernel/msgmax"]), "8193\n");
    assert_eq!(read("kernel/msgmax"), before);
}

#[test]
fn a_sysctl_that_is_not_namespaced_is_refused() {
    let node = Node::start();
    for (name, value) in [
        ("vm.swappiness", "10"),
        ("kernel.panic", "1"),
        ("../../etc/passwd", "x"),
        ("net.ipv4.no_such_thing", "1"),
    ] {
        let mut config = node.pod_config("web");
        config.linux.as_mut().unwrap().sysctls = labels(&[(name, value)]);
        let err = node
            .try_run(config)
            .err()
            .unwrap_or_else(|| panic!("{name} was taken"));
        let last = name.rsplit(['.', '/']).next().unwrap();
        assert!(err.message().contains(last), "{err}");
    }
    assert_eq!(node.pods(None), []);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn dev_shm_is_shared_by_the_pods_containers_and_with_nobody_else() {
    let node = Node::start();
    let (pod, other) = (node.run_pod("one"), node.run_pod("two"));
    pod.output(&["sh", "-c", "echo shared > /dev/shm/note"]);
    assert_eq!(pod.output(&["cat", "/dev/shm/note"]), "shared\n");
    assert_eq!(other.output(&["ls", "/dev/shm"]), "");
    assert!(!std::path::Path::new("/dev/shm/note").exists());
    // As in every distribution, and the pod's own size: 64 MiB.
    let line = pod.output(&["grep", " /dev/shm ", "/proc/mounts"]);
    for option in ["nosuid", "nodev", "noexec", "65536k"] {
        assert!(line.contains(option), "{line}");
    }
}

#[test]
fn namespaces_are_the_pods_where_it_shares_and_the_containers_where_not() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let (one, two) = (pod.start(&["sleep", "1000"]), pod.start(&["sleep", "1000"]));
    let of = |pid: i32, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let (one, two, me) = (
        one.init_pid(),
        two.init_pid(),
        std::process::id().cast_signed(),
    );
    for shared in ["net", "ipc", "uts"] {
        assert_eq!(of(one, shared), of(two, shared), "{shared}");
        assert_ne!(of(one, shared), of(me, shared), "{shared}");
    }
    for own in ["pid", "mnt"] {
        assert_ne!(of(one, own), of(two, own), "{own}");
        assert_ne!(of(one, own), of(me, own), "{own}");
    }
}

#[test]
fn a_shared_pid_namespace_has_an_init_and_shows_every_container() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    namespaces(&mut config).pid = NamespaceMode::Pod.into();
    let pod = node.run(config);
    let first = pod.start(&["sleep", "1234567"]);
    let second = pod.start(&["sleep", "1000"]);
    let seen = second.exec(&["ps"]);
    assert!(seen.contains("sleep 1234567"), "{seen}");
    let own = second.exec(&["probe", "status"]);
    assert!(own.lines().any(|line| line.starts_with("NSpid:")), "{own}");
    assert_ne!(first.init_pid(), second.init_pid());
    // An orphan is collected: no zombie stays.
    second.exec(&["sh", "-c", "(sleep 0.05 &) ; true"]);
    berth_tests::eventually("no zombie is left", || {
        (!second.exec(&["ps", "-o", "stat,args"]).contains("Z ")).then_some(())
    });
}

#[test]
fn the_hosts_pid_namespace_is_visible_where_asked_for() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    namespaces(&mut config).pid = NamespaceMode::Node.into();
    let pod = node.run(config);
    let container = pod.start(&["sleep", "1000"]);
    let path = format!("/proc/{}/comm", std::process::id());
    assert!(!container.exec(&["cat", &path]).is_empty());
    let status = pod
        .status()
        .linux
        .unwrap()
        .namespaces
        .unwrap()
        .options
        .unwrap();
    assert_eq!(status.pid(), NamespaceMode::Node);
}

#[test]
fn the_hosts_ipc_namespace_is_used_where_asked_for() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    namespaces(&mut config).ipc = NamespaceMode::Node.into();
    let pod = node.run(config);
    let container = pod.start(&["sleep", "1000"]);
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/ipc")).unwrap();
    assert_eq!(of(&container.init_pid().to_string()), of("self"));
}

#[test]
fn the_log_directory_is_made() {
    let node = Node::start();
    let pod = node.run_pod("web");
    assert!(std::path::Path::new(&pod.config.log_directory).is_dir());
}

#[test]
fn a_second_attempt_is_another_pod() {
    let node = Node::start();
    let first = node.run_pod("web");
    first.stop();
    let mut config = node.pod_config("web");
    config.metadata.as_mut().unwrap().attempt = 1;
    let second = node.run(config);
    assert_ne!(first.id, second.id);
    assert_eq!(node.pods(None).len(), 2);
}

#[test]
fn a_pod_of_a_removed_ones_name_is_a_new_pod() {
    let node = Node::start();
    let first = node.run_pod("web");
    let id = first.id.clone();
    first.remove();
    assert_ne!(node.run_pod("web").id, id);
}

#[test]
fn removing_a_pod_removes_its_containers() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let running = pod.start(&["sleep", "1000"]);
    let exited = pod.start(&["true"]);
    exited.wait_for_exit();
    let created = pod.create(pod.container(&["true"]));
    pod.remove();
    for container in [running, exited, created] {
        assert_eq!(container.try_status().unwrap_err().code(), Code::NotFound);
    }
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn pod_cgroups_are_below_the_parent_that_was_asked_for() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    let top = &node.footprint().cgroup;
    let systemd = berth_tests::node::is_systemd_driver();
    let parent = match systemd {
        true => format!("/{top}.slice/{top}-podabc.slice"),
        false => format!("/{top}/kubepods/podabc"),
    };
    config.linux.as_mut().unwrap().cgroup_parent = parent;
    let pod = node.run(config);
    let container = pod.start(&["sleep", "1000"]);
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", container.init_pid())).unwrap();
    assert!(text.contains("podabc"), "{text}");
    pod.remove();
    if systemd {
        // Nobody's slices go by themselves.
        return;
    }
    // The kubelet made the parent and removes it; here nobody did.
    let kubelets: Vec<_> = node
        .footprint()
        .cgroups()
        .into_iter()
        .filter(|dir| dir.to_string_lossy().contains("pod"))
        .collect();
    for dir in kubelets.iter().rev() {
        std::fs::remove_dir(dir).unwrap_or_else(|err| panic!("{}: {err}", dir.display()));
    }
}

#[test]
fn containers_see_the_pods_cgroup_limits_only_as_their_own_root() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["cat", "/proc/self/cgroup"]);
    config.resources().memory_limit_in_bytes = 64 << 20;
    let text = pod.output_as(config);
    assert!(
        !text.contains(&node.footprint().cgroup) || !berth_tests::node::is_cgroup_v2(),
        "{text}"
    );
}
