//! Any tree that is packed comes out as it was.

use crate::Place;
use crate::archive::{Entry, Tar};
use crate::tar_twin::read_tree;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
struct Thing {
    kind: u8,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    data: Vec<u8>,
    device: (u32, u32),
    xattr: Option<Vec<u8>>,
}

fn thing() -> impl Strategy<Value = Thing> {
    (
        prop::sample::select(vec![b'0', b'0', b'0', b'2', b'3', b'4', b'5', b'5', b'6']),
        0u32..0o10000,
        (0u32..70_000, 0u32..70_000),
        (-1000i64..5_000_000_000, 0u32..1_000_000_000),
        prop::collection::vec(any::<u8>(), 0..3000),
        (1u32..500, 0u32..70_000),
        prop::option::of(prop::collection::vec(any::<u8>(), 1..50)),
    )
        .prop_map(|(kind, mode, owner, mtime, data, device, xattr)| Thing {
            kind,
            mode,
            owner,
            mtime,
            data,
            device,
            xattr,
        })
}

/// A path of up to four names, some of them long, and what is there.
fn tree() -> impl Strategy<Value = BTreeMap<String, Thing>> {
    let name = prop_oneof!["[a-c]", "[a-z .~-]{1,20}x", "[a-z]{120}"];
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    prop::collection::btree_map(path, thing(), 1..30).prop_map(|wanted| {
        let mut tree: BTreeMap<String, Thing> = BTreeMap::new();
        // A path comes after the paths it is below, so a parent is known when its child comes.
        for (path, thing) in wanted {
            let mut parents = Vec::new();
            let mut end = path.len();
            while let Some(slash) = path[..end].rfind('/') {
                parents.push(path[..slash].to_owned());
                end = slash;
            }
            let fits = parents
                .iter()
                .all(|p| tree.get(p).is_none_or(|parent| parent.kind == b'5'));
            if fits {
                for parent in parents {
                    let made = Thing {
                        kind: b'5',
                        ..thing.clone()
                    };
                    tree.entry(parent).or_insert(made);
                }
                tree.entry(path).or_insert(thing);
            }
        }
        tree
    })
}

/// Not all of a base64-free digit is a PAX number: seconds may be negative.
fn pax_time((seconds, nanoseconds): (i64, u32)) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    let (seconds, nanoseconds) = (-(seconds + 1), 1_000_000_000 - nanoseconds);
    format!("-{seconds}.{nanoseconds:09}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_out_as_it_went_in(tree in tree()) {
        let place = Place::new();
        let mut tar = Tar::new();
        for (path, thing) in &tree {
            let mut entry = Entry::new(path, thing.kind);
            entry.mode = thing.mode;
            (entry.uid, entry.gid) = (thing.owner.0.into(), thing.owner.1.into());
            match thing.kind {
                b'0' => entry.data = thing.data.clone(),
                b'2' => entry.link = target(thing),
                b'3' | b'4' => entry.device = thing.device,
                _ => {}
            }
            entry = entry.pax("mtime", pax_time(thing.mtime));
            if let Some(value) = &thing.xattr {
                entry = entry.pax("SCHILY.xattr.user.any", value);
            }
            tar.push(&entry);
        }
        let layer = place.unpack(&tar).unwrap();
        let found = read_tree(&place.fs(&layer));
        prop_assert_eq!(found.len(), tree.len() + 1);
        prop_assert_eq!(layer.inodes, found.len() as u64);
        for (path, thing) in &tree {
            let node = &found[path];
            let type_bits = match thing.kind {
                b'0' => 0o100_000,
                b'2' => 0o120_000,
                b'3' => 0o020_000,
                b'4' => 0o060_000,
                b'5' => 0o040_000,
                _ => 0o010_000,
            };
            let mode = if thing.kind == b'2' { 0o777 } else { thing.mode };
            prop_assert_eq!(node.mode, type_bits | mode, "{}", path);
            prop_assert_eq!(node.owner, thing.owner);
            prop_assert_eq!(node.mtime, (thing.mtime.0, thing.mtime.1.into()), "{}", path);
            match thing.kind {
                b'0' => prop_assert_eq!(&node.content, &thing.data),
                b'2' => prop_assert_eq!(&node.content, &target(thing)),
                b'3' | b'4' => {
                    let device = rustix::fs::makedev(thing.device.0, thing.device.1);
                    prop_assert_eq!(node.device, device);
                }
                _ => {}
            }
            let xattr = node.xattrs.get("user.any");
            let expected = thing.xattr.as_ref().filter(|_| matches!(thing.kind, b'0' | b'5'));
            prop_assert_eq!(xattr, expected);
        }
    }

    #[test]
    fn no_bytes_make_it_panic_or_leave_anything(
        mut bytes in prop::collection::vec(any::<u8>(), 0..3000),
        flips in prop::collection::vec((0usize..6000, any::<u8>()), 0..6),
        valid in any::<bool>(),
    ) {
        let place = Place::new();
        if valid {
            bytes = Tar::new()
                .dir("a")
                .entry(&Entry::new("a/b", b'0').pax("mtime", "1.5").pax("SCHILY.xattr.user.a", "b"))
                .hard_link("c", "a/b")
                .symlink("d", "a")
                .file("d/e", "data")
                .file("a/.wh.x", "")
                .bytes();
        }
        for (at, to) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
        }
        // The checksums are made right again, so that more than they is tested.
        if valid {
            let blocks = bytes.len() / 512;
            for block in 0..blocks {
                let header: &mut [u8] = &mut bytes[block * 512..][..512];
                if header[257..262] == *b"ustar" {
                    header[148..156].fill(b' ');
                    let sum: u64 = header.iter().map(|&b| u64::from(b)).sum();
                    crate::archive::octal(&mut header[148..155], sum);
                }
            }
        }
        let diff_id = berth_image_service::digest::Digest::sha256(&bytes);
        let result = place.unpack_bytes(
            &diff_id,
            berth_image_service::unpack::Compression::None,
            bytes.as_slice(),
        );
        if let Ok(layer) = result {
            place.store.remove(&layer.id).unwrap();
        }
        place.assert_untouched();
    }
}

fn target(thing: &Thing) -> Vec<u8> {
    let length = 1 + thing.data.len() % 200;
    vec![b't'; length]
}
