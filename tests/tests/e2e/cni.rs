//! Pods networked by CNI plugins: Debian's, and some that do what they should not.

use berth_proto::runtime_v1 as cri;
use berth_tests::{Node, Pod, eventually};
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A folder for the test's plugins and for what plugins keep.
pub struct Plugins(tempfile::TempDir);

impl Plugins {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// A daemon that waits for a configuration and looks here for plugins first;
    /// `more` are lines of its `[network]`.
    pub fn node(&self, more: &str) -> Node {
        let dir = self.dir().display();
        Node::options()
            .config(&format!(
                "[network]\ndefault = \"wait\"\ncni_bin_dirs = [\"{dir}\", \"/usr/lib/cni\"]\n{more}\n"
            ))
            .start()
    }

    /// A plugin of the test's own: what it does after it has noted its call and
    /// before it gives an address.
    pub fn write(&self, name: &str, script: &str) {
        let (path, dir) = (self.dir().join(name), self.dir().display());
        let new = path.with_extension("new");
        let script = format!(
            "#!/bin/sh
             input=$(cat)
             [ $CNI_COMMAND = VERSION ] && echo '{{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.0.0\",\"1.1.0\"]}}' && exit 0
             echo \"$CNI_COMMAND $CNI_CONTAINERID $input\" >> {dir}/calls
             {script}
             [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.5.0.2/24\"}}]}}'
             exit 0\n"
        );
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        // Renamed into place: one that is being run cannot be written to.
        fs::rename(new, path).unwrap();
    }

    /// How often the test's plugins were called with `command`, and the last such line.
    pub fn calls(&self, command: &str) -> (usize, String) {
        let text = fs::read_to_string(self.dir().join("calls")).unwrap_or_default();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.split(' ').next() == Some(command))
            .collect();
        (
            lines.len(),
            lines.last().copied().unwrap_or_default().into(),
        )
    }

    /// bridge and host-local, on the bridge that the tests let stand.
    pub fn bridge(&self, ranges: &[&str]) -> Value {
        let ranges: Vec<Value> = ranges
            .iter()
            .map(|net| json!([{ "subnet": net }]))
            .collect();
        json!({ "type": "bridge", "bridge": "berth0", "isGateway": true, "hairpinMode": true,
                "ipMasq": true, "ipam": { "type": "host-local", "ranges": ranges,
                "routes": [{ "dst": "0.0.0.0/0" }], "dataDir": self.dir().join("leases") } })
    }

    /// The addresses that host-local counts as taken.
    pub fn leases(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir().join("leases/test"));
        let names = entries.into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        names
            .filter(|name| name.contains(['.', ':']) && !name.starts_with("last"))
            .collect()
    }
}

pub fn conf_dir(node: &Node) -> PathBuf {
    node.root().join("etc/cni/net.d")
}

/// Makes these the plugins of the node's pods.
pub fn configure(node: &Node, version: &str, plugins: &[Value]) {
    fs::create_dir_all(conf_dir(node)).unwrap();
    let list = json!({ "cniVersion": version, "name": "test", "plugins": plugins });
    fs::write(conf_dir(node).join("10.conflist"), list.to_string()).unwrap();
}

pub fn portmap() -> Value {
    json!({ "type": "portmap", "capabilities": { "portMappings": true } })
}

/// What is left of plugins: addresses, rules, records.
pub fn remains(node: &Node, plugins: &Plugins) -> Vec<String> {
    let mut left = plugins.leases();
    left.extend(node.footprint().entries("lib/network/attachments"));
    let rules = node.host.run("iptables-save", &[]).unwrap();
    let of_pods = |line: &&str| line.contains("id: ") || line.contains("CNI-DN-");
    left.extend(rules.lines().filter(of_pods).map(str::to_owned));
    left
}

