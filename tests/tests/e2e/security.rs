//! What a container's process may do: users, capabilities, seccomp, masked
//! paths, and the known ways out.

use berth_proto::runtime_v1::{
    self as cri, SupplementalGroupsPolicy, security_profile::ProfileType,
};
use berth_tests::node::spec;
use berth_tests::{Format, Image, Layer, LinuxConfig, Node, Packing, Pod};
use serde_json::json;
use tonic::Code;

fn value(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

fn profile(kind: ProfileType) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type: kind.into(),
        ..Default::default()
    })
}

/// One field of "probe status" run in a container.
fn field(status: &str, name: &str) -> String {
    let line = status
        .lines()
        .find(|line| line.split(':').next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{status}"));
    line.split_once(':')
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

fn status_of(pod: &Pod<'_>, change: impl FnOnce(&mut cri::ContainerConfig)) -> String {
    let mut config = pod.container(&["probe", "status"]);
    change(&mut config);
    pod.output_as(config)
}

// Users.

#[test]
fn the_user_is_a_uid_a_name_or_the_images() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let uids = |change: &dyn Fn(&mut cri::ContainerConfig)| {
        let status = status_of(&pod, change);
        (field(&status, "Uid"), field(&status, "Gid"))
    };
    let all = |id: u32| vec![id.to_string(); 4].join("\t");
    assert_eq!(uids(&|_| {}), (all(0), all(0)));
    let by_uid = uids(&|config| config.security().run_as_user = value(1000));
    assert_eq!(
        by_uid,
        (all(1000), all(1000)),
        "the group is the one in passwd"
    );
    let by_unknown = uids(&|config| config.security().run_as_user = value(4711));
    assert_eq!(by_unknown, (all(4711), all(0)));
    let by_both = uids(&|config| {
        config.security().run_as_user = value(1000);
        config.security().run_as_group = value(50);
    });
    assert_eq!(by_both, (all(1000), all(50)));
    let by_name = uids(&|config| config.security().run_as_username = "alice".to_owned());
    assert_eq!(by_name, (all(1000), all(1000)));
}

#[test]
fn the_images_user_may_be_any_of_the_four_forms() {
    let node = Node::start();
    let pod = node.run_pod("web");
    for (user, uid, gid) in [
        ("1000", 1000, 1000),
        ("alice", 1000, 1000),
        ("1:staff", 1, 50),
        ("alice:2000", 1000, 2000),
    ] {
        let image = Image::builder(Format::Oci)
            .base()
            .run("User", json!(user))
            .build();
        let reference = node.push("user", &user.replace(':', "-"), &image);
        node.pull(&reference).unwrap();
        let status = status_of(&pod, |config| config.image = Some(spec(&reference)));
        assert_eq!(
            field(&status, "Uid").split('\t').next(),
            Some(&*uid.to_string()),
            "{user}"
        );
        assert_eq!(
            field(&status, "Gid").split('\t').next(),
            Some(&*gid.to_string()),
            "{user}"
        );
    }
}

#[test]
fn a_user_the_image_does_not_know_is_refused_by_name() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.security().run_as_username = "mallory".to_owned();
    let err = match pod.try_create(config) {
        Err(err) => err,
        Ok(container) => container.start().unwrap_err(),
    };
    assert!(err.message().contains("mallory"), "{err}");
}

#[test]
fn supplemental_groups_are_merged_with_the_images_or_not() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let groups = |policy: SupplementalGroupsPolicy| {
        let mut config = pod.container(&["probe", "sleep"]);
        config.security().run_as_user = value(1000);
        config.security().supplemental_groups = vec![1234, 5678];
        config.security().supplemental_groups_policy = policy.into();
        let container = pod.start_as(config);
        let seen = container.exec(&["probe", "status"]);
        let mut seen: Vec<i64> = field(&seen, "Groups")
            .split_whitespace()
            .map(|g| g.parse().unwrap())
            .collect();
        seen.sort_unstable();
        let user = container.status().user.unwrap().linux.unwrap();
        let mut told = user.supplemental_groups;
        told.sort_unstable();
        assert_eq!((user.uid, user.gid), (1000, 1000));
        (seen, told)
    };
    let merged = vec![50, 1000, 1234, 2000, 5678];
    let (seen, told) = groups(SupplementalGroupsPolicy::Merge);
    assert_eq!(told, merged);
    assert!(
        merged.iter().all(|gid| *gid == 1000 || seen.contains(gid)),
        "{seen:?}"
    );
    let (seen, told) = groups(SupplementalGroupsPolicy::Strict);
    assert_eq!(told, [1000, 1234, 5678]);
    assert!(!seen.contains(&50) && !seen.contains(&2000), "{seen:?}");
}

