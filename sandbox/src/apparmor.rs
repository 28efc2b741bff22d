//! AppArmor: which profiles the kernel has, and our own for who asks for the default.
//!
//! A profile is text that `apparmor_parser` compiles and loads. Ours is loaded at
//! the start of the daemon, over one of an earlier version. Where the parser is
//! missing, or the kernel has no AppArmor, "runtime/default" means unconfined:
//! the same as with the peers.
//!
//! Source: apparmor.d(5), apparmor_parser(8); kernel, `apparmorfs.c`: `profiles`.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The name of our own profile.
pub const DEFAULT_PROFILE: &str = "berth-default";

/// Its text. What the capabilities and the mount namespace of a container do not
/// already keep from it: files of the kernel that change the whole host, mounts,
/// and other processes' memory. No includes: they are files of the host.
const DEFAULT_TEXT: &str = include_str!("apparmor/berth-default");

/// Where the kernel says which profiles it has.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Why our own profile is not there, or another one cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The kernel's list cannot be read.
    #[error("cannot read {path}: is securityfs mounted?")]
    Profiles {
        /// The list.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The parser is missing or cannot be run.
    #[error("cannot run apparmor_parser")]
    Parser(#[source] io::Error),
    /// The parser refused.
    #[error("apparmor_parser does not load the profile {DEFAULT_PROFILE}: {said}")]
    Refused {
        /// What it said.
        said: String,
    },
    /// Nobody has loaded it.
    #[error("the AppArmor profile {name:?} is not loaded on this node")]
    NotLoaded {
        /// The profile's name.
        name: String,
    },
}

/// Whether the kernel confines by AppArmor.
pub fn is_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.trim() == "Y")
}

/// Makes sure that the kernel has the profile `name`.
///
/// # Errors
/// `NotLoaded`, or the kernel's list cannot be read.
pub fn check_loaded(name: &str) -> Result<(), AppArmorError> {
    let path = Path::new(PROFILES);
    let text = fs::read_to_string(path).map_err(|source| AppArmorError::Profiles {
        path: path.to_owned(),
        source,
    })?;
    if names(&text).any(|known| known == name) {
        return Ok(());
    }
    Err(AppArmorError::NotLoaded { name: name.into() })
}

/// "name (enforce)" a line; a name may hold spaces.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.rsplit_once(" (").map(|(name, _)| name))
}

/// What the profile has opinions on, where the parser knows that list: without
/// it a newer kernel's user namespaces would be refused for want of a rule that
/// an older parser cannot read.
const ABI: &str = "abi <abi/3.0>,\n";

/// Loads our own profile, also over one that is there.
///
/// # Errors
/// `Parser` where there is no apparmor_parser, `Refused` with what it said.
pub fn load_default() -> Result<(), AppArmorError> {
    match load(&format!("{ABI}{DEFAULT_TEXT}")) {
        Err(AppArmorError::Refused { .. }) => load(DEFAULT_TEXT),
        other => other,
    }
}

fn load(text: &str) -> Result<(), AppArmorError> {
    // In a service's PATH the directories of administration may be missing.
    const PATH: &str = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin";
    let mut parser = Command::new("apparmor_parser")
        .args(["--replace", "--skip-cache", "--quiet"])
        .env("PATH", PATH)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(AppArmorError::Parser)?;
    if let Some(mut stdin) = parser.stdin.take() {
        // One that ends without reading says why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = parser.wait_with_output().map_err(AppArmorError::Parser)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(AppArmorError::Refused {
        said: said.trim().chars().take(500).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_profiles_are_read() {
        let text = "berth-default (enforce)\n/usr/bin/man (complain)\na b//c (enforce)\nodd\n";
        let all: Vec<_> = names(text).collect();
        assert_eq!(all, ["berth-default", "/usr/bin/man", "a b//c"]);
    }

    #[test]
    fn our_profile_has_the_name_we_say() {
        assert!(DEFAULT_TEXT.contains(&format!("profile {DEFAULT_PROFILE} ")));
        let peers = DEFAULT_TEXT.matches("peer=").count();
        let ours = DEFAULT_TEXT
            .matches(&format!("peer={DEFAULT_PROFILE}"))
            .count();
        // The host, and runtimes for which distributions have a profile by name.
        let host = ["unconfined", "runc", "crun"]
            .map(|name| DEFAULT_TEXT.matches(&format!("peer={name},")).count());
        assert_eq!(peers, ours + host.iter().sum::<usize>());
    }
}
