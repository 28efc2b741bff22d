//! CRI's messages to what `sandbox` wants, and back.
//!
//! All validation of requests is here: what leaves this module as a `PodSpec` or
//! a `ContainerSpec` can be carried out or is refused by the kernel, but is never
//! nonsense. Each refusal names the field by its path in the request.

// Older kubelets fill the fields that CRI has deprecated, so they are read.
#![allow(deprecated)]

pub mod answer;
#[cfg(test)]
mod answer_tests;
pub mod container;
pub mod field;
pub mod filter;
pub mod image;
mod mount;
mod not_yet;
pub mod pod;
pub mod resources;
mod security;
pub mod signal;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod text;

pub use container::container_spec;
pub use field::{Field, Refused};
pub use pod::pod_spec;

use berth_sandbox::container_spec::SeccompProfile;
use berth_sandbox::handler::Handlers;

/// What a request's meaning depends on.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// AppArmor is enabled.
    pub apparmor: bool,
    /// The OCI runtimes that pods may name as their handler.
    pub handlers: Handlers,
    /// The profile of containers whose request names none.
    pub unset_seccomp: SeccompProfile,
}

impl NodeFacts {
    /// What this kernel has, and what the configuration says.
    /// Source: Documentation/admin-guide/LSM/apparmor.rst.
    pub fn detect(unset_seccomp: SeccompProfile, handlers: Handlers) -> Self {
        Self {
            apparmor: berth_sandbox::apparmor::is_enabled(),
            handlers,
            unset_seccomp,
        }
    }
}