#[test]
fn a_group_without_a_user_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.security().run_as_group = value(1000);
    let err = pod.try_create(config).err().expect("a group alone");
    assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");

    let mut config = node.pod_config("other");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().run_as_group = value(1000);
    let err = node.try_run(config).err().expect("a group alone");
    assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");
}

// Capabilities.

/// Source: linux/capability.h.
const CAP_CHOWN: u64 = 1 << 0;
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_NET_RAW: u64 = 1 << 13;
const CAP_SYS_ADMIN: u64 = 1 << 21;
/// What containerd and Docker give by default: CHOWN DAC_OVERRIDE FOWNER FSETID
/// KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP.
const DEFAULT: u64 = 0xa804_25fb;

fn caps(status: &str, name: &str) -> u64 {
    u64::from_str_radix(&field(status, name), 16).unwrap()
}

#[test]
fn capabilities_are_the_usual_ones_with_what_is_added_and_dropped() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let run = |add: &[&str], drop: &[&str]| {
        status_of(&pod, |config| {
            let caps = config.security().capabilities.get_or_insert_default();
            caps.add_capabilities = add.iter().map(|&cap| cap.to_owned()).collect();
            caps.drop_capabilities = drop.iter().map(|&cap| cap.to_owned()).collect();
        })
    };
    let plain = run(&[], &[]);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(caps(&plain, set), DEFAULT, "{set}");
    }
    assert_eq!(
        caps(&plain, "CapInh"),
        0,
        "inheritable ones were CVE-2022-24769"
    );
    assert_eq!(caps(&plain, "CapAmb"), 0);
    assert_eq!(
        caps(&run(&["NET_ADMIN"], &[]), "CapEff"),
        DEFAULT | CAP_NET_ADMIN
    );
    assert_eq!(caps(&run(&[], &["CHOWN"]), "CapEff"), DEFAULT & !CAP_CHOWN);
    assert_eq!(
        caps(&run(&[], &["CAP_NET_RAW", "chown"]), "CapEff"),
        DEFAULT & !(CAP_NET_RAW | CAP_CHOWN)
    );
    assert_eq!(caps(&run(&[], &["ALL"]), "CapBnd"), 0);
    assert_eq!(caps(&run(&["CHOWN"], &["ALL"]), "CapEff"), CAP_CHOWN);
    let all = caps(&run(&["ALL"], &[]), "CapEff");
    assert_ne!(all & CAP_SYS_ADMIN, 0);
    let most = caps(&run(&["ALL"], &["SYS_ADMIN"]), "CapEff");
    assert_eq!(most, all & !CAP_SYS_ADMIN);
}

#[test]
fn a_user_other_than_root_has_no_effective_capabilities() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let status = status_of(&pod, |config| config.security().run_as_user = value(1000));
    assert_eq!(caps(&status, "CapEff"), 0);
    assert_eq!(caps(&status, "CapPrm"), 0);
    assert_eq!(caps(&status, "CapBnd"), DEFAULT);
}

#[test]
fn ambient_capabilities_reach_a_user_other_than_root() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let status = status_of(&pod, |config| {
        config.security().run_as_user = value(1000);
        let caps = config.security().capabilities.get_or_insert_default();
        caps.add_ambient_capabilities = vec!["NET_ADMIN".to_owned()];
    });
    assert_ne!(caps(&status, "CapEff") & CAP_NET_ADMIN, 0, "{status}");
    assert_ne!(caps(&status, "CapAmb") & CAP_NET_ADMIN, 0, "{status}");
}

#[test]
fn a_capability_nobody_knows_is_refused_by_name() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config
        .security()
        .capabilities
        .get_or_insert_default()
        .add_capabilities = vec!["FLY".to_owned()];
    let err = pod.try_create(config).err().expect("no such capability");
    assert_eq!(err.code(), Code::InvalidArgument, "{err:?}");
    assert!(err.message().contains("FLY"), "{err}");
}

#[test]
fn an_exec_has_the_containers_rights_and_no_more() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().run_as_user = value(1000);
    config.security().no_new_privs = true;
    config.security().seccomp = profile(ProfileType::RuntimeDefault);
    config
        .security()
        .capabilities
        .get_or_insert_default()
        .drop_capabilities = vec!["ALL".to_owned()];
    let container = pod.start_as(config);
    let status = container.exec(&["probe", "status"]);
    assert_eq!(field(&status, "Uid"), ["1000"; 4].join("\t"));
    assert_eq!(caps(&status, "CapBnd"), 0);
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Seccomp"), "2");
}

