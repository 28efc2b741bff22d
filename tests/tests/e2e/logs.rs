//! The CRI log file. Source: Kubernetes, "CRI: Log management for container stdout/stderr".

use crate::metrics::{PORT, scrape, value};
use berth_tests::{Node, eventually};
use std::fs;
use tonic::Code;

#[test]
fn lines_carry_time_stream_and_tag() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "echo out; sleep 0.1; echo err >&2; sleep 0.1; printf end",
    ]);
    container.wait_for_exit();
    let log = container.log();
    let shape: Vec<_> = log
        .iter()
        .map(|l| (l.stream.as_str(), l.tag.as_str(), l.text.as_str()))
        .collect();
    assert_eq!(shape[..2], [("stdout", "F", "out"), ("stderr", "F", "err")]);
    // What came without a newline is written when the stream ends.
    assert_eq!((shape[2].0, shape[2].2), ("stdout", "end"));
    for line in &log {
        // 2016-10-06T00:17:09.669794202Z, or with +00:00.
        assert_eq!(&line.time[4..5], "-", "{}", line.time);
        assert_eq!(&line.time[10..11], "T", "{}", line.time);
        assert!(
            line.time.ends_with('Z') || line.time.contains('+'),
            "{}",
            line.time
        );
        assert_eq!(line.time[19..].find('.'), Some(0), "{}", line.time);
    }
    let mut times: Vec<_> = log.iter().map(|line| line.time.clone()).collect();
    times.sort();
    assert_eq!(
        times,
        log.iter().map(|line| line.time.clone()).collect::<Vec<_>>()
    );
}

#[test]
fn the_file_is_there_before_start_is_answered() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    assert!(container.log_path.is_file());
}

#[test]
fn a_long_line_is_split_into_partial_ones() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "probe spew 100000; echo; echo short"]);
    container.wait_for_exit();
    let log = container.log();
    assert!(
        log.iter().filter(|line| line.tag == "P").count() >= 6,
        "16 KiB pieces"
    );
    assert!(log.iter().all(|line| line.text.len() <= 16 << 10));
    assert_eq!(container.stdout(), "x".repeat(100_000) + "\nshort\n");
}

#[test]
fn nothing_is_lost_of_much_output_on_both_streams() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "for i in $(seq 2000); do echo out $i; echo err $i >&2; done; probe spew 3000000",
    ]);
    container.wait_for_exit();
    let numbered = |stream: &str| {
        let text = container.logged(stream);
        let own: Vec<_> = text
            .lines()
            .filter(|l| l.len() < 100)
            .map(str::to_owned)
            .collect();
        own
    };
    let wanted = |word: &str| {
        (1..=2000)
            .map(|n| format!("{word} {n}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(numbered("stderr"), wanted("err"));
    assert_eq!(numbered("stdout")[..2000], wanted("out"));
    assert_eq!(container.stdout().matches('x').count(), 3_000_000);
}

#[test]
fn a_container_without_a_log_path_runs() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sh", "-c", "probe spew 200000; exit 3"]);
    config.log_path.clear();
    assert_eq!(pod.start_as(config).wait_for_exit().exit_code, 3);
}

#[test]
fn a_terminal_has_one_stream() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&[
        "sh",
        "-c",
        "test -t 0 && test -t 1 && echo tty; echo err >&2",
    ]);
    config.tty = true;
    let container = pod.start_as(config);
    assert_eq!(container.wait_for_exit().exit_code, 0);
    let log = container.log();
    assert!(log.iter().all(|line| line.stream == "stdout"), "{log:?}");
    assert!(container.stdout().contains("tty") && container.stdout().contains("err"));
}

