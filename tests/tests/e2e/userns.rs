//! Pods in user namespaces: their root is nobody on the host, and what they see
//! and write has the owners it should have on both sides.

use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::{LinuxConfig, Node, Pod};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tonic::Code;

/// Where the pods' users begin on the host.
const FIRST: u32 = 196_608;
const LENGTH: u32 = 65_536;

fn mapping() -> Vec<cri::IdMapping> {
    vec![cri::IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: LENGTH,
    }]
}

fn user_namespace() -> cri::UserNamespace {
    cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mapping(),
        gids: mapping(),
    }
}

fn config(node: &Node, name: &str) -> cri::PodSandboxConfig {
    let mut config = node.pod_config(name);
    options(&mut config).userns_options = Some(user_namespace());
    config
}

fn options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert_default()
}

fn pod<'n>(node: &'n Node, name: &str) -> Pod<'n> {
    node.run(config(node, name))
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn root_inside_is_a_user_without_rights_on_the_host() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let container = pod.start(&["sleep", "1000"]);
    let words = |text: String| {
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let map = words(container.exec(&["cat", "/proc/self/uid_map"]));
    assert_eq!(map, ["0", &FIRST.to_string(), &LENGTH.to_string()]);
    let map = words(container.exec(&["cat", "/proc/self/gid_map"]));
    assert_eq!(map, ["0", &FIRST.to_string(), &LENGTH.to_string()]);
    assert_eq!(container.exec(&["id", "-u"]).trim(), "0");

    // From the host: the process, and its namespaces.
    let pid = container.init_pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status.contains(&format!("Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}")),
        "{status}"
    );
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    let its = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["user", "net", "ipc", "uts", "pid", "mnt", "cgroup"] {
        assert_ne!(own(kind), its(kind), "{kind}");
    }
    // An exec is in there too.
    let of_exec = container.exec(&["readlink", "/proc/self/ns/user"]);
    assert_eq!(of_exec.trim(), its("user").to_str().unwrap());
}

#[test]
fn the_images_files_belong_to_root_inside_and_what_is_written_to_the_pods_root() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let container = pod.start(&["sleep", "1000"]);
    for path in ["/", "/bin/busybox", "/etc/passwd"] {
        let seen = container.exec(&["stat", "-c", "%u:%g", path]);
        assert_eq!(seen.trim(), "0:0", "{path}");
    }
    container.exec(&[
        "sh",
        "-c",
        "echo new > /etc/new && echo more >> /etc/passwd && chown 7:8 /etc/new && mkdir /made",
    ]);
    assert_eq!(
        container.exec(&["stat", "-c", "%u:%g", "/etc/new"]).trim(),
        "7:8"
    );
    assert_eq!(
        container
            .exec(&["stat", "-c", "%u:%g", "/etc/passwd"])
            .trim(),
        "0:0"
    );
    let upper = node
        .root()
        .join("lib/containers")
        .join(&container.id)
        .join("upper");
    assert_eq!(owner(&upper.join("etc/new")), (FIRST + 7, FIRST + 8));
    assert_eq!(owner(&upper.join("etc/passwd")), (FIRST, FIRST));
    assert_eq!(owner(&upper.join("made")), (FIRST, FIRST));
    // The image itself is as it was, for every other pod.
    let other = node.run_pod("plain").start(&["sleep", "1000"]);
    assert_eq!(
        other.exec(&["stat", "-c", "%u:%g", "/etc/passwd"]).trim(),
        "0:0"
    );
}

#[test]
fn another_user_of_the_pod_is_another_user_of_the_host() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().run_as_user = Some(cri::Int64Value { value: 1000 });
    config.security().supplemental_groups = vec![4242];
    let container = pod.start_as(config);
    let status = fs::read_to_string(format!("/proc/{}/status", container.init_pid())).unwrap();
    let uid = FIRST + 1000;
    assert!(status.contains(&format!("Uid:\t{uid}\t")), "{status}");
    assert!(status.contains(&format!("{}", FIRST + 4242)), "{status}");
    assert_eq!(container.exec(&["id", "-u"]).trim(), "1000");
    // Its own output can be opened again by its name.
    container.exec(&["sh", "-c", "echo again > /dev/stdout"]);
    let mut config = pod.container(&["sh", "-c", "echo again > /dev/stdout"]);
    config.security().run_as_user = Some(cri::Int64Value { value: 1000 });
    assert_eq!(pod.output_as(config), "again\n");
}

