//! Layers seen as a container sees them: through an overlay that is never attached.

use crate::Place;
use crate::archive::{Entry, Tar};
use berth_image_service::layer::{LayerId, LayerInfo};
use berth_image_service::snapshot::{
    SnapshotError, Snapshots, mount_readonly, read_in_image, read_in_mount,
};
use berth_image_service::unpack::UnpackError;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

fn through(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", mount.as_raw_fd()).into()
}

fn ids(layers: &[&LayerInfo]) -> Vec<LayerId> {
    layers.iter().map(|layer| layer.id.clone()).collect()
}

impl Place {
    fn view(&self, layers: &[&LayerInfo]) -> OwnedFd {
        mount_readonly(&self.store, &ids(layers)).unwrap()
    }

    fn snapshots(&self) -> Snapshots {
        Snapshots::open(&self.dir.path().join("containers"), &self.store).unwrap()
    }
}

fn text(mount: &OwnedFd, path: &str) -> Option<String> {
    let bytes = read_in_mount(mount, path, 1 << 20).unwrap()?;
    Some(String::from_utf8(bytes).unwrap())
}

/// Everything below the mount, one line a name: what two mounts are compared by.
fn listing(mount: &OwnedFd) -> Vec<String> {
    let tree = crate::tar_twin::read_tree(&through(mount));
    let line = |(name, node): (&String, &crate::tar_twin::Node)| {
        let content = String::from_utf8_lossy(&node.content).into_owned();
        format!("{name} {:o} {:?} {content}", node.mode, node.owner)
    };
    tree.iter().map(line).collect()
}

#[test]
fn a_whiteout_hides_what_is_below() {
    let place = Place::new();
    let base = place
        .unpack(
            &Tar::new()
                .dir("d")
                .file("d/gone", "1")
                .file("d/kept", "2")
                .dir("tree")
                .file("tree/x", ""),
        )
        .unwrap();
    let top = place
        .unpack_on(
            &[&base],
            &Tar::new()
                .dir("d")
                .file("d/.wh.gone", "")
                .file(".wh.tree", ""),
        )
        .unwrap();
    assert_eq!(top.id, LayerId::alone(&top.diff_id));
    let view = place.view(&[&base, &top]);
    assert_eq!(crate::names(through(&view)), ["d"]);
    assert_eq!(crate::names(through(&view).join("d")), ["kept"]);
    assert_eq!(text(&view, "d/gone"), None);
    assert_eq!(text(&view, "d/kept").unwrap(), "2");
}

#[test]
fn an_opaque_directory_hides_all_below_and_nothing_beside() {
    let place = Place::new();
    let base = place
        .unpack(
            &Tar::new()
                .dir("d")
                .file("d/old", "")
                .dir("d/sub")
                .file("d/sub/old", "")
                .dir("e")
                .file("e/old", ""),
        )
        .unwrap();
    // The marker comes first, last or between.
    let orders = [
        Tar::new()
            .dir("d")
            .file("d/.wh..wh..opq", "")
            .file("d/new", "")
            .dir("d/sub")
            .file("d/sub/new", ""),
        Tar::new()
            .dir("d")
            .dir("d/sub")
            .file("d/new", "")
            .file("d/sub/new", "")
            .file("d/.wh..wh..opq", ""),
        Tar::new()
            .dir("d")
            .file("d/new", "")
            .file("d/.wh..wh..opq", "")
            .dir("d/sub")
            .file("d/sub/new", ""),
    ];
    for tar in orders {
        let top = place.unpack_on(&[&base], &tar).unwrap();
        let view = place.view(&[&base, &top]);
        assert_eq!(crate::names(through(&view).join("d")), ["new", "sub"]);
        assert_eq!(crate::names(through(&view).join("d/sub")), ["new"]);
        assert_eq!(crate::names(through(&view).join("e")), ["old"]);
    }
}

#[test]
fn an_opaque_root_hides_everything() {
    let place = Place::new();
    let base = place
        .unpack(&Tar::new().dir("d").file("d/old", "").file("f", ""))
        .unwrap();
    let top = place
        .unpack_on(
            &[&base],
            &Tar::new().file(".wh..wh..opq", "").file("d/new", ""),
        )
        .unwrap();
    let view = place.view(&[&base, &top]);
    assert_eq!(crate::names(through(&view)), ["d"]);
    assert_eq!(crate::names(through(&view).join("d")), ["new"]);
    // Nothing shows through, so nothing is leant on.
    assert_eq!(top.id, LayerId::alone(&top.diff_id));
}

