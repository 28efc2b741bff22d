//! Layers as strangers make them, unpacked and mounted on the kernel that is
//! here. All of it needs root.

mod archive;
mod hostile;
mod kept;
mod overlay;
mod random;
mod store;
mod tar_twin;

use archive::Tar;
use berth_image_service::digest::Digest;
use berth_image_service::layer::{Ingest, LayerInfo, Lease, Store};
use berth_image_service::unpack::{Compression, UnpackError};
use std::io::Read;
use std::path::PathBuf;

/// A store of its own, and beside it a directory nobody may touch.
struct Place {
    dir: tempfile::TempDir,
    store: Store,
    lease: Lease,
}

impl Place {
    fn new() -> Place {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests need root"
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/secret"), "untouched").unwrap();
        let store = Store::open(&dir.path().join("layers")).unwrap();
        let lease = store.lease();
        Place { dir, store, lease }
    }

    /// Unpacks the lowest layer of an image, uncompressed.
    fn unpack(&self, tar: &Tar) -> Result<LayerInfo, UnpackError> {
        self.unpack_on(&[], tar)
    }

    /// Unpacks a layer above others.
    fn unpack_on(&self, parents: &[&LayerInfo], tar: &Tar) -> Result<LayerInfo, UnpackError> {
        let bytes = tar.bytes();
        let mut diff_ids: Vec<Digest> = parents.iter().map(|p| p.diff_id.clone()).collect();
        diff_ids.push(Digest::sha256(&bytes));
        let parents: Vec<_> = parents.iter().map(|p| p.id.clone()).collect();
        let ingest = Ingest {
            diff_ids: &diff_ids,
            parents: Some(&parents),
            compression: Compression::None,
            limit_bytes: None,
        };
        self.store.unpack(&self.lease, ingest, bytes.as_slice())
    }

    fn unpack_bytes(
        &self,
        diff_id: &Digest,
        compression: Compression,
        blob: impl Read + Send,
    ) -> Result<LayerInfo, UnpackError> {
        let ingest = Ingest {
            diff_ids: std::slice::from_ref(diff_id),
            parents: None,
            compression,
            limit_bytes: None,
        };
        self.store.unpack(&self.lease, ingest, blob)
    }

    fn fs(&self, layer: &LayerInfo) -> PathBuf {
        self.store.dir().join(layer.id.to_string()).join("fs")
    }

    /// Fails if anything is stored, left over or changed beside the store.
    fn assert_untouched(&self) {
        assert_eq!(self.store.layers(), []);
        assert_eq!(self.store.sums().bytes, 0);
        self.store.finish_removals();
        assert_eq!(names(self.store.dir()), ["empty"]);
        assert_eq!(names(self.dir.path()), ["layers", "outside"]);
        assert_eq!(names(self.dir.path().join("outside")), ["secret"]);
        let secret = std::fs::read_to_string(self.dir.path().join("outside/secret")).unwrap();
        assert_eq!(secret, "untouched");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // So that the directory is quiet when it is removed.
        self.store.finish_removals();
    }
}

fn names(dir: impl AsRef<std::path::Path>) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
