//! End-to-end tests of Berth: one private node per test, on the real kernel.
//!
//! [`Node`] runs the built `berth` below a root of its own, in a network
//! namespace that plays the host and below a cgroup of its own, and fails the
//! test when anything is left behind. The suites are in `tests/tests/`.
#![forbid(unsafe_code)]

pub mod binaries;
pub mod bulk;
pub mod container;
pub mod deadline;
pub mod host;
pub mod http;
pub mod image;
pub mod leftovers;
pub mod node;
pub mod pod;
pub mod registry;
pub mod streaming;

pub use container::{Container, LinuxConfig, LogLine};
pub use deadline::{eventually, within};
pub use image::{Format, Image, Layer, Packing};
pub use node::Node;
pub use pod::Pod;
pub use registry::Registry;

use sha2::{Digest, Sha256};

/// "sha256:" and 64 hex digits.
pub fn sha256(data: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(data)))
}
