//! Images that are there: references, identity, listing, removal.

use berth_proto::runtime_v1 as cri;
use berth_tests::node::spec;
use berth_tests::{Format, Image, Layer, Node, Packing};
use serde_json::json;

fn image(content: &str) -> Image {
    let layer = Layer::new().file("content", 0o644, content);
    Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build()
}

#[test]
fn an_image_is_pulled_by_tag_and_is_then_listed_whole() {
    let node = Node::start();
    let image = image("by tag");
    let reference = node.push("things/one", "v1", &image);
    let id = node.pull(&reference).unwrap();
    assert_eq!(id, image.id());
    let listed = node.list_images();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, image.id());
    assert_eq!(listed[0].repo_tags, std::slice::from_ref(&reference));
    let digest = format!(
        "{}@{}",
        node.registry().name("things/one"),
        image.manifest.digest
    );
    assert_eq!(listed[0].repo_digests, [digest]);
    assert!(listed[0].size > 0);
    assert_eq!(node.image(&reference).unwrap(), listed[0]);
}

#[test]
fn an_image_is_pulled_by_digest_and_has_no_tag() {
    let node = Node::start();
    let image = image("by digest");
    node.push("things/one", "v1", &image);
    let reference = format!(
        "{}@{}",
        node.registry().name("things/one"),
        image.manifest.digest
    );
    assert_eq!(node.pull(&reference).unwrap(), image.id());
    let found = node.image(&reference).unwrap();
    assert_eq!(found.repo_tags, [""; 0]);
    assert_eq!(found.repo_digests, [reference]);
}

#[test]
fn a_reference_with_tag_and_digest_means_the_digest() {
    let node = Node::start();
    let (old, new) = (image("old"), image("new"));
    node.push("things/one", "v1", &old);
    node.push("things/one", "v1", &new);
    let name = node.registry().name("things/one");
    let reference = format!("{name}:v1@{}", old.manifest.digest);
    assert_eq!(node.pull(&reference).unwrap(), old.id());
}

#[test]
fn without_a_tag_it_is_latest() {
    let node = Node::start();
    let image = image("latest");
    node.push("things/one", "latest", &image);
    let name = node.registry().name("things/one");
    assert_eq!(node.pull(&name).unwrap(), image.id());
    assert_eq!(
        node.image(&name).unwrap().repo_tags,
        [format!("{name}:latest")]
    );
}

#[test]
fn a_tag_that_moved_names_the_new_image_and_the_old_one_keeps_its_digest() {
    let node = Node::start();
    let (old, new) = (image("old"), image("new"));
    let reference = node.push("things/one", "v1", &old);
    node.pull(&reference).unwrap();
    node.push("things/one", "v1", &new);
    assert_eq!(node.pull(&reference).unwrap(), new.id());
    assert_eq!(node.image(&reference).unwrap().id, new.id());
    let old = node
        .image(old.id())
        .expect("the old image is still known by its ID");
    assert_eq!(old.repo_tags, [""; 0]);
    assert_eq!(old.repo_digests.len(), 1);
}

#[test]
fn several_tags_of_one_image_are_one_image() {
    let node = Node::start();
    let image = image("thrice");
    let mut references: Vec<_> = ["a", "b", "c"]
        .iter()
        .map(|tag| node.push("things/one", tag, &image))
        .collect();
    for reference in &references {
        node.pull(reference).unwrap();
    }
    let listed = node.list_images();
    assert_eq!(listed.len(), 1);
    let mut tags = listed[0].repo_tags.clone();
    tags.sort();
    references.sort();
    assert_eq!(tags, references);
}

#[test]
fn removing_one_tag_removes_the_image_with_all_its_tags() {
    let node = Node::start();
    let image = image("gone");
    let first = node.push("things/one", "a", &image);
    let second = node.push("other/name", "b", &image);
    node.pull(&first).unwrap();
    node.pull(&second).unwrap();
    assert_eq!(node.list_images().len(), 1);
    node.remove_image(&first).unwrap();
    assert_eq!(node.image(&first), None);
    assert_eq!(node.image(&second), None);
    assert_eq!(node.list_images(), []);
}

