//! Clients attached to containers, on the real program.

mod rig;

use berth_proto::monitor_v1::{self as proto, request::Body as Request};
use proto::detached::Reason;
use rig::{Attached, Rig, until};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Reads until what has come ends with `end`.
fn read_until(mut from: impl std::io::Read, end: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end.as_bytes()) {
        assert_eq!(
            from.read(&mut byte).unwrap(),
            1,
            "it ended after {:?}",
            String::from_utf8_lossy(&text)
        );
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

fn start(rig: &Rig, script: &str, change: impl FnOnce(&mut proto::Launch)) {
    let (mut launch, fds) = rig.launch("c", &["sh", "-c", script]);
    change(&mut launch);
    rig.client().started(Request::Launch(launch), &fds);
}

/// Descriptors of the logger of the only container.
fn logger_fds(rig: &Rig) -> usize {
    let logger = rig::logger_of(rig.pid());
    std::fs::read_dir(format!("/proc/{logger}/fd"))
        .unwrap()
        .count()
}

#[test]
fn several_clients_see_everything_and_the_log_has_it_too() {
    let rig = Rig::start();
    start(
        &rig,
        "while read line; do echo out $line; echo err $line >&2; done",
        |l| l.stdin = true,
    );
    let mut client = rig.client();
    let mut one = client.attach("c", "one", true);
    let mut two = client.attach("c", "two", true);
    one.stdin.as_mut().unwrap().write_all(b"1\n").unwrap();
    for attached in [&one, &two] {
        assert_eq!(read_until(&attached.stdout, "\n"), "out 1\n");
        assert_eq!(read_until(&attached.stderr, "\n"), "err 1\n");
    }
    // Detaching leaves the container and the other client alone.
    drop(one);
    assert_eq!(client.detached("one"), Reason::HungUp);
    two.stdin.as_mut().unwrap().write_all(b"2\n").unwrap();
    assert_eq!(read_until(&two.stdout, "\n"), "out 2\n");
    drop(two);
    assert_eq!(client.detached("two"), Reason::HungUp);
    // Without stdin_once the input stays open for the next.
    let mut three = client.attach("c", "three", true);
    three.stdin.as_mut().unwrap().write_all(b"3\n").unwrap();
    assert_eq!(read_until(&three.stdout, "\n"), "out 3\n");
    assert_eq!(rig::stdout(&rig.log("c")), ["out 1", "out 2", "out 3"]);
}

#[test]
fn with_stdin_once_the_input_ends_with_the_first_client_that_had_it() {
    let rig = Rig::start();
    start(&rig, "cat; echo end", |l| {
        (l.stdin, l.stdin_once) = (true, true);
    });
    let mut client = rig.client();
    let watcher = client.attach("c", "watcher", false);
    let mut other = client.attach("c", "other", true);
    let mut first = client.attach("c", "first", true);
    drop(watcher);
    assert_eq!(client.detached("watcher"), Reason::HungUp);
    first.stdin.take().unwrap().write_all(b"text\n").unwrap();
    let mut text = String::new();
    first.stdout.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text\nend\n");
    assert_eq!(client.detached("first"), Reason::Ended);
    assert_eq!(client.exited("c", "").exit_code, 0);
    // The other's input is closed too, also where it goes on writing.
    until("its pipe is closed", || {
        other.stdin.as_mut().unwrap().write_all(b"x").err()
    });
    assert_eq!(client.detached("other"), Reason::Ended);
    drop(other);
}

#[test]
fn a_terminal_is_shared_by_its_clients() {
    let rig = Rig::start();
    start(
        &rig,
        "stty -echo; echo ready; read x; stty size; read y; echo got $x $y",
        |l| {
            l.stdin = true;
            l.stdin_once = true;
            l.process.as_mut().unwrap().tty = true;
        },
    );
    let mut client = rig.client();
    until("the terminal is there", || {
        rig::stdout(&rig.log("c"))
            .iter()
            .any(|line| line.starts_with("ready"))
            .then_some(())
    });
    let mut one = client.attach("c", "one", true);
    client.done(Request::ResizeTty(proto::ResizeTty {
        container_id: "c".into(),
        width: 77,
        height: 33,
        ..Default::default()
    }));
    one.stdin.as_mut().unwrap().write_all(b"1\n").unwrap();
    assert_eq!(read_until(&one.stdout, "\n"), "33 77\r\n");
    // A terminal has no end of input: the next client goes on.
    drop(one);
    client.detached("one");
    let mut two = client.attach("c", "two", true);
    two.stdin.as_mut().unwrap().write_all(b"2\n").unwrap();
    assert_eq!(read_until(&two.stdout, "\n"), "got 1 2\r\n");
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert_eq!(client.detached("two"), Reason::Ended);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_costs_nobody_a_line() {
    let rig = Rig::start();
    start(&rig, "read go; seq 1 300000", |l| l.stdin = true);
    let mut client = rig.client();
    let stuck = client.attach("c", "stuck", false);
    let Attached {
        stdin,
        mut stdout,
        stderr,
    } = client.attach("c", "reader", true);
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        drop(stderr);
        text
    });
    let begin = Instant::now();
    stdin.unwrap().write_all(b"\n").unwrap();
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    let wanted: Vec<String> = (1..=300_000).map(|n| n.to_string()).collect();
    assert!(reader.join().unwrap().lines().eq(wanted.iter()));
    assert!(rig::stdout(&rig.log("c")) == wanted);
    assert_eq!(client.detached("stuck"), Reason::TooSlow);
    assert_eq!(client.detached("reader"), Reason::Ended);
    drop(stuck);
}