#[test]
fn a_rotated_log_is_written_anew_after_reopen() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&[
        "sh",
        "-c",
        "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.02; done",
    ]);
    container.wait_for_log("line 3");
    let rotated = container.log_path.with_extension("log.1");
    fs::rename(&container.log_path, &rotated).unwrap();
    let request = berth_proto::runtime_v1::ReopenContainerLogRequest {
        container_id: container.id.clone(),
    };
    node.wait(node.runtime().reopen_container_log(request))
        .unwrap();
    container.wait_for_log("line ");
    container.stop(0).unwrap();
    // Not a line is lost or written twice.
    let numbers = |path: &std::path::Path| -> Vec<u32> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .filter_map(|l| l.rsplit(' ').next()?.parse().ok())
            .collect()
    };
    let mut all = numbers(&rotated);
    all.extend(numbers(&container.log_path));
    assert_eq!(all, (1..=all.len() as u32).collect::<Vec<_>>());
}

#[test]
fn reopening_the_log_of_what_does_not_run_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["true"]);
    container.wait_for_exit();
    let request = berth_proto::runtime_v1::ReopenContainerLogRequest {
        container_id: container.id.clone(),
    };
    let err = node
        .wait(node.runtime().reopen_container_log(request))
        .unwrap_err();
    assert_eq!(err.code(), Code::FailedPrecondition, "{err:?}");
}

#[test]
fn removing_a_container_leaves_the_pods_log_directory() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["echo", "last words"]);
    container.wait_for_exit();
    container.remove().unwrap();
    assert!(std::path::Path::new(&pod.config.log_directory).is_dir());
}

#[test]
fn bytes_that_are_no_text_are_kept() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", r"printf 'a\000b\377c\n\n\r\n'"]);
    container.wait_for_exit();
    let log = fs::read(&container.log_path).unwrap();
    let texts: Vec<&[u8]> = log
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| &line[40..])
        .collect();
    assert_eq!(texts, [&b"a\0b\xffc\n"[..], b"\n", b"\r\n"]);
}

#[test]
fn a_log_is_rotated_while_its_container_stops() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let script = "trap 'for i in $(seq 3000); do echo $i; done; exit 0' TERM; \
                  echo ready; while :; do sleep 0.01; done";
    let container = pod.start(&["sh", "-c", script]);
    container.wait_for_log("ready");
    let mut parts = Vec::new();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| container.stop(30));
        loop {
            let aside = container.log_path.with_extension(parts.len().to_string());
            if fs::rename(&container.log_path, &aside).is_ok() {
                parts.push(aside);
            }
            let request = berth_proto::runtime_v1::ReopenContainerLogRequest {
                container_id: container.id.clone(),
            };
            match node.wait(node.runtime().reopen_container_log(request)) {
                Ok(_) => {}
                // It has ended, and the old file has everything.
                Err(error) => {
                    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
                    break;
                }
            }
        }
        stopping.join().unwrap().unwrap();
    });
    if container.log_path.exists() {
        parts.push(container.log_path.clone());
    }
    let numbers: Vec<u32> = parts
        .iter()
        .flat_map(|part| {
            let text = fs::read_to_string(part).unwrap();
            let numbers = text.lines().filter_map(|line| line[40..].parse().ok());
            numbers.collect::<Vec<u32>>()
        })
        .collect();
    assert_eq!(numbers, (1..=3000).collect::<Vec<_>>());
}

#[test]
fn what_is_logged_is_counted_also_when_its_container_is_gone() {
    let node = Node::options()
        .config(&format!("[metrics]\naddress = \"127.0.0.1:{PORT}\"\n"))
        .start();
    let pod = node.run_pod("web");
    let counted = |name: &str| value(&scrape(&node), name, &[]);
    let container = pod.start(&["sh", "-c", "echo 1; echo 22 >&2; printf 333; sleep 1000"]);
    container.wait_for_log("22");
    eventually("the lines are counted while it runs", || {
        (counted("berth_container_log_lines_total") == 2.0).then_some(())
    });
    container.stop(0).unwrap();
    container.wait_for_exit();
    container.remove().unwrap();
    assert_eq!(counted("berth_container_log_lines_total"), 3.0);
    assert_eq!(counted("berth_container_log_bytes_total"), 8.0);
    assert_eq!(counted("berth_container_log_dropped_lines_total"), 0.0);
}
