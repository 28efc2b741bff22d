//! Logs on disks that are full, slow or rotated, on the real program.

mod rig;

use berth_proto::monitor_v1::{self as proto, request::Body as Request};
use proto::log_policy::OnFull;
use rig::{Client, Rig, SmallDisk, read_log, stdout, until};
use std::path::Path;
use std::time::{Duration, Instant};

fn start(rig: &Rig, disk: &SmallDisk, script: &str, policy: proto::LogPolicy) -> (Client, String) {
    let (mut launch, fds) = rig.launch("c", &["sh", "-c", script]);
    let path = disk.0.join("c.log").to_str().unwrap().to_owned();
    launch.log_path.clone_from(&path);
    launch.log_policy = Some(policy);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    (client, path)
}

fn numbers(lines: &[String]) -> Vec<u64> {
    lines.iter().filter_map(|line| line.parse().ok()).collect()
}

/// Lines and bytes that the log itself says are missing.
fn remarked(lines: &[String]) -> (u64, u64) {
    let mut sum = (0, 0);
    for line in lines {
        if let Some(rest) = line.strip_prefix("[berth: ") {
            let mut numbers = rest.split(' ').filter_map(|word| word.parse::<u64>().ok());
            sum.0 += numbers.next().unwrap();
            sum.1 += numbers.next().unwrap();
        }
    }
    sum
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

#[test]
fn a_full_disk_makes_the_container_wait_and_loses_nothing() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "1m");
    let script = "seq 1 200000; echo done >/tmp/done; sleep 1000";
    let (mut client, path) = start(&rig, &disk, script, proto::LogPolicy::default());
    until("the disk is full", || {
        (size(Path::new(&path)) == 1 << 20).then_some(())
    });
    // Rotated while full: the line that was cut goes whole to the new file.
    let old = disk.0.join("old.log");
    std::fs::rename(&path, &old).unwrap();
    client.done(Request::ReopenLog(proto::ReopenLog {
        container_id: "c".into(),
    }));
    assert!(!rig.root().join("tmp/done").exists());
    disk.resize("64m");
    let wanted: Vec<u64> = (1..=200_000).collect();
    until("everything is there", || {
        // A line may be on its way.
        let text = std::fs::read(&path).unwrap();
        (text.ends_with(b" 200000\n")).then_some(())
    });
    let mut lines = stdout(&read_log(&old));
    lines.extend(stdout(&read_log(Path::new(&path))));
    assert!(numbers(&lines) == wanted);
    let counts = client.log_counts("c");
    assert_eq!((counts.lines, counts.dropped_lines), (200_000, 0));
    let bytes: u64 = wanted.iter().map(|n| n.to_string().len() as u64 + 1).sum();
    assert_eq!(counts.bytes, bytes);
}

#[test]
fn an_exit_is_told_while_its_log_waits_for_a_full_disk() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "64k");
    // Less than a pipe holds past the disk: it can end.
    let (mut client, path) = start(
        &rig,
        &disk,
        "seq 1 3000; exit 5",
        proto::LogPolicy::default(),
    );
    assert_eq!(client.exited("c", "").exit_code, 5);
    assert!(size(Path::new(&path)) <= 64 << 10);
    disk.resize("1m");
    until("the rest is written", || {
        let text = std::fs::read(&path).unwrap();
        text.ends_with(b" 3000\n").then_some(())
    });
    assert_eq!(numbers(&stdout(&read_log(Path::new(&path)))).len(), 3000);
    until("the logger has ended", || {
        let pids = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", rig.pid()));
        pids.unwrap().trim().is_empty().then_some(())
    });
}

#[test]
fn under_drop_what_is_missing_is_counted_and_said() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "1m");
    let policy = proto::LogPolicy {
        on_full: OnFull::Drop.into(),
        ..Default::default()
    };
    let script = "seq 1 400000; echo done >/tmp/done; read go </tmp/go; seq 400001 400010";
    nix_mkfifo(&rig.root().join("tmp/go"));
    let (mut client, path) = start(&rig, &disk, script, policy);
    // It does not wait for the disk.
    until("it has written everything", || {
        rig.root().join("tmp/done").exists().then_some(())
    });
    until("lines were dropped", || {
        (client.log_counts("c").dropped_lines > 0).then_some(())
    });
    disk.resize("64m");
    until("what was queued is written", || {
        (size(Path::new(&path)) > 4 << 20).then_some(())
    });
    std::fs::write(rig.root().join("tmp/go"), "\n").unwrap();
    let exited = client.exited("c", "");
    let lines = stdout(&read_log(Path::new(&path)));
    let there = numbers(&lines);
    let missing = 400_010 - there.len() as u64;
    assert!(missing > 0);
    assert!(there.is_sorted());
    assert_eq!(there.last(), Some(&400_010));
    let counts = exited.log.unwrap();
    let (said_lines, said_bytes) = remarked(&lines);
    assert_eq!(said_lines, missing);
    assert_eq!(counts.dropped_lines, missing);
    assert_eq!(counts.dropped_bytes, said_bytes);
    assert_eq!(counts.lines, there.len() as u64);
}