#[test]
fn a_whiteout_does_not_hide_its_own_layer() {
    let place = Place::new();
    let base = place
        .unpack(
            &Tar::new()
                .file("f", "old")
                .dir("d")
                .file("d/old", "")
                .file("g", "old"),
        )
        .unwrap();
    for tar in [
        Tar::new()
            .file(".wh.f", "")
            .file("f", "new")
            .file(".wh.d", "")
            .dir("d")
            .file("d/new", "")
            .file(".wh.g", "")
            .dir("g"),
        Tar::new()
            .file("f", "new")
            .file(".wh.f", "")
            .dir("d")
            .file("d/new", "")
            .file(".wh.d", "")
            .dir("g")
            .file(".wh.g", ""),
    ] {
        let top = place.unpack_on(&[&base], &tar).unwrap();
        let view = place.view(&[&base, &top]);
        assert_eq!(text(&view, "f").unwrap(), "new");
        assert_eq!(crate::names(through(&view).join("d")), ["new"]);
        assert_eq!(crate::names(through(&view).join("g")), [""; 0]);
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    let place = Place::new();
    let tar = Tar::new()
        .file("twice", "first, and longer")
        .file("twice", "second")
        .dir("dir")
        .file("dir/inside", "")
        .file("dir", "now a file")
        .symlink("link", "/etc")
        .dir("link")
        .file("link/inside", "mine")
        .file("file", "")
        .dir("file")
        .file("file/inside", "")
        .dir("full")
        .file("full/kept", "")
        .dir("full")
        .file("hard1", "linked")
        .hard_link("hard2", "hard1")
        .hard_link("hard2", "hard1")
        .hard_link("hard1", "hard1")
        .file("hard1", "alone");
    let layer = place.unpack(&tar).unwrap();
    let fs = place.fs(&layer);
    let read = |name: &str| std::fs::read_to_string(fs.join(name)).unwrap();
    assert_eq!(read("twice"), "second");
    assert_eq!(read("dir"), "now a file");
    assert_eq!(read("link/inside"), "mine");
    assert!(fs.join("link").symlink_metadata().unwrap().is_dir());
    assert!(fs.join("file/inside").exists());
    assert!(fs.join("full/kept").exists());
    assert_eq!(
        (read("hard1"), read("hard2")),
        ("alone".into(), "linked".into())
    );
    let root = std::fs::File::open(&fs).unwrap().into();
    let measured = berth_image_service::layer::walk::measure(&root).unwrap();
    assert_eq!(layer.inodes, measured.inodes);
    place.store.finish_removals();
    assert_eq!(crate::names(place.store.dir()).len(), 2);
}

#[test]
fn a_directory_that_replaces_its_layers_own_file_hides_what_is_below() {
    let place = Place::new();
    let base = place
        .unpack(&Tar::new().dir("d").file("d/old", ""))
        .unwrap();
    let top = place
        .unpack_on(
            &[&base],
            &Tar::new().file("d", "").dir("d").file("d/new", ""),
        )
        .unwrap();
    let view = place.view(&[&base, &top]);
    assert_eq!(crate::names(through(&view).join("d")), ["new"]);
}

/// An image whose upper layers lean on the lower ones in every way.
fn leaning_base() -> Tar {
    let mut special = Entry::new("var/special", b'5').pax("SCHILY.xattr.user.kept", "yes");
    special.mode = 0o2750;
    (special.uid, special.gid) = (12, 34);
    special.mtime = 1_000_000;
    let mut program = Entry::new("usr/bin/program", b'0').pax("SCHILY.xattr.user.too", "1");
    program.mode = 0o4711;
    program.uid = 5;
    program.mtime = 2_000_000;
    program.data = b"program".to_vec();
    Tar::new()
        .dir("usr")
        .dir("usr/bin")
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("bin", "/usr/bin")
        .dir("var")
        .entry(&special)
        .entry(&program)
        .symlink("usr/link", "bin/program")
        .device("usr/null", 1, 3)
}

#[test]
fn missing_parents_are_as_the_layers_below_have_them() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    let tar = Tar::new().file("var/special/new", "x");
    let top = place.unpack_on(&[&base], &tar).unwrap();
    assert_ne!(top.id, LayerId::alone(&top.diff_id));
    assert_eq!(
        Some(&top.id),
        LayerId::on_parents(&[base.diff_id.clone(), top.diff_id.clone()]).as_ref()
    );
    let view = place.view(&[&base, &top]);
    let dir = through(&view).join("var/special");
    let meta = dir.metadata().unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime()),
        (0o2750, 12, 34, 1_000_000)
    );
    let mut value = [0u8; 8];
    let count = rustix::fs::getxattr(&dir, "user.kept", &mut value).unwrap();
    assert_eq!(&value[..count], b"yes");
    // The group of such a directory is for what is made in it, not for what an archive says.
    assert_eq!(dir.join("new").metadata().unwrap().gid(), 0);
    assert_eq!(
        dir.parent().unwrap().metadata().unwrap().mode() & 0o777,
        0o755
    );
}

