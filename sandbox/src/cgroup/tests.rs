//! On the host's own cgroups, beneath a directory that each test makes and removes. They need
//! root.

use super::*;
use crate::container_spec::HugepageLimit;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const DEADLINE: Duration = Duration::from_secs(20);

/// A pod's cgroup that is gone when the test is, however it ends.
struct Ground {
    cgroups: Cgroups,
    top: String,
    parent: Parent,
    children: Vec<Child>,
}

impl Ground {
    fn new() -> Self {
        let top = format!("/berth-test-{}", &ContainerId::random().unwrap().short());
        let settings = Settings {
            driver: DriverChoice::Cgroupfs,
            default_parent: top.clone(),
            ..Settings::default()
        };
        let cgroups = Cgroups::detect(settings).unwrap();
        let parent = cgroups
            .ensure_parent(&format!("{top}/pod"))
            .expect("these tests need root");
        Self {
            cgroups,
            top,
            parent,
            children: Vec::new(),
        }
    }

    fn create(&self, resources: &Resources) -> Result<Cgroup, Error> {
        let id = ContainerId::random().unwrap();
        self.cgroups
            .create(&self.parent.path, &id, resources, &DeviceRule::defaults())
    }

    /// A process of `argv` in the cgroup, in every hierarchy.
    fn run(&mut self, cgroup: &Cgroup, argv: &[&str]) -> i32 {
        let child = Command::new(argv[0])
            .args(&argv[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        self.children.push(child);
        for directory in cgroup.all() {
            file::write(&directory.join("cgroup.procs"), &pid.to_string()).unwrap();
        }
        pid
    }

    /// To the first of them: they wait for it, so that they do nothing before they are inside.
    fn say(&mut self, line: &str) {
        std::io::Write::write_all(self.children[0].stdin.as_mut().unwrap(), line.as_bytes())
            .unwrap();
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let top = self.cgroups.at(&self.top).unwrap();
        let killed = top.kill_all(DEADLINE);
        for child in &mut self.children {
            let _ = child.wait();
        }
        let removed = top.remove(DEADLINE);
        if !std::thread::panicking() {
            killed.unwrap();
            removed.unwrap();
        }
    }
}

fn read(cgroup: &Cgroup, controller: &str, name: &str) -> String {
    let path = cgroup.directory(controller).unwrap().join(name);
    file::read(&path).unwrap().trim().to_owned()
}

/// What a file says, by the version of this host.
fn either<T>(cgroup: &Cgroup, v1: T, v2: T) -> T {
    match cgroup.version() {
        Version::V1 => v1,
        Version::V2 => v2,
    }
}

fn limits() -> Resources {
    Resources {
        cpu_period: Some(100_000),
        cpu_quota: Some(50_000),
        cpu_shares: Some(512),
        memory_limit_bytes: Some(64 << 20),
        pids_limit: Some(100),
        cpuset_cpus: "0".to_owned(),
        hugepages: vec![HugepageLimit {
            page_size: "2MB".to_owned(),
            limit_bytes: 0,
        }],
        ..Resources::default()
    }
}

#[test]
fn limits_are_what_was_asked_for() {
    let ground = Ground::new();
    let cgroup = ground.create(&limits()).unwrap();
    match cgroup.version() {
        Version::V1 => {
            assert_eq!(read(&cgroup, "cpu", "cpu.shares"), "512");
            assert_eq!(read(&cgroup, "cpu", "cpu.cfs_quota_us"), "50000");
            assert_eq!(read(&cgroup, "memory", "memory.limit_in_bytes"), "67108864");
            assert_eq!(
                read(&cgroup, "memory", "memory.memsw.limit_in_bytes"),
                "67108864"
            );
            assert!(!read(&cgroup, "cpuset", "cpuset.mems").is_empty());
            assert!(read(&cgroup, "devices", "devices.list").contains("c 1:3 rwm"));
            assert!(!read(&cgroup, "devices", "devices.list").contains("a *:*"));
        }
        Version::V2 => {
            assert_eq!(read(&cgroup, "cpu", "cpu.weight"), "20");
            assert_eq!(read(&cgroup, "cpu", "cpu.max"), "50000 100000");
            assert_eq!(read(&cgroup, "memory", "memory.max"), "67108864");
        }
    }
    assert_eq!(read(&cgroup, "pids", "pids.max"), "100");
    assert_eq!(read(&cgroup, "cpuset", "cpuset.cpus"), "0");
}

#[test]
fn limits_grow_and_shrink() {
    let ground = Ground::new();
    let cgroup = ground.create(&limits()).unwrap();
    let name = either(&cgroup, "memory.limit_in_bytes", "memory.max");
    for (limit, sum) in [
        (512i64 << 20, None),
        (16 << 20, Some(32i64 << 20)),
        (1 << 30, None),
    ] {
        let resources = Resources {
            memory_limit_bytes: Some(limit),
            memory_swap_limit_bytes: sum,
            ..Resources::default()
        };
        ground
            .cgroups
            .update(&cgroup, &resources, &resources)
            .unwrap();
        assert_eq!(read(&cgroup, "memory", name), limit.to_string());
    }
    let none = Resources {
        memory_limit_bytes: Some(-1),
        ..Resources::default()
    };
    ground.cgroups.update(&cgroup, &none, &none).unwrap();
    assert_eq!(cgroup.stats().unwrap().memory.unwrap().limit, None);
    // What is not given stays.
    assert_eq!(read(&cgroup, "pids", "pids.max"), "100");
    let quotas = [(200_000u64, 20_000i64), (1_000, 1_000), (50_000, -1)];
    for (period, quota) in quotas {
        let resources = Resources {
            cpu_period: Some(period),
            cpu_quota: Some(quota),
            ..Resources::default()
        };
        ground
            .cgroups
            .update(&cgroup, &resources, &resources)
            .unwrap();
    }
}

#[test]
fn a_quota_moves_within_what_the_parent_has() {
    let ground = Ground::new();
    let share = |period, quota| Resources {
        cpu_period: Some(period),
        cpu_quota: Some(quota),
        ..Resources::default()
    };
    let pod = ground.cgroups.at(&ground.parent.path).unwrap();
    ground
        .cgroups
        .update(&pod, &share(100_000, 50_000), &share(100_000, 50_000))
        .unwrap();
    let cgroup = ground.create(&share(100_000, 50_000)).unwrap();
    ground
        .cgroups
        .update(&cgroup, &share(10_000, 5_000), &share(10_000, 5_000))
        .unwrap();
    ground
        .cgroups
        .update(&cgroup, &share(200_000, 100_000), &share(200_000, 100_000))
        .unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let ground = Ground::new();
    let pod = ground.cgroups.at(&ground.parent.path).unwrap();
    let cases = [
        Resources {
            memory_limit_bytes: Some(64 << 20),
            memory_swap_limit_bytes: Some(1 << 20),
            ..Resources::default()
        },
        Resources {
            cpuset_cpus: "4000-5000".to_owned(),
            ..Resources::default()
        },
        Resources {
            hugepages: vec![HugepageLimit {
                page_size: "../x".to_owned(),
                limit_bytes: 0,
            }],
            ..Resources::default()
        },
        Resources {
            unified: [("cgroup.procs".to_owned(), "1".to_owned())].into(),
            ..Resources::default()
        },
    ];
    for resources in cases {
        ground.create(&resources).unwrap_err();
        for directory in pod.all() {
            let inside = std::fs::read_dir(directory).unwrap().flatten();
            let left: Vec<_> = inside.filter(|e| e.file_type().unwrap().is_dir()).collect();
            assert!(left.is_empty(), "{resources:?} left {left:?}");
        }
    }
}

#[test]
fn creating_twice_is_creating_once() {
    let ground = Ground::new();
    let id = ContainerId::random().unwrap();
    let create = || {
        ground
            .cgroups
            .create(&ground.parent.path, &id, &limits(), &[])
            .unwrap()
    };
    assert_eq!(create(), create());
}

#[test]
fn a_process_that_forks_all_the_time_is_killed() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&limits()).unwrap();
    // Waits for a line, so that it forks only once it is inside.
    let pid = ground.run(
        &cgroup,
        &[
            "sh",
            "-c",
            "read x; while :; do (sleep 1000 & ) ; (setsid sleep 1000 &) ; done 2>&-",
        ],
    );
    ground.say("go\n");
    wait_for("it forks", || cgroup.pids().unwrap().len() > 10);
    assert!(!cgroup.is_empty().unwrap());
    assert!(cgroup.pids().unwrap().contains(&pid));
    cgroup.kill_all(DEADLINE).unwrap();
    assert!(cgroup.is_empty().unwrap());
    assert_eq!(cgroup.pids().unwrap(), Vec::<i32>::new());
    cgroup.remove(DEADLINE).unwrap();
    cgroup.remove(DEADLINE).unwrap();
    assert!(!cgroup.exists());
    cgroup.kill_all(DEADLINE).unwrap();
}