fn condition(node: &Node) -> cri::RuntimeCondition {
    let answer = node
        .wait(node.runtime().status(cri::StatusRequest::default()))
        .unwrap();
    let mut conditions = answer.status.unwrap().conditions.into_iter();
    conditions.find(|c| c.r#type == "NetworkReady").unwrap()
}

fn answers(node: &Node, address: SocketAddr) -> bool {
    node.host
        .enter(|| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
}

fn info(pod: &Pod<'_>) -> Value {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let answer = pod
        .node
        .wait(pod.node.runtime().pod_sandbox_status(request))
        .unwrap();
    serde_json::from_str(&answer.info["info"]).unwrap()
}

#[test]
fn pods_live_on_debians_plugins() {
    let plugins = Plugins::new();
    let node = plugins.node("");
    let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    let tuning = json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "77" } });
    let subnets = ["10.66.0.0/24", "fd66::/64"];
    let chain = [
        plugins.bridge(&subnets),
        portmap(),
        bandwidth,
        tuning,
        json!({ "type": "firewall" }),
    ];
    configure(&node, "1.0.0", &chain);
    let mut config = node.pod_config("web");
    config.port_mappings = vec![cri::PortMapping {
        host_port: 12_100,
        container_port: 8080,
        ..Default::default()
    }];
    let limits = [("ingress", "100M"), ("egress", "50M")];
    config.annotations = limits
        .iter()
        .map(|(way, rate)| (format!("kubernetes.io/{way}-bandwidth"), (*rate).to_owned()))
        .collect();
    let pod = node.run(config);
    let network = pod.status().network.unwrap();
    assert!(network.ip.starts_with("10.66.0."), "{network:?}");
    assert_eq!(network.additional_ips.len(), 1);
    let info = info(&pod);
    let result = &info["cniResult"];
    assert_eq!(result["cniVersion"], "1.0.0");
    assert_eq!(result["ips"][0]["address"], format!("{}/24", network.ip));
    assert_eq!(info["network"]["name"], "test");

    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    eventually(
        "the pod is reached at its address and at its host port",
        || {
            let at = [
                SocketAddr::new(pod.ip(), 8080),
                "198.18.0.1:12100".parse().unwrap(),
            ];
            at.iter()
                .all(|address| answers(&node, *address))
                .then_some(())
        },
    );
    let client = node.run_pod("client");
    let got = client.output(&["probe", "fetch", &format!("{}:8080", pod.ip())]);
    assert!(
        got.contains(&client.ip().to_string()),
        "nothing is translated: {got}"
    );
    let got = client.output(&["probe", "fetch", "198.18.0.1:12100"]);
    assert!(got.starts_with("hello "), "{got}");
    assert_eq!(
        client.output(&["cat", "/proc/sys/net/core/somaxconn"]),
        "77\n"
    );
    let queues = node.host.run("tc", &["qdisc", "show"]).unwrap();
    assert!(
        queues.contains("rate 100Mbit") && queues.contains("rate 50Mbit"),
        "{queues}"
    );

    // The daemon goes and comes back with another configuration: what was given is given back.
    node.kill_daemon();
    configure(&node, "1.0.0", &[json!({ "type": "loopback" })]);
    node.start_daemon();
    pod.stop();
    assert!(!answers(&node, "198.18.0.1:12100".parse().unwrap()));
    pod.try_remove().unwrap();
    client.remove();
    assert_eq!(remains(&node, &plugins), [""; 0]);
}

#[test]
fn the_primary_address_is_of_the_configured_family() {
    let plugins = Plugins::new();
    let node = plugins.node("primary_family = \"ipv6\"");
    configure(
        &node,
        "1.0.0",
        &[plugins.bridge(&["10.66.0.0/24", "fd66::/64"])],
    );
    let pod = node.run_pod("web");
    let network = pod.status().network.unwrap();
    assert_eq!(
        (network.ip.as_str(), network.additional_ips[0].ip.as_str()),
        ("fd66::2", "10.66.0.2")
    );
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(
        pod.status().network.unwrap(),
        network,
        "the same after a restart"
    );
}

#[test]
fn the_node_turns_ready_with_its_configuration_and_says_why_it_is_not() {
    let plugins = Plugins::new();
    let node = plugins.node("");
    let conf = conf_dir(&node);
    let said = condition(&node);
    assert!(
        !said.status && said.message.contains(conf.to_str().unwrap()),
        "{said:?}"
    );
    let err = node
        .try_run(node.pod_config("early"))
        .err()
        .expect("there is no network");
    assert!(err.message().contains("no CNI configuration"), "{err}");
    assert_eq!(node.pods(None), []);
    fs::create_dir_all(&conf).unwrap();
    fs::write(conf.join("10.conflist"), "{ \"cniVersion\": ").unwrap();
    let said = condition(&node);
    assert!(
        !said.status && said.message.contains("10.conflist"),
        "{said:?}"
    );
    configure(&node, "1.1.0", &[json!({ "type": "mine" })]);
    let said = condition(&node);
    assert!(
        !said.status && said.message.contains("CNI plugin mine is not in"),
        "{said:?}"
    );
    plugins.write(
        "mine",
        "[ $CNI_COMMAND = STATUS ] && echo '{\"code\":50,\"msg\":\"no agent\"}' && exit 1",
    );
    let said = condition(&node);
    assert!(
        !said.status && said.message.contains("no agent (code 50)"),
        "{said:?}"
    );
    plugins.write("mine", "");
    let said = condition(&node);
    assert!(said.status, "{said:?}");
    // The directory goes, and comes back as a link to another.
    let other = plugins.dir().join("net.d");
    fs::rename(&conf, &other).unwrap();
    assert!(!condition(&node).status);
    std::os::unix::fs::symlink(&other, &conf).unwrap();
    assert!(condition(&node).status);
    node.run_pod("late").remove();
}

