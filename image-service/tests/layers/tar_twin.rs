//! What GNU tar extracts and what we unpack are the same, for archives that
//! GNU tar makes in every format it has.

use crate::Place;
use berth_image_service::digest::Digest;
use berth_image_service::unpack::Compression;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

/// Everything there is to know of one name in a tree.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    pub mode: u32,
    pub owner: (u32, u32),
    pub device: u64,
    pub mtime: (i64, i64),
    pub links: u64,
    /// The first name of the same inode.
    pub same_as: Option<String>,
    /// Of a file the data, of a link the target.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// A tree by path; the root is "".
pub fn read_tree(root: &Path) -> BTreeMap<String, Node> {
    let mut nodes = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    read_below(root, "", &mut nodes);
    // Names in order, so that the first name of an inode does not depend on the directory's order.
    let names: Vec<String> = nodes.keys().cloned().collect();
    for name in names {
        let meta = std::fs::symlink_metadata(root.join(&name)).unwrap();
        if !meta.is_dir() && meta.nlink() > 1 {
            let first = inodes.entry(meta.ino()).or_insert_with(|| name.clone());
            nodes.get_mut(&name).unwrap().same_as = Some(first.clone());
        }
    }
    nodes
}

fn read_below(root: &Path, name: &str, nodes: &mut BTreeMap<String, Node>) {
    let path = root.join(name);
    let meta = std::fs::symlink_metadata(&path).unwrap();
    let file_type = meta.file_type();
    let content = if file_type.is_file() {
        std::fs::read(&path).unwrap()
    } else if file_type.is_symlink() {
        let target = std::fs::read_link(&path).unwrap();
        target.as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    nodes.insert(
        name.to_owned(),
        Node {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            device: meta.rdev(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            links: if meta.is_dir() { 0 } else { meta.nlink() },
            same_as: None,
            content,
            xattrs: read_xattrs(&path),
        },
    );
    if meta.is_dir() {
        for child in crate::names(&path) {
            let child = if name.is_empty() {
                child
            } else {
                format!("{name}/{child}")
            };
            read_below(root, &child, nodes);
        }
    }
}

fn read_xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut list = vec![0u8; 64 << 10];
    let count = rustix::fs::llistxattr(path, &mut list).unwrap();
    list[..count]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0u8; 64 << 10];
            let count = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            value.truncate(count);
            (String::from_utf8(name.to_vec()).unwrap(), value)
        })
        .collect()
}

fn set_mtime(path: &Path, seconds: i64, nanoseconds: i64) {
    let at = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: at,
        last_modification: at,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Some of everything a format can hold.
fn make_everything(root: &Path, rich: bool) {
    let at = |name: &str| root.join(name);
    let write = |name: &str, data: &[u8]| std::fs::write(root.join(name), data).unwrap();
    std::fs::create_dir_all(at("usr/bin")).unwrap();
    std::fs::create_dir(at("tmp")).unwrap();
    std::fs::create_dir(at("group")).unwrap();
    std::fs::create_dir(at("group/below")).unwrap();
    std::fs::create_dir(at("unreadable")).unwrap();
    write("empty", b"");
    write("block", &[7; 512]);
    write("big", &b"0123456789abcdef".repeat(100_000));
    write("usr/bin/su", b"#!su");
    write("unreadable/inside", b"x");
    write("group/owned", b"g");
    write("name with spaces and \u{e4}\n", b"odd");
    std::fs::hard_link(at("usr/bin/su"), at("usr/bin/su2")).unwrap();
    std::fs::hard_link(at("usr/bin/su"), at("another")).unwrap();
    std::os::unix::fs::symlink("usr/bin", at("bin")).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", at("dangling")).unwrap();
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(
            CWD,
            root.join(name),
            kind,
            Mode::from_raw_mode(0o600),
            device,
        )
        .unwrap();
    };
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node(
        "disk",
        FileType::BlockDevice,
        rustix::fs::makedev(259, 70_000),
    );
    node("fifo", FileType::Fifo, 0);
    for (name, uid, gid) in [
        ("usr/bin/su", 0, 42),
        ("big", 1000, 1000),
        ("bin", 12, 34),
        ("group", 0, 50),
        ("group/owned", 7, 8),
        ("unreadable", 65534, 65534),
        ("null", 1, 2),
        ("fifo", 3, 4),
    ] {
        chown(&at(name), uid, gid);
    }
    for (name, mode) in [
        ("usr/bin/su", 0o6755),
        ("tmp", 0o1777),
        ("group", 0o2775),
        ("group/below", 0o755),
        ("unreadable", 0),
        ("unreadable/inside", 0),
        ("null", 0o666),
        ("fifo", 0o622),
        ("empty", 0o777),
        ("", 0o711),
    ] {
        chmod(&at(name), mode);
    }
    if rich {
        let long = "l".repeat(200);
        std::fs::create_dir_all(at(&format!("{long}/{long}"))).unwrap();
        write(&format!("{long}/{long}/file"), b"far away");
        std::os::unix::fs::symlink("t/".repeat(300), at("long link")).unwrap();
        std::fs::hard_link(at(&format!("{long}/{long}/file")), at("near")).unwrap();
        chown(&at("empty"), 3_000_000, 4_000_000_000);
    }
    set_mtime(&at("empty"), 1_700_000_000, 0);
    set_mtime(&at("dangling"), 12, 0);
}

