//! `berth image`: archives in and out, pulls that show how far they are, pruning.

use berth_tests::{Format, Image, Layer, Node, Packing};
use std::fs;
use std::process::Output;

fn image(content: &str) -> Image {
    let layer = Layer::new().file("content", 0o644, content);
    Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Zstd)
        .build()
}

fn succeeded(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn an_exported_image_is_imported_on_another_node_and_runs() {
    let node = Node::start();
    let image = image("travelled");
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let archive = node.root().join("image.tar");
    let path = archive.to_str().unwrap();
    succeeded(&node.berth(&["image", "export", &reference, "--output", path]));

    let elsewhere = Node::start();
    let printed = succeeded(&elsewhere.berth(&["image", "import", path]));
    assert_eq!(printed, format!("{} {reference}\n", image.id()));
    let found = elsewhere.image(&reference).expect("it is imported");
    assert_eq!(found.id, image.id());
    let digests = node.image(&reference).unwrap().repo_digests;
    assert_eq!(found.repo_digests, digests);
    let pod = elsewhere.run_pod("web");
    let config = pod.container_of(&reference, &["cat", "/content"]);
    assert_eq!(pod.output_as(config), "travelled\n");
}

#[test]
fn an_oci_layout_is_imported_as_directory_and_as_compressed_archive() {
    let node = Node::start();
    let image = image("layout");
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let archive = node.root().join("image.tar");
    let path = archive.to_str().unwrap();
    succeeded(&node.berth(&["image", "export", &reference, "-o", path]));
    let layout = node.root().join("layout");
    fs::create_dir(&layout).unwrap();
    let unpacked = std::process::Command::new("tar")
        .args(["-xf", path, "-C", layout.to_str().unwrap()])
        .status()
        .unwrap();
    assert!(unpacked.success());
    let packed = node.root().join("image.tar.gz");
    fs::write(
        &packed,
        berth_tests::image::pack(&fs::read(&archive).unwrap(), Packing::Gzip),
    )
    .unwrap();
    for source in [&layout, &packed] {
        node.remove_image(&reference).unwrap();
        assert_eq!(node.image(&reference), None);
        succeeded(&node.berth(&["image", "import", source.to_str().unwrap()]));
        assert_eq!(node.image(&reference).unwrap().id, image.id());
    }
}

#[test]
fn what_is_no_archive_is_refused_by_name() {
    let node = Node::start();
    let path = node.root().join("notes.txt");
    fs::write(&path, "milk, bread").unwrap();
    let output = node.berth(&["image", "import", path.to_str().unwrap()]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("archive cannot be read"), "{stderr}");
    let missing = node.berth(&["image", "import", "/no/such/file"]);
    let stderr = String::from_utf8_lossy(&missing.stderr);
    assert!(stderr.contains("/no/such/file"), "{stderr}");
    let output = node.berth(&["image", "export", "no.such/image:1", "-o", "/dev/null"]);
    assert!(!output.status.success());
    assert_eq!(node.list_images(), []);
}

#[test]
fn a_pull_by_the_command_line_shows_its_layers_and_prints_the_id() {
    let node = Node::start();
    // Large enough to be seen on its way.
    let bytes: Vec<u8> = (0..12_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let layer = Layer::new().file("large", 0o644, bytes);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/large", "v1", &image);
    let output = node.berth(&["image", "pull", &reference]);
    assert_eq!(succeeded(&output), format!("{}\n", image.id()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains('\x1b'), "{stderr:?}");
}

#[test]
fn pruning_keeps_what_containers_and_tags_have() {
    let node = Node::start();
    let (old, new) = (image("old"), image("new"));
    let reference = node.push("things/one", "v1", &old);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("user");
    let running = pod.start_as(pod.container_of(&reference, &["sleep", "1000"]));
    node.push("things/one", "v1", &new);
    node.pull(&reference).unwrap();
    let printed = succeeded(&node.berth(&["image", "prune"]));
    assert!(printed.contains("0 images"), "{printed}");
    running.stop(0).unwrap();
    running.remove().unwrap();
    let printed = succeeded(&node.berth(&["image", "prune"]));
    assert!(printed.contains(old.id()), "{printed}");
    assert_eq!(node.image(&reference).unwrap().id, new.id());
    assert_eq!(node.image(old.id()), None);
}
