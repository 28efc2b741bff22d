//! SELinux: on a node that has it, containers are confined and pods kept apart; on
//! one without, labels and relabelling mean nothing.
//!
//! The node that has it is the emulated machine (`tests/vm/suites selinux`), whose
//! policy, `tests/vm/selinux/policy.cil`, is enforced.

use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::{Container, LinuxConfig, Node, Pod};
use std::fs;
use std::path::{Path, PathBuf};
use tonic::Code;

fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// The label of a container's first process, from the host.
fn label(container: &Container<'_>) -> String {
    let path = format!("/proc/{}/attr/current", container.init_pid());
    let label = fs::read_to_string(path).unwrap_or_default();
    label.trim_end_matches(['\0', '\n']).to_owned()
}

/// The level of a container_t, which must have two categories.
#[track_caller]
fn level(label: &str) -> String {
    let level = label
        .strip_prefix("system_u:system_r:container_t:")
        .unwrap_or_else(|| panic!("{label}"));
    let categories = level
        .strip_prefix("s0:c")
        .unwrap_or_else(|| panic!("{label}"));
    assert_eq!(categories.split(",c").count(), 2, "{label}");
    level.to_owned()
}

/// What the file system says of a file.
fn label_of(path: &Path) -> String {
    let output = std::process::Command::new("stat")
        .args(["--format", "%C"])
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn asked(level: &str, kind: &str) -> cri::SeLinuxOption {
    cri::SeLinuxOption {
        level: level.to_owned(),
        r#type: kind.to_owned(),
        ..Default::default()
    }
}

fn with_label(pod: &Pod<'_>, label: cri::SeLinuxOption, command: &[&str]) -> cri::ContainerConfig {
    let mut config = pod.container(command);
    config.security().selinux_options = Some(label);
    config
}

/// A directory of the host's with a file in it.
fn volume(node: &Node, name: &str) -> PathBuf {
    let path = node.root().join(name);
    fs::create_dir_all(path.join("below")).unwrap();
    fs::write(path.join("below/file"), "content").unwrap();
    path
}

fn with_volume(
    pod: &Pod<'_>,
    volume: &Path,
    relabel: bool,
    command: &[&str],
) -> cri::ContainerConfig {
    let mut config = pod.container(command);
    config.mount(volume, "/volume").selinux_relabel = relabel;
    config
}

const SLEEP: &[&str] = &["sleep", "1000"];

#[test]
fn containers_of_a_pod_share_a_level_that_no_other_pod_has() {
    let node = Node::start();
    let (web, other) = (node.run_pod("web"), node.run_pod("other"));
    let (one, two, third) = (web.start(SLEEP), web.start(SLEEP), other.start(SLEEP));
    if !has_selinux() {
        web.start_as(with_label(&web, asked("s0:c1,c2", "any_t"), SLEEP));
        return;
    }
    let of_web = level(&label(&one));
    assert_eq!(level(&label(&two)), of_web);
    assert_ne!(level(&label(&third)), of_web);
    let own = one.exec(&["cat", "/proc/self/attr/current"]);
    assert_eq!(own.trim_end_matches(['\0', '\n']), label(&one), "an exec's");
    let mounts = one.exec(&["cat", "/proc/1/mountinfo"]);
    let context = format!("context=\"system_u:object_r:container_file_t:{of_web}\"");
    for target in [" / ", " /dev ", " /dev/pts ", " /dev/shm "] {
        let line = mounts.lines().find(|line| line.contains(target));
        assert!(
            line.is_some_and(|line| line.contains(&context)),
            "{target}: {mounts}"
        );
    }

    // What is in use is known after a crash.
    node.kill_daemon();
    node.start_daemon();
    let fourth = node.run_pod("late").start(SLEEP);
    let late = level(&label(&fourth));
    assert!(late != of_web && late != level(&label(&third)), "{late}");
    assert_eq!(level(&label(&web.start(SLEEP))), of_web);
}

#[test]
fn a_label_is_what_was_asked_for_or_refused_by_name() {
    let node = Node::start();
    let pod = node.run_pod("web");
    if !has_selinux() {
        pod.start_as(with_label(&pod, asked("s0,c4,c5", ""), SLEEP));
        return;
    }
    let start = |asked| label(&pod.start_as(with_label(&pod, asked, SLEEP)));
    assert_eq!(start(asked("s0", "")), "system_u:system_r:container_t:s0");
    assert_eq!(
        start(asked("s0:c4,c5", "container_init_t")),
        "system_u:system_r:container_init_t:s0:c4,c5"
    );
    let own = level(&start(asked("", "container_t")));
    assert_eq!(level(&label(&pod.start(SLEEP))), own, "the pod's");
    for (bad, named) in [
        (asked("s0,c4,c5", ""), "s0,c4,c5"),
        (asked("s0:c1,c2:c3", ""), "s0:c1,c2:c3"),
        (asked("s7", ""), ":s7"),
        (asked("", "no_such_t"), "no_such_t"),
    ] {
        let error = pod
            .try_create(with_label(&pod, bad, SLEEP))
            .err()
            .expect(named);
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(named), "{error}");
    }
    let mut config = node.pod_config("bad");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.selinux_options = Some(asked("", "no_such_t"));
    let error = node.try_run(config).err().expect("no such type");
    assert!(error.message().contains("no_such_t"), "{error}");
}

