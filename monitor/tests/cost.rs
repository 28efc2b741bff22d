//! What a monitor costs: time to start and exec, memory when idle. Prints
//! medians; fails only far beyond what is expected, as other work may run on
//! the machine.
//!
//! `BERTH_TEST_MONITOR` names another build, such as the static one of the
//! `monitor` profile, whose numbers are the ones that count.

mod rig;

use berth_proto::monitor_v1::{self as proto, request::Body as Request};
use rig::{Rig, process};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const ROUNDS: usize = 50;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn starting_and_execing_take_milliseconds() {
    let rig = Rig::with_namespaces();
    let mut client = rig.client();
    let mut starts = Vec::new();
    let mut ends = Vec::new();
    for round in 0..ROUNDS {
        let id = format!("c{round}");
        let (mut launch, fds) = rig.launch(&id, &["sleep", "1000"]);
        (launch.join_net, launch.join_ipc, launch.join_uts) = (true, true, true);
        launch.masked_paths = [
            "/proc/kcore",
            "/proc/keys",
            "/proc/timer_list",
            "/proc/scsi",
            "/sys/firmware",
        ]
        .map(String::from)
        .to_vec();
        launch.readonly_paths = [
            "/proc/bus",
            "/proc/fs",
            "/proc/irq",
            "/proc/sys",
            "/proc/sysrq-trigger",
        ]
        .map(String::from)
        .to_vec();
        let begin = Instant::now();
        client.started(Request::Launch(launch), &fds);
        starts.push(begin.elapsed());
        let begin = Instant::now();
        client.signal(&id, "", libc::SIGKILL);
        client.exited(&id, "");
        ends.push(begin.elapsed());
        client.done(Request::Forget(proto::Forget { container_id: id }));
    }

    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    client.started(Request::Launch(launch), &fds);
    let mut execs = Vec::new();
    let mut outputs = Vec::new();
    for round in 0..ROUNDS {
        let (read, write) = std::io::pipe().unwrap();
        let request = proto::Exec {
            container_id: "c".into(),
            exec_id: format!("e{round}"),
            process: Some(process(&["echo", "x"])),
            cgroup: Some(rig.cgroup.proto()),
            stdout_fd: Some(0),
            ..Default::default()
        };
        let fds = [OwnedFd::from(write)];
        let begin = Instant::now();
        client.started(Request::Exec(request), &fds);
        execs.push(begin.elapsed());
        drop(fds);
        assert_eq!(std::io::read_to_string(read).unwrap(), "x\n");
        outputs.push(begin.elapsed());
        client.exited("c", &format!("e{round}"));
    }
    let (start, exec) = (median(starts), median(execs));
    println!(
        "Launch to Started {start:?}; kill to Exited, durable {:?}",
        median(ends)
    );
    println!(
        "Exec to Started {exec:?}, to the end of its output {:?}",
        median(outputs)
    );
    assert!(start < Duration::from_millis(60), "{start:?}");
    assert!(exec < Duration::from_millis(40), "{exec:?}");
}

#[test]
fn an_idle_monitor_is_small() {
    // As on a node, the program's pages are not one pod's alone.
    let other = Rig::with_namespaces();
    let (launch, fds) = other.launch("c", &["sleep", "1000"]);
    other.client().started(Request::Launch(launch), &fds);

    let rig = Rig::with_namespaces();
    let mut client = rig.client();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let (started, _) = client.started(Request::Launch(launch), &fds);
    client.exec("c", "e", &["true"]);
    drop(client);
    let children =
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", rig.pid())).unwrap();
    let logger = children
        .split_whitespace()
        .filter_map(|pid| pid.parse::<u32>().ok())
        .find(|&pid| pid != started.pid as u32)
        .unwrap();
    let mut total = 0;
    for (name, pid) in [("monitor", rig.pid()), ("logger", logger)] {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let field = |name: &str| -> u64 {
            let line = rollup
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap();
            line.trim().trim_end_matches(" kB").trim().parse().unwrap()
        };
        let private = field("Private_Clean:") + field("Private_Dirty:");
        if std::env::var_os("BERTH_TEST_SMAPS").is_some() {
            println!(
                "{}",
                std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap()
            );
        }
        total += private;
        println!(
            "{name}: private {private} KiB, PSS {} KiB, RSS {} KiB",
            field("Pss:"),
            field("Rss:")
        );
    }
    assert!(total < 4096, "{total} KiB");
}

#[test]
fn logging_takes_a_few_milliseconds_a_mebibyte() {
    const MIB: usize = 64;
    let rig = Rig::start();
    let mut line = [b'x'; 100];
    line[99] = b'\n';
    let lines = line.repeat((MIB << 20) / line.len());
    std::fs::write(rig.root().join("lines"), &lines).unwrap();
    let mut client = rig.client();
    let script = "cat /lines; echo this is the end; exec sleep 1000";
    let (launch, fds) = rig.launch("c", &["sh", "-c", script]);
    let path = launch.log_path.clone();
    let begin = Instant::now();
    client.started(Request::Launch(launch), &fds);
    rig::until("the log is whole", || {
        let mut file = std::fs::File::open(&path).ok()?;
        let mut end = [0; 16];
        file.seek(SeekFrom::End(-16)).ok()?;
        file.read_exact(&mut end).ok()?;
        (&end == b"this is the end\n").then_some(())
    });
    let took = begin.elapsed().as_secs_f64();
    let logger = rig::logger_of(rig.pid());
    let stat = std::fs::read_to_string(format!("/proc/{logger}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let milliseconds = |at: usize| fields[at].parse::<f64>().unwrap() * 10.0;
    let (user, system) = (milliseconds(11), milliseconds(12));
    let mib = MIB as f64;
    println!(
        "100-byte lines: {:.0} MiB/s, {:.2} ms of CPU a MiB ({user} user, {system} system)",
        mib / took,
        (user + system) / mib
    );
    assert!((user + system) / mib < 50.0);
}
