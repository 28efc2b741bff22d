//! One test for each way a layer can be wrong: a clear error, and nothing left.

use crate::Place;
use crate::archive::{Entry, Tar, header};
use berth_image_service::digest::Digest;
use berth_image_service::unpack::{Compression, UnpackError};
use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// Unpacks what must fail, and gives the error with all its causes.
fn refused(tar: &Tar) -> String {
    let place = Place::new();
    let error = place.unpack(tar).expect_err("this layer must be refused");
    place.assert_untouched();
    chain(&error)
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[track_caller]
fn assert_mentions(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn an_absolute_path_is_one_of_the_image() {
    let place = Place::new();
    let outside = place.dir.path().join("outside/planted");
    let outside = outside.to_str().unwrap();
    // As kaniko writes the root.
    let root = Entry {
        mode: 0o711,
        ..Entry::new("/", b'5')
    };
    let layer = place
        .unpack(
            &Tar::new()
                .entry(&root)
                .file(outside, "x")
                .file("//twice", "y"),
        )
        .unwrap();
    assert!(layer.has_root);
    let fs = place.fs(&layer);
    assert_eq!(fs.metadata().unwrap().mode() & 0o7777, 0o711);
    assert_eq!(
        std::fs::read_to_string(fs.join(&outside[1..])).unwrap(),
        "x"
    );
    assert_eq!(std::fs::read_to_string(fs.join("twice")).unwrap(), "y");
    place.store.remove(&layer.id).unwrap();
    place.assert_untouched();
}

#[test]
fn a_path_with_dot_dot_is_refused() {
    for path in ["../evil", "/../evil", "a/../../evil", "..", "a/.."] {
        let text = refused(&Tar::new().dir("a").file(path, "x"));
        assert_mentions(&text, &[path, "\"..\""]);
    }
}

#[test]
fn a_symlink_leads_nowhere_outside() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    for (link, target) in [
        ("abs", outside.to_str().unwrap()),
        ("up", "../../../../../outside"),
        ("deeper/up", "../../../../../../outside"),
        ("root", "/"),
    ] {
        let tar = Tar::new()
            .symlink(link, target)
            .file(&format!("{link}/planted"), link);
        let layer = place.unpack(&tar).unwrap();
        // The link is an absolute one of the image, so the file is below the layer.
        let within = match target {
            "/" => "planted".to_owned(),
            _ if target.starts_with("..") => "outside/planted".to_owned(),
            _ => format!("{}/planted", &target[1..]),
        };
        let planted = place.fs(&layer).join(within);
        assert_eq!(std::fs::read_to_string(planted).unwrap(), link);
        place.store.remove(&layer.id).unwrap();
    }
    place.assert_untouched();
}

#[test]
fn a_file_over_a_symlink_replaces_the_link() {
    let place = Place::new();
    let secret = place.dir.path().join("outside/secret");
    let tar = Tar::new()
        .symlink("a", secret.to_str().unwrap())
        .file("a", "mine");
    let layer = place.unpack(&tar).unwrap();
    assert_eq!(std::fs::read(place.fs(&layer).join("a")).unwrap(), b"mine");
    place.store.remove(&layer.id).unwrap();
    place.assert_untouched();
}

#[test]
fn links_that_lead_up_again_and_again_end_where_they_should_and_at_a_bounded_cost() {
    let place = Place::new();
    // Further up than directories are kept open, and down again.
    let deep = vec!["d"; 100].join("/");
    let up = format!("{}there", "../".repeat(99));
    let winding = format!("{}there", "there/../".repeat(400));
    let tar = Tar::new()
        .file(&format!("{deep}/x"), "")
        .dir("d/there")
        .symlink(&format!("{deep}/up"), &up)
        .symlink("d/winding", &winding)
        .symlink("d/root", &format!("{}../..", "there/../".repeat(3)))
        .file(&format!("{deep}/up/one"), "1")
        .file("d/winding/two", "2")
        .file("d/root/three", "3");
    let layer = place.unpack(&tar).unwrap();
    for (path, content) in [("d/there/one", "1"), ("d/there/two", "2"), ("three", "3")] {
        let found = std::fs::read_to_string(place.fs(&layer).join(path)).unwrap();
        assert_eq!(found, content, "{path}");
    }
    place.store.remove(&layer.id).unwrap();
    let back = "d/../".repeat(800);
    let mut tar = Tar::new().dir("d");
    for nth in 0..6 {
        tar = tar.symlink(&format!("l{nth}"), &format!("{back}l{}", nth + 1));
    }
    let tar = tar.dir("l6").file("l0/x", "");
    assert_mentions(&refused(&tar), &["l0/x", "too many directories"]);
    place.assert_untouched();
}

#[test]
fn a_loop_of_symlinks_is_refused() {
    let tar = Tar::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", "");
    assert_mentions(&refused(&tar), &["a/x", "too many symbolic links"]);
}

#[test]
fn a_hard_link_to_outside_is_refused() {
    for target in ["../outside/secret", "a/../../../outside/secret"] {
        let text = refused(&Tar::new().dir("a").hard_link("evil", target));
        assert_mentions(&text, &["evil", target, "\"..\""]);
    }
    let text = refused(&Tar::new().hard_link("evil", "/etc/passwd"));
    assert_mentions(
        &text,
        &["evil", "/etc/passwd", "does not exist in the image"],
    );
}

#[test]
fn a_hard_link_through_a_symlink_stays_inside() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    let tar = Tar::new()
        .symlink("way", outside.to_str().unwrap())
        .hard_link("evil", "way/secret");
    let error = place.unpack(&tar).unwrap_err();
    assert_mentions(&error.to_string(), &["evil", "does not exist in the image"]);
    // A link to a link is the link itself.
    let tar = Tar::new()
        .symlink("a", outside.join("secret").to_str().unwrap())
        .hard_link("b", "a");
    let layer = place.unpack(&tar).unwrap();
    assert!(place.fs(&layer).join("b").is_symlink());
    place.store.remove(&layer.id).unwrap();
    place.assert_untouched();
}

