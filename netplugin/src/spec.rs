//! The words of the CNI specification: configurations, results, errors.
//!
//! Configurations are kept as JSON: what a plugin does not declare to us is its
//! own business and has to reach it unchanged.
//!
//! Source: CNI specification 1.1.0, sections 1, 3 and 5.

use crate::address::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The one that is spoken best.
pub const LATEST: &str = "1.1.0";

/// The key of the attachments that exist, in the configuration of GC.
pub const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// Error codes. Source: section 5, "Error".
pub mod code {
    /// The plugin does not speak the version.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The container is not known.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A CNI_ variable is missing or wrong.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading the configuration or writing the result failed.
    pub const IO: u32 = 5;
    /// The configuration is no JSON, or not of the expected shape.
    pub const DECODE: u32 = 6;
    /// The configuration makes no sense.
    pub const INVALID_CONFIG: u32 = 7;
    /// It may work later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: the plugin cannot do ADD.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: nor do the containers it has reach everything.
    pub const LIMITED: u32 = 51;
}

/// Why a configuration is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It is no JSON object.
    #[error("it is not JSON: {0}")]
    Json(String),
    /// A field is missing or wrong.
    #[error("{field} {why}")]
    Field {
        /// Its name.
        field: &'static str,
        /// What is wrong.
        why: String,
    },
}

fn wrong(field: &'static str, why: impl Into<String>) -> ConfigError {
    ConfigError::Field {
        field,
        why: why.into(),
    }
}

/// A network: its plugins in the order of ADD.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The version its plugins are spoken to in.
    pub version: String,
    /// The network's name.
    pub name: String,
    /// The plugins' configurations, each with a valid `type`.
    pub plugins: Vec<Map<String, Value>>,
    /// CHECK is not wanted.
    #[serde(default)]
    pub disable_check: bool,
    /// GC is not wanted.
    #[serde(default)]
    pub disable_gc: bool,
    /// All versions that the configuration is good for, where it says so by
    /// `cniVersions`; else empty.
    #[serde(default)]
    pub offered: Vec<String>,
    /// A folder beside the file may have more plugins.
    #[serde(skip)]
    pub more_in_folder: bool,
}

impl NetworkList {
    /// Parses a conflist, or a single plugin's configuration as a list of one.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut object: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        let version = version_of(&object)?;
        let name = match object.get("name") {
            Some(Value::String(name)) if is_name(name) => name.clone(),
            Some(Value::String(name)) => {
                return Err(wrong("name", format!("{name:?} is not valid")));
            }
            Some(_) => return Err(wrong("name", "is no string")),
            None => return Err(wrong("name", "is missing")),
        };
        let flag = |key: &'static str| match object.get(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            // Some write "true". Source: section 1, "Configuration format".
            Some(Value::String(value)) if value == "true" || value == "false" => {
                Ok(value == "true")
            }
            Some(_) => Err(wrong(key, "is neither true nor false")),
        };
        let (disable_check, disable_gc) = (flag("disableCheck")?, flag("disableGC")?);
        let only_inlined = flag("loadOnlyInlinedPlugins")?;
        let from_folder = object.contains_key("loadOnlyInlinedPlugins") && !only_inlined;
        let is_list = object.contains_key("plugins");
        let offered = match object.get("cniVersions") {
            Some(Value::Array(versions)) => {
                let versions = versions.iter().chain(object.get("cniVersion"));
                let versions = versions.filter_map(|version| rank(version.as_str()?));
                let versions: BTreeSet<usize> = versions.collect();
                versions.into_iter().map(|at| VERSIONS[at].into()).collect()
            }
            _ => Vec::new(),
        };
        let plugins = match object.remove("plugins") {
            None => vec![object],
            Some(Value::Array(plugins)) => plugins
                .into_iter()
                .map(|plugin| match plugin {
                    Value::Object(plugin) => Ok(plugin),
                    _ => Err(wrong("plugins", "has an entry that is no object")),
                })
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(wrong("plugins", "is no array")),
        };
        if plugins.is_empty() && !from_folder {
            return Err(wrong("plugins", "is empty"));
        }
        plugins.iter().try_for_each(check_type)?;
        Ok(Self {
            version,
            name,
            plugins,
            disable_check,
            disable_gc,
            offered,
            more_in_folder: is_list && !only_inlined,
        })
    }

    /// Parses what a list has for one plugin.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn parse_plugin(text: &str) -> Result<Map<String, Value>, ConfigError> {
        let plugin = serde_json::from_str(text);
        let plugin = plugin.map_err(|error| ConfigError::Json(error.to_string()))?;
        check_type(&plugin)?;
        Ok(plugin)
    }

    /// True when the plugins are to be spoken to in `version` or a later one.
    pub fn speaks(&self, version: &str) -> bool {
        rank(&self.version) >= rank(version)
    }
}

fn check_type(plugin: &Map<String, Value>) -> Result<(), ConfigError> {
    match plugin.get("type") {
        Some(Value::String(kind)) if is_plugin(kind) => Ok(()),
        Some(Value::String(kind)) => Err(wrong("type", format!("{kind:?} is no file name"))),
        _ => Err(wrong("type", "of a plugin is missing")),
    }
}

fn rank(version: &str) -> Option<usize> {
    VERSIONS.iter().position(|known| *known == version)
}

