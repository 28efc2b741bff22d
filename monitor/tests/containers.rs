//! Containers run by the real monitor, on the real kernel. Needs root.

mod rig;

use berth_proto::monitor_v1::{self as proto, request::Body as Request};
use berth_store::exit::ExitRecord;
use berth_sys::mount;
use rig::{Rig, process, stdout, until};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

#[test]
fn a_container_runs_and_its_exit_is_recorded_and_told() {
    let rig = Rig::with_namespaces();
    let (exited, log) = rig.run("c", "echo out; echo err >&2; exit 7");
    assert_eq!(
        (exited.exit_code, exited.signal, exited.unrecorded),
        (7, 0, false)
    );
    assert_eq!(log.len(), 2);
    let mut lines: Vec<_> = log
        .iter()
        .map(|l| (l.stream.as_str(), l.tag.as_str(), l.text.as_slice()))
        .collect();
    lines.sort();
    assert_eq!(
        lines,
        [("stderr", "F", &b"err"[..]), ("stdout", "F", b"out")]
    );
    let record: ExitRecord =
        berth_store::record::load(Path::new(&rig.path("exits/c.rec"))).unwrap();
    assert_eq!((record.exit_code, record.signal), (7, 0));
    assert_eq!(record.finished_at_ns, exited.finished_at);
    assert!(record.started_at_ns > 0 && record.started_at_ns <= record.finished_at_ns);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(record.boot_id, boot.trim());
}

#[test]
fn a_signal_ends_a_container_and_is_reported_as_such() {
    let rig = Rig::with_namespaces();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let mut client = rig.client();
    let (started, with) = client.started(Request::Launch(launch), &fds);
    assert_eq!(with.len(), 1, "a pidfd");
    berth_sys::pidfd::send_signal(&with[0], 0).unwrap();
    let state = client.inspect();
    assert_eq!(state.containers[0].pid, started.pid);
    assert_eq!(state.containers[0].start_ticks, started.start_ticks);
    assert!(started.start_ticks > 0);
    client.signal("c", "", libc::SIGKILL);
    let exited = client.exited("c", "");
    assert_eq!((exited.exit_code, exited.signal), (137, libc::SIGKILL));
    assert_eq!(client.inspect().containers[0].pid, 0);
    client.done(Request::Forget(proto::Forget {
        container_id: "c".into(),
    }));
    assert!(client.inspect().containers.is_empty());
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let rig = Rig::with_namespaces();
    let mut client = rig.client();
    for (program, detail) in [
        ("/foo", "/foo"),
        ("foo", "foo: not found in $PATH"),
        ("/etc", "/etc"),
    ] {
        let (launch, fds) = rig.launch("c", &[program]);
        let failure = client.failure(Request::Launch(launch), &fds);
        assert_eq!(
            (failure.stage.as_str(), failure.detail.as_str()),
            ("exec", detail)
        );
        assert_eq!(
            failure.errno,
            if program == "/etc" {
                libc::EACCES
            } else {
                libc::ENOENT
            }
        );
    }
    // Nothing is left of it, and the ID is free.
    assert!(client.inspect().containers.is_empty());
    assert_eq!(rig.run("c", "true").0.exit_code, 0);
}

#[test]
fn the_container_has_its_own_namespaces_and_the_pods() {
    let rig = Rig::with_namespaces();
    let script = "echo $$; hostname; cat /proc/mounts | wc -l; ip -o link | grep -c lo:.*UP; \
                  ls /proc/self/ns/; readlink /proc/self/ns/net; pwd; cat /proc/1/cgroup | grep -c berth-";
    let (_, log) = rig.run_with("c", script, |launch| {
        launch.join_net = true;
        launch.join_ipc = true;
        launch.join_uts = true;
    });
    let lines = stdout(&log);
    assert_eq!(&lines[..2], ["1", "podhost"]);
    assert!(lines[2].parse::<u32>().unwrap() < 12, "{lines:?}");
    assert_eq!(lines[3], "1");
    let pinned = std::fs::File::open(rig.path("netns")).unwrap();
    let inode = rustix::fs::fstat(&pinned).unwrap().st_ino;
    assert!(lines.contains(&format!("net:[{inode}]")), "{lines:?}");
    assert!(lines.contains(&"/".to_owned()));
    // The cgroup namespace hides where it is.
    assert_eq!(lines.last().unwrap(), "0");
}

