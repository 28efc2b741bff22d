//! One copy of each layer: shared, leased, collected, and whole after a crash.

use crate::Place;
use crate::archive::Tar;
use berth_image_service::digest::Digest;
use berth_image_service::gc;
use berth_image_service::layer::{Ingest, LayerId, LayerInfo, Store};
use berth_image_service::snapshot::{SnapshotError, Snapshots};
use berth_image_service::unpack::Compression;
use std::collections::HashSet;
use std::convert::Infallible;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

fn layer(place: &Place, name: &str) -> LayerInfo {
    place.unpack(&Tar::new().file(name, "content")).unwrap()
}

fn none() -> Result<HashSet<LayerId>, Infallible> {
    Ok(HashSet::new())
}

#[test]
fn layer_ids_are_names_and_nothing_else_is() {
    let diff_id = Digest::sha256(b"");
    let alone = LayerId::alone(&diff_id);
    let on = LayerId::on_parents(&[diff_id.clone(), diff_id]).unwrap();
    for id in [alone, on] {
        assert_eq!(id.to_string().parse::<LayerId>().unwrap(), id);
    }
    for bad in [
        "",
        "on-",
        "empty",
        "ingest-0123",
        "../x",
        &"g".repeat(64),
        &"0".repeat(63),
    ] {
        bad.parse::<LayerId>().unwrap_err();
    }
}

#[test]
fn chain_ids_are_the_specs() {
    use berth_image_service::layer::chain_id;
    let one = Digest::sha256(b"1");
    let two = Digest::sha256(b"2");
    assert_eq!(chain_id(&[]), None);
    assert_eq!(chain_id(std::slice::from_ref(&one)).unwrap(), one);
    // Source: `printf '%s %s' DIGEST DIGEST | sha256sum`.
    let both = Digest::sha256(format!("{one} {two}").as_bytes());
    assert_eq!(chain_id(&[one, two]).unwrap(), both);
}

#[test]
fn a_layer_is_read_once_however_many_want_it() {
    struct Counted<'a>(&'a [u8], &'a AtomicUsize);
    impl Read for Counted<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read(buffer)?;
            self.1.fetch_add(count, Ordering::SeqCst);
            Ok(count)
        }
    }
    let place = Place::new();
    let bytes = Tar::new().file("a", &"x".repeat(1 << 20)).bytes();
    let diff_id = Digest::sha256(&bytes);
    let read = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                place
                    .unpack_bytes(&diff_id, Compression::None, Counted(&bytes, &read))
                    .unwrap();
            });
        }
    });
    assert_eq!(read.load(Ordering::SeqCst), bytes.len());
    assert_eq!(place.store.layers().len(), 1);
}

#[test]
fn the_next_one_takes_over_where_one_failed() {
    /// Says when it is read, and fails when it is told to.
    struct Failing(mpsc::Sender<()>, mpsc::Receiver<()>);
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            let _ = self.0.send(());
            let _ = self.1.recv();
            Err(io::Error::other("gone"))
        }
    }
    let place = Place::new();
    let bytes = Tar::new().file("a", "1").bytes();
    let diff_id = Digest::sha256(&bytes);
    let (reading, is_reading) = mpsc::channel();
    let (fail, failing) = mpsc::channel();
    thread::scope(|scope| {
        let first = scope
            .spawn(|| place.unpack_bytes(&diff_id, Compression::None, Failing(reading, failing)));
        is_reading.recv().unwrap();
        let second =
            scope.spawn(|| place.unpack_bytes(&diff_id, Compression::None, bytes.as_slice()));
        fail.send(()).unwrap();
        first.join().unwrap().unwrap_err();
        second.join().unwrap().unwrap();
    });
    place.store.finish_removals();
    assert_eq!(crate::names(place.store.dir()).len(), 2);
}

#[test]
fn a_layer_that_is_here_is_not_read_again() {
    let place = Place::new();
    let known = layer(&place, "a");
    let again = place
        .unpack_bytes(&known.diff_id, Compression::Gzip, io::empty())
        .unwrap();
    assert_eq!(again, known);
    let found = place
        .store
        .find(&place.lease, std::slice::from_ref(&known.diff_id));
    assert_eq!(found, Some(known));
}