#[test]
fn a_hard_link_to_a_directory_is_refused() {
    let text = refused(&Tar::new().dir("a").hard_link("b", "a"));
    assert_mentions(&text, &["\"b\"", "is a directory"]);
}

#[test]
fn a_size_beyond_the_stream_is_refused() {
    let mut entry = Entry::new("big", b'0');
    entry.data = b"little".to_vec();
    entry.size = Some(1 << 30);
    assert_mentions(
        &refused(&Tar::new().entry(&entry)),
        &["ends inside an entry"],
    );
    let entry = Entry::new("big", b'0').pax("size", "9223372036854775807");
    assert_mentions(
        &refused(&Tar::new().entry(&entry)),
        &["size", "out of range"],
    );
}

#[test]
fn an_archive_cut_anywhere_is_refused() {
    let whole = Tar::new()
        .dir("a")
        .file("a/b", "content")
        .bytes_without_end();
    let place = Place::new();
    for end in 1..whole.len() {
        let cut = &whole[..end];
        // Between entries a cut cannot be seen; there the diff ID tells.
        let diff_id = Digest::sha256(if end % 512 == 0 { &whole } else { cut });
        place
            .unpack_bytes(&diff_id, Compression::None, cut)
            .expect_err(&format!("cut after {end}"));
    }
    place.assert_untouched();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn compressed_layers_are_the_same_layer() {
    let archive = Tar::new().file("a", &"content ".repeat(10_000)).bytes();
    let diff_id = Digest::sha256(&archive);
    let (first, second) = archive.split_at(5000);
    let members = [gzip(first), gzip(second)].concat();
    let frames = [
        // A skippable frame, as zstd:chunked has them.
        b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec(),
        zstd::encode_all(first, 1).unwrap(),
        zstd::encode_all(second, 1).unwrap(),
    ]
    .concat();
    for (compression, blob) in [
        (Compression::None, archive.clone()),
        (Compression::Gzip, gzip(&archive)),
        (Compression::Gzip, members),
        (
            Compression::Zstd,
            zstd::encode_all(archive.as_slice(), 1).unwrap(),
        ),
        (Compression::Zstd, frames),
    ] {
        let place = Place::new();
        let layer = place
            .unpack_bytes(&diff_id, compression, blob.as_slice())
            .unwrap();
        assert_eq!(layer.diff_id, diff_id);
        assert_eq!(
            std::fs::metadata(place.fs(&layer).join("a")).unwrap().len(),
            80_000
        );
    }
}

#[test]
fn truncated_compressed_data_is_refused() {
    let archive = Tar::new().file("a", &"content ".repeat(1000)).bytes();
    let diff_id = Digest::sha256(&archive);
    let place = Place::new();
    for (compression, blob) in [
        (Compression::Gzip, gzip(&archive)),
        (
            Compression::Zstd,
            zstd::encode_all(archive.as_slice(), 1).unwrap(),
        ),
    ] {
        for end in 0..blob.len() {
            place
                .unpack_bytes(&diff_id, compression, &blob[..end])
                .expect_err(&format!("{compression} cut after {end}"));
        }
        let mut flipped = blob.clone();
        let at = blob.len() / 2;
        flipped[at] ^= 0x10;
        place
            .unpack_bytes(&diff_id, compression, flipped.as_slice())
            .unwrap_err();
    }
    place.assert_untouched();
}

#[test]
fn bytes_after_the_compressed_data_are_refused() {
    let archive = Tar::new().file("a", "x").bytes();
    let diff_id = Digest::sha256(&archive);
    let place = Place::new();
    for (compression, blob) in [
        (Compression::Gzip, gzip(&archive)),
        (
            Compression::Zstd,
            zstd::encode_all(archive.as_slice(), 1).unwrap(),
        ),
    ] {
        for garbage in [
            &b"garbage"[..],
            b"\0",
            b"\0\0\0\0",
            b"\x1f",
            b"\x1f\x8b\x08",
        ] {
            let blob = [&blob, garbage].concat();
            place
                .unpack_bytes(&diff_id, compression, blob.as_slice())
                .expect_err(&format!("{compression} and {garbage:?}"));
        }
    }
    let blob = [archive.as_slice(), b"garbage"].concat();
    let error = place
        .unpack_bytes(&diff_id, Compression::None, blob.as_slice())
        .unwrap_err();
    assert!(matches!(error, UnpackError::DiffId { .. }), "{error}");
    place.assert_untouched();
}

#[test]
fn a_blob_is_unpacked_as_it_is_packed_whatever_its_media_type_says() {
    let archive = Tar::new().file("a", "x").bytes();
    // The header of old tars has nothing but its checksum to know it by.
    let mut old = archive.clone();
    old[257..265].fill(0);
    let sum: u32 = (0..512)
        .map(|at| {
            if (148..156).contains(&at) {
                b' '
            } else {
                old[at]
            }
        })
        .map(u32::from)
        .sum();
    old[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    for archive in [archive, old, vec![0; 1024]] {
        let diff_id = Digest::sha256(&archive);
        let blobs = [
            archive.clone(),
            gzip(&archive),
            zstd::encode_all(archive.as_slice(), 1).unwrap(),
        ];
        for said in [Compression::None, Compression::Gzip, Compression::Zstd] {
            for blob in &blobs {
                Place::new()
                    .unpack_bytes(&diff_id, said, blob.as_slice())
                    .unwrap();
            }
        }
    }
}

#[test]
fn a_blob_that_is_nothing_known_is_refused_and_named() {
    let place = Place::new();
    let diff_id = Digest::sha256(b"");
    let large = vec![b'x'; 100_000];
    for blob in [&b"certainly no gzip stream"[..], b"x", &large] {
        for said in [Compression::Gzip, Compression::Zstd] {
            let error = place.unpack_bytes(&diff_id, said, blob).unwrap_err();
            let said = format!("says {said}");
            assert_mentions(
                &error.to_string(),
                &[&said, "neither gzip nor zstd nor a tar"],
            );
        }
    }
    place.assert_untouched();
}

#[test]
fn data_that_never_becomes_anything_has_an_end() {
    let archive = Tar::new().file("a", "x").bytes();
    let diff_id = Digest::sha256(&archive);
    // A gzip member, and a zstd frame, of nothing, for ever.
    let endless = [
        (Compression::Gzip, gzip(b"")),
        (Compression::Zstd, zstd::encode_all(&b""[..], 1).unwrap()),
    ];
    for (compression, nothing) in endless {
        let place = Place::new();
        let ingest = berth_image_service::layer::Ingest {
            diff_ids: std::slice::from_ref(&diff_id),
            parents: None,
            compression,
            limit_bytes: Some(50_000),
        };
        let blob = Repeated(nothing.clone(), 0);
        let error = place.store.unpack(&place.lease, ingest, blob).unwrap_err();
        assert!(
            matches!(
                error,
                UnpackError::TooLarge {
                    limit_bytes: 50_000
                }
            ),
            "{error:?}"
        );
        place.assert_untouched();
    }
}

/// The same bytes again and again.
struct Repeated(Vec<u8>, usize);

impl std::io::Read for Repeated {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        for byte in buffer.iter_mut() {
            *byte = self.0[self.1 % self.0.len()];
            self.1 += 1;
        }
        Ok(buffer.len())
    }
}

#[test]
fn a_wrong_diff_id_is_refused() {
    let place = Place::new();
    let archive = Tar::new().file("a", "x").bytes();
    let error = place
        .unpack_bytes(
            &Digest::sha256(b"other"),
            Compression::None,
            archive.as_slice(),
        )
        .unwrap_err();
    assert!(matches!(error, UnpackError::DiffId { .. }), "{error}");
    place.assert_untouched();
}

#[test]
fn a_reader_that_fails_at_its_very_end_is_believed() {
    struct Bad<'a>(&'a [u8]);
    impl Read for Bad<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other("wrong compressed digest")),
                count => Ok(count),
            }
        }
    }
    let archive = Tar::new().file("a", "x").bytes();
    let diff_id = Digest::sha256(&archive);
    let place = Place::new();
    for (compression, blob) in [
        (Compression::None, archive.clone()),
        (Compression::Gzip, gzip(&archive)),
        (
            Compression::Zstd,
            zstd::encode_all(archive.as_slice(), 1).unwrap(),
        ),
    ] {
        let error = place
            .unpack_bytes(&diff_id, compression, Bad(&blob))
            .unwrap_err();
        assert!(matches!(error, UnpackError::Read { .. }), "{error}");
        assert_mentions(&chain(&error), &["wrong compressed digest"]);
    }
    place.assert_untouched();
}

