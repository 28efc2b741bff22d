//! Known ways out of a container, each tried from inside and judged from the
//! host: what it must not have touched is as it was.

use berth_proto::runtime_v1::{self as cri, NamespaceMode, security_profile::ProfileType};
use berth_tests::image::Entry;
use berth_tests::{Container, Format, Image, Layer, LinuxConfig, Node, Packing, Pod};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tonic::Code;

/// What no container may change on this machine.
#[derive(Debug, PartialEq, Eq)]
struct Precious {
    files: BTreeMap<PathBuf, Option<Vec<u8>>>,
    programs: Vec<Vec<u8>>,
    /// Mount points outside of the nodes of tests, which run side by side.
    mounts: Vec<String>,
}

impl Precious {
    fn look() -> Self {
        let mut paths: Vec<PathBuf> = [
            "core_pattern",
            "modprobe",
            "hostname",
            "sysrq",
            "poweroff_cmd",
            "randomize_va_space",
        ]
        .iter()
        .map(|name| Path::new("/proc/sys/kernel").join(name))
        .collect();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            // Only v1's have them; a cgroup of v2 may be another test's, and go.
            let files = ["release_agent", "notify_on_release"];
            let files = files.map(|name| hierarchy.path().join(name));
            paths.extend(files.into_iter().filter(|path| path.exists()));
        }
        paths.push("/sys/kernel/uevent_helper".into());
        let programs = ["berth", "berth-monitor"]
            .map(|name| fs::read(berth_tests::binaries::folder().join(name)).unwrap());
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| !point.contains("berth-test-") && !point.starts_with("/run/netns"))
            .map(str::to_owned);
        Self {
            files: paths
                .into_iter()
                .map(|path| (path.clone(), fs::read(path).ok()))
                .collect(),
            programs: programs.into(),
            mounts: mounts.collect(),
        }
    }

    #[track_caller]
    fn is_untouched(&self, what: &str) {
        let now = Self::look();
        // Whatever got through must not stay: this is somebody's machine.
        for (path, before) in &self.files {
            if let Some(before) = before
                && now.files.get(path) != Some(&Some(before.clone()))
            {
                _ = fs::write(path, before);
            }
        }
        assert_eq!(self.files, now.files, "{what}");
        assert!(
            self.programs == now.programs,
            "{what}: a program was changed"
        );
        for point in &now.mounts {
            assert!(self.mounts.contains(point), "{what}: {point} was mounted");
        }
    }
}

/// A folder of the host with a file that must stay as it is.
struct Victim(PathBuf);

impl Victim {
    fn new(node: &Node, name: &str) -> Self {
        let dir = node.root().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "precious").unwrap();
        Self(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.join("file")
    }

    #[track_caller]
    fn is_untouched(&self, what: &str) {
        let names: Vec<_> = fs::read_dir(&self.0).unwrap().flatten().collect();
        assert_eq!(names.len(), 1, "{what}: {names:?}");
        assert_eq!(fs::read(self.file()).unwrap(), b"precious", "{what}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !table.contains(&self.0.display().to_string()),
            "{what}: something is mounted over it"
        );
    }
}

fn unconfined(config: &mut cri::ContainerConfig) {
    config.security().seccomp = Some(cri::SecurityProfile {
        profile_type: ProfileType::Unconfined.into(),
        ..Default::default()
    });
}

/// Runs a script as root of a container whose seccomp is off: the rest must hold too.
fn attack(container: &Container<'_>, script: &str) -> String {
    let answer = container.try_exec(&["sh", "-c", script], 20).unwrap();
    String::from_utf8_lossy(&answer.stdout).into_owned()
}

fn image_of(node: &Node, name: &str, layer: &Layer) -> String {
    let image = Image::builder(Format::Oci)
        .base()
        .layer(layer, Packing::Gzip)
        .build();
    let reference = node.push(name, "1", &image);
    node.pull(&reference).unwrap();
    reference
}

fn node_of(kind: u8, name: &str, device: (u32, u32)) -> Entry {
    Entry {
        device,
        ..Entry::new(kind, name, 0o666)
    }
}

fn up_to(path: &Path) -> String {
    format!(
        "{}{}",
        "../".repeat(20),
        path.strip_prefix("/").unwrap().display()
    )
}