#[test]
fn no_descriptor_of_the_monitor_is_open_in_a_container() {
    let rig = Rig::with_namespaces();
    // The listing's own descriptor is the only further one.
    let (_, log) = rig.run(
        "c",
        "ls /proc/self/fd; for f in 0 1 2; do readlink /proc/1/fd/$f; done",
    );
    let lines = stdout(&log);
    assert_eq!(&lines[..4], ["0", "1", "2", "3"]);
    assert_eq!(lines[4], "/dev/null");
    assert!(
        lines[5].starts_with("pipe:") && lines[6].starts_with("pipe:"),
        "{lines:?}"
    );
    assert_eq!(lines.len(), 7);

    let (launch, fds) = rig.launch("s", &["sleep", "1000"]);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    let (_, text) = client.exec("s", "x", &["ls", "/proc/self/fd"]);
    assert_eq!(text, "0\n1\n2\n3\n");
}

#[test]
fn long_lines_are_split_and_bytes_are_kept() {
    let rig = Rig::with_namespaces();
    let script = r#"printf 'aaaaaaaaaabbbbb\n\n'; printf 'x\0y\377z\n'; printf tail"#;
    let (_, log) = rig.run_with("c", script, |launch| launch.log_line_bytes = 10);
    let lines: Vec<(&str, &[u8])> = log
        .iter()
        .map(|line| (line.tag.as_str(), line.text.as_slice()))
        .collect();
    let expected: [(&str, &[u8]); 5] = [
        ("P", b"aaaaaaaaaa"),
        ("F", b"bbbbb"),
        ("F", b""),
        ("F", b"x\0y\xffz"),
        ("F", b"tail"),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_rotated_log_loses_and_doubles_nothing() {
    let rig = Rig::with_namespaces();
    let script = "i=0; while [ $i -lt 30000 ]; do echo $i; i=$((i+1)); done";
    let (launch, fds) = rig.launch("c", &["sh", "-c", script]);
    let log = launch.log_path.clone();
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    let mut parts = Vec::new();
    for part in 0..5 {
        let aside = format!("{log}.{part}");
        until("there is something to rotate", || {
            std::fs::metadata(&log).ok().filter(|meta| meta.len() > 0)
        });
        std::fs::rename(&log, &aside).unwrap();
        parts.push(aside);
        let request = proto::ReopenLog {
            container_id: "c".into(),
        };
        let id = client.send(Request::ReopenLog(request), &[]);
        match client.answer(id).0 {
            proto::reply::Body::Done(_) => {}
            // It was over before.
            proto::reply::Body::Failure(failure) => {
                assert_eq!(failure.errno, libc::ESRCH);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    client.exited("c", "");
    if Path::new(&log).exists() {
        parts.push(log);
    }
    assert!(parts.len() > 1, "nothing was rotated");
    let all: Vec<String> = parts
        .iter()
        .flat_map(|part| stdout(&rig::read_log(Path::new(part))))
        .collect();
    let expected: Vec<String> = (0..30000).map(|number| number.to_string()).collect();
    assert_eq!(all, expected);
}

#[test]
fn a_log_that_cannot_be_opened_stops_the_start() {
    let rig = Rig::with_namespaces();
    let target = rig.path("secret");
    std::fs::write(&target, "keep").unwrap();
    std::os::unix::fs::symlink(&target, rig.path("c.log")).unwrap();
    let (launch, fds) = rig.launch("c", &["touch", "/work/ran"]);
    let mut client = rig.client();
    let failure = client.failure(Request::Launch(launch), &fds);
    assert_eq!(
        (failure.stage.as_str(), failure.errno),
        ("open log", libc::ELOOP)
    );
    assert_eq!(failure.detail, rig.path("c.log"));
    assert!(!rig.root().join("work/ran").exists());
    assert_eq!(std::fs::read(&target).unwrap(), b"keep");
    assert!(client.inspect().containers.is_empty());
}

#[test]
fn masked_and_read_only_paths_and_a_read_only_root() {
    let rig = Rig::with_namespaces();
    std::fs::create_dir(rig.root().join("hidden")).unwrap();
    std::fs::write(rig.root().join("hidden/secret"), "s").unwrap();
    std::fs::create_dir(rig.root().join("also")).unwrap();
    std::fs::write(rig.root().join("also/secret"), "s").unwrap();
    std::fs::write(rig.root().join("file"), "s").unwrap();
    let script = "ls /hidden /also | grep -c secret; cat /file /proc/kcore | wc -c; \
        echo x > /proc/sys/kernel/hostname || echo readonly; touch /x || echo readonly; \
        touch /hidden/x || echo readonly; chmod 600 /file || echo readonly; \
        echo y > /file && echo written; touch /dev/shm/x && echo shm; ls -d /proc/nonexistent || echo none";
    let (exited, log) = rig.run_with("c", script, |launch| {
        launch.masked_paths = [
            "/hidden",
            "/also",
            "/file",
            "/proc/kcore",
            "/proc/nonexistent",
            "/proc/acpi",
        ]
        .map(String::from)
        .to_vec();
        launch.readonly_paths = ["/proc/sys", "/proc/gone"].map(String::from).to_vec();
        launch.rootfs_readonly = true;
    });
    assert_eq!(exited.exit_code, 0);
    let expected = [
        "0", "0", "readonly", "readonly", "readonly", "readonly", "written", "shm", "none",
    ];
    assert_eq!(stdout(&log), expected, "{log:?}");
    assert_eq!(std::fs::read(rig.root().join("file")).unwrap(), b"s");
    assert_eq!(std::fs::metadata("/dev/null").unwrap().permissions(), {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::Permissions::from_mode(0o20666)
    });
}

#[test]
fn mount_targets_behind_links_stay_inside_the_root() {
    let rig = Rig::with_namespaces();
    let outside = rig.dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let volume = rig.dir.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("inside"), "v").unwrap();
    std::os::unix::fs::symlink(&outside, rig.root().join("abs")).unwrap();
    std::os::unix::fs::symlink("../../../../../../../../..", rig.root().join("up")).unwrap();
    let mounted = mount::clone_tree(&volume, true).unwrap();
    let again = mount::clone_tree(&volume, true).unwrap();
    let (mut launch, mut fds) = rig.launch(
        "c",
        &["sh", "-c", "cat /abs/deep/inside /up/tmp/vol/inside"],
    );
    for (target, fd) in [("/abs/deep", mounted), ("/up/tmp/vol", again)] {
        launch.mounts.push(proto::MountStep {
            target: target.into(),
            fd: Some(fds.len() as u32),
            ..Default::default()
        });
        fds.push(fd);
    }
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert_eq!(stdout(&rig.log("c")), ["vv"]);
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = rig.dir.path().to_str().unwrap();
    // Only the pinned network namespace.
    assert_eq!(
        mounts.lines().filter(|line| line.contains(ours)).count(),
        1,
        "{mounts}"
    );
}

#[test]
fn procfs_is_not_mounted_through_a_link() {
    let rig = Rig::with_namespaces();
    std::fs::remove_dir(rig.root().join("proc")).unwrap();
    std::os::unix::fs::symlink("/tmp", rig.root().join("proc")).unwrap();
    let (launch, fds) = rig.launch("c", &["true"]);
    let failure = rig.client().failure(Request::Launch(launch), &fds);
    assert_eq!(
        (failure.detail.as_str(), failure.errno),
        ("/proc", libc::ELOOP)
    );
}

#[test]
fn a_working_directory_is_made_and_never_outside() {
    let rig = Rig::with_namespaces();
    let (_, log) = rig.run_with("made", "pwd", |launch| {
        launch.process.as_mut().unwrap().cwd = "/var/new/dir".into();
    });
    assert_eq!(stdout(&log), ["/var/new/dir"]);
    // The trick of CVE-2024-21626: the descriptors of whoever starts it.
    for fd in 3..20 {
        let (mut launch, fds) = rig.launch("c", &["pwd"]);
        launch.process.as_mut().unwrap().cwd = format!("/proc/self/fd/{fd}");
        let mut client = rig.client();
        match client.ask(Request::Launch(launch), &fds).0 {
            proto::reply::Body::Failure(failure) => assert_eq!(failure.stage, "chdir"),
            proto::reply::Body::Started(_) => {
                client.exited("c", "");
                client.done(Request::Forget(proto::Forget {
                    container_id: "c".into(),
                }));
                panic!("cwd {:?} through descriptor {fd}", stdout(&rig.log("c")));
            }
            other => panic!("{other:?}"),
        }
    }
    std::fs::write(rig.root().join("file"), "").unwrap();
    let (mut launch, fds) = rig.launch("c", &["pwd"]);
    launch.process.as_mut().unwrap().cwd = "/file".into();
    let failure = rig.client().failure(Request::Launch(launch), &fds);
    assert_eq!(
        (failure.stage.as_str(), failure.errno),
        ("chdir", libc::ENOTDIR)
    );
}

#[test]
fn user_groups_capabilities_limits_and_no_new_privs_are_set() {
    let rig = Rig::with_namespaces();
    let script = "id -u; id -g; id -G; umask; ulimit -n; \
        grep -E '^(NoNewPrivs|CapEff|CapPrm|CapBnd|CapAmb|CapInh|Seccomp):' /proc/self/status; \
        cat /proc/self/oom_score_adj; echo again > /dev/stdout";
    let (_, log) = rig.run_with("c", script, |launch| {
        let process = launch.process.as_mut().unwrap();
        (process.uid, process.gid, process.groups) = (1000, 1001, vec![1001, 2000]);
        process.umask = Some(0o027);
        process.no_new_privs = true;
        process.rlimits = vec![proto::Rlimit {
            resource: 7,
            soft: 512,
            hard: 1 << 30,
        }];
        process.oom_score_adj = Some(500);
        (process.cap_bounding, process.cap_effective) = (0x401, 0x400);
        (
            process.cap_permitted,
            process.cap_inheritable,
            process.cap_ambient,
        ) = (0x400, 0x400, 0x400);
        // Allows everything.
        process.seccomp = vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f];
    });
    let lines = stdout(&log);
    assert_eq!(
        &lines[..5],
        ["1000", "1001", "1001 2000", "0027", "512"],
        "{log:?}"
    );
    let status: Vec<String> = lines[5..12]
        .iter()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        status,
        [
            "CapInh: 0000000000000400",
            "CapPrm: 0000000000000400",
            "CapEff: 0000000000000400",
            "CapBnd: 0000000000000401",
            "CapAmb: 0000000000000400",
            "NoNewPrivs: 1",
            "Seccomp: 2",
        ]
    );
    assert_eq!(&lines[12..], ["500", "again"]);
}

#[test]
fn a_filter_without_no_new_privs_leaves_no_capability_behind() {
    let rig = Rig::with_namespaces();
    for uid in [0, 1000] {
        let id = format!("c{uid}");
        let script = "grep -E '^(NoNewPrivs|CapEff|CapPrm|Seccomp):' /proc/self/status";
        let (_, log) = rig.run_with(&id, script, |launch| {
            let process = launch.process.as_mut().unwrap();
            process.uid = uid;
            process.seccomp = vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f];
        });
        let caps = if uid == 0 {
            "00000000a80425fb"
        } else {
            "0000000000000000"
        };
        let expected = [
            format!("CapPrm:\t{caps}"),
            format!("CapEff:\t{caps}"),
            "NoNewPrivs:\t0".into(),
            "Seccomp:\t2".into(),
        ];
        assert_eq!(stdout(&log), expected);
    }
}

#[test]
fn signals_are_as_a_program_expects_them() {
    let rig = Rig::with_namespaces();
    let (_, log) = rig.run(
        "c",
        "grep -E '^Sig(Blk|Ign|Cgt):' /proc/self/status; grep -c . /proc/self/stat",
    );
    let lines = stdout(&log);
    assert_eq!(lines[0], "SigBlk:\t0000000000000000");
    assert_eq!(lines[1], "SigIgn:\t0000000000000000");
}

#[test]
fn an_exec_runs_in_the_container_with_the_streams_it_was_given() {
    let rig = Rig::with_namespaces();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    let (in_read, in_write) = std::io::pipe().unwrap();
    let (out_read, out_write) = std::io::pipe().unwrap();
    let (err_read, err_write) = std::io::pipe().unwrap();
    let script = "cat; echo err >&2; echo $$ | grep -vc '^1$'; cat /proc/1/comm; exit 5";
    let request = proto::Exec {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: Some(process(&["sh", "-c", script])),
        cgroup: Some(rig.cgroup.proto()),
        stdin_fd: Some(0),
        stdout_fd: Some(2),
        stderr_fd: Some(1),
        ..proto::Exec::default()
    };
    let fds = [OwnedFd::from(in_read), err_write.into(), out_write.into()];
    let (started, with) = client.started(Request::Exec(request), &fds);
    drop(fds);
    assert_eq!(with.len(), 1);
    assert!(rig.cgroup.pids().contains(&started.pid));
    (&in_write).write_all(b"in\n").unwrap();
    drop(in_write);
    assert_eq!(std::io::read_to_string(out_read).unwrap(), "in\n1\nsleep\n");
    assert_eq!(std::io::read_to_string(err_read).unwrap(), "err\n");
    let exited = client.exited("c", "e");
    assert_eq!((exited.exit_code, exited.exec_id.as_str()), (5, "e"));

    let request = proto::Exec {
        container_id: "c".into(),
        exec_id: "f".into(),
        process: Some(process(&["nothing"])),
        ..Default::default()
    };
    let failure = client.failure(Request::Exec(request.clone()), &[]);
    assert_eq!(
        (failure.stage.as_str(), failure.errno),
        ("exec", libc::ENOENT)
    );
    let unknown = proto::Exec {
        container_id: "x".into(),
        ..request
    };
    assert!(client.failure(Request::Exec(unknown), &[]).not_found);
}

#[test]
fn an_exec_ends_with_the_connection_that_asked_for_it() {
    let rig = Rig::with_namespaces();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    let mut other = rig.client();
    let request = proto::Exec {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: Some(process(&["sh", "-c", "sleep 1000 & sleep 1000"])),
        ..Default::default()
    };
    let (_, with) = other.started(Request::Exec(request), &[]);
    drop(other);
    until("the exec is killed", || {
        berth_sys::pidfd::send_signal(&with[0], 0).err()
    });
    // And what it started with it.
    until("its group is killed", || {
        let (_, text) = client.exec("c", &format!("ps{}", unique()), &["ps", "-o", "args"]);
        (text.matches("sleep 1000").count() == 1).then_some(())
    });
    assert_eq!(client.inspect().containers.len(), 1);
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

#[test]
fn two_hundred_execs_leave_no_zombie_and_no_descriptor() {
    let rig = Rig::with_namespaces();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    client.exec("c", "first", &["true"]);
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", rig.pid()))
            .unwrap()
            .count()
    };
    let before = descriptors();
    for number in 0..200 {
        assert_eq!(client.exec("c", &format!("e{number}"), &["true"]).0, 0);
    }
    assert_eq!(descriptors(), before);
    let children =
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", rig.pid())).unwrap();
    assert_eq!(
        children.split_whitespace().count(),
        2,
        "init and its logger: {children}"
    );
}

#[test]
fn a_terminal_is_the_containers_console() {
    let rig = Rig::with_namespaces();
    let script = "tty; stty size; [ -c /dev/console ] && echo console; read line; echo got $line; \
                  ls /proc/self/fd | wc -l";
    let (mut launch, fds) = rig.launch("c", &["sh", "-c", script]);
    let wanted = launch.process.as_mut().unwrap();
    (wanted.tty, wanted.tty_width, wanted.tty_height) = (true, 100, 30);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    // The log follows while it runs.
    until("the script has come to its read", || {
        let log = rig.log("c");
        (stdout(&log).len() >= 3).then_some(())
    });
    client.done(Request::ResizeTty(proto::ResizeTty {
        container_id: "c".into(),
        exec_id: String::new(),
        width: 10,
        height: 10,
    }));
    let mut seen = String::new();
    let mut exec = process(&["sh", "-c", "tty; stty size; echo hi > /dev/console; exit 3"]);
    exec.tty = true;
    let request = proto::Exec {
        container_id: "c".into(),
        exec_id: "t".into(),
        process: Some(exec),
        ..Default::default()
    };
    let (_, with) = client.started(Request::Exec(request), &[]);
    assert_eq!(with.len(), 2, "the terminal and a pidfd");
    let mut master = std::fs::File::from(with.into_iter().next().unwrap());
    // A terminal ends with EIO.
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = std::io::Read::read(&mut master, &mut buffer) {
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    assert!(seen.starts_with("/dev/pts/1\r\n"), "{seen:?}");
    assert_eq!(client.exited("c", "t").exit_code, 3);
    let lines = until("the console has it", || {
        let lines = stdout(&rig.log("c"));
        (lines.len() >= 4).then_some(lines)
    });
    assert_eq!(lines, ["/dev/pts/0\r", "30 100\r", "console\r", "hi\r"]);
    client.signal("c", "", libc::SIGKILL);
    client.exited("c", "");
}

#[test]
fn a_kill_by_lack_of_memory_is_counted() {
    let rig = Rig::with_namespaces();
    rig.cgroup.limit_memory(8 << 20);
    let (exited, _) = rig.run("c", "exec head -c 64m /dev/zero | tail > /dev/null");
    assert!(exited.oom_kills >= 1, "{exited:?}");
    let (exited, _) = rig.run("d", "true");
    assert_eq!(exited.oom_kills, 0);
}

#[test]
fn what_a_container_leaves_in_a_shared_pid_namespace_is_killed() {
    let rig = Rig::start();
    let mut client = rig.client();
    let namespaces = proto::MakeNamespaces {
        pid: true,
        ..rig.namespaces()
    };
    client.done(Request::MakeNamespaces(namespaces));
    let (mut launch, fds) = rig.launch(
        "c",
        &["sh", "-c", "sleep 1000 & sleep 1000 & cat /proc/1/comm"],
    );
    launch.new_pid = false;
    launch.join_pid = true;
    client.started(Request::Launch(launch), &fds);
    assert_eq!(client.exited("c", "").exit_code, 0);
    assert_eq!(stdout(&rig.log("c")), ["berth-pod-init"]);
    assert_eq!(rig.cgroup.pids(), Vec::<i32>::new());
}

#[test]
fn a_container_sees_nothing_of_the_host_through_the_pods_init() {
    let rig = Rig::start();
    let mut client = rig.client();
    client.done(Request::MakeNamespaces(proto::MakeNamespaces {
        pid: true,
        ..rig.namespaces()
    }));
    let script =
        "ls /proc/1/root; ls /proc/1/fd | wc -l; grep CapEff /proc/1/status; ls /proc/1/cwd/";
    let (_, log) = {
        let (mut launch, fds) = rig.launch("c", &["sh", "-c", script]);
        launch.new_pid = false;
        launch.join_pid = true;
        // Also not one that may look into everything.
        let process = launch.process.as_mut().unwrap();
        let all = berth_sys::caps::known();
        (
            process.cap_bounding,
            process.cap_effective,
            process.cap_permitted,
        ) = (all, all, all);
        client.started(Request::Launch(launch), &fds);
        client.exited("c", "");
        ((), rig.log("c"))
    };
    assert_eq!(stdout(&log), ["4", "CapEff:\t0000000000000000"], "{log:?}");
}

#[test]
fn a_pod_with_a_user_namespace_runs_as_nobody_of_the_host() {
    let rig = Rig::start();
    let mut client = rig.client();
    let map = vec![proto::IdRange {
        container_id: 0,
        host_id: 200_000,
        length: 65536,
    }];
    client.done(Request::MakeNamespaces(proto::MakeNamespaces {
        uid_map: map.clone(),
        gid_map: map,
        sysctls: vec![proto::Sysctl {
            path: "net/ipv4/ip_unprivileged_port_start".into(),
            value: "80".into(),
        }],
        ..rig.namespaces()
    }));
    let (mut launch, fds) = rig.launch(
        "c",
        &["sh", "-c", "id -u; cat /proc/self/uid_map; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; sleep 1000"],
    );
    (
        launch.join_user,
        launch.join_net,
        launch.join_ipc,
        launch.join_uts,
    ) = (true, true, true, true);
    // Devices cannot be made there; the daemon binds the host's.
    launch.devices.clear();
    let mut fds = fds;
    for name in ["null", "zero"] {
        launch.mounts.push(proto::MountStep {
            target: format!("/dev/{name}"),
            file: true,
            fd: Some(fds.len() as u32),
            ..Default::default()
        });
        fds.push(mount::clone_tree(Path::new(&format!("/dev/{name}")), false).unwrap());
    }
    {
        // As if unpacked for it.
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(rig.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (started, _) = client.started(Request::Launch(launch), &fds);
    let status = std::fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    assert!(status.contains("Uid:\t200000\t200000"), "{status}");
    let mut request = proto::Exec {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: Some(process(&["id", "-u"])),
        stdout_fd: Some(0),
        ..Default::default()
    };
    request.cgroup = Some(rig.cgroup.proto());
    let (read, write) = std::io::pipe().unwrap();
    let out = [OwnedFd::from(write)];
    client.started(Request::Exec(request), &out);
    drop(out);
    assert_eq!(std::io::read_to_string(read).unwrap(), "0\n");
    let lines = until("the log has it", || {
        let lines = stdout(&rig.log("c"));
        (lines.len() >= 3).then_some(lines)
    });
    assert_eq!(lines[0], "0");
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        ["0", "200000", "65536"]
    );
    assert_eq!(lines[2], "80");
    client.signal("c", "", libc::SIGKILL);
    client.exited("c", "");
}

#[test]
fn sysctls_of_the_host_are_refused() {
    let rig = Rig::start();
    let mut client = rig.client();
    for path in [
        "kernel/core_pattern",
        "net/../kernel/core_pattern",
        "/etc/passwd",
        "vm/swappiness",
    ] {
        let sysctls = vec![proto::Sysctl {
            path: path.into(),
            value: "x".into(),
        }];
        let request = proto::MakeNamespaces {
            sysctls,
            ..rig.namespaces()
        };
        let failure = client.failure(Request::MakeNamespaces(request), &[]);
        assert_eq!(
            (failure.stage.as_str(), failure.errno),
            ("sysctl", libc::EPERM),
            "{path}"
        );
    }
    assert!(!client.inspect().namespaces_made);
}

#[test]
fn hostile_clients_lose_their_connection_and_nothing_else() {
    let mut rig = Rig::with_namespaces();
    let hostile: [&[u8]; 4] = [
        &[0xff; 64],
        &[3, 0, 0, 0, 0xff, 0xff, 0xff],
        &[0, 0, 0x40, 1, 1, 1],
        &[8, 0, 0, 0, 1],
    ];
    for bytes in hostile {
        let client = rig.client();
        (&client.socket).write_all(bytes).unwrap();
        client.socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut &client.socket, &mut rest);
        assert!(rest.is_empty());
    }
    // More connections than it takes: the rest waits for its turn.
    let dir = std::fs::File::open(rig.dir.path()).unwrap();
    let crowd: Vec<_> = (0..68)
        .map(|_| berth_sys::fd::connect_at(&dir, "m.sock").unwrap())
        .collect();
    drop(crowd);
    assert!(rig.is_alive());
    assert_eq!(rig.run("c", "true").0.exit_code, 0);

    // Descriptor numbers that are none, and a request of a later daemon.
    let mut client = rig.client();
    let (mut launch, fds) = rig.launch("d", &["true"]);
    launch.rootfs_fd = 99;
    let failure = client.failure(Request::Launch(launch), &fds);
    assert_eq!(failure.errno, libc::EBADF);
    berth_sys::wire::send_frame(&client.socket, &[8, 9, 0xa2, 6, 0], &[fds[0].as_fd()]).unwrap();
    match client.answer(9).0 {
        proto::reply::Body::Failure(failure) => assert_eq!(failure.errno, libc::ENOSYS),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_monitor_ends_when_told_and_not_before_its_containers() {
    let mut rig = Rig::with_namespaces();
    let (launch, fds) = rig.launch("c", &["sleep", "1000"]);
    let mut client = rig.client();
    client.started(Request::Launch(launch), &fds);
    let failure = client.failure(Request::Shutdown(proto::Shutdown {}), &[]);
    assert_eq!(failure.errno, libc::EBUSY);
    client.signal("c", "", libc::SIGTERM);
    client.signal("c", "", libc::SIGKILL);
    client.exited("c", "");
    client.done(Request::Shutdown(proto::Shutdown {}));
    assert!(rig.wait_for_end().success());
}

#[test]
fn a_process_that_holds_the_streams_delays_the_exit_only_so_long() {
    let rig = Rig::with_namespaces();
    let (mut launch, fds) = rig.launch("c", &["sh", "-c", "echo before; sleep 1000 & exit 0"]);
    // The host's PID namespace, and no cgroup to sweep: the sleeper stays.
    launch.new_pid = false;
    launch.cgroup = None;
    launch.new_cgroup = false;
    let mut client = rig.client();
    let start = std::time::Instant::now();
    client.started(Request::Launch(launch), &fds);
    let exited = client.exited("c", "");
    assert_eq!(exited.exit_code, 0);
    assert!(start.elapsed() < std::time::Duration::from_secs(4));
    assert_eq!(stdout(&rig.log("c")), ["before"]);
}
