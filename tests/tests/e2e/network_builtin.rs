//! The built-in network beyond addresses: SCTP, bandwidth limits, and what a
//! reboot leaves.

use berth_proto::runtime_v1 as cri;
use berth_tests::deadline::{PATIENCE, slowness};
use berth_tests::{Node, eventually};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{AddressFamily, SocketType, bind, ipproto, listen};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

fn with_host_port(
    node: &Node,
    name: &str,
    protocol: cri::Protocol,
    host_port: i32,
) -> cri::PodSandboxConfig {
    let mut config = node.pod_config(name);
    config.port_mappings = vec![cri::PortMapping {
        protocol: protocol.into(),
        container_port: 8080,
        host_port,
        host_ip: String::new(),
    }];
    config
}

/// Runs `work` in the network namespace of a pod.
fn inside<T: Send>(node: &Node, pod: &str, work: impl FnOnce() -> T + Send) -> T {
    let pin = node.root().join("run/sandboxes").join(pod).join("netns");
    let netns = File::open(pin).unwrap();
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        inside.join().unwrap()
    })
}

/// A one-to-one SCTP socket of both families.
fn sctp() -> io::Result<OwnedFd> {
    let kind = SocketType::STREAM;
    let socket = rustix::net::socket(AddressFamily::INET6, kind, Some(ipproto::SCTP))?;
    Ok(socket)
}

#[test]
fn a_host_port_of_sctp_leads_to_its_pod() {
    let node = Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/24\", \"fd99::/64\"]\n")
        .start();
    let pod = node.run(with_host_port(&node, "web", cri::Protocol::Sctp, 12100));
    let rules = node.host.run("nft", &["list", "ruleset"]).unwrap();
    for target in [pod.ip().to_string(), "fd99::2".to_owned()] {
        // A number where the machine has no /etc/protocols.
        let rule = ["sctp", "132"].map(|name| format!("{name} . 12100 : {target} . 8080"));
        assert!(rule.iter().any(|rule| rules.contains(rule)), "{rules}");
    }

    // The module is loaded where there is one.
    let _ = std::process::Command::new("modprobe").arg("sctp").output();
    if let Err(error) = sctp() {
        let known = fs::read_to_string("/proc/net/protocols").unwrap();
        assert!(!known.contains("SCTP"), "{error}: {known}");
        return;
    }
    let listener = inside(&node, &pod.id, || {
        let listener = sctp().unwrap();
        let everywhere = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 8080);
        bind(&listener, &everywhere).unwrap();
        listen(&listener, 4).unwrap();
        listener
    });
    let (has_read, read) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let stream = rustix::net::accept(&listener).unwrap();
            // Its end is no goodbye that somebody has to answer: that would keep the pod's namespace.
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            let mut stream = TcpStream::from(stream);
            stream.write_all(b"hello").unwrap();
            read.recv_timeout(PATIENCE * slowness()).unwrap();
        }
    });
    for host in ["127.0.0.1", "198.18.0.1"] {
        let host: IpAddr = host.parse().unwrap();
        let host = match host {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut stream = node.host.enter(|| {
            let socket = sctp().unwrap();
            rustix::net::connect(&socket, &SocketAddr::new(host.into(), 12100)).unwrap();
            TcpStream::from(socket)
        });
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello", "{host}");
        has_read.send(()).unwrap();
    }
    server.join().unwrap();
}

#[test]
fn annotations_limit_a_pods_bandwidth() {
    let node = Node::start();
    let mut config = node.pod_config("limited");
    for (direction, rate) in [("ingress", "10M"), ("egress", "20M")] {
        config.annotations.insert(
            format!("kubernetes.io/{direction}-bandwidth"),
            rate.to_owned(),
        );
    }
    let pod = node.run(config);
    // A dump may leave out what has only just come.
    eventually("both directions have their rate", || {
        let qdiscs = node.host.run("tc", &["qdisc", "show"]).unwrap();
        let both = ["rate 10Mbit", "rate 20Mbit"];
        both.iter().all(|rate| qdiscs.contains(rate)).then_some(())
    });
    pod.remove();
    // The pair goes with the namespace, which the kernel takes apart after the answer.
    eventually("no limit is left", || {
        let qdiscs = node.host.run("tc", &["qdisc", "show"]).unwrap();
        (!qdiscs.contains("tbf")).then_some(())
    });
}

#[test]
fn a_bandwidth_that_is_none_fails_the_pod_and_says_why() {
    let node = Node::start();
    for (value, expected) in [
        ("fast", "is no quantity"),
        ("10", "less than 1k"),
        ("9P", "1P"),
    ] {
        let mut config = node.pod_config("limited");
        let key = "kubernetes.io/egress-bandwidth".to_owned();
        config.annotations.insert(key, value.to_owned());
        let error = node.try_run(config).err().unwrap();
        assert!(error.message().contains(expected), "{value}: {error}");
    }
    assert!(node.pods(None).is_empty());
}