#[test]
fn killing_needs_no_help_from_the_kernel() {
    let mut ground = Ground::new();
    let mut cgroup = ground.create(&limits()).unwrap();
    if cgroup.version() == Version::V1 {
        ground.run(
            &cgroup,
            &["sh", "-c", "read x; while :; do (sleep 1000 &) ; done 2>&-"],
        );
        ground.say("go\n");
        wait_for("it forks", || cgroup.pids().unwrap().len() > 10);
        // As on a host without the unified hierarchy.
        let unified = cgroup.unified.take().unwrap();
        cgroup.kill_all(DEADLINE).unwrap();
        cgroup.remove(DEADLINE).unwrap();
        rustix::fs::rmdir(&unified).unwrap();
    }
}

#[test]
fn a_frozen_process_and_cgroups_inside_go_too() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&Resources::default()).unwrap();
    let inside: Vec<PathBuf> = cgroup
        .all()
        .map(|path| path.join("inside/deeper"))
        .collect();
    for path in &inside {
        std::fs::create_dir_all(path).unwrap();
    }
    let nested = ground
        .cgroups
        .at(&format!("{}/inside/deeper", cgroup.path()))
        .unwrap();
    if let Some(cpuset) = nested
        .directory("cpuset")
        .filter(|_| nested.version() == Version::V1)
    {
        v1::inherit_cpuset(cpuset, Path::new("/sys/fs/cgroup/cpuset")).unwrap();
    }
    let pid = ground.run(&nested, &["sleep", "1000"]);
    let (name, value) = either(&cgroup, ("freezer.state", "FROZEN"), ("cgroup.freeze", "1"));
    file::write(&cgroup.directory("freezer").unwrap().join(name), value).unwrap();
    assert_eq!(cgroup.pids().unwrap(), [pid]);
    cgroup.remove(Duration::ZERO).unwrap_err();
    cgroup.kill_all(DEADLINE).unwrap();
    cgroup.remove(DEADLINE).unwrap();
    assert!(!cgroup.exists());
}