#[test]
fn files_of_the_kernel_that_run_programs_cannot_be_written() {
    let node = Node::start();
    let precious = Precious::look();
    let pod = node.run_pod("web");
    let mut config = pod.container(&["sleep", "1000"]);
    unconfined(&mut config);
    let container = pod.start_as(config);
    for script in [
        "echo '|/evil' > /proc/sys/kernel/core_pattern",
        "echo /evil > /proc/sys/kernel/modprobe",
        "echo /evil > /sys/kernel/uevent_helper",
        "echo b > /proc/sysrq-trigger",
        // Through a mount of one's own, with and without a user namespace (CVE-2022-0492).
        "mkdir /p; mount -t proc p /p && echo '|/evil' > /p/sys/kernel/core_pattern",
        "unshare -Urm sh -c 'mkdir -p /p; mount -t proc p /p; echo \"|/evil\" > /p/sys/kernel/core_pattern'",
        "unshare -Urmp -f sh -c 'mkdir -p /p; mount -t proc p /p; echo \"|/evil\" > /p/sys/kernel/core_pattern'",
        "for f in $(find /sys/fs/cgroup -name release_agent); do echo /evil > $f; done",
        "for f in $(find /sys/fs/cgroup -name notify_on_release); do echo 1 > $f; done",
        "mkdir -p /c; for c in memory cpu rdma pids; do mount -t cgroup -o $c c /c && echo /evil > /c/release_agent; done",
        "unshare -UrmC sh -c 'mkdir -p /c; for c in memory rdma devices; do mount -t cgroup -o $c c /c; echo /evil > /c/release_agent; done'",
        "mount -o remount,rw /sys; mount -o remount,rw /proc/sys; echo '|/evil' > /proc/sys/kernel/core_pattern",
        "umount /proc/sys; umount -l /proc/sys; echo '|/evil' > /proc/sys/kernel/core_pattern",
        "mkdir -p /b; mount --bind /proc/sys /b && echo '|/evil' > /b/kernel/core_pattern",
    ] {
        attack(&container, script);
        precious.is_untouched(script);
    }
    // Masked files stay masked.
    assert_eq!(
        attack(&container, "umount /proc/kcore; head -c 8 /proc/kcore"),
        ""
    );
}

#[test]
fn a_user_namespace_with_every_capability_mounts_nothing_of_the_hosts() {
    let node = Node::start();
    let precious = Precious::look();
    let victim = Victim::new(&node, "victim");
    let mut config = node.pod_config("web");
    let ranges = vec![cri::IdMapping {
        host_id: 400_000,
        container_id: 0,
        length: 65_536,
    }];
    let context = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    context.privileged = true;
    context
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(cri::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: ranges.clone(),
        gids: ranges,
    });
    let pod = node.run(config);
    let mut config = pod.container(&["sleep", "1000"]);
    config.security().privileged = true;
    config.mount(&victim.0, "/victim");
    let container = pod.start_as(config);
    let file = victim.file();
    for script in [
        "echo '|/evil' > /proc/sys/kernel/core_pattern".to_owned(),
        "for f in $(find /sys/fs/cgroup -name release_agent); do echo /evil > $f; done".to_owned(),
        "mkdir /c; mount -t cgroup -o memory c /c; echo /evil > /c/release_agent".to_owned(),
        "mkdir /p; mount -t proc p /p; echo '|/evil' > /p/sys/kernel/core_pattern".to_owned(),
        "for d in /dev/vd* /dev/sd* /dev/nvme*; do mkdir -p /d; mount -t ext4 $d /d; echo x > /d/etc/passwd; done".to_owned(),
        "mknod /disk b 254 0; echo x > /disk".to_owned(),
        format!("echo x >> /victim/file; chown 0 /victim/file; chmod 777 /victim/file; echo x >> /proc/1/root{}", file.display()),
        format!("nsenter -t 1 -m sh -c 'echo x > {}'", file.display()),
        "for p in /proc/[0-9]*/exe; do echo x >> $p; done".to_owned(),
    ] {
        attack(&container, &script);
        precious.is_untouched(&script);
        victim.is_untouched(&script);
    }
}

