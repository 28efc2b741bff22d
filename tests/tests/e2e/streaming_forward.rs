//! Port-forward: every connection for itself, both ways at once, and nothing left of it.

use crate::streaming::{noise, size};
use crate::streaming_holdings::Holdings;
use berth_proto::runtime_v1::{self as cri, NamespaceMode};
use berth_tests::streaming::{Event, Forwarder, Output, TRANSPORTS, Transport, spdy, websocket};
use berth_tests::{Container, Node, Pod, eventually};
use std::time::{Duration, Instant};

/// A pod with a program that does what the first byte of a connection asks for.
fn serving<'n>(node: &'n Node, address: &str) -> (Pod<'n>, Container<'n>) {
    let pod = node.run_pod("web");
    let container = pod.start(&["probe", "ports", address]);
    container.wait_for_log("listening");
    (pod, container)
}

fn all(from: Output) -> Vec<u8> {
    from.all().expect("the pod's side ends in good order")
}

fn says_nothing(error: Output) {
    let said = error.all().expect("the error stream ends in good order");
    assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

fn echo(forwarder: &Forwarder, port: u16, text: &[u8]) {
    let forwarded = forwarder.connect(port).unwrap();
    forwarded.to.write(b"e").unwrap();
    forwarded.to.write(text).unwrap();
    forwarded.to.close().unwrap();
    assert!(all(forwarded.from) == text);
    says_nothing(forwarded.error);
}

/// The program's checksum, see `programs/probe.rs`.
fn sum_of(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for word in bytes.chunks(8) {
        let mut whole = [0; 8];
        whole[..word.len()].copy_from_slice(word);
        sum = (sum ^ u64::from_le_bytes(whole)).wrapping_mul(0x100_0000_01b3);
    }
    sum
}

#[test]
fn a_port_answers_over_ipv4_and_over_ipv6_alone() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let four = pod.start(&["probe", "ports", "127.0.0.1:4000"]);
    let six = pod.start(&["probe", "ports", "[::1]:6000"]);
    for container in [&four, &six] {
        container.wait_for_log("listening");
    }
    for transport in TRANSPORTS {
        let forwarder = pod.forward(transport);
        echo(&forwarder, 4000, b"over IPv4");
        echo(&forwarder, 6000, b"over IPv6");
    }
}

#[test]
fn a_pod_on_the_host_s_network_is_forwarded_to_as_well() {
    let node = Node::start();
    let mut config = node.pod_config("host");
    config.hostname.clear();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default().network = NamespaceMode::Node.into();
    let pod = node.run(config);
    pod.start(&["probe", "ports", "127.0.0.1:4000"])
        .wait_for_log("listening");
    for transport in TRANSPORTS {
        echo(&pod.forward(transport), 4000, b"on the host");
    }
}

#[test]
fn the_end_of_one_direction_leaves_the_other_open() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    for transport in TRANSPORTS {
        let forwarded = pod.forward(transport);
        let forwarded = forwarded.connect(4000).unwrap();
        forwarded.to.write(b"c").unwrap();
        forwarded.to.write(&[7; 100_000]).unwrap();
        forwarded.to.close().unwrap();
        assert_eq!(all(forwarded.from), b"100000", "{transport:?}");
        says_nothing(forwarded.error);
    }
}

#[test]
fn a_connection_that_breaks_leaves_the_others_alone() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    let before = Holdings::of(&node);
    for transport in TRANSPORTS {
        let forwarder = pod.forward(transport);
        let beside = forwarder.connect(4000).unwrap();
        beside.to.write(b"e").unwrap();
        // The program resets one.
        let broken = forwarder.connect(4000).unwrap();
        broken.to.write(b"bxxxxxxxxx").unwrap();
        assert!(matches!(
            broken.from.event(),
            Some(Event::Reset | Event::End)
        ));
        says_nothing(broken.error);
        // The client resets one.
        let given_up = forwarder.connect(4000).unwrap();
        given_up.to.write(b"e").unwrap();
        given_up.to.reset().unwrap();
        says_nothing(given_up.error);
        // Nobody listens for one, which is said.
        let refused = forwarder.connect(4999).unwrap();
        let said = refused.error.all().unwrap();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("4999"), "{said}");
        beside.to.write(b"all is well").unwrap();
        beside.to.close().unwrap();
        assert_eq!(all(beside.from), b"all is well");
        says_nothing(beside.error);
    }
    before.again(&node);
}

