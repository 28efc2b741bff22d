//! Images mounted as volumes (KEP-4639), and the PID namespace of another container.

use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::node::spec;
use berth_tests::{Format, Image, Layer, LinuxConfig, Node, Packing, Pod};
use tonic::Code;

/// An image with content of two layers, a link out of itself and a program.
fn content(node: &Node) -> String {
    let below = Layer::new()
        .dir("data", 0o755)
        .file("data/a", 0o644, b"below")
        .file("data/b", 0o600, b"hidden")
        .dir("data/sub", 0o755)
        .file("data/sub/deep", 0o644, b"deep")
        .symlink("outside", "/etc")
        .symlink("inside", "data/sub")
        .symlink("up", "../../../../etc");
    let above = Layer::new().file("data/a", 0o644, b"above");
    let image = Image::builder(Format::Oci)
        .layer(&below, Packing::Gzip)
        .layer(&above, Packing::Gzip)
        .build();
    let reference = node.push("content", "1", &image);
    node.pull(&reference).unwrap();
    reference
}

fn with_image(pod: &Pod<'_>, reference: &str, sub_path: &str) -> cri::ContainerConfig {
    let mut config = pod.container(&["sleep", "1000"]);
    config.mounts.push(cri::Mount {
        container_path: "/volume".to_owned(),
        readonly: true,
        image: Some(spec(reference)),
        image_sub_path: sub_path.to_owned(),
        ..Default::default()
    });
    config
}

#[test]
fn an_image_is_a_read_only_volume_and_its_digest_is_told() {
    let node = Node::start();
    let reference = content(&node);
    let pod = node.run_pod("web");
    let container = pod.start_as(with_image(&pod, &reference, ""));
    assert_eq!(container.exec(&["cat", "/volume/data/a"]), "above");
    assert_eq!(container.exec(&["cat", "/volume/data/sub/deep"]), "deep");
    let answer = container.try_exec(&["touch", "/volume/x"], 10).unwrap();
    assert!(String::from_utf8_lossy(&answer.stderr).contains("Read-only"));
    // A link of the image leads where it leads in the container.
    assert_eq!(
        container
            .exec(&["readlink", "-f", "/volume/outside"])
            .trim(),
        "/etc"
    );
    let id = node.image(&reference).unwrap().id;
    let mount = container.status().mounts.pop().unwrap();
    assert_eq!(mount.image.unwrap().image_ref, id);
    assert_eq!(mount.container_path, "/volume");

    // Its content stays as long as the container, whatever becomes of the image.
    node.remove_image(&reference).unwrap();
    assert_eq!(container.exec(&["cat", "/volume/data/a"]), "above");
    container.stop(0).unwrap();
    container.remove().unwrap();
}

#[test]
fn programs_in_an_image_volume_can_be_run_unless_noexec() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let base = node.base_image();
    let run = |options: &[&str]| {
        let mut config = with_image(&pod, &base, "");
        config.mounts[0].mount_options = options.iter().map(|&o| o.to_owned()).collect();
        let container = pod.start_as(config);
        container.try_exec(&["/volume/bin/busybox", "true"], 10)
    };
    assert_eq!(run(&[]).unwrap().exit_code, 0);
    assert!(!run(&["noexec"]).is_ok_and(|answer| answer.exit_code == 0));
}

#[test]
fn a_sub_path_is_a_directory_or_a_file_of_the_image_and_nothing_else() {
    let node = Node::start();
    let reference = content(&node);
    let pod = node.run_pod("web");
    let start = |sub_path: &str| {
        pod.try_create(with_image(&pod, &reference, sub_path))
            .and_then(|container| container.start().map(|()| container))
    };
    assert_eq!(
        start("data/sub").unwrap().exec(&["ls", "/volume"]),
        "deep\n"
    );
    assert_eq!(start("inside").unwrap().exec(&["ls", "/volume"]), "deep\n");
    assert_eq!(start("data/a").unwrap().exec(&["cat", "/volume"]), "above");
    for (sub_path, code) in [
        ("../etc", Code::InvalidArgument),
        ("/etc", Code::InvalidArgument),
        ("nowhere", Code::InvalidArgument),
        // The image has no /etc, and the host's is not to be had.
        ("outside", Code::InvalidArgument),
        ("up", Code::InvalidArgument),
    ] {
        let error = start(sub_path)
            .err()
            .unwrap_or_else(|| panic!("{sub_path:?} was found"));
        assert_eq!(error.code(), code, "{sub_path}: {error}");
    }
}

