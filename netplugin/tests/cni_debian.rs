//! `Network` with the plugins of Debian's containernetworking-plugins, one by one
//! and chained. Needs root.

mod node;
mod world;

use berth_netplugin::{Mode, NetworkError, PortMapping, Primary, Protocol};
use node::{Node, Wishes, chain, wait_until};
use serde_json::{Value, json};
use std::net::IpAddr;
use std::path::Path;
use world::{HOST4, Netns};

fn host_local(dir: &Path, subnets: &[&str]) -> Value {
    let ranges: Vec<Value> = subnets
        .iter()
        .map(|net| json!([{ "subnet": net }]))
        .collect();
    json!({ "type": "host-local", "ranges": ranges, "dataDir": dir.join("host-local"),
            "routes": [{ "dst": "0.0.0.0/0" }] })
}

fn bridge(dir: &Path) -> Value {
    json!({ "type": "bridge", "bridge": "cni7", "isGateway": true,
            "ipam": host_local(dir, &["10.66.0.0/24"]) })
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The addresses that host-local counts as taken.
fn taken(node: &Node) -> Vec<String> {
    let entries = std::fs::read_dir(node.dir().join("host-local/test"));
    let names = entries.into_iter().flatten();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // Its lock, and what it gave last.
    names
        .filter(|name| name.contains(['.', ':']) && !name.starts_with("last"))
        .collect()
}

/// Nothing is left: neither ours, nor of the plugins.
fn all_given_back(node: &Node) {
    assert_eq!(taken(node), Vec::<String>::new());
    wait_until(|| node.world.leftovers().is_empty());
    let rules = node.world.host.sh("iptables-save; ip6tables-save");
    assert!(!rules.contains("10.66.0."), "{rules}");
    let links = node.world.host.sh("ip -o link show type ifb");
    assert_eq!(links, "");
}

/// Attaches, looks, asks the plugins whether all is well, detaches.
fn round(node: &Node, wishes: &Wishes, look: impl FnOnce(&Netns, &[IpAddr])) {
    assert_eq!(node.reason(), "");
    let netns = Netns::new();
    let attached = node.attach_with("a", &netns, wishes).unwrap();
    look(&netns, &attached.ips);
    match node.world.host.run(|| node.network.check("a")) {
        Ok(()) => {}
        // portmap 1.1.1 looks for rules of IPv6 also where the pod has no address of it.
        Err(error) if error.to_string().contains("could not check ipv6 dnat") => {
            assert!(!wishes.ports.is_empty(), "{error}");
        }
        Err(error) => panic!("{}", chain(&error)),
    }
    node.detach("a", Some(&netns), Some(&attached.record))
        .unwrap();
    node.world.host.run(|| node.network.check("a")).unwrap();
    drop(netns);
    all_given_back(node);
}

fn answers(node: &Node, netns: &Netns, address: &str) {
    let _server = netns.serve("0.0.0.0:80");
    node.world.host.ask(&format!("{address}:80")).unwrap();
}

#[test]
fn bridge_with_host_local_in_every_version() {
    let node = Node::new(Mode::Wait);
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        node.plugins(version, &[bridge(node.dir())]);
        round(&node, &Wishes::default(), |netns, ips| {
            assert_eq!(ips.len(), 1, "{version}");
            answers(&node, netns, &ips[0].to_string());
            assert!(netns.sh("ip route").contains("default via 10.66.0.1"));
        });
    }
}

#[test]
fn a_single_configuration_without_plugins_around_it() {
    let node = Node::new(Mode::Wait);
    let mut config = bridge(node.dir());
    config["cniVersion"] = "0.3.1".into();
    config["name"] = "test".into();
    node.configure("10-single.conf", config);
    round(&node, &Wishes::default(), |netns, ips| {
        answers(&node, netns, &ips[0].to_string());
    });
}

#[test]
fn ptp() {
    let node = Node::new(Mode::Wait);
    let ipam = host_local(node.dir(), &["10.66.0.0/24"]);
    node.plugins(
        "1.0.0",
        &[json!({ "type": "ptp", "ipMasq": true, "ipam": ipam })],
    );
    round(&node, &Wishes::default(), |netns, ips| {
        answers(&node, netns, &ips[0].to_string());
    });
}

#[test]
fn macvlan_with_static_addresses() {
    let node = Node::new(Mode::Wait);
    let ipam = json!({ "type": "static", "addresses": [{ "address": "198.51.100.77/24" }] });
    node.plugins(
        "1.0.0",
        &[json!({ "type": "macvlan", "master": "up0", "ipam": ipam })],
    );
    round(&node, &Wishes::default(), |netns, ips| {
        assert_eq!(ips, [ip("198.51.100.77")]);
        // The host does not reach its own macvlans; who is outside does.
        let _server = netns.serve("0.0.0.0:80");
        node.world.outside.ask("198.51.100.77:80").unwrap();
    });
}

