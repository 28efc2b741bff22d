//! The configuration file: what it says by default, what it refuses.

use berth_tests::{Node, binaries, eventually};
use std::process::{Command, Output};

fn berth(args: &[&str]) -> Output {
    Command::new(binaries::berth()).args(args).output().unwrap()
}

/// What `berth serve` and `berth config check` say to a file: both refuse it,
/// in the same words.
#[track_caller]
fn refused(text: &str) -> String {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::fs::write(root.path().join("etc/config.toml"), text).unwrap();
    let root = root.path().to_str().unwrap();
    let check = berth(&["config", "check", "--root", root]);
    assert!(!check.status.success(), "config check took\n{text}");
    let serve = berth(&["serve", "--root", root]);
    assert!(!serve.status.success(), "serve took\n{text}");
    String::from_utf8_lossy(&check.stderr).into_owned() + &String::from_utf8_lossy(&check.stdout)
}

#[test]
fn the_defaults_are_a_file_that_can_be_used() {
    let printed = berth(&["config", "default"]);
    assert!(printed.status.success());
    let text = String::from_utf8(printed.stdout).unwrap();
    assert!(
        text.contains("[images]") && text.contains("Unit:"),
        "{text}"
    );
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::fs::write(root.path().join("etc/config.toml"), text).unwrap();
    let check = berth(&["config", "check", "--root", root.path().to_str().unwrap()]);
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
}

#[test]
fn a_misspelt_key_is_refused_with_the_nearest_one() {
    let said = refused("[images]\nmax_paralel_downloads = 3\n");
    assert!(said.contains("config.toml"), "the file is named: {said}");
    assert!(said.contains("max_paralel_downloads"), "{said}");
    assert!(said.contains("max_parallel_downloads"), "{said}");
}

#[test]
fn a_misspelt_section_is_refused_with_the_nearest_one() {
    let said = refused("[image]\nmax_parallel_downloads = 3\n");
    assert!(said.contains("images"), "{said}");
}

#[test]
fn a_value_of_the_wrong_kind_is_refused_with_what_is_wanted() {
    let said = refused("[images]\nmax_parallel_downloads = \"three\"\n");
    assert!(said.contains("max_parallel_downloads"), "{said}");
}

#[test]
fn a_number_out_of_range_is_refused() {
    refused("[images]\nmax_parallel_downloads = 0\n");
    refused("[images]\nmax_parallel_downloads = -1\n");
}

#[test]
fn a_word_that_is_no_choice_is_refused() {
    let said = refused("[network]\ndefault = \"magic\"\n");
    assert!(said.contains("builtin") && said.contains("wait"), "{said}");
}

#[test]
fn a_subnet_that_is_none_is_refused() {
    let said = refused("[network]\nsubnets = [\"10.88.0.0/99\"]\n");
    assert!(said.contains("10.88.0.0/99"), "{said}");
}

#[test]
fn something_that_is_no_toml_is_refused_with_its_line() {
    let said = refused("[images\nmax = 3\n");
    assert!(said.contains("config.toml"), "the file is named: {said}");
    assert!(said.contains('1'), "{said}");
}

#[test]
fn a_file_in_conf_d_changes_one_key() {
    let node = Node::prepare("");
    let dir = node.root().join("etc/conf.d");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("10-level.toml"), "[log]\nformat = \"json\"\n").unwrap();
    node.start_daemon();
    // It serves before it says so.
    let first = eventually("the daemon logs JSON", || {
        let log = node.log();
        let mut lines = log.lines().map(str::to_owned);
        lines.find(|line| line.starts_with('{') && line.ends_with('}'))
    });
    serde_json::from_str::<serde_json::Value>(&first).unwrap();
}

#[test]
fn a_cgroup_driver_this_version_does_not_have_is_refused_by_name() {
    let node = Node::prepare("");
    let dir = node.root().join("etc/conf.d");
    std::fs::create_dir(&dir).unwrap();
    let file = dir.join("10-driver.toml");
    std::fs::write(&file, "[cgroup]\ndriver = \"systemd\"\n").unwrap();
    let answer = node.berth(&["serve"]);
    assert!(!answer.status.success());
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(said.contains("systemd"), "{said}");
    std::fs::remove_file(file).unwrap();
    node.start_daemon();
}

#[test]
fn a_root_that_cannot_be_written_is_named() {
    let answer = berth(&["serve", "--root", "/proc/no-such-place"]);
    assert!(!answer.status.success());
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(said.contains("/proc/no-such-place"), "{said}");
}

#[test]
fn a_long_root_works_although_socket_addresses_are_short() {
    let node = Node::prepare("");
    let deep = node.root().join("d".repeat(90)).join("e".repeat(90));
    std::fs::create_dir_all(deep.join("etc")).unwrap();
    let config = std::fs::read_to_string(node.root().join("etc/config.toml")).unwrap();
    std::fs::write(deep.join("etc/config.toml"), config).unwrap();
    let mut command = Command::new(binaries::berth());
    command.args(["serve", "--root"]).arg(&deep);
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped());
    let mut child = node.host.enter(|| command.spawn()).unwrap();
    let socket = deep.join("run/berth.sock");
    let up = berth_tests::within(berth_tests::deadline::PATIENCE, || {
        if socket.exists() {
            Some(true)
        } else {
            child.try_wait().unwrap().map(|_| false)
        }
    });
    _ = child.kill();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        up,
        Some(true),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    node.start_daemon();
}

#[test]
fn an_unknown_flag_is_refused() {
    let answer = berth(&["serve", "--no-such-flag"]);
    assert!(!answer.status.success());
    assert!(String::from_utf8_lossy(&answer.stderr).contains("--no-such-flag"));
}
