//! Exec and attach over the streaming server: protocols, terminals, large copies, many at
//! once, and that nothing is left of them, least of all when clients die.

use crate::streaming_holdings::Holdings;
use berth_tests::streaming::{Command, Ended, TRANSPORTS, Transport, Wanted};
use berth_tests::{Container, Node, eventually, sha256};
use std::time::{Duration, Instant};
use tonic::Code;

/// A number from the environment: the size of a test that a machine with time runs larger.
pub fn size(name: &str, default: usize) -> usize {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}"))
    })
}

/// Bytes that no compression and no repetition makes shorter.
pub fn noise(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// One pod with a container that sleeps, and one command over each transport behind it, so
/// that what is opened once is open.
fn warm<'n>(node: &'n Node, command: &[&str]) -> Container<'n> {
    let container = node.run_pod("web").start(command);
    for transport in TRANSPORTS {
        let finished = container
            .stream(transport, &["true"], Wanted::OUTPUT)
            .finished();
        assert_eq!(finished.ended, Ended::Code(0));
    }
    container
}

#[test]
fn output_and_exit_code_come_back_in_every_protocol() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let command = ["sh", "-c", "echo out; echo err >&2; exit 7"];
    let protocols = [
        (Transport::Spdy, "v4.channel.k8s.io", true),
        (Transport::Spdy, "v3.channel.k8s.io", false),
        (Transport::Spdy, "v2.channel.k8s.io", false),
        (Transport::Spdy, "channel.k8s.io", false),
        (Transport::WebSocket, "v5.channel.k8s.io", true),
        (Transport::WebSocket, "v4.channel.k8s.io", true),
        (Transport::WebSocket, "v4.base64.channel.k8s.io", true),
        (Transport::WebSocket, "channel.k8s.io", false),
        (Transport::WebSocket, "base64.channel.k8s.io", false),
        (Transport::WebSocket, "", false),
    ];
    for (transport, protocol, status) in protocols {
        let url = container.exec_url(&command, Wanted::OUTPUT).unwrap();
        let command = Command::open_as(&node, &url, transport, Wanted::OUTPUT, protocol)
            .unwrap_or_else(|err| panic!("{protocol}: {err:#}"));
        let Command {
            stdout,
            stderr,
            error,
            ..
        } = command;
        let all = |output: Option<berth_tests::streaming::Output>| output.unwrap().all().unwrap();
        assert_eq!(all(stdout), b"out\n", "{protocol}");
        assert_eq!(all(stderr), b"err\n", "{protocol}");
        let error = error.all().unwrap();
        if status {
            assert_eq!(Ended::parse(&error).unwrap(), Ended::Code(7), "{protocol}");
        } else {
            let text = String::from_utf8_lossy(&error).into_owned();
            assert!(text.contains("exit code: 7"), "{protocol}: {text}");
        }
    }
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    for transport in TRANSPORTS {
        let finished = container
            .stream(transport, &["no-such-program"], Wanted::OUTPUT)
            .finished();
        let Ended::Failed(why) = finished.ended else {
            panic!("{finished:?}")
        };
        assert!(why.contains("no-such-program"), "{why}");
    }
}