#[test]
fn a_header_with_a_wrong_checksum_is_refused() {
    let place = Place::new();
    let mut archive = Tar::new().file("a", "x").bytes();
    archive[0] = b'b';
    let error = place
        .unpack_bytes(
            &Digest::sha256(&archive),
            Compression::None,
            archive.as_slice(),
        )
        .unwrap_err();
    assert_mentions(&error.to_string(), &["byte 0", "checksum"]);
    place.assert_untouched();
}

#[test]
fn a_device_through_a_symlink_stays_inside() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    let tar = Tar::new()
        .symlink("way", outside.to_str().unwrap())
        .device("way/null", 1, 3);
    let layer = place.unpack(&tar).unwrap();
    let inside = place.fs(&layer).join(outside.strip_prefix("/").unwrap());
    let device = std::fs::symlink_metadata(inside.join("null")).unwrap();
    assert!(device.file_type().is_char_device());
    assert_eq!(device.rdev(), 0x103);
    place.store.remove(&layer.id).unwrap();
    place.assert_untouched();
}

#[test]
fn a_whiteout_of_no_name_is_refused() {
    for path in [".wh.", "a/.wh.", ".wh..", "a/.wh.."] {
        let text = refused(&Tar::new().dir("a").file(path, ""));
        assert_mentions(&text, &[path, "whiteout of no name"]);
    }
    let text = refused(&Tar::new().file(".wh.../a", ""));
    assert_mentions(&text, &["below a whiteout"]);
}