#[test]
fn a_pod_goes_though_its_plugin_never_lets_it() {
    let plugins = Plugins::new();
    let node = plugins.node("");
    plugins.write(
        "bad",
        "[ $CNI_COMMAND = DEL ] && echo '{\"code\":100,\"msg\":\"never\"}' && exit 1",
    );
    configure(&node, "1.0.0", &[json!({ "type": "bad" })]);
    let pods = ["stays", "gone"].map(|name| node.run_pod(name));
    let id = pods[0].id.clone();
    for pod in &pods {
        pod.remove();
    }
    assert_eq!(node.pods(None), []);
    let shown = || {
        let output = node.berth(&["status"]);
        String::from_utf8(output.stdout).unwrap()
    };
    let text = shown();
    assert!(
        text.contains(&id) && text.contains("never (code 100)"),
        "{text}"
    );
    // Nor does a restart forget it, nor the plugin's going.
    fs::remove_file(plugins.dir().join("bad")).unwrap();
    node.kill_daemon();
    node.start_daemon();
    eventually("it is shown again", || {
        let text = shown();
        (text.contains(&id) && text.contains("CNI plugin bad is not in")).then_some(())
    });
    plugins.write("bad", "");
    eventually("it is given back", || {
        node.operations().pending.is_empty().then_some(())
    });
    assert_eq!(remains(&node, &plugins), [""; 0]);
    let (_, last) = plugins.calls("DEL");
    assert!(
        last.contains("10.5.0.2/24"),
        "with the result of ADD: {last}"
    );
}

#[test]
fn a_plugin_that_hangs_holds_its_pod_and_nothing_else() {
    let plugins = Plugins::new();
    let node = plugins.node("cni_timeout_seconds = 2");
    plugins.write("slow", "[ $CNI_COMMAND != DEL ] && sleep 1000");
    configure(&node, "1.1.0", &[json!({ "type": "slow" })]);
    let started = Instant::now();
    let (mut runtime, config) = (node.runtime(), node.pod_config("web"));
    let call = node.spawn(async move {
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            ..Default::default()
        };
        runtime.run_pod_sandbox(request).await
    });
    eventually("the plugin runs", || {
        (plugins.calls("ADD").0 == 1).then_some(())
    });
    let asked = Instant::now();
    node.pods(None);
    assert!(asked.elapsed() < Duration::from_secs(1));
    let err = node.wait(async { call.await.unwrap() }).unwrap_err();
    assert!(err.message().contains("did not end within 2s"), "{err}");
    assert!(started.elapsed() < Duration::from_secs(30));
    // Its status hangs as well: that is told, and does not hang.
    let asked = Instant::now();
    assert!(!condition(&node).status);
    assert!(asked.elapsed() < Duration::from_secs(8));
    assert_eq!(remains(&node, &plugins), [""; 0]);
}