#[test]
fn a_process_that_does_not_die_is_named() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&Resources::default()).unwrap();
    let pid = ground.run(&cgroup, &["sleep", "1000"]);
    let error = cgroup.remove(Duration::from_millis(30)).unwrap_err();
    assert!(matches!(error, Error::Remove { .. }), "{error}");
    assert_eq!(cgroup.pids().unwrap(), [pid]);
}

#[test]
fn statistics_count() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&limits()).unwrap();
    ground.run(&cgroup, &["sh", "-c", "read x; while :; do :; done"]);
    ground.say("go\n");
    wait_for("it uses the processor", || {
        cgroup.stats().unwrap().cpu.unwrap().usage_ns > 10_000_000
    });
    let stats = cgroup.stats().unwrap();
    assert_eq!(
        stats.pids.unwrap(),
        PidsStats {
            current: 1,
            limit: Some(100)
        }
    );
    let memory = stats.memory.unwrap();
    assert_eq!(memory.limit, Some(64 << 20));
    assert!(memory.working_set <= memory.usage && memory.available().unwrap() <= 64 << 20);
    assert_eq!(cgroup.oom_kills().unwrap(), Some(0));
    cgroup.pressure("cpu").unwrap();
}

/// Null may be opened, the kernel's log may not.
const OPENS: &str =
    "read x; true </dev/null && true >/dev/zero || exit 1; true </dev/kmsg && exit 2; exit 7";