/// The best version of `cniVersion` and `cniVersions`.
fn version_of(object: &Map<String, Value>) -> Result<String, ConfigError> {
    let mut offered = Vec::new();
    match object.get("cniVersion") {
        Some(Value::String(version)) => offered.push(version.as_str()),
        Some(_) => return Err(wrong("cniVersion", "is no string")),
        None => {}
    }
    match object.get("cniVersions") {
        Some(Value::Array(versions)) => offered.extend(versions.iter().filter_map(Value::as_str)),
        Some(_) => return Err(wrong("cniVersions", "is no array")),
        None => {}
    }
    if offered.is_empty() {
        return Err(wrong("cniVersion", "is missing"));
    }
    let best = offered.iter().filter_map(|version| rank(version)).max();
    best.map(|best| VERSIONS[best].to_owned()).ok_or_else(|| {
        wrong(
            "cniVersion",
            format!(
                "is {}; known are {}",
                offered.join(", "),
                VERSIONS.join(", ")
            ),
        )
    })
}

/// Source: section 1: starts with an alphanumeric, then also `_`, `.` and `-`.
pub fn is_name(name: &str) -> bool {
    name.bytes()
        .enumerate()
        .all(|(at, b)| b.is_ascii_alphanumeric() || at > 0 && matches!(b, b'_' | b'.' | b'-'))
        && !name.is_empty()
}

/// A file name and nothing that leads elsewhere.
fn is_plugin(kind: &str) -> bool {
    !matches!(kind, "" | "." | "..") && !kind.contains(['/', '\0'])
}

/// What ADD gave, in the shape of version 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniResult {
    /// The version it was said in.
    #[serde(default)]
    pub cni_version: String,
    /// What was made, on the host and in the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    /// Routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Name resolution; as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Value>,
}

/// An interface of a result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Bytes. Since 1.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of the pod's namespace; empty on the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address of a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// "4" or "6", said and wanted before 1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The address and its network's prefix.
    pub address: IpNet,
    /// The way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Which of the result's interfaces has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route of a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// By whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

impl CniResult {
    /// The pod's addresses, in the plugins' order and each once: those of its
    /// interface `ifname` and those said to be of none; where there are none of
    /// these, those of its other interfaces. Never the host's, never a loopback.
    pub fn pod_ips(&self, ifname: &str) -> Vec<IpAddr> {
        let of = |wanted: &dyn Fn(Option<&Interface>) -> bool| {
            let mut found = Vec::new();
            for ip in &self.ips {
                let owner = ip.interface.map(|at| self.interfaces.get(at));
                let address = ip.address.address();
                // One said to be of an interface that there is none of is nobody's.
                let right = match owner {
                    None => wanted(None),
                    Some(Some(owner)) => !owner.sandbox.is_empty() && wanted(Some(owner)),
                    Some(None) => false,
                };
                if right && !address.is_loopback() && !found.contains(&address) {
                    found.push(address);
                }
            }
            found
        };
        let own = of(&|owner| owner.is_none_or(|owner| owner.name == ifname));
        if own.is_empty() { of(&|_| true) } else { own }
    }
}

/// A plugin's error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
pub struct PluginError {
    /// The version it was said in.
    #[serde(default)]
    pub cni_version: String,
    /// See [`code`]; 100 and above are the plugin's own.
    pub code: u32,
    /// One line.
    pub msg: String,
    /// More of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.msg, self.code)?;
        if self.details.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.details)
        }
    }
}

impl PluginError {
    /// An error in the latest version's words.
    pub fn new(code: u32, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            cni_version: LATEST.into(),
            code,
            msg: msg.into(),
            details: details.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_configuration_is_a_list_of_one() {
        let list = NetworkList::parse(r#"{"cniVersion":"0.4.0","name":"n","type":"bridge","x":1}"#)
            .unwrap();
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.plugins[0]["x"], 1);
        assert!(list.speaks("0.4.0") && !list.speaks("1.0.0"));
    }

    #[test]
    fn the_best_version_both_know_is_spoken() {
        let list = |versions: &str| {
            NetworkList::parse(&format!(
                r#"{{{versions},"name":"n","plugins":[{{"type":"a"}}]}}"#
            ))
            .map(|list| list.version)
        };
        assert_eq!(
            list(r#""cniVersion":"0.4.0","cniVersions":["1.1.0","9.0.0"]"#).unwrap(),
            "1.1.0"
        );
        assert!(
            list(r#""cniVersion":"0.1.0""#)
                .unwrap_err()
                .to_string()
                .contains("known are")
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("{", "it is not JSON"),
            ("[]", "it is not JSON"),
            ("{}", "cniVersion is missing"),
            (r#"{"cniVersion":"1.0.0"}"#, "name is missing"),
            (
                r#"{"cniVersion":"1.0.0","name":"../x"}"#,
                "name \"../x\" is not valid",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n"}"#,
                "type of a plugin is missing",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
                "plugins is empty",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[1]}"#,
                "plugins has an entry",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","type":"../sh"}"#,
                "is no file name",
            ),
        ] {
            let error = NetworkList::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_of_the_hosts_interfaces_are_not_the_pods() {
        let result: CniResult = serde_json::from_str(
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"br"},{"name":"eth0","sandbox":"/n"}],
                "ips":[{"address":"10.0.0.1/8","interface":0},{"address":"10.0.0.2/8","interface":1},
                       {"version":"6","address":"fd00::2/64"}],"dns":{}}"#,
        )
        .unwrap();
        assert_eq!(
            result.pod_ips("eth0"),
            ["10.0.0.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
    }
}