#[test]
fn sums_are_kept_without_looking() {
    let place = Place::new();
    let before = place.store.sums();
    assert_eq!((before.bytes, before.inodes), (0, 0));
    let a = layer(&place, "a");
    let b = place
        .unpack(&Tar::new().dir("b").file("b/c", &"x".repeat(5000)))
        .unwrap();
    assert_eq!((a.bytes, a.inodes), (4096 + 4096, 2));
    assert_eq!((b.bytes, b.inodes), (4096 + 4096 + 8192, 3));
    let sums = place.store.sums();
    assert_eq!((sums.bytes, sums.inodes), (a.bytes + b.bytes, 5));
    place.store.remove(&b.id).unwrap();
    assert_eq!(place.store.sums().bytes, a.bytes);
    // Its directory, record, recipe and mark are kept beside it.
    let footprint = place.store.footprint();
    assert_eq!(footprint.inodes, a.inodes + 4);
    assert!(footprint.bytes > a.bytes);
    let lib = place.dir.path();
    let usage = |documents| berth_image_service::usage::of_images(lib, &place.store, documents, 0);
    let (without, with) = (usage((0, 0)), usage((100, 1)));
    assert_eq!(with.used_bytes, without.used_bytes + 100);
    assert_eq!(with.inodes, without.inodes + 1);
    assert!(without.used_bytes >= footprint.bytes);
    assert_eq!(
        Store::open(place.store.dir()).unwrap().sums().bytes,
        a.bytes
    );
}

#[test]
fn a_collection_removes_what_nobody_names_or_holds() {
    let mut place = Place::new();
    let (named, held, free) = (layer(&place, "a"), layer(&place, "b"), layer(&place, "c"));
    let lease = place.store.lease();
    assert!(lease.hold(&held.id));
    place.release();
    let references = || Ok::<_, Infallible>(HashSet::from([named.id.clone()]));
    let collected = gc::collect(&place.store, references).unwrap();
    assert_eq!(collected.layers, [free.id]);
    assert_eq!(
        (collected.bytes, collected.inodes),
        (free.bytes, free.inodes)
    );
    drop(lease);
    let collected = gc::collect(&place.store, references).unwrap();
    assert_eq!(collected.layers, [held.id]);
    place.store.finish_removals();
    assert_eq!(
        crate::names(place.store.dir()),
        [named.id.to_string(), "empty".into()]
    );
}

impl Place {
    /// Lets go of everything that was unpacked so far.
    fn release(&mut self) {
        self.lease = self.store.lease();
    }
}

#[test]
fn what_is_held_for_a_moment_of_a_collection_stays() {
    let mut place = Place::new();
    let info = layer(&place, "a");
    place.release();
    let collected = gc::collect(&place.store, || {
        // An image is made of it while the references are already being read.
        let lease = place.store.lease();
        assert!(lease.hold(&info.id));
        drop(lease);
        none()
    })
    .unwrap();
    assert_eq!(collected.layers, []);
    assert_eq!(gc::collect(&place.store, none).unwrap().layers, [info.id]);
}

#[test]
fn when_the_references_cannot_be_read_nothing_is_removed() {
    let mut place = Place::new();
    let info = layer(&place, "a");
    place.release();
    gc::collect(&place.store, || Err::<HashSet<LayerId>, _>("no")).unwrap_err();
    assert!(place.store.has(&info.id));
}

#[test]
fn the_layers_of_containers_are_references() {
    let mut place = Place::new();
    let (used, free) = (layer(&place, "a"), layer(&place, "b"));
    let snapshots = Snapshots::open(&place.dir.path().join("containers"), &place.store).unwrap();
    snapshots
        .prepare("one", std::slice::from_ref(&used.id))
        .unwrap();
    place.release();
    let collected = gc::collect(&place.store, || snapshots.references()).unwrap();
    assert_eq!(collected.layers, [free.id]);
    std::fs::write(snapshots.dir().join("one/snapshot.rec"), "garbage").unwrap();
    let result = gc::collect(&place.store, || snapshots.references());
    assert!(matches!(result, Err(SnapshotError::Record { .. })));
    snapshots.remove("one").unwrap();
    let collected = gc::collect(&place.store, || snapshots.references()).unwrap();
    assert_eq!(collected.layers, [used.id]);
}