/// Nothing is written but to the node's own victim: where the host's processes are
/// seen, a script that gets through reaches the whole machine.
/// What this process may have, in the kernel's words: Berth's processes have the same.
fn own_capabilities() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn programs_of_the_host_are_out_of_reach_also_where_its_processes_are_seen() {
    let node = Node::start();
    let victim = Victim::new(&node, "victim");
    for pid in [NamespaceMode::Pod, NamespaceMode::Node] {
        let mut config = node.pod_config(&format!("pid-{}", i32::from(pid)));
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = pid.into();
        let pod = node.run(config);
        let mut config = pod.container(&["sleep", "1000"]);
        unconfined(&mut config);
        let container = pod.start_as(config);
        // Berth's own processes: the daemon, monitors, loggers. Opened, nothing is written.
        let script = "for p in /proc/[0-9]*; do case $(cat $p/comm) in berth*) \
            for f in exe root/etc/passwd cwd/.; do (exec 3<$p/$f) 2>/dev/null \
            && echo $p/$f $(cat $p/comm); done;; esac; done";
        let reached = attack(&container, script);
        // Pod init may be looked at: its root is empty and it runs no program of its own.
        let reached = reached
            .lines()
            .filter(|line| !line.contains("berth-pod-init"));
        assert_eq!(reached.collect::<Vec<_>>(), [""; 0], "{pid:?}");
        let file = victim.file();
        // A process with no more capabilities than the container is open to it by the kernel's
        // rule, where it shares the host's PIDs: this machine may run such.
        let script = format!(
            "for p in /proc/[0-9]*; do grep -q '^CapPrm:.*{}' $p/status || continue; \
                echo x >> $p/root{}; done",
            own_capabilities(),
            file.display()
        );
        attack(&container, &script);
        victim.is_untouched(&script);
        if pid == NamespaceMode::Pod {
            // The first process of the pod holds nothing of the host's.
            let held = attack(&container, "readlink /proc/1/fd/*");
            for target in held.lines() {
                let own = target.starts_with("pipe:") || target.starts_with("anon_inode:");
                assert!(own, "{target} of\n{held}");
            }
            assert_eq!(attack(&container, "ls -A /proc/1/root/"), "");
        }
    }
}

#[test]
fn devices_of_the_image_do_not_work() {
    let node = Node::start();
    let layer = Layer::new()
        .entry(node_of(b'3', "evil-kmsg", (1, 11)))
        .entry(node_of(b'3', "evil-mem", (1, 1)))
        .entry(node_of(b'4', "evil-disk", (254, 0)));
    let reference = image_of(&node, "devices", &layer);
    let pod = node.run_pod("web");
    let mut config = pod.container_of(&reference, &["sleep", "1000"]);
    unconfined(&mut config);
    let container = pod.start_as(config);
    let mark = format!("berth-escape-{}", std::process::id());
    attack(
        &container,
        &format!("echo {mark} > /evil-kmsg; echo {mark} > /dev/kmsg"),
    );
    let log = std::process::Command::new("dmesg").output().unwrap();
    assert!(!String::from_utf8_lossy(&log.stdout).contains(&mark));
    for device in ["/evil-kmsg", "/evil-mem", "/evil-disk"] {
        let read = attack(&container, &format!("head -c 1 {device} | wc -c"));
        assert_eq!(read.trim(), "0", "{device}");
    }
}

#[test]
fn a_link_of_the_image_takes_no_device_into_a_volume() {
    let node = Node::start();
    let victim = Victim::new(&node, "victim");
    let layer = Layer::new()
        .symlink("elsewhere", "/volume")
        .symlink("up", "dir/../../volume/.")
        .dir("dir", 0o755)
        .symlink("own", "dir");
    let reference = image_of(&node, "links", &layer);
    let pod = node.run_pod("web");
    let with_device = |reference: &str, path: &str| {
        let mut config = pod.container_of(reference, &["sleep", "1000"]);
        config.mount(&victim.0, "/volume");
        config.devices.push(cri::Device {
            host_path: "/dev/zero".to_owned(),
            container_path: path.to_owned(),
            permissions: "rw".to_owned(),
        });
        pod.create(config)
    };
    for path in ["/elsewhere/zero", "/elsewhere/made/zero", "/up/zero"] {
        let error = with_device(&reference, path).start().unwrap_err();
        let words = ["onto another mount", path];
        assert!(
            words.iter().all(|word| error.message().contains(word)),
            "{error}"
        );
        victim.is_untouched(path);
    }
    // A link that stays in the root is nobody's harm.
    let container = with_device(&reference, "/own/made/zero");
    container.start().unwrap();
    assert_eq!(
        attack(&container, "head -c 2 /dir/made/zero | wc -c").trim(),
        "2"
    );
    victim.is_untouched("a link within the root");

    // The place of all devices is such a link.
    let layer = Layer::new().symlink("dev", "/volume").dir("volume", 0o755);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .base()
        .build();
    let reference = node.push("linked-dev", "1", &image);
    if node.pull(&reference).is_ok() {
        let container = with_device(&reference, "/dev/mine");
        if container.start().is_ok() {
            attack(&container, "ls /dev");
        }
        victim.is_untouched("/dev as a link");
    }
}

