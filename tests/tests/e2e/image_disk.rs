//! What images take of disks, and disks that are full.

use berth_tests::{Format, Image, Layer, Node, Packing, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use std::fs;
use std::path::{Path, PathBuf};
use tonic::Code;

/// A file system of a certain size, on which the images are.
pub struct Small {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Small {
    pub fn mount(options: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("berth-small-")
            .tempdir()
            .unwrap();
        let path = dir.path().to_owned();
        mount(
            Some("small"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options),
        )
        .unwrap();
        Self { path, _dir: dir }
    }

    fn node(&self) -> Node {
        self.options().start()
    }

    /// Of a node that has its images there.
    pub fn options(&self) -> berth_tests::node::Options {
        let images = self.path.join("images");
        Node::options().config(&format!("[paths]\nimages = \"{}\"\n", images.display()))
    }

    pub fn free(&self) -> u64 {
        let stat = statvfs(&self.path).unwrap();
        stat.blocks_available() * stat.fragment_size()
    }

    /// Takes room until `left` bytes are free.
    pub fn fill(&self, left: u64) {
        let _ = fs::remove_file(self.path.join("ballast"));
        let take = self.free().saturating_sub(left);
        fs::write(self.path.join("ballast"), vec![1; take as usize]).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Three layers of one and a half MiB each.
pub fn image() -> Image {
    let mut builder = Image::builder(Format::Oci);
    for nth in 0..3u8 {
        let mut layer = Layer::new().file(&format!("large-{nth}"), 0o644, vec![nth; 1_400_000]);
        for small in 0..20 {
            layer = layer.file(&format!("small-{nth}-{small}"), 0o644, "x");
        }
        builder = builder.layer(&layer, Packing::Gzip);
    }
    builder.build()
}

#[test]
fn a_disk_that_is_full_at_any_point_of_a_pull_is_named_and_gets_its_room_back() {
    let small = Small::mount("size=48m");
    let node = small.node();
    let pod = node.run_pod("works");
    let running = pod.start(&["sleep", "1000"]);
    let reference = node.push("things/large", "1", &image());
    let listed = node.list_images();
    let (mut refused, mut pulled) = (0, false);
    for left in (0..16).map(|step| step * 400_000) {
        small.fill(left);
        let before = small.free();
        match node.pull(&reference) {
            Ok(_) => {
                pulled = true;
                break;
            }
            Err(status) => {
                refused += 1;
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                let message = status.message();
                let path = small.path.to_str().unwrap();
                assert!(message.contains(path), "{message}");
                assert!(message.contains("small on"), "{message}");
            }
        }
        assert_eq!(node.list_images(), listed);
        eventually("the room is given back", || {
            (small.free() >= before).then_some(())
        });
        assert_eq!(running.exec(&["echo", "on"]), "on\n");
    }
    assert!(refused > 5, "{refused}");
    assert!(pulled, "there was room in the end");
}

#[test]
fn a_disk_without_inodes_is_named_as_well() {
    let small = Small::mount("size=64m,nr_inodes=400");
    let node = small.node();
    let mut layer = Layer::new();
    for nth in 0..600 {
        layer = layer.file(&format!("file-{nth}"), 0o644, "");
    }
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("things/many", "1", &image);
    let status = node.pull(&reference).unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("400 inodes) is full"), "{status}");
}

#[test]
fn an_import_that_fills_the_disk_says_so() {
    let small = Small::mount("size=24m");
    let node = small.node();
    let reference = node.push("things/large", "1", &image());
    node.pull(&reference).unwrap();
    let archive = node.root().join("image.tar");
    let path = archive.to_str().unwrap();
    let exported = node.berth(&["image", "export", &reference, "-o", path]);
    assert!(exported.status.success());
    node.remove_image(&reference).unwrap();
    small.fill(2_000_000);
    let output = node.berth(&["image", "import", path]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains("small on"), "{stderr}");
    eventually("the room is given back", || {
        (small.free() >= 1_900_000).then_some(())
    });
}

fn du(path: &Path) -> u64 {
    let output = std::process::Command::new("du")
        .args(["-s", "--block-size=1"])
        .arg(path)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn image_fs_info_agrees_with_du_for_images_and_for_containers() {
    let small = Small::mount("size=256m");
    let node = small.node();
    let reference = node.push("things/large", "1", &image());
    node.pull(&reference).unwrap();
    let pod = node.run_pod("writes");
    let writer = pod.start(&[
        "sh",
        "-c",
        "dd if=/dev/zero of=/tmp/x bs=1M count=5 && sleep 1000",
    ]);
    eventually("the file is written", || {
        let size = writer.exec(&["sh", "-c", "stat -c %s /tmp/x 2>/dev/null || true"]);
        (size.trim() == "5242880").then_some(())
    });
    // Measured anew, as the kubelet's first question does.
    node.kill_daemon();
    node.start_daemon();
    let mut images = node.images();
    let info = node
        .wait(images.image_fs_info(berth_proto::runtime_v1::ImageFsInfoRequest {}))
        .unwrap();
    let value = |usage: &berth_proto::runtime_v1::FilesystemUsage| {
        let point = usage.fs_id.clone().unwrap().mountpoint;
        (PathBuf::from(point), usage.used_bytes.unwrap().value)
    };
    let (path, used) = value(&info.image_filesystems[0]);
    assert_eq!(path, small.path.join("images"));
    let counted = du(&path);
    assert!(
        used.abs_diff(counted) <= counted / 100,
        "{used} and {counted}"
    );
    let (path, used) = value(&info.container_filesystems[0]);
    assert_eq!(path, node.root().join("lib/containers"));
    let counted = du(&path);
    assert!(used > 5 << 20);
    assert!(
        used.abs_diff(counted) <= counted / 100,
        "{used} and {counted}"
    );
}
