//! What is stored is what was unpacked; where it is not, that is found, and mended by the next
//! pull and nothing more.

mod support;

use berth_image_service::layer::{Damage, Finding, LayerId, Pace};
use berth_image_service::service::{ImageService, Scrubbing, Verified};
use serde_json::json;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use support::{Node, Picture, Server, tar_of};

fn two_layers() -> Picture {
    let large = vec![7; 300_000];
    let lower = tar_of(&[("lower", b"below"), ("large", &large)]);
    let upper = tar_of(&[("upper", b"above")]);
    Picture::of(&[lower, upper], "gzip", json!({}))
}

fn layers(node: &Node) -> PathBuf {
    node.dir.path().join("images/layers")
}

fn file_of(node: &Node, layer: &LayerId, name: &str) -> PathBuf {
    layers(node).join(layer.to_string()).join("fs").join(name)
}

fn verified(service: &ImageService) -> Vec<Verified> {
    let mut all = Vec::new();
    service.verify(&mut Pace::full(), &mut |one| {
        all.push(one);
        true
    });
    all
}

fn read(service: &ImageService, id: &str, name: &str) -> Vec<u8> {
    let mount = service.mount_image(id).unwrap();
    fs::read(format!("/proc/self/fd/{}/{name}", mount.as_raw_fd())).unwrap()
}