#[test]
fn no_new_privs_makes_setuid_programs_powerless() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let run = |flag: bool| {
        let mut config = pod.container(&["setuid-probe", "status"]);
        config.security().run_as_user = value(1000);
        config.security().no_new_privs = flag;
        field(&pod.output_as(config), "Uid")
    };
    assert_eq!(run(false), "1000\t0\t0\t0");
    assert_eq!(run(true), "1000\t1000\t1000\t1000");
}

#[test]
fn a_privileged_container_has_every_capability_and_the_hosts_devices() {
    let node = Node::start();
    let mut config = node.pod_config("web");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = node.run(config);
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().privileged = true;
    config.security().masked_paths.clear();
    config.security().readonly_paths.clear();
    let container = pod.start_as(config);
    let status = container.exec(&["probe", "status"]);
    let mine = std::fs::read_to_string("/proc/self/status").unwrap();
    assert_eq!(
        caps(&status, "CapEff"),
        caps(&mine, "CapEff"),
        "all that the daemon has itself"
    );
    assert_eq!(field(&status, "Seccomp"), "0");
    container.exec(&["mount", "-t", "tmpfs", "none", "/www"]);
    container.exec(&[
        "sh",
        "-c",
        "test -w /proc/sys/kernel/domainname && test -c /dev/kmsg",
    ]);
}

#[test]
fn a_privileged_container_in_an_unprivileged_pod_is_refused() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.security().privileged = true;
    let err = pod
        .try_create(config)
        .err()
        .expect("the pod is not privileged");
    assert!(err.message().contains("privileged"), "{err}");
}

// Seccomp.

#[test]
fn the_default_seccomp_profile_blocks_what_unconfined_allows() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let unshare = |kind: Option<ProfileType>| {
        let mut config = pod.container(&["unshare", "-U", "true"]);
        config.security().seccomp = kind.and_then(profile);
        pod.start_as(config).wait_for_exit().exit_code
    };
    assert_eq!(unshare(Some(ProfileType::Unconfined)), 0);
    assert_ne!(unshare(Some(ProfileType::RuntimeDefault)), 0);
    let mode = |kind: ProfileType| {
        let status = status_of(&pod, |config| config.security().seccomp = profile(kind));
        field(&status, "Seccomp")
    };
    assert_eq!(mode(ProfileType::RuntimeDefault), "2");
    assert_eq!(mode(ProfileType::Unconfined), "0");
}

#[test]
fn the_default_seccomp_profile_opens_with_the_capability_a_call_needs() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mount = |admin: bool| {
        let mut config = pod.container(&["mount", "-t", "tmpfs", "none", "/www"]);
        config.security().seccomp = profile(ProfileType::RuntimeDefault);
        // Whose default profile denies mounts, whatever the capabilities.
        config.security().apparmor = profile(ProfileType::Unconfined);
        if admin {
            config
                .security()
                .capabilities
                .get_or_insert_default()
                .add_capabilities = vec!["SYS_ADMIN".to_owned()];
        }
        pod.start_as(config).wait_for_exit().exit_code
    };
    assert_ne!(mount(false), 0);
    assert_eq!(mount(true), 0);
}

#[test]
fn without_any_profile_a_container_is_unconfined_unless_the_node_says_otherwise() {
    let node = Node::start();
    let pod = node.run_pod("web");
    assert_eq!(field(&status_of(&pod, |_| {}), "Seccomp"), "0");
    let strict = Node::options()
        .config("[runtime]\nunset_seccomp = \"runtime/default\"\n")
        .start();
    let pod = strict.run_pod("web");
    assert_eq!(field(&status_of(&pod, |_| {}), "Seccomp"), "2");
}

#[test]
fn a_local_seccomp_profile_that_is_not_there_is_refused_by_name() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["true"]);
    config.security().seccomp = Some(cri::SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: "/no/such/profile.json".to_owned(),
    });
    let err = match pod.try_create(config) {
        Err(err) => err,
        Ok(container) => container.start().unwrap_err(),
    };
    assert!(err.message().to_lowercase().contains("seccomp"), "{err}");
}

// The root file system and /proc.