#[test]
fn a_restart_finds_whole_layers_and_clears_the_rest() {
    let place = Place::new();
    let (synced, unsynced) = (layer(&place, "a"), layer(&place, "b"));
    let dir = place.store.dir().to_owned();
    std::fs::create_dir_all(dir.join("ingest-0123/fs/deep")).unwrap();
    std::fs::create_dir_all(dir.join("trash-0123/fs/deep")).unwrap();
    std::fs::create_dir_all(dir.join(format!("{}/fs", "0".repeat(64)))).unwrap();
    let store = Store::open(&dir).unwrap();
    store.finish_removals();
    assert_eq!(store.layers().len(), 2);
    assert_eq!(crate::names(&dir).len(), 3);
    assert_eq!(store.info(&synced.id), Some(synced.clone()));
    assert_eq!(store.info(&unsynced.id), Some(unsynced));
}

/// Changes the record as if it came from an earlier boot of the kernel.
pub(crate) fn from_another_boot(store: &Store, id: &LayerId) {
    let path = store.dir().join(id.to_string()).join("layer.rec");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let (header, payload) = text.split_once('\n').unwrap();
    let other = "0".repeat(boot.trim().len());
    let payload = payload.replace(boot.trim(), &other);
    assert!(payload.contains(&other));
    let crc = crc32fast::hash(payload.as_bytes());
    let (start, _) = header.rsplit_once(' ').unwrap();
    std::fs::write(path, format!("{start} {crc:08x}\n{payload}")).unwrap();
}

#[test]
fn after_a_power_cut_only_synced_layers_are_trusted() {
    let place = Place::new();
    let synced = layer(&place, "a");
    place.store.settle().unwrap();
    place.store.settle().unwrap();
    let unsynced = layer(&place, "b");
    for info in [&synced, &unsynced] {
        from_another_boot(&place.store, &info.id);
    }
    let store = Store::open(place.store.dir()).unwrap();
    assert!(store.has(&synced.id));
    assert!(!store.has(&unsynced.id));
}

#[test]
fn a_damaged_record_costs_itself() {
    let place = Place::new();
    let info = place
        .unpack(&Tar::new().dir("d").file("d/a", &"x".repeat(9000)))
        .unwrap();
    place.store.settle().unwrap();
    let path = place
        .store
        .dir()
        .join(info.id.to_string())
        .join("layer.rec");
    std::fs::write(&path, "garbage").unwrap();
    for _ in 0..2 {
        let store = Store::open(place.store.dir()).unwrap();
        let again = store.info(&info.id).unwrap();
        assert_eq!((&again.diff_id, again.inodes), (&info.diff_id, info.inodes));
    }
}

#[test]
fn a_removed_layer_is_gone_at_once_and_may_come_back() {
    let place = Place::new();
    let info = layer(&place, "a");
    place.store.remove(&info.id).unwrap();
    place.store.remove(&info.id).unwrap();
    assert!(!place.store.has(&info.id));
    assert!(!place.store.lease().hold(&info.id));
    assert_eq!(layer(&place, "a"), info);
}

#[test]
fn sha512_diff_ids_work_too() {
    let place = Place::new();
    let bytes = Tar::new().file("a", "1").bytes();
    let hex = hex::encode(<sha2::Sha512 as sha2::Digest>::digest(&bytes));
    let diff_ids = [format!("sha512:{hex}").parse().unwrap()];
    let ingest = Ingest {
        diff_ids: &diff_ids,
        parents: None,
        compression: Compression::None,
        limit_bytes: None,
    };
    let info = place
        .store
        .unpack(&place.lease, ingest, bytes.as_slice())
        .unwrap();
    assert!(Store::open(place.store.dir()).unwrap().has(&info.id));
}