#[test]
fn a_whiteout_of_dot_dot_is_refused() {
    for path in [".wh...", "a/.wh..."] {
        let text = refused(&Tar::new().dir("a").file(path, ""));
        assert_mentions(&text, &[path, "whiteout of no name"]);
    }
}

#[test]
fn an_xattr_that_is_too_big_is_refused() {
    let entry = Entry::new("a", b'0').pax("SCHILY.xattr.user.big", vec![b'x'; 70_000]);
    let text = refused(&Tar::new().entry(&entry));
    assert_mentions(&text, &["\"a\"", "user.big", "too long"]);
    let key = format!("SCHILY.xattr.user.{}", "n".repeat(300));
    let entry = Entry::new("a", b'0').pax(&key, "x");
    assert_mentions(&refused(&Tar::new().entry(&entry)), &["too long"]);
}

#[test]
fn xattrs_that_would_steer_the_host_are_left_out() {
    let place = Place::new();
    let mut entry = Entry::new("a", b'5');
    for name in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.other",
        "user.overlay.opaque",
        "security.selinux",
        "security.ima",
        "nonsense",
    ] {
        entry = entry.pax(&format!("SCHILY.xattr.{name}"), "y");
    }
    entry = entry.pax("SCHILY.xattr.user.fine", "yes");
    let layer = place.unpack(&Tar::new().entry(&entry)).unwrap();
    let mut list = vec![0u8; 4096];
    let count = rustix::fs::listxattr(place.fs(&layer).join("a"), &mut list).unwrap();
    assert_eq!(&list[..count], b"user.fine\0");
}