#[test]
fn addresses_and_macs_that_the_pod_asks_for() {
    let node = Node::new(Mode::Wait);
    let bridge = json!({ "type": "bridge", "bridge": "cni7",
        "capabilities": { "ips": true, "mac": true }, "ipam": { "type": "static" } });
    node.plugins("1.0.0", &[bridge]);
    let wishes = Wishes::annotated(&[
        ("network.berth/ips", "10.66.0.9/24,fd66::9/64"),
        ("network.berth/mac", "02:00:00:00:66:09"),
    ]);
    round(&node, &wishes, |netns, ips| {
        assert_eq!(ips, [ip("10.66.0.9"), ip("fd66::9")]);
        assert!(netns.sh("ip link show eth0").contains("02:00:00:00:66:09"));
    });
}

#[test]
fn address_ranges_come_from_what_the_kubelet_names() {
    let mut node = Node::new(Mode::Wait);
    let mut bridge = bridge(node.dir());
    bridge["capabilities"] = json!({ "ipRanges": true });
    bridge["ipam"].as_object_mut().unwrap().remove("ranges");
    node.plugins("1.0.0", &[bridge]);
    let subnets = ["10.66.0.128/25", "fd66::/64"].map(|net| net.parse().unwrap());
    node.network.set_pod_cidr(&subnets).unwrap();
    // The kubelet does not say it again to a daemon that comes up later.
    node.restart();
    round(&node, &Wishes::default(), |_, ips| {
        assert_eq!(ips, [ip("10.66.0.130"), ip("fd66::2")]);
    });
}

#[test]
fn the_first_address_is_of_the_family_that_is_configured() {
    let mut node = Node::new(Mode::Wait);
    let ipam = host_local(node.dir(), &["fd66::/64", "10.66.0.0/24"]);
    node.plugins("1.0.0", &[json!({ "type": "ptp", "ipam": ipam })]);
    for (primary, first_is_ipv4) in [
        (Primary::Ipv4, true),
        (Primary::Ipv6, false),
        (Primary::AsGiven, false),
    ] {
        node.restart_with(|settings| settings.primary = primary);
        round(&node, &Wishes::default(), |_, ips| {
            assert_eq!(ips.len(), 2);
            assert_eq!(ips[0].is_ipv4(), first_is_ipv4, "{primary:?}: {ips:?}");
        });
    }
}

#[test]
fn a_chain_of_all_that_can_be_chained() {
    let node = Node::new(Mode::Wait);
    node.plugins(
        "1.0.0",
        &[
            json!({ "type": "loopback" }),
            bridge(node.dir()),
            json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "77" } }),
            json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
            json!({ "type": "firewall" }),
        ],
    );
    let mut wishes = Wishes::annotated(&[
        ("kubernetes.io/ingress-bandwidth", "10M"),
        ("kubernetes.io/egress-bandwidth", "20M"),
    ]);
    wishes.ports = vec![PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    node.world.host.sh("echo 1 > /proc/sys/net/ipv4/ip_forward");
    round(&node, &wishes, |netns, ips| {
        assert_eq!(ips.len(), 1);
        assert_eq!(netns.sh("cat /proc/sys/net/core/somaxconn").trim(), "77");
        let queues = node.world.host.sh("tc qdisc show");
        assert!(
            queues.contains("rate 10Mbit") && queues.contains("rate 20Mbit"),
            "{queues}"
        );
        let rules = node.world.host.sh("iptables-save");
        assert!(rules.contains(&format!("-s {}/32", ips[0])), "{rules}");
        let server = netns.serve("0.0.0.0:80");
        assert!(netns.ask("127.0.0.1:80").is_ok(), "loopback is up");
        node.world.outside.ask(&format!("{HOST4}:8080")).unwrap();
        drop(server);
    });
}

#[test]
fn what_was_attached_is_given_back_without_configuration_and_namespace() {
    let mut node = Node::new(Mode::Wait);
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    node.plugins("1.0.0", &[bridge(node.dir()), portmap]);
    let wishes = Wishes {
        ports: vec![PortMapping {
            host_port: 8081,
            container_port: 80,
            protocol: Protocol::Udp,
            host_ip: None,
        }],
        ..Wishes::default()
    };
    let netns = Netns::new();
    node.attach_with("a", &netns, &wishes).unwrap();
    let again = node.attach_with("a", &netns, &wishes).unwrap();
    assert_eq!(
        (again.ips.len(), taken(&node).len()),
        (1, 1),
        "a repeated attachment"
    );
    std::fs::remove_file(node.conf("10.conflist")).unwrap();
    node.restart();
    drop(netns);
    node.detach("a", None, None).unwrap();
    all_given_back(&node);
}

