//! What Prometheus is told.

use berth_tests::{Node, eventually, http};

pub const PORT: u16 = 9475;

pub fn scrape(node: &Node) -> String {
    let answer = http::send(&node.host, PORT, "GET", "/metrics", &[], &[]).unwrap();
    assert_eq!(answer.status, 200);
    String::from_utf8(answer.body).unwrap()
}

/// The sum of every series of a name whose labels hold these texts.
pub fn value(text: &str, name: &str, labels: &[&str]) -> f64 {
    let own = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    own.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[test]
fn calls_pulls_pods_and_the_build_are_counted() {
    let node = Node::options()
        .config(&format!("[metrics]\naddress = \"127.0.0.1:{PORT}\"\n"))
        .start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    assert!(node.pull("127.0.0.1:1/no/such:image").is_err());
    let text = scrape(&node);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(
            line.starts_with("berth_") || line.starts_with("process_"),
            "{line}"
        );
    }
    assert!(text.contains("berth_build_info{"), "{text}");
    let build = text
        .lines()
        .find(|line| line.starts_with("berth_build_info{"))
        .unwrap();
    assert!(build.contains("0.1.0"), "{build}");
    // Names are checked by what they are about, so that one may be made better.
    let counted = |wanted: &[&str]| {
        text.lines().any(|line| {
            !line.starts_with('#')
                && wanted.iter().all(|part| line.contains(part))
                && line
                    .rsplit(' ')
                    .next()
                    .and_then(|v| v.parse::<f64>().ok())
                    .is_some_and(|v| v > 0.0)
        })
    };
    assert!(
        counted(&["RunPodSandbox", "_count"]),
        "latency by method\n{text}"
    );
    assert!(counted(&["PullImage", "error"]), "errors by method\n{text}");
    assert!(counted(&["pull", "bytes"]), "bytes of pulls\n{text}");
    assert!(counted(&["pods"]), "running pods\n{text}");
    assert!(counted(&["containers"]), "running containers\n{text}");
    assert!(counted(&["stage"]), "stages of operations\n{text}");
    // No series per pod, container or image: labels are small closed sets.
    assert!(!text.contains(&pod.id) && !text.contains(&container.id));
    assert!(value(&text, "berth_build_info", &[]) > 0.0);
}

#[test]
fn without_an_address_nothing_listens() {
    let node = Node::start();
    let sockets = node
        .host
        .run("cat", &["/proc/net/tcp", "/proc/net/tcp6"])
        .unwrap_or_default();
    let mut listening: Vec<_> = sockets
        .lines()
        .filter(|line| line.split_whitespace().nth(3) == Some("0A"))
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    // The streaming server for exec and attach, where there is one, is on loopback.
    listening.retain(|address| !address.starts_with("0100007F"));
    assert_eq!(listening, [""; 0]);
}

#[test]
fn other_paths_are_not_found() {
    let node = Node::options()
        .config(&format!("[metrics]\naddress = \"127.0.0.1:{PORT}\"\n"))
        .start();
    let answer = eventually("an answer", || {
        http::send(&node.host, PORT, "GET", "/", &[], &[]).ok()
    });
    assert_eq!(answer.status, 404);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let node = Node::prepare(&format!("[metrics]\naddress = \"127.0.0.1:{PORT}\"\n"));
    let taken = node
        .host
        .enter(|| std::net::TcpListener::bind(("127.0.0.1", PORT)))
        .unwrap();
    let answer = node.berth(&["serve"]);
    assert!(!answer.status.success());
    let said = String::from_utf8_lossy(&answer.stderr).into_owned()
        + &String::from_utf8_lossy(&answer.stdout);
    assert!(said.contains(&PORT.to_string()), "{said}");
    drop(taken);
    node.start_daemon();
}
