//! From a pulled image to a container's root file system. Needs root.

mod support;

use berth_image_service::service::PrepareError;
use serde_json::json;
use support::*;

/// A tar whose files' directories are somebody else's layer's business.
fn leaning(path: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, path, content).unwrap();
    builder.into_inner().unwrap()
}

fn directory(path: &str, mode: u32) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(mode);
    header.set_size(0);
    builder
        .append_data(&mut header, path, std::io::empty())
        .unwrap();
    builder.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_that_lean_on_their_parents_are_pulled_and_merged() {
    let tars = [
        directory("deep", 0o700),
        leaning("deep/one", b"1"),
        leaning("deep/two", b"2"),
        tar_of(&[("etc/three", b"3")]),
    ];
    let picture = Picture::of(&tars, "gzip", json!({}));
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.pull(&server.reference()).await.unwrap();
    let read = |path: &str| {
        node.service
            .read_file_in_image(&picture.image_id, path, 100)
            .unwrap()
    };
    for (path, content) in [("/deep/one", "1"), ("/deep/two", "2"), ("/etc/three", "3")] {
        assert_eq!(read(path).as_deref(), Some(content.as_bytes()), "{path}");
    }
    assert_eq!(read("/deep/absent"), None);
    let again = node.pull(&server.reference()).await.unwrap();
    assert_eq!(again.bytes, 0);
    let node = node.reopened();
    assert!(node.service.find(&picture.image_id).is_some());
}

#[tokio::test]
async fn a_containers_layers_outlive_its_image() {
    let picture = Picture::small("container");
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.pull(&server.reference()).await.unwrap();
    let id = "c".repeat(64);
    node.service.prepare(&id, &picture.image_id).unwrap();
    node.service.prepare(&id, &picture.image_id).unwrap();
    assert!(node.service.remove(&server.reference()).await.unwrap());
    drop(node.service.mount_rootfs(&id, None).unwrap());
    assert!(node.service.fs_usage().used_bytes > 0);
    // The layer is still here, so the image costs only its documents.
    let again = node.pull(&server.reference()).await.unwrap();
    assert_eq!(again.bytes, 0);
    node.service.remove(&server.reference()).await.unwrap();
    node.service.remove_container(&id).unwrap();
    node.service.remove_container(&id).unwrap();
    let absent = node.service.prepare(&id, &picture.image_id);
    assert!(matches!(absent, Err(PrepareError::NoImage { .. })));
}
