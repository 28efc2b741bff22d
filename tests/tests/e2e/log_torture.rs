//! Logs under everything at once: many writers, lines of all lengths, rotation,
//! a daemon that is killed again and again, disks that are full or hang.

use crate::hung_disk::HungDisk;
use crate::metrics::{PORT, value};
use berth_proto::runtime_v1::ReopenContainerLogRequest;
use berth_tests::{Container, Node, eventually, http};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tonic::Code;

/// Containers that write at the same time.
const WRITERS: u64 = 16;

/// How often every log is rotated.
const ROTATION: Duration = Duration::from_millis(100);

/// MiB that all of them write together. 2048 is what a release is measured by.
fn mebibytes() -> u64 {
    std::env::var("BERTH_TEST_LOG_MIB").map_or(64, |text| text.parse().unwrap())
}

/// The lines of one stream of `probe talk SEED BYTES`, in order.
struct Expected {
    seed: u64,
    stream: usize,
    random: u64,
    counts: [u64; 2],
    written: u64,
    bytes: u64,
    letters: Vec<u8>,
}

impl Expected {
    fn new(seed: u64, stream: usize, bytes: u64) -> Self {
        Self {
            seed,
            stream,
            random: seed * 2 + 1,
            counts: [0; 2],
            written: 0,
            bytes,
            letters: (0..(1_u32 << 20) + 26)
                .map(|at| b'a' + (at % 26) as u8)
                .collect(),
        }
    }
}

impl Iterator for Expected {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        while self.written < self.bytes {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let random = self.random;
            let stream = (random >> 8 & 1) as usize;
            let length = match random >> 9 & 255 {
                0 => (random >> 20) % ((1 << 20) + 1),
                1..=16 => (random >> 20) % 20_000,
                17..=32 => 0,
                _ => (random >> 20) % 200,
            };
            let number = self.counts[stream];
            self.counts[stream] += 1;
            self.written += length + 1;
            if stream != self.stream {
                continue;
            }
            let (at, length) = ((number % 26) as usize, length as usize);
            let mut line = self.letters[at..at + length].to_vec();
            if length >= 32 {
                let name = format!("<{} {number}>", self.seed);
                line[..name.len()].copy_from_slice(name.as_bytes());
            }
            return Some(line);
        }
        None
    }
}

/// Compares a stream's log with what was written, as it comes.
struct Stream {
    name: &'static str,
    expected: std::iter::Peekable<Expected>,
    /// Parts of a line that is not whole yet.
    parts: Vec<u8>,
    /// What is there of the next line is only its beginning.
    damaged: bool,
    dropped: u64,
}

impl Stream {
    fn take(&mut self, tag: u8, text: &[u8]) {
        if tag == b'F' && text.starts_with(b"[berth: ") {
            assert!(self.parts.is_empty(), "a remark inside a line");
            let text = String::from_utf8_lossy(text);
            let lines: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
            for _ in 0..lines {
                assert!(self.expected.next().is_some(), "{text}");
            }
            self.damaged = false;
            self.dropped += lines;
            return;
        }
        assert!(!self.damaged, "a line after the beginning of another");
        self.parts.extend_from_slice(text);
        if tag == b'P' {
            assert_eq!(text.len(), 16 << 10);
            return;
        }
        let wanted = self.expected.peek().unwrap_or_else(|| {
            let text = String::from_utf8_lossy(&self.parts);
            panic!("{}: a line too many: {:.100}", self.name, text)
        });
        if *wanted == self.parts {
            self.expected.next();
        } else if wanted.starts_with(&self.parts) {
            self.damaged = true;
        } else {
            panic!(
                "{}: expected {:.100}, found {:.100}",
                self.name,
                String::from_utf8_lossy(wanted),
                String::from_utf8_lossy(&self.parts)
            );
        }
        self.parts.clear();
    }
}

/// One container's log: its current file, and those that were rotated away.
struct Log<'n> {
    container: Container<'n>,
    streams: [Stream; 2],
    rotated: VecDeque<PathBuf>,
    rotations: u64,
    /// The file was renamed, and the container not told yet.
    renamed: Option<PathBuf>,
    ended: bool,
}

