//! What containers get that ask for nothing: from the configuration, never from
//! the daemon.

use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::image::Entry;
use berth_tests::node::{is_cgroup_v2, spec};
use berth_tests::{Format, Image, Layer, LinuxConfig, Node, Packing, binaries};
use serde_json::json;
use std::fs;
use std::process::Command;

const CONFIG: &str = r#"
[containers]
env = ["REGION=north", "PATH=/configured"]
capabilities = ["CHOWN", "KILL"]
umask = "0027"
rlimits = ["core=0:0", "nproc=900:1000"]
sysctls = ["net.ipv4.ip_unprivileged_port_start=81", "kernel.shmmax=12345678"]
timezone = "local"
devices_of_user = true
"#;

#[test]
fn the_configuration_says_what_containers_get() {
    let node = Node::options().config(CONFIG).start();
    let pod = node.run_pod("web");
    let container = pod.start(&["/bin/sleep", "1000"]);
    let read = |path: &str| container.exec(&["/bin/cat", path]);
    let status = container.exec(&["/bin/probe", "status"]);
    let line = |name: &str| {
        let found = status
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")));
        found.map(|line| line.split_whitespace().last().unwrap().to_owned())
    };
    assert_eq!(line("Umask").as_deref(), Some("0027"));
    // CHOWN is 0, KILL is 5.
    assert_eq!(line("CapEff").as_deref(), Some("0000000000000021"));
    let limits = read("/proc/self/limits");
    let limit = |name: &str| {
        let found = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<_> = found[name.len()..].split_whitespace().take(2).collect();
        words.join(":")
    };
    assert_eq!(limit("Max core file size"), "0:0");
    assert_eq!(limit("Max processes"), "900:1000");
    let env = container.exec(&["/bin/env"]);
    assert!(env.contains("REGION=north\n"), "{env}");
    assert_eq!(
        read("/proc/sys/net/ipv4/ip_unprivileged_port_start").trim(),
        "81"
    );
    assert_eq!(read("/proc/sys/kernel/shmmax").trim(), "12345678");
    let host = fs::read("/etc/localtime").unwrap();
    let zone = container.exec(&["/bin/sh", "-c", "/bin/busybox md5sum < /etc/localtime"]);
    let table = read("/proc/mounts");
    assert!(
        table.contains(" /etc/localtime ") && !host.is_empty(),
        "{zone}{table}"
    );

    // What is asked for, and what the image says, wins.
    let mut config = pod.container(&["/bin/sleep", "1000"]);
    config.env("REGION", b"south");
    let caps = config.security().capabilities.get_or_insert_default();
    caps.drop_capabilities = vec!["KILL".to_owned()];
    caps.add_capabilities = vec!["NET_RAW".to_owned()];
    config.security().run_as_user = Some(cri::Int64Value { value: 0 });
    config.devices.push(cri::Device {
        host_path: "/dev/zero".to_owned(),
        container_path: "/dev/mine".to_owned(),
        permissions: "rw".to_owned(),
    });
    config.security().run_as_user = Some(cri::Int64Value { value: 1000 });
    let other = pod.start_as(config);
    assert!(other.exec(&["/bin/env"]).contains("REGION=south\n"));
    let owner = other.exec(&["/bin/stat", "-c", "%u:%g", "/dev/mine"]);
    assert_eq!(owner.trim(), "1000:1000");
    let status = other.exec(&["/bin/probe", "status"]);
    assert!(status.contains("CapBnd:\t0000000000002001"), "{status}");

    // On the host's network there is nothing of the pod's to set them in.
    let mut config = node.pod_config("on-host");
    let context = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    context.namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
    let before = node
        .host
        .run("cat", &["/proc/sys/net/ipv4/ip_unprivileged_port_start"])
        .unwrap();
    node.run(config).start(&["/bin/sleep", "1000"]);
    let after = node
        .host
        .run("cat", &["/proc/sys/net/ipv4/ip_unprivileged_port_start"])
        .unwrap();
    assert_eq!(before, after);
}

