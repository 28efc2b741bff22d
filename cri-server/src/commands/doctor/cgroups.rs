//! Whether the kubelet and Berth make cgroups the same way, and what the kernel
//! counts.

use super::{Finding, Node};
use berth_sandbox::cgroup::{Cgroups, Driver, PullCgroup, Version};
use std::path::Path;
use std::sync::Arc;

/// Where kubeadm and most others write it. Source: kubeadm, KubeletConfigurationFile.
const KUBELET_CONFIG: &str = "/var/lib/kubelet/config.yaml";

/// Controllers without which a kubelet does not start. Source: kubelet, cgroup_manager_linux.go.
const NEEDED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

fn word(driver: Driver) -> &'static str {
    match driver {
        Driver::Cgroupfs => "cgroupfs",
        Driver::Systemd => "systemd",
    }
}

/// The driver, the kubelet's, and what is missing.
pub fn cgroups(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "cgroup driver";
    let settings = crate::serve::cgroup_settings(&node.config);
    let root = settings.root.clone();
    // Said by the check before.
    let Ok(found) = Cgroups::detect(settings) else {
        return Vec::new();
    };
    let config = std::fs::read_to_string(KUBELET_CONFIG).unwrap_or_default();
    let mut findings = vec![compare(found.driver(), configured(&config), running(&root))];
    let controllers = found.controllers();
    let missing: Vec<&str> = NEEDED
        .into_iter()
        .filter(|name| !controllers.contains(name))
        .collect();
    if !missing.is_empty() {
        findings.push(Finding::problem(
            SUBJECT,
            format!("no {} controller", missing.join(", no ")),
            "the kernel was built or started without (cgroup_disable=)",
        ));
    }
    if found.version() == Version::V1 {
        findings.push(Finding::warning(
            SUBJECT,
            "this host has cgroup v1, which the kubelet refuses since Kubernetes 1.35",
            "boot with systemd.unified_cgroup_hierarchy=1, or set failCgroupV1: false in the kubelet",
        ));
    }
    if std::fs::read_to_string("/proc/pressure/cpu").is_err() {
        findings.push(Finding::warning(
            SUBJECT,
            "the kernel does not measure pressure (PSI): statistics come without it",
            "boot with psi=1",
        ));
    }
    findings
}

/// Whether the cgroup for pulls does what it is for.
pub fn of_pulls(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "pull cgroup";
    let Some(settings) = crate::pull_cgroup::settings(&node.config) else {
        return Vec::new();
    };
    // Said by the check before.
    let Ok(found) = Cgroups::detect(crate::serve::cgroup_settings(&node.config)) else {
        return Vec::new();
    };
    let cgroup = match PullCgroup::new(Arc::new(found), &settings) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            let error = crate::rpc::chain(&error);
            return vec![Finding::problem(
                SUBJECT,
                format!("images.pull_cgroup cannot be used, berth serve does not start: {error}"),
                "name another, or none",
            )];
        }
    };
    let mut findings: Vec<Finding> = cgroup
        .shortcomings()
        .iter()
        .map(|short| Finding::warning(SUBJECT, short.to_string(), short.advice()))
        .collect();
    let path = cgroup.path();
    findings.push(match cgroup.exists() {
        true => Finding::good(SUBJECT, format!("layers are written in {path}")),
        false => Finding::warning(
            SUBJECT,
            format!("{path} is not there, so what the kernel has for a weight is not known"),
            "start `berth serve`, which makes it",
        ),
    });
    findings
}

/// `cgroupDriver` of the kubelet's configuration file.
fn configured(config: &str) -> Option<Driver> {
    let value = config
        .lines()
        .find_map(|line| line.strip_prefix("cgroupDriver:"))?;
    match value.trim().trim_matches(['"', '\'']) {
        "systemd" => Some(Driver::Systemd),
        "cgroupfs" => Some(Driver::Cgroupfs),
        _ => None,
    }
}

/// What the pods' cgroups look like that a kubelet has made here.
fn running(root: &Path) -> Option<Driver> {
    let is_there = |name: &str| {
        [root.join(name), root.join("memory").join(name)]
            .iter()
            .any(|path| path.is_dir())
    };
    match (is_there("kubepods.slice"), is_there("kubepods")) {
        (true, false) => Some(Driver::Systemd),
        (false, true) => Some(Driver::Cgroupfs),
        // None has run, or one after the other.
        (false, false) | (true, true) => None,
    }
}

fn compare(own: Driver, configured: Option<Driver>, running: Option<Driver>) -> Finding {
    const SUBJECT: &str = "cgroup driver";
    let advice = format!(
        "set cgroupDriver: {} in {KUBELET_CONFIG} and restart the kubelet, or let cgroup.driver in \
         Berth's configuration be the kubelet's; since Kubernetes 1.34 the kubelet asks Berth itself",
        word(own)
    );
    match (configured, running) {
        (Some(kubelet), _) if kubelet != own => Finding::problem(
            SUBJECT,
            format!(
                "Berth uses {}, and {KUBELET_CONFIG} says {}",
                word(own),
                word(kubelet)
            ),
            advice,
        ),
        (None, Some(kubelet)) if kubelet != own => Finding::problem(
            SUBJECT,
            format!(
                "Berth uses {}, and a kubelet has made pods' cgroups with {}",
                word(own),
                word(kubelet)
            ),
            advice,
        ),
        (Some(_), _) => Finding::good(SUBJECT, format!("{}, as the kubelet has it", word(own))),
        (None, _) => Finding::good(
            SUBJECT,
            format!("{}, which RuntimeConfig tells the kubelet", word(own)),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn the_kubelets_driver_is_read_from_its_configuration() {
        let config = "kind: KubeletConfiguration\ncgroupDriver: \"systemd\"\nx: y\n";
        assert_eq!(configured(config), Some(Driver::Systemd));
        assert_eq!(configured("cgroupDriver: cgroupfs"), Some(Driver::Cgroupfs));
        assert_eq!(configured("# cgroupDriver: systemd\n"), None);
    }

    #[test]
    fn drivers_that_differ_are_a_problem_that_says_what_to_set() {
        let differ = compare(Driver::Systemd, Some(Driver::Cgroupfs), None);
        assert_eq!(differ.level, Level::Problem);
        assert!(differ.advice.contains("cgroupDriver: systemd"));
        let seen = compare(Driver::Cgroupfs, None, Some(Driver::Systemd));
        assert_eq!(seen.level, Level::Problem);
        let same = compare(
            Driver::Systemd,
            Some(Driver::Systemd),
            Some(Driver::Cgroupfs),
        );
        assert_eq!(same.level, Level::Good);
    }
}
