//! Checks of what confines containers.

use super::{Finding, Node};
use berth_sandbox::apparmor;
use berth_sandbox::monitor::Program;
use berth_sandbox::selinux::Found;
use berth_sandbox::user_namespace::UserNamespaces;

/// AppArmor, and whether our own profile is there.
pub fn app_armor(_: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "AppArmor";
    if !apparmor::is_enabled() {
        // Its absence is no fault: most kernels have one of it and SELinux.
        return vec![Finding::good(SUBJECT, "not in this kernel, or off")];
    }
    vec![match apparmor::check_loaded(apparmor::DEFAULT_PROFILE) {
        Ok(()) => Finding::good(SUBJECT, "on; the default profile is loaded"),
        Err(error) => Finding::warning(
            SUBJECT,
            format!(
                "on, but containers that ask for the default profile are unconfined: {}",
                crate::rpc::chain(&error)
            ),
            "install apparmor_parser (the package apparmor), and start berth again",
        ),
    }]
}

/// SELinux, and whether containers get labels.
pub fn selinux(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "SELinux";
    vec![match crate::serve::selinux(&node.config) {
        Ok(Found::Absent(why)) => Finding::good(SUBJECT, why),
        Ok(Found::Unusable(why)) => Finding::warning(
            SUBJECT,
            format!("on, but containers get no labels: {why}"),
            "install the policy's package for containers (container-selinux), and start berth again",
        ),
        Ok(Found::Enabled(selinux)) => {
            let mode = match selinux.is_enforcing() {
                true => "enforcing",
                false => "permissive: what it forbids is only told",
            };
            let (policy, usual) = (selinux.policy(), selinux.usual_process());
            Finding::good(
                SUBJECT,
                format!(
                    "on, policy {policy}, {mode}; containers are {usual} and a level of their pod's"
                ),
            )
        }
        Err(error) => Finding::problem(
            SUBJECT,
            crate::rpc::chain(&*error),
            "install the policy's package for containers (container-selinux), or set \
             runtime.selinux to \"off\"",
        ),
    }]
}

/// User namespaces for pods, by making one.
pub fn user_namespaces(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "user namespaces";
    let Some(program) = crate::serve::monitor_program(&node.config.monitor.path) else {
        // Told by the check of programs.
        return Vec::new();
    };
    let tried = Program::open(&program)
        .map_err(|error| crate::rpc::chain(&error))
        .and_then(|program| {
            let existing = node.places.lib.ancestors().find(|dir| dir.is_dir());
            let dir = existing.unwrap_or(std::path::Path::new("/"));
            let checked = UserNamespaces::default().check(&program, dir);
            checked.map_err(|error| crate::rpc::chain(&error))
        });
    vec![match tried {
        Ok(()) => Finding::good(SUBJECT, "pods can have them"),
        Err(why) => Finding::warning(
            SUBJECT,
            format!("pods cannot have them: {why}"),
            "needs Linux 5.19, user.max_user_namespaces above 0, and a state directory on ext4, \
             xfs, btrfs or another file system with ID-mapped mounts",
        ),
    }]
}