/// What a reboot leaves: the state on disk, made by a kernel that is no more.
fn reboot(node: &Node) {
    node.kill_daemon();
    let footprint = node.footprint();
    eventually("all processes are gone", || {
        let pids = footprint.processes(None);
        for pid in &pids {
            _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        pids.is_empty().then_some(())
    });
    for mount in footprint.mounts().iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH).unwrap();
    }
    fs::remove_dir_all(node.root().join("run")).unwrap();
    for dir in footprint.cgroups().iter().rev() {
        _ = fs::remove_dir(dir);
    }
    node.host.run("ip", &["link", "del", "berth0"]).unwrap();
    node.host.run("nft", &["flush", "ruleset"]).unwrap();
    eventually("the pods' links are gone", || {
        let links = node.host.links();
        (!links.iter().any(|link| link.starts_with("bv"))).then_some(())
    });
    for pod in fs::read_dir(node.root().join("lib/pods")).unwrap() {
        of_another_boot(&pod.unwrap().path().join("pod.rec"));
    }
}

/// Rewrites a pod's record as one of an earlier boot.
fn of_another_boot(path: &Path) {
    let record = fs::read_to_string(path).unwrap();
    let (header, payload) = record.split_once('\n').unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let boot = boot.trim();
    assert!(payload.contains(boot), "{payload}");
    let payload = payload.replace(boot, &"0".repeat(boot.len()));
    let mut crc = flate2::Crc::new();
    crc.update(payload.as_bytes());
    let (header, _) = header.rsplit_once(' ').unwrap();
    fs::write(path, format!("{header} {:08x}\n{payload}", crc.sum())).unwrap();
}

#[test]
fn after_a_reboot_addresses_and_host_ports_of_the_old_pods_are_free() {
    let node = Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/29\"]\n")
        .start();
    let old: Vec<_> = (0..5)
        .map(|number| {
            let config = with_host_port(
                &node,
                &format!("old-{number}"),
                cri::Protocol::Tcp,
                12200 + number,
            );
            node.run(config)
        })
        .collect();
    reboot(&node);
    node.start_daemon();
    eventually("the leases are gone", || {
        let held = [
            node.footprint().entries("lib/network/leases"),
            node.footprint().entries("lib/network/hostports"),
        ];
        held.concat().is_empty().then_some(())
    });
    assert!(old.iter().all(|pod| !pod.is_ready()));
    assert_eq!(node.host.nft_elements(), [""; 0]);
    // As many as the subnet has room for, with the same ports.
    for number in 0..5 {
        let name = format!("new-{number}");
        node.run(with_host_port(
            &node,
            &name,
            cri::Protocol::Tcp,
            12200 + number,
        ));
    }
    for pod in &old {
        pod.remove();
    }
    assert_eq!(node.host.nft_elements().len(), 5, "the new ones'");
}

fn is_network_ready(node: &Node) -> (bool, String) {
    let request = cri::StatusRequest::default();
    let answer = node.wait(node.runtime().status(request)).unwrap();
    let conditions = answer.status.unwrap().conditions;
    let ready = conditions.into_iter().find(|c| c.r#type == "NetworkReady");
    let ready = ready.expect("NetworkReady");
    (ready.status, ready.message)
}

#[test]
fn rules_that_somebody_flushed_are_back_with_the_next_status() {
    let node = Node::start();
    let rules = || node.host.run("nft", &["list", "ruleset"]).unwrap();
    assert!(is_network_ready(&node).0);
    assert_eq!(rules(), "", "there is nothing to guard without a bridge");

    let pod = node.run(with_host_port(&node, "web", cri::Protocol::Tcp, 12300));
    pod.start(&["probe", "serve", "8080", "hello"]);
    let before = (rules(), node.host.nft_elements());
    assert!(before.0.contains("masquerade") && before.0.contains("127.0.0.0/8 drop"));
    assert_eq!(before.1.len(), 1);
    // By the daemon that knows its bridge, and by one that has only just started.
    for restart in [false, true] {
        node.host.run("nft", &["flush", "ruleset"]).unwrap();
        if restart {
            node.start_daemon();
        }
        assert_eq!(is_network_ready(&node), (true, String::new()));
        assert_eq!((rules(), node.host.nft_elements()), before);
    }
    eventually("the pod answers at its host port", || {
        let address = "127.0.0.1:12300".parse::<SocketAddr>().unwrap();
        node.host.enter(|| TcpStream::connect(address)).ok()
    });
    pod.remove();
    assert_eq!(node.host.nft_elements(), [""; 0]);
}

#[test]
fn without_masquerading_rules_come_back_where_something_needs_them() {
    let node = Node::options()
        .config("[network]\nmasquerade = false\n")
        .start();
    let rules = || node.host.run("nft", &["list", "ruleset"]).unwrap();
    node.run_pod("plain");
    assert!(is_network_ready(&node).0);
    assert_eq!(rules(), "", "nothing needs them");
    let pod = node.run(with_host_port(&node, "web", cri::Protocol::Tcp, 12301));
    let before = rules();
    node.host.run("nft", &["flush", "ruleset"]).unwrap();
    assert!(is_network_ready(&node).0);
    assert_eq!(rules(), before);
    pod.remove();
    // No host port is left, but the bridge goes on to take addresses of localhost.
    node.host.run("nft", &["flush", "ruleset"]).unwrap();
    assert!(is_network_ready(&node).0);
    assert!(rules().contains("127.0.0.0/8 drop"), "{}", rules());
}
