//! Which devices a container may touch.

use super::{Error, file};
use serde::{Deserialize, Serialize};
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Character and block devices.
    All,
    Char,
    Block,
}

/// One rule, later ones override earlier ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRule {
    pub allow: bool,
    pub kind: DeviceKind,
    /// `None`: every one.
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Letters of "rwm": read, write, mknod.
    pub access: String,
}

impl DeviceRule {
    /// Everything, for privileged containers.
    pub fn everything() -> Self {
        Self {
            allow: true,
            kind: DeviceKind::All,
            major: None,
            minor: None,
            access: "rwm".into(),
        }
    }

    /// What every container gets: nothing but nodes may be made, and the harmless devices used.
    ///
    /// Source: OCI runtime-spec, `config-linux.md`, "Default Devices".
    pub fn defaults() -> Vec<Self> {
        let rule = |allow, kind, major, minor, access: &str| Self {
            allow,
            kind,
            major,
            minor,
            access: access.to_owned(),
        };
        let char =
            |major, minor: u32| rule(true, DeviceKind::Char, Some(major), Some(minor), "rwm");
        vec![
            rule(false, DeviceKind::All, None, None, "rwm"),
            rule(true, DeviceKind::Char, None, None, "m"),
            rule(true, DeviceKind::Block, None, None, "m"),
            char(1, 3),
            char(1, 5),
            char(1, 7),
            char(1, 8),
            char(1, 9),
            char(5, 0),
            char(5, 2),
            rule(true, DeviceKind::Char, Some(136), None, "rwm"),
        ]
    }

    /// As `devices.allow` and `devices.deny` take it: "c 1:3 rwm".
    fn v1(&self) -> String {
        let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let kind = match self.kind {
            DeviceKind::All => "a",
            DeviceKind::Char => "c",
            DeviceKind::Block => "b",
        };
        format!(
            "{kind} {}:{} {}",
            number(self.major),
            number(self.minor),
            self.access
        )
    }
}

pub(super) fn apply_v1(directory: &Path, rules: &[DeviceRule]) -> Result<(), Error> {
    let [allow, deny] = ["devices.allow", "devices.deny"].map(|name| directory.join(name));
    for rule in rules {
        file::write(if rule.allow { &allow } else { &deny }, &rule.v1())?;
    }
    Ok(())
}