#[test]
fn an_image_is_found_by_tag_by_digest_and_by_id() {
    let node = Node::start();
    let image = image("found");
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let by_digest = format!(
        "{}@{}",
        node.registry().name("things/one"),
        image.manifest.digest
    );
    let bare_id = image.id().trim_start_matches("sha256:");
    for name in [reference.as_str(), &by_digest, image.id(), bare_id] {
        let found = node
            .image(name)
            .unwrap_or_else(|| panic!("{name} is not found"));
        assert_eq!(found.id, image.id(), "{name}");
    }
}

#[test]
fn an_image_that_is_not_there_is_no_error() {
    let node = Node::start();
    assert_eq!(node.image("127.0.0.1:1/no/such:image"), None);
    node.remove_image("127.0.0.1:1/no/such:image").unwrap();
}

#[test]
fn removing_an_image_twice_succeeds() {
    let node = Node::start();
    let image = image("twice");
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    node.remove_image(image.id()).unwrap();
    node.remove_image(image.id()).unwrap();
    node.remove_image(&reference).unwrap();
    assert_eq!(node.list_images(), []);
}

#[test]
fn a_removed_image_can_be_pulled_again() {
    let node = Node::start();
    let reference = node.push("things/one", "v1", &image("again"));
    let id = node.pull(&reference).unwrap();
    node.remove_image(&reference).unwrap();
    assert_eq!(node.image(&reference), None);
    assert_eq!(node.pull(&reference).unwrap(), id);
    assert!(node.image(&reference).is_some());
}

#[test]
fn removing_an_image_many_times_at_once_succeeds() {
    let node = Node::start();
    let reference = node.push("things/one", "v1", &image("at once"));
    node.pull(&reference).unwrap();
    let calls = (0..8)
        .map(|_| {
            let (mut images, reference) = (node.images(), reference.clone());
            async move {
                let request = cri::RemoveImageRequest {
                    image: Some(spec(&reference)),
                };
                images.remove_image(request).await
            }
        })
        .collect();
    for answer in node.wait_all(calls) {
        answer.unwrap();
    }
    assert_eq!(node.list_images(), []);
}

#[test]
fn what_is_removed_gives_its_space_back() {
    let node = Node::start();
    let used = || node.image_fs().used_bytes.unwrap().value;
    let before = used();
    let layer = Layer::new().file("big", 0o644, vec![b'x'; 8 << 20]);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/big", "v1", &image);
    node.pull(&reference).unwrap();
    let full = used();
    assert!(full >= before + (8 << 20), "{before} -> {full}");
    node.remove_image(&reference).unwrap();
    berth_tests::eventually("the space is free", || {
        (used() < before + (1 << 20)).then_some(())
    });
}

#[test]
fn the_image_filesystem_is_where_the_images_are() {
    let node = Node::start();
    let request = cri::ImageFsInfoRequest::default();
    let info = node.wait(node.images().image_fs_info(request)).unwrap();
    let images = &info.image_filesystems[0];
    let mountpoint = &images.fs_id.as_ref().unwrap().mountpoint;
    assert!(
        mountpoint.starts_with(&node.root().display().to_string()),
        "{mountpoint}"
    );
    assert!(images.timestamp > 0);
    assert!(images.inodes_used.is_some());
    assert!(!info.container_filesystems.is_empty());
}

#[test]
fn listing_takes_a_filter() {
    let node = Node::start();
    let one = node.push("things/one", "v1", &image("one"));
    let two = node.push("things/two", "v1", &image("two"));
    node.pull(&one).unwrap();
    node.pull(&two).unwrap();
    assert_eq!(node.list_images().len(), 2);
    let list = |name: &str| {
        let filter = Some(cri::ImageFilter {
            image: Some(spec(name)),
        });
        node.wait(node.images().list_images(cri::ListImagesRequest { filter }))
            .unwrap()
            .images
    };
    let found = list(&two);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].repo_tags, [two]);
    assert_eq!(list("127.0.0.1:1/things/none:v1"), []);
}