#[test]
fn the_usual_file_systems_and_devices_are_there() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.devices.push(cri::Device {
        host_path: "/dev/kmsg".to_owned(),
        container_path: "/dev/sub/mine".to_owned(),
        permissions: "r".to_owned(),
    });
    config.devices.push(cri::Device {
        host_path: "/dev/zero".to_owned(),
        container_path: "/elsewhere".to_owned(),
        permissions: "rw".to_owned(),
    });
    let container = pod.start_as(config);
    container.exec(&[
        "sh",
        "-c",
        "echo x > /dev/null && head -c 4 /dev/urandom | wc -c",
    ]);
    let zeros = container.exec(&["sh", "-c", "head -c 3 /elsewhere | od -An -tx1"]);
    assert_eq!(zeros.split_whitespace().collect::<Vec<_>>(), ["00"; 3]);
    let device = container.exec(&["stat", "-c", "%t:%T %u", "/dev/sub/mine"]);
    assert_eq!(device.trim(), "1:b 0");
    let mounts = container.exec(&["cat", "/proc/mounts"]);
    for (target, kind) in [
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/sys", "sysfs"),
    ] {
        let found = mounts.lines().any(|line| {
            let mut words = line.split(' ').skip(1);
            (words.next(), words.next()) == (Some(target), Some(kind))
        });
        assert!(found, "{target}: no {kind} in\n{mounts}");
    }
    // The pod's shared memory belongs to its root, and its host name is its own.
    assert_eq!(
        container.exec(&["stat", "-c", "%u %a", "/dev/shm"]).trim(),
        "0 1777"
    );
    container.exec(&["sh", "-c", "echo x > /dev/shm/x"]);
    assert_eq!(container.exec(&["hostname"]).trim(), "web");
    // No node can be made, and none that is there leads further than its number.
    let made = container
        .try_exec(&["mknod", "/dev/disk", "b", "254", "0"], 10)
        .unwrap();
    assert_ne!(made.exit_code, 0);
}

#[test]
fn volumes_show_the_owners_their_mapping_says() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let volume = node.root().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(volume.join("of-root"), "").unwrap();
    fs::write(volume.join("of-5"), "").unwrap();
    std::os::unix::fs::chown(volume.join("of-5"), Some(5), Some(6)).unwrap();
    let mut config = pod.container(&["sleep", "1000"]);
    config.mount(&volume, "/plain");
    let mapped = config.mount(&volume, "/mapped");
    (mapped.uid_mappings, mapped.gid_mappings) = (mapping(), mapping());
    // Not the pod's: the volume's 0 is the pod's 10.
    let shifted = config.mount(&volume, "/shifted");
    let ten = vec![cri::IdMapping {
        host_id: FIRST + 10,
        container_id: 0,
        length: 100,
    }];
    (shifted.uid_mappings, shifted.gid_mappings) = (ten.clone(), ten);
    let container = pod.start_as(config);
    let seen = |path: &str| {
        container
            .exec(&["stat", "-c", "%u:%g", path])
            .trim()
            .to_owned()
    };
    assert_eq!(seen("/plain/of-root"), "65534:65534");
    assert_eq!(seen("/mapped/of-root"), "0:0");
    assert_eq!(seen("/mapped/of-5"), "5:6");
    assert_eq!(seen("/shifted/of-5"), "15:16");

    // What is written through a mapped volume is on disk as if there were no namespace.
    container.exec(&["sh", "-c", "echo x > /mapped/new && chown 7:8 /mapped/new"]);
    assert_eq!(owner(&volume.join("new")), (7, 8));
    let refused = container.try_exec(&["touch", "/plain/new2"], 10).unwrap();
    assert_ne!(refused.exit_code, 0, "root inside is nobody outside");
}

