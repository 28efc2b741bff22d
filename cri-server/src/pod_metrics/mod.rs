//! The metrics that the kubelet shows of pods (KEP-2371), named as cAdvisor names
//! them: all 56 that the conformance suite knows, from the same files of the
//! kernel that the statistics come from.
//!
//! Values are whole numbers, as CRI has them: seconds are cut off.

mod families;
mod samples;

pub use families::descriptors;
pub use samples::{FileSystem, container, pod};
