//! Lives of pods and containers: what is asked for, what is on disk, what the
//! kernel holds, and how the three are brought together after a crash.
//!
//! Nothing here knows gRPC; `cri-server` turns requests into [`PodSpec`] and
//! [`ContainerSpec`] and what it finds in a [`view::View`] into answers.
#![forbid(unsafe_code)]

pub mod apparmor;
pub mod capability;
pub mod cdi;
pub mod cgroup;
pub mod checkpoint;
pub mod container;
pub mod container_spec;
pub mod error;
pub mod events;
pub mod handler;
pub mod hooks;
pub mod id;
pub mod image;
pub mod launch;
pub mod monitor;
pub mod oci;
pub mod oom;
pub mod operation;
pub mod pod;
pub mod pod_files;
pub mod pod_spec;
pub mod processes;
pub mod seccomp;
pub mod selinux;
pub mod service;
pub mod stats;
pub mod user;
pub mod user_namespace;
pub mod view;

pub use container_spec::{ContainerName, ContainerSpec};
pub use error::{Kind, SandboxError};
pub use id::{BadId, ContainerId, PodId};
pub use pod_spec::{PodName, PodSpec};
pub use service::Sandboxes;