#[test]
fn only_the_devices_allowed_can_be_opened() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&Resources::default()).unwrap();
    ground.run(&cgroup, &["sh", "-c", OPENS]);
    ground.say("go\n");
    assert_eq!(ground.children[0].wait().unwrap().code(), Some(7));
    let rest = [DeviceRule::everything()];
    let id = ContainerId::random().unwrap();
    let free = ground
        .cgroups
        .create(&ground.parent.path, &id, &Resources::default(), &rest);
    ground.run(&free.unwrap(), &["sh", "-c", OPENS]);
    std::io::Write::write_all(ground.children[1].stdin.as_mut().unwrap(), b"go\n").unwrap();
    assert_eq!(ground.children[1].wait().unwrap().code(), Some(2));
}

/// Also where v1 has the devices controller: the unified hierarchy takes programs.
#[test]
fn a_program_restricts_devices_too() {
    let mut ground = Ground::new();
    let id = ContainerId::random().unwrap();
    let cgroup = ground
        .cgroups
        .create(&ground.parent.path, &id, &Resources::default(), &[]);
    let cgroup = cgroup.unwrap();
    let rule = |allow, kind, major, minor, access: &str| DeviceRule {
        allow,
        kind,
        major,
        minor,
        access: access.to_owned(),
    };
    let Some(unified) = cgroup.unified() else {
        return;
    };
    let rules = [
        &DeviceRule::defaults()[..],
        // /dev/zero to be read only, then /dev/full not to be written.
        &[
            rule(false, DeviceKind::Char, Some(1), Some(5), "w"),
            rule(true, DeviceKind::Block, None, None, "rwm"),
            rule(false, DeviceKind::All, Some(1), Some(7), "w"),
        ],
    ];
    device::apply_v2(unified, &rules.concat()).unwrap();
    device::apply_v2(unified, &rules.concat()).unwrap();
    ground.run(
        &cgroup,
        &[
            "sh",
            "-c",
            "read x
             true </dev/null && true >/dev/null && true </dev/zero && true </dev/full || exit 1
             true >/dev/zero && exit 2; true >/dev/full && exit 3; true </dev/kmsg && exit 4
             exit 7",
        ],
    );
    ground.say("go\n");
    assert_eq!(ground.children[0].wait().unwrap().code(), Some(7));
}

#[test]
fn running_out_of_memory_is_counted() {
    let mut ground = Ground::new();
    let resources = Resources {
        memory_limit_bytes: Some(8 << 20),
        ..Resources::default()
    };
    let cgroup = ground.create(&resources).unwrap();
    ground.run(
        &cgroup,
        &[
            "sh",
            "-c",
            "read x; head -c 60000000 /dev/zero | tail -c 60000000",
        ],
    );
    ground.say("go\n");
    wait_for("the kernel kills", || {
        cgroup.oom_kills().unwrap() >= Some(1)
    });
}

#[test]
fn a_limit_below_the_usage_is_refused() {
    let mut ground = Ground::new();
    let resources = Resources {
        memory_limit_bytes: Some(256 << 20),
        ..Resources::default()
    };
    let cgroup = ground.create(&resources).unwrap();
    // tail keeps what it was asked for in memory and waits for more.
    ground.run(
        &cgroup,
        &[
            "sh",
            "-c",
            "read x; { head -c 60000000 /dev/zero; sleep 1000; } | tail -c 60000000",
        ],
    );
    ground.say("go\n");
    wait_for("it has the memory", || {
        cgroup.memory_usage().unwrap().unwrap() > 55_000_000
    });
    let less = Resources {
        memory_limit_bytes: Some(16 << 20),
        ..Resources::default()
    };
    let error = ground.cgroups.update(&cgroup, &less, &less).unwrap_err();
    assert!(matches!(error, Error::BelowUsage { .. }), "{error}");
    assert_eq!(cgroup.oom_kills().unwrap(), Some(0));
}