#[test]
fn a_pax_bomb_is_refused() {
    let mut tar = Tar::new();
    tar.raw_header(&header(b"pax", b'x', 7 << 30));
    assert_mentions(&refused(&tar), &["extended header", "over 1048576"]);
    let mut tar = Tar::new();
    tar.raw_header(&header(b"name", b'L', 2 << 20));
    assert_mentions(&refused(&tar), &["extended header"]);
    // Many small global headers are one large one.
    let mut tar = Tar::new();
    for n in 0..40 {
        let key = format!("comment.{n}").into_bytes();
        let records = crate::archive::records(&[(key, vec![b'x'; 32 << 10])]);
        tar.raw_header(&header(b"pax", b'g', records.len() as u64));
        tar.padded(&records);
    }
    assert_mentions(&refused(&tar), &["global PAX records"]);
    let mut tar = Tar::new();
    tar.raw_header(&header(b"pax", b'x', 10));
    tar.padded(b"99999 a=b\n");
    assert_mentions(&refused(&tar.file("a", "")), &["malformed PAX record"]);
}

#[test]
fn a_path_that_is_too_long_is_refused() {
    let long = "d/".repeat(2500) + "file";
    assert_mentions(&refused(&Tar::new().file(&long, "")), &["4096"]);
    let name = "n".repeat(300);
    let text = refused(&Tar::new().file(&name, ""));
    assert_mentions(&text, &["cannot make", "name too long"]);
    // The longest that is allowed works, and goes away again.
    let place = Place::new();
    let longest = "d/".repeat(2046) + "file";
    let layer = place.unpack(&Tar::new().file(&longest, "")).unwrap();
    assert_eq!(layer.inodes, 2048);
    place.store.remove(&layer.id).unwrap();
    place.assert_untouched();
}

#[test]
fn links_cannot_build_a_tree_deeper_than_any_path() {
    let deep = "d/".repeat(1000);
    let mut tar = Tar::new().dir(&deep).symlink("s0", &deep);
    for n in 0..5 {
        tar = tar
            .dir(&format!("s{n}/{deep}"))
            .symlink(&format!("s{}", n + 1), &format!("s{n}/{deep}"));
    }
    let text = refused(&tar);
    assert_mentions(&text, &["4096"]);
}

#[test]
fn paths_with_nul_bytes_are_refused() {
    let entry = Entry::new("a", b'0').pax("path", "a\0b");
    assert_mentions(&refused(&Tar::new().entry(&entry)), &["NUL"]);
    let entry = Entry::new("a", b'2').pax("linkpath", "a\0b");
    assert_mentions(&refused(&Tar::new().entry(&entry)), &["NUL"]);
}

#[test]
fn a_file_as_parent_is_refused() {
    let text = refused(&Tar::new().file("a", "").file("a/b", ""));
    assert_mentions(&text, &["a/b", "parent that is no directory"]);
}