#[test]
fn a_read_only_root_stays_so_and_dev_and_mounts_do_not() {
    let node = Node::start();
    let shared = node.root().join("volume");
    std::fs::create_dir(&shared).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().readonly_rootfs = true;
    config.mount(&shared, "/volume");
    let container = pod.start_as(config);
    let refused = container.try_exec(&["touch", "/etc/x"], 10).unwrap();
    assert_ne!(refused.exit_code, 0);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only"));
    container.exec(&["touch", "/volume/x", "/dev/shm/x"]);
    assert!(shared.join("x").exists());
}

#[test]
fn masked_paths_are_empty_or_unreadable() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().masked_paths.push("/www".to_owned());
    config.security().masked_paths.push("/etc/group".to_owned());
    config
        .security()
        .masked_paths
        .push("/no/such/path".to_owned());
    let container = pod.start_as(config);
    assert_eq!(container.exec(&["ls", "-A", "/www"]), "");
    assert_eq!(container.exec(&["cat", "/etc/group"]), "");
    assert_eq!(
        container.exec(&["cat", "/proc/keys", "/proc/timer_list"]),
        ""
    );
    assert_eq!(container.exec(&["ls", "-A", "/sys/firmware"]), "");
    let write = container
        .try_exec(&["sh", "-c", "echo x > /www/x"], 10)
        .unwrap();
    assert_ne!(write.exit_code, 0, "a masked directory takes nothing");
}

#[test]
fn read_only_paths_refuse_writes() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    for path in ["/proc/sys/kernel/domainname", "/proc/sysrq-trigger"] {
        let answer = container
            .try_exec(&["sh", "-c", &format!("echo b > {path}")], 10)
            .unwrap();
        assert_ne!(answer.exit_code, 0, "{path} was written");
    }
}

#[test]
fn without_masked_and_read_only_paths_proc_is_open() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().masked_paths.clear();
    config.security().readonly_paths.clear();
    let container = pod.start_as(config);
    // Its own UTS namespace's: nothing of the machine changes.
    container.exec(&[
        "sh",
        "-c",
        "echo test.example > /proc/sys/kernel/domainname",
    ]);
    container.exec(&["sh", "-c", "test -r /proc/timer_list || test -r /proc/keys"]);
}

// Ways out.

#[test]
fn nothing_but_the_three_standard_streams_is_open() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sh", "-c", "probe fds; exec probe sleep"]);
    container.wait_for_log("2 ");
    let check = |text: &str| {
        for line in text.lines() {
            let (number, target) = line.split_once(' ').unwrap();
            // The one that lists the folder itself.
            let own = target.starts_with("/proc/");
            assert!(
                own || matches!(number, "0" | "1" | "2"),
                "leaked: {line}\nof\n{text}"
            );
            assert!(
                own || target.starts_with("pipe:") || target == "/dev/null",
                "{line}"
            );
        }
    };
    check(&container.stdout());
    check(&container.exec(&["probe", "fds"]));
}

#[test]
fn proc_self_exe_is_never_a_program_of_the_hosts() {
    let node = Node::start();
    let pod = node.run_pod("web");
    // The attack of CVE-2019-5736: an image whose program is /proc/self/exe.
    let image = Image::builder(Format::Oci)
        .base()
        .layer(
            &Layer::new().symlink("bin/evil", "/proc/self/exe"),
            Packing::Gzip,
        )
        .build();
    let reference = node.push("evil", "1", &image);
    node.pull(&reference).unwrap();
    for program in ["/proc/self/exe", "/bin/evil"] {
        let mut config = pod.container(&[program, "status"]);
        config.image = Some(spec(&reference));
        let container = pod.create(config);
        if container.start().is_ok() {
            let status = container.wait_for_exit();
            assert_ne!(status.exit_code, 0, "{program} ran: {}", container.stdout());
        }
    }
    let container = pod.start(&["sleep", "1000"]);
    if let Ok(answer) = container.try_exec(&["/proc/self/exe", "--version"], 10) {
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(!text.contains("berth"), "{text}");
    }
    let before = std::fs::read(berth_tests::binaries::folder().join("berth-monitor")).unwrap();
    let write = "for p in /proc/[0-9]*/exe; do echo x >> $p; done 2>/dev/null; true";
    container.exec(&["sh", "-c", write]);
    let after = std::fs::read(berth_tests::binaries::folder().join("berth-monitor")).unwrap();
    assert!(before == after, "the monitor's program was written to");
}

