//! On the kernel: what is copied here is attached in a mount namespace of the
//! test's own, as the monitor does.

use super::*;
use crate::cgroup::{Cgroups, Settings, Version};
use crate::container_spec::{MountRequest, Propagation};
use crate::oci::tests::{Sample, bind};
use berth_sys::namespace;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use std::fs;
use tempfile::TempDir;

/// Runs `test` in a thread with a mount namespace of its own, where all mounts
/// are private: nothing it mounts is seen outside or stays.
fn apart(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // CLONE_NEWNS. Source: linux/sched.h.
        namespace::unshare(0x0002_0000).expect("these tests need root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn extra() -> Extra {
    Extra {
        container_id: "c".into(),
        cgroup: proto::Cgroup::default(),
        rootfs: mount::new_fs("tmpfs", "root", "", 0).unwrap(),
        raw_env: Vec::new(),
        seccomp: Arc::from([]),
        log_path: "/log/0.log".into(),
        log_line_bytes: 16_384,
        stdin: false,
        stdin_once: false,
        exit_record: "/exits/c.rec".into(),
        join_net: true,
        join_ipc: true,
        join_uts: true,
        join_pid: false,
        join_user: false,
        target_container_id: String::new(),
        user_namespaces: Vec::new(),
        directories: Vec::new(),
        prepared: BTreeMap::new(),
        opened: BTreeMap::new(),
    }
}

/// A host directory and what of it a container would get.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn make_dir(&self, name: &str) -> PathBuf {
        fs::create_dir(self.path(name)).unwrap();
        self.path(name)
    }

    fn mount_tmpfs(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        rustix::mount::mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        path
    }
}

/// The spec of a container with these mounts and no other binds.
fn spec_with(mounts: Vec<MountRequest>) -> Spec {
    let mut sample = Sample::new();
    sample.container.mounts = mounts;
    let mut spec = sample.spec();
    let mut all = spec.mounts().clone().unwrap();
    let asked = |m: &oci::Mount| {
        sample
            .container
            .mounts
            .iter()
            .any(|asked| Path::new(&asked.container_path) == m.destination())
    };
    all.retain(asked);
    spec.set_mounts(Some(all));
    spec
}

/// What the monitor is told of the only mount, and its descriptor.
fn plan_one(request: MountRequest) -> Result<(MountStep, OwnedFd), LaunchError> {
    let (launch, fds) = plan(&spec_with(vec![request]), extra())?;
    let [step] = &launch.mounts[..] else {
        panic!("{:?}", launch.mounts)
    };
    let fd = fds.into_iter().nth(step.fd.unwrap() as usize).unwrap();
    Ok((step.clone(), fd))
}

fn read(dir: &OwnedFd, name: &str) -> String {
    let file = rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    io::read_to_string(fs::File::from(file.unwrap())).unwrap()
}

fn create(dir: &OwnedFd, name: &str) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o644)).map(drop)
}