#[test]
fn types_that_cannot_be_unpacked_are_refused_by_name() {
    for (kind, what) in [
        (b'S', "sparse"),
        (b'M', "'M'"),
        (b'D', "'D'"),
        (b'?', "'?'"),
    ] {
        let text = refused(&Tar::new().entry(&Entry::new("a", kind)));
        assert_mentions(&text, &["\"a\"", what, "not supported"]);
    }
    let entry = Entry::new("a", b'0').pax("GNU.sparse.major", "1");
    assert_mentions(&refused(&Tar::new().entry(&entry)), &["sparse"]);
}

#[test]
fn owners_out_of_range_are_refused() {
    for (key, value) in [("uid", "4294967295"), ("gid", "4294967296"), ("uid", "-1")] {
        let entry = Entry::new("a", b'0').pax(key, value);
        assert_mentions(&refused(&Tar::new().entry(&entry)), &[key]);
    }
}

#[test]
fn more_bytes_than_allowed_are_refused() {
    let place = Place::new();
    let archive = Tar::new().file("a", &"x".repeat(100_000)).bytes();
    let ingest = |limit| berth_image_service::layer::Ingest {
        diff_ids: &[],
        parents: None,
        compression: Compression::None,
        limit_bytes: Some(limit),
    };
    let diff_ids = [Digest::sha256(&archive)];
    let with = |limit| berth_image_service::layer::Ingest {
        diff_ids: &diff_ids,
        ..ingest(limit)
    };
    let error = place
        .store
        .unpack(&place.lease, with(50_000), archive.as_slice())
        .unwrap_err();
    assert_mentions(&error.to_string(), &["50000"]);
    place.assert_untouched();
    place
        .store
        .unpack(&place.lease, with(archive.len() as u64), archive.as_slice())
        .unwrap();
}

#[test]
fn names_in_messages_are_printable() {
    let text = refused(&Tar::new().file("../a\x1b[31m\n", ""));
    assert!(!text.contains(['\x1b', '\n']), "{text}");
}

/// The child of the next test: unpacks the file it is told and says how much memory it took.
#[test]
fn unpack_as_child() {
    let Some(path) = std::env::var_os("BERTH_TEST_UNPACK") else {
        return;
    };
    let before = peak_kib();
    let bytes = std::fs::File::open(path).unwrap();
    let diff_id: Digest = std::env::var("BERTH_TEST_DIFF_ID")
        .unwrap()
        .parse()
        .unwrap();
    let place = Place::new();
    let layer = place
        .unpack_bytes(&diff_id, Compression::None, bytes)
        .unwrap();
    println!("inodes={} grown={}", layer.inodes, peak_kib() - before);
}

/// `VmHWM` of proc_pid_status(5), in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_hundred_thousand_entries_take_bounded_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.tar");
    let mut file = io::BufWriter::new(std::fs::File::create(&path).unwrap());
    let mut hasher = Digest::sha256(b"").hasher();
    let mut tar = Tar::new();
    let long = "n".repeat(80);
    for n in 0..50_000 {
        let directory = format!("{:02}-{long}/{:02}-{long}/{n}-{long}", n % 10, n % 7);
        let file_in = format!("{directory}/file");
        tar.push(&Entry::new(directory, b'5'));
        tar.push(&Entry::new(file_in, b'0'));
        let bytes = tar.take();
        hasher.update(&bytes);
        file.write_all(&bytes).unwrap();
    }
    file.flush().unwrap();
    drop(file);
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "hostile::unpack_as_child", "--nocapture"])
        .env("BERTH_TEST_UNPACK", &path)
        .env("BERTH_TEST_DIFF_ID", hasher.finish().to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{text}");
    // 50,000 directories and files, and what is above them.
    assert_mentions(&text, &[&format!("inodes={}", 100_000 + 10 + 70 + 1)]);
    let grown = text.split("grown=").nth(1).unwrap();
    let grown: u64 = grown.split_whitespace().next().unwrap().parse().unwrap();
    assert!(grown < 16 << 10, "peak memory grew by {grown} KiB");
}
