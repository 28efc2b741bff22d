//! `berth doctor` on a node that runs, and on one that is broken.

use berth_tests::Node;
use serde_json::Value;

fn findings(node: &Node, args: &[&str]) -> (bool, Vec<Value>) {
    let output = node.berth(&[&["doctor", "--json"], args].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("doctor prints JSON");
    let findings = report["findings"].as_array().expect("findings").clone();
    (output.status.success(), findings)
}

fn levels(findings: &[Value], subject: &str) -> Vec<String> {
    let of = findings
        .iter()
        .filter(|finding| finding["subject"] == subject);
    of.map(|finding| finding["level"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_node_that_runs_is_good() {
    let node = Node::start();
    let (_, findings) = findings(&node, &[]);
    for subject in [
        "privileges",
        "kernel",
        "cgroups",
        "daemon",
        "network",
        "runtime",
    ] {
        assert_eq!(
            levels(&findings, subject),
            ["good"],
            "{subject}: {findings:#?}"
        );
    }
}

#[test]
fn a_missing_monitor_is_a_problem_and_a_stopped_daemon_a_warning() {
    let node = Node::start();
    node.stop_daemon();
    let config = node.root().join("broken.toml");
    std::fs::write(&config, "[monitor]\npath = \"/no/such/berth-monitor\"\n").unwrap();
    let (healthy, findings) = findings(&node, &["--config", config.to_str().unwrap()]);
    assert!(!healthy);
    let monitor = findings
        .iter()
        .find(|finding| finding["level"] == "problem");
    let found = monitor.expect("a problem")["found"].as_str().unwrap();
    assert!(found.contains("/no/such/berth-monitor"), "{found}");
    assert_eq!(levels(&findings, "daemon"), ["warning"]);
}