fn nix_mkfifo(path: &Path) {
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, path, fifo, mode, 0).unwrap();
}

#[test]
fn a_file_at_its_bound_waits_for_rotation() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "16m");
    let policy = proto::LogPolicy {
        file_bytes: 100_000,
        ..Default::default()
    };
    let (mut client, path) = start(&rig, &disk, "seq 1 10000", policy);
    let mut parts = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while client.inspect().containers[0].exited.is_none() {
        assert!(Instant::now() < deadline);
        let len = size(Path::new(&path));
        assert!(len <= 100_000);
        if len > 99_000 {
            let aside = format!("{path}.{}", parts.len());
            std::fs::rename(&path, &aside).unwrap();
            parts.push(aside);
            client.done(Request::ReopenLog(proto::ReopenLog {
                container_id: "c".into(),
            }));
        }
    }
    parts.push(path);
    assert!(parts.len() > 3);
    let lines: Vec<String> = parts
        .iter()
        .flat_map(|part| stdout(&read_log(Path::new(part))))
        .collect();
    assert!(numbers(&lines) == (1..=10_000).collect::<Vec<u64>>());
}

#[test]
fn a_budget_slows_the_container_or_drops_its_lines() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "64m");
    let slow = proto::LogPolicy {
        bytes_per_second: 500_000,
        ..Default::default()
    };
    let begin = Instant::now();
    // 2.7 MB, of which a second's worth and what the pipe holds are free.
    let (mut client, path) = start(&rig, &disk, "seq 1 400000", slow);
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert!(
        begin.elapsed() > Duration::from_millis(800),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(numbers(&stdout(&read_log(Path::new(&path)))).len(), 400_000);
    client.done(Request::Forget(proto::Forget {
        container_id: "c".into(),
    }));
    std::fs::remove_file(&path).unwrap();

    let dropped = proto::LogPolicy {
        on_full: OnFull::Drop.into(),
        ..slow
    };
    let begin = Instant::now();
    let (mut client, path) = start(&rig, &disk, "seq 1 200000", dropped);
    let exited = client.exited("c", "");
    assert!(begin.elapsed() < Duration::from_secs(5));
    let lines = stdout(&read_log(Path::new(&path)));
    let missing = 200_000 - numbers(&lines).len() as u64;
    assert!(missing > 0);
    assert_eq!(remarked(&lines).0, missing);
    assert_eq!(exited.log.unwrap().dropped_lines, missing);
}

#[test]
fn rotation_during_a_torrent_neither_loses_nor_doubles_a_line() {
    let rig = Rig::start();
    let disk = SmallDisk::mount(&rig.dir.path().join("disk"), "256m");
    for on_full in [OnFull::Block, OnFull::Drop] {
        let policy = proto::LogPolicy {
            on_full: on_full.into(),
            ..Default::default()
        };
        let (mut client, path) = start(&rig, &disk, "seq 1 1000000", policy);
        let mut parts = Vec::new();
        loop {
            let aside = format!("{path}.{}", parts.len());
            std::fs::rename(&path, &aside).unwrap();
            parts.push(aside);
            let reopen = Request::ReopenLog(proto::ReopenLog {
                container_id: "c".into(),
            });
            match client.ask(reopen, &[]).0 {
                proto::reply::Body::Done(_) => {}
                // It ended: all is in the old file.
                proto::reply::Body::Failure(failure) => {
                    assert_eq!(failure.errno, libc::ESRCH, "{failure:?}");
                    break;
                }
                other => panic!("{other:?}"),
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let exited = client.exited("c", "");
        let lines: Vec<String> = parts
            .iter()
            .flat_map(|part| stdout(&read_log(Path::new(part))))
            .collect();
        let there = numbers(&lines);
        let dropped = exited.log.unwrap().dropped_lines;
        assert_eq!(there.len() as u64 + dropped, 1_000_000, "{on_full:?}");
        assert!(
            there.windows(2).all(|pair| pair[0] < pair[1]),
            "{on_full:?}"
        );
        assert!(parts.len() > 3, "{}", parts.len());
        client.done(Request::Forget(proto::Forget {
            container_id: "c".into(),
        }));
        for part in parts {
            std::fs::remove_file(part).unwrap();
        }
    }
}
