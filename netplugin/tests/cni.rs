//! CNI both ways: `Network` running plugins (Debian's and ones that
//! misbehave), and `berth-bridge` being run. Needs root and the package
//! containernetworking-plugins.

mod world;

use berth_netplugin::{
    AttachRequest, AttachResult, DetachRequest, Mode, Network, NetworkError, NetworkSettings, Pod,
    PortMapping, Protocol,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use world::{HOST4, Netns, World};

const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

struct Node {
    world: World,
    network: Network,
}

impl Node {
    fn new(mode: Mode) -> Self {
        let world = World::new();
        for dir in ["conf", "bin"] {
            std::fs::create_dir(world.dir.path().join(dir)).unwrap();
        }
        let network = open(&world, mode);
        Self { world, network }
    }

    fn restart(&mut self) {
        self.network = open(&self.world, Mode::Wait);
    }

    fn configure(&self, file: &str, config: Value) {
        let path = self.world.dir.path().join("conf").join(file);
        std::fs::write(path, config.to_string()).unwrap();
    }

    /// A plugin of the test's own.
    fn plugin(&self, name: &str, script: &str) {
        let path = self.world.dir.path().join("bin").join(name);
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn attach(&self, id: &str, netns: &Netns) -> Result<AttachResult, NetworkError> {
        self.attach_with(id, netns, &[])
    }

    fn attach_with(
        &self,
        id: &str,
        netns: &Netns,
        port_mappings: &[PortMapping],
    ) -> Result<AttachResult, NetworkError> {
        let netns = netns.path();
        let request = AttachRequest {
            pod: pod(id),
            netns: &netns,
            port_mappings,
            annotations: &BTreeMap::new(),
            cgroup_parent: "",
        };
        self.world.host.run(|| self.network.attach(&request))
    }

    fn detach(
        &self,
        id: &str,
        netns: Option<&Netns>,
        record: Option<&Value>,
    ) -> Result<(), NetworkError> {
        let path = netns.map(Netns::path);
        let request = DetachRequest {
            pod: pod(id),
            netns: path.as_deref(),
        };
        self.world
            .host
            .run(|| self.network.detach(&request, record))
    }

    fn reason(&self) -> String {
        let status = self.network.status();
        assert_eq!(status.ready, status.reason.is_empty());
        format!("{}: {}", status.reason, status.message)
    }
}

fn open(world: &World, mode: Mode) -> Network {
    Network::open(NetworkSettings {
        mode,
        cni_conf_dir: world.dir.path().join("conf"),
        cni_bin_dirs: vec![world.dir.path().join("bin"), DEBIAN_PLUGINS.into()],
        plugin_deadline: Duration::from_secs(5),
        bridge: world.settings(),
    })
    .unwrap()
}

fn pod(id: &str) -> Pod<'_> {
    Pod {
        id,
        name: "web",
        namespace: "default",
        uid: "u-1",
    }
}

fn list(plugins: &[Value]) -> Value {
    json!({ "cniVersion": "1.0.0", "name": "test", "plugins": plugins })
}

fn bridge_plugin(dir: &Path) -> Value {
    json!({ "type": "bridge", "bridge": "cni7", "isGateway": true, "ipMasq": false,
            "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.66.0.0/24" }]],
                      "routes": [{ "dst": "0.0.0.0/0" }], "dataDir": dir.join("host-local") } })
}

#[test]
fn without_a_configuration_the_mode_decides() {
    let mut node = Node::new(Mode::Builtin);
    assert!(node.network.status().ready);
    let netns = Netns::new();
    let first = node.attach("a", &netns).unwrap();
    assert_eq!(first.ips.len(), 2);
    assert!(first.ips[0].is_ipv4(), "primary first");
    assert_eq!(first.record["result"]["interfaces"][2]["name"], "eth0");
    assert_eq!(
        node.attach("a", &netns).unwrap().ips,
        first.ips,
        "a repeated attachment"
    );

    node.restart();
    assert!(
        node.reason()
            .starts_with("NetworkPluginNotReady: no CNI configuration in ")
    );
    let error = node.attach("b", &Netns::new()).unwrap_err();
    assert!(matches!(error, NetworkError::NotReady { .. }));
    node.detach("a", None, Some(&first.record)).unwrap();
    node.detach("a", Some(&netns), None).unwrap();
    node.detach("never", None, None).unwrap();
    drop(netns);
    wait_until(|| node.world.leftovers().is_empty());
}

