//! Volumes: read-write, read-only, recursively so, propagation, what is refused.

use berth_proto::runtime_v1::MountPropagation;
use berth_tests::{LinuxConfig, Node};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::path::{Path, PathBuf};
use tonic::Code;

fn folder(node: &Node, name: &str) -> PathBuf {
    let path = node.root().join(name);
    fs::create_dir(&path).unwrap();
    path
}

/// A mount of the test's own; gone when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: &Path) -> Self {
        mount(
            Some("none"),
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Self(path.to_owned())
    }

    /// A mount point of its own, as propagation needs.
    fn bind(path: &Path, propagation: MsFlags) -> Self {
        mount(
            Some(path),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        mount(None::<&str>, path, None::<&str>, propagation, None::<&str>).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_volume_is_shared_with_the_host_both_ways() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    fs::write(volume.join("from-host"), "host").unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.mount(&volume, "/made/for/it");
    let container = pod.start_as(config);
    assert_eq!(container.exec(&["cat", "/made/for/it/from-host"]), "host");
    container.exec(&["sh", "-c", "echo pod > /made/for/it/from-pod"]);
    assert_eq!(
        fs::read_to_string(volume.join("from-pod")).unwrap(),
        "pod\n"
    );
}

#[test]
fn a_file_is_mounted_over_a_file_and_where_there_was_none() {
    let node = Node::start();
    let file = node.root().join("hosts");
    fs::write(&file, "10.0.0.1 somewhere\n").unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.mount(&file, "/etc/hosts");
    config.mount(&file, "/etc/passwd");
    let container = pod.start_as(config);
    assert_eq!(
        container.exec(&["cat", "/etc/hosts"]),
        "10.0.0.1 somewhere\n"
    );
    assert_eq!(
        container.exec(&["cat", "/etc/passwd"]),
        "10.0.0.1 somewhere\n"
    );
}

#[test]
fn a_read_only_volume_refuses_writes() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.mount(&volume, "/volume").readonly = true;
    let container = pod.start_as(config);
    let answer = container.try_exec(&["touch", "/volume/x"], 10).unwrap();
    assert_ne!(answer.exit_code, 0);
    assert!(String::from_utf8_lossy(&answer.stderr).contains("Read-only"));
    assert!(!volume.join("x").exists());
}

#[test]
fn read_only_covers_mounts_below_only_where_asked_for() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    let below = folder(&node, "volume/below");
    let _mounted = Mounted::tmpfs(&below);
    let pod = node.run_pod("web");
    let write_below = |recursive: bool| {
        let mut config = pod.container(&["touch", "/volume/below/x"]);
        let mount = config.mount(&volume, "/volume");
        (mount.readonly, mount.recursive_read_only) = (true, recursive);
        pod.start_as(config).wait_for_exit().exit_code
    };
    assert_eq!(write_below(false), 0);
    assert_ne!(write_below(true), 0);
}

#[test]
fn recursive_read_only_needs_read_only_and_private() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    let pod = node.run_pod("web");
    for (readonly, propagation) in [
        (false, MountPropagation::PropagationPrivate),
        (true, MountPropagation::PropagationHostToContainer),
        (true, MountPropagation::PropagationBidirectional),
    ] {
        let mut config = pod.container(&["true"]);
        let mount = config.mount(&volume, "/volume");
        (mount.readonly, mount.recursive_read_only) = (readonly, true);
        mount.propagation = propagation.into();
        let err = pod.try_create(config).err().expect("not a possible mount");
        assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");
    }
}

#[test]
fn a_volume_may_be_a_symlink_on_the_host() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    fs::write(volume.join("note"), "followed").unwrap();
    let link = node.root().join("link");
    std::os::unix::fs::symlink(&volume, &link).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["cat", "/volume/note"]);
    config.mount(&link, "/volume");
    assert_eq!(pod.output_as(config).trim_end(), "followed");
}

#[test]
fn a_volume_that_is_not_on_the_host_is_refused_by_name_or_made() {
    let node = Node::start();
    let missing = node.root().join("missing");
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.mount(&missing, "/volume");
    let outcome = pod
        .try_create(config)
        .and_then(|container| container.start());
    match outcome {
        // Docker's way, which containerd kept.
        Ok(()) => assert!(missing.is_dir()),
        Err(err) => assert!(err.message().contains("missing"), "{err}"),
    }
}