#[test]
fn a_pod_may_share_one_pid_namespace_or_the_hosts_network() {
    let node = Node::start();
    let mut shared = config(&node, "shared");
    options(&mut shared).pid = NamespaceMode::Pod.into();
    let pod = node.run(shared);
    let first = pod.start(&["sleep", "1001"]);
    let second = pod.start(&["sleep", "1002"]);
    let seen = second.exec(&["ps", "-o", "args"]);
    assert!(seen.contains("sleep 1001"), "{seen}");
    let user = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(user(first.init_pid()), user(second.init_pid()));

    let mut on_host = config(&node, "on-host");
    options(&mut on_host).network = NamespaceMode::Node.into();
    let pod = node.run(on_host);
    let container = pod.start(&["sleep", "1000"]);
    let pid = container.init_pid();
    let net = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let host = node
        .host
        .enter(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
    assert_eq!(net, host);
    assert_eq!(container.exec(&["id", "-u"]).trim(), "0");
    assert!(container.exec(&["cat", "/proc/net/dev"]).contains("up0"));
    container.exec(&["ls", "/sys/class/net", "/sys/fs/cgroup"]);
    // It is root, but not over the host's network.
    let down = container
        .try_exec(&["ip", "link", "set", "lo", "down"], 10)
        .unwrap();
    assert_ne!(down.exit_code, 0);
    let lo = node.host.run("ip", &["link", "show", "lo"]).unwrap();
    assert!(lo.contains("UP"), "{lo}");
}

#[test]
fn a_privileged_container_is_privileged_over_its_pod_only() {
    let node = Node::start();
    let mut asked = config(&node, "web");
    asked
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap()
        .privileged = true;
    let pod = node.run(asked);
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().privileged = true;
    let container = pod.start_as(config);
    // It may mount, and what it mounts stays inside.
    container.exec(&["sh", "-c", "mkdir /mnt && mount -t tmpfs none /mnt"]);
    let refused = |command: &[&str]| {
        let answer = container.try_exec(command, 10).unwrap();
        assert_ne!(answer.exit_code, 0, "{command:?}");
    };
    refused(&["sh", "-c", "echo x > /proc/sys/kernel/core_pattern"]);
    refused(&["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq"]);
    refused(&["mknod", "/x", "c", "1", "1"]);
}

#[test]
fn a_userns_pod_outlives_its_daemon_and_starts_more() {
    let node = Node::start();
    let pod = pod(&node, "web");
    let first = pod.start(&["sleep", "1000"]);
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(first.exec(&["id", "-u"]).trim(), "0");
    let second = pod.start(&["sleep", "1000"]);
    let user = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(user(first.init_pid()), user(second.init_pid()));
}

#[test]
fn handlers_say_that_they_have_user_namespaces_and_nonsense_is_refused() {
    let node = Node::start();
    let status = node
        .wait(node.runtime().status(cri::StatusRequest::default()))
        .unwrap();
    for handler in &status.runtime_handlers {
        if matches!(handler.name.as_str(), "" | "berth") {
            assert!(handler.features.unwrap().user_namespaces, "{handler:?}");
        }
    }
    assert!(status.features.unwrap().user_namespaces_host_network);

    let wrong = |change: &dyn Fn(&mut cri::UserNamespace)| {
        let mut asked = config(&node, "wrong");
        change(options(&mut asked).userns_options.as_mut().unwrap());
        let error = node.try_run(asked).err().expect("no such namespace");
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    };
    wrong(&|user| user.uids.push(user.uids[0]));
    wrong(&|user| user.uids.clear());
    wrong(&|user| user.gids[0].container_id = 1);
    wrong(&|user| user.mode = NamespaceMode::Container.into());
    wrong(&|user| user.mode = NamespaceMode::Target.into());
    wrong(&|user| user.uids[0].length = 0);
    wrong(&|user| user.uids[0].host_id = u32::MAX);
    let mut asked = config(&node, "wrong");
    options(&mut asked).pid = NamespaceMode::Node.into();
    let error = node
        .try_run(asked)
        .err()
        .expect("the host's processes are not the pod's");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
}
