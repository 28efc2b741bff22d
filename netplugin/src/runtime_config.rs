//! What a runtime tells the plugin of one pod: `runtimeConfig`.
//!
//! Runtimes written in Go send what Go's own decoder takes: keys in any case,
//! empty text for what is not said, and ports that are not mapped as port 0.
//!
//! Source: CNI's CONVENTIONS.md, "Dynamic plugin specific fields"; go-cni, whose
//! types for port mappings and bandwidth have no key names of their own.

use crate::bandwidth::Bandwidth;
use crate::network::PortMapping;
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Map, Value};

/// The capabilities this plugin has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `portMappings`.
    pub port_mappings: Vec<PortMapping>,
    /// `bandwidth`.
    pub bandwidth: Bandwidth,
}

impl<'de> Deserialize<'de> for RuntimeConfig {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let all = Option::<Map<String, Value>>::deserialize(source)?.unwrap_or_default();
        let mut config = Self::default();
        for (key, value) in all {
            if value.is_null() {
                continue;
            }
            if key.eq_ignore_ascii_case("portMappings") {
                let mappings = Vec::<Map<String, Value>>::deserialize(value)
                    .map_err(|error| D::Error::custom(format!("portMappings: {error}")))?;
                for mapping in mappings {
                    let mapping = port_mapping(mapping)
                        .map_err(|error| D::Error::custom(format!("portMappings: {error}")))?;
                    config.port_mappings.extend(mapping);
                }
            } else if key.eq_ignore_ascii_case("bandwidth") {
                let limits = Map::deserialize(value).and_then(|limits| {
                    const KEYS: [&str; 4] =
                        ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
                    Bandwidth::deserialize(Value::Object(named(limits, &KEYS)))
                });
                config.bandwidth =
                    limits.map_err(|error| D::Error::custom(format!("bandwidth: {error}")))?;
            }
        }
        Ok(config)
    }
}

/// `None` where no port of the host is meant.
fn port_mapping(mapping: Map<String, Value>) -> Result<Option<PortMapping>, serde_json::Error> {
    let mut mapping = named(
        mapping,
        &["hostPort", "containerPort", "protocol", "hostIP"],
    );
    if mapping.get("hostPort").is_none_or(|port| *port == 0) {
        return Ok(None);
    }
    if mapping.get("hostIP").is_some_and(|ip| *ip == "") {
        mapping.remove("hostIP");
    }
    let protocol = mapping.get("protocol").and_then(Value::as_str);
    let protocol = protocol.unwrap_or_default().to_ascii_lowercase();
    let protocol = if protocol.is_empty() {
        "tcp".to_owned()
    } else {
        protocol
    };
    mapping.insert("protocol".into(), protocol.into());
    PortMapping::deserialize(Value::Object(mapping)).map(Some)
}

/// Those of `keys` that are there, by their right names.
fn named(object: Map<String, Value>, keys: &[&str]) -> Map<String, Value> {
    let named = object.into_iter().filter_map(|(key, value)| {
        let right = keys.iter().find(|right| right.eq_ignore_ascii_case(&key))?;
        (!value.is_null()).then(|| ((*right).to_owned(), value))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Protocol;
    use serde_json::json;

    fn read(value: Value) -> Result<RuntimeConfig, serde_json::Error> {
        RuntimeConfig::deserialize(value)
    }

    #[test]
    fn what_go_sends_is_what_is_meant() {
        let config = read(json!({
            "portMappings": [
                { "HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": "" },
                { "hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1" },
                { "hostPort": 1, "containerPort": 2 },
                { "HostPort": 0, "ContainerPort": 9090, "Protocol": "tcp" },
            ],
            "bandwidth": { "IngressRate": 1000, "egressRate": 2000, "EgressBurst": null },
            "ipRanges": [[{ "subnet": "10.0.0.0/8" }]],
        }));
        let config = config.unwrap();
        let ports: Vec<(u16, Protocol, bool)> = config
            .port_mappings
            .iter()
            .map(|port| (port.host_port, port.protocol, port.host_ip.is_some()))
            .collect();
        assert_eq!(
            ports,
            [
                (8080, Protocol::Tcp, false),
                (53, Protocol::Udp, true),
                (1, Protocol::Tcp, false)
            ]
        );
        let Bandwidth {
            ingress_rate,
            egress_rate,
            ..
        } = config.bandwidth;
        assert_eq!((ingress_rate, egress_rate), (1000, 2000));
    }

    #[test]
    fn nothing_said_is_nothing_wanted() {
        for nothing in [
            json!(null),
            json!({}),
            json!({ "portMappings": null, "bandwidth": null }),
        ] {
            assert_eq!(read(nothing).unwrap(), RuntimeConfig::default());
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (wrong, expected) in [
            (json!({ "portMappings": {} }), "portMappings"),
            (
                json!({ "portMappings": [{ "hostPort": 70000, "containerPort": 1 }] }),
                "portMappings",
            ),
            (
                json!({ "portMappings": [{ "hostPort": 1, "containerPort": 1, "protocol": "icmp" }] }),
                "portMappings",
            ),
            (json!({ "bandwidth": { "ingressRate": -1 } }), "bandwidth"),
        ] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
