//! Two hosts, each with a bridge and pods: who reaches whom, by what, and how
//! they are seen. Needs root; leaves nothing on the machine it runs on.

mod world;

use berth_netplugin::bridge::{Bridge, Settings};
use berth_netplugin::{PortMapping, Protocol};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use world::{HOST4, HOST6, Netns, OUTSIDE4, OUTSIDE6, Pod, World, both};

/// The port all servers of pods have.
const SERVED: u16 = 80;

/// The host port that leads to it.
const MAPPED: u16 = 8080;

/// A world whose outside is a host with pods, too. Each knows the way to the
/// other's pods.
struct Two {
    world: World,
    here: Bridge,
    there: Bridge,
}

impl Two {
    fn new() -> Self {
        let world = World::new();
        let nets = |text: &str| text.split(' ').map(|net| net.parse().unwrap()).collect();
        let here = Bridge::open(Settings {
            no_masquerade: nets("10.78.0.0/24 fd78::/64"),
            ..world.settings()
        });
        let there = Bridge::open(Settings {
            ipv4: "10.78.0.0/24".parse().ok(),
            ipv6: "fd78::/64".parse().ok(),
            no_masquerade: nets("10.77.0.0/24 fd77::/64"),
            ..Settings::new(world.dir.path().join("there"))
        });
        world.host.sh(&format!(
            "ip route add 10.78.0.0/24 via {OUTSIDE4}; ip -6 route add fd78::/64 via {OUTSIDE6}"
        ));
        world.outside.sh(&format!(
            "ip route add 10.77.0.0/24 via {HOST4}; ip -6 route add fd77::/64 via {HOST6}"
        ));
        Self {
            world,
            here: here.unwrap(),
            there: there.unwrap(),
        }
    }
}

fn mapped() -> Vec<PortMapping> {
    let ports = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    ports
        .map(|protocol| PortMapping {
            host_port: MAPPED,
            container_port: SERVED,
            protocol,
            host_ip: None,
        })
        .to_vec()
}

type Ask = fn(&Netns, &str) -> io::Result<IpAddr>;

const TRANSPORTS: [(&str, Ask); 2] = [("TCP", Netns::ask), ("UDP", Netns::ask_udp)];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn everybody_reaches_everybody_over_both_families_and_transports() {
    let two = Two::new();
    let (here, there) = (&two.world.host, &two.world.outside);
    let a = Pod::on(here, &two.here, "a", &mapped()).unwrap();
    let b = Pod::on(here, &two.here, "b", &[]).unwrap();
    let c = Pod::on(there, &two.there, "c", &mapped()).unwrap();
    let everywhere = format!("[::]:{SERVED}");
    let pods = [&a.netns, &b.netns, &c.netns];
    let _tcp = [pods[0], pods[1], pods[2], here, there].map(|netns| netns.serve(&everywhere));
    let _udp = pods.map(|netns| netns.serve_udp(&everywhere));
    // A host has many addresses: only who is bound to one answers from it.
    let of_hosts = [
        (here, HOST4, HOST6),
        (here, "10.77.0.1", "fd77::1"),
        (there, OUTSIDE4, OUTSIDE6),
    ];
    let _udp = of_hosts
        .map(|(netns, v4, v6)| both(v4, v6, SERVED).map(|address| netns.serve_udp(&address)));

    let (mut wrong, mut asked) = (Vec::new(), 0);
    for (transport, ask) in TRANSPORTS {
        for ipv4 in [true, false] {
            let pick = |v4: &str, v6: &str| ip(if ipv4 { v4 } else { v6 });
            let (host, other) = (pick(HOST4, HOST6), pick(OUTSIDE4, OUTSIDE6));
            let gateway = pick("10.77.0.1", "fd77::1");
            let (pod_a, pod_b, pod_c) = (a.ip(ipv4), b.ip(ipv4), c.ip(ipv4));
            // Who asks, at which address and port, and as whom it is seen; `None` is anybody.
            let mut matrix = vec![
                ("pod to pod", &a.netns, pod_b, SERVED, Some(pod_a)),
                ("pod to pod elsewhere", &a.netns, pod_c, SERVED, Some(pod_a)),
                ("pod from elsewhere", &c.netns, pod_a, SERVED, Some(pod_c)),
                ("pod to its host", &a.netns, host, SERVED, Some(pod_a)),
                ("pod to the gateway", &a.netns, gateway, SERVED, Some(pod_a)),
                ("pod to other host", &a.netns, other, SERVED, Some(host)),
                ("host to pod", here, pod_a, SERVED, Some(gateway)),
                ("host to pod elsewhere", here, pod_c, SERVED, Some(host)),
                ("host port, own pod", &a.netns, host, MAPPED, None),
                ("host port, another pod", &b.netns, host, MAPPED, None),
                ("host port, its host", here, host, MAPPED, None),
                ("host port, outside", there, host, MAPPED, Some(other)),
                ("host port, a pod outside", &c.netns, host, MAPPED, None),
                ("elsewhere's host port", &a.netns, other, MAPPED, Some(host)),
            ];
            if ipv4 {
                matrix.push(("localhost", here, ip("127.0.0.1"), MAPPED, None));
            }
            for (what, from, to, port, expected) in matrix {
                asked += 1;
                let seen = ask(from, &SocketAddr::new(to, port).to_string());
                let good = match (&seen, expected) {
                    (Ok(seen), Some(expected)) => *seen == expected,
                    (Ok(_), None) => true,
                    (Err(_), _) => false,
                };
                if !good {
                    wrong.push(format!("{transport} {what}: {seen:?}, not {expected:?}"));
                }
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
    assert_eq!(asked, 2 * (15 + 14));
}

/// Where the kernel has SCTP its traffic, everywhere its rules.
#[test]
fn a_host_port_of_sctp_leads_to_its_pod() {
    let two = Two::new();
    let (here, there) = (&two.world.host, &two.world.outside);
    let pod = Pod::on(here, &two.here, "a", &mapped()).unwrap();
    let rules = two.world.rules();
    for ipv4 in [true, false] {
        let rule = format!("sctp . {MAPPED} : {} . {SERVED}", pod.ip(ipv4));
        assert!(rules.contains(&rule), "{rule} in {rules}");
    }
    let Ok(listener) = pod.netns.run(|| sctp(true)) else {
        let kernel = std::fs::read_to_string("/proc/net/protocols").unwrap();
        assert!(
            !kernel.contains("SCTP"),
            "the kernel has SCTP, but gives no socket"
        );
        return;
    };
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let stream = rustix::net::accept(&listener).unwrap();
            TcpStream::from(stream).write_all(b"hello").unwrap();
        }
    });
    for address in both(HOST4, HOST6, MAPPED) {
        let address: SocketAddr = address.parse().unwrap();
        let mut stream = there.run(|| {
            let socket = sctp(false).unwrap();
            let mapped = match address.ip() {
                IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
                IpAddr::V6(_) => address,
            };
            rustix::net::connect(&socket, &mapped).unwrap();
            TcpStream::from(socket)
        });
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello", "{address}");
    }
    server.join().unwrap();
}

