//! A monitor of its own for a test: the real program, a busybox root, a cgroup,
//! a client. Everything is gone when it is dropped, also after a failure.

#![allow(dead_code)]

use berth_proto::monitor_v1::{self as proto, reply::Body as Reply, request::Body as Request};
use berth_sys::mount;
use berth_sys::wire::{Bounds, FrameReader, Received, send_frame};
use prost::Message as _;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

const BUSYBOX: &str = "/bin/busybox";

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub cgroup: TestCgroup,
    monitor: Child,
}

impl Rig {
    /// A monitor without namespaces yet.
    pub fn start() -> Rig {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        assert!(
            Path::new(BUSYBOX).exists(),
            "this test needs the package busybox-static"
        );
        let dir = tempfile::tempdir().unwrap();
        let program = std::env::var_os("BERTH_TEST_MONITOR").map_or_else(
            || PathBuf::from(env!("CARGO_BIN_EXE_berth-monitor")),
            PathBuf::from,
        );
        make_root(&dir.path().join("root"));
        std::fs::create_dir(dir.path().join("exits")).unwrap();
        let socket_dir = std::fs::File::open(dir.path()).unwrap();
        let listener = berth_sys::fd::listen_at(&socket_dir, "m.sock", 8, true).unwrap();
        let monitor = Command::new(program)
            .args(["--pod", "test", "--listen-fd", "0"])
            .stdin(Stdio::from(listener))
            .spawn()
            .unwrap();
        Rig {
            dir,
            cgroup: TestCgroup::make(),
            monitor,
        }
    }

    /// One whose pod has network, IPC and UTS namespaces.
    pub fn with_namespaces() -> Rig {
        let rig = Rig::start();
        rig.client().done(Request::MakeNamespaces(rig.namespaces()));
        rig
    }

    pub fn namespaces(&self) -> proto::MakeNamespaces {
        let pin = self.path("netns");
        std::fs::write(&pin, "").unwrap();
        proto::MakeNamespaces {
            net: true,
            ipc: true,
            uts: true,
            net_pin: pin,
            hostname: "podhost".into(),
            ..Default::default()
        }
    }

    pub fn pid(&self) -> u32 {
        self.monitor.id()
    }

    pub fn is_alive(&mut self) -> bool {
        self.monitor.try_wait().unwrap().is_none()
    }

    /// Waits for the monitor's own end.
    pub fn wait_for_end(&mut self) -> std::process::ExitStatus {
        until("the monitor ends", || self.monitor.try_wait().unwrap())
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn client(&self) -> Client {
        let dir = std::fs::File::open(self.dir.path()).unwrap();
        let socket = berth_sys::fd::connect_at(&dir, "m.sock").unwrap();
        let mut client = Client::new(UnixStream::from(socket));
        let hello = proto::Hello {
            protocol: proto::PROTOCOL,
            events: true,
        };
        match client.ask(Request::Hello(hello), &[]).0 {
            Reply::Hello(hello) => assert_eq!(hello.pod_id, "test"),
            other => panic!("{other:?}"),
        }
        client
    }

    /// What a runtime would ask for to run `argv` as root with few privileges.
    pub fn launch(&self, id: &str, argv: &[&str]) -> (proto::Launch, Vec<OwnedFd>) {
        let root = mount::clone_tree(&self.root(), true).unwrap();
        let null = mount::clone_tree(Path::new("/dev/null"), false).unwrap();
        let launch = proto::Launch {
            container_id: id.into(),
            process: Some(process(argv)),
            cgroup: Some(self.cgroup.proto()),
            new_pid: true,
            new_cgroup: true,
            rootfs_fd: 0,
            null_fd: Some(1),
            mounts: default_mounts(),
            devices: default_devices(),
            symlinks: [
                ("/dev/fd", "/proc/self/fd"),
                ("/dev/stdin", "/proc/self/fd/0"),
                ("/dev/stdout", "/proc/self/fd/1"),
                ("/dev/stderr", "/proc/self/fd/2"),
                ("/dev/ptmx", "pts/ptmx"),
            ]
            .map(|(path, target)| proto::Symlink {
                path: path.into(),
                target: target.into(),
            })
            .to_vec(),
            log_path: self.path(&format!("{id}.log")),
            exit_record: self.path(&format!("exits/{id}.rec")),
            ..Default::default()
        };
        (launch, vec![root, null])
    }

    /// Runs `script` in a container to its end: its exit and its log.
    pub fn run(&self, id: &str, script: &str) -> (proto::Exited, Vec<LogLine>) {
        self.run_with(id, script, |_| {})
    }

    /// The same with a changed request.
    pub fn run_with(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut proto::Launch),
    ) -> (proto::Exited, Vec<LogLine>) {
        let (mut launch, fds) = self.launch(id, &["sh", "-c", script]);
        change(&mut launch);
        let mut client = self.client();
        client.started(Request::Launch(launch), &fds);
        let exited = client.exited(id, "");
        (exited, self.log(id))
    }

