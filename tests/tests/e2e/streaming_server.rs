//! The streaming server itself: URLs, TLS, limits, and clients that mean no good.

use crate::streaming_holdings::Holdings;
use berth_tests::streaming::{
    Command, Ended, Event, Refused, TRANSPORTS, Transport, Url, Wanted, spdy, websocket,
};
use berth_tests::{Container, Node, eventually};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command as Program, Output, Stdio};
use std::time::{Duration, Instant};

fn sleeping(node: &Node) -> Container<'_> {
    node.run_pod("web").start(&["sleep", "1000"])
}

#[track_caller]
fn status_of(refusal: anyhow::Error) -> u16 {
    match refusal.downcast_ref::<Refused>() {
        Some(refused) => refused.status,
        None => panic!("{refusal:#}"),
    }
}

fn open(node: &Node, url: &str) -> anyhow::Result<Command> {
    Command::open(node, url, Transport::Spdy, Wanted::OUTPUT)
}

#[test]
fn a_url_is_good_once_for_what_it_was_made_for() {
    let node = Node::start();
    let container = sleeping(&node);
    let url = container
        .exec_url(&["echo", "once"], Wanted::OUTPUT)
        .unwrap();
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    assert_eq!(open(&node, &url).unwrap().finished().text(), "once\n");
    assert_eq!(status_of(open(&node, &url).err().unwrap()), 404);
    assert_eq!(status_of(open(&node, &(url + "x")).err().unwrap()), 404);
    let url = container.exec_url(&["true"], Wanted::OUTPUT).unwrap();
    let other = url.replace("/exec/", "/attach/");
    assert_eq!(status_of(open(&node, &other).err().unwrap()), 404);
    let nonsense = url.replace("/exec/", "/etc/passwd/");
    assert_eq!(status_of(open(&node, &nonsense).err().unwrap()), 404);
    let refused = open(&node, &url).err().unwrap();
    let text = refused.to_string();
    assert_eq!(status_of(refused), 404, "used up by the wrong path");
    assert!(text.contains("used already"), "{text}");
}

#[test]
fn a_client_that_does_not_upgrade_is_told_and_keeps_its_url() {
    let node = Node::start();
    let container = sleeping(&node);
    let url = container
        .exec_url(&["echo", "still"], Wanted::OUTPUT)
        .unwrap();
    let parts = Url::parse(&url).unwrap();
    let answer = |request: String| {
        node.host.enter(|| {
            let mut stream = TcpStream::connect(&parts.host).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        })
    };
    let get = answer(format!(
        "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        parts.path
    ));
    assert!(get.starts_with("HTTP/1.1 400 "), "{get}");
    let delete = answer(format!(
        "DELETE {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        parts.path
    ));
    assert!(delete.starts_with("HTTP/1.1 405 "), "{delete}");
    let refused = Command::open_as(
        &node,
        &url,
        Transport::Spdy,
        Wanted::OUTPUT,
        "v9.channel.k8s.io",
    )
    .err()
    .unwrap();
    assert!(
        refused.to_string().contains("v4.channel.k8s.io"),
        "the known ones are listed: {refused}"
    );
    assert_eq!(status_of(refused), 403);
    assert_eq!(open(&node, &url).unwrap().finished().text(), "still\n");
}

#[test]
fn a_url_expires() {
    let node = Node::options()
        .config("[streaming]\ntoken_lifetime_seconds = 1\n")
        .start();
    let container = sleeping(&node);
    let url = container.exec_url(&["true"], Wanted::OUTPUT).unwrap();
    let made = Instant::now();
    eventually("a second has passed", || {
        (made.elapsed() > Duration::from_millis(1100)).then_some(())
    });
    assert_eq!(status_of(open(&node, &url).err().unwrap()), 404);
}

#[test]
fn urls_that_nobody_comes_for_are_bounded() {
    let node = Node::start();
    let container = sleeping(&node);
    let refused = (0..1100).find_map(|_| container.exec_url(&["true"], Wanted::OUTPUT).err());
    assert_eq!(
        refused.expect("refused in the end").code(),
        tonic::Code::ResourceExhausted
    );
}

#[test]
fn a_connection_on_which_nothing_moves_is_closed() {
    let node = Node::options()
        .config("[streaming]\nidle_timeout_seconds = 1\n")
        .start();
    let container = sleeping(&node);
    for transport in TRANSPORTS {
        let mut idle = container.stream(transport, &["cat"], Wanted::ALL);
        // Kept alive by what moves.
        for _ in 0..4 {
            idle.say(b"x");
            idle.wait_for("x");
            let said = Instant::now();
            eventually("half the time", || {
                (said.elapsed() > Duration::from_millis(500)).then_some(())
            });
        }
        let begun = Instant::now();
        idle.finish().unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(10));
        eventually("its command is gone", || {
            (container.pids().len() == 1).then_some(())
        });
    }
}

