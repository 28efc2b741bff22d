//! What CNI configuration files and plugins say, and templates of the former.

use berth_netplugin::bandwidth::Bandwidth;
use berth_netplugin::spec::{CniResult, NetworkList, PluginError, VERSIONS};
use berth_netplugin::{IpNet, PortMapping, result, template};

/// A configuration file: what is accepted has plugins that are file names.
pub fn conflist(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(list) = NetworkList::parse(text) {
        assert!(VERSIONS.contains(&&*list.version));
        for plugin in &list.plugins {
            let kind = plugin["type"].as_str().expect("a type");
            assert!(!kind.is_empty() && !kind.contains('/'));
        }
        // It is kept on disk in its own words.
        let kept = serde_json::to_string(&list).expect("JSON");
        let again: NetworkList = serde_json::from_str(&kept).expect("what was kept");
        assert_eq!(again.plugins, list.plugins);
    }
    let _ = NetworkList::parse_plugin(text);
}

/// What a plugin answers: whatever is a result in one version's words is one in
/// each other's, and says the same addresses. What names no version is taken to be said in that of
/// the question, and may be a result in one of them only.
pub fn answer(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) else {
        return;
    };
    let _ = serde_json::from_value::<PluginError>(value.clone());
    let addresses = |version: &str| {
        let converted = result::convert(value.clone(), version).ok()?;
        assert_eq!(converted["cniVersion"], version);
        let again = result::convert(converted.clone(), version).expect("its own words");
        assert_eq!(again, converted);
        let parsed: CniResult = serde_json::from_value(converted).expect("a result");
        Some(parsed.pod_ips("eth0"))
    };
    let said = value["cniVersion"].as_str();
    let says_its_version = said.is_some_and(|version| !version.is_empty());
    let first = addresses(VERSIONS[0]);
    for version in &VERSIONS[1..] {
        let other = addresses(version);
        assert!(!says_its_version || other == first, "{version}: {other:?}");
    }
}

/// A template of a configuration.
pub fn conf_template(data: &[u8]) {
    let subnets: Vec<IpNet> = ["10.1.0.0/24", "fd00::/64"]
        .iter()
        .filter_map(|net| net.parse().ok())
        .collect();
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = template::render(text, &subnets);
        let _ = template::render(text, &[]);
    }
}

/// What a runtime gives a plugin for a pod, and the annotations it is made of.
pub fn runtime_config(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) else {
        return;
    };
    if let Ok(annotations) = serde_json::from_value(value.clone()) {
        let limits = Bandwidth::from_annotations(&annotations);
        assert!(!limits.is_ok_and(|limits| limits.is_some_and(|limits| limits.is_none())));
    }
    if let Some(limits) = value.get("bandwidth") {
        let _ = serde_json::from_value::<Bandwidth>(limits.clone());
    }
    if let Some(ports) = value.get("portMappings") {
        let _ = serde_json::from_value::<Vec<PortMapping>>(ports.clone());
    }
}