/// What only PAX can say.
fn make_pax(root: &Path) {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for (name, key, value) in [
        ("usr/bin/su", "security.capability", &capability[..]),
        ("big", "user.newline", b"a\nb\0c=d"),
        ("tmp", "user.dir", b"1"),
    ] {
        rustix::fs::lsetxattr(root.join(name), key, value, XattrFlags::empty()).unwrap();
    }
    set_mtime(&root.join("big"), 1_234_567_890, 123_456_789);
    set_mtime(&root.join("another"), -5, 250_000_000);
    set_mtime(&root.join("bin"), 99, 1);
    set_mtime(&root.join("usr/bin"), 5_000_000_000, 999_999_999);
    set_mtime(root, 7, 7);
}

fn tar(args: &[&str]) {
    let status = Command::new("tar").args(args).status().unwrap();
    assert!(status.success(), "tar {args:?}");
}

#[track_caller]
fn assert_same(ours: &BTreeMap<String, Node>, theirs: &BTreeMap<String, Node>) {
    let names = |tree: &BTreeMap<String, Node>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs));
    for (name, node) in ours {
        let twin = &theirs[name];
        if node != twin {
            let brief = |node: &Node| {
                format!(
                    "mode {:o} owner {:?} device {:x} mtime {:?} links {} same as {:?} xattrs {:?} {} bytes",
                    node.mode,
                    node.owner,
                    node.device,
                    node.mtime,
                    node.links,
                    node.same_as,
                    node.xattrs,
                    node.content.len()
                )
            };
            panic!("{name:?}\n ours  {}\n theirs {}", brief(node), brief(twin));
        }
    }
}

fn compare(format: &str, rich: bool, pax: bool) {
    let place = Place::new();
    let source = place.dir.path().join("source");
    let theirs = place.dir.path().join("theirs");
    let archive = place.dir.path().join("archive.tar");
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    make_everything(&source, rich);
    if pax {
        make_pax(&source);
    }
    let mut make = vec!["--numeric-owner", "--format", format];
    let both = ["--xattrs", "--xattrs-include=*"];
    if pax {
        make.extend(both);
    }
    let (source, archive) = (source.to_str().unwrap(), archive.to_str().unwrap());
    make.extend(["-C", source, "-cf", archive, "."]);
    tar(&make);
    let mut extract = vec!["--numeric-owner", "--same-owner", "-p"];
    if pax {
        extract.extend(both);
    }
    extract.extend(["-C", theirs.to_str().unwrap(), "-xf", archive]);
    tar(&extract);

    let bytes = std::fs::read(archive).unwrap();
    let layer = place
        .unpack_bytes(&Digest::sha256(&bytes), Compression::None, bytes.as_slice())
        .unwrap();
    let ours = read_tree(&place.fs(&layer));
    assert_same(&ours, &read_tree(&theirs));
    // Hard links are names, not inodes.
    let inodes = ours
        .iter()
        .filter(|(name, node)| node.same_as.as_ref().is_none_or(|first| first == *name))
        .count();
    assert_eq!(layer.inodes, inodes as u64);
    assert!(layer.has_root);
    let root = std::fs::File::open(place.fs(&layer)).unwrap().into();
    let measured = berth_image_service::layer::walk::measure(&root).unwrap();
    assert_eq!(measured.inodes, layer.inodes);
    assert!(
        measured.bytes.abs_diff(layer.bytes) <= 8 * 4096,
        "{measured:?} {layer:?}"
    );
}

#[test]
fn pax_archives_unpack_as_gnu_tar_extracts_them() {
    compare("pax", true, true);
}

#[test]
fn gnu_archives_unpack_as_gnu_tar_extracts_them() {
    compare("gnu", true, false);
}

#[test]
fn oldgnu_archives_unpack_as_gnu_tar_extracts_them() {
    compare("oldgnu", true, false);
}

#[test]
fn ustar_archives_unpack_as_gnu_tar_extracts_them() {
    compare("ustar", false, false);
}

#[test]
fn v7_archives_unpack_as_gnu_tar_extracts_them() {
    let place = Place::new();
    let source = place.dir.path().join("source");
    let archive = place.dir.path().join("archive.tar");
    std::fs::create_dir_all(source.join("a/b")).unwrap();
    std::fs::write(source.join("a/b/c"), "v7").unwrap();
    std::os::unix::fs::symlink("b/c", source.join("a/link")).unwrap();
    std::fs::hard_link(source.join("a/b/c"), source.join("a/hard")).unwrap();
    for name in ["a/b/c", "a/link", "a/b", "a", ""] {
        set_mtime(&source.join(name), 1000, 0);
    }
    let (from, to) = (source.to_str().unwrap(), archive.to_str().unwrap());
    tar(&["--numeric-owner", "--format=v7", "-C", from, "-cf", to, "."]);
    let bytes = std::fs::read(&archive).unwrap();
    let layer = place
        .unpack_bytes(&Digest::sha256(&bytes), Compression::None, bytes.as_slice())
        .unwrap();
    assert_same(&read_tree(&place.fs(&layer)), &read_tree(&source));
}