#[test]
fn a_shell_on_a_terminal_behaves_as_one() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    for transport in TRANSPORTS {
        let mut shell = container.stream(transport, &["sh"], Wanted::TTY);
        shell.resize(91, 33);
        shell.wait_for("# ");
        shell.say(b"stty size; test -t 0 && test -t 1 && test -t 2 && echo a-$((1+1))-terminal\r");
        shell.wait_for("33 91");
        shell.wait_for("a-2-terminal");
        // Seen by a program that runs while it changes.
        let watch = "trap 'stty size' WINCH; echo set-$((2+1)); while true; do sleep 0.1; done";
        shell.say(format!("sh -c \"{}\"\r", watch.replace('$', "\\$")).as_bytes());
        shell.wait_for("set-3");
        shell.resize(120, 50);
        shell.wait_for("50 120");
        shell.say(b"\x03");
        shell.wait_for("# ");
        shell.say(b"echo back-$((5+1))\r");
        shell.wait_for("back-6");
        // Ctrl-C interrupts the command and leaves the shell.
        shell.say(b"echo begun-$((3+1)); cat; echo not-$((4+1))\r");
        shell.wait_for("begun-4");
        // Once as the terminal's echo and once from the command, which runs then: between fork and
        // exec, a shell's handler of SIGINT would take a Ctrl-C that is meant for its child.
        shell.say(b"typed\r");
        shell.wait_for("typed");
        shell.wait_for("typed");
        shell.say(b"\x03");
        // Typed sooner, it would be thrown away with what Ctrl-C throws away.
        shell.wait_for("# ");
        shell.say(b"echo code-$?\r");
        shell.wait_for("code-130");
        // Ctrl-D ends it, with the code of its last command.
        shell.say(b"sh -c 'echo nine-$((8+1)); exit 9'\r");
        shell.wait_for("nine-9");
        shell.wait_for("# ");
        shell.say(b"\x04");
        assert_eq!(shell.finished().ended, Ended::Code(9), "{transport:?}");
    }
    before.again(&node);
}

#[test]
fn the_end_of_input_reaches_a_program_on_a_terminal() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    for transport in TRANSPORTS {
        let mut cat = container.stream(transport, &["cat"], Wanted::TTY);
        cat.say(b"a line\r");
        cat.wait_for("a line");
        cat.end_input();
        assert_eq!(cat.finished().ended, Ended::Code(0), "{transport:?}");
    }
}

#[test]
fn a_large_input_arrives_whole() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    let bytes = noise(size("BERTH_TEST_STREAM_BYTES", 12 << 20));
    let sum = sha256(&bytes).replace("sha256:", "");
    for transport in TRANSPORTS {
        let mut command = container.stream(transport, &["sh", "-c", "sha256sum"], Wanted::ALL);
        command.say(&bytes);
        command.end_input();
        let finished = command.finished();
        assert_eq!(finished.ended, Ended::Code(0));
        assert_eq!(finished.text(), format!("{sum}  -\n"), "{transport:?}");
    }
    before.again(&node);
}

#[test]
fn a_large_copy_goes_both_ways_at_once() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    let bytes = noise(size("BERTH_TEST_STREAM_BYTES", 12 << 20));
    for transport in TRANSPORTS {
        let mut command = container.stream(transport, &["cat"], Wanted::ALL);
        let mut stdin = command.stdin.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                stdin.write(&bytes).unwrap();
                stdin.close().unwrap();
            });
            let finished = command.finished();
            assert_eq!(finished.ended, Ended::Code(0));
            assert!(finished.stdout == bytes, "{transport:?}");
        });
    }
    before.again(&node);
}

#[test]
fn a_client_that_knows_windows_is_not_sent_more_than_they_allow() {
    use berth_tests::streaming::{Event, spdy};
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let bytes = 3 << 20;
    let command = ["head", "-c", &bytes.to_string(), "/dev/zero"];
    let url = container
        .exec_url(
            &command,
            Wanted {
                stderr: false,
                ..Wanted::OUTPUT
            },
        )
        .unwrap();
    let window = Some(10_000);
    let open = || spdy::Connection::with_window(&url, "v4.channel.k8s.io", window);
    let connection = node.host.enter(open).unwrap();
    let (_, error) = connection.stream(&[("streamType", "error")]).unwrap();
    let (_, stdout) = connection.stream(&[("streamType", "stdout")]).unwrap();
    let mut got = 0;
    while let Ok(Event::Data(bytes)) = stdout.recv_timeout(Duration::from_secs(20)) {
        assert!(bytes.len() <= 10_000);
        got += bytes.len();
    }
    assert_eq!(got, bytes);
    let Ok(Event::Data(status)) = error.recv_timeout(Duration::from_secs(20)) else {
        panic!("no status");
    };
    assert_eq!(Ended::parse(&status).unwrap(), Ended::Code(0));
}

