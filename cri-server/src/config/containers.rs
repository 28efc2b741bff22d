//! The section `containers`, as the sandboxes want it.

use super::sections::Containers;
use super::setting::ImageVolumes;
use berth_sandbox::capability::CapSet;
use berth_sandbox::oci::{Defaults, Rlimit};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where time zones are. Source: tzselect(8).
const ZONES: &str = "/usr/share/zoneinfo";

/// A key and what is wrong with its value.
type Wrong = (&'static str, String);

/// What containers and Docker have given since long.
pub fn usual_capabilities() -> Vec<String> {
    let names = CapSet::defaults().names();
    names.map(|name| name.replace("CAP_", "")).collect()
}

impl Containers {
    /// Puts what is configured into `defaults`.
    ///
    /// # Errors
    /// The key whose value makes no sense.
    pub fn apply(&self, defaults: &mut Defaults) -> Result<(), Wrong> {
        defaults.env = pairs("containers.env", &self.env)?;
        for (name, value) in &defaults.env {
            if name.contains('\0') || value.contains('\0') {
                return Err(("containers.env", format!("{name:?} holds a NUL")));
            }
        }
        defaults.usual_capabilities = CapSet::EMPTY;
        for name in &self.capabilities {
            let one = CapSet::named(name)
                .map_err(|_| ("containers.capabilities", format!("{name:?} is none")))?;
            defaults.usual_capabilities = defaults.usual_capabilities.union(one);
        }
        defaults.umask = self.umask.0;
        for (name, value) in pairs("containers.rlimits", &self.rlimits)? {
            let (kind, limits) = rlimit(&name, &value).ok_or_else(|| {
                let problem = format!("{name}={value} is not like \"nproc=1024:4096\"");
                ("containers.rlimits", problem)
            })?;
            defaults.rlimits.insert(kind, limits);
        }
        defaults.sysctls = sysctls(pairs("containers.sysctls", &self.sysctls)?)?;
        defaults.localtime = localtime(&self.timezone)?;
        defaults.volume_directories = self.image_volumes == ImageVolumes::Directory;
        defaults.writable_cgroup = self.writable_cgroup;
        defaults.devices_of_user = self.devices_of_user;
        Ok(())
    }
}

/// NAME=value each.
fn pairs(key: &'static str, items: &[String]) -> Result<Vec<(String, String)>, Wrong> {
    let pair = |item: &String| match item.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err((key, format!("{item:?} is not NAME=value"))),
    };
    items.iter().map(pair).collect()
}

fn rlimit(name: &str, value: &str) -> Option<(Rlimit, (u64, u64))> {
    let number = |text: &str| match text {
        "unlimited" => Some(u64::MAX),
        digits => digits.parse().ok(),
    };
    let (soft, hard) = value.split_once(':')?;
    let (soft, hard) = (number(soft)?, number(hard)?);
    (soft <= hard).then_some((Rlimit::named(name)?, (soft, hard)))
}

/// Checked as a pod's own are.
fn sysctls(given: Vec<(String, String)>) -> Result<BTreeMap<String, String>, Wrong> {
    let given = given.into_iter().collect();
    let field = crate::convert::Field::root("containers.sysctls");
    crate::convert::pod::sysctls(&field, &given, &Default::default())
        .map_err(|refused| ("containers.sysctls", refused.to_string()))
}

fn localtime(zone: &str) -> Result<Option<PathBuf>, Wrong> {
    let path = match zone {
        "" => return Ok(None),
        "local" => PathBuf::from("/etc/localtime"),
        name if name.split('/').any(|part| matches!(part, "" | "." | "..")) => {
            return Err(("containers.timezone", format!("{name:?} is no time zone")));
        }
        name => Path::new(ZONES).join(name),
    };
    match path.is_file() {
        true => Ok(Some(path)),
        false => Err((
            "containers.timezone",
            format!("{} is not there", path.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_sandboxes() {
        let mut defaults = Defaults::default();
        Containers::default().apply(&mut defaults).unwrap();
        assert_eq!(defaults, Defaults::default());
    }

    #[test]
    fn what_makes_no_sense_names_its_key() {
        let wrong = |change: fn(&mut Containers)| {
            let mut containers = Containers::default();
            change(&mut containers);
            let wrong = containers.apply(&mut Defaults::default());
            wrong.unwrap_err().0
        };
        assert_eq!(wrong(|c| c.env = vec!["=x".into()]), "containers.env");
        assert_eq!(
            wrong(|c| c.capabilities = vec!["FLY".into()]),
            "containers.capabilities"
        );
        for limit in ["nproc=1", "nproc=5:4", "wings=1:2", "nproc"] {
            let containers = Containers {
                rlimits: vec![limit.into()],
                ..Containers::default()
            };
            let wrong = containers.apply(&mut Defaults::default()).unwrap_err();
            assert_eq!(wrong.0, "containers.rlimits", "{limit}");
        }
        for sysctl in ["kernel.core_pattern=x", "net/../kernel/x=1", "net=1"] {
            let containers = Containers {
                sysctls: vec![sysctl.into()],
                ..Containers::default()
            };
            let wrong = containers.apply(&mut Defaults::default()).unwrap_err();
            assert_eq!(wrong.0, "containers.sysctls", "{sysctl}");
        }
        for zone in ["../../../etc/passwd", "No/Where", "/etc/localtime"] {
            let containers = Containers {
                timezone: zone.into(),
                ..Containers::default()
            };
            let wrong = containers.apply(&mut Defaults::default()).unwrap_err();
            assert_eq!(wrong.0, "containers.timezone", "{zone}");
        }
    }
}