impl<'n> Log<'n> {
    fn new(container: Container<'n>, seed: u64, bytes: u64) -> Self {
        let stream = |name, index| Stream {
            name,
            expected: Expected::new(seed, index, bytes).peekable(),
            parts: Vec::new(),
            damaged: false,
            dropped: 0,
        };
        Self {
            container,
            streams: [stream("stdout", 0), stream("stderr", 1)],
            rotated: VecDeque::new(),
            rotations: 0,
            renamed: None,
            ended: false,
        }
    }

    /// As the kubelet does, but that it asks again where the daemon was away.
    fn rotate(&mut self) {
        let path = &self.container.log_path;
        if self.renamed.is_none() {
            let aside = path.with_extension(format!("log.{}", self.rotations));
            if fs::rename(path, &aside).is_err() {
                return;
            }
            self.rotations += 1;
            self.renamed = Some(aside);
        }
        let request = ReopenContainerLogRequest {
            container_id: self.container.id.clone(),
        };
        let node = self.container.node;
        match node.wait(node.runtime().reopen_container_log(request)) {
            Ok(_) => self.rotated.extend(self.renamed.take()),
            // It has ended, and the old file has everything.
            Err(error) if error.code() == Code::FailedPrecondition => self.ended = true,
            // The daemon is away: once more next time.
            Err(_) => {}
        }
    }

    fn check_rotated(&mut self) {
        while let Some(path) = self.rotated.pop_front() {
            self.check(&path);
        }
    }

    /// Compares a file that nobody writes to any more, and removes it.
    fn check(&mut self, path: &Path) {
        let mut reader = BufReader::with_capacity(1 << 20, File::open(path).unwrap());
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).unwrap() > 0 {
            assert_eq!(line.pop(), Some(b'\n'), "{}: a torn line", path.display());
            let (head, text) = line.split_at(40);
            let index = match &head[30..38] {
                b" stdout " => 0,
                b" stderr " => 1,
                other => panic!("{}", String::from_utf8_lossy(other)),
            };
            self.streams[index].take(head[38], text);
            line.clear();
        }
        fs::remove_file(path).unwrap();
    }

    /// Everything after the container's end.
    fn finish(&mut self) {
        self.check_rotated();
        for path in self
            .renamed
            .take()
            .into_iter()
            .chain([self.container.log_path.clone()])
        {
            if path.exists() {
                self.check(&path);
            }
        }
        for stream in &mut self.streams {
            assert!(stream.parts.is_empty() && !stream.damaged);
            let missing = stream.expected.by_ref().count();
            assert_eq!(
                missing, 0,
                "{} lines of {} are missing",
                missing, stream.name
            );
        }
    }

    fn dropped(&self) -> u64 {
        self.streams.iter().map(|stream| stream.dropped).sum()
    }
}