#[test]
fn a_file_below_a_link_of_a_lower_layer_goes_where_the_link_leads() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    let top = place
        .unpack_on(
            &[&base],
            &Tar::new()
                .file("lib/new.so", "so")
                .file("bin/new", "bin")
                .file("lib/.wh.none", ""),
        )
        .unwrap();
    let view = place.view(&[&base, &top]);
    assert!(through(&view).join("lib").is_symlink());
    assert_eq!(text(&view, "usr/lib/new.so").unwrap(), "so");
    assert_eq!(text(&view, "lib/new.so").unwrap(), "so");
    assert_eq!(text(&view, "usr/bin/new").unwrap(), "bin");
    assert_eq!(text(&view, "usr/bin/program").unwrap(), "program");
}

#[test]
fn a_directory_that_replaces_a_link_of_a_lower_layer_is_its_own() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    let tar = Tar::new()
        .file("lib/before", "1")
        .dir("lib")
        .file("lib/after", "2")
        .file("lib/sub/after", "3");
    let top = place.unpack_on(&[&base], &tar).unwrap();
    let view = place.view(&[&base, &top]);
    assert_eq!(crate::names(through(&view).join("lib")), ["after", "sub"]);
    assert_eq!(crate::names(through(&view).join("usr/lib")), ["before"]);
}

#[test]
fn a_hard_link_to_a_file_of_a_lower_layer_is_that_file() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    let tar = Tar::new()
        .hard_link("again", "usr/bin/program")
        .hard_link("usr/bin/more", "bin/program")
        .hard_link("link2", "usr/link")
        .hard_link("null2", "usr/null");
    let top = place.unpack_on(&[&base], &tar).unwrap();
    assert_ne!(top.id, LayerId::alone(&top.diff_id));
    let view = place.view(&[&base, &top]);
    let meta = |name: &str| through(&view).join(name).symlink_metadata().unwrap();
    for name in ["again", "usr/bin/more", "usr/bin/program"] {
        let meta = meta(name);
        assert_eq!(
            (meta.mode() & 0o7777, meta.uid(), meta.mtime()),
            (0o4711, 5, 2_000_000),
            "{name}"
        );
        assert_eq!(text(&view, name).unwrap(), "program");
        assert_eq!(
            meta.ino(),
            through(&view).join("again").metadata().unwrap().ino()
        );
    }
    assert!(through(&view).join("link2").is_symlink());
    assert_eq!(meta("null2").rdev(), 0x103);
    let missing = place.unpack_on(&[&base], &Tar::new().hard_link("a", "usr/bin/none"));
    assert!(matches!(missing, Err(UnpackError::LinkTarget { .. })));
}

#[test]
fn a_hard_link_to_what_was_deleted_is_refused() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    let tar = Tar::new()
        .dir("usr")
        .dir("usr/bin")
        .file("usr/bin/.wh.program", "")
        .hard_link("a", "usr/bin/program");
    let error = place.unpack_on(&[&base], &tar).unwrap_err();
    assert!(matches!(error, UnpackError::LinkTarget { .. }), "{error}");
}