#[test]
fn volumes_of_an_image_are_directories_of_the_container_or_left_alone() {
    let layer = Layer::new()
        .dir("kept", 0o755)
        .file("kept/file", 0o644, b"from the image");
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .run(
            "Volumes",
            json!({"/data/deep": {}, "/kept": {}, "/mounted": {}, "/proc/x": {}, "../../up": {}}),
        )
        .build();
    for (policy, there) in [("directory", true), ("ignore", false)] {
        let config = format!("[containers]\nimage_volumes = \"{policy}\"\n");
        let node = Node::options().config(&config).start();
        let reference = node.push("volumes", "1", &image);
        node.pull(&reference).unwrap();
        let volume = node.root().join("volume");
        fs::create_dir(&volume).unwrap();
        let pod = node.run_pod("web");
        let mut config = pod.container(&["sleep", "1000"]);
        config.image = Some(spec(&reference));
        config.mount(&volume, "/mounted");
        let container = pod.start_as(config);
        let made = container
            .try_exec(&["test", "-d", "/data/deep"], 10)
            .unwrap();
        assert_eq!(made.exit_code == 0, there, "{policy}");
        assert_eq!(container.exec(&["cat", "/kept/file"]), "from the image");
        container.exec(&["sh", "-c", "echo x > /kept/file"]);
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    }
}

#[test]
fn volumes_of_an_image_are_writable_on_a_read_only_root_with_what_the_image_has_there() {
    let file = |name: &str, mode| Entry::new(b'0', name, mode).owner(33, 44);
    let layer = Layer::new()
        .dir("data", 0o755)
        .entry(Entry::new(b'5', "data/www", 0o2750).owner(33, 44))
        .entry(file("data/www/page", 0o640).data("from the image"))
        .entry(file("data/www/marked", 0o644).data("x"))
        .hard_link("data/www/same", "data/www/page")
        .symlink("data/www/link", "page")
        .symlink("data/www/out", "/etc")
        // What a stranger may write where a volume is to be.
        .symlink("linked", "/proc/sys")
        .symlink("up", "../../../..")
        .symlink("round", "round")
        .symlink("dangling", "/nowhere/deep")
        .symlink("etc-link", "/etc")
        .file("file", 0o644, b"no directory");
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .run(
            "Volumes",
            json!({"/data/www": {}, "/new/deep": {}, "/linked": {}, "/linked/kernel": {}, "/up": {}, "/round/x": {},
                "/dangling": {}, "/file": {}, "/etc-link/sub": {}, "/": {}, "/mounted/below": {}, "/seen": {}}),
        )
        .build();
    let node = Node::start();
    let reference = node.push("volumes", "1", &image);
    node.pull(&reference).unwrap();
    let host = node.root().join("volume");
    fs::create_dir(&host).unwrap();
    let mapping = vec![cri::IdMapping {
        host_id: 196_608,
        container_id: 0,
        length: 65_536,
    }];
    let mut in_user_namespace = node.pod_config("user");
    let context = in_user_namespace
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    context
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mapping.clone(),
        gids: mapping,
    });
    for config in [node.pod_config("web"), in_user_namespace] {
        let pod = node.run(config);
        let mut config = pod.container(&["sleep", "1000"]);
        config.image = Some(spec(&reference));
        config.security().readonly_rootfs = true;
        config.mount(&host, "/mounted").readonly = true;
        let container = pod.start_as(config);
        let shows = |path: &str| {
            container
                .exec(&["stat", "-c", "%u:%g %a %F", path])
                .trim()
                .to_owned()
        };
        assert_eq!(shows("/data/www"), "33:44 2750 directory");
        assert_eq!(shows("/data/www/page"), "33:44 640 regular file");
        assert_eq!(container.exec(&["cat", "/data/www/same"]), "from the image");
        assert_eq!(
            container.exec(&["readlink", "/data/www/link"]).trim(),
            "page"
        );
        let writes = |path: &str| {
            let script = format!("echo written > {path}");
            container
                .try_exec(&["sh", "-c", &script], 10)
                .unwrap()
                .exit_code
                == 0
        };
        for path in [
            "/data/www/page",
            "/data/www/new",
            "/new/deep/x",
            "/data/www/marked",
        ] {
            assert!(writes(path), "{path}");
        }
        for path in [
            "/x",
            "/data/x",
            "/new/x",
            "/etc/x",
            "/file",
            "/mounted/below/x",
            "/mounted/x",
            "/proc/sys/kernel/core_pattern",
            "/linked/kernel/core_pattern",
            "/data/www/out/x",
        ] {
            assert!(!writes(path), "{path}");
        }
        assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
        // It is the container's own layer: counted as that, and gone with it.
        let upper = node
            .root()
            .join("lib/containers")
            .join(&container.id)
            .join("upper");
        assert_eq!(fs::read(upper.join("data/www/new")).unwrap(), b"written\n");
        container.remove().unwrap();
        assert!(!upper.exists());
        // Another container of the image has what the image has.
        let mut config = pod.container(&["sleep", "1000"]);
        config.image = Some(spec(&reference));
        let container = pod.start_as(config);
        assert_eq!(container.exec(&["cat", "/data/www/page"]), "from the image");
        pod.remove();
    }
}

