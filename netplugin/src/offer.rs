//! What plugins are told of a pod: CNI_ARGS, and what they may ask for by
//! capability.
//!
//! | capability | what is offered |
//! |---|---|
//! | `portMappings` | the pod's host ports |
//! | `bandwidth` | the annotations kubernetes.io/ingress-bandwidth and egress-bandwidth |
//! | `dns` | the pod's servers, searches and options |
//! | `ipRanges` | the annotation network.berth/ip-ranges, else the node's pod network |
//! | `mac` | the annotation network.berth/mac |
//! | `ips` | the annotation network.berth/ips |
//! | `aliases` | the annotation network.berth/aliases, else the pod's name |
//! | `io.kubernetes.cri.pod-annotations`, `podAnnotations` | all of the pod's annotations |
//! | `cgroupPath` | the pod's cgroup as the kubelet names it |
//!
//! A plugin gets what its configuration declares and nothing else, so which of
//! these a pod's author may set is for who writes the configuration.
//!
//! Source: CNI's CONVENTIONS.md, "Dynamic Plugin specific fields"; containerd
//! for the name of the annotations' capability.

use crate::address::IpNet;
use crate::bandwidth::{BadBandwidth, Bandwidth};
use crate::network::{AttachRequest, Pod};
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// The MAC that plugins with the capability `mac` give the pod.
pub const MAC: &str = "network.berth/mac";

/// Addresses, with or without prefix, with commas between, for the capability `ips`.
pub const IPS: &str = "network.berth/ips";

/// Subnets with commas between that the pod's addresses come from, for the
/// capability `ipRanges`.
pub const IP_RANGES: &str = "network.berth/ip-ranges";

/// Names with commas between that lead to the pod, for the capability `aliases`.
pub const ALIASES: &str = "network.berth/aliases";

/// An annotation of a pod's does not say what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAnnotation {
    /// A limit.
    #[error(transparent)]
    Bandwidth(#[from] BadBandwidth),
    /// One of Berth's own.
    #[error("the annotation {annotation} is {value:?}: {why}")]
    Own {
        /// Its key.
        annotation: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        why: &'static str,
    },
}

/// What Kubernetes' plugins expect to be told. Names of Kubernetes have no `;`.
pub fn args(pod: &Pod<'_>) -> String {
    let clean = |text: &str| text.replace([';', '='], "_");
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        clean(pod.namespace),
        clean(pod.name),
        pod.id,
        clean(pod.uid)
    )
}

/// All that is offered for a pod on a node with the pod network `cidrs`.
///
/// # Errors
/// The first annotation that is wrong.
pub fn capabilities(
    request: &AttachRequest<'_>,
    cidrs: &[IpNet],
) -> Result<Map<String, Value>, BadAnnotation> {
    let mut offered = Map::new();
    let own = |annotation: &'static str, why: &'static str, good: &dyn Fn(&str) -> bool| {
        let Some(value) = request.annotations.get(annotation) else {
            return Ok(None);
        };
        let items: Vec<String> = value.split(',').map(|item| item.trim().into()).collect();
        if items.iter().all(|item| good(item)) {
            Ok(Some(items))
        } else {
            Err(BadAnnotation::Own {
                annotation,
                value: value.clone(),
                why,
            })
        }
    };
    if !request.port_mappings.is_empty() {
        offered.insert("portMappings".into(), json!(request.port_mappings));
    }
    if let Some(bandwidth) = Bandwidth::from_annotations(request.annotations)? {
        offered.insert("bandwidth".into(), json!(bandwidth));
    }
    if let Some(dns) = request.dns {
        offered.insert(
            "dns".into(),
            json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options }),
        );
    }
    let why = "this is no list of subnets";
    let ranges = own(IP_RANGES, why, &|item| item.parse::<IpNet>().is_ok())?
        .unwrap_or_else(|| cidrs.iter().map(ToString::to_string).collect());
    if !ranges.is_empty() {
        // A set of alternatives for each address that the pod gets: one a family.
        let sets = [true, false].map(|ipv4| {
            let of_family = ranges.iter().filter(|range| range.contains(':') != ipv4);
            of_family
                .map(|range| json!({ "subnet": range }))
                .collect::<Vec<_>>()
        });
        let sets: Vec<_> = sets.into_iter().filter(|set| !set.is_empty()).collect();
        offered.insert("ipRanges".into(), json!(sets));
    }
    if let Some(mac) = request.annotations.get(MAC) {
        if !is_mac(mac) {
            return Err(BadAnnotation::Own {
                annotation: MAC,
                value: mac.clone(),
                why: "this is no MAC",
            });
        }
        offered.insert("mac".into(), json!(mac));
    }
    let why = "this is no list of addresses";
    let address = |item: &str| item.parse::<IpAddr>().is_ok() || item.parse::<IpNet>().is_ok();
    if let Some(ips) = own(IPS, why, &address)? {
        offered.insert("ips".into(), json!(ips));
    }
    let aliases = own(ALIASES, "this is no list of host names", &is_host_name)?;
    let aliases = aliases.unwrap_or_else(|| vec![request.pod.name.into()]);
    offered.insert("aliases".into(), json!(aliases));
    if !request.annotations.is_empty() {
        for name in ["io.kubernetes.cri.pod-annotations", "podAnnotations"] {
            offered.insert(name.into(), json!(request.annotations));
        }
    }
    if !request.cgroup_parent.is_empty() {
        offered.insert("cgroupPath".into(), json!(request.cgroup_parent));
    }
    Ok(offered)
}

