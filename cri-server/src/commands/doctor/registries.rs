//! Whether the files that say how images are pulled can be used, and what is trusted.

use super::{Finding, Node};
use crate::rpc::chain;
use berth_image_service::auth_file::AuthFile;
use berth_image_service::hosts::{self, Fallback};
use berth_image_service::policy::Policy;
use berth_image_service::registries_conf::RegistriesConf;

const REGISTRIES: &str = "registries";
const TRUST: &str = "image policy";

/// registries.conf, certs.d and the node's own credentials.
pub fn files(node: &Node<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut problem = |error: String| {
        let advice = "mend it: it is read at every pull, no restart is needed";
        findings.push(Finding::problem(REGISTRIES, error, advice));
    };
    let conf = match RegistriesConf::load(&node.places.registries_conf) {
        Ok(conf) => conf,
        Err(error) => {
            problem(chain(&error));
            RegistriesConf::default()
        }
    };
    if let Err(error) = AuthFile::load(Some(&node.places.auth_file), &conf.credential_helpers) {
        problem(chain(&error));
    }
    let mut count = 0;
    for dir in &node.places.certs_d {
        // One that is not there says nothing.
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The directory's own name of a host with a port ends with an underscore.
            let registry = match name.strip_suffix('_').and_then(|n| n.rsplit_once('_')) {
                Some((host, port)) => format!("{host}:{port}"),
                None if name == "_default" => "registry.example".into(),
                None => name,
            };
            count += 1;
            if let Err(error) = hosts::hosts(&node.places.certs_d, &registry, Fallback::Origin) {
                problem(chain(&error));
            }
        }
    }
    if findings.is_empty() {
        let found = format!("{count} in certs.d, {} in registries.conf", conf.len());
        findings.push(Finding::good(REGISTRIES, found));
    }
    findings
}

/// Which images this node takes.
pub fn policy(node: &Node<'_>) -> Vec<Finding> {
    let finding = match Policy::load(Some(&node.places.policy)) {
        Ok(policy) => Finding::good(TRUST, policy.summary()),
        Err(error) => Finding::problem(
            TRUST,
            chain(&error),
            "mend it: until then nothing is pulled and no container is created",
        ),
    };
    vec![finding]
}