/// Attaches a copy as the monitor's child does.
fn attach(mount: &OwnedFd, target: &Path) {
    fs::create_dir_all(target).unwrap();
    let onto = rustix::fs::openat(CWD, target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    mount::attach(mount, onto.unwrap()).unwrap();
}

#[test]
fn directories_files_and_links_become_detached_mounts() {
    apart(|| {
        let host = Host::new();
        fs::write(host.make_dir("dir").join("a"), "in a directory").unwrap();
        fs::write(host.path("file"), "a file").unwrap();
        std::os::unix::fs::symlink("dir", host.path("link")).unwrap();

        let (step, fd) = plan_one(bind(host.path("link"), "/data")).unwrap();
        assert_eq!((step.target.as_str(), step.file), ("/data", false));
        // Where the link leads later does not matter any more.
        fs::remove_file(host.path("link")).unwrap();
        std::os::unix::fs::symlink("/", host.path("link")).unwrap();
        assert_eq!(read(&fd, "a"), "in a directory");

        let (step, fd) = plan_one(bind(host.path("file"), "/etc/thing")).unwrap();
        assert!(step.file);
        let copy = format!(
            "/proc/thread-self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&fd)
        );
        assert_eq!(fs::read_to_string(copy).unwrap(), "a file");
    });
}

#[test]
fn a_missing_source_becomes_a_directory() {
    apart(|| {
        let host = Host::new();
        let (step, fd) = plan_one(bind(host.path("new/deep"), "/data")).unwrap();
        assert!(!step.file);
        create(&fd, "x").unwrap();
        assert!(host.path("new/deep/x").exists());
        fs::write(host.path("file"), "").unwrap();
        let below_file = plan_one(bind(host.path("file/x"), "/data"));
        assert!(matches!(
            below_file,
            Err(LaunchError::Source {
                source: Errno::NOTDIR,
                ..
            })
        ));
    });
}

#[test]
fn read_only_is_read_only_and_below_only_where_asked() {
    apart(|| {
        let host = Host::new();
        host.mount_tmpfs("top");
        host.mount_tmpfs("top/below");
        let mut request = bind(host.path("top"), "/data");
        let (_, fd) = plan_one(request.clone()).unwrap();
        create(&fd, "x").unwrap();
        request.readonly = true;
        let (_, fd) = plan_one(request.clone()).unwrap();
        assert_eq!(create(&fd, "y"), Err(Errno::ROFS));
        create(&fd, "below/y").unwrap();
        request.recursive_readonly = true;
        let (_, fd) = plan_one(request).unwrap();
        assert_eq!(create(&fd, "y"), Err(Errno::ROFS));
        assert_eq!(create(&fd, "below/z"), Err(Errno::ROFS));
        // The host's own mount is not touched.
        fs::write(host.path("top/z"), "").unwrap();
    });
}

#[test]
fn a_mount_the_host_has_read_only_stays_so() {
    apart(|| {
        let host = Host::new();
        let path = host.mount_tmpfs("top");
        rustix::mount::mount_remount(&path, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
        let (_, fd) = plan_one(bind(path, "/data")).unwrap();
        assert_eq!(create(&fd, "x"), Err(Errno::ROFS));
    });
}

#[test]
fn programs_on_a_noexec_mount_do_not_run() {
    apart(|| {
        let host = Host::new();
        let dir = host.make_dir("dir");
        fs::copy("/bin/true", dir.join("true")).unwrap();
        let mut request = bind(dir, "/data");
        let run = |request: &MountRequest| {
            let (_, fd) = plan_one(request.clone()).unwrap();
            let target = host.path("target");
            attach(&fd, &target);
            let status = std::process::Command::new(target.join("true")).status();
            mount::detach(&target).unwrap();
            status
                .map(|status| status.success())
                .map_err(|error| error.kind())
        };
        assert_eq!(run(&request), Ok(true));
        request.options = vec!["noexec".into()];
        assert_eq!(run(&request), Err(io::ErrorKind::PermissionDenied));
    });
}

#[test]
fn mounts_are_passed_on_as_asked_for() {
    apart(|| {
        let host = Host::new();
        let top = host.mount_tmpfs("top");
        rustix::mount::mount_change(&top, MountPropagationFlags::SHARED).unwrap();
        let attached = |name: &str, propagation| {
            let mut request = bind(&top, "/data");
            request.propagation = propagation;
            let (_, fd) = plan_one(request).unwrap();
            attach(&fd, &host.path(name));
        };
        attached("private", Propagation::Private);
        attached("slave", Propagation::HostToContainer);
        attached("shared", Propagation::Bidirectional);

        let seen = |name: &str| host.path(name).exists();
        fs::write(host.mount_tmpfs("top/host").join("here"), "").unwrap();
        assert!(!seen("private/host/here"));
        assert!(seen("slave/host/here"));
        assert!(seen("shared/host/here"));

        fs::write(host.mount_tmpfs("slave/s").join("here"), "").unwrap();
        assert!(!seen("top/s/here"), "a slave passes nothing back");
        fs::write(host.mount_tmpfs("shared/c").join("here"), "").unwrap();
        assert!(seen("top/c/here") && seen("slave/c/here") && !seen("private/c/here"));
    });
}

#[test]
fn propagation_takes_a_mount_that_passes_on() {
    apart(|| {
        let host = Host::new();
        let top = host.mount_tmpfs("top");
        for propagation in [Propagation::HostToContainer, Propagation::Bidirectional] {
            let mut request = bind(&top, "/data");
            request.propagation = propagation;
            let refused = plan_one(request).unwrap_err();
            assert!(
                matches!(refused, LaunchError::NotPropagated { .. }),
                "{refused}"
            );
        }
        // Below a shared mount, everything the container attaches is told again
        // not to be passed on.
        rustix::mount::mount_change(&top, MountPropagationFlags::SHARED).unwrap();
        let mut shared = bind(&top, "/data");
        shared.propagation = Propagation::Bidirectional;
        let spec = spec_with(vec![shared, bind(host.path("x"), "/data/x")]);
        let (launch, _) = plan(&spec, extra()).unwrap();
        // MS_SHARED and MS_PRIVATE, with MS_REC. Source: linux/mount.h.
        let bits: Vec<u64> = launch.mounts.iter().map(|step| step.propagation).collect();
        assert_eq!(bits, [1 << 20 | 1 << 14, 1 << 18 | 1 << 14]);
    });
}

#[test]
fn only_procfs_is_mounted_at_proc() {
    apart(|| {
        let host = Host::new();
        let refused = plan_one(bind(host.make_dir("fake"), "/proc")).unwrap_err();
        assert!(matches!(refused, LaunchError::NotProc { .. }), "{refused}");
        plan_one(bind("/proc", "/proc")).unwrap();
    });
}

#[test]
fn more_mounts_than_descriptors_are_refused() {
    let host = Host::new();
    let mut spec = spec_with(vec![bind(host.dir.path(), "/m")]);
    let one = spec.mounts().as_ref().unwrap()[0].clone();
    // As a plugin might: the container's own are counted when it is created.
    spec.set_mounts(Some(vec![one; MOST_FDS]));
    assert!(matches!(
        plan(&spec, extra()),
        Err(LaunchError::TooManyMounts)
    ));
}

#[test]
fn labels_are_in_the_spec_and_told_to_the_monitor() {
    let mut sample = Sample::new();
    let plain = plan_of(&sample);
    assert_eq!(plain.mount_label, "");
    assert_eq!(plain.process.unwrap().selinux_label, "");
    sample.selinux = Some(crate::selinux::Labels {
        process: "u:r:container_t:s0:c1,c2".into(),
        mount: "u:object_r:container_file_t:s0:c1,c2".into(),
    });
    let spec = sample.spec();
    let label = spec.linux().as_ref().unwrap().mount_label().clone();
    assert_eq!(label.unwrap(), "u:object_r:container_file_t:s0:c1,c2");
    let launch = plan_of(&sample);
    assert_eq!(launch.mount_label, "u:object_r:container_file_t:s0:c1,c2");
    let process = launch.process.unwrap();
    assert_eq!(process.selinux_label, "u:r:container_t:s0:c1,c2");
    // A privileged container's: files have a label, processes none.
    sample.selinux.as_mut().unwrap().process.clear();
    let spec = sample.spec();
    assert_eq!(*spec.process().as_ref().unwrap().selinux_label(), None);
    assert_eq!(plan_of(&sample).process.unwrap().selinux_label, "");
}

/// The launch of a container whose file systems are all left to the monitor.
fn plan_of(sample: &Sample) -> proto::Launch {
    let mut spec = sample.spec();
    let mut mounts = spec.mounts().clone().unwrap();
    let kinds = ["tmpfs", "devpts", "proc"];
    mounts.retain(|mount| {
        kinds
            .iter()
            .any(|kind| mount.typ().as_deref() == Some(kind))
    });
    spec.set_mounts(Some(mounts));
    plan(&spec, extra()).unwrap().0
}

#[test]
fn a_source_that_is_open_is_the_one_that_is_mounted() {
    apart(|| {
        let host = Host::new();
        fs::write(host.make_dir("relabelled").join("file"), "right").unwrap();
        let mut extra = extra();
        let opened = open_source(&host.path("relabelled"), Path::new("/data")).unwrap();
        extra.opened.insert("/data".into(), opened);
        // Another is at the path by now.
        fs::rename(host.path("relabelled"), host.path("away")).unwrap();
        fs::write(host.make_dir("relabelled").join("file"), "wrong").unwrap();
        let request = bind(host.path("relabelled"), "/data");
        let (launch, fds) = plan(&spec_with(vec![request]), extra).unwrap();
        let fd = &fds[launch.mounts[0].fd.unwrap() as usize];
        assert_eq!(read(fd, "file"), "right");
    });
}

#[test]
fn prepared_mounts_are_used_in_place_of_the_source() {
    let prepared = mount::new_fs("tmpfs", "volume", "", 0).unwrap();
    create(&prepared, "weights").unwrap();
    let mut extra = extra();
    extra.prepared.insert("/model".into(), prepared);
    let mut request = bind("/nonexistent/volume", "/model");
    request.readonly = true;
    let (launch, fds) = plan(&spec_with(vec![request]), extra).unwrap();
    let fd = &fds[launch.mounts[0].fd.unwrap() as usize];
    assert_eq!(read(fd, "weights"), "");
    assert_eq!(create(fd, "x"), Err(Errno::ROFS));
    assert!(!Path::new("/nonexistent").exists());
}

#[test]
fn owners_are_mapped_with_a_user_namespace_only() {
    let host = Host::new();
    let mut request = bind(host.dir.path(), "/data");
    let map = crate::pod_spec::IdMapping {
        container_id: 0,
        host_id: 100_000,
        length: 65_536,
    };
    request.uid_mappings = vec![map];
    request.gid_mappings = vec![map];
    let refused = plan_one(request).unwrap_err();
    assert!(
        matches!(refused, LaunchError::NoUserNamespace { .. }),
        "{refused}"
    );
}

#[test]
fn an_ordinary_container_is_planned_whole() {
    let host = Host::new();
    let mut sample = Sample::new();
    for (path, name) in [
        (&mut sample.files.resolv_conf, "resolv.conf"),
        (&mut sample.files.hostname, "hostname"),
        (&mut sample.files.hosts, "hosts"),
        (&mut sample.files.shm, "shm"),
    ] {
        *path = host.path(name);
        fs::write(&*path, name).unwrap();
    }
    fs::remove_file(&sample.files.shm).unwrap();
    fs::create_dir(&sample.files.shm).unwrap();
    // The hierarchies' own roots: always there, and nothing is written to them.
    sample.cgroup_path = "/".into();
    let built = sample.build().unwrap();
    let mut extra = extra();
    let version = Cgroups::detect(Settings::default()).unwrap().version();
    match version {
        Version::V1 => extra.cgroup.tasks_files = vec!["/sys/fs/cgroup/memory/tasks".into()],
        Version::V2 => extra.cgroup.directory = "/sys/fs/cgroup".into(),
    }
    extra.raw_env = built.raw_env.clone();
    extra.seccomp = Arc::from([1, 2, 3]);
    let (launch, fds) = plan(&built.spec, extra).unwrap();

    assert!(launch.new_pid && launch.new_cgroup && launch.join_net && !launch.join_pid);
    assert_eq!((launch.rootfs_fd, launch.rootfs_readonly), (0, false));
    let step = |target: &str| launch.mounts.iter().find(|s| s.target == target).unwrap();
    let nosuid_noexec_nodev = 2 | 8 | 4;
    assert_eq!(step("/proc").fs_type, "proc");
    assert_eq!(step("/proc").flags, nosuid_noexec_nodev);
    assert_eq!(step("/dev").options, "mode=755,size=65536k");
    assert_eq!(
        step("/dev/pts").options,
        "newinstance,ptmxmode=0666,mode=0620,gid=5"
    );
    assert!(step("/dev/mqueue").optional);
    assert_eq!(step("/sys").flags, nosuid_noexec_nodev | 1);
    assert!(step("/etc/hosts").file && !step("/dev/shm").file);
    match version {
        Version::V1 => {
            let memory = &fds[step("/sys/fs/cgroup/memory").fd.unwrap() as usize];
            assert!(read(memory, "memory.limit_in_bytes").ends_with('\n'));
            let stat = rustix::fs::fstatvfs(memory).unwrap();
            assert!(stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
        }
        Version::V2 => assert_eq!(step("/sys/fs/cgroup").fs_type, "cgroup2"),
    }

    assert_eq!(launch.devices.len(), 6);
    let null = launch
        .devices
        .iter()
        .find(|device| device.path == "/dev/null")
        .unwrap();
    assert_eq!(
        (null.path.as_str(), null.kind, null.mode),
        ("/dev/null", 0o020_000, 0o666)
    );
    assert_eq!(launch.symlinks.len(), LINKS.len());
    assert_eq!(launch.masked_paths, ["/proc/kcore"]);
    let masks = &fds[launch.null_fd.unwrap() as usize];
    let stat = rustix::fs::fstat(masks).unwrap();
    assert_eq!(rustix::fs::major(stat.st_rdev), 1);

    let process = launch.process.unwrap();
    assert_eq!(process.argv, [b"/server".to_vec()]);
    assert_eq!(process.env, built.raw_env);
    assert_eq!(process.seccomp, [1, 2, 3]);
    assert_eq!(
        (process.uid, process.gid, &process.groups[..]),
        (1000, 100, &[100, 7][..])
    );
    let limit = proto::Rlimit {
        resource: 7,
        soft: 1024,
        hard: 524_288,
    };
    assert_eq!(process.rlimits, [limit]);
    // The 14 default ones; source: containerd's default bounding set.
    assert_eq!(process.cap_bounding, 0xa804_25fb);
    assert_eq!((process.cap_ambient, process.cap_inheritable), (0, 0));
    assert_eq!(
        (process.umask, process.oom_score_adj),
        (Some(0o022), Some(0))
    );
    assert!(process.no_new_privs && !process.tty);
}

#[test]
fn nothing_is_made_in_a_dev_that_is_the_hosts() {
    let mut sample = Sample::new();
    sample.container.mounts = vec![bind("/dev", "/dev")];
    let mut spec = sample.spec();
    let mut mounts = spec.mounts().clone().unwrap();
    mounts.retain(|mount| mount.destination() == Path::new("/dev"));
    spec.set_mounts(Some(mounts));
    let (launch, _) = plan(&spec, extra()).unwrap();
    assert!(launch.devices.is_empty() && launch.symlinks.is_empty());
}

#[test]
fn bytes_of_the_environment_are_kept_and_a_plugins_changes_too() {
    let spec = ["A=\u{fffd}", "B=2", "C=3"].map(str::to_owned);
    let raw = [b"A=\xff".to_vec(), b"B=1".to_vec()];
    assert_eq!(
        environment(&spec, &raw),
        [b"A=\xff".to_vec(), b"B=2".to_vec(), b"C=3".to_vec()]
    );
}

#[test]
fn sysctls_are_paths_below_proc_sys() {
    let all = HashMap::from([
        ("net.ipv4.ip_forward".to_owned(), "1".to_owned()),
        ("net/ipv4/conf/eth0.1/mtu".to_owned(), "9".to_owned()),
    ]);
    let paths: Vec<String> = sysctls(Some(&all)).into_iter().map(|s| s.path).collect();
    assert_eq!(paths, ["net/ipv4/conf/eth0.1/mtu", "net/ipv4/ip_forward"]);
}

#[test]
fn an_incomplete_spec_says_what_is_missing() {
    let mut spec = Sample::new().spec();
    spec.set_mounts(None);
    let mut process = spec.process().clone().unwrap();
    process.set_args(Some(Vec::new()));
    spec.set_process(Some(process));
    let refused = plan(&spec, extra()).unwrap_err();
    assert_eq!(refused.to_string(), "the spec has no process.args");
}
