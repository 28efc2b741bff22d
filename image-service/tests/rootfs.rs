//! From a pulled image to a container's root file system. Needs root.

mod support;

use berth_image_service::service::PrepareError;
use serde_json::json;
use std::time::Duration;
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

/// Counts the requests for each layer of `picture`.
fn fetches(server: &Server, picture: &Picture) -> Vec<usize> {
    let count = |digest: &String| {
        server.count(|request| request.path().ends_with(&format!("/blobs/{digest}")))
    };
    picture.layers.iter().map(count).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_that_lean_wait_for_their_parents_and_are_downloaded_once() {
    // More than a connection, the kernel and we together hold back.
    let large = noise(7, 24 << 20);
    let tars = [
        [
            &directory("deep", 0o700)[..512],
            &leaning("deep/noise", &noise(3, 1 << 20)),
        ]
        .concat(),
        leaning("deep/one", &large),
        leaning("deep/two", b"2"),
    ];
    let picture = Picture::of(&tars, "tar", json!({}));
    let (there, lowest) = (picture.clone(), picture.layers[0].clone());
    let server = Server::start(move |request| {
        let mut reply = serve(&there, request);
        if request.path().ends_with(&lowest) {
            // Longer than the registry may be silent: that we do not read is not its fault.
            reply.trickle = Some((32 << 10, Duration::from_millis(100)));
        }
        reply
    });
    let node = Node::new();
    let pulled = node.pull(&server.reference()).await.unwrap();
    assert_eq!(fetches(&server, &picture), [1, 1, 1]);
    let sizes = picture
        .layers
        .iter()
        .map(|digest| picture.blobs[digest].len() as u64);
    assert_eq!(pulled.bytes, sizes.sum::<u64>());
    let read = |path: &str| {
        node.service
            .read_file_in_image(&picture.image_id, path, 32 << 20)
            .unwrap()
    };
    assert!(read("/deep/one").as_deref() == Some(&large[..]));
    assert_eq!(read("/deep/two").as_deref(), Some(&b"2"[..]));
    assert!(read("/deep/noise").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulls_whose_leaning_layers_stand_in_each_others_way_all_end() {
    // Each leans on what is below it, in another order in another image.
    let (p, x) = (leaning("deep/p", b"p"), leaning("deep/x", b"x"));
    let (a, b) = (directory("deep", 0o700), directory("deep", 0o750));
    let y = leaning("deep/y", b"y");
    let images = [
        vec![a.clone(), p.clone(), x.clone()],
        vec![b, x.clone(), p.clone()],
        vec![a, p, x, y],
    ]
    .map(|tars| Picture::of(&tars, "gzip", json!({})));
    for (max_layers, max_layer_downloads) in [(1, 3), (2, 2), (8, 1), (8, 3)] {
        let there = images.clone();
        let server = Server::start(move |request| {
            let nth = |name: &str| request.path().contains(&format!("/{name}/"));
            let mut reply = match there.iter().zip(["i0", "i1", "i2"]).find(|(_, n)| nth(n)) {
                Some((picture, _)) => serve(picture, request),
                None => Reply::status(404),
            };
            reply.trickle = Some((200, Duration::from_millis(5)));
            reply
        });
        let node = Node::with(|settings| {
            settings.max_layers = max_layers;
            settings.max_layer_downloads = max_layer_downloads;
        });
        let pulls = (0..3).map(|nth| {
            let reference = format!("{}/i{nth}:1", server.address);
            let node = &node;
            async move { node.pull(&reference).await.map(drop) }
        });
        let all = futures_util::future::try_join_all(pulls);
        let ended = tokio::time::timeout(Duration::from_secs(60), all).await;
        ended.expect("the pulls wait for each other").unwrap();
        for picture in &images {
            for (path, content) in [("/deep/p", "p"), ("/deep/x", "x")] {
                let read = node.service.read_file_in_image(&picture.image_id, path, 10);
                assert_eq!(read.unwrap().as_deref(), Some(content.as_bytes()));
            }
        }
        // What stands alone and what has the same layers below comes once; one copy of the
        // others is needed above each of two parents.
        assert_eq!(fetches(&server, &images[2]), [1, 2, 2, 1]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_waits_for_its_parents_ends_with_them() {
    let tars = [
        directory("deep", 0o700),
        leaning("deep/one", &noise(7, 24 << 20)),
    ];
    let picture = Picture::of(&tars, "tar", json!({}));
    let (there, lowest) = (picture.clone(), picture.layers[0].clone());
    let server = Server::start(move |request| {
        let mut reply = serve(&there, request);
        if request.path().ends_with(&lowest) {
            // Right to the last byte, slowly.
            if let Some(last) = reply.body.last_mut() {
                *last ^= 1;
            }
            reply.trickle = Some((64, Duration::from_millis(20)));
        }
        reply
    });
    let node = Node::new();
    let reference = server.reference();
    let refused = node.refused(&reference);
    let said = tokio::time::timeout(Duration::from_secs(60), refused).await;
    let said = said.expect("the upper layer waits for ever");
    assert!(said.contains(&picture.layers[0]), "{said}");
    assert_eq!(fetches(&server, &picture)[1], 1);
    wait_for("the half-made layer is gone", || {
        let left = std::fs::read_dir(node.dir.path().join("images/layers")).unwrap();
        left.flatten().all(|entry| entry.file_name() == "empty")
    });
}