#[test]
fn a_client_that_reads_slowly_gets_everything() {
    let rig = Rig::start();
    start(&rig, "read go; seq 1 100000", |l| l.stdin = true);
    let mut client = rig.client();
    let mut attached = client.attach("c", "c1", true);
    attached.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let mut text = Vec::new();
    let mut chunk = vec![0; 16 << 10];
    loop {
        match attached.stdout.read(&mut chunk).unwrap() {
            0 => break,
            count => text.extend_from_slice(&chunk[..count]),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let wanted: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(text == wanted.as_bytes());
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert_eq!(client.detached("c1"), Reason::Ended);
}

#[test]
fn attaching_to_what_cannot_be_attached_to_is_refused() {
    let rig = Rig::start();
    start(&rig, "sleep 1000", |_| {});
    let mut client = rig.client();
    let attach = |container: &str, fd| {
        Request::Attach(proto::Attach {
            container_id: container.into(),
            attach_id: "a".into(),
            stdout_fd: fd,
            ..Default::default()
        })
    };
    assert!(client.failure(attach("x", Some(0)), &[]).not_found);
    assert_eq!(client.failure(attach("c", None), &[]).errno, libc::EINVAL);
    assert_eq!(client.failure(attach("c", Some(0)), &[]).errno, libc::EBADF);
    // Without stdin there is none to send: it is closed, the output is not.
    let mut attached = client.attach("c", "b", true);
    until("its pipe is closed", || {
        attached.stdin.as_mut().unwrap().write_all(b"x").err()
    });
    client.signal("c", "", libc::SIGKILL);
    client.exited("c", "");
    assert_eq!(client.detached("b"), Reason::Ended);
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let failure = client.failure(attach("c", Some(0)), &[null()]);
    assert_eq!(failure.errno, libc::ESRCH);
}

#[test]
fn a_hundred_clients_leave_no_descriptor() {
    let rig = Rig::start();
    start(&rig, "while read line; do echo $line; done", |l| {
        l.stdin = true;
    });
    let mut client = rig.client();
    let before = logger_fds(&rig);
    for round in 0..100 {
        let id = format!("a{round}");
        let mut attached = client.attach("c", &id, true);
        let line = format!("{round}\n");
        attached
            .stdin
            .as_mut()
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
        assert_eq!(read_until(&attached.stdout, "\n"), line);
        drop(attached);
        client.detached(&id);
    }
    assert_eq!(logger_fds(&rig), before);
    // Too many at once are refused, and those there are stay.
    let mut kept: Vec<Attached> = (0..32)
        .map(|n| client.attach("c", &format!("k{n}"), true))
        .collect();
    let one_more = Request::Attach(proto::Attach {
        container_id: "c".into(),
        attach_id: "more".into(),
        stdout_fd: Some(0),
        ..Default::default()
    });
    let null = OwnedFd::from(std::fs::File::create("/dev/null").unwrap());
    assert_eq!(client.failure(one_more, &[null]).errno, libc::EAGAIN);
    kept[31]
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"all\n")
        .unwrap();
    for attached in &kept {
        assert_eq!(read_until(&attached.stdout, "\n"), "all\n");
    }
}

#[test]
fn a_container_without_a_log_can_be_attached_to() {
    let rig = Rig::start();
    start(&rig, "read go; echo $go; exit 3", |l| {
        l.log_path.clear();
        l.stdin = true;
    });
    let mut client = rig.client();
    let mut attached = client.attach("c", "a", true);
    attached.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    let mut text = String::new();
    attached.stdout.read_to_string(&mut text).unwrap();
    assert_eq!(text, "x\n");
    assert_eq!(client.exited("c", "").exit_code, 3);
}