#[test]
fn a_command_that_leaves_somebody_at_its_output_ends_soon() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    for transport in TRANSPORTS {
        let begun = Instant::now();
        let command = ["sh", "-c", "sleep 30 & echo done"];
        let finished = container
            .stream(transport, &command, Wanted::OUTPUT)
            .finished();
        assert_eq!(
            (finished.text().as_str(), finished.ended),
            ("done\n", Ended::Code(0))
        );
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            begun.elapsed()
        );
    }
}

#[test]
fn a_command_that_reads_no_input_does_not_hold_up_its_output() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    for transport in TRANSPORTS {
        let mut command = container.stream(
            transport,
            &["sh", "-c", "exec <&-; echo closed; sleep 1; exit 4"],
            Wanted::ALL,
        );
        command.wait_for("closed");
        command.say(&noise(4 << 20));
        assert_eq!(command.finished().ended, Ended::Code(4), "{transport:?}");
    }
    before.again(&node);
}

#[test]
fn a_client_that_dies_ends_its_command() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    for transport in TRANSPORTS {
        for wanted in [Wanted::ALL, Wanted::TTY, Wanted::OUTPUT] {
            let command = container.stream(
                transport,
                &["sh", "-c", "echo $$; sleep 4321; true"],
                wanted,
            );
            command.wait_for("\n");
            command.connection.kill();
        }
        // One that does not read what it is sent, and whose input nobody reads.
        let mut stuck =
            container.stream(transport, &["sh", "-c", "echo up; yes; true"], Wanted::ALL);
        stuck.wait_for("up");
        let piece = vec![0; 64 << 10];
        let begun = Instant::now();
        let mut stdin = stuck.stdin.take().unwrap();
        let connection = stuck.connection.clone();
        std::thread::scope(|scope| {
            scope.spawn(move || while stdin.write(&piece).is_ok() {});
            while begun.elapsed() < Duration::from_millis(700) {
                std::thread::yield_now();
            }
            connection.kill();
        });
        drop(stuck);
    }
    before.again(&node);
    assert_eq!(
        container.pids().len(),
        1,
        "only the container's own process is left"
    );
}

#[test]
fn many_short_commands_at_once() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    let many = size("BERTH_TEST_STREAM_EXECS", 60);
    for transport in TRANSPORTS {
        let urls: Vec<String> = (0..many)
            .map(|number| {
                let script = format!("echo {number}; exit {}", number % 100);
                container
                    .exec_url(&["sh", "-c", &script], Wanted::OUTPUT)
                    .unwrap()
            })
            .collect();
        let finished: Vec<_> = node.host.enter(|| {
            // Opened inside the host's network, by threads that are inside it too.
            std::thread::scope(|scope| {
                let threads: Vec<_> = urls
                    .iter()
                    .map(|url| {
                        scope.spawn(|| {
                            let protocol = match transport {
                                Transport::Spdy => "v4.channel.k8s.io",
                                Transport::WebSocket => "v5.channel.k8s.io",
                            };
                            Command::open_here(url, transport, Wanted::OUTPUT, protocol)?.finish()
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            })
        });
        for (number, finished) in finished.into_iter().enumerate() {
            let finished = finished.unwrap_or_else(|err| panic!("{transport:?} {number}: {err:#}"));
            assert_eq!(finished.text(), format!("{number}\n"));
            assert_eq!(finished.ended, Ended::Code((number % 100) as i32));
        }
    }
    before.again(&node);
}

#[test]
fn clients_that_die_at_any_moment_leave_nothing() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    let rounds = size("BERTH_TEST_STREAM_KILLS", 40);
    let script = "yes | head -c 300000; cat; sleep 1000";
    let mut state = 88_172_645_463_325_252u64;
    for round in 0..rounds {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let transport = TRANSPORTS[round % 2];
        let wanted = if round % 3 == 0 {
            Wanted::TTY
        } else {
            Wanted::ALL
        };
        let url = container.exec_url(&["sh", "-c", script], wanted).unwrap();
        let lives = Duration::from_micros(state % 30_000);
        let begun = Instant::now();
        let opened = Command::open(&node, &url, transport, wanted);
        let Ok(command) = opened else {
            panic!("round {round}")
        };
        while begun.elapsed() < lives {
            std::thread::yield_now();
        }
        command.connection.kill();
    }
    before.again(&node);
    eventually("only the container's own process is left", || {
        (container.pids().len() == 1).then_some(())
    });
}

#[test]
fn a_daemon_that_stops_or_dies_takes_its_commands_along() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    for orderly in [true, false] {
        let command = container.stream(
            Transport::Spdy,
            &["sh", "-c", "echo up; sleep 1000; true"],
            Wanted::ALL,
        );
        command.wait_for("up");
        let begun = Instant::now();
        if orderly {
            assert!(node.stop_daemon().success());
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "{:?}",
                begun.elapsed()
            );
        } else {
            node.kill_daemon();
        }
        command.finish().unwrap_err();
        eventually("only the container's own process is left", || {
            (container.pids().len() == 1).then_some(())
        });
        node.start_daemon();
        assert_eq!(container.exec(&["echo", "fine"]), "fine\n");
    }
}