#[test]
fn status_says_which_file_and_what_is_wrong() {
    let node = Node::new(Mode::Wait);
    let conf = node.world.dir.path().join("conf");
    std::fs::write(conf.join("10-half.conflist"), r#"{"cniVersion":"#).unwrap();
    let said = node.reason();
    assert!(
        said.starts_with("CNIConfigInvalid: ") && said.contains("10-half.conflist"),
        "{said}"
    );
    node.configure("20-next.conflist", list(&[json!({ "type": "nowhere" })]));
    let said = node.reason();
    assert!(
        said.starts_with("CNIPluginMissing: CNI plugin nowhere is not in "),
        "{said}"
    );
    node.plugin("nowhere", "exit 0");
    assert!(node.network.status().ready);
    std::fs::remove_dir_all(&conf).unwrap();
    assert!(!node.network.status().ready);
    std::fs::create_dir(&conf).unwrap();
    node.configure("ignored.txt", json!({}));
    assert!(!node.network.status().ready);
    node.configure(
        "99.conf",
        json!({ "cniVersion": "0.4.0", "name": "n", "type": "loopback" }),
    );
    assert!(node.network.status().ready);
}

#[test]
fn debians_bridge_and_portmap_give_a_pod_its_network() {
    let mut node = Node::new(Mode::Wait);
    let dir = node.world.dir.path().to_owned();
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    let tuning = json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "77" } });
    node.configure("10.conflist", list(&[bridge_plugin(&dir), portmap, tuning]));
    let netns = Netns::new();
    let ports = [PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    let attached = node.attach_with("a", &netns, &ports).unwrap();
    assert_eq!(
        attached.ips,
        ["10.66.0.2".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(netns.sh("cat /proc/sys/net/core/somaxconn").trim(), "77");
    let server = netns.serve("0.0.0.0:80");
    assert!(netns.ask("127.0.0.1:80").is_ok(), "loopback is up");
    node.world.host.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
    node.world.outside.ask(&format!("{HOST4}:8080")).unwrap();
    let again = node.attach_with("a", &netns, &ports).unwrap();
    assert_eq!(again.ips.len(), 1);

    // The configuration goes, the daemon restarts, the namespace goes: DEL still knows.
    std::fs::remove_file(dir.join("conf/10.conflist")).unwrap();
    node.restart();
    drop((server, netns));
    node.detach("a", None, None).unwrap();
    let leases = std::fs::read_dir(dir.join("host-local/test")).unwrap();
    let leases: Vec<_> = leases
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("10."))
        .collect();
    assert_eq!(leases, Vec::<String>::new());
    wait_until(|| node.world.leftovers().is_empty());
}

#[test]
fn plugins_are_told_what_they_should_be() {
    let node = Node::new(Mode::Wait);
    let log = node.world.dir.path().join("log");
    let script = |result: &str| {
        format!(
            "input=$(cat)
             echo \"$CNI_COMMAND|$CNI_CONTAINERID|$CNI_NETNS|$CNI_IFNAME|$CNI_ARGS|$input\" >> {}
             [ $CNI_COMMAND = ADD ] && echo '{result}'
             exit 0",
            log.display()
        )
    };
    node.plugin(
        "one",
        &script(r#"{"cniVersion":"1.1.0","ips":[{"address":"10.5.0.2/24"}]}"#),
    );
    node.plugin(
        "two",
        &script(r#"{"cniVersion":"1.1.0","ips":[{"address":"10.5.0.3/24"}]}"#),
    );
    let config = json!({ "cniVersion": "0.4.0", "cniVersions": ["1.1.0"], "name": "test",
        "plugins": [{ "type": "one", "capabilities": { "portMappings": true, "mac": true } },
                    { "type": "two", "own": "word" }] });
    node.configure("10.conflist", config);
    let netns = Netns::new();
    let port = PortMapping {
        host_port: 53,
        container_port: 5353,
        protocol: Protocol::Udp,
        host_ip: Some("127.0.0.1".parse().unwrap()),
    };
    let attached = node.attach_with("id1", &netns, &[port]).unwrap();
    assert_eq!(
        attached.ips,
        ["10.5.0.3".parse::<std::net::IpAddr>().unwrap()],
        "the last result"
    );
    node.detach("id1", Some(&netns), None).unwrap();
    node.world.host.run(|| node.network.gc(&["alive"])).unwrap();

    let lines = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Vec<&str>> = lines
        .lines()
        .map(|line| line.splitn(6, '|').collect())
        .collect();
    let commands: Vec<&str> = lines.iter().map(|line| line[0]).collect();
    assert_eq!(commands, ["ADD", "ADD", "DEL", "DEL", "GC", "GC"]);
    let input = |at: usize| serde_json::from_str::<Value>(lines[at][5]).unwrap();
    assert_eq!(
        lines[0][1..4],
        ["id1", netns.path().to_str().unwrap(), "eth0"]
    );
    assert_eq!(
        lines[0][4],
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
         K8S_POD_INFRA_CONTAINER_ID=id1;K8S_POD_UID=u-1"
    );
    assert_eq!(
        input(0),
        json!({ "cniVersion": "1.1.0", "name": "test", "type": "one", "runtimeConfig": {
            "portMappings": [{ "hostPort": 53, "containerPort": 5353, "protocol": "udp",
                               "hostIP": "127.0.0.1" }] } })
    );
    assert_eq!(input(1)["prevResult"]["ips"][0]["address"], "10.5.0.2/24");
    assert_eq!(input(1)["own"], "word");
    assert_eq!(input(2)["type"], "two", "DEL goes backwards");
    assert_eq!(input(2)["prevResult"]["ips"][0]["address"], "10.5.0.3/24");
    assert_eq!(input(3)["prevResult"]["ips"][0]["address"], "10.5.0.3/24");
    assert!(
        input(3)["runtimeConfig"]["portMappings"].is_array(),
        "as at ADD"
    );
    assert_eq!(
        input(4)["cni.dev/valid-attachments"],
        json!([{ "containerID": "alive", "ifname": "eth0" }])
    );
}

#[test]
fn misbehaving_plugins_are_named_and_cleaned_up_after() {
    let node = Node::new(Mode::Wait);
    let marks = node.world.dir.path().join("marks");
    node.configure("10.conflist", list(&[json!({ "type": "bad" })]));
    let fail = |script: &str| {
        let _ = std::fs::remove_file(&marks);
        let script = format!(
            "[ $CNI_COMMAND = DEL ] && echo gone >> {} && exit 0\n{script}",
            marks.display()
        );
        node.plugin("bad", &script);
        let error = node.attach("a", &Netns::new()).unwrap_err();
        assert_eq!(
            std::fs::read_to_string(&marks).unwrap(),
            "gone\n",
            "DEL after a failed ADD"
        );
        assert_eq!(node.world.leftovers(), Vec::<String>::new());
        chain(&error)
    };
    let coded =
        r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"try later","details":"busy"}'; exit 1"#;
    assert_eq!(
        fail(coded),
        "CNI plugin bad failed ADD: try later (code 11): busy"
    );
    let said = fail("echo garbage; echo why >&2; exit 7");
    assert!(
        said.contains("exit status: 7 and no CNI error: \"garbage\\nwhy\""),
        "{said}"
    );
    assert!(fail("kill -9 $$").contains("signal: 9"));
    assert!(fail("echo not json").contains("what is not JSON"));
    assert!(fail("echo '{\"ips\": 7}'").contains("what is no result"));
    assert!(fail("yes").contains("wrote more than 1048576 bytes"));
    let started = Instant::now();
    assert!(fail("sleep 1000 & sleep 1000").contains("did not end within 5s"));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_failing_del_is_tried_again_by_gc() {
    let mut node = Node::new(Mode::Wait);
    node.plugin(
        "bad",
        "[ $CNI_COMMAND = ADD ] && echo '{\"cniVersion\":\"1.0.0\"}' || exit 1",
    );
    node.configure("10.conflist", list(&[json!({ "type": "bad" })]));
    let netns = Netns::new();
    let attached = node.attach("a", &netns).unwrap();
    node.detach("a", Some(&netns), Some(&attached.record))
        .unwrap_err();
    std::fs::remove_file(node.world.dir.path().join("bin/bad")).unwrap();
    let error = node.detach("a", None, None).unwrap_err();
    assert!(error.to_string().contains("CNI plugin bad is not in"));
    assert_eq!(node.world.leftovers(), ["a"], "the record stays");
    node.restart();
    node.plugin("bad", "exit 0");
    assert_eq!(
        node.world.host.run(|| node.network.gc(&["a"])).unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(node.world.host.run(|| node.network.gc(&[])).unwrap(), ["a"]);
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

#[test]
fn ids_that_lead_elsewhere_are_refused() {
    let node = Node::new(Mode::Builtin);
    for id in ["", "../x", "a/b", ".hidden", "a b"] {
        let error = node.attach(id, &Netns::new()).unwrap_err();
        assert!(matches!(error, NetworkError::BadId { .. }), "{id}");
        node.detach(id, None, None).unwrap_err();
    }
}

#[test]
fn a_conflist_may_name_the_built_in_network() {
    let node = Node::new(Mode::Wait);
    node.configure("10.conflist", list(&[berth_bridge(&node.world, "1.0.0")]));
    let netns = Netns::new();
    let attached = node.attach("a", &netns).unwrap();
    assert_eq!(
        attached.ips,
        ["10.55.0.2".parse::<std::net::IpAddr>().unwrap()]
    );
    node.detach("a", Some(&netns), None).unwrap();
    assert_eq!(node.world.leftovers(), Vec::<String>::new());
}

fn berth_bridge(world: &World, version: &str) -> Value {
    json!({ "cniVersion": version, "name": "test", "type": "berth-bridge", "bridge": "bb0",
            "ipMasq": true, "capabilities": { "portMappings": true },
            "ipam": { "subnets": ["10.55.0.0/24"], "dataDir": world.dir.path().join("network") } })
}

/// Runs the program as a runtime would; its answer, and whether it succeeded.
fn call(world: &World, command: &str, id: &str, netns: &Path, config: &Value) -> (Value, bool) {
    call_and_die(world, command, id, netns, config, "")
}

/// [`call`], but the program kills itself at `point`.
fn call_and_die(
    world: &World,
    command: &str,
    id: &str,
    netns: &Path,
    config: &Value,
    point: &str,
) -> (Value, bool) {
    let (text, good) = world.host.run(|| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_berth-bridge"))
            .env(berth_store::crash::VARIABLE, point)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // VERSION does not read it.
        let _ = std::io::Write::write_all(&mut stdin, config.to_string().as_bytes());
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        (
            String::from_utf8(output.stdout).unwrap(),
            output.status.success(),
        )
    });
    let answer = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap()
    };
    (answer, good)
}

#[test]
fn berth_bridge_keeps_to_the_specification() {
    let world = World::new();
    let netns = Netns::new();
    let nowhere = PathBuf::new();
    let (version, _) = call(&world, "VERSION", "", &nowhere, &Value::Null);
    assert_eq!(
        version["supportedVersions"]
            .as_array()
            .unwrap()
            .last()
            .unwrap(),
        "1.1.0"
    );

    let mut config = berth_bridge(&world, "1.1.0");
    assert_eq!(
        call(&world, "STATUS", "", &nowhere, &config),
        (Value::Null, true)
    );
    config["runtimeConfig"] =
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let (result, good) = call(&world, "ADD", "a", &netns.path(), &config);
    assert!(good, "{result}");
    assert_eq!(result["ips"][0]["address"], "10.55.0.2/24");
    assert_eq!(result["ips"][0]["interface"], 2);
    assert_eq!(
        result["interfaces"][2]["sandbox"],
        netns.path().to_str().unwrap()
    );
    assert_eq!(result["interfaces"][2]["mac"], "0a:be:0a:37:00:02");
    assert_eq!(result["interfaces"][2]["mtu"], 1400);
    assert_eq!(
        result["routes"][0],
        json!({ "dst": "0.0.0.0/0", "gw": "10.55.0.1" })
    );
    let _server = netns.serve("0.0.0.0:80");
    world.outside.ask(&format!("{HOST4}:8080")).unwrap();

    config["prevResult"] = result;
    assert_eq!(
        call(&world, "CHECK", "a", &netns.path(), &config),
        (Value::Null, true)
    );
    let other = Netns::new();
    let (error, good) = call(&world, "CHECK", "b", &other.path(), &config);
    assert!(!good && error["code"] == 102, "{error}");
    config.as_object_mut().unwrap().remove("prevResult");
    let (error, good) = call(&world, "ADD", "b", &other.path(), &config);
    assert!(!good);
    assert_eq!(error["code"], 101);
    assert_eq!(error["msg"], "host port 8080/tcp is in use by pod a");
    config.as_object_mut().unwrap().remove("runtimeConfig");
    config["cniVersion"] = "0.4.0".into();
    let (result, good) = call(&world, "ADD", "b", &other.path(), &config);
    assert!(good);
    assert_eq!(result["ips"][0]["version"], "4");
    assert!(result["interfaces"][2].get("mtu").is_none());

    config["cniVersion"] = "1.1.0".into();
    config["cni.dev/valid-attachments"] = json!([{ "containerID": "b", "ifname": "eth0" }]);
    assert_eq!(
        call(&world, "GC", "", &nowhere, &config),
        (Value::Null, true)
    );
    world.outside.ask(&format!("{HOST4}:8080")).unwrap_err();
    for _ in 0..2 {
        assert_eq!(
            call(&world, "DEL", "b", &nowhere, &config),
            (Value::Null, true)
        );
    }
    assert_eq!(world.leftovers(), Vec::<String>::new());

    for (change, expected) in [
        (json!({ "cniVersion": "9.9.9" }), 1),
        (json!({ "name": "../x" }), 7),
        (json!({ "mtu": "big" }), 6),
        (
            json!({ "ipam": { "subnets": ["10.0.0.0/8", "11.0.0.0/8"] } }),
            7,
        ),
        (json!({ "bridge": "a/b" }), 7),
    ] {
        let mut bad = berth_bridge(&world, "1.1.0");
        bad.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        let (error, good) = call(&world, "ADD", "c", &netns.path(), &bad);
        assert!(!good && error["code"] == expected, "{change}: {error}");
    }
    let (error, _) = call(&world, "ADD", "../c", &netns.path(), &config);
    assert_eq!(error["code"], 4);
    let (error, _) = call(&world, "ADD", "c", Path::new("/nowhere"), &config);
    assert_eq!(error["code"], 3);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn killed_at_any_point_it_can_be_repeated_and_taken_back() {
    let world = World::new();
    let mut config = berth_bridge(&world, "1.1.0");
    config["runtimeConfig"] =
        json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let points = berth_netplugin::CRASH_POINTS.iter();
    let mut died = 0;
    for (number, point) in points.enumerate() {
        for repeat in [true, false] {
            let id = format!("pod{number}{repeat}");
            let netns = Netns::new();
            let path = netns.path();
            let (_, good) = call_and_die(&world, "ADD", &id, &path, &config, point);
            died += usize::from(!good);
            if repeat {
                let (result, good) = call(&world, "ADD", &id, &path, &config);
                assert!(good, "ADD after {point}: {result}");
                let _server = netns.serve("0.0.0.0:80");
                world.outside.ask(&format!("{HOST4}:8080")).unwrap();
            }
            let (_, good) = call_and_die(&world, "DEL", &id, &path, &config, point);
            died += usize::from(!good);
            let (answer, good) = call(&world, "DEL", &id, &path, &config);
            assert!(good, "DEL after {point}: {answer}");
            assert_eq!(world.leftovers(), Vec::<String>::new(), "{point}");
        }
    }
    assert_eq!(died, 2 * 4, "each of the bridge's points was reached");
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen within 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}
