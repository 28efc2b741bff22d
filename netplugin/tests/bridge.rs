//! The built-in network between namespaces that stand for a host, another
//! machine and pods. Needs root; leaves nothing on the machine it runs on.

mod world;

use berth_netplugin::bridge::Bridge;
use berth_netplugin::{PortMapping, Protocol};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use world::{HOST4, HOST6, Netns, OUTSIDE4, OUTSIDE6, Pod, World, both};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn port(host_port: u16, protocol: Protocol, host_ip: Option<&str>) -> PortMapping {
    PortMapping {
        host_port,
        container_port: 80,
        protocol,
        host_ip: host_ip.map(ip),
    }
}

/// Takes the pod's network back as the daemon does: cut off, then the namespace goes.
fn remove(world: &World, bridge: &Bridge, id: &str, pod: Pod) {
    world.host.run(|| bridge.del(id, "eth0")).unwrap();
    world.host.run(|| bridge.remove_link(id, "eth0")).unwrap();
    drop(pod);
}

#[test]
fn everybody_reaches_whom_they_should() {
    let world = World::new();
    let bridge = world.bridge();
    let (a, b) = (world.pod(&bridge, "a"), world.pod(&bridge, "b"));
    let _servers =
        [&a.netns, &b.netns, &world.host, &world.outside].map(|netns| netns.serve("[::]:80"));

    for ipv4 in [true, false] {
        assert_eq!(
            a.netns.ask(&b.at(ipv4, 80)).unwrap(),
            a.ip(ipv4),
            "pod to pod"
        );
        assert_eq!(
            a.netns.ask(&a.at(ipv4, 80)).unwrap(),
            a.ip(ipv4),
            "pod to itself"
        );
        let gateway = bridge_address(ipv4);
        assert_eq!(
            world.host.ask(&a.at(ipv4, 80)).unwrap(),
            gateway,
            "host to pod"
        );
    }
    for (ipv4, host) in [true, false].into_iter().zip(both(HOST4, HOST6, 80)) {
        assert_eq!(a.netns.ask(&host).unwrap(), a.ip(ipv4), "pod to host");
    }
    for (host, outside) in [HOST4, HOST6].into_iter().zip(both(OUTSIDE4, OUTSIDE6, 80)) {
        assert_eq!(
            a.netns.ask(&outside).unwrap(),
            ip(host),
            "pod to outside, masqueraded"
        );
    }
    assert_eq!(a.attachment.mtu, 1400, "the uplink's");
    let [v4, v6] = both("127.0.0.1", "::1", 80);
    assert!(
        a.netns.ask(&v4).is_ok() && a.netns.ask(&v6).is_ok(),
        "the pod's loopback is up"
    );

    remove(&world, &bridge, "a", a);
    remove(&world, &bridge, "b", b);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

fn bridge_address(ipv4: bool) -> IpAddr {
    if ipv4 { ip("10.77.0.1") } else { ip("fd77::1") }
}

#[test]
fn without_masquerading_the_outside_sees_the_pod() {
    let world = World::new();
    let mut settings = world.settings();
    settings.masquerade = false;
    let bridge = Bridge::open(settings).unwrap();
    let pod = world.pod(&bridge, "a");
    assert_eq!(world.rules(), "", "no rule where none is needed");
    world.outside.sh(&format!(
        "ip route add 10.77.0.0/24 via {HOST4}; ip -6 route add fd77::/64 via {HOST6}"
    ));
    let _server = world.outside.serve("[::]:80");
    for (ipv4, outside) in [true, false].into_iter().zip(both(OUTSIDE4, OUTSIDE6, 80)) {
        assert_eq!(pod.netns.ask(&outside).unwrap(), pod.ip(ipv4));
    }
}

/// What `ask` answers within the second after which a neighbour is asked for again.
fn at_once(what: &str, ask: impl FnOnce() -> std::io::Result<IpAddr>) {
    let started = Instant::now();
    ask().unwrap();
    let took = started.elapsed();
    assert!(
        took < Duration::from_millis(900),
        "{what}: a lost first packet costs a second: {took:?}"
    );
}

#[test]
fn a_bridges_first_pod_is_reached_over_ipv6_at_once() {
    let world = World::new();
    let bridge = world.bridge();
    world
        .outside
        .sh(&format!("ip -6 route add fd77::/64 via {HOST6}"));
    let pod = world.pod(&bridge, "a");
    let _server = pod.netns.serve("[::]:80");
    at_once("the first", || world.outside.ask(&pod.at(false, 80)));
    let second = world.pod(&bridge, "b");
    at_once("the second", || second.netns.ask(&pod.at(false, 80)));
}

#[test]
fn a_bridges_first_pod_reaches_the_outside_over_ipv6_at_once() {
    let world = World::new();
    let bridge = world.bridge();
    let _server = world.outside.serve("[::]:80");
    let pod = world.pod(&bridge, "a");
    let [_, outside] = both(OUTSIDE4, OUTSIDE6, 80);
    at_once("outwards", || pod.netns.ask(&outside));
    let addresses = world.host.sh("ip -6 -o address show dev berth0 scope link");
    assert_eq!(addresses.lines().count(), 1, "{addresses}");
    assert!(addresses.contains("nodad"), "{addresses}");
}

/// Says on `ifname` that this namespace is a router, as radvd would.
fn advertise(netns: &Netns, ifname: &str) {
    use rustix::net::{self, AddressFamily, SocketType, ipproto, sockopt};
    // Type 134, 64 hops, for half an hour; the kernel fills in the checksum. Source: RFC 4861, 4.2.
    let message = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    // What is not said from a link-local address is not believed either.
    let mut line = String::new();
    wait_until(|| {
        line = netns.sh(&format!(
            "ip -6 -o address show dev {ifname} scope link -tentative"
        ));
        !line.is_empty()
    });
    let mut words = line.split([' ', ':', '/']).filter(|word| !word.is_empty());
    let index = words.next().unwrap().parse().unwrap();
    let own = line
        .split_whitespace()
        .nth(3)
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    let at = |address: &str| std::net::SocketAddrV6::new(address.parse().unwrap(), 0, 0, index);
    netns.run(|| {
        let protocol = Some(ipproto::ICMPV6);
        let socket = net::socket(AddressFamily::INET6, SocketType::RAW, protocol).unwrap();
        net::bind(&socket, &at(own)).unwrap();
        // A message that a router has passed on has fewer.
        sockopt::set_ipv6_multicast_hops(&socket, 255).unwrap();
        net::sendto(&socket, &message, net::SendFlags::empty(), &at("ff02::1")).unwrap();
    });
}

/// Where routers have said so, by their interfaces.
fn routes_by_advertisement(netns: &Netns) -> String {
    netns.sh("ip -6 route show default proto ra")
}

/// CVE-2020-10749: whoever is listened to as a router gets the traffic of all others.
#[test]
fn no_pod_is_taken_for_a_router() {
    for ipv6 in [true, false] {
        let world = World::new();
        let mut settings = world.settings();
        if !ipv6 {
            settings.ipv6 = None;
        }
        let before = world
            .host
            .sh("cat /proc/sys/net/ipv6/conf/default/accept_ra");
        // The host's own router is heard before there are pods, and after.
        world.host.sh("ip -6 route del default");
        advertise(&world.outside, "up1");
        wait_until(|| routes_by_advertisement(&world.host).contains("dev up0"));
        let bridge = Bridge::open(settings).unwrap();
        let (evil, other) = (world.pod(&bridge, "evil"), world.pod(&bridge, "other"));
        world.host.sh("ip -6 route flush default proto ra");
        advertise(&evil.netns, "eth0");
        // What comes later has arrived: so has what came before.
        advertise(&world.outside, "up1");
        wait_until(|| routes_by_advertisement(&world.host).contains("dev up0"));
        let heard = routes_by_advertisement(&world.host);
        assert!(
            !heard.contains("berth0"),
            "IPv6 {ipv6}: the host hears {heard}"
        );
        assert_eq!(routes_by_advertisement(&other.netns), "", "IPv6 {ipv6}");
        let accepts = |netns: &Netns, link: &str| {
            netns
                .sh(&format!("cat /proc/sys/net/ipv6/conf/{link}/accept_ra"))
                .trim()
                .to_owned()
        };
        assert_eq!(accepts(&world.host, "berth0"), "0", "IPv6 {ipv6}");
        assert_eq!(accepts(&other.netns, "eth0"), "0", "IPv6 {ipv6}");
        let after = world
            .host
            .sh("cat /proc/sys/net/ipv6/conf/default/accept_ra");
        assert_eq!(after, before, "links to come are as they would have been");
    }
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere() {
    let world = World::new();
    let bridge = world.bridge();
    let before = {
        let pod = world.pod(&bridge, "first");
        remove(&world, &bridge, "first", pod);
        world.rules()
    };
    let ports = [
        port(8080, Protocol::Tcp, None),
        port(8443, Protocol::Tcp, Some(HOST4)),
        port(8444, Protocol::Tcp, Some(HOST6)),
        port(8053, Protocol::Udp, None),
        port(8132, Protocol::Sctp, None),
    ];
    let pod = world.try_pod(&bridge, "a", &ports).unwrap();
    let other = world.pod(&bridge, "b");
    let _server = pod.netns.serve("[::]:80");
    let _decoy = other.netns.serve("[::]:80");

    for address in both(HOST4, HOST6, 8080) {
        let seen = world.outside.ask(&address).unwrap();
        assert!(
            [ip(OUTSIDE4), ip(OUTSIDE6)].contains(&seen),
            "from outside: {seen}"
        );
        world.host.ask(&address).expect("from the host by address");
        pod.netns.ask(&address).expect("from the pod itself");
        other.netns.ask(&address).expect("from another pod");
    }
    world
        .host
        .ask("127.0.0.1:8080")
        .expect("from the host by localhost");
    world
        .host
        .ask("10.77.0.1:8080")
        .expect("by the gateway's address");
    world.outside.ask(&format!("{HOST4}:8443")).unwrap();
    world.outside.ask(&format!("[{HOST6}]:8444")).unwrap();
    world
        .outside
        .ask(&format!("[{HOST6}]:8443"))
        .expect_err("the other family");
    world
        .host
        .ask("127.0.0.1:8443")
        .expect_err("another address");
    assert!(
        world.rules().contains("sctp . 8132 : "),
        "{}",
        world.rules()
    );

    for (host, any) in both(HOST4, HOST6, 8053).iter().zip(["0.0.0.0:0", "[::]:0"]) {
        let served = pod.netns.udp(&pod.at(any == "0.0.0.0:0", 80));
        let client = world.outside.udp(any);
        client.connect(host).unwrap();
        client.send(b"ping").unwrap();
        let (_, peer) = served.recv_from(&mut [0; 8]).expect("a datagram");
        served.send_to(b"pong", peer).unwrap();
        let mut answer = [0; 8];
        assert_eq!(client.recv(&mut answer).expect("an answer"), 4);
    }

    let again = world.attach(&bridge, "a", &pod.netns, &ports).unwrap();
    assert_eq!(
        again.ips, pod.attachment.ips,
        "a repeated attachment is the same one"
    );
    world.outside.ask(&format!("{HOST4}:8080")).unwrap();

    remove(&world, &bridge, "a", pod);
    remove(&world, &bridge, "b", other);
    world
        .outside
        .ask(&format!("{HOST4}:8080"))
        .expect_err("taken back");
    assert_eq!(world.rules(), before);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn localhost_of_the_host_stays_closed_to_pods() {
    let world = World::new();
    let bridge = world.bridge();
    let pod = world
        .try_pod(&bridge, "a", &[port(8080, Protocol::Tcp, None)])
        .unwrap();
    let _secret = world.host.serve("127.0.0.1:9000");
    assert_eq!(
        world
            .host
            .sh("cat /proc/sys/net/ipv4/conf/berth0/route_localnet")
            .trim(),
        "1"
    );
    pod.netns.sh("ip addr del 127.0.0.1/8 dev lo
         echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
         ip route add 127.0.0.1/32 via 10.77.0.1 dev eth0 src 10.77.0.2");
    pod.netns.ask("127.0.0.1:9000").expect_err("the guard");
    assert_eq!(world.host.ask("127.0.0.1:9000").unwrap(), ip("127.0.0.1"));
}

#[test]
fn two_pods_cannot_have_one_host_port() {
    let world = World::new();
    let bridge = world.bridge();
    let first = world
        .try_pod(&bridge, "first", &[port(8080, Protocol::Tcp, None)])
        .unwrap();
    let wanted = [
        port(9000, Protocol::Tcp, None),
        port(8080, Protocol::Tcp, Some(HOST4)),
    ];
    let error = world
        .try_pod(&bridge, "second", &wanted)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        format!("host port {HOST4}:8080/tcp is in use by pod first")
    );
    assert!(!world.rules().contains("9000"));
    let udp = world
        .try_pod(&bridge, "third", &[port(8080, Protocol::Udp, None)])
        .unwrap();
    remove(&world, &bridge, "first", first);
    let second = world.try_pod(&bridge, "second", &wanted).unwrap();
    remove(&world, &bridge, "second", second);
    remove(&world, &bridge, "third", udp);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_flushed_ruleset_comes_back_with_the_next_pod_and_has_all_host_ports() {
    let world = World::new();
    let bridge = world.bridge();
    let pod = world
        .try_pod(&bridge, "a", &[port(8080, Protocol::Tcp, None)])
        .unwrap();
    let before = world.rules();
    world.host.sh("nft flush ruleset");
    let _other = world.pod(&bridge, "b");
    assert_eq!(world.rules(), before);
    let _server = pod.netns.serve("[::]:80");
    world.outside.ask(&format!("{HOST4}:8080")).unwrap();
}

#[test]
fn taking_back_works_in_any_order_and_again() {
    let world = World::new();
    let bridge = world.bridge();
    world.host.run(|| bridge.del("never seen", "eth0")).unwrap();
    let pod = world
        .try_pod(&bridge, "a", &[port(8080, Protocol::Tcp, None)])
        .unwrap();
    let server = pod.netns.serve("[::]:80");
    world.outside.ask(&format!("{HOST4}:8080")).unwrap();
    let address = pod.ip(true);
    assert!(
        world
            .host
            .sh("conntrack -L 2>/dev/null")
            .contains(&address.to_string())
    );

    // By another process, after the first one died.
    let restarted = world.bridge();
    world.host.run(|| restarted.del("a", "eth0")).unwrap();
    assert!(
        !world
            .host
            .sh("conntrack -L 2>/dev/null")
            .contains(&address.to_string())
    );
    world.host.ask(&pod.at(true, 80)).expect_err("cut off");
    assert!(world.host.sh("ip -o link show master berth0").is_empty());
    drop((server, pod));
    world.host.run(|| restarted.del("a", "eth0")).unwrap();
    wait_until(|| world.leftovers().is_empty());

    let gone = world.pod(&restarted, "b");
    drop(gone);
    world.host.run(|| restarted.del("b", "eth0")).unwrap();
    wait_until(|| world.leftovers().is_empty());
}

/// More than are listed one by one: the kernel is told to forget by address.
#[test]
fn thousands_of_connections_are_forgotten_with_their_pod_and_no_others() {
    let world = World::new();
    let bridge = world.bridge();
    let (busy, other) = (world.pod(&bridge, "busy"), world.pod(&bridge, "other"));
    for (from, outside) in [("0.0.0.0:0", OUTSIDE4), ("[::]:0", OUTSIDE6)] {
        let to: IpAddr = ip(outside);
        let socket = busy.netns.udp(from);
        for port in 1..=3000 {
            // Answered by ICMP, which later ones may be told of.
            let _ = socket.send_to(b"x", (to, port));
        }
    }
    let _server = busy.netns.serve("[::]:80");
    world.host.ask(&busy.at(true, 80)).unwrap();
    let _kept = world.outside.serve("[::]:80");
    other.netns.ask(&format!("{OUTSIDE4}:80")).unwrap();
    let tracked = |pod: &Pod| {
        let both = [true, false].map(|ipv4| pod.ip(ipv4).to_string());
        let listed = world
            .host
            .sh("conntrack -L 2>/dev/null; conntrack -L -f ipv6 2>/dev/null");
        let mut words = listed.lines().map(|line| line.split(['=', ' ']));
        words
            .by_ref()
            .filter(|words| words.clone().any(|word| both.iter().any(|ip| ip == word)))
            .count()
    };
    assert!(tracked(&busy) > 4096, "{}", tracked(&busy));
    let (kept, started) = (tracked(&other), Instant::now());
    assert!(kept > 0);
    world.host.run(|| bridge.del("busy", "eth0")).unwrap();
    println!("taken back in {:?}", started.elapsed());
    assert_eq!((tracked(&busy), tracked(&other)), (0, kept));
}

#[test]
fn gc_takes_what_belongs_to_nobody() {
    let world = World::new();
    let bridge = world.bridge();
    let kept = world
        .try_pod(&bridge, "kept", &[port(8080, Protocol::Tcp, None)])
        .unwrap();
    let _lost = world
        .try_pod(&bridge, "lost", &[port(8081, Protocol::Tcp, None)])
        .unwrap();
    let leases = world.dir.path().join("network/leases");
    std::fs::write(leases.join("10.77.0.200"), "garbage").unwrap();
    std::fs::write(world.dir.path().join("network/hostports/x"), "garbage").unwrap();
    let restarted = world.bridge();
    let dead = world
        .host
        .run(|| restarted.gc(|id, _| id == "kept"))
        .unwrap();
    assert_eq!(dead, ["10.77.0.200", "lost/eth0"]);
    let _server = kept.netns.serve("[::]:80");
    world.outside.ask(&format!("{HOST4}:8080")).unwrap();
    assert!(!world.rules().contains("8081"));
    world
        .host
        .run(|| restarted.check("kept", "eth0", &kept.netns.path()))
        .unwrap();
    world.host.run(|| restarted.gc(|_, _| false)).unwrap();
    assert_eq!(world.leftovers(), Vec::<String>::new());
    world
        .host
        .run(|| restarted.check("kept", "eth0", &kept.netns.path()))
        .unwrap_err();
}

#[test]
fn check_sees_what_was_changed() {
    let world = World::new();
    let bridge = world.bridge();
    let pod = world.pod(&bridge, "a");
    let check = || {
        world
            .host
            .run(|| bridge.check("a", "eth0", &pod.netns.path()))
    };
    check().unwrap();
    let host = &pod.attachment.host_ifname;
    world.host.sh(&format!("ip link set {host} down"));
    assert!(check().unwrap_err().to_string().contains("is down"));
    world.host.sh(&format!("ip link set {host} up nomaster"));
    assert!(
        check()
            .unwrap_err()
            .to_string()
            .contains("not on the bridge")
    );
    world.host.sh(&format!("ip link set {host} master berth0"));
    pod.netns.sh("ip address del 10.77.0.2/24 dev eth0");
    assert!(check().unwrap_err().to_string().contains("lacks 10.77.0.2"));
}

#[test]
fn a_failed_attachment_leaves_nothing() {
    let world = World::new();
    let bridge = world.bridge();
    let netns = Netns::new();
    netns.sh("ip link add eth0 type veth peer name other");
    let error = world.attach(&bridge, "a", &netns, &[]).unwrap_err();
    assert_eq!(error.to_string(), "the pod already has an interface eth0");
    assert_eq!(world.leftovers(), Vec::<String>::new());
    assert_eq!(
        netns.sh("ip -o link show other").lines().count(),
        1,
        "not ours to take"
    );

    world
        .host
        .sh("ip link del berth0; ip link add berth0 type veth peer name other0");
    let error = world.attach(&bridge, "a", &Netns::new(), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the interface berth0 exists and is no bridge"
    );
}

#[test]
fn a_deleted_bridge_is_made_again() {
    let world = World::new();
    let bridge = world.bridge();
    let _first = world.pod(&bridge, "a");
    world.host.sh("ip link del berth0");
    let (b, c) = (world.pod(&bridge, "b"), world.pod(&bridge, "c"));
    let _server = c.netns.serve("[::]:80");
    b.netns.ask(&c.at(true, 80)).unwrap();
}

#[test]
fn two_hundred_and_fifty_pods_at_once_fit_a_24() {
    let world = World::new();
    let bridge = Bridge::open(berth_netplugin::bridge::Settings {
        ipv6: None,
        ..world.settings()
    })
    .unwrap();
    let pods: Vec<Pod> = std::thread::scope(|scope| {
        let (world, bridge) = (&world, &bridge);
        let threads: Vec<_> = (0..10)
            .map(|thread| {
                scope.spawn(move || {
                    (0..25)
                        .map(|pod| world.pod(bridge, &format!("pod{thread}-{pod}")))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let ips: BTreeSet<IpAddr> = pods.iter().map(|pod| pod.ip(true)).collect();
    assert_eq!(ips.len(), 250);
    let more: Vec<Pod> = (0..3)
        .map(|pod| world.pod(&bridge, &format!("more{pod}")))
        .collect();
    let error = world
        .try_pod(&bridge, "too many", &[])
        .err()
        .unwrap()
        .to_string();
    assert_eq!(error, "no free address in 10.77.0.0/24: all 253 are in use");
    let _server = pods[249].netns.serve("0.0.0.0:80");
    pods[0].netns.ask(&pods[249].at(true, 80)).unwrap();
    world.host.run(|| bridge.gc(|_, _| false)).unwrap();
    assert_eq!(world.leftovers(), Vec::<String>::new());
    drop((pods, more));
}

/// Prints how long things take; asserts only what no load of the machine excuses.
#[test]
fn an_attachment_takes_milliseconds() {
    let world = World::new();
    let bridge = Bridge::open(berth_netplugin::bridge::Settings {
        ipv6: None,
        ..world.settings()
    })
    .unwrap();
    let first = world.pod(&bridge, "first");
    let (mut adds, mut dels, mut removes) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..40 {
        let id = format!("pod{number}");
        let netns = Netns::new();
        let timed = |work: &(dyn Fn() + Sync)| {
            world.host.run(|| {
                let start = Instant::now();
                work();
                start.elapsed()
            })
        };
        let path = netns.path();
        let request = berth_netplugin::bridge::Attach {
            id: &id,
            name: &id,
            netns: &path,
            ifname: "eth0",
            port_mappings: &[],
            bandwidth: Default::default(),
        };
        adds.push(timed(&|| drop(bridge.add(&request).unwrap())));
        dels.push(timed(&|| bridge.del(&id, "eth0").unwrap()));
        removes.push(timed(&|| bridge.remove_link(&id, "eth0").unwrap()));
    }
    for (what, times) in [
        ("add", &mut adds),
        ("del", &mut dels),
        ("remove_link", &mut removes),
    ] {
        times.sort();
        println!(
            "{what}: median {:?}, worst {:?}",
            times[times.len() / 2],
            times.last().unwrap()
        );
    }
    assert!(adds[20] < Duration::from_millis(100));
    remove(&world, &bridge, "first", first);
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen within 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}