#[test]
fn a_client_that_speaks_no_spdy_is_shown_out() {
    let node = Node::start();
    let container = sleeping(&node);
    container
        .stream(Transport::Spdy, &["true"], Wanted::OUTPUT)
        .finished();
    let before = Holdings::of(&node);
    let hostile: [&[u8]; 5] = [
        b"\x80\x02\0\x01\0\0\0\x0a\0\0\0\x01\0\0\0\0\0\0",
        // A header block that is no zlib stream.
        b"\x80\x03\0\x01\0\0\0\x0e\0\0\0\x01\0\0\0\0\0\0abcd",
        // 16 MiB of a control frame.
        b"\x80\x03\0\x01\x00\xff\xff\xff",
        b"\x80\x03\0\x04\0\0\0\x04\xff\xff\xff\xff",
        b"\0\0\0\0\0\0\0\x01x",
    ];
    for bytes in hostile {
        let url = container
            .exec_url(&["sleep", "1000"], Wanted::OUTPUT)
            .unwrap();
        let connect = || spdy::Connection::open(&url, "v4.channel.k8s.io");
        let connection = node.host.enter(connect).unwrap();
        connection.raw(bytes).unwrap();
        eventually("the server closes", || connection.is_gone().then_some(()));
    }
    before.again(&node);
}