#[test]
fn mounts_below_a_volume_are_there_too() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    let below = folder(&node, "volume/below");
    let _mounted = Mounted::tmpfs(&below);
    fs::write(below.join("note"), "below").unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["cat", "/volume/below/note"]);
    config.mount(&volume, "/volume");
    assert_eq!(pod.output_as(config).trim_end(), "below");
}

#[test]
fn later_mounts_lie_over_earlier_ones_whatever_their_order_in_the_request() {
    let node = Node::start();
    let (outer, inner) = (folder(&node, "outer"), folder(&node, "inner"));
    fs::create_dir(outer.join("sub")).unwrap();
    fs::write(inner.join("note"), "inner").unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["cat", "/volume/sub/note"]);
    config.mount(&inner, "/volume/sub");
    config.mount(&outer, "/volume");
    assert_eq!(pod.output_as(config).trim_end(), "inner");
}

#[test]
fn propagation_is_none_one_way_or_both_ways() {
    let node = Node::start();
    for (propagation, into, out) in [
        (MountPropagation::PropagationPrivate, false, false),
        (MountPropagation::PropagationHostToContainer, true, false),
        (MountPropagation::PropagationBidirectional, true, true),
    ] {
        let volume = folder(&node, &node.fresh("volume"));
        for name in ["host", "pod"] {
            fs::create_dir(volume.join(name)).unwrap();
        }
        let _shared = Mounted::bind(&volume, MsFlags::MS_SHARED);
        let mut config = node.pod_config(&node.fresh("pod"));
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        let pod = node.run(config);
        let mut config = pod.container(&["sleep", "1000"]);
        config.security().privileged = true;
        config.mount(&volume, "/volume").propagation = propagation.into();
        let container = pod.start_as(config);

        let _of_host = Mounted::tmpfs(&volume.join("host"));
        fs::write(volume.join("host/note"), "x").unwrap();
        let seen = container
            .try_exec(&["cat", "/volume/host/note"], 10)
            .unwrap()
            .exit_code
            == 0;
        assert_eq!(
            seen, into,
            "{propagation:?}: a mount of the host's in the container"
        );

        container.exec(&["mount", "-t", "tmpfs", "none", "/volume/pod"]);
        container.exec(&["touch", "/volume/pod/note"]);
        let _of_pod = Mounted(volume.join("pod"));
        assert_eq!(
            volume.join("pod/note").exists(),
            out,
            "{propagation:?}: a mount of the container's on the host"
        );
        pod.remove();
    }
}

#[test]
fn both_ways_from_a_source_that_is_not_shared_is_refused() {
    let node = Node::start();
    let volume = folder(&node, "volume");
    let _private = Mounted::bind(&volume, MsFlags::MS_PRIVATE);
    let mut config = node.pod_config("web");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = node.run(config);
    let mut config = pod.container(&["true"]);
    config.security().privileged = true;
    config.mount(&volume, "/volume").propagation =
        MountPropagation::PropagationBidirectional.into();
    let outcome = pod
        .try_create(config)
        .and_then(|container| container.start());
    let err = outcome.expect_err("its mounts could not get out");
    assert!(err.message().contains("volume"), "{err}");
}

#[test]
fn no_mount_of_a_container_is_in_the_hosts_table() {
    let node = Node::start();
    let count = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .matches(&node.root().display().to_string())
            .count()
    };
    let pod = node.run_pod("web");
    let with_pod = count();
    let volume = folder(&node, "volume");
    for _ in 0..3 {
        let mut config = pod.container(&["sleep", "1000"]);
        config.mount(&volume, "/volume");
        pod.start_as(config);
    }
    assert_eq!(count(), with_pod, "a start is as fast with 500 pods");
}

#[test]
fn the_usual_file_systems_are_there() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let table = pod.output(&["cat", "/proc/mounts"]);
    let kind = |point: &str| {
        let line = table
            .lines()
            .rfind(|line| line.split(' ').nth(1) == Some(point));
        line.unwrap_or_else(|| panic!("no {point} in\n{table}"))
            .split(' ')
            .nth(2)
            .unwrap()
            .to_owned()
    };
    for (point, wanted) in [
        ("/", "overlay"),
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
        ("/dev/shm", "tmpfs"),
        ("/sys", "sysfs"),
    ] {
        assert_eq!(kind(point), wanted, "{point}");
    }
    assert!(
        table.lines().any(|line| line.contains(" /sys/fs/cgroup")),
        "{table}"
    );
    let sys = table
        .lines()
        .find(|line| line.contains(" /sys sysfs "))
        .unwrap();
    assert!(sys.contains("ro,"), "{sys}");
}