#[test]
fn a_mount_target_that_is_a_symlink_stays_inside() {
    let node = Node::start();
    let outside = node.root().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let source = node.root().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("from-source"), "x").unwrap();
    let up = "../".repeat(20);
    let links = Layer::new()
        .symlink("absolute", &outside.display().to_string())
        .symlink(
            "relative",
            &format!(
                "{up}{}",
                outside.display().to_string().trim_start_matches('/')
            ),
        )
        .symlink("inside", "/www");
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&links, Packing::Gzip)
        .build();
    let reference = node.push("links", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    for target in ["/absolute/sub", "/relative/sub", "/absolute", "/inside"] {
        let mut config = pod.container(&["sleep", "1000"]);
        config.image = Some(spec(&reference));
        config.mount(&source, target);
        if let Ok(container) = pod.try_create(config)
            && container.start().is_ok()
        {
            assert_eq!(container.exec(&["ls", target]), "from-source\n", "{target}");
        }
        let made: Vec<_> = std::fs::read_dir(&outside).unwrap().flatten().collect();
        assert!(made.is_empty(), "{target}: {made:?}");
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !table.contains(&outside.display().to_string()),
            "{target} is mounted outside"
        );
    }
}

#[test]
fn a_working_directory_does_not_lead_outside() {
    let node = Node::start();
    let pod = node.run_pod("web");
    // The attack of CVE-2024-21626: a leaked descriptor as working directory.
    for fd in 3..16 {
        for dir in [
            format!("/proc/self/fd/{fd}"),
            format!("/proc/self/fd/{fd}/../../.."),
        ] {
            let mut config = pod.container(&["ls", "-a"]);
            config.working_dir = dir.clone();
            let Ok(container) = pod.try_create(config) else {
                continue;
            };
            if container.start().is_ok() {
                container.wait_for_exit();
                assert!(!container.stdout().contains("lost+found"), "{dir}");
            }
        }
    }
    let outside = node.root().join("made-by-cwd");
    let up = "../".repeat(20);
    let mut config = pod.container(&["pwd"]);
    config.working_dir = format!("/{up}{}", outside.strip_prefix("/").unwrap().display());
    if let Ok(container) = pod.try_create(config) {
        _ = container.start();
    }
    assert!(!outside.exists());
}

#[test]
fn a_masked_path_that_is_a_symlink_masks_nothing_of_the_hosts() {
    let node = Node::start();
    let victim = node.root().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let layer = Layer::new().symlink("trap", &victim.display().to_string());
    let image = Image::builder(Format::Oci)
        .base()
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("trap", "1", &image);
    node.pull(&reference).unwrap();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    config.image = Some(spec(&reference));
    config.security().masked_paths = vec!["/trap".to_owned()];
    if let Ok(container) = pod.try_create(config) {
        _ = container.start();
    }
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn the_host_is_not_to_be_seen() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let container = pod.start(&["sleep", "1000"]);
    let table = container.exec(&["cat", "/proc/self/mountinfo"]);
    // Overlay tells the paths of its layers where they were given as paths.
    let points: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    assert!(
        points.iter().all(|point| !point.contains("berth")),
        "{points:?}"
    );
    let processes = container.exec(&["ps"]);
    assert!(!processes.contains("berth"), "{processes}");
    let limits = container.exec(&["cat", "/proc/self/limits"]);
    let nofile = limits
        .lines()
        .find(|l| l.starts_with("Max open files"))
        .unwrap();
    assert!(
        nofile.contains(" 1024 "),
        "limits are not inherited: {nofile}"
    );
    assert!(
        container
            .exec(&["probe", "status"])
            .contains("Umask:\t0022")
    );
}

#[test]
fn a_device_is_there_only_when_asked_for_and_only_then_works() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let seen = pod.output(&["ls", "/dev"]);
    let names: Vec<_> = seen.split_whitespace().collect();
    for name in [
        "null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "fd", "stdin",
    ] {
        assert!(names.contains(&name), "no /dev/{name} in {seen}");
    }
    assert!(!names.contains(&"kmsg"), "{seen}");
    let made = pod.start(&[
        "sh",
        "-c",
        "mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg | head -c 1",
    ]);
    assert_eq!(made.wait_for_exit().exit_code, 0, "head ends with 0");
    assert_eq!(made.stdout(), "", "a device made by hand cannot be read");

    let mut config = pod.container(&["sh", "-c", "test -c /dev/mine && head -c 0 /dev/mine"]);
    config.devices = vec![cri::Device {
        host_path: "/dev/zero".to_owned(),
        container_path: "/dev/mine".to_owned(),
        permissions: "r".to_owned(),
    }];
    pod.output_as(config);
}
