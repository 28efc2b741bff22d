//! Many pods on the built-in network: addresses are distinct, are told of when
//! they have run out, and are all given back, also by a daemon that is killed
//! again and again; the host's rules are the same before and after.

use berth_proto::runtime_v1 as cri;
use berth_tests::deadline::{slowness, within};
use berth_tests::{Node, Pod};
use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What a /24 has room for: all but the network, the gateway and the broadcast.
const ROOM: usize = 253;

/// Callers at a time.
const CALLERS: usize = 16;

/// Pods at once: `BERTH_TEST_PODS`, at most 250.
fn crowd() -> usize {
    let asked = std::env::var("BERTH_TEST_PODS").ok();
    let asked = asked.and_then(|text| text.parse().ok());
    asked.unwrap_or(250).clamp(CALLERS, 250)
}

fn on_a_24() -> Node {
    Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/24\"]\n")
        .start()
}

/// Does something for each number, many at a time.
fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= count {
                        return;
                    }
                    work(number);
                }
            });
        }
    });
}

fn pods(node: &Node) -> Vec<Pod<'_>> {
    let listed = node.pods(None).into_iter();
    listed
        .map(|pod| Pod {
            node,
            id: pod.id,
            config: cri::PodSandboxConfig::default(),
        })
        .collect()
}

fn remove_all(node: &Node) {
    let pods = pods(node);
    for_each(pods.len(), |number| pods[number].remove());
}

/// The addresses that pods say they have; each has one.
fn addresses(node: &Node) -> BTreeSet<String> {
    let pods = pods(node);
    let all: BTreeSet<String> = pods.iter().map(|pod| pod.ip().to_string()).collect();
    assert_eq!(all.len(), pods.len(), "an address was given twice");
    all
}

/// The addresses that are not free.
fn leased(node: &Node) -> BTreeSet<String> {
    let entries = node.footprint().entries("lib/network/leases");
    let name = |entry: &String| entry.rsplit('/').next().map(str::to_owned);
    entries.iter().filter_map(name).collect()
}

#[test]
fn two_hundred_and_fifty_pods_at_once_have_an_address_each_until_there_are_none() {
    let node = on_a_24();
    let count = crowd();
    for_each(count, |number| drop(node.run_pod(&format!("pod-{number}"))));
    assert_eq!(addresses(&node).len(), count);
    assert_eq!(leased(&node), addresses(&node));

    for_each(ROOM - count, |number| {
        drop(node.run_pod(&format!("more-{number}")));
    });
    let full = node.try_run(node.pod_config("one-too-many")).err();
    let full = full.expect("a /24 has no room for it");
    assert!(
        full.message()
            .contains("no free address in 10.99.0.0/24: all 253 are in use"),
        "{full}"
    );
    assert_eq!(node.pods(None).len(), ROOM, "nothing half made is listed");

    remove_all(&node);
    assert_eq!(leased(&node), BTreeSet::new());
    for_each(CALLERS, |number| {
        drop(node.run_pod(&format!("again-{number}")));
    });
    assert_eq!(addresses(&node).len(), CALLERS);
    remove_all(&node);
}

/// Runs `work` while the daemon is killed at random, every 200 ms on average,
/// and started again at once. How often it was.
fn while_it_is_killed(node: &Node, work: impl FnOnce() + Send) -> usize {
    // So that the test ends also where a machine is too slow to get anything done in between.
    let patience = Duration::from_secs(25) * slowness();
    std::thread::scope(|scope| {
        let begin = Instant::now();
        let work = scope.spawn(work);
        let mut killed = 0;
        while !work.is_finished() {
            let random = RandomState::new().hash_one(killed) % 400;
            std::thread::sleep(Duration::from_millis(random) * slowness());
            if begin.elapsed() < patience {
                node.start_daemon();
                killed += 1;
            }
        }
        if let Err(panic) = work.join() {
            std::panic::resume_unwind(panic);
        }
        killed
    })
}

/// Repeats what a killed daemon did not answer, as the kubelet does.
fn until_it_succeeds<T>(what: &str, mut call: impl FnMut() -> Result<T, tonic::Status>) -> T {
    let mut last = None;
    let done = within(Duration::from_secs(60), || match call() {
        Ok(done) => Some(done),
        Err(status) => {
            last = Some(status);
            None
        }
    });
    done.unwrap_or_else(|| panic!("{what}: {last:?}"))
}

#[test]
fn no_address_is_given_twice_or_lost_by_a_daemon_that_is_killed_every_200_ms() {
    let node = on_a_24();
    let count = crowd();
    let killed = while_it_is_killed(&node, || {
        for_each(count, |number| {
            let name = format!("pod-{number}");
            let call = || node.try_run(node.pod_config(&name)).map(drop);
            until_it_succeeds(&name, call);
        });
    });
    println!("{count} pods were made while the daemon was killed {killed} times");
    assert!(killed > 3, "{killed}");
    let ready = addresses(&node);
    assert_eq!(ready.len(), count);
    // What a killed daemon had begun is undone by the next one, after it answers.
    let settled = within(Duration::from_secs(20), || {
        (leased(&node) == ready).then_some(())
    });
    assert!(settled.is_some(), "{:?} but {ready:?}", leased(&node));

    let all = pods(&node);
    let killed = while_it_is_killed(&node, || {
        for_each(all.len(), |number| {
            let pod = &all[number];
            until_it_succeeds("StopPodSandbox", || pod.try_stop());
            until_it_succeeds("RemovePodSandbox", || pod.try_remove());
        });
    });
    println!("they were removed while it was killed {killed} times");
    assert!(killed > 3, "{killed}");
    let freed = within(Duration::from_secs(20), || {
        leased(&node).is_empty().then_some(())
    });
    assert!(freed.is_some(), "{:?}", leased(&node));
    drop(node.run_pod("after"));
    remove_all(&node);
}

#[test]
fn a_hundred_pods_come_and_go_and_the_rules_are_as_before() {
    let node = Node::options()
        .config("[network]\nsubnets = [\"10.99.0.0/24\", \"fd99::/64\"]\n")
        .start();
    let protocols = [cri::Protocol::Tcp, cri::Protocol::Udp, cri::Protocol::Sctp];
    let come_and_go = |number: usize| {
        let name = format!("pod-{number}");
        let mut config = node.pod_config(&name);
        let mapping = |protocol: cri::Protocol| cri::PortMapping {
            protocol: protocol.into(),
            container_port: 80,
            host_port: 10_000 + i32::try_from(number).unwrap(),
            host_ip: String::new(),
        };
        config.port_mappings = protocols.map(mapping).to_vec();
        let pod = node.run(config);
        let rules = node.host.run("nft", &["list", "ruleset"]).unwrap();
        // A number where the machine has no /etc/protocols.
        let target = format!(". {} : {} . 80", 10_000 + number, pod.ip());
        let rule = ["sctp", "132"].map(|name| format!("{name} {target}"));
        assert!(rule.iter().any(|rule| rules.contains(rule)), "{rules}");
        pod.remove();
    };
    come_and_go(0);
    let before = node.host.run("nft", &["list", "ruleset"]).unwrap();
    for_each(100, |number| come_and_go(number + 1));
    let after = node.host.run("nft", &["list", "ruleset"]).unwrap();
    println!("{after}");
    assert_eq!(before, after);
}