#[test]
fn names_of_sysctls_lead_nowhere_else() {
    let node = Node::start();
    let precious = Precious::look();
    for name in [
        "kernel.core_pattern",
        "kernel/core_pattern",
        "net/../kernel/core_pattern",
        "net...kernel.core_pattern",
        "net.ipv4/../../kernel/core_pattern",
        "kernel.shmmax/../core_pattern",
        "kernel/shmmax/../core_pattern",
        "fs.mqueue/../../kernel/core_pattern",
        "/kernel/core_pattern",
        "net./../kernel.core_pattern",
        "net.ipv4.\nkernel.core_pattern",
        "",
        "..",
        "net",
    ] {
        let mut config = node.pod_config("web");
        let linux = config.linux.get_or_insert_default();
        linux.sysctls.insert(name.to_owned(), "|/evil".to_owned());
        let error = node
            .try_run(config)
            .err()
            .unwrap_or_else(|| panic!("{name:?} was taken"));
        assert_eq!(error.code(), Code::InvalidArgument, "{name:?}: {error}");
        precious.is_untouched(name);
    }
}

#[test]
fn paths_of_logs_and_messages_stay_where_they_belong() {
    let node = Node::start();
    let victim = Victim::new(&node, "victim");
    let pod = node.run_pod("web");
    let up = format!("../victim/{}", "x.log");
    for path in [
        "../../x.log",
        &up,
        "/etc/x.log",
        "a/../../x.log",
        "..",
        "a\0b",
    ] {
        let mut config = pod.container(&["echo", "out"]);
        config.log_path = path.to_owned();
        let error = pod
            .try_create(config)
            .err()
            .unwrap_or_else(|| panic!("{path:?} was taken"));
        assert_eq!(error.code(), Code::InvalidArgument, "{path:?}: {error}");
        victim.is_untouched(path);
    }
    // A link planted where the log comes to be: another pod may have the folder as a volume.
    let logs = PathBuf::from(&pod.config.log_directory);
    symlink(victim.file(), logs.join("planted.log")).unwrap();
    let mut config = pod.container(&["echo", "out"]);
    config.log_path = "planted.log".to_owned();
    let container = pod.create(config);
    if container.start().is_ok() {
        container.wait_for_exit();
    }
    victim.is_untouched("a planted log");

    // The message's file is mounted where the image has a link.
    let layer = Layer::new().symlink("message", &up_to(&victim.file()));
    let reference = image_of(&node, "message", &layer);
    let message = node.root().join("message");
    fs::write(&message, "").unwrap();
    let mut config = pod.container_of(&reference, &["sh", "-c", "echo over > /message"]);
    config.mount(&message, "/message");
    let container = pod.create(config);
    if container.start().is_ok() {
        container.wait_for_exit();
    }
    victim.is_untouched("the termination message");
}

#[test]
fn terminals_are_the_containers_own() {
    let node = Node::start();
    let victim = Victim::new(&node, "victim");
    let pod = node.run_pod("web");
    // A /dev of the attacker's making, with links where the runtime opens and mounts.
    let dev = node.root().join("dev");
    fs::create_dir(&dev).unwrap();
    for name in ["console", "null", "ptmx", "tty", "stdin", "fd"] {
        symlink(up_to(&victim.file()), dev.join(name)).unwrap();
    }
    symlink(up_to(&victim.0), dev.join("pts")).unwrap();
    for tty in [true, false] {
        let mut config = pod.container(&["sh", "-c", "echo out; echo x > /dev/console"]);
        config.tty = tty;
        config.mount(&dev, "/dev");
        if let Ok(container) = pod.try_create(config)
            && container.start().is_ok()
        {
            container.wait_for_exit();
        }
        victim.is_untouched("a /dev of links");
    }
    let mut config = pod.container(&["sh", "-c", "tty; readlink /proc/self/fd/0; ls /dev/pts"]);
    config.tty = true;
    let container = pod.start_as(config);
    container.wait_for_exit();
    let seen = container.stdout().replace('\r', "");
    assert!(
        seen.starts_with("/dev/console\n") || seen.starts_with("/dev/pts/0\n"),
        "{seen}"
    );
    // No terminal of the host's is left as the controlling one.
    let container = pod.start(&["sh", "-c", "echo x > /dev/tty && echo has a terminal"]);
    container.wait_for_exit();
    assert_eq!(container.stdout(), "");
}