#[test]
fn without_its_parents_a_layer_that_needs_them_says_so() {
    let place = Place::new();
    let base = place.unpack(&leaning_base()).unwrap();
    for (tar, leans) in [
        (Tar::new().file("var/special/new", "x"), true),
        (Tar::new().hard_link("a", "usr/bin/program"), true),
        (Tar::new().file("var/special/.wh.x", ""), true),
        (
            Tar::new()
                .dir("var")
                .file("var/x", "")
                .hard_link("y", "var/x"),
            false,
        ),
        (
            Tar::new()
                .dir("var")
                .file("var/.wh..wh..opq", "")
                .file("var/a/b", ""),
            false,
        ),
    ] {
        let bytes = tar.bytes();
        let diff_ids = [
            base.diff_id.clone(),
            berth_image_service::digest::Digest::sha256(&bytes),
        ];
        let ingest = berth_image_service::layer::Ingest {
            diff_ids: &diff_ids,
            parents: None,
            compression: berth_image_service::unpack::Compression::None,
            limit_bytes: None,
        };
        let result = place.store.unpack(&place.lease, ingest, bytes.as_slice());
        match result {
            Err(UnpackError::LeansOnParents) => assert!(leans),
            Ok(layer) => {
                assert!(!leans);
                assert_eq!(layer.id, LayerId::alone(&layer.diff_id));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn the_same_leaning_layer_above_other_parents_is_another_one() {
    let place = Place::new();
    let one = place.unpack(&leaning_base()).unwrap();
    let two = place.unpack(&Tar::new().dir("lib")).unwrap();
    let tar = Tar::new().file("lib/x", "x");
    let on_one = place.unpack_on(&[&one], &tar).unwrap();
    let on_two = place.unpack_on(&[&two], &tar).unwrap();
    let alone = place.unpack(&tar).unwrap();
    assert_eq!(place.store.layers().len(), 5);
    assert!(
        through(&place.view(&[&one, &on_one]))
            .join("usr/lib/x")
            .exists()
    );
    assert!(
        through(&place.view(&[&two, &on_two]))
            .join("lib/x")
            .exists()
    );
    let made = through(&place.view(&[&alone]))
        .join("lib")
        .metadata()
        .unwrap();
    assert_eq!((made.mode() & 0o7777, made.mtime()), (0o755, 0));
}

#[test]
fn a_container_writes_to_its_own_layer_only() {
    let place = Place::new();
    let mut root = Entry::new("./", b'5');
    root.mode = 0o751;
    root.uid = 77;
    let base = place
        .unpack(
            &Tar::new()
                .entry(&root)
                .file("a", "image")
                .file("b", "image"),
        )
        .unwrap();
    let top = place
        .unpack_on(&[&base], &Tar::new().file("c", "top"))
        .unwrap();
    let snapshots = place.snapshots();
    for id in ["one", "two"] {
        snapshots.prepare(id, &ids(&[&base, &top])).unwrap();
        snapshots.prepare(id, &ids(&[&base, &top])).unwrap();
    }
    let (one, two) = (
        snapshots.mount("one").unwrap(),
        snapshots.mount("two").unwrap(),
    );
    let meta = through(&one).metadata().unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o751, 77));
    let before = snapshots.usage("one").unwrap();
    std::fs::write(through(&one).join("a"), "x".repeat(100_000)).unwrap();
    std::fs::remove_file(through(&one).join("b")).unwrap();
    let after = snapshots.usage("one").unwrap();
    assert_eq!(after.inodes - before.inodes, 2);
    assert!(
        (100_000..200_000).contains(&(after.bytes - before.bytes)),
        "{after:?}"
    );
    assert_eq!(text(&two, "a").unwrap(), "image");
    assert_eq!(text(&two, "b").unwrap(), "image");
    // What was written outlives the mount.
    drop(one);
    let again = snapshots.mount("one").unwrap();
    assert_eq!(text(&again, "a").unwrap().len(), 100_000);
    assert_eq!(text(&again, "b"), None);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(place.dir.path().to_str().unwrap()));
    drop((again, two));

    snapshots.remove("one").unwrap();
    snapshots.remove("one").unwrap();
    assert!(matches!(
        snapshots.mount("one"),
        Err(SnapshotError::Record { .. })
    ));
    assert_eq!(snapshots.list().unwrap(), ["two"]);
    snapshots.finish_removals();
    assert_eq!(crate::names(snapshots.dir()), ["two"]);
}

#[test]
fn snapshots_survive_a_restart_and_half_made_ones_do_not() {
    let place = Place::new();
    let base = place.unpack(&Tar::new().file("a", "1")).unwrap();
    let snapshots = place.snapshots();
    snapshots.prepare("whole", &ids(&[&base])).unwrap();
    std::fs::create_dir_all(snapshots.dir().join("half/upper")).unwrap();
    std::fs::create_dir_all(snapshots.dir().join("trash-0123/upper")).unwrap();
    drop(snapshots);
    let snapshots = place.snapshots();
    snapshots.finish_removals();
    assert_eq!(crate::names(snapshots.dir()), ["whole"]);
    assert_eq!(text(&snapshots.mount("whole").unwrap(), "a").unwrap(), "1");
    assert_eq!(snapshots.layers("whole").unwrap(), ids(&[&base]));
}

#[test]
fn what_cannot_be_prepared_leaves_nothing() {
    let place = Place::new();
    let base = place.unpack(&Tar::new().file("a", "1")).unwrap();
    let other = place.unpack(&Tar::new().file("a", "2")).unwrap();
    let snapshots = place.snapshots();
    snapshots.prepare("one", &ids(&[&base])).unwrap();
    assert!(matches!(
        snapshots.prepare("one", &ids(&[&other])),
        Err(SnapshotError::Taken { .. })
    ));
    place.store.remove(&other.id).unwrap();
    assert!(matches!(
        snapshots.prepare("two", &ids(&[&base, &other])),
        Err(SnapshotError::NoLayer { .. })
    ));
    for bad in [
        "",
        ".",
        "..",
        "a/b",
        "../one",
        ".hidden",
        "trash-1",
        &"x".repeat(129),
        "a\0b",
    ] {
        assert!(
            matches!(snapshots.prepare(bad, &[]), Err(SnapshotError::BadId(_))),
            "{bad}"
        );
        assert!(
            matches!(snapshots.remove(bad), Err(SnapshotError::BadId(_))),
            "{bad}"
        );
    }
    assert_eq!(crate::names(snapshots.dir()), ["one"]);
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let place = Place::new();
    let snapshots = place.snapshots();
    snapshots.prepare("one", &[]).unwrap();
    let mount = snapshots.mount("one").unwrap();
    assert_eq!(crate::names(through(&mount)), [""; 0]);
    std::fs::write(through(&mount).join("a"), "x").unwrap();
    assert_eq!(
        crate::names(through(&mount_readonly(&place.store, &[]).unwrap())),
        [""; 0]
    );
    assert_eq!(
        read_in_image(&place.store, &[], "etc/passwd", 100).unwrap(),
        None
    );
}

#[test]
fn hundreds_of_layers_are_one_view() {
    let place = Place::new();
    let layers: Vec<LayerInfo> = (0..400)
        .map(|n| {
            place
                .unpack(
                    &Tar::new()
                        .file(&format!("f{n}"), "")
                        .file("top", &n.to_string()),
                )
                .unwrap()
        })
        .collect();
    let snapshots = place.snapshots();
    for count in [1, 2, 128, 400] {
        let layers: Vec<&LayerInfo> = layers[..count].iter().collect();
        let view = place.view(&layers);
        assert_eq!(crate::names(through(&view)).len(), count + 1);
        assert_eq!(text(&view, "top").unwrap(), (count - 1).to_string());
        let id = format!("c{count}");
        snapshots.prepare(&id, &ids(&layers)).unwrap();
        let mount = snapshots.mount(&id).unwrap();
        assert_eq!(text(&mount, "top").unwrap(), (count - 1).to_string());
    }
}

#[test]
fn files_of_an_image_are_read_inside_it() {
    let place = Place::new();
    let secret = place.dir.path().join("outside/secret");
    let tar = Tar::new()
        .dir("etc")
        .file("etc/passwd", "root:x:0:0")
        .symlink("etc/abs", "/etc/passwd")
        .symlink("etc/up", "../../../../etc/passwd")
        .symlink("etc/out", secret.to_str().unwrap())
        .symlink("etc/loop", "loop")
        .symlink("etc/magic", "/proc/self/fd/0")
        .entry(&Entry::new("etc/fifo", b'6'))
        .device("etc/null", 1, 3)
        .file("etc/large", &"x".repeat(5000));
    let layer = place.unpack(&tar).unwrap();
    let read = |path: &str| read_in_image(&place.store, &ids(&[&layer]), path, 4096);
    let passwd = Some(b"root:x:0:0".to_vec());
    for path in [
        "etc/passwd",
        "/etc/passwd",
        "etc/abs",
        "etc/up",
        "../../etc/passwd",
    ] {
        assert_eq!(read(path).unwrap(), passwd, "{path}");
    }
    for path in [
        "etc/none",
        "none/passwd",
        "etc/passwd/x",
        "etc/out",
        "etc/magic",
    ] {
        assert_eq!(read(path).unwrap(), None, "{path}");
    }
    for path in ["etc", "etc/fifo", "etc/null", "etc/large", "etc/loop"] {
        let error = read(path).unwrap_err();
        assert!(
            matches!(error, SnapshotError::Unreadable { .. }),
            "{path}: {error}"
        );
    }
}

#[test]
fn nothing_can_be_written_through_a_readonly_view() {
    let place = Place::new();
    let layer = place.unpack(&Tar::new().file("a", "1")).unwrap();
    for layers in [&[][..], &[&layer]] {
        let view = place.view(layers);
        let error = std::fs::write(through(&view).join("b"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
    assert!(!listing(&place.view(&[&layer])).is_empty());
}
