//! Checks of the machine.

use super::{Finding, Node};
use crate::config::DefaultNetwork;
use berth_sandbox::cgroup;
use rustix::process::{Resource, getrlimit};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// The oldest kernel that Berth is made for: mount_setattr(2) came with 5.12 and
/// cgroup.kill with 5.14. What newer ones have is used where it is there.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Free space below which pulls soon fail. Unit: bytes.
const LITTLE_SPACE: u64 = 2 << 30;

pub fn privileges(_: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "privileges";
    if !rustix::process::geteuid().is_root() {
        return vec![Finding::problem(
            SUBJECT,
            "not run as root: what follows may be wrong",
            "run it as root, as the daemon is",
        )];
    }
    vec![Finding::good(SUBJECT, "root")]
}

pub fn kernel(_: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "kernel";
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut findings = vec![match parse_release(&release) {
        Some(version) if version < OLDEST_KERNEL => Finding::problem(
            SUBJECT,
            format!("{release} is older than 5.15"),
            "boot a newer one",
        ),
        Some(_) => Finding::good(SUBJECT, release),
        None => Finding::warning(SUBJECT, format!("cannot read the version {release:?}"), ""),
    }];
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for needed in ["overlay", "tmpfs", "mqueue"] {
        if !filesystems.split_whitespace().any(|name| name == needed) {
            findings.push(Finding::warning(
                SUBJECT,
                format!("the file system {needed} is not there"),
                format!("modprobe {needed}, or build it in"),
            ));
        }
    }
    findings
}

/// Major and minor of "6.12.30+deb12-amd64".
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub fn cgroups(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "cgroups";
    let settings = crate::serve::cgroup_settings(&node.config);
    let found = cgroup::Cgroups::detect(settings).and_then(|found| {
        if node.config.containers.writable_cgroup {
            found.delegates()?;
        }
        Ok(found)
    });
    vec![match found {
        Ok(found) => Finding::good(
            SUBJECT,
            format!("{:?}, driver {:?}", found.version(), found.driver()).to_lowercase(),
        ),
        Err(error) => Finding::problem(
            SUBJECT,
            crate::rpc::chain(&error),
            "see cgroup.driver and containers.writable_cgroup in `berth config default`",
        ),
    }]
}

pub fn limits(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "limits";
    let mut findings = Vec::new();
    let wanted = node.config.runtime.nofile_hard;
    if let Some(hard) = getrlimit(Resource::Nofile)
        .maximum
        .filter(|&hard| hard < wanted)
    {
        findings.push(Finding::warning(
            SUBJECT,
            format!(
                "containers get {hard} open files, not {wanted}: this process may have no more"
            ),
            "raise LimitNOFILE of the unit, or lower runtime.nofile_hard",
        ));
    }
    /// Source: linux/capability.h.
    const CAP_SYS_RESOURCE: u32 = 24;
    match berth_sys::caps::get() {
        Ok(sets) if sets.effective & (1 << CAP_SYS_RESOURCE) == 0 => {
            findings.push(Finding::warning(
                SUBJECT,
                "CAP_SYS_RESOURCE is missing: a negative oom_score_adj and higher limits are clamped",
                "give the daemon all capabilities",
            ));
        }
        Ok(_) => {}
        Err(error) => findings.push(Finding::warning(SUBJECT, error.to_string(), "")),
    }
    if findings.is_empty() {
        findings.push(Finding::good(SUBJECT, "as configured"));
    }
    findings
}

pub fn state_directory(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "state";
    let path = &node.places.lib;
    let mut findings = Vec::new();
    if let Some(closed) = path.ancestors().skip(1).find(|dir| only_root_enters(dir)) {
        findings.push(Finding::warning(
            SUBJECT,
            format!("only root may enter {}", closed.display()),
            "pods with user namespaces cannot reach their files: chmod o+x, or move paths.state",
        ));
    }
    let existing = path.ancestors().find(|dir| dir.exists());
    let space = existing.and_then(|dir| rustix::fs::statvfs(dir).ok());
    if let Some(space) = space {
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let text = format!(
            "{}, {:.1} GiB free",
            path.display(),
            free as f64 / (1 << 30) as f64
        );
        findings.push(if free < LITTLE_SPACE {
            Finding::warning(
                SUBJECT,
                text,
                "make room; `berth image prune` removes unused images",
            )
        } else {
            Finding::good(SUBJECT, text)
        });
    }
    findings
}

fn only_root_enters(dir: &Path) -> bool {
    std::fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0)
}

pub fn programs(node: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "programs";
    let mut findings = Vec::new();
    match crate::serve::monitor_program(&node.config.monitor.path) {
        Some(path) if path.is_file() => {
            findings.push(Finding::good(
                SUBJECT,
                format!("monitor {}", path.display()),
            ));
        }
        Some(path) => findings.push(Finding::problem(
            SUBJECT,
            format!("{} is not there", path.display()),
            "see monitor.path",
        )),
        None => findings.push(Finding::problem(
            SUBJECT,
            "berth-monitor is neither beside this program nor in PATH",
            "install it there, or set monitor.path",
        )),
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nft = std::env::split_paths(&path).any(|dir| dir.join("nft").is_file());
    match (nft, node.config.network.default) {
        (true, _) => findings.push(Finding::good(SUBJECT, "nft")),
        (false, DefaultNetwork::Builtin) => findings.push(Finding::problem(
            SUBJECT,
            "nft is not in PATH: the built-in network cannot masquerade or forward ports",
            "install nftables",
        )),
        (false, DefaultNetwork::Wait) => {}
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(parse_release("6.12.30+deb12-amd64"), Some((6, 12)));
        assert_eq!(parse_release("7.0-rc1"), Some((7, 0)));
        assert_eq!(parse_release("linux"), None);
        assert!(parse_release("5.4.1").unwrap() < OLDEST_KERNEL);
    }
}
