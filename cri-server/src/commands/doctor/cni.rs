//! Checks of the CNI configuration and its plugins.

use super::{Finding, Node};
use crate::config::DefaultNetwork;
use crate::rpc::chain;
use berth_netplugin::client::Client;
use berth_netplugin::conf;
use std::time::Duration;

const SUBJECT: &str = "CNI";

/// How long a plugin may take to say which versions it speaks.
const DEADLINE: Duration = Duration::from_secs(5);

/// Which configuration counts, whether its plugins are there and speak its version.
pub fn configuration(node: &Node<'_>) -> Vec<Finding> {
    let (network, dir) = (&node.config.network, &node.places.cni_conf_dir);
    let wanted = Some(network.cni_network.as_str()).filter(|name| !name.is_empty());
    let loaded = conf::load(dir, wanted);
    let mut findings: Vec<Finding> = loaded
        .problems
        .iter()
        .map(|(path, why)| {
            let found = format!("{} {why}", path.display());
            match loaded.network {
                Some(_) => Finding::warning(SUBJECT, found, "mend or remove it: it is passed over"),
                None => Finding::problem(SUBJECT, found, "mend it: no pod gets a network"),
            }
        })
        .collect();
    let Some((path, list)) = loaded.network else {
        let waits = network.default == DefaultNetwork::Wait || wanted.is_some();
        if findings.is_empty() && waits {
            let found = match wanted {
                Some(name) => format!("no network {name} in {}", dir.display()),
                None => format!("no configuration in {}", dir.display()),
            };
            let advice = "install a CNI plugin, or set network.default = \"builtin\"";
            findings.push(Finding::problem(SUBJECT, found, advice));
        }
        return findings;
    };
    let client = Client::new(network.cni_bin_dirs.clone(), DEADLINE);
    let name = list.name.clone();
    findings.push(match client.negotiate(list) {
        Ok(list) => {
            let kinds = list
                .plugins
                .iter()
                .filter_map(|plugin| plugin["type"].as_str());
            let kinds: Vec<&str> = kinds.collect();
            let found = format!(
                "network {name} of {}: {}, version {}",
                path.display(),
                kinds.join(", "),
                list.version
            );
            Finding::good(SUBJECT, found)
        }
        Err(error) => Finding::problem(
            SUBJECT,
            format!("network {name} of {}: {}", path.display(), chain(&error)),
            "install the plugin, or mend the configuration",
        ),
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::config::{Config, Layout, Overrides};

    #[test]
    fn what_is_missing_is_said_before_a_pod_finds_out() {
        let dir = tempfile::tempdir().unwrap();
        let overrides = Overrides {
            root: Some(dir.path().into()),
            ..Overrides::default()
        };
        let conf = dir.path().join("etc/cni/net.d");
        let look = |default| {
            let mut config = Config::default();
            config.network.default = default;
            config.network.cni_bin_dirs = vec![dir.path().into()];
            let places = Layout::find(&overrides).unwrap().places(&config);
            let node = Node {
                overrides: &overrides,
                config,
                places,
            };
            configuration(&node)
        };
        assert_eq!(look(DefaultNetwork::Builtin), []);
        assert_eq!(look(DefaultNetwork::Wait)[0].level, Level::Problem);
        std::fs::create_dir_all(&conf).unwrap();
        let file = conf.join("10.conf");
        std::fs::write(&file, "{").unwrap();
        let findings = look(DefaultNetwork::Builtin);
        assert!(
            findings[0]
                .found
                .contains("10.conf is not a CNI configuration")
        );
        let text = r#"{"cniVersion":"1.0.0","name":"n","type":"absent"}"#;
        std::fs::write(&file, text).unwrap();
        let findings = look(DefaultNetwork::Builtin);
        assert_eq!(findings[0].level, Level::Problem);
        assert!(findings[0].found.contains("CNI plugin absent is not in"));
        std::fs::write(&file, text.replace("absent", "berth-bridge")).unwrap();
        assert_eq!(look(DefaultNetwork::Builtin)[0].level, Level::Good);
    }
}