    pub fn log(&self, id: &str) -> Vec<LogLine> {
        read_log(Path::new(&self.path(&format!("{id}.log"))))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // With the monitor its children's PID namespaces are to go too: they
        // are killed first, by what the monitor says they are.
        let pids =
            std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.monitor.id()))
                .unwrap_or_default();
        let children: Vec<i32> = pids
            .split_whitespace()
            .filter_map(|p| p.parse().ok())
            .collect();
        for pid in children {
            if let Ok(pidfd) = berth_sys::pidfd::open(pid) {
                let _ = berth_sys::pidfd::send_signal(pidfd, libc::SIGKILL);
            }
        }
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
        let _ = mount::detach(&self.dir.path().join("netns"));
    }
}

/// A busybox root file system.
fn make_root(root: &Path) {
    for dir in ["bin", "proc", "sys", "dev", "tmp", "etc", "work"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let list = Command::new(BUSYBOX).arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        if name != "busybox" {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
}

pub fn process(argv: &[&str]) -> proto::Process {
    // CAP_CHOWN to CAP_SETPCAP without the ones nobody needs, as usual.
    let caps = 0xa80425fb;
    proto::Process {
        argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/bin".to_vec(), b"HOME=/".to_vec()],
        cwd: "/".into(),
        cap_bounding: caps,
        cap_effective: caps,
        cap_permitted: caps,
        ..Default::default()
    }
}

fn default_mounts() -> Vec<proto::MountStep> {
    let hardened = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let step = |target: &str, fs_type: &str, options: &str, flags| proto::MountStep {
        target: target.into(),
        fs_type: fs_type.into(),
        source: fs_type.into(),
        options: options.into(),
        flags,
        ..Default::default()
    };
    vec![
        step("/proc", "proc", "", hardened),
        step("/dev", "tmpfs", "mode=755,size=65536k", libc::MS_NOSUID),
        step(
            "/dev/pts",
            "devpts",
            "newinstance,ptmxmode=0666,mode=0620,gid=5",
            libc::MS_NOSUID,
        ),
        step("/dev/shm", "tmpfs", "mode=1777,size=65536k", hardened),
        step("/sys", "sysfs", "", hardened | libc::MS_RDONLY),
    ]
}

fn default_devices() -> Vec<proto::DeviceNode> {
    [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
    ]
    .map(|(name, major, minor)| proto::DeviceNode {
        path: format!("/dev/{name}"),
        kind: libc::S_IFCHR,
        major,
        minor,
        mode: 0o666,
        ..Default::default()
    })
    .to_vec()
}

/// A blocking client of the protocol.
pub struct Client {
    pub socket: UnixStream,
    reader: FrameReader,
    next: u64,
    events: VecDeque<proto::Exited>,
    detached: VecDeque<proto::Detached>,
}

impl Client {
    fn new(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let bounds = Bounds {
            frame_bytes: proto::MAX_FRAME_BYTES,
            fds: proto::MAX_FDS,
        };
        Client {
            socket,
            reader: FrameReader::new(bounds),
            next: 1,
            events: VecDeque::new(),
            detached: VecDeque::new(),
        }
    }

    pub fn send(&mut self, body: Request, fds: &[OwnedFd]) -> u64 {
        let id = self.next;
        self.next += 1;
        let request = proto::Request {
            id,
            body: Some(body),
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        send_frame(&self.socket, &request.encode_to_vec(), &fds).unwrap();
        id
    }

    fn receive(&mut self) -> (proto::Reply, Vec<OwnedFd>) {
        match self.reader.read(&self.socket).unwrap() {
            Received::Frame(frame) => (
                proto::Reply::decode(frame.bytes.as_slice()).unwrap(),
                frame.fds,
            ),
            other => panic!("no reply: {other:?}"),
        }
    }

    pub fn answer(&mut self, id: u64) -> (Reply, Vec<OwnedFd>) {
        loop {
            let (reply, fds) = self.receive();
            match reply.body.unwrap() {
                Reply::Exited(exited) => self.events.push_back(exited),
                Reply::Detached(detached) => self.detached.push_back(detached),
                body => {
                    assert_eq!(reply.id, id);
                    return (body, fds);
                }
            }
        }
    }

    pub fn ask(&mut self, body: Request, fds: &[OwnedFd]) -> (Reply, Vec<OwnedFd>) {
        let id = self.send(body, fds);
        self.answer(id)
    }

    pub fn done(&mut self, body: Request) {
        match self.ask(body, &[]).0 {
            Reply::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub fn started(&mut self, body: Request, fds: &[OwnedFd]) -> (proto::Started, Vec<OwnedFd>) {
        match self.ask(body, fds) {
            (Reply::Started(started), fds) => (started, fds),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub fn failure(&mut self, body: Request, fds: &[OwnedFd]) -> proto::Failure {
        match self.ask(body, fds).0 {
            Reply::Failure(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the end of a container or exec.
    pub fn exited(&mut self, container: &str, exec: &str) -> proto::Exited {
        loop {
            let found = self
                .events
                .iter()
                .position(|event| event.container_id == container && event.exec_id == exec);
            if let Some(at) = found {
                return self.events.remove(at).unwrap();
            }
            self.event();
        }
    }

    fn event(&mut self) {
        match self.receive().0.body.unwrap() {
            Reply::Exited(exited) => self.events.push_back(exited),
            Reply::Detached(detached) => self.detached.push_back(detached),
            other => panic!("{other:?}"),
        }
    }

    /// Attaches to a container's stdin (where `stdin`) and output.
    pub fn attach(&mut self, container: &str, attach_id: &str, stdin: bool) -> Attached {
        let (in_read, in_write) = std::io::pipe().unwrap();
        let (out_read, out_write) = std::io::pipe().unwrap();
        let (err_read, err_write) = std::io::pipe().unwrap();
        let request = proto::Attach {
            container_id: container.into(),
            attach_id: attach_id.into(),
            stdin_fd: stdin.then_some(2),
            stdout_fd: Some(0),
            stderr_fd: Some(1),
        };
        let fds = [out_write.into(), err_write.into(), OwnedFd::from(in_read)];
        match self.ask(Request::Attach(request), &fds).0 {
            Reply::Done(_) => {}
            other => panic!("{other:?}"),
        }
        Attached {
            stdin: stdin.then_some(in_write),
            stdout: out_read,
            stderr: err_read,
        }
    }

    /// Waits for a client to be detached: why.
    pub fn detached(&mut self, attach_id: &str) -> proto::detached::Reason {
        loop {
            let found = self
                .detached
                .iter()
                .position(|event| event.attach_id == attach_id);
            if let Some(at) = found {
                return self.detached.remove(at).unwrap().reason();
            }
            self.event();
        }
    }

    /// What a container's log has had.
    pub fn log_counts(&mut self, container: &str) -> proto::LogCounts {
        let state = self.inspect();
        let found = state
            .containers
            .iter()
            .find(|c| c.container_id == container);
        found.unwrap().log.unwrap()
    }

    pub fn inspect(&mut self) -> proto::State {
        match self.ask(Request::Inspect(proto::Inspect {}), &[]).0 {
            Reply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    pub fn signal(&mut self, container: &str, exec: &str, signal: i32) {
        self.done(Request::Signal(proto::Signal {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
        }));
    }

    /// Runs a command in a container to its end: exit and output.
    pub fn exec(&mut self, container: &str, exec_id: &str, argv: &[&str]) -> (i32, String) {
        let (read, write) = std::io::pipe().unwrap();
        let request = proto::Exec {
            container_id: container.into(),
            exec_id: exec_id.into(),
            process: Some(process(argv)),
            stdout_fd: Some(0),
            stderr_fd: Some(0),
            ..Default::default()
        };
        let fds = [OwnedFd::from(write)];
        self.started(Request::Exec(request), &fds);
        drop(fds);
        let text = std::io::read_to_string(read).unwrap();
        (self.exited(container, exec_id).exit_code, text)
    }
}

/// The only logger of a monitor.
pub fn logger_of(monitor: u32) -> i32 {
    let pids = std::fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap();
    pids.split_whitespace()
        .find(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "berth-log")
        })
        .and_then(|pid| pid.parse().ok())
        .expect("the monitor has a logger")
}

/// A client's ends of the streams.
pub struct Attached {
    pub stdin: Option<std::io::PipeWriter>,
    pub stdout: std::io::PipeReader,
    pub stderr: std::io::PipeReader,
}

/// A tmpfs of a few MiB; unmounted when dropped.
pub struct SmallDisk(pub PathBuf);

impl SmallDisk {
    pub fn mount(path: &Path, size: &str) -> SmallDisk {
        std::fs::create_dir(path).unwrap();
        let disk = SmallDisk(path.to_owned());
        disk.set(&format!("size={size},mode=755"));
        disk
    }

    /// Gives it another size.
    pub fn resize(&self, size: &str) {
        self.set(&format!("remount,size={size}"));
    }

    fn set(&self, options: &str) {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "small"])
            .arg(&self.0)
            .status();
        assert!(mount.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = mount::detach(&self.0);
    }
}

/// One line of a CRI log.
#[derive(Debug, PartialEq, Eq)]
pub struct LogLine {
    pub stream: String,
    pub tag: String,
    pub text: Vec<u8>,
}

pub fn read_log(path: &Path) -> Vec<LogLine> {
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "a torn line");
    let mut lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
    lines.pop();
    lines
        .into_iter()
        .map(|line| {
            let mut parts = line.splitn(4, |&byte| byte == b' ');
            let mut text = || String::from_utf8(parts.next().unwrap().to_vec()).unwrap();
            let time = text();
            assert!(time.len() == 30 && time.ends_with('Z'), "{time}");
            let (stream, tag) = (text(), text());
            LogLine {
                stream,
                tag,
                text: parts.next().unwrap().to_vec(),
            }
        })
        .collect()
}

/// The texts of whole lines of stdout.
pub fn stdout(log: &[LogLine]) -> Vec<String> {
    log.iter()
        .filter(|line| line.stream == "stdout")
        .map(|line| String::from_utf8_lossy(&line.text).into_owned())
        .collect()
}

/// Tries until there is a value, for as long as a test is patient.
pub fn until<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A cgroup of its own, v1 or v2 as the host has it.
pub struct TestCgroup {
    v2: Option<PathBuf>,
    v1: Vec<PathBuf>,
}

impl TestCgroup {
    fn make() -> TestCgroup {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("berth-monitor-test-{}-{number}", std::process::id());
        let base = Path::new("/sys/fs/cgroup");
        let mut cgroup = TestCgroup {
            v2: None,
            v1: Vec::new(),
        };
        if base.join("cgroup.controllers").exists() {
            let dir = base.join(&name);
            std::fs::create_dir(&dir).unwrap();
            cgroup.v2 = Some(dir);
        } else {
            for controller in ["memory", "pids"] {
                let dir = base.join(controller).join(&name);
                std::fs::create_dir(&dir).unwrap();
                cgroup.v1.push(dir);
            }
        }
        cgroup
    }

    pub fn proto(&self) -> proto::Cgroup {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        match &self.v2 {
            Some(dir) => proto::Cgroup {
                directory: text(dir),
                oom_file: text(&dir.join("memory.events")),
                kill_file: text(&dir.join("cgroup.kill")),
                ..Default::default()
            },
            None => proto::Cgroup {
                tasks_files: self.v1.iter().map(|dir| text(&dir.join("tasks"))).collect(),
                oom_file: text(&self.v1[0].join("memory.oom_control")),
                ..Default::default()
            },
        }
    }

    pub fn limit_memory(&self, bytes: u64) {
        let file = match &self.v2 {
            Some(dir) => dir.join("memory.max"),
            None => self.v1[0].join("memory.limit_in_bytes"),
        };
        std::fs::write(file, bytes.to_string()).unwrap();
    }

    /// The processes in it.
    pub fn pids(&self) -> Vec<i32> {
        let dir = self.v2.as_ref().unwrap_or_else(|| &self.v1[0]);
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        for dir in self.v2.iter().chain(&self.v1) {
            while std::fs::remove_dir(dir).is_err() && dir.exists() && Instant::now() < deadline {
                for pid in std::fs::read_to_string(dir.join("cgroup.procs"))
                    .unwrap_or_default()
                    .lines()
                    .filter_map(|line| line.parse().ok())
                {
                    if let Ok(pidfd) = berth_sys::pidfd::open(pid) {
                        let _ = berth_sys::pidfd::send_signal(pidfd, libc::SIGKILL);
                    }
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
