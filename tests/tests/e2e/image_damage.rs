//! Images whose stored files changed: found, told, and mended by the next pull.

use berth_tests::{Format, Image, Layer, Node, Packing};
use std::fs;
use std::path::PathBuf;

/// The one stored file of this name.
fn stored(node: &Node, name: &str) -> PathBuf {
    let layers = node.root().join("lib/images/layers");
    let mut found: Vec<PathBuf> = fs::read_dir(layers)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("fs").join(name))
        .filter(|path| path.exists())
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[test]
fn doctor_verify_finds_a_changed_file_and_the_next_pull_mends_it() {
    let node = Node::start();
    let layer = Layer::new().file("content", 0o644, "as it should be");
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let well = node.berth(&["doctor", "--verify"]);
    let text = String::from_utf8_lossy(&well.stdout).into_owned();
    assert!(text.contains("2 layers with"), "{text}");
    let pod = node.run_pod("web");
    let running = pod.start_as(pod.container_of(&reference, &["sleep", "1000"]));

    fs::write(stored(&node, "content"), "as it should bE").unwrap();
    let output = node.berth(&["doctor", "--verify"]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("the content of content has changed"),
        "{text}"
    );
    assert!(text.contains(image.id()), "{text}");
    // The kubelet asks, does not find it, and pulls.
    assert_eq!(node.image(&reference), None);
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(node.image(&reference), None);
    let known = node.berth(&["doctor"]);
    let text = String::from_utf8_lossy(&known.stdout).into_owned();
    assert!(text.contains("was found before"), "{text}");

    assert_eq!(node.pull(&reference).unwrap(), image.id());
    let config = pod.container_of(&reference, &["cat", "/content"]);
    assert_eq!(pod.output_as(config), "as it should be\n");
    assert_eq!(running.exec(&["echo", "on"]), "on\n");
    let text = node.berth(&["doctor", "--verify"]).stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("2 layers with"), "{text}");
}

#[test]
fn a_layer_that_vanished_is_missed_at_the_next_start_and_fetched_again() {
    let node = Node::start();
    let layer = Layer::new().file("content", 0o644, "there");
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let fs_dir = stored(&node, "content").parent().unwrap().to_owned();
    fs::remove_dir_all(fs_dir.parent().unwrap()).unwrap();
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(node.image(&reference), None);
    assert_eq!(node.pull(&reference).unwrap(), image.id());
    let pod = node.run_pod("web");
    let config = pod.container_of(&reference, &["cat", "/content"]);
    assert_eq!(pod.output_as(config), "there\n");
}