#[test]
fn a_command_can_be_run_while_the_container_is_being_stopped() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "trap 'echo asked' TERM; echo up; while true; do sleep 0.1; done",
    ]);
    container.wait_for_log("up");
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| container.stop(4));
        container.wait_for_log("asked");
        for transport in TRANSPORTS {
            let finished = container
                .stream(transport, &["echo", "still here"], Wanted::OUTPUT)
                .finished();
            assert_eq!(finished.text(), "still here\n");
        }
        stop.join().unwrap().unwrap();
    });
}

#[test]
fn several_clients_attach_and_leave_as_they_like() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&[
        "sh",
        "-c",
        "echo up; while read line; do echo got $line; echo err $line >&2; done; sleep 1000",
    ]);
    config.stdin = true;
    let container = pod.start_as(config);
    container.wait_for_log("up");
    let mut first = container.attach(Transport::Spdy, Wanted::ALL);
    let second = container.attach(Transport::WebSocket, Wanted::OUTPUT);
    let before = Holdings::of(&node);
    first.say(b"one\n");
    for client in [&first, &second] {
        client.wait_for("got one");
        client.stderr.as_ref().unwrap().until("err one").unwrap();
    }
    // A third comes and dies; a fourth ends its input, which is not the container's end.
    let third = container.attach(Transport::Spdy, Wanted::ALL);
    third.connection.kill();
    drop(third);
    let mut fourth = container.attach(Transport::WebSocket, Wanted::ALL);
    fourth.say(b"four\n");
    fourth.wait_for("got four");
    fourth.end_input();
    fourth.connection.kill();
    drop(fourth);
    before.again(&node);
    first.say(b"two\n");
    second.wait_for("got two");
    assert_eq!(
        container.state(),
        berth_proto::runtime_v1::ContainerState::ContainerRunning
    );
    // Clients that are attached when the container ends are told.
    container.stop(0).unwrap();
    for client in [first, second] {
        assert_eq!(client.finished().ended, Ended::Code(0));
    }
    container.wait_for_log("got two");
}

#[test]
fn attaching_to_a_terminal_is_like_sitting_at_it() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for transport in TRANSPORTS {
        let mut config = pod.container(&["sh"]);
        (config.stdin, config.tty) = (true, true);
        let container = pod.start_as(config);
        let mut client = container.attach(transport, Wanted::TTY);
        client.resize(77, 22);
        client.say(b"stty size; echo term-$((1+1))\r");
        client.wait_for("22 77");
        client.wait_for("term-2");
        client.say(b"exit 3\r");
        assert_eq!(client.finished().ended, Ended::Code(0));
        assert_eq!(container.wait_for_exit().exit_code, 3);
    }
}