fn blobs_fetched(server: &Server) -> Vec<String> {
    let seen = server.seen();
    let paths = seen.iter().filter_map(|request| {
        let (_, digest) = request.path().rsplit_once("/blobs/")?;
        Some(digest.to_owned())
    });
    paths.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_found_by_file_and_only_its_layer_is_fetched_again() {
    let picture = two_layers();
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let id = node.pull(&server.reference()).await.unwrap().image_id;
    let image = node.service.find(&id).unwrap();
    for one in verified(&node.service) {
        assert!(matches!(one.finding, Finding::Whole { .. }), "{one:?}");
        assert_eq!(one.images, std::slice::from_ref(&id));
    }
    node.service.prepare("user", &id).unwrap();
    let rootfs = node.service.mount_rootfs("user", None).unwrap();

    // One bit, and the file looks the same from outside.
    let path = file_of(&node, &image.layers[0], "large");
    let mut content = fs::read(&path).unwrap();
    content[200_000] ^= 1;
    fs::write(&path, content).unwrap();
    let found = verified(&node.service);
    let damaged: Vec<_> = found
        .iter()
        .filter(|one| !matches!(one.finding, Finding::Whole { .. }))
        .collect();
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    let large = Damage::Content {
        path: "large".into(),
    };
    assert_eq!(damaged[0].finding, Finding::Damaged(large));
    assert_eq!(damaged[0].images, std::slice::from_ref(&id));

    // Nobody is offered the image now, and a restart does not forget that.
    assert_eq!(node.service.list(), []);
    assert!(node.service.find(&server.reference()).is_none());
    let node = node.reopened();
    assert_eq!(node.service.list(), []);
    let (layers_known, images_known) = node.service.not_whole();
    assert_eq!(layers_known, [image.layers[0].to_string()]);
    assert_eq!(images_known, std::slice::from_ref(&id));

    let before = blobs_fetched(&server).len();
    node.pull(&server.reference()).await.unwrap();
    assert_eq!(
        blobs_fetched(&server)[before..],
        [picture.layers[0].clone()]
    );
    assert_eq!(read(&node.service, &id, "large"), vec![7; 300_000]);
    assert!(
        verified(&node.service)
            .iter()
            .all(|one| matches!(one.finding, Finding::Whole { .. }))
    );
    // Who runs goes on with the files it has; they go when it does.
    let path = format!("/proc/self/fd/{}/lower", rootfs.as_raw_fd());
    assert_eq!(fs::read(path).unwrap(), b"below");
    let old = |node: &Node| {
        let names = fs::read_dir(layers(node)).unwrap();
        names
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_string_lossy().starts_with("old-")
            })
            .count()
    };
    assert_eq!(old(&node), 1);
    drop(rootfs);
    node.service.remove_container("user").unwrap();
    node.service.remove("nothing/of:this-name").await.unwrap();
    node.service.prune(false);
    assert_eq!(old(&node), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_a_short_and_an_unreadable_file_are_told_apart() {
    let picture = two_layers();
    let server = Server::of(picture);
    for (harm, expected) in [
        (
            (|path: &Path| fs::remove_file(path).unwrap()) as fn(&Path),
            Damage::Missing {
                path: "large".into(),
            },
        ),
        (
            |path: &Path| {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(4096)
                    .unwrap();
            },
            Damage::Length {
                path: "large".into(),
                expected: 300_000,
                found: 4096,
            },
        ),
        (
            |path: &Path| {
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
            },
            Damage::Missing {
                path: "large".into(),
            },
        ),
    ] {
        let node = Node::new();
        node.hosts_toml(
            &server.name(),
            &format!("server = \"http://{}\"\n", server.name()),
        );
        let id = node.pull(&server.reference()).await.unwrap().image_id;
        let image = node.service.find(&id).unwrap();
        harm(&file_of(&node, &image.layers[0], "large"));
        let found = verified(&node.service);
        let damaged = found.iter().map(|one| &one.finding);
        let damaged = damaged.filter(|finding| !matches!(finding, Finding::Whole { .. }));
        assert_eq!(damaged.collect::<Vec<_>>(), [&Finding::Damaged(expected)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_manifest_or_config_is_found_and_comes_back() {
    let picture = two_layers();
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let id = node.pull(&server.reference()).await.unwrap().image_id;
    let hex = id.strip_prefix("sha256:").unwrap();
    let config = node.dir.path().join("images/content/sha256").join(hex);
    fs::write(&config, b"{}").unwrap();
    let found = verified(&node.service);
    assert_eq!(found[0].what, id);
    assert_eq!(found[0].finding, Finding::Gone);
    // The image is as it was: its record has what it needs.
    assert_eq!(node.service.list().len(), 1);
    node.pull(&server.reference()).await.unwrap();
    let mut bytes = Vec::new();
    File::open(&config)
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    assert_eq!(bytes, picture.blobs[&id]);
}

/// Space and inodes of everything below, each inode once: what `du` counts.
fn du(path: &Path) -> (u64, u64) {
    let mut seen = std::collections::HashSet::new();
    let mut pending = vec![path.to_owned()];
    let mut bytes = 0;
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if seen.insert(metadata.ino()) {
            bytes += metadata.blocks() * 512;
        }
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            pending.extend(entries.map(|entry| entry.unwrap().path()));
        }
    }
    (bytes, seen.len() as u64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_images_take_is_what_du_counts() {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for n in 0..2000 {
        files.push((
            format!("many/name-that-fills-a-directory-{n}"),
            vec![1; n % 9],
        ));
    }
    files.push(("large".into(), vec![2; 3_000_001]));
    let entries: Vec<(&str, &[u8])> = files.iter().map(|(n, c)| (&**n, &**c)).collect();
    let picture = Picture::of(
        &[tar_of(&entries), tar_of(&[("x", b"y")])],
        "zstd",
        json!({}),
    );
    let server = Server::of(picture);
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let dir = node.dir.path().join("images");
    let empty = node.service.fs_usage();
    assert_eq!((empty.used_bytes, empty.inodes), du(&dir));
    node.pull(&server.reference()).await.unwrap();
    let usage = node.service.fs_usage();
    assert_eq!(usage.mountpoint, dir);
    let (bytes, inodes) = du(&dir);
    assert_eq!(usage.inodes, inodes);
    // Extents that the file system kept in a block of their own.
    let difference = usage.used_bytes.abs_diff(bytes);
    assert!(
        difference <= bytes / 200,
        "{} and {bytes}",
        usage.used_bytes
    );
    let node = node.reopened();
    assert_eq!(node.service.fs_usage(), usage);
    node.service.remove(&server.reference()).await.unwrap();
    node.service.finish_removals();
    assert_eq!(node.service.fs_usage(), empty);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_with_many_layers_takes_well_under_a_second() {
    let node = Node::new();
    let server = Server::of(two_layers());
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let id = node.pull(&server.reference()).await.unwrap().image_id;
    let image = node.service.find(&id).unwrap();
    // The same layer under a thousand names, one of them unfinished.
    let one = layers(&node).join(image.layers[1].to_string());
    let record = fs::read_to_string(one.join("layer.rec")).unwrap();
    for n in 0..1000 {
        let name = format!("{n:064x}");
        let copy = layers(&node).join(&name);
        fs::create_dir_all(copy.join("fs")).unwrap();
        fs::copy(one.join("recipe.zst"), copy.join("recipe.zst")).unwrap();
        let (_, payload) = record.split_once('\n').unwrap();
        let payload = payload.replace(&image.layers[1].to_string(), &name);
        let header = format!(
            "berth-record 1 layer 1 {} {:08x}\n",
            payload.len(),
            crc32fast::hash(payload.as_bytes())
        );
        fs::write(copy.join("layer.rec"), header + &payload).unwrap();
        if n != 500 {
            fs::write(copy.join("synced"), "").unwrap();
        } else {
            fs::remove_file(copy.join("layer.rec")).unwrap();
        }
    }
    let begun = std::time::Instant::now();
    let node = node.reopened();
    let took = begun.elapsed();
    assert_eq!(node.service.list().len(), 1);
    node.service.finish_removals();
    assert!(!layers(&node).join(format!("{:064x}", 500)).exists());
    // An unoptimised build on a busy machine; without a build's weight it is some 30 ms.
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_is_slow_on_purpose_finds_damage_and_is_not_repeated_at_once() {
    let server = Server::of(two_layers());
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let id = node.pull(&server.reference()).await.unwrap().image_id;
    let scrubbing = Scrubbing {
        every: std::time::Duration::from_secs(3600),
        bytes_per_second: 600_000.try_into().unwrap(),
    };
    let begun = std::time::Instant::now();
    assert!(node.service.scrub_if_due(scrubbing));
    // 300,000 bytes at 600,000 a second.
    assert!(begun.elapsed() >= std::time::Duration::from_millis(400));
    assert_eq!(node.service.list().len(), 1);
    assert!(!node.service.scrub_if_due(scrubbing));
    let node = node.reopened();
    assert!(!node.service.scrub_if_due(scrubbing));

    let image = node.service.find(&id).unwrap();
    fs::write(file_of(&node, &image.layers[1], "upper"), "ABOVE").unwrap();
    fs::remove_file(node.dir.path().join("images/scrub.rec")).unwrap();
    assert!(node.service.scrub_if_due(scrubbing));
    assert_eq!(node.service.list(), []);
}
