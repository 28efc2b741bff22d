//! The built-in network: addresses, the way between containers, pods and the
//! host, host ports, host network, and that all of it is given back.

use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::{Node, eventually};
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

fn host_network(node: &Node, name: &str) -> cri::PodSandboxConfig {
    let mut config = node.pod_config(name);
    config.hostname.clear();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
    config
}

fn port_mapping(host_port: i32, container_port: i32) -> cri::PortMapping {
    cri::PortMapping {
        host_port,
        container_port,
        ..Default::default()
    }
}

/// What a server said to somebody who connected from the host.
fn fetch(node: &Node, address: SocketAddr) -> String {
    eventually(&format!("somebody answers at {address}"), || {
        node.host.enter(|| {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            (!text.is_empty()).then_some(text)
        })
    })
}

fn answers(node: &Node, address: SocketAddr) -> bool {
    node.host
        .enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
}

#[test]
fn every_pod_has_an_address_of_its_own() {
    let node = Node::start();
    let pods: Vec<_> = (0..3).map(|n| node.run_pod(&format!("pod-{n}"))).collect();
    let mut addresses: Vec<_> = pods.iter().map(berth_tests::Pod::ip).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 3);
    for (pod, name) in pods.iter().zip(["pod-0", "pod-1", "pod-2"]) {
        let seen = pod.output(&["ip", "addr", "show", "dev", "eth0"]);
        assert!(seen.contains(&format!("{}/", pod.ip())), "{name}: {seen}");
    }
}

#[test]
fn loopback_is_up() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let seen = pod.output(&["ip", "addr", "show", "dev", "lo"]);
    assert!(
        seen.contains("UP") && seen.contains("127.0.0.1/8"),
        "{seen}"
    );
}

#[test]
fn two_containers_of_a_pod_meet_on_localhost() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    let got = pod.output(&["probe", "fetch", "127.0.0.1:8080"]);
    assert!(got.starts_with("hello "), "{got}");
}

#[test]
fn the_host_reaches_a_container_at_the_pods_address() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    assert!(fetch(&node, SocketAddr::new(pod.ip(), 8080)).starts_with("hello "));
}

#[test]
fn pods_reach_each_other_and_see_each_others_addresses() {
    let node = Node::start();
    let (server, client) = (node.run_pod("server"), node.run_pod("client"));
    let _serving = server.start(&["probe", "serve", "8080", "hello"]);
    let got = client.output(&["probe", "fetch", &format!("{}:8080", server.ip())]);
    // Between pods nothing is translated.
    assert!(got.contains(&client.ip().to_string()), "{got}");
}

#[test]
fn a_pod_reaches_the_host_by_its_default_route() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let routes = pod.output(&["ip", "route"]);
    assert!(routes.contains("default via "), "{routes}");
    let listener = node
        .host
        .enter(|| std::net::TcpListener::bind("198.18.0.1:7000"))
        .unwrap();
    let serve = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "from the host").unwrap();
    });
    assert_eq!(
        pod.output(&["probe", "fetch", "198.18.0.1:7000"]),
        "from the host\n"
    );
    serve.join().unwrap();
}

#[test]
fn a_host_port_leads_to_the_container_from_the_host_and_through_its_address() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.port_mappings = vec![port_mapping(12000, 8080)];
    let pod = node.run(config);
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    for host in ["127.0.0.1:12000", "198.18.0.1:12000"] {
        assert!(
            fetch(&node, host.parse().unwrap()).starts_with("hello "),
            "{host}"
        );
    }
    // From another pod as well.
    let other = node.run_pod("other");
    let got = other.output(&["probe", "fetch", "198.18.0.1:12000"]);
    assert!(got.starts_with("hello "), "{got}");
}

#[test]
fn a_pod_reaches_itself_through_its_own_host_port() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.port_mappings = vec![port_mapping(12001, 8080)];
    let pod = node.run(config);
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    let got = pod.output(&["probe", "fetch", "198.18.0.1:12001"]);
    assert!(got.starts_with("hello "), "{got}");
}

#[test]
fn a_host_port_bound_to_one_address_is_open_there_alone() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    let mut mapping = port_mapping(12002, 8080);
    mapping.host_ip = "127.0.0.1".to_owned();
    config.port_mappings = vec![mapping];
    let pod = node.run(config);
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    assert!(fetch(&node, "127.0.0.1:12002".parse().unwrap()).starts_with("hello "));
    assert!(!answers(&node, "198.18.0.1:12002".parse().unwrap()));
}

#[test]
fn a_container_port_without_a_host_port_opens_nothing() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.port_mappings = vec![port_mapping(0, 8080)];
    let pod = node.run(config);
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    assert!(fetch(&node, SocketAddr::new(pod.ip(), 8080)).starts_with("hello "));
    assert!(!answers(&node, "127.0.0.1:8080".parse().unwrap()));
}

