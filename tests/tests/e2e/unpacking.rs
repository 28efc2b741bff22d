//! What a layer says is what a container sees: every kind of entry, and what
//! an upper layer does to a lower one. Looked at from the host, through the
//! container's root.

use berth_tests::image::{Entry, MTIME, kind};
use berth_tests::node::spec;
use berth_tests::{Container, Format, Image, Layer, Node, Packing};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

/// A running container of the base image with these layers on top, and the path
/// of its root as the host sees it.
fn unpacked<'n>(node: &'n Node, layers: &[Layer]) -> (Container<'n>, PathBuf) {
    let mut builder = Image::builder(Format::Oci).base();
    for layer in layers {
        builder = builder.layer(layer, Packing::Gzip);
    }
    let image = builder.build();
    let reference = node.push("unpacked", &node.fresh("v"), &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod(&node.fresh("pod"));
    let mut config = pod.container(&["sleep", "1000"]);
    config.image = Some(spec(&reference));
    let container = pod.start_as(config);
    let root = PathBuf::from(format!("/proc/{}/root", container.init_pid()));
    (container, root)
}

fn xattr(path: &std::path::Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::lgetxattr(path, name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

#[test]
fn modes_owners_and_times_are_kept() {
    let node = Node::start();
    let layer = Layer::new()
        .entry(Entry::new(kind::DIRECTORY, "dir/", 0o1777).owner(12, 34))
        .entry(
            Entry::new(kind::FILE, "dir/file", 0o640)
                .owner(1000, 2000)
                .data("text"),
        )
        .entry(
            Entry::new(kind::FILE, "suid", 0o6755)
                .owner(0, 50)
                .data("#!"),
        )
        .entry(
            Entry::new(kind::SYMLINK, "link", 0o777)
                .owner(7, 8)
                .link("dir/file"),
        );
    let (_container, root) = unpacked(&node, &[layer]);
    for (path, mode, uid, gid) in [
        ("dir", 0o041_777, 12, 34),
        ("dir/file", 0o100_640, 1000, 2000),
        ("suid", 0o106_755, 0, 50),
        ("link", 0o120_777, 7, 8),
    ] {
        let meta = fs::symlink_metadata(root.join(path)).unwrap();
        assert_eq!(
            (meta.mode(), meta.uid(), meta.gid()),
            (mode, uid, gid),
            "{path}"
        );
        assert_eq!(meta.mtime(), MTIME.cast_signed(), "{path}");
    }
    assert_eq!(fs::read(root.join("dir/file")).unwrap(), b"text");
    assert_eq!(
        fs::read_link(root.join("link")).unwrap(),
        PathBuf::from("dir/file")
    );
}

#[test]
fn hard_links_are_one_file() {
    let node = Node::start();
    let layer = Layer::new()
        .file("one", 0o644, "same")
        .hard_link("two", "one")
        .dir("sub", 0o755)
        .hard_link("sub/three", "one");
    let (_container, root) = unpacked(&node, &[layer]);
    let inode = |path: &str| fs::metadata(root.join(path)).unwrap().ino();
    assert_eq!(inode("one"), inode("two"));
    assert_eq!(inode("one"), inode("sub/three"));
}

#[test]
fn a_hard_link_may_point_into_a_lower_layer() {
    let node = Node::start();
    let lower = Layer::new().file("below", 0o640, "from below");
    let upper = Layer::new().hard_link("linked", "below");
    let (_container, root) = unpacked(&node, &[lower, upper]);
    assert_eq!(fs::read(root.join("linked")).unwrap(), b"from below");
}

#[test]
fn devices_and_fifos_are_what_they_are() {
    let node = Node::start();
    let device = |kind, name: &str, major, minor| {
        let mut entry = Entry::new(kind, name, 0o600);
        entry.device = (major, minor);
        entry
    };
    let layer = Layer::new()
        .entry(device(kind::CHAR_DEVICE, "null", 1, 3))
        .entry(device(kind::BLOCK_DEVICE, "loop", 7, 0))
        .entry(Entry::new(kind::FIFO, "pipe", 0o600));
    let (_container, root) = unpacked(&node, &[layer]);
    let meta = |path: &str| fs::symlink_metadata(root.join(path)).unwrap();
    assert!(meta("null").file_type().is_char_device());
    assert_eq!(meta("null").rdev(), nix::sys::stat::makedev(1, 3));
    assert!(meta("loop").file_type().is_block_device());
    assert!(meta("pipe").file_type().is_fifo());
}

#[test]
fn extended_attributes_are_kept() {
    let node = Node::start();
    // cap_net_raw=ep. Source: linux/capability.h, vfs_cap_data, revision 2.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let layer = Layer::new().entry(
        Entry::new(kind::FILE, "file", 0o755)
            .data("x")
            .xattr("user.berth", b"a=b\nc")
            .xattr("security.capability", &capability),
    );
    let (_container, root) = unpacked(&node, &[layer]);
    assert_eq!(
        xattr(&root.join("file"), "user.berth").as_deref(),
        Some(&b"a=b\nc"[..])
    );
    let found = xattr(&root.join("file"), "security.capability").expect("a file capability");
    assert_eq!(found, capability);
}

#[test]
fn long_names_of_both_kinds_are_kept() {
    let node = Node::start();
    let gnu = format!("{}/{}", "d".repeat(90), "f".repeat(120));
    let target = format!("/{}", "t".repeat(180));
    let pax = format!("{}/{}", "p".repeat(100), "q".repeat(200));
    let mut with_pax = Entry::new(kind::FILE, "short", 0o644).data("by pax");
    with_pax
        .pax
        .push(("path".to_owned(), pax.clone().into_bytes()));
    with_pax
        .pax
        .push(("mtime".to_owned(), b"1600000000.25".to_vec()));
    let layer = Layer::new()
        .file(&gnu, 0o644, "by gnu")
        .symlink("long-link", &target)
        .entry(with_pax);
    let (_container, root) = unpacked(&node, &[layer]);
    assert_eq!(fs::read(root.join(gnu)).unwrap(), b"by gnu");
    assert_eq!(
        fs::read_link(root.join("long-link")).unwrap(),
        PathBuf::from(target)
    );
    assert_eq!(fs::read(root.join(&pax)).unwrap(), b"by pax");
    assert_eq!(
        fs::metadata(root.join(&pax)).unwrap().mtime(),
        1_600_000_000
    );
    assert!(!root.join("short").exists());
}

#[test]
fn names_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let node = Node::start();
    let name = b"caf\xe9";
    let layer = Layer::new().entry(Entry::new(kind::FILE, *name, 0o644).data("latin1"));
    let (_container, root) = unpacked(&node, &[layer]);
    let path = root.join(std::ffi::OsStr::from_bytes(name));
    assert_eq!(fs::read(path).unwrap(), b"latin1");
}

#[test]
fn a_whiteout_hides_what_is_below() {
    let node = Node::start();
    let lower = Layer::new()
        .file("gone", 0o644, "low")
        .file("kept", 0o644, "low")
        .dir("tree", 0o755)
        .file("tree/a", 0o644, "low")
        .file("tree/b", 0o644, "low");
    let upper = Layer::new()
        .whiteout("gone")
        .whiteout("tree/a")
        .file("kept", 0o644, "up");
    let (container, root) = unpacked(&node, &[lower, upper]);
    assert!(!root.join("gone").exists());
    assert!(!root.join("tree/a").exists());
    assert_eq!(fs::read(root.join("tree/b")).unwrap(), b"low");
    assert_eq!(fs::read(root.join("kept")).unwrap(), b"up");
    // And no trace of how that was said.
    assert_eq!(container.exec(&["ls", "-A", "/tree"]), "b\n");
    assert!(!container.exec(&["ls", "-A", "/"]).contains(".wh."));
}

#[test]
fn a_whiteout_hides_a_whole_directory() {
    let node = Node::start();
    let lower = Layer::new().dir("tree", 0o755).file("tree/a", 0o644, "low");
    let upper = Layer::new().whiteout("tree");
    let again = Layer::new().dir("tree", 0o700).file("tree/c", 0o644, "new");
    let (_container, root) = unpacked(&node, &[lower.clone(), upper.clone()]);
    assert!(!root.join("tree").exists());
    let (container, root) = unpacked(&node, &[lower, upper, again]);
    assert_eq!(container.exec(&["ls", "-A", "/tree"]), "c\n");
    assert_eq!(
        fs::metadata(root.join("tree")).unwrap().mode() & 0o777,
        0o700
    );
}

#[test]
fn an_opaque_directory_hides_all_that_is_below() {
    let node = Node::start();
    let lower = Layer::new()
        .dir("tree", 0o755)
        .file("tree/a", 0o644, "low")
        .dir("tree/sub", 0o755)
        .file("tree/sub/x", 0o644, "low");
    let upper = Layer::new()
        .dir("tree", 0o755)
        .file("tree/new", 0o644, "up")
        .opaque("tree")
        .file("tree/newer", 0o644, "up");
    let (container, _root) = unpacked(&node, &[lower, upper]);
    assert_eq!(container.exec(&["ls", "-A", "/tree"]), "new\nnewer\n");
}

#[test]
fn a_file_may_replace_a_directory_and_the_other_way_round() {
    let node = Node::start();
    let lower = Layer::new()
        .dir("was-dir", 0o755)
        .file("was-dir/inside", 0o644, "low")
        .file("was-file", 0o644, "low");
    let upper = Layer::new()
        .file("was-dir", 0o644, "now a file")
        .dir("was-file", 0o755)
        .file("was-file/inside", 0o644, "now a directory");
    let (_container, root) = unpacked(&node, &[lower, upper]);
    assert_eq!(fs::read(root.join("was-dir")).unwrap(), b"now a file");
    assert_eq!(
        fs::read(root.join("was-file/inside")).unwrap(),
        b"now a directory"
    );
}

#[test]
fn directories_nobody_mentions_are_made() {
    let node = Node::start();
    let layer = Layer::new().file("quite/deep/down/file", 0o644, "here");
    let (_container, root) = unpacked(&node, &[layer]);
    assert_eq!(
        fs::read(root.join("quite/deep/down/file")).unwrap(),
        b"here"
    );
    assert_eq!(
        fs::metadata(root.join("quite")).unwrap().mode() & 0o777,
        0o755
    );
}

#[test]
fn a_directory_nobody_mentions_again_keeps_its_mode_of_below() {
    let node = Node::start();
    let lower =
        Layer::new().entry(Entry::new(kind::DIRECTORY, "private/", 0o700).owner(1000, 1000));
    let upper = Layer::new().file("private/file", 0o644, "up");
    let (_container, root) = unpacked(&node, &[lower, upper]);
    let meta = fs::metadata(root.join("private")).unwrap();
    assert_eq!((meta.mode() & 0o777, meta.uid()), (0o700, 1000));
}

#[test]
fn leading_dots_and_slashes_of_names_mean_the_root() {
    let node = Node::start();
    let layer = Layer::new()
        .entry(Entry::new(kind::DIRECTORY, "./", 0o755))
        .file("./dotted", 0o644, "d")
        .dir("./sub", 0o755)
        .file("./sub/dotted", 0o644, "d");
    let (_container, root) = unpacked(&node, &[layer]);
    assert!(root.join("dotted").exists() && root.join("sub/dotted").exists());
}

#[test]
fn a_later_entry_of_one_layer_wins() {
    let node = Node::start();
    let layer = Layer::new()
        .file("twice", 0o600, "first")
        .file("twice", 0o644, "second");
    let (_container, root) = unpacked(&node, &[layer]);
    assert_eq!(fs::read(root.join("twice")).unwrap(), b"second");
    assert_eq!(
        fs::metadata(root.join("twice")).unwrap().mode() & 0o777,
        0o644
    );
}

#[test]
fn an_empty_layer_is_a_layer() {
    let node = Node::start();
    let (container, _root) = unpacked(&node, &[Layer::new()]);
    assert_eq!(container.exec(&["echo", "runs"]), "runs\n");
}

#[test]
fn a_layer_of_a_hundred_thousand_entries_is_unpacked_and_removed() {
    let node = Node::start();
    let mut layer = Layer::new();
    for dir in 0..100 {
        layer = layer.dir(&format!("many/{dir}"), 0o755);
        for file in 0..999 {
            layer = layer.file(&format!("many/{dir}/{file}"), 0o644, "");
        }
    }
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("many", "1", &image);
    node.pull(&reference).unwrap();
    let inodes = || {
        let images = node.image_fs();
        images.inodes_used.unwrap().value
    };
    assert!(inodes() >= 100_000, "{}", inodes());
    node.remove_image(&reference).unwrap();
    berth_tests::eventually("the inodes are free", || (inodes() < 1_000).then_some(()));
}

#[test]
fn an_image_of_many_layers_runs() {
    let node = Node::start();
    let layers: Vec<_> = (0..100)
        .map(|n| {
            Layer::new()
                .file(&format!("layer-{n}"), 0o644, "x")
                .file("top", 0o644, n.to_string())
        })
        .collect();
    let (container, root) = unpacked(&node, &layers);
    assert_eq!(container.exec(&["cat", "/top"]), "99");
    for n in 0..100 {
        assert!(root.join(format!("layer-{n}")).exists(), "layer {n}");
    }
}
