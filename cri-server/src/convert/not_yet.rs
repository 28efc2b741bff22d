//! What CRI may ask for and this version does not do. Each is refused by name,
//! before anything is made; a line goes away when the feature arrives.

use super::NodeFacts;
use super::field::{Field, Result};
use berth_sandbox::container_spec::{AppArmorProfile, ContainerSpec};

const CONFIG: Field<'static> = Field::root("config");

/// What a container may not ask for yet.
pub fn check_container(spec: &ContainerSpec, node: &NodeFacts) -> Result<()> {
    let linux = CONFIG.at("linux");
    let context = linux.at("security_context");
    let security = &spec.security;
    match (&security.apparmor, node.apparmor) {
        (AppArmorProfile::Localhost(_), false) => {
            return Err(context
                .at("apparmor")
                .unsupported("AppArmor is not enabled on this node"));
        }
        (AppArmorProfile::Localhost(_), true)
        | (AppArmorProfile::RuntimeDefault | AppArmorProfile::Unconfined, _) => {}
    }
    Ok(())
}