/// A one-to-one SCTP socket of both families, listening on [`SERVED`] or not.
fn sctp(listening: bool) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketType, bind, ipproto, listen, socket};
    let socket = socket(
        AddressFamily::INET6,
        SocketType::STREAM,
        Some(ipproto::SCTP),
    )?;
    if listening {
        bind(&socket, &SocketAddr::new(ip("::"), SERVED))?;
        listen(&socket, 4)?;
    }
    Ok(socket)
}

#[test]
fn the_rules_are_the_same_before_and_after_a_hundred_pods() {
    let world = World::new();
    let bridge = world.bridge();
    let mapped = |number: u16| {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| PortMapping {
            host_port: 10_000 + number,
            container_port: SERVED,
            protocol,
            host_ip: number.is_multiple_of(3).then(|| ip(HOST4)),
        })
    };
    let come_and_go = |numbers: std::ops::Range<u16>| {
        for number in numbers {
            let id = format!("pod{number}");
            let pod = world.try_pod(&bridge, &id, &mapped(number)).unwrap();
            assert!(
                world
                    .rules()
                    .contains(&format!("tcp . {} : ", 10_000 + number))
            );
            world.host.run(|| bridge.del(&id, "eth0")).unwrap();
            drop(pod);
        }
    };
    come_and_go(0..1);
    let before = world.rules();
    come_and_go(1..101);
    let after = world.rules();
    println!("{after}");
    assert_eq!(before, after);
    assert_eq!(world.host.sh("ip -o link show master berth0"), "");
}

#[test]
fn more_host_ports_than_one_transaction_takes_come_and_go_too() {
    let world = World::new();
    let bridge = world.bridge();
    let first = world.pod(&bridge, "first");
    let before = world.rules();
    let mapped: Vec<PortMapping> = (0..600)
        .map(|number| PortMapping {
            host_port: 10_000 + number,
            container_port: SERVED,
            protocol: Protocol::Tcp,
            host_ip: None,
        })
        .collect();
    let _pod = world.try_pod(&bridge, "many", &mapped).unwrap();
    assert!(world.rules().contains("tcp . 10599 : "));
    world.host.run(|| bridge.del("many", "eth0")).unwrap();
    assert_eq!(world.rules(), before);
    drop(first);
}