/// A file system in memory; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf, mebibytes: u64) -> Self {
        fs::create_dir(&path).unwrap();
        let options = format!("size={mebibytes}m,mode=755");
        let none = MsFlags::empty();
        mount(
            Some("disk"),
            &path,
            Some("tmpfs"),
            none,
            Some(options.as_str()),
        )
        .unwrap();
        Self(path)
    }

    /// Leaves no room on it.
    fn fill(&self) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.0.join("filler"))
            .unwrap();
        let block = vec![0; 1 << 20];
        while file.write_all(&block).is_ok() {}
        let _ = file.write_all(&block[..4096]);
    }

    fn make_room(&self) {
        let _ = fs::remove_file(self.0.join("filler"));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// When the logs' disk is full.
#[derive(Clone, Copy, PartialEq)]
enum Full {
    Never,
    /// In between.
    ForFiveSeconds,
    /// From the start, for five seconds and until lines were dropped.
    UntilDropped,
}

/// The lines dropped, as the metrics say; `None` while the daemon is away.
fn counted(node: &Node) -> Option<f64> {
    let answer = http::send(&node.host, PORT, "GET", "/metrics", &[], &[]).ok()?;
    let text = String::from_utf8(answer.body).ok()?;
    let name = "berth_container_log_dropped_lines_total";
    text.contains(name).then(|| value(&text, name, &[]))
}

/// The lines dropped, as the logs say.
fn torture(node: &Node, mebibytes: u64, full: Full) -> u64 {
    let each = mebibytes * (1 << 20) / WRITERS;
    let disk = Disk::mount(node.root().join("logs"), 256);
    let pods: Vec<_> = (0..4)
        .map(|number| {
            let mut config = node.pod_config(&format!("talkers-{number}"));
            config.log_directory = disk.0.join(number.to_string()).display().to_string();
            node.run(config)
        })
        .collect();
    if full == Full::UntilDropped {
        disk.fill();
    }
    let mut logs: Vec<Log<'_>> = (0..WRITERS)
        .map(|seed| {
            let pod = &pods[seed as usize % pods.len()];
            let command = ["probe", "talk", &seed.to_string(), &each.to_string()];
            Log::new(pod.start(&command), seed, each)
        })
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1));
                node.kill_daemon();
                node.start_daemon();
            }
        });
        if full != Full::Never {
            let (disk, done) = (&disk, &done);
            scope.spawn(move || {
                let until = Instant::now() + Duration::from_secs(5);
                let more = || full == Full::UntilDropped && counted(node).unwrap_or(0.0) == 0.0;
                while !done.load(Ordering::Relaxed) && (Instant::now() < until || more()) {
                    // What rotation gives back is taken again.
                    disk.fill();
                    std::thread::sleep(Duration::from_millis(20));
                }
                disk.make_room();
            });
        }
        let _stop = Stop(&done);
        let mut next = Instant::now();
        while logs.iter().any(|log| !log.ended) {
            for log in logs.iter_mut().filter(|log| !log.ended) {
                log.rotate();
            }
            for log in &mut logs {
                log.check_rotated();
            }
            next += ROTATION;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    });
    for log in &mut logs {
        assert_eq!(log.container.wait_for_exit().exit_code, 0);
        log.finish();
        assert!(log.rotations > 0);
    }
    let dropped = logs.iter().map(Log::dropped).sum();
    assert_eq!(counted(node), Some(dropped as f64));
    node.remove_all_pods().unwrap();
    dropped
}

/// Lets the other threads go, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn node(policy: &str) -> Node {
    Node::options()
        .config(&format!(
            "[metrics]\naddress = \"127.0.0.1:{PORT}\"\n[logs]\non_full = \"{policy}\"\n"
        ))
        .start()
}

#[test]
fn no_line_is_lost_doubled_or_moved() {
    assert_eq!(torture(&node("block"), mebibytes(), Full::Never), 0);
}

#[test]
fn nor_with_a_full_disk_under_block() {
    assert_eq!(
        torture(&node("block"), mebibytes(), Full::ForFiveSeconds),
        0
    );
}

#[test]
fn under_drop_what_is_missing_is_what_is_counted_and_said() {
    // More than all queues and pipes hold.
    let mebibytes = mebibytes().max(160);
    assert!(torture(&node("drop"), mebibytes, Full::UntilDropped) > 0);
}

#[test]
fn a_log_disk_that_hangs_holds_up_its_own_container_only() {
    let node = Node::start();
    let pod = node.run_pod("web");
    let sibling = pod.start(&["sh", "-c", "while :; do echo on; sleep 0.05; done"]);
    // The log directory is the pod's: this log is on another disk below it.
    let logs = Path::new(&pod.config.log_directory);
    let disk = HungDisk::mount(&logs.join("hung"));
    let mut config = pod.container(&["sh", "-c", "while :; do probe spew 1000000; done"]);
    config.log_path = "hung/c.log".into();
    let stuck = pod.start_as(config);
    eventually("its log is being written", || {
        disk.is_written_to().then_some(())
    });

    let lines = sibling.log().len();
    assert_eq!(sibling.exec(&["echo", "fine"]), "fine\n");
    assert_eq!(stuck.exec(&["echo", "fine"]), "fine\n");
    let failing = pod.start(&["sh", "-c", "echo last; exit 7"]);
    assert_eq!(failing.wait_for_exit().exit_code, 7);
    assert_eq!(failing.stdout(), "last\n");
    eventually("the sibling's log goes on", || {
        (sibling.log().len() > lines + 2).then_some(())
    });
    // Its own end is told too, late by what its logger is waited for.
    stuck.stop(0).unwrap();
    assert_eq!(stuck.wait_for_exit().exit_code, 137);
    pod.try_stop().unwrap();
    pod.try_remove().unwrap();
    // What waits for the disk itself goes when the disk does.
    drop(disk);
}
