//! What CRI may ask for and this version does not do. Each is refused by name,
//! before anything is made; a line goes away when the feature arrives.

use super::NodeFacts;
use super::field::{Field, Result};
use berth_sandbox::container_spec::{AppArmorProfile, ContainerSpec};
use berth_sandbox::pod_spec::PodSpec;

const CONFIG: Field<'static> = Field::root("config");

/// What a pod may not ask for yet.
pub fn check_pod(spec: &PodSpec, node: &NodeFacts) -> Result<()> {
    let linux = CONFIG.at("linux");
    let context = linux.at("security_context");
    if spec.security.selinux.is_some() && node.selinux {
        return Err(context
            .at("selinux_options")
            .unsupported("SELinux labels are not supported yet"));
    }
    Ok(())
}

/// What a container may not ask for yet.
pub fn check_container(spec: &ContainerSpec, node: &NodeFacts) -> Result<()> {
    let linux = CONFIG.at("linux");
    let context = linux.at("security_context");
    let security = &spec.security;
    // Where a node has no SELinux, a label has no meaning and manifests that carry one must run.
    if security.selinux.is_some() && node.selinux {
        return Err(context
            .at("selinux_options")
            .unsupported("SELinux labels are not supported yet"));
    }
    match (&security.apparmor, node.apparmor) {
        (AppArmorProfile::Localhost(_), false) => {
            return Err(context
                .at("apparmor")
                .unsupported("AppArmor is not enabled on this node"));
        }
        (AppArmorProfile::Localhost(_), true)
        | (AppArmorProfile::RuntimeDefault | AppArmorProfile::Unconfined, _) => {}
    }
    let mounts = CONFIG.at("mounts");
    for (i, mount) in spec.mounts.iter().enumerate() {
        let field = mounts.index(i);
        if mount.selinux_relabel && node.selinux {
            return Err(field
                .at("selinux_relabel")
                .unsupported("SELinux labels are not supported yet"));
        }
    }
    Ok(())
}
