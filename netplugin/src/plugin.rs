//! The built-in network as a CNI plugin, `berth-bridge`.
//!
//! ```json
//! {
//!   "cniVersion": "1.1.0", "name": "pods", "type": "berth-bridge",
//!   "bridge": "berth0", "mtu": 1500, "ipMasq": true, "noMasquerade": [], "hairpinMode": true,
//!   "capabilities": { "portMappings": true, "bandwidth": true },
//!   "ipam": { "subnets": ["10.187.0.0/16", "fd00:187::/64"], "dataDir": "/var/lib/berth-bridge/pods" }
//! }
//! ```
//! All but the first three have the defaults shown, `mtu` that of the uplink and
//! `subnets` only its first.

use crate::address::IpNet;
use crate::bridge::{Attach, Attachment, Bridge, NetError, Settings};
use crate::hostport::HostPortError;
use crate::ipam::IpamError;
use crate::runtime_config::RuntimeConfig;
use crate::spec::{
    CniResult, Interface, Ip, LATEST, PluginError, Route, VALID_ATTACHMENTS, VERSIONS, code,
    is_name,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The `type` that names this plugin.
pub const TYPE: &str = "berth-bridge";

/// Where state is kept unless `ipam.dataDir` says otherwise, by network.
const STATE_DIR: &str = "/var/lib/berth-bridge";

/// Error codes of our own. Source: section 5 leaves 100 and above to plugins.
const CODE_EXHAUSTED: u32 = 100;
const CODE_HOST_PORT: u32 = 101;
const CODE_CHANGED: u32 = 102;
const CODE_KERNEL: u32 = 103;

/// One call of the plugin.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// CNI_COMMAND.
    pub command: &'a str,
    /// CNI_CONTAINERID.
    pub container_id: &'a str,
    /// CNI_NETNS.
    pub netns: Option<&'a Path>,
    /// CNI_IFNAME.
    pub ifname: &'a str,
    /// What comes on the standard input.
    pub config: &'a Value,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    cni_version: String,
    name: String,
    #[serde(default)]
    bridge: Option<String>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    ip_masq: Option<bool>,
    #[serde(default)]
    no_masquerade: Vec<IpNet>,
    #[serde(default)]
    hairpin_mode: Option<bool>,
    #[serde(default)]
    ipam: IpamConfig,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IpamConfig {
    #[serde(default)]
    subnets: Vec<IpNet>,
    #[serde(default)]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Carries out one call; what goes to the standard output, if anything.
///
/// # Errors
/// What goes to the standard output instead.
pub fn run(call: &Call<'_>) -> Result<Option<Value>, PluginError> {
    if call.command == "VERSION" {
        return Ok(Some(
            json!({ "cniVersion": LATEST, "supportedVersions": VERSIONS }),
        ));
    }
    let config = parse(call.config)?;
    let version = config.cni_version.clone();
    carry_out(call, config).map_err(|error| PluginError {
        cni_version: version,
        ..error
    })
}

fn carry_out(call: &Call<'_>, config: Config) -> Result<Option<Value>, PluginError> {
    if !matches!(call.command, "ADD" | "DEL" | "CHECK" | "GC" | "STATUS") {
        let why = format!("CNI_COMMAND is {:?}", call.command);
        return Err(PluginError::new(code::INVALID_ENVIRONMENT, why, ""));
    }
    let about_one = matches!(call.command, "ADD" | "DEL" | "CHECK");
    if about_one && !is_name(call.container_id) {
        let why = format!("CNI_CONTAINERID is {:?}", call.container_id);
        return Err(PluginError::new(code::INVALID_ENVIRONMENT, why, ""));
    }
    if about_one && call.ifname.is_empty() {
        return Err(PluginError::new(
            code::INVALID_ENVIRONMENT,
            "CNI_IFNAME is missing",
            "",
        ));
    }
    let bridge = Bridge::open(settings(&config)?).map_err(told)?;
    match call.command {
        "ADD" => {
            if config.prev_result.is_some() {
                let why = format!("{TYPE} makes the pod's interface and must be the first plugin");
                return Err(PluginError::new(code::INVALID_CONFIG, why, ""));
            }
            let netns = needed(call.netns)?;
            let attachment = bridge.add(&Attach {
                id: call.container_id,
                name: call.container_id,
                netns,
                ifname: call.ifname,
                port_mappings: &config.runtime_config.port_mappings,
                bandwidth: config.runtime_config.bandwidth,
            });
            let attachment = attachment.map_err(told)?;
            let result = result(&attachment, netns, &config.cni_version);
            serde_json::to_value(result).map(Some).map_err(|error| {
                PluginError::new(code::IO, "cannot write the result", error.to_string())
            })
        }
        "DEL" => {
            bridge.del(call.container_id, call.ifname).map_err(told)?;
            bridge
                .remove_link(call.container_id, call.ifname)
                .map_err(told)?;
            Ok(None)
        }
        "CHECK" => {
            let netns = needed(call.netns)?;
            bridge
                .check(call.container_id, call.ifname, netns)
                .map_err(told)?;
            Ok(None)
        }
        "STATUS" => bridge
            .ready()
            .map(|()| None)
            .map_err(|error| PluginError::new(code::NOT_AVAILABLE, error.to_string(), "")),
        // Only GC is left.
        _ => {
            let Some(valid) = config.valid_attachments else {
                let why = format!("{VALID_ATTACHMENTS} is missing");
                return Err(PluginError::new(code::INVALID_CONFIG, why, ""));
            };
            let valid: BTreeSet<(&str, &str)> = valid
                .iter()
                .map(|one| (&*one.container_id, &*one.ifname))
                .collect();
            bridge
                .gc(|id, ifname| valid.contains(&(id, ifname)))
                .map_err(told)?;
            Ok(None)
        }
    }
}

fn parse(config: &Value) -> Result<Config, PluginError> {
    let config: Config = serde_json::from_value(config.clone()).map_err(|error| {
        PluginError::new(
            code::DECODE,
            "cannot read the network configuration",
            error.to_string(),
        )
    })?;
    if !VERSIONS.contains(&&*config.cni_version) {
        let why = format!("version {} is not spoken", config.cni_version);
        let details = format!("spoken are {}", VERSIONS.join(", "));
        return Err(PluginError::new(code::INCOMPATIBLE_VERSION, why, details));
    }
    if !is_name(&config.name) {
        let why = format!("the network's name is {:?}", config.name);
        return Err(PluginError::new(code::INVALID_CONFIG, why, ""));
    }
    Ok(config)
}

fn settings(config: &Config) -> Result<Settings, PluginError> {
    let state_dir = config
        .ipam
        .data_dir
        .clone()
        .unwrap_or_else(|| Path::new(STATE_DIR).join(&config.name));
    let mut settings = Settings::new(state_dir);
    let subnets = &config.ipam.subnets;
    if !subnets.is_empty() {
        let of = |ipv4: bool| {
            let mut family = subnets.iter().filter(move |net| net.is_ipv4() == ipv4);
            match (family.next(), family.next()) {
                (first, None) => Ok(first.copied()),
                (_, Some(second)) => Err(PluginError::new(
                    code::INVALID_CONFIG,
                    format!("ipam.subnets has a second one of a family: {second}"),
                    "",
                )),
            }
        };
        settings.ipv4 = of(true)?;
        settings.ipv6 = of(false)?;
    }
    settings.mtu = config.mtu;
    if let Some(bridge) = &config.bridge {
        settings.bridge = bridge.clone();
    }
    settings.masquerade = config.ip_masq.unwrap_or(settings.masquerade);
    settings.no_masquerade = config.no_masquerade.clone();
    settings.hairpin = config.hairpin_mode.unwrap_or(settings.hairpin);
    Ok(settings)
}

fn needed(netns: Option<&Path>) -> Result<&Path, PluginError> {
    netns
        .filter(|netns| !netns.as_os_str().is_empty())
        .ok_or_else(|| PluginError::new(code::INVALID_ENVIRONMENT, "CNI_NETNS is missing", ""))
}

/// The result of ADD in the words of `version`.
pub fn result(attachment: &Attachment, netns: &Path, version: &str) -> CniResult {
    let old = version.starts_with("0.");
    let mtu = (version == "1.1.0").then_some(attachment.mtu);
    let interface = |name: &str, mac: &str, sandbox: String| Interface {
        name: name.into(),
        mac: mac.into(),
        mtu,
        sandbox,
    };
    let pairs = attachment.ips.iter().zip(&attachment.gateways);
    let everywhere = |ipv4: bool| {
        let text = if ipv4 { "0.0.0.0/0" } else { "::/0" };
        text.parse::<IpNet>().ok()
    };
    CniResult {
        cni_version: version.into(),
        interfaces: vec![
            interface(&attachment.bridge, "", String::new()),
            interface(&attachment.host_ifname, &attachment.host_mac, String::new()),
            interface(
                &attachment.ifname,
                &attachment.mac,
                netns.display().to_string(),
            ),
        ],
        ips: pairs
            .clone()
            .map(|(address, gateway)| Ip {
                version: old.then(|| {
                    if address.is_ipv4() {
                        "4".into()
                    } else {
                        "6".into()
                    }
                }),
                address: *address,
                gateway: Some(*gateway),
                interface: Some(2),
            })
            .collect(),
        routes: pairs
            .filter_map(|(address, gateway)| {
                Some(Route {
                    dst: everywhere(address.is_ipv4())?,
                    gw: Some(*gateway),
                })
            })
            .collect(),
        dns: Some(json!({})),
    }
}

/// An error in CNI's words: the causes are its details.
fn told(error: NetError) -> PluginError {
    let number = match &error {
        NetError::Ipam(IpamError::Exhausted { .. }) => CODE_EXHAUSTED,
        NetError::HostPorts(HostPortError::Conflict { .. }) => CODE_HOST_PORT,
        NetError::HostPorts(HostPortError::Invalid { .. })
        | NetError::Settings { .. }
        | NetError::Ipam(IpamError::TooSmall(_)) => code::INVALID_CONFIG,
        NetError::BadIfname { .. } => code::INVALID_ENVIRONMENT,
        NetError::Netns { .. } => code::UNKNOWN_CONTAINER,
        NetError::Changed { .. } => CODE_CHANGED,
        NetError::NotABridge { .. }
        | NetError::IfnameTaken { .. }
        | NetError::Sysctl { .. }
        | NetError::Netlink(_)
        | NetError::Nft(_)
        | NetError::NoShaping(_)
        | NetError::Ipam(_)
        | NetError::HostPorts(_) => CODE_KERNEL,
    };
    PluginError::new(number, error.to_string(), causes(&error))
}

fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