#[test]
fn a_pin_that_lost_its_namespace_in_a_reboot_is_no_obstacle() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[bridge(node.dir())]);
    let netns = Netns::new();
    let record = node.attach("a", &netns).unwrap().record;
    drop(netns);
    let pin = node.dir().join("pin");
    std::fs::write(&pin, "").unwrap();
    let request = berth_netplugin::DetachRequest {
        pod: node::pod("a"),
        netns: Some(&pin),
    };
    node.world
        .host
        .run(|| node.network.detach(&request, Some(&record)))
        .unwrap();
    all_given_back(&node);
}

#[test]
fn check_sees_what_was_changed() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[bridge(node.dir())]);
    let netns = Netns::new();
    node.attach("a", &netns).unwrap();
    node.world.host.run(|| node.network.check("a")).unwrap();
    netns.sh("ip address flush dev eth0");
    let error = node.world.host.run(|| node.network.check("a")).unwrap_err();
    let said = chain(&error);
    assert!(
        said.starts_with("CNI plugin bridge failed CHECK: "),
        "{said}"
    );
    node.detach("a", Some(&netns), None).unwrap();
}

#[test]
fn a_full_range_is_told_and_leaves_nothing() {
    let node = Node::new(Mode::Wait);
    let ipam = host_local(node.dir(), &["10.66.0.0/30"]);
    node.plugins(
        "1.0.0",
        &[json!({ "type": "bridge", "bridge": "cni7", "ipam": ipam })],
    );
    let (first, second) = (Netns::new(), Netns::new());
    node.attach("a", &first).unwrap();
    let said = chain(&node.attach("b", &second).unwrap_err());
    assert!(
        said.starts_with("CNI plugin bridge failed ADD: ") && said.contains("10.66.0"),
        "{said}"
    );
    node.detach("a", Some(&first), None).unwrap();
    node.attach("b", &second).unwrap();
    node.detach("b", Some(&second), None).unwrap();
    drop((first, second));
    all_given_back(&node);
}

#[test]
fn a_network_without_an_address_is_an_error_and_undone() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[json!({ "type": "loopback" })]);
    let error = node.attach("a", &Netns::new()).unwrap_err();
    assert!(matches!(error, NetworkError::NoAddress { .. }), "{error}");
    // Plugins that only follow others say so themselves.
    for kind in ["tuning", "portmap", "bandwidth", "firewall"] {
        node.plugins("1.0.0", &[json!({ "type": kind })]);
        let said = chain(&node.attach("a", &Netns::new()).unwrap_err());
        assert!(said.contains(kind), "{said}");
    }
    all_given_back(&node);
}

#[test]
fn the_version_is_one_that_all_plugins_speak() {
    let node = Node::new(Mode::Wait);
    let list = |versions: Value| {
        let mut list =
            json!({ "cniVersion": "0.4.0", "name": "test", "plugins": [bridge(node.dir())] });
        list["cniVersions"] = versions;
        node.configure("10.conflist", list);
    };
    list(json!(["0.4.0", "1.0.0", "1.1.0"]));
    let netns = Netns::new();
    let attached = node.attach("a", &netns).unwrap();
    assert_eq!(attached.record["result"]["cniVersion"], "1.0.0");
    node.detach("a", Some(&netns), None).unwrap();
    node.plugins("1.1.0", &[bridge(node.dir())]);
    let said = node.reason();
    assert!(
        said.starts_with("CNIVersionUnsupported: CNI plugin bridge speaks 0.1.0,"),
        "{said}"
    );
    node.attach("a", &netns).unwrap_err();
    drop(netns);
    all_given_back(&node);
}

#[test]
fn many_pods_come_and_go_at_once() {
    let node = Node::new(Mode::Wait);
    node.plugins("1.0.0", &[bridge(node.dir())]);
    let count: usize = std::env::var("BERTH_TEST_PODS").map_or(20, |count| count.parse().unwrap());
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let node = &node;
            scope.spawn(move || {
                for number in (worker..count).step_by(4) {
                    let (id, netns) = (format!("pod{number}"), Netns::new());
                    node.attach(&id, &netns).unwrap();
                    if number % 2 == 0 {
                        node.detach(&id, Some(&netns), None).unwrap();
                    } else {
                        drop(netns);
                        node.detach(&id, None, None).unwrap();
                    }
                }
            });
        }
    });
    all_given_back(&node);
}