fn is_mac(text: &str) -> bool {
    let hex = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(hex)
}

fn is_host_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    (1..=253).contains(&text.len()) && text.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Dns;
    use std::collections::BTreeMap;
    use std::path::Path;

    fn offered(
        annotations: &[(&str, &str)],
        cidrs: &[&str],
    ) -> Result<Map<String, Value>, BadAnnotation> {
        let annotations: BTreeMap<String, String> = annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|&word| word.to_owned())
                .collect::<Vec<_>>()
        };
        let (servers, searches) = (words(&["10.96.0.10"]), words(&["svc.local"]));
        let request = AttachRequest {
            pod: Pod {
                id: "id1",
                name: "web",
                namespace: "default",
                uid: "u",
            },
            netns: Path::new("/n"),
            port_mappings: &[],
            annotations: &annotations,
            cgroup_parent: "/kubepods/podx",
            dns: Some(Dns {
                servers: &servers,
                searches: &searches,
                options: &[],
            }),
            handler: "",
        };
        let cidrs: Vec<IpNet> = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        capabilities(&request, &cidrs)
    }

    #[test]
    fn a_pod_without_wishes_offers_what_it_is() {
        let offered = offered(&[], &["10.1.0.0/24", "fd00::/64"]).unwrap();
        let expected = json!({
            "aliases": ["web"], "cgroupPath": "/kubepods/podx",
            "dns": { "servers": ["10.96.0.10"], "searches": ["svc.local"], "options": [] },
            "ipRanges": [[{ "subnet": "10.1.0.0/24" }], [{ "subnet": "fd00::/64" }]],
        });
        assert_eq!(Value::Object(offered), expected);
    }

    #[test]
    fn annotations_go_before_what_the_node_says() {
        let annotations = [
            (IP_RANGES, "10.2.0.0/28, 10.3.0.0/28"),
            (IPS, "10.2.0.5,fd00::5/64"),
            (MAC, "02:00:00:00:00:01"),
            (ALIASES, "db,db.default"),
            ("kubernetes.io/ingress-bandwidth", "10M"),
        ];
        let offered = offered(&annotations, &["10.1.0.0/24"]).unwrap();
        assert_eq!(
            offered["ipRanges"],
            json!([[{ "subnet": "10.2.0.0/28" }, { "subnet": "10.3.0.0/28" }]])
        );
        assert_eq!(offered["ips"], json!(["10.2.0.5", "fd00::5/64"]));
        assert_eq!(offered["mac"], "02:00:00:00:00:01");
        assert_eq!(offered["aliases"], json!(["db", "db.default"]));
        assert_eq!(offered["bandwidth"]["ingressRate"], 10_000_000);
        assert_eq!(offered["podAnnotations"][MAC], "02:00:00:00:00:01");
        assert_eq!(
            offered["podAnnotations"],
            offered["io.kubernetes.cri.pod-annotations"]
        );
    }

    #[test]
    fn a_wrong_annotation_is_named() {
        for (key, value) in [
            (IP_RANGES, "10.2.0.0"),
            (IPS, ""),
            (MAC, "02:00"),
            (MAC, "02:00:00:00:00:01,02:00:00:00:00:02"),
            (ALIASES, "a b"),
            ("kubernetes.io/egress-bandwidth", "fast"),
        ] {
            let error = offered(&[(key, value)], &[]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }
}