#[test]
fn a_connection_that_is_stuck_leaves_the_others_alone() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    let before = Holdings::of(&node);
    for transport in TRANSPORTS {
        let forwarder = pod.forward(transport);
        let stuck = forwarder.connect(4000).unwrap();
        stuck.to.write(b"s").unwrap();
        stuck.to.write(&[0; 512 << 10]).unwrap();
        for _ in 0..3 {
            echo(&forwarder, 4000, &noise(100_000));
        }
        drop(stuck);
        forwarder.0.kill();
    }
    before.again(&node);
}

/// Sends and receives `length` bytes at once, and compares checksums.
fn exchange(forwarder: &Forwarder, port: u16, bytes: &[u8]) {
    let forwarded = forwarder.connect(port).unwrap();
    let (to, from) = (forwarded.to.clone(), forwarded.from);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            to.write(b"x").unwrap();
            to.write(&(bytes.len() as u64).to_le_bytes()).unwrap();
            to.write(bytes).unwrap();
            to.close().unwrap();
        });
        let mut got = 0;
        let mut tail = Vec::new();
        while let Some(piece) = from.next().unwrap() {
            let same = piece.len().min(bytes.len() - got);
            assert!(
                piece[..same] == bytes[got..got + same],
                "differs after {got} bytes"
            );
            got += same;
            tail.extend_from_slice(&piece[same..]);
        }
        assert_eq!(got, bytes.len());
        assert_eq!(tail, sum_of(bytes).to_le_bytes(), "what the pod got");
    });
    says_nothing(forwarded.error);
}

#[test]
fn much_goes_both_ways_at_once() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    for transport in TRANSPORTS {
        echo(&pod.forward(transport), 4000, b"warm");
    }
    let before = Holdings::of(&node);
    let bytes = noise(size("BERTH_TEST_FORWARD_BYTES", 16 << 20));
    for transport in TRANSPORTS {
        let begun = Instant::now();
        exchange(&pod.forward(transport), 4000, &bytes);
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{transport:?}: {:.0} MiB/s each way",
            bytes.len() as f64 / seconds / 1048576.0
        );
    }
    before.again(&node);
}

#[test]
fn many_connections_at_once() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    for transport in TRANSPORTS {
        echo(&pod.forward(transport), 4000, b"warm");
    }
    let before = Holdings::of(&node);
    let many = size("BERTH_TEST_FORWARD_CONNECTIONS", 50);
    let bytes = noise(300_000);
    for transport in TRANSPORTS {
        let forwarder = pod.forward(transport);
        std::thread::scope(|scope| {
            for number in 0..many {
                let (forwarder, bytes) = (forwarder.clone(), &bytes[..bytes.len() - number]);
                scope.spawn(move || exchange(&forwarder, 4000, bytes));
            }
        });
    }
    before.again(&node);
}

#[test]
fn clients_that_die_at_any_moment_leave_no_connection() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    for transport in TRANSPORTS {
        echo(&pod.forward(transport), 4000, b"warm");
    }
    let before = Holdings::of(&node);
    let mut state = 88_172_645_463_325_252u64;
    for round in 0..size("BERTH_TEST_STREAM_KILLS", 30) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let forwarder = pod.forward(TRANSPORTS[round % 2]);
        let lives = Duration::from_micros(state % 20_000);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for what in [b"e", b"x", b"s"] {
                let forwarder = forwarder.clone();
                scope.spawn(move || {
                    let Ok(forwarded) = forwarder.connect(4000) else {
                        return;
                    };
                    // Until it breaks.
                    while forwarded.to.write(what).is_ok()
                        && forwarded.to.write(&[0xff; 100_000]).is_ok()
                        && !forwarder.0.is_gone()
                    {}
                });
            }
            while begun.elapsed() < lives {
                std::thread::yield_now();
            }
            forwarder.0.kill();
        });
    }
    before.again(&node);
}