#[test]
fn what_berth_made_of_a_parent_goes_with_the_last_pod() {
    let ground = Ground::new();
    let a = ground
        .cgroups
        .ensure_parent(&format!("{}/shared/a", ground.top))
        .unwrap();
    let b = ground
        .cgroups
        .ensure_parent(&format!("{}/shared/b", ground.top))
        .unwrap();
    let exists = |path: &str| {
        ground
            .cgroups
            .at(&format!("{}{path}", ground.top))
            .unwrap()
            .exists()
    };
    ground.cgroups.remove_parent(&a).unwrap();
    assert!(!exists("/shared/a") && exists("/shared/b"));
    // After a restart the record of b is all there is.
    let settings = Settings {
        driver: DriverChoice::Cgroupfs,
        default_parent: ground.top.clone(),
        ..Settings::default()
    };
    let restarted = Cgroups::detect(settings).unwrap();
    let kept: Parent = serde_json::from_str(&serde_json::to_string(&b).unwrap()).unwrap();
    restarted.adopt_parent(&kept);
    restarted.remove_parent(&kept).unwrap();
    restarted.remove_parent(&kept).unwrap();
    assert!(!exists("/shared"));
    assert!(exists("/pod"));
}

#[test]
fn a_parent_that_was_there_is_not_berths() {
    let ground = Ground::new();
    let theirs = ground
        .cgroups
        .at(&format!("{}/theirs", ground.top))
        .unwrap();
    for directory in theirs.all() {
        std::fs::create_dir(directory).unwrap();
    }
    let parent = ground.cgroups.ensure_parent(theirs.path()).unwrap();
    assert!(
        parent.made.iter().all(|path| !path.ends_with("theirs")),
        "{parent:?}"
    );
    ground.cgroups.remove_parent(&parent).unwrap();
    assert!(theirs.exists());
}

#[test]
fn a_record_of_it_is_enough() {
    let mut ground = Ground::new();
    let cgroup = ground.create(&limits()).unwrap();
    let json = serde_json::to_string(&cgroup).unwrap();
    let again: Cgroup = serde_json::from_str(&json).unwrap();
    assert_eq!(again, cgroup);
    let told = again.for_monitor();
    match again.version() {
        Version::V1 => {
            let unified = again
                .unified()
                .map(|path| path.to_string_lossy().into_owned());
            assert_eq!(told.directory, unified.unwrap_or_default());
            // As the monitor does it, with any process.
            let pid = ground.run(&cgroup, &["sleep", "1000"]);
            for tasks in &told.tasks_files {
                std::fs::write(tasks, pid.to_string()).unwrap();
            }
            assert!(told.tasks_files.iter().any(|path| path.contains("/pids/")));
        }
        Version::V2 => assert!(Path::new(&told.directory).is_dir()),
    }
    assert!(Path::new(&told.oom_file).is_file());
    assert!(told.kill_file.is_empty() || Path::new(&told.kill_file).is_file());
}

#[test]
fn systemd_is_refused_where_it_cannot_work() {
    let settings = Settings {
        driver: DriverChoice::Systemd,
        ..Settings::default()
    };
    if Cgroups::detect(Settings::default()).unwrap().version() == Version::V1 {
        let error = Cgroups::detect(settings).unwrap_err();
        assert!(matches!(error, Error::SystemdOnV1 { .. }), "{error}");
    }
    let nowhere = Settings {
        root: PathBuf::from("/nonexistent"),
        ..Settings::default()
    };
    assert!(matches!(
        Cgroups::detect(nowhere),
        Err(Error::NotMounted { .. })
    ));
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited for this: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