#[test]
fn input_that_is_there_once_ends_with_its_client() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for transport in TRANSPORTS {
        let mut config = pod.container(&["sh", "-c", "sha256sum; echo ended"]);
        (config.stdin, config.stdin_once) = (true, true);
        let container = pod.start_as(config);
        let bytes = noise(1 << 20);
        let mut client = container.attach(transport, Wanted::ALL);
        client.say(&bytes);
        client.end_input();
        let finished = client.finished();
        let sum = sha256(&bytes).replace("sha256:", "");
        assert_eq!(
            finished.text(),
            format!("{sum}  -\nended\n"),
            "{transport:?}"
        );
        assert_eq!(container.wait_for_exit().exit_code, 0);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let code = |command: &[&str], wanted| container.exec_url(command, wanted).unwrap_err().code();
    assert_eq!(code(&["true"], Wanted::default()), Code::InvalidArgument);
    assert_eq!(
        code(
            &["true"],
            Wanted {
                tty: true,
                ..Wanted::OUTPUT
            }
        ),
        Code::InvalidArgument
    );
    assert_eq!(code(&[], Wanted::OUTPUT), Code::InvalidArgument);
    let attach = |wanted| container.attach_url(wanted).unwrap_err().code();
    assert_eq!(attach(Wanted::default()), Code::InvalidArgument);
    let nobody = node.container(&"0".repeat(64));
    assert_eq!(
        nobody
            .exec_url(&["true"], Wanted::OUTPUT)
            .unwrap_err()
            .code(),
        Code::NotFound
    );
    assert_eq!(
        nobody.attach_url(Wanted::OUTPUT).unwrap_err().code(),
        Code::NotFound
    );
    container.stop(0).unwrap();
    let stopped = container.exec_url(&["true"], Wanted::OUTPUT).unwrap_err();
    assert_eq!(stopped.code(), Code::FailedPrecondition, "{stopped}");
    assert_eq!(
        container.attach_url(Wanted::OUTPUT).unwrap_err().code(),
        Code::FailedPrecondition
    );
}

#[test]
fn a_container_that_ended_after_the_url_was_given_is_an_error_on_the_stream() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    let url = container.exec_url(&["true"], Wanted::OUTPUT).unwrap();
    container.stop(0).unwrap();
    let command = Command::open(&node, &url, Transport::Spdy, Wanted::OUTPUT).unwrap();
    assert!(matches!(command.finished().ended, Ended::Failed(why) if why.contains("does not run")));
}

#[test]
fn what_a_client_wants_less_of_it_does_not_get() {
    let node = Node::start();
    let container = node.run_pod("web").start(&["sleep", "1000"]);
    for transport in TRANSPORTS {
        let wanted = Wanted {
            stderr: false,
            ..Wanted::OUTPUT
        };
        let finished = container
            .stream(transport, &["sh", "-c", "echo err >&2; echo out"], wanted)
            .finished();
        assert_eq!(
            (&finished.stdout[..], &finished.stderr[..]),
            (&b"out\n"[..], &b""[..])
        );
        // Only input: its end is the command's.
        let wanted = Wanted {
            stdin: true,
            ..Wanted::default()
        };
        let mut command = container.stream(transport, &["sh", "-c", "test \"$(cat)\" = x"], wanted);
        command.say(b"x");
        command.end_input();
        assert_eq!(command.finished().ended, Ended::Code(0));
    }
}

#[test]
fn a_reader_that_has_seen_enough_breaks_the_pipe() {
    let node = Node::start();
    let container = warm(&node, &["sleep", "1000"]);
    let before = Holdings::of(&node);
    let url = container
        .exec_url(&["sh", "-c", "yes; echo $? >&2"], Wanted::OUTPUT)
        .unwrap();
    use berth_tests::streaming::{Event, spdy};
    let connection = node
        .host
        .enter(|| spdy::Connection::open(&url, "v4.channel.k8s.io"))
        .unwrap();
    let (_, error) = connection.stream(&[("streamType", "error")]).unwrap();
    let (sender, stdout) = connection.stream(&[("streamType", "stdout")]).unwrap();
    let (_, _stderr) = connection.stream(&[("streamType", "stderr")]).unwrap();
    assert!(matches!(
        stdout.recv_timeout(Duration::from_secs(20)),
        Ok(Event::Data(_))
    ));
    sender.reset().unwrap();
    drop(stdout);
    let Ok(Event::Data(status)) = error.recv_timeout(Duration::from_secs(20)) else {
        panic!("no status");
    };
    assert_eq!(Ended::parse(&status).unwrap(), Ended::Code(0));
    drop((connection, sender, _stderr, error));
    before.again(&node);
}