#[test]
fn a_volume_is_its_containers_once_it_is_relabelled() {
    let node = Node::start();
    let (web, other) = (node.run_pod("web"), node.run_pod("other"));
    let (volume, outside) = (volume(&node, "volume"), volume(&node, "outside"));
    std::os::unix::fs::symlink(outside.join("below"), volume.join("link")).unwrap();
    let before = label_of(&outside.join("below"));
    let read = &["cat", "/volume/below/file"];
    let start = |pod: &Pod<'_>, relabel| {
        let container = pod.start_as(with_volume(pod, &volume, relabel, read));
        container.wait_for_exit().exit_code
    };
    if !has_selinux() {
        assert_eq!(start(&web, true), 0);
        assert_eq!(label_of(&volume), before);
        return;
    }
    assert_ne!(start(&web, false), 0, "it is the host's");
    assert_eq!(start(&web, true), 0);
    let own = level(&label(&web.start(SLEEP)));
    for path in [&volume, &volume.join("below/file"), &volume.join("link")] {
        let expected = format!("system_u:object_r:container_file_t:{own}");
        assert_eq!(label_of(path), expected, "{}", path.display());
    }
    assert_eq!(label_of(&outside.join("below")), before);
    assert_ne!(start(&other, false), 0, "it is another pod's");
    assert_eq!(start(&other, true), 0);
    assert_ne!(start(&web, false), 0, "it is another pod's now");

    // Who may do everything leaves it to those who need it.
    let mut config = with_volume(&web, &volume, true, read);
    config.security().selinux_options = Some(asked("", "spc_t"));
    assert_eq!(web.start_as(config).wait_for_exit().exit_code, 0);
    assert_eq!(start(&other, false), 0);
}

#[test]
fn what_belongs_to_the_node_is_not_relabelled() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.create(with_volume(&pod, Path::new("/usr"), true, SLEEP));
    let started = container.start();
    if !has_selinux() {
        started.unwrap();
        return;
    }
    let error = started.unwrap_err();
    assert!(error.message().contains("/usr"), "{error}");
    assert!(!label_of(Path::new("/usr")).contains("container_file_t"));
}

#[test]
fn a_confined_container_can_use_what_every_container_has() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(SLEEP);
    config.security().masked_paths = vec!["/proc/acpi".into(), "/proc/kcore".into()];
    config.tty = true;
    let container = pod.start_as(config);
    for command in [
        "cat /etc/hosts /etc/hostname /etc/resolv.conf",
        "echo x > /etc/hosts",
        "echo x > /dev/shm/x && cat /dev/shm/x",
        "echo x > /dev/null && ls /dev /dev/mqueue /dev/pts",
        "echo x > /made && cat /made /bin/busybox > /dev/null",
        "ls /proc/self /sys/fs/cgroup && cat /proc/1/status",
    ] {
        container.exec(&["sh", "-c", &format!("{{ {command}; }} > /dev/null")]);
    }
}

#[test]
fn who_shares_the_host_is_not_confined_and_a_shared_pid_namespaces_init_is() {
    let node = Node::start();
    let mut config = node.pod_config("privileged");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let privileged = node.run(config);
    let mut config = privileged.container(SLEEP);
    config.security().privileged = true;
    let free = privileged.start_as(config);

    let namespaces = |name: &str, pid: NamespaceMode| {
        let mut config = node.pod_config(name);
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        let options = context.namespace_options.get_or_insert_default();
        options.pid = pid.into();
        node.run(config)
    };
    let host = namespaces("host-pid", NamespaceMode::Node).start(SLEEP);
    let shared = namespaces("shared", NamespaceMode::Pod).start(SLEEP);
    if !has_selinux() {
        return;
    }
    let init = shared.exec(&["cat", "/proc/1/attr/current"]);
    for container in [&free, &host] {
        assert!(
            label(container).starts_with("system_u:system_r:spc_t:"),
            "{}",
            label(container)
        );
    }
    assert_eq!(init.trim_end_matches(['\0', '\n']), label(&shared));
}

#[test]
fn a_pod_in_a_user_namespace_is_confined_too() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let mapping = vec![cri::IdMapping {
        host_id: 196_608,
        container_id: 0,
        length: 65_536,
    }];
    let options = context.namespace_options.get_or_insert_default();
    options.userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mapping.clone(),
        gids: mapping,
    });
    let pod = node.run(config);
    let mut config = pod.container(SLEEP);
    config.security().masked_paths = vec!["/proc/acpi".into(), "/proc/kcore".into()];
    let container = pod.start_as(config);
    container.exec(&[
        "sh",
        "-c",
        "echo x > /made && echo x > /dev/shm/x && ls /dev",
    ]);
    if has_selinux() {
        level(&label(&container));
    }
}