#[test]
fn a_container_has_a_keyring_of_its_own_and_its_spec_is_shown() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.env("TOKEN", b"very-secret");
    let container = pod.start_as(config);
    let request = cri::ContainerStatusRequest {
        container_id: container.id.clone(),
        verbose: true,
    };
    let answer = node.wait(node.runtime().container_status(request)).unwrap();
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    let spec = &info["runtimeSpec"];
    assert_eq!(spec["process"]["args"], json!(["sleep", "1000"]));
    assert!(
        spec["linux"]["maskedPaths"]
            .as_array()
            .is_some_and(|paths| !paths.is_empty())
    );
    assert!(!answer.info["info"].contains("very-secret"));
    assert!(answer.info["info"].contains("TOKEN=[redacted]"));

    // From the host: the keyring is there, under the container's name.
    if let Ok(keys) = fs::read_to_string("/proc/keys") {
        assert!(keys.contains(&format!("_ses.{}", container.id)), "{keys}");
    }
}

/// Whether cgroup v2 is mounted so that a cgroup namespace keeps its limits.
fn delegates() -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut lines = table.lines().filter_map(|line| line.split_once(" - "));
    is_cgroup_v2()
        && lines.any(|(_, after)| after.starts_with("cgroup2 ") && after.contains("nsdelegate"))
}

#[test]
fn a_writable_cgroup_is_given_where_limits_stay_out_of_reach() {
    let config = "[containers]\nwritable_cgroup = true\n";
    if !delegates() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/config.toml"), config).unwrap();
        // One that does start would not end.
        let mut serve = Command::new("timeout");
        serve.args(["--signal=KILL", "60"]).arg(binaries::berth());
        let refused = serve.arg("serve").arg("--root").arg(root.path()).output();
        let refused = refused.unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{said}");
        for word in ["containers.writable_cgroup", "raise its own limits"] {
            assert!(said.contains(word), "{said}");
        }
        return;
    }
    let node = Node::options().config(config).start();
    let pod = node.run_pod("web");
    let script = "cd /sys/fs/cgroup; mkdir own && echo made; \
        (echo max > memory.max) && echo raised || echo refused; sleep 1000";
    let mut config = pod.container(&["sh", "-c", script]);
    config.resources().memory_limit_in_bytes = 32 << 20;
    let container = pod.start_as(config);
    container.wait_for_log("refused");
    assert_eq!(container.stdout(), "made\nrefused\n");
    let limit = container.exec(&["cat", "/sys/fs/cgroup/memory.max"]);
    assert_eq!(limit.trim(), (32 << 20).to_string());
}