/// Exchanges `name` in a folder for a link and back, as fast as it can.
struct Swapper {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Swapper {
    fn start(dir: &Path, name: &str, target: &str) -> Self {
        let (plain, link) = (dir.join(name), dir.join("other"));
        fs::create_dir_all(plain.join("sub")).unwrap();
        fs::write(plain.join("sub/secret"), "secret").unwrap();
        symlink(target, &link).unwrap();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut swaps = 0;
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let cwd = nix::fcntl::AT_FDCWD;
                if nix::fcntl::renameat2(cwd, &plain, cwd, &link, flags).is_ok() {
                    swaps += 1;
                }
            }
            swaps
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread
            .take()
            .map_or(0, |thread| thread.join().unwrap())
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

fn racing(pod: &Pod<'_>, volume: &Path, change: impl Fn(&mut cri::ContainerConfig)) -> usize {
    let mut started = 0;
    for _ in 0..25 {
        let mut config = pod.container(&["true"]);
        config.log_path.clear();
        config.mount(volume, "/volume");
        change(&mut config);
        if let Ok(container) = pod.try_create(config)
            && container.start().is_ok()
        {
            started += 1;
            container.wait_for_exit();
            container.remove().unwrap();
        }
    }
    started
}

#[test]
fn whoever_swaps_paths_while_a_container_starts_gains_nothing() {
    let node = Node::start();
    let precious = Precious::look();
    let pod = node.run_pod("web");
    let empty = node.root().join("empty");
    fs::create_dir(&empty).unwrap();
    for (kind, target_of) in [
        ("masked", "file"),
        ("read-only", "file"),
        ("target", "folder"),
    ] {
        let victim = Victim::new(&node, &format!("victim-{kind}"));
        let volume = node.root().join(format!("volume-{kind}"));
        fs::create_dir(&volume).unwrap();
        let target = match target_of {
            "file" => up_to(&victim.file()),
            _ => up_to(&victim.0),
        };
        let swapper = Swapper::start(&volume, "path", &target);
        let started = racing(&pod, &volume, |config| match kind {
            "masked" => config.security().masked_paths = vec!["/volume/path".to_owned()],
            "read-only" => config.security().readonly_paths = vec!["/volume/path".to_owned()],
            _ => {
                config.mount(&empty, "/volume/path/made/here");
            }
        });
        let swaps = swapper.end();
        assert!(
            swaps > 100 && started > 0,
            "{kind}: {swaps}, {started}: nothing was raced"
        );
        victim.is_untouched(kind);
        precious.is_untouched(kind);
        // What is masked is so in the container alone.
        let secret = ["path", "other"]
            .iter()
            .find_map(|name| fs::read_to_string(volume.join(name).join("sub/secret")).ok());
        assert_eq!(secret.as_deref(), Some("secret"), "{kind}");
        fs::write(empty.join("still-writable"), "").unwrap();
    }
}

#[test]
fn proc_cannot_be_faked_by_the_image_or_a_volume() {
    let node = Node::start();
    let precious = Precious::look();
    let victim = Victim::new(&node, "victim");
    let layer = Layer::new()
        .dir("fake", 0o755)
        .dir("fake/self", 0o755)
        .dir("fake/self/attr", 0o755)
        .file("fake/self/attr/exec", 0o666, b"")
        .symlink("to-proc", "/proc")
        .symlink("to-sys", "/proc/sys");
    let reference = image_of(&node, "fake", &layer);
    let pod = node.run_pod("web");
    for target in [
        "/proc",
        "/proc/self",
        "/proc/sys",
        "/to-proc/sys",
        "/to-sys",
        "/to-sys/kernel",
        "/to-proc",
    ] {
        let mut config = pod.container_of(
            &reference,
            &["sh", "-c", "echo '|/evil' > /proc/sys/kernel/core_pattern"],
        );
        unconfined(&mut config);
        config.mount(&victim.0, target);
        if let Ok(container) = pod.try_create(config)
            && container.start().is_ok()
        {
            container.wait_for_exit();
        }
        precious.is_untouched(target);
    }
    // An image that is all link.
    let layer = Layer::new().symlink("proc", "/fake").dir("fake", 0o777);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .base()
        .build();
    let reference = node.push("linked", "1", &image);
    if node.pull(&reference).is_ok() {
        let mut config = pod.container_of(
            &reference,
            &["sh", "-c", "echo '|/evil' > /fake/sys/kernel/core_pattern"],
        );
        unconfined(&mut config);
        if let Ok(container) = pod.try_create(config)
            && container.start().is_ok()
        {
            container.wait_for_exit();
        }
    }
    precious.is_untouched("/proc as a link");
}