#[test]
fn floods_are_cut_off_or_cost_little() {
    let node = Node::start();
    let container = sleeping(&node);
    container
        .stream(Transport::Spdy, &["true"], Wanted::OUTPUT)
        .finished();
    let before = Holdings::of(&node);
    let daemon = node.daemon_pid().unwrap();
    let resident = || -> usize {
        let text = std::fs::read_to_string(format!("/proc/{daemon}/statm")).unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let memory = resident();
    // Pings whose answers are never read.
    let url = container
        .exec_url(&["sleep", "1000"], Wanted::OUTPUT)
        .unwrap();
    let parts = Url::parse(&url).unwrap();
    node.host.enter(|| {
        let mut stream = TcpStream::connect(&parts.host).unwrap();
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n",
            parts.path
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        let pings = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01".repeat(10_000);
        let begun = Instant::now();
        let cut = loop {
            if stream.write_all(&pings).is_err() {
                break true;
            }
            if begun.elapsed() > Duration::from_secs(20) {
                break false;
            }
        };
        assert!(cut, "endless pings without reading are not put up with");
    });
    // Streams that nobody asked for, and data for them.
    let pod = node.run_pod("other");
    let forwarder = pod.forward(Transport::Spdy);
    for _ in 0..3000 {
        if forwarder
            .0
            .begin(&[
                ("streamType", "data"),
                ("port", "80"),
                ("requestID", "same"),
            ])
            .is_err()
        {
            break;
        }
    }
    let (mut kept, mut heard) = (Vec::new(), Vec::new());
    for number in 0..100 {
        let id = number.to_string();
        let Ok((sender, events)) =
            forwarder
                .0
                .begin(&[("streamType", "data"), ("port", "80"), ("requestID", &id)])
        else {
            break;
        };
        kept.push(sender);
        heard.push(events);
    }
    // More than may wait in all; a thread that is stuck is cut off by the kill.
    std::thread::scope(|scope| {
        let forwarder = &forwarder;
        let kept = &kept;
        scope.spawn(move || {
            let piece = vec![1; 60 << 10];
            for _ in 0..40 {
                for sender in kept {
                    if sender.write(&piece).is_err() {
                        return;
                    }
                }
            }
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) && !forwarder.0.is_gone() {
            std::thread::yield_now();
        }
        forwarder.0.kill();
    });
    drop((kept, heard, forwarder));
    pod.stop();
    pod.remove();
    let grown = resident().saturating_sub(memory);
    assert!(grown < 128 << 20, "grew by {} MiB", grown >> 20);
    before.again(&node);
}

#[test]
fn a_client_that_speaks_no_websocket_is_shown_out() {
    let node = Node::start();
    let container = sleeping(&node);
    container
        .stream(Transport::WebSocket, &["true"], Wanted::OUTPUT)
        .finished();
    let before = Holdings::of(&node);
    let hostile: [&[u8]; 4] = [
        // Not masked.
        b"\x82\x02\x00x",
        b"\xf2\x82\0\0\0\0\x00x",
        b"\x83\x80\0\0\0\0",
        // A close signal for nothing.
        b"\x82\x81\0\0\0\0\xff",
    ];
    for bytes in hostile {
        let url = container.exec_url(&["sleep", "1000"], Wanted::ALL).unwrap();
        let connect = || websocket::Connection::open(&url, "v5.channel.k8s.io", 5);
        let (connection, channels) = node.host.enter(connect).unwrap();
        connection.raw(bytes).unwrap();
        loop {
            match channels[3].recv_timeout(Duration::from_secs(20)) {
                Ok(Event::Gone(_)) => break,
                Ok(_) => {}
                Err(err) => panic!("the server does not close: {err}"),
            }
        }
    }
    before.again(&node);
}

#[test]
fn pings_are_answered_while_a_command_runs() {
    let node = Node::start();
    let container = sleeping(&node);
    let url = container.exec_url(&["cat"], Wanted::ALL).unwrap();
    let connect = || spdy::Connection::open(&url, "v4.channel.k8s.io");
    let connection = node.host.enter(connect).unwrap();
    connection
        .raw(b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01")
        .unwrap();
    eventually("the ping is answered", || {
        (connection.pongs() == 1).then_some(())
    });
}

/// A certificate for 127.0.0.1 of an authority of its own, as PEM: both, and the key.
struct Identity {
    certificate: String,
    key: String,
}

fn authority() -> (rcgen::Issuer<'static, rcgen::KeyPair>, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    let name = "berth test CA of streaming";
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap().pem();
    (rcgen::Issuer::new(params, key), certificate)
}

fn identity(authority: &rcgen::Issuer<'static, rcgen::KeyPair>) -> Identity {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, authority).unwrap().pem();
    Identity {
        certificate,
        key: key.serialize_pem(),
    }
}

fn curl(node: &Node, args: &[&str]) -> Output {
    let mut program = Program::new("curl");
    program
        .args([
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--max-time",
            "10",
        ])
        .args(args);
    program.stdin(Stdio::null());
    node.host.enter(|| program.output()).expect("curl")
}

#[test]
fn tls_asks_for_certificates_and_takes_new_ones_while_it_runs() {
    let node = Node::prepare("");
    let (issuer, ca) = authority();
    let dir = node.root().join("tls");
    std::fs::create_dir(&dir).unwrap();
    let path = |name: &str| dir.join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
    let put = |identity: &Identity| {
        write("key.pem", &identity.key);
        write("cert.pem", &identity.certificate);
    };
    put(&identity(&issuer));
    write("ca.pem", &ca);
    let client = identity(&issuer);
    write("client.pem", &client.certificate);
    write("client-key.pem", &client.key);
    let conf = node.root().join("etc/conf.d");
    std::fs::create_dir_all(&conf).unwrap();
    let text = format!(
        "[streaming]\ntls_certificate = {:?}\ntls_key = {:?}\ntls_client_ca = {:?}\ntls_min_version = \"1.3\"\n",
        path("cert.pem"),
        path("key.pem"),
        path("ca.pem")
    );
    std::fs::write(conf.join("10-tls.toml"), text).unwrap();
    node.start_daemon();
    let container = sleeping(&node);
    let url = container.exec_url(&["true"], Wanted::OUTPUT).unwrap();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let (ca_path, cert, key) = (path("ca.pem"), path("client.pem"), path("client-key.pem"));
    let known = ["--cacert", &ca_path, "--cert", &cert, "--key", &key];
    let with = |more: &[&str]| {
        let output = curl(&node, &[&known[..], more, &[&url]].concat());
        String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr)
    };
    // It answers: no upgrade is asked for.
    assert_eq!(with(&[]), "400");
    assert!(
        with(&["--tls-max", "1.2"]).starts_with("000"),
        "TLS 1.2 is refused"
    );
    let anonymous = curl(&node, &["--cacert", &ca_path, &url]);
    assert!(
        !anonymous.status.success(),
        "a client without a certificate is refused"
    );
    // A bad file changes nothing.
    write("cert.pem", "nonsense");
    let begun = Instant::now();
    eventually("more than a second later", || {
        (begun.elapsed() > Duration::from_millis(1200)).then_some(())
    });
    assert_eq!(with(&[]), "400");
    // A new authority, and a certificate of it.
    let (other, other_ca) = authority();
    write("other.pem", &other_ca);
    put(&identity(&other));
    let other_path = path("other.pem");
    eventually("the new certificate is shown", || {
        let output = curl(
            &node,
            &[
                "--cacert",
                &other_path,
                "--cert",
                &cert,
                "--key",
                &key,
                &url,
            ],
        );
        (output.stdout == b"400").then_some(())
    });
}

#[test]
fn a_port_that_is_taken_is_named() {
    let node = Node::start();
    let second = Node::prepare("[streaming]\naddress = \"192.0.2.1:1\"\n");
    let answer = second.berth(&["serve"]);
    assert!(!answer.status.success());
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(said.contains("192.0.2.1:1"), "{said}");
    drop(node);
    std::fs::write(
        second.root().join("etc/config.toml"),
        format!("[cgroup]\nparent = \"/{}\"\n", second.footprint().cgroup),
    )
    .unwrap();
    second.start_daemon();
}

#[test]
fn a_configured_port_is_the_port() {
    let node = Node::options()
        .config("[streaming]\naddress = \"0.0.0.0:10010\"\n")
        .start();
    let container = sleeping(&node);
    let url = container.exec_url(&["true"], Wanted::OUTPUT).unwrap();
    assert!(url.starts_with("http://127.0.0.1:10010/exec/"), "{url}");
    assert_eq!(open(&node, &url).unwrap().finished().ended, Ended::Code(0));
}