#[test]
fn the_kubelets_pod_network_becomes_the_configuration_by_a_template() {
    let plugins = Plugins::new();
    let template = plugins.dir().join("template");
    let text = plugins.bridge(&[]).to_string().replace(
        "\"ranges\":[]",
        "\"ranges\":[{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}[{\"subnet\":\"{{$r}}\"}]{{end}}]",
    );
    assert!(text.contains("PodCIDRRanges"), "{text}");
    let list = format!(r#"{{"cniVersion":"1.0.0","name":"test","plugins":[{text}]}}"#);
    fs::write(&template, list).unwrap();
    let node = plugins.node(&format!("cni_template = \"{}\"", template.display()));
    let said = condition(&node);
    assert_eq!(
        (said.status, said.reason.as_str()),
        (false, "PodCIDRUnknown")
    );
    let tell = |cidr: &str| {
        let request = cri::UpdateRuntimeConfigRequest {
            runtime_config: Some(cri::RuntimeConfig {
                network_config: Some(cri::NetworkConfig {
                    pod_cidr: cidr.to_owned(),
                }),
            }),
        };
        node.wait(node.runtime().update_runtime_config(request))
    };
    tell("10.244.7.0/24,fd00:7::/64").unwrap();
    assert!(condition(&node).status);
    let pod = node.run_pod("web");
    let network = pod.status().network.unwrap();
    assert_eq!(
        (network.ip.as_str(), network.additional_ips[0].ip.as_str()),
        ("10.244.7.2", "fd00:7::2")
    );
    // The kubelet says it once: a daemon that starts later knows it all the same.
    node.kill_daemon();
    fs::remove_dir_all(conf_dir(&node)).unwrap();
    node.start_daemon();
    eventually("the network is ready again", || {
        condition(&node).status.then_some(())
    });
    let answer = node
        .wait(node.runtime().status(cri::StatusRequest { verbose: true }))
        .unwrap();
    assert_eq!(answer.info["podCIDR"], "10.244.7.0/24,fd00:7::/64");
    fs::write(&template, "{{.NodeName}}").unwrap();
    let err = tell("10.244.8.0/24").unwrap_err();
    assert!(err.message().contains("there is no .NodeName"), "{err}");
    pod.remove();
}

#[test]
fn plugins_hear_which_pods_there_are_at_the_start_and_now_and_then() {
    let plugins = Plugins::new();
    let node = plugins.node("gc_seconds = 1");
    plugins.write("mine", "");
    configure(&node, "1.1.0", &[json!({ "type": "mine" })]);
    let pods = ["one", "two"].map(|name| node.run_pod(name));
    let told = |expected: &[&Pod<'_>]| {
        eventually("GC names the pods there are", || {
            let (_, last) = plugins.calls("GC");
            let config: Value = serde_json::from_str(last.split_once("  ")?.1).ok()?;
            let valid = config["cni.dev/valid-attachments"].as_array()?;
            let ids: Vec<&str> = valid
                .iter()
                .filter_map(|one| one["containerID"].as_str())
                .collect();
            let right = ids.len() == expected.len()
                && expected.iter().all(|pod| ids.contains(&pod.id.as_str()));
            right.then_some(())
        });
    };
    told(&[&pods[0], &pods[1]]);
    pods[0].remove();
    told(&[&pods[1]]);
    node.kill_daemon();
    fs::remove_file(plugins.dir().join("calls")).unwrap();
    node.start_daemon();
    told(&[&pods[1]]);
    pods[1].remove();
    told(&[]);
    assert_eq!(remains(&node, &plugins), [""; 0]);
}

#[test]
fn after_a_reboot_no_address_is_taken_and_no_rule_left() {
    let plugins = Plugins::new();
    let node = plugins.node("");
    configure(
        &node,
        "1.0.0",
        &[plugins.bridge(&["10.66.0.0/24"]), portmap()],
    );
    let mut config = node.pod_config("web");
    config.port_mappings = vec![cri::PortMapping {
        host_port: 12_101,
        container_port: 80,
        ..Default::default()
    }];
    let pod = node.run(config);
    let sleeper = pod.start(&["sleep", "1000"]);
    assert_eq!(plugins.leases().len(), 1);
    node.kill_daemon();
    reboot(&node);
    node.start_daemon();
    eventually("what plugins gave is given back", || {
        remains(&node, &plugins).is_empty().then_some(())
    });
    assert!(!pod.is_ready());
    assert_eq!(sleeper.status().exit_code, 255);
    pod.remove();
}

/// What a reboot leaves of a node whose daemon does not run: no process, no
/// mount, no rule, pins that lead nowhere, and records of another boot.
fn reboot(node: &Node) {
    for what in ["-F", "-X"] {
        node.host.run("iptables", &["-t", "nat", what]).unwrap();
    }
    let footprint = node.footprint();
    eventually("no process of the node is left", || {
        let pids = footprint.processes(None);
        for pid in &pids {
            _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(*pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        pids.is_empty().then_some(())
    });
    for mount in footprint.mounts().iter().rev() {
        nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
    for entry in fs::read_dir(node.root().join("lib/pods")).unwrap() {
        let path = entry.unwrap().path().join("pod.rec");
        let text = fs::read_to_string(&path).unwrap();
        let (head, body) = text.split_once('\n').unwrap();
        let mut record: Value = serde_json::from_str(body).unwrap();
        record["boot_id"] = "00000000-0000-0000-0000-000000000000".into();
        let body = record.to_string();
        let words: Vec<&str> = head.split(' ').collect();
        let head = words[..4].join(" ");
        let crc = crc32(body.as_bytes());
        fs::write(&path, format!("{head} {} {crc:08x}\n{body}", body.len())).unwrap();
    }
}

/// Source: IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
