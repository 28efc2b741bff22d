//! CDI devices: a vendor's file changes a container, and only that.

use berth_proto::runtime_v1 as cri;
use berth_tests::Node;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tonic::Code;

/// A node whose CDI files are in a directory of its own.
fn node() -> (Node, PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[runtime]\ncdi_spec_dirs = [{:?}]\n",
        dir.path().to_str().unwrap()
    );
    let node = Node::options().config(&text).start();
    (node, dir.path().to_owned(), dir)
}

fn write(dir: &Path, name: &str, edits: &Value) {
    let file = json!({
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/gpu",
        "devices": [{"name": "0", "containerEdits": edits}],
    });
    std::fs::write(dir.join(name), file.to_string()).unwrap();
}

fn asks_for(config: &mut cri::ContainerConfig, device: &str) {
    config.cdi_devices.push(cri::CdiDevice {
        name: device.to_owned(),
    });
}

#[test]
fn a_container_gets_what_the_vendors_file_says() {
    let (node, dir, _keep) = node();
    let library = dir.join("library");
    std::fs::create_dir(&library).unwrap();
    std::fs::write(library.join("driver"), "version 7").unwrap();
    write(
        &dir,
        "gpu.json",
        &json!({
            "env": ["GPU=zero"],
            "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/loop-control", "permissions": "r"}],
            "mounts": [{"hostPath": library, "containerPath": "/opt/gpu", "options": ["ro", "nosuid", "nodev"]}],
        }),
    );
    let pod = node.run_pod("web");
    let script = "echo $GPU; cat /opt/gpu/driver; echo; (: < /dev/gpu0) && echo readable; \
        touch /opt/gpu/x 2>/dev/null || echo read-only; (: > /dev/gpu0) 2>/dev/null || echo no-write";
    let mut config = pod.container(&["sh", "-c", script]);
    asks_for(&mut config, "vendor.com/gpu=0");
    let expected = "zero\nversion 7\nreadable\nread-only\nno-write";
    assert_eq!(pod.output_as(config).trim(), expected);

    // By annotation, the other way that device plugins use.
    let mut config = pod.container(&["sh", "-c", script]);
    config
        .annotations
        .insert("cdi.k8s.io/plugin_gpu".into(), "vendor.com/gpu=0".into());
    assert_eq!(pod.output_as(config).trim(), expected);

    let without = pod.output(&[
        "sh",
        "-c",
        "ls /dev/gpu0 /opt/gpu 2>&1 | grep -c 'No such'; true",
    ]);
    assert_eq!(without.trim(), "2");
}

#[test]
fn what_was_resolved_at_creation_is_what_is_started() {
    let (node, dir, _keep) = node();
    write(&dir, "gpu.json", &json!({"env": ["GPU=first"]}));
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sh", "-c", "echo $GPU"]);
    asks_for(&mut config, "vendor.com/gpu=0");
    let container = pod.create(config);
    write(&dir, "gpu.json", &json!({"env": ["GPU=second"]}));
    node.kill_daemon();
    node.start_daemon();
    container.start().unwrap();
    container.wait_for_exit();
    assert_eq!(container.stdout().trim(), "first");

    let mut config = pod.container(&["sh", "-c", "echo $GPU"]);
    asks_for(&mut config, "vendor.com/gpu=0");
    assert_eq!(pod.output_as(config).trim(), "second");
}

#[test]
fn a_device_that_cannot_be_had_is_an_error_that_names_it() {
    let (node, dir, _keep) = node();
    std::fs::write(dir.join("bad.yaml"), "kind: [").unwrap();
    write(
        &dir,
        "gpu.json",
        &json!({"deviceNodes": [{"path": "/dev/no-such-device"}]}),
    );
    let pod = node.run_pod("web");
    let refused = |device: &str| {
        let mut config = pod.container(&["true"]);
        asks_for(&mut config, device);
        let status = pod
            .try_create(config)
            .err()
            .expect("the device is not there");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        status.message().to_owned()
    };
    let unknown = refused("vendor.com/gpu=1");
    assert!(
        unknown.contains("vendor.com/gpu=1") && unknown.contains("bad.yaml"),
        "{unknown}"
    );
    let missing = refused("vendor.com/gpu=0");
    assert!(missing.contains("/dev/no-such-device"), "{missing}");
    assert!(node.containers(None).is_empty());
}
