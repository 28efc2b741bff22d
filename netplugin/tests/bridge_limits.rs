//! Bandwidth limits, by what a pod really gets through. Needs root; leaves
//! nothing on the machine it runs on.

mod world;

use berth_netplugin::bandwidth::Bandwidth;
use berth_netplugin::bridge::{Attach, Bridge, NetError};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use world::{Netns, Pod, World};

/// 10 MB per second.
const RATE: u64 = 80_000_000;

/// What is sent beyond the burst of a tenth of a second: 0.4 seconds' worth.
const BYTES: usize = 5_000_000;

fn limited(
    world: &World,
    bridge: &Bridge,
    id: &str,
    ingress: u64,
    egress: u64,
) -> Result<Pod, NetError> {
    let netns = Netns::new();
    let path = netns.path();
    let request = Attach {
        id,
        name: id,
        netns: &path,
        ifname: "eth0",
        port_mappings: &[],
        bandwidth: Bandwidth {
            ingress_rate: ingress,
            egress_rate: egress,
            ..Bandwidth::default()
        },
    };
    let attachment = world.host.run(|| bridge.add(&request))?;
    Ok(Pod { netns, attachment })
}

/// How long [`BYTES`] take from one to the other.
fn sending(from: &Netns, to: &Netns, address: &str) -> Duration {
    let listener = to.run(|| TcpListener::bind("[::]:5201").unwrap());
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        stream.write_all(b"all").unwrap();
    });
    let mut stream = from.run(|| TcpStream::connect(address).unwrap());
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let started = Instant::now();
    stream.write_all(&vec![7; BYTES]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_exact(&mut [0; 3]).unwrap();
    receiver.join().unwrap();
    started.elapsed()
}

#[test]
fn each_direction_is_as_fast_as_its_limit() {
    let world = World::new();
    let bridge = world.bridge();
    let free = limited(&world, &bridge, "free", 0, 0).unwrap();
    let receives = limited(&world, &bridge, "receives", RATE, 0).unwrap();
    let sends = limited(&world, &bridge, "sends", 0, RATE).unwrap();
    // Less the burst; what takes longer is the machine's load.
    let least = Duration::from_millis(350);
    let most = Duration::from_secs(4);
    for (what, from, to, limit) in [
        ("into the limited", &free, &receives, true),
        ("out of it", &receives, &free, false),
        ("out of the limited", &sends, &free, true),
        ("into it", &free, &sends, false),
    ] {
        for ipv4 in [true, false] {
            let took = sending(&from.netns, &to.netns, &to.at(ipv4, 5201));
            println!("{what}: {took:?}");
            assert!((took > least) == limit, "{what}: {took:?}");
            assert!(took < most, "{what}: {took:?}");
        }
    }
}

#[test]
fn limits_go_with_their_pod() {
    let world = World::new();
    let bridge = world.bridge();
    for round in 0..2 {
        let id = format!("pod{round}");
        let pod = limited(&world, &bridge, &id, RATE, RATE).unwrap();
        let qdiscs = world.host.sh("tc qdisc show");
        assert_eq!(qdiscs.matches("qdisc tbf").count(), 2, "{qdiscs}");
        assert!(qdiscs.contains("rate 80Mbit"), "{qdiscs}");
        // Once more with other limits, as a repeated ADD may.
        let path = pod.netns.path();
        let again = Attach {
            id: &id,
            name: &id,
            netns: &path,
            ifname: "eth0",
            port_mappings: &[],
            bandwidth: Bandwidth {
                egress_rate: 2 * RATE,
                ..Bandwidth::default()
            },
        };
        world.host.run(|| bridge.add(&again)).unwrap();
        let qdiscs = world.host.sh("tc qdisc show");
        assert_eq!(qdiscs.matches("qdisc tbf").count(), 1, "{qdiscs}");
        assert!(qdiscs.contains("rate 160Mbit"), "{qdiscs}");
        if round == 0 {
            world.host.run(|| bridge.del(&id, "eth0")).unwrap();
        } else {
            world.host.run(|| bridge.gc(|_, _| false)).unwrap();
        }
        assert_eq!(world.host.sh("ip -o link show type ifb"), "");
        world.host.run(|| bridge.remove_link(&id, "eth0")).unwrap();
    }
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn a_limit_beyond_any_hardware_is_one_the_kernel_takes() {
    let world = World::new();
    let bridge = world.bridge();
    let most = 1_000_000_000_000_000;
    let fast = limited(&world, &bridge, "fast", most, most).unwrap();
    let slow = limited(&world, &bridge, "slow", 1_000, 1_000).unwrap();
    let _server = fast.netns.serve("[::]:80");
    assert_eq!(
        slow.netns.ask(&fast.at(true, 80)).unwrap(),
        slow.ip(true),
        "the burst lets a few packets through"
    );
}
