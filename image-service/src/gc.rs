//! Removes the layers nobody needs.
//!
//! A layer stays while an image or a container's snapshot names it, or a lease
//! holds it. Whoever makes a new reference holds a lease from before it looks
//! for the layer until after the reference is recorded; then no order of events
//! loses a layer that is in use.

use crate::layer::{LayerId, Store, StoreError};
use std::collections::HashSet;

/// What a collection did.
#[derive(Debug, Default)]
pub struct Collected {
    /// Layers removed.
    pub layers: Vec<LayerId>,
    /// Space they took, in bytes; the file system has it back soon.
    pub bytes: u64,
    /// Inodes they took.
    pub inodes: u64,
    /// Layers that could not be removed; the next collection tries again.
    pub failures: Vec<StoreError>,
}

/// Removes every layer that `references` does not name and no lease holds.
///
/// `references` is asked after the leases were looked at, so that a reference
/// made meanwhile is seen as the one or the other. It must name the layers of
/// all images and of all containers.
///
/// # Errors
/// Those of `references`; nothing is removed then.
pub fn collect<E>(
    store: &Store,
    references: impl FnOnce() -> Result<HashSet<LayerId>, E>,
) -> Result<Collected, E> {
    let (removed, failures) = store.collect(references)?;
    Ok(Collected {
        bytes: removed.iter().map(|info| info.bytes).sum(),
        inodes: removed.iter().map(|info| info.inodes).sum(),
        layers: removed.into_iter().map(|info| info.id).collect(),
        failures,
    })
}