#[test]
fn a_pod_that_stops_ends_its_connections() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    let forwarder = pod.forward(Transport::Spdy);
    let open = forwarder.connect(4000).unwrap();
    open.to.write(b"ex").unwrap();
    assert_eq!(open.from.next().unwrap().unwrap(), &b"x"[..]);
    let url = pod.port_forward_url(&[]).unwrap();
    pod.stop();
    assert!(matches!(open.from.event(), Some(Event::End | Event::Reset)));
    let forwarder = Forwarder::open(&node, &url, Transport::Spdy).unwrap();
    let late = forwarder.connect(4000).unwrap();
    let said = late.error.all().unwrap();
    assert!(
        String::from_utf8_lossy(&said).contains("not ready"),
        "{said:?}"
    );
    let code = pod.port_forward_url(&[]).unwrap_err().code();
    assert_eq!(code, tonic::Code::FailedPrecondition);
}

#[test]
fn ports_can_be_channels_of_a_websocket() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    for protocol in [
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "portforward.k8s.io",
        "",
    ] {
        let url = pod.port_forward_url(&[4000, 4999]).unwrap();
        let open = || websocket::Connection::open(&url, protocol, 4);
        let (connection, channels) = node.host.enter(open).unwrap();
        let mut seen = Vec::new();
        for events in &channels {
            let Ok(Event::Data(bytes)) = events.recv_timeout(Duration::from_secs(20)) else {
                panic!("{protocol}: no port");
            };
            seen.push(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
        assert_eq!(seen, [4000, 4000, 4999, 4999], "{protocol}");
        connection.sender(0).write(b"ehello").unwrap();
        let Ok(Event::Data(bytes)) = channels[0].recv_timeout(Duration::from_secs(20)) else {
            panic!("{protocol}: no answer");
        };
        assert_eq!(&bytes[..], b"hello");
        let Ok(Event::Data(why)) = channels[3].recv_timeout(Duration::from_secs(20)) else {
            panic!("{protocol}: no error");
        };
        assert!(String::from_utf8_lossy(&why).contains("4999"));
    }
    let bad = |ports: &[i32]| pod.port_forward_url(ports).unwrap_err().code();
    assert_eq!(bad(&[0]), tonic::Code::InvalidArgument);
    assert_eq!(bad(&[70_000]), tonic::Code::InvalidArgument);
    assert_eq!(bad(&[1; 200]), tonic::Code::InvalidArgument);
}

#[test]
fn a_stream_that_makes_no_sense_is_reset_and_the_rest_goes_on() {
    let node = Node::start();
    let (pod, _container) = serving(&node, "127.0.0.1:4000");
    let forwarder = pod.forward(Transport::Spdy);
    let refused = |headers: &[(&str, &str)]| {
        let refusal = forwarder.0.stream(headers).err().expect("refused");
        assert!(refusal.to_string().contains("refused"), "{refusal:#}");
    };
    refused(&[("streamType", "data")]);
    refused(&[("streamType", "data"), ("port", "0")]);
    refused(&[("streamType", "data"), ("port", "65536")]);
    refused(&[("streamType", "stdin"), ("port", "80")]);
    // Clients without request IDs open the error stream first, then the data stream.
    let old = |kind| {
        forwarder
            .0
            .stream(&[("streamType", kind), ("port", "4000")])
            .unwrap()
    };
    let (_, _error) = old("error");
    let (to, from): (spdy::Sender, _) = old("data");
    to.write(b"ey").unwrap();
    assert!(
        matches!(from.recv_timeout(Duration::from_secs(20)), Ok(Event::Data(bytes)) if &bytes[..] == b"y")
    );
    echo(&forwarder, 4000, b"and the rest");
    // Nobody keeps a client's connections once it is gone.
    forwarder.0.kill();
    eventually("the connection is gone", || {
        forwarder.0.is_gone().then_some(())
    });
    let _: cri::PodSandboxState = pod.status().state();
}