#[test]
fn after_stop_the_port_is_closed_and_the_address_free() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    config.port_mappings = vec![port_mapping(12003, 8080)];
    let pod = node.run(config.clone());
    let _server = pod.start(&["probe", "serve", "8080", "first"]);
    let address = "127.0.0.1:12003".parse().unwrap();
    assert!(fetch(&node, address).starts_with("first "));
    let ip = pod.ip();
    pod.stop();
    assert!(!answers(&node, address));
    assert!(!answers(&node, SocketAddr::new(ip, 8080)));
    assert_eq!(node.host.nft_elements(), [""; 0]);
    // The next pod may have the port at once.
    config.metadata.as_mut().unwrap().attempt = 1;
    let next = node.run(config);
    let _server = next.start(&["probe", "serve", "8080", "second"]);
    assert!(fetch(&node, address).starts_with("second "));
}

#[test]
fn a_stopped_pod_has_no_address_any_more() {
    let node = Node::start();
    let pod = node.run_pod("web");
    pod.stop();
    let network = pod.status().network.unwrap_or_default();
    assert_eq!(network.ip, "");
}

#[test]
fn addresses_are_used_again_only_after_others() {
    let node = Node::start();
    let first = node.run_pod("first");
    let address = first.ip();
    first.remove();
    let second = node.run_pod("second");
    assert_ne!(
        second.ip(),
        address,
        "a just freed address may still be in somebody's cache"
    );
}

#[test]
fn a_full_subnet_is_an_error_and_a_freed_address_ends_it() {
    let node = Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/30\"]\n")
        .start();
    let only = node.run_pod("only");
    let err = node
        .try_run(node.pod_config("late"))
        .err()
        .expect("the subnet is full");
    assert!(err.message().contains("10.99.0.0/30"), "{err}");
    assert_eq!(node.pods(None).len(), 1, "nothing half made is listed");
    only.remove();
    node.run_pod("late");
}

#[test]
fn a_pod_may_have_addresses_of_both_families() {
    let node = Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/24\", \"fd99::/64\"]\n")
        .start();
    let pod = node.run_pod("web");
    let network = pod.status().network.unwrap();
    let first: IpAddr = network.ip.parse().unwrap();
    let second: IpAddr = network.additional_ips[0].ip.parse().unwrap();
    assert!(first.is_ipv4() && second.is_ipv6(), "{network:?}");
    let _server = pod.start(&["probe", "serve", "8080", "hello"]);
    assert!(fetch(&node, SocketAddr::new(second, 8080)).starts_with("hello "));
}

#[test]
fn a_host_network_pod_is_in_the_hosts_network() {
    let node = Node::start();
    let pod = node.run(host_network(&node, "agent"));
    let container = pod.start(&["probe", "serve", "8081", "hello"]);
    assert!(fetch(&node, "127.0.0.1:8081".parse().unwrap()).starts_with("hello "));
    let netns = berth_tests::leftovers::netns_of(container.init_pid()).unwrap();
    assert_eq!(netns, node.host.inode());
    let status = pod.status();
    assert_eq!(status.network.unwrap_or_default().ip, "");
    let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(options.network(), NamespaceMode::Node);
    // And the machine's name with it.
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(container.exec(&["hostname"]), name);
}

#[test]
fn a_host_network_pod_leaves_the_host_as_it_was() {
    let node = Node::start();
    let before = node.host.links();
    let pod = node.run(host_network(&node, "agent"));
    pod.output(&["true"]);
    pod.remove();
    assert_eq!(node.host.links(), before);
}

#[test]
fn ten_pods_at_once_get_ten_addresses_and_give_them_back() {
    let node = Node::start();
    let calls = (0..10)
        .map(|n| {
            let mut runtime = node.runtime();
            let config = Some(node.pod_config(&format!("pod-{n}")));
            async move {
                let request = cri::RunPodSandboxRequest {
                    config,
                    ..Default::default()
                };
                runtime.run_pod_sandbox(request).await
            }
        })
        .collect();
    for answer in node.wait_all(calls) {
        answer.unwrap();
    }
    let mut addresses: Vec<_> = node
        .pods(None)
        .into_iter()
        .map(|pod| {
            let request = cri::PodSandboxStatusRequest {
                pod_sandbox_id: pod.id,
                verbose: false,
            };
            let answer = node
                .wait(node.runtime().pod_sandbox_status(request))
                .unwrap();
            answer.status.unwrap().network.unwrap().ip
        })
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 10);
    node.remove_all_pods().unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}
