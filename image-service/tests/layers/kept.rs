//! Layers whose blob is kept until their files are on the disk.

use crate::archive::Tar;
use crate::store::from_another_boot;
use crate::{Place, names};
use berth_image_service::digest::Digest;
use berth_image_service::layer::{Ingest, LayerInfo, Store, walk};
use berth_image_service::unpack::Compression;
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

fn gzip(tar: &Tar) -> (Digest, Vec<u8>) {
    let bytes = tar.bytes();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&bytes).unwrap();
    (Digest::sha256(&bytes), encoder.finish().unwrap())
}

fn tar() -> Tar {
    Tar::new()
        .dir("d")
        .file("d/a", "content")
        .file("d/b", &"x".repeat(9000))
}

fn unpack(place: &Place, parents: &[&LayerInfo], tar: &Tar, blob_bytes: Option<u64>) -> LayerInfo {
    let (diff_id, blob) = gzip(tar);
    let mut diff_ids: Vec<Digest> = parents.iter().map(|p| p.diff_id.clone()).collect();
    diff_ids.push(diff_id);
    let parents: Vec<_> = parents.iter().map(|p| p.id.clone()).collect();
    let ingest = Ingest {
        diff_ids: &diff_ids,
        parents: Some(&parents),
        compression: Compression::Gzip,
        limit_bytes: None,
    };
    let bytes = Some(blob_bytes.unwrap_or(blob.len() as u64));
    place
        .store
        .unpack_waiting(&place.lease, ingest, None, bytes, blob.as_slice())
        .unwrap()
}

fn dir(store: &Store, layer: &LayerInfo) -> PathBuf {
    store.dir().join(layer.id.to_string())
}

const KEPT: [&str; 4] = ["blob", "fs", "layer.rec", "recipe.zst"];
const SETTLED: [&str; 4] = ["fs", "layer.rec", "recipe.zst", "synced"];

/// The counters say what `du` would.
fn assert_counted(store: &Store) {
    let root = std::os::fd::OwnedFd::from(fs::File::open(store.dir()).unwrap());
    let all = walk::measure(&root).unwrap();
    let mut own = walk::Sums::default();
    for name in [".", "empty"] {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        own += walk::Sums::of(&rustix::fs::statat(&root, name, flags).unwrap());
    }
    assert_eq!(store.footprint().bytes + own.bytes, all.bytes);
}

#[test]
fn a_pull_waits_for_the_blob_and_the_files_follow() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    assert_eq!(names(dir(&place.store, &layer)), KEPT);
    assert_counted(&place.store);
    place.store.settle().unwrap();
    assert_eq!(names(dir(&place.store, &layer)), SETTLED);
    assert_counted(&place.store);
}

#[test]
fn the_files_follow_by_themselves() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while names(dir(&place.store, &layer)) != SETTLED {
        assert!(Instant::now() < deadline, "the blob stays");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_power_cut_before_that_costs_nothing() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    let at = dir(&place.store, &layer);
    fs::write(at.join("fs/d/a"), "").unwrap();
    fs::remove_file(at.join("fs/d/b")).unwrap();
    from_another_boot(&place.store, &layer.id);

    struct NotAsked;
    impl Read for NotAsked {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("the layer is fetched")
        }
    }
    let store = Store::open(place.store.dir()).unwrap();
    let ingest = Ingest {
        diff_ids: std::slice::from_ref(&layer.diff_id),
        parents: None,
        compression: Compression::Gzip,
        limit_bytes: None,
    };
    let lease = store.lease();
    // Whoever wants it meanwhile waits for it.
    let again = store.unpack(&lease, ingest, NotAsked).unwrap();
    store.finish_rebuilding();
    assert_eq!(again, layer);
    assert_eq!(fs::read(at.join("fs/d/a")).unwrap(), b"content");
    assert_eq!(fs::read(at.join("fs/d/b")).unwrap(), [b'x'; 9000]);
    store.finish_removals();
    assert_eq!(names(&at), SETTLED);
    assert_eq!(names(store.dir()), [layer.id.to_string(), "empty".into()]);
    assert_counted(&store);
    // The next boot trusts it.
    from_another_boot(&store, &layer.id);
    assert!(Store::open(store.dir()).unwrap().has(&layer.id));
}

#[test]
fn a_record_that_is_lost_with_the_files_is_made_again() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    fs::write(dir(&place.store, &layer).join("layer.rec"), "").unwrap();
    let store = Store::open(place.store.dir()).unwrap();
    store.finish_rebuilding();
    assert_eq!(store.info(&layer.id), Some(layer));
}

#[test]
fn a_blob_that_is_damaged_costs_its_layer() {
    for damage in ["", "garbage"] {
        let place = Place::new();
        let layer = unpack(&place, &[], &tar(), None);
        place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
        fs::write(dir(&place.store, &layer).join("blob"), damage).unwrap();
        from_another_boot(&place.store, &layer.id);
        let store = Store::open(place.store.dir()).unwrap();
        store.finish_rebuilding();
        assert!(!store.has(&layer.id));
        store.finish_removals();
        assert_eq!(names(store.dir()), ["empty"]);
    }
}

#[test]
fn a_daemon_that_comes_back_goes_on() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    let store = Store::open(place.store.dir()).unwrap();
    assert!(store.has(&layer.id));
    assert!(!store.is_rebuilding(&layer.id));
    assert_eq!(names(dir(&store, &layer)), KEPT);
    store.settle().unwrap();
    assert_eq!(names(dir(&store, &layer)), SETTLED);
    // One that ended before it had removed the blob.
    fs::write(dir(&store, &layer).join("blob"), "old").unwrap();
    let store = Store::open(place.store.dir()).unwrap();
    assert_eq!(names(dir(&store, &layer)), SETTLED);
}

#[test]
fn what_cannot_be_unpacked_again_is_synced_before_it_counts() {
    let place = Place::new();
    let below = unpack(&place, &[], &tar(), Some(1));
    assert!(
        !names(dir(&place.store, &below)).contains(&"blob".into()),
        "another length"
    );
    let leaning = unpack(&place, &[&below], &Tar::new().file("d/c", "new"), None);
    assert!(
        !names(dir(&place.store, &leaning)).contains(&"blob".into()),
        "leans"
    );
    let kept = unpack(&place, &[], &Tar::new().file("e", "kept"), None);
    assert_eq!(names(dir(&place.store, &kept)), KEPT);
    let huge = unpack(
        &place,
        &[],
        &Tar::new().file("f", "huge"),
        Some(u64::MAX / 16),
    );
    assert!(
        !names(dir(&place.store, &huge)).contains(&"blob".into()),
        "no room"
    );
    let all = [&below, &leaning, &kept, &huge];
    let ids: Vec<_> = all.iter().map(|layer| layer.id.clone()).collect();
    place.store.sync(&ids[2..3]).unwrap();
    assert_eq!(names(dir(&place.store, &kept)), KEPT);
    place.store.sync(&ids).unwrap();
    for layer in all {
        assert_eq!(names(dir(&place.store, layer)), SETTLED);
    }
}

#[test]
fn a_layer_that_was_removed_takes_its_blob_along() {
    let place = Place::new();
    let layer = unpack(&place, &[], &tar(), None);
    place.store.sync(std::slice::from_ref(&layer.id)).unwrap();
    place.store.remove(&layer.id).unwrap();
    place.store.settle().unwrap();
    place.store.finish_removals();
    assert_eq!(names(place.store.dir()), ["empty"]);
    assert_eq!(place.store.footprint().bytes, 0);
}