#[test]
fn a_numeric_user_is_the_uid_and_a_name_is_the_username() {
    let node = Node::start();
    for (user, uid, username) in [
        ("1002", Some(1002), ""),
        ("1003:1004", Some(1003), ""),
        ("alice", None, "alice"),
        ("alice:staff", None, "alice"),
        ("", None, ""),
    ] {
        let image = Image::builder(Format::Oci)
            .base()
            .run("User", json!(user))
            .build();
        let tag = format!("u{}", user.replace(':', "-"));
        let reference = node.push("users", &tag, &image);
        node.pull(&reference).unwrap();
        let found = node.image(&reference).unwrap();
        let found_uid = found.uid.map(|uid| uid.value);
        if user.is_empty() {
            // Root, said or unsaid.
            assert!(matches!(found_uid, None | Some(0)), "{found:?}");
        } else {
            assert_eq!(found_uid, uid, "{user:?}");
        }
        assert_eq!(found.username, username, "{user:?}");
    }
}

#[test]
fn the_id_is_the_same_in_every_message() {
    let node = Node::start();
    let reference = node.base_image();
    let pulled = node.pull(&reference).unwrap();
    let listed = node.list_images().remove(0);
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let status = container.status();
    let list = node.containers(None).remove(0);
    assert_eq!(pulled, listed.id);
    assert_eq!(list.image_id, pulled);
    assert_eq!(status.image_id, pulled);
    assert_eq!(status.image_ref, listed.repo_digests[0]);
}

#[test]
fn the_id_does_not_depend_on_the_registry() {
    let node = Node::start();
    let image = image("same");
    let first = node.push("one/name", "v1", &image);
    let second = node.push("quite/another", "v2", &image);
    assert_eq!(node.pull(&first).unwrap(), node.pull(&second).unwrap());
    let found = node.image(&first).unwrap();
    assert_eq!(found.repo_tags.len(), 2);
    assert_eq!(found.repo_digests.len(), 2);
}

#[test]
fn a_container_may_name_its_image_by_id_and_keeps_what_the_user_wrote() {
    let node = Node::start();
    let reference = node.base_image();
    let id = node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.image = Some(cri::ImageSpec {
        image: id.clone(),
        user_specified_image: reference.clone(),
        ..Default::default()
    });
    let container = pod.start_as(config);
    let status = container.status();
    assert_eq!(status.image_id, id);
    let image = status.image.unwrap();
    assert_eq!(image.user_specified_image, reference);
}

#[test]
fn an_image_in_use_can_be_removed_and_its_container_runs_on() {
    let node = Node::start();
    let reference = node.base_image();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    node.remove_image(&reference).unwrap();
    assert_eq!(node.image(&reference), None);
    assert_eq!(container.exec(&["echo", "still here"]), "still here\n");
    pod.remove();
}

#[test]
fn images_outlive_the_daemon() {
    let node = Node::start();
    let reference = node.push("things/one", "v1", &image("kept"));
    let id = node.pull(&reference).unwrap();
    let before = node.list_images();
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(node.list_images(), before);
    assert_eq!(node.image(&reference).unwrap().id, id);
}

#[test]
fn a_verbose_status_holds_the_image_config() {
    let node = Node::start();
    let reference = node.base_image();
    let request = cri::ImageStatusRequest {
        image: Some(spec(&reference)),
        verbose: true,
    };
    let answer = node.wait(node.images().image_status(request)).unwrap();
    assert!(
        answer
            .info
            .values()
            .any(|text| text.contains("architecture")),
        "{:?}",
        answer.info
    );
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    let diff_ids = info["imageSpec"]["rootfs"]["diff_ids"].as_array().unwrap();
    assert!(!diff_ids.is_empty());
    for diff_id in diff_ids {
        assert!(diff_id.as_str().unwrap().starts_with("sha256:"), "{info}");
    }
}

#[test]
fn an_image_removed_while_in_use_gives_its_space_back_with_its_last_container() {
    let node = Node::start();
    let layer = Layer::new().file("large", 0o644, vec![7; 3_000_000]);
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/large", "1", &image);
    // The base layer stays, the other goes.
    node.base_image();
    let before = node.image_fs().used_bytes.unwrap().value;
    node.pull(&reference).unwrap();
    let pod = node.run_pod("user");
    let container = pod.start_as(pod.container_of(&reference, &["sleep", "1000"]));
    node.remove_image(&reference).unwrap();
    assert_eq!(node.image(&reference), None);
    assert_eq!(
        container.exec(&["sh", "-c", "wc -c < /large"]).trim(),
        "3000000"
    );
    container.stop(0).unwrap();
    container.remove().unwrap();
    berth_tests::eventually("its space is free", || {
        (node.image_fs().used_bytes.unwrap().value == before).then_some(())
    });
}