#[test]
fn an_image_volume_is_of_this_node_and_read_only() {
    let node = Node::start();
    let reference = content(&node);
    let pod = node.run_pod("web");
    let refused = |change: &dyn Fn(&mut cri::Mount)| {
        let mut config = with_image(&pod, &reference, "");
        change(&mut config.mounts[0]);
        pod.try_create(config).err().expect("no such volume").code()
    };
    assert_eq!(
        refused(&|mount| mount.readonly = false),
        Code::InvalidArgument
    );
    assert_eq!(
        refused(&|mount| mount.host_path = "/etc".to_owned()),
        Code::InvalidArgument
    );
    let gone = &|mount: &mut cri::Mount| mount.image = Some(spec("nowhere.test/gone:1"));
    assert_eq!(refused(gone), Code::NotFound);
}

#[test]
fn in_a_user_namespace_the_image_belongs_to_the_pods_root() {
    let node = Node::start();
    let reference = content(&node);
    let mut config = node.pod_config("web");
    let ranges = vec![cri::IdMapping {
        host_id: 300_000,
        container_id: 0,
        length: 65_536,
    }];
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: ranges.clone(),
        gids: ranges.clone(),
    });
    let pod = node.run(config);
    let mut config = with_image(&pod, &reference, "data");
    config.mounts[0].uid_mappings = ranges.clone();
    config.mounts[0].gid_mappings = ranges;
    let container = pod.start_as(config);
    assert_eq!(
        container.exec(&["stat", "-c", "%u", "/volume/b"]).trim(),
        "0"
    );
    assert_eq!(container.exec(&["cat", "/volume/b"]), "hidden");
}

#[test]
fn a_container_may_join_the_processes_of_another_one() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let target = pod.start(&["sleep", "1001"]);
    let bystander = pod.start(&["sleep", "1002"]);
    let debugger = |target_id: &str| {
        let mut config = pod.container(&["sleep", "1003"]);
        let options = config.security().namespace_options.get_or_insert_default();
        options.pid = NamespaceMode::Target.into();
        options.target_id = target_id.to_owned();
        config
    };
    let joined = pod.start_as(debugger(&target.id));
    let seen = joined.exec(&["ps", "-o", "args"]);
    assert!(
        seen.contains("sleep 1001") && seen.contains("sleep 1003"),
        "{seen}"
    );
    assert!(!seen.contains("sleep 1002"), "{seen}");
    // Only the processes are shared: the root is its own image's.
    let ns = |pid: i32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    assert_eq!(ns(joined.init_pid(), "pid"), ns(target.init_pid(), "pid"));
    assert_ne!(ns(joined.init_pid(), "mnt"), ns(target.init_pid(), "mnt"));
    assert_ne!(
        ns(bystander.init_pid(), "pid"),
        ns(target.init_pid(), "pid")
    );

    // With its first process a namespace ends, and everybody in it.
    target.stop(0).unwrap();
    assert_eq!(joined.wait_for_exit().exit_code, 137);

    for (id, code) in [
        ("0".repeat(64), Code::NotFound),
        (target.id.clone(), Code::FailedPrecondition),
        (String::new(), Code::InvalidArgument),
    ] {
        let error = pod.try_create(debugger(&id)).err().expect("nobody to join");
        assert_eq!(error.code(), code, "{id}: {error}");
    }
    let elsewhere = node.run_pod("other").start(&["sleep", "1004"]);
    let error = pod
        .try_create(debugger(&elsewhere.id))
        .err()
        .expect("another pod's");
    assert_eq!(error.code(), Code::NotFound, "{error}");
}
