//! Lives of pods and containers: what is asked for, what is on disk, what the
//! kernel holds, and how the three are brought together after a crash.
//!
//! Nothing here knows gRPC; `cri-server` turns requests into [`PodSpec`] and
//! [`ContainerSpec`] and what it finds in a [`view::View`] into answers.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod container_spec;
pub mod id;
pub mod image;
pub mod pod_spec;

pub use container_spec::{ContainerName, ContainerSpec};
pub use id::{BadId, ContainerId, PodId};
pub use pod_spec::{PodName, PodSpec};
