//! `make demo`: Berth on its defaults, from nothing to a running pod and back,
//! in private: its own root, network namespace and cgroup.

use berth_proto::runtime_v1::{StatusRequest, VersionRequest};
use berth_tests::{Format, Image, Node};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

fn main() {
    let began = Instant::now();
    let say = |text: &str| println!("[{:6.2} s] {text}", began.elapsed().as_secs_f64());

    let node = Node::start();
    let version = node
        .wait(node.runtime().version(VersionRequest::default()))
        .expect("Version");
    say(&format!(
        "{} {} serves CRI {} on {}",
        version.runtime_name,
        version.runtime_version,
        version.runtime_api_version,
        node.socket().display()
    ));
    let status = node
        .wait(node.runtime().status(StatusRequest::default()))
        .expect("Status");
    for condition in status.status.unwrap_or_default().conditions {
        say(&format!("{} is {}", condition.r#type, condition.status));
    }

    let image = Image::builder(Format::Oci).base().build();
    let registry = node.registry();
    say(&format!(
        "a registry listens on 127.0.0.1:{}",
        registry.port
    ));
    let reference = registry.push("demo/base", "1", &image).expect("push");
    say(&format!("pushed {reference}"));
    let id = node.pull(&reference).expect("PullImage");
    say(&format!("pulled it: {id}"));

    let pod = node.run_pod("demo");
    say(&format!("pod {} runs at {}", &pod.id[..13], pod.ip()));
    let serve = ["probe", "serve", "8080", "welcome aboard,"];
    let server = pod.start_as(pod.container_of(&reference, &serve));
    server.wait_for_log("listening");
    say(&format!(
        "container {} listens on port 8080",
        &server.id[..13]
    ));
    let fetch = ["probe", "fetch", "127.0.0.1:8080"];
    let client = pod.start_as(pod.container_of(&reference, &fetch));
    let ended = client.wait_for_exit();
    say(&format!(
        "container {} fetched from localhost and ended with {} ({})",
        &client.id[..13],
        ended.exit_code,
        ended.reason
    ));

    let address = SocketAddr::new(pod.ip(), 8080);
    let got = node.host.enter(|| {
        let mut text = String::new();
        let mut stream = TcpStream::connect(address)?;
        stream.read_to_string(&mut text).map(|_| text)
    });
    let got = got.expect("the host reaches the pod");
    say(&format!(
        "the host connected to {address} and got: {}",
        got.trim_end()
    ));

    for (name, container) in [("server", &server), ("client", &client)] {
        for line in container.log() {
            say(&format!(
                "log of the {name}: {} {} {}",
                line.stream, line.tag, line.text
            ));
        }
    }
    let listing = server.exec(&["ls", "-l", "/bin/probe"]);
    say(&format!(
        "exec in the server, ls -l /bin/probe: {}",
        listing.trim_end()
    ));

    pod.remove();
    say("stopped and removed the pod");
    let left = node.leftovers();
    assert!(left.is_empty(), "left behind: {left:?}");
    say("nothing is left: no process, mount, cgroup, link, lease or record");
    drop(node);
    say("done");
}
