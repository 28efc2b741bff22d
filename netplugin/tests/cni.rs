//! CNI both ways: `Network` running plugins, and `berth-bridge` being run.
//! Needs root and the package containernetworking-plugins.

mod node;
mod world;

use berth_netplugin::{Mode, NetworkError};
use node::{Node, wait_until};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use world::{HOST4, Netns, World};

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

    node.restart_with(|settings| settings.mode = Mode::Wait);
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
    node.plugins("1.1.0", &[berth_bridge(&node.world, "1.0.0")]);
    assert_eq!(node.reason(), "");
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
