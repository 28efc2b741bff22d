//! Layers written in a cgroup of their own: `images.pull_cgroup`.

use crate::image_disk::{self, Small};
use berth_proto::runtime_v1::PullImageRequest;
use berth_tests::http::{Response, Server};
use berth_tests::node::{is_cgroup_v2, is_systemd_driver, spec};
use berth_tests::{Format, Image, Layer, Node, Packing, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tonic::{Code, Status};

/// Bytes that do not compress.
fn noise(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    (0..count).map(byte).collect()
}

/// One layer of many blocks.
fn image(seed: u32) -> Image {
    let layer = Layer::new()
        .file("first", 0o644, noise(seed, 1 << 20))
        .file("second", 0o644, noise(seed + 1, 3 << 20));
    Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build()
}

/// A registry that sends half of the layer, and the rest once it may.
struct Stalling {
    server: Server,
    open: Arc<AtomicBool>,
}

impl Stalling {
    fn start(node: &Node, image: &Image) -> Self {
        let open = Arc::new(AtomicBool::new(false));
        let (may, image) = (Arc::clone(&open), image.clone());
        let server = Server::start(&node.host, move |request| {
            let layer = &image.layers[0];
            if request.target.contains("/manifests/") {
                return Response::new(200, &image.manifest.media_type, image.manifest.data.clone())
                    .header("docker-content-digest", &image.manifest.digest);
            }
            if request.target.ends_with(&image.config.digest) {
                return Response::new(200, "application/json", image.config.data.clone());
            }
            if !request.target.ends_with(&layer.digest) {
                return Response::not_found();
            }
            let start = request.headers.get("range").and_then(|range| {
                let start = range.strip_prefix("bytes=")?.strip_suffix('-')?;
                start.parse::<usize>().ok()
            });
            let Some(start) = start else {
                let half = layer.data.len() / 2;
                let until = if may.load(Ordering::SeqCst) {
                    layer.data.len()
                } else {
                    half
                };
                let mut first = Response::new(200, "x/y", &layer.data[..until]);
                first.claimed_length = Some(layer.data.len());
                return first;
            };
            eventually("the test goes on", || {
                may.load(Ordering::SeqCst).then_some(())
            });
            let range = format!(
                "bytes {start}-{}/{}",
                layer.data.len() - 1,
                layer.data.len()
            );
            Response::new(206, "x/y", &layer.data[start..]).header("content-range", &range)
        })
        .unwrap();
        Stalling { server, open }
    }

    fn reference(&self) -> String {
        format!("127.0.0.1:{}/stalling:1", self.server.port)
    }

    fn go_on(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

/// A test that fails does not leave a thread waiting.
impl Drop for Stalling {
    fn drop(&mut self) {
        self.go_on();
    }
}

type Pull = tokio::task::JoinHandle<Result<String, Status>>;

/// A pull that has come to where the registry stalls, and the process that writes its layer.
fn half_pulled(node: &Node, stalling: &Stalling) -> (Pull, i32) {
    let mut images = node.images();
    let request = PullImageRequest {
        image: Some(spec(&stalling.reference())),
        ..Default::default()
    };
    let pull = node.spawn(async move {
        let answer = images.pull_image(request).await?;
        Ok(answer.into_inner().image_ref)
    });
    let writer = eventually("a process writes the layer", || {
        let writers = node.layer_writers().into_iter().flatten().next();
        writers.filter(|_| written(node) > 1 << 20)
    });
    (pull, writer)
}

fn layers(node: &Node) -> Vec<PathBuf> {
    let entries = fs::read_dir(node.root().join("lib/images/layers")).unwrap();
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| !path.ends_with("empty")).collect()
}

/// Bytes in files of layers that are being written.
fn written(node: &Node) -> u64 {
    let sizes = layers(node).into_iter().flat_map(|layer| {
        ["fs/first", "fs/second"].map(|file| fs::metadata(layer.join(file)).map_or(0, |m| m.len()))
    });
    sizes.sum()
}

fn no_writers(node: &Node) {
    eventually("nothing writes any more", || {
        node.layer_writers().iter().all(Vec::is_empty).then_some(())
    });
}

#[track_caller]
fn no_layers(node: &Node) {
    eventually("nothing of the layer is left", || {
        layers(node).is_empty().then_some(())
    });
}

fn succeeded(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What `berth doctor` says of a subject: level and text.
fn doctor(node: &Node, args: &[&str], subject: &str) -> Vec<(String, String)> {
    let output = node.berth(&[&["doctor", "--json"], args].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("doctor prints JSON");
    let findings = report["findings"].as_array().expect("findings").iter();
    let of = findings.filter(|finding| finding["subject"] == subject);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    of.map(|f| (text(&f["level"]), text(&f["found"]))).collect()
}

/// Every file of every layer is read and compared with what was unpacked.
#[track_caller]
fn all_layers_are_whole(node: &Node) {
    let found = doctor(node, &["--verify"], "images");
    assert!(!found.is_empty());
    assert!(found.iter().all(|(level, _)| level == "good"), "{found:?}");
}

#[test]
fn a_layer_is_written_by_a_process_in_that_cgroup_in_every_hierarchy() {
    let node = Node::options().pull_cgroup(50).start();
    let image = image(1);
    let stalling = Stalling::start(&node, &image);
    let (pull, writer) = half_pulled(&node, &stalling);
    for pids in node.layer_writers() {
        assert_eq!(pids, [writer]);
    }
    let status = fs::read_to_string(format!("/proc/{writer}/status")).unwrap();
    let parent = format!("PPid:\t{}\n", node.daemon_pid().unwrap());
    assert!(status.contains(&parent), "{status}");
    assert!(status.contains("Threads:\t"), "{status}");
    let path = match (is_systemd_driver(), node.footprint().cgroup.as_str()) {
        (true, name) => format!("/{name}.slice/{name}-pulls.slice/"),
        (false, name) => format!("/{name}/pulls"),
    };
    let mut weighed = 0;
    let cgroups = fs::read_to_string(format!("/proc/{writer}/cgroup")).unwrap();
    for line in cgroups.lines() {
        let (hierarchy, own) = line.split_once(":/").unwrap();
        let named = hierarchy.contains("name=");
        if named || (hierarchy.starts_with("0:") && !is_cgroup_v2()) {
            continue;
        }
        weighed += 1;
        assert!(format!("/{own}").starts_with(&path), "{cgroups}");
    }
    assert!(weighed > 0);
    // The daemon writes none of it.
    let daemon = format!("/proc/{}/fd", node.daemon_pid().unwrap());
    for fd in fs::read_dir(daemon).unwrap().flatten() {
        let to = fs::read_link(fd.path()).unwrap_or_default();
        assert!(
            !to.ends_with("first") && !to.ends_with("second"),
            "{}",
            to.display()
        );
    }
    stalling.go_on();
    assert_eq!(
        node.wait(async { pull.await.unwrap().map(tonic::Response::new) })
            .unwrap(),
        image.id()
    );
    no_writers(&node);
    all_layers_are_whole(&node);
    assert_eq!(layers(&node).len(), 1);
}

#[test]
fn the_weight_is_written_and_what_keeps_it_from_working_is_said_once_and_by_doctor() {
    let node = Node::options().pull_cgroup(50).start();
    let (files, controller) = if is_cgroup_v2() {
        (["io.weight", "io.bfq.weight"], "io")
    } else {
        (["blkio.bfq.weight", "blkio.weight"], "blkio")
    };
    let dirs = node.pull_cgroups();
    assert!(!dirs.is_empty());
    let weights: Vec<(PathBuf, String)> = dirs
        .iter()
        .flat_map(|dir| files.map(|file| dir.join(file)))
        .filter_map(|file| Some((file.clone(), fs::read_to_string(file).ok()?)))
        .collect();
    for (file, text) in &weights {
        let wanted = if file.ends_with("blkio.weight") {
            "250"
        } else {
            "50"
        };
        assert!(
            text.split_whitespace().any(|word| word == wanted),
            "{} {text}",
            file.display()
        );
    }
    let found = doctor(&node, &[], "pull cgroup");
    let log = node.log();
    let said = |text: &str| {
        assert_eq!(log.matches(text).count(), 1, "{text}: {log}");
        let by_doctor = found.iter().filter(|(_, found)| found.contains(text));
        assert_eq!(by_doctor.count(), 1, "{text}: {found:?}");
    };
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let has = controllers
        .split_whitespace()
        .any(|name| name == controller)
        || Path::new("/sys/fs/cgroup").join(controller).is_dir();
    if !has {
        said(&format!("no {controller} cgroup controller"));
    } else if weights.is_empty() {
        said("the kernel has no weight for I/O here");
    } else if !some_disk_goes_by_weights() {
        said("no disk of this node goes by weights");
    }
    if has && !is_cgroup_v2() {
        said("what the kernel writes back later is nobody's");
    }
    assert!(
        found
            .iter()
            .any(|(level, text)| level == "good" && text.contains("pulls")),
        "{found:?}"
    );
    // Not by each pull.
    node.base_image();
    assert_eq!(
        node.log().matches("does less than it says").count(),
        log.matches("does less than it says").count()
    );
}

fn some_disk_goes_by_weights() -> bool {
    let disks = fs::read_dir("/sys/block").unwrap().flatten();
    let mut schedulers =
        disks.filter_map(|disk| fs::read_to_string(disk.path().join("queue/scheduler")).ok());
    schedulers.any(|text| text.contains("[bfq]"))
        || fs::read_to_string("/sys/fs/cgroup/io.cost.qos").is_ok_and(|t| t.contains("enable=1"))
}

#[test]
fn what_needs_its_parents_and_what_replaces_is_as_it_is_without() {
    let build = || {
        let lower = Layer::new().dir("d", 0o751).file("d/x", 0o644, "below ");
        // No entry for "d"; a directory that a file replaces, and a file that another does.
        let upper = Layer::new()
            .file("d/y", 0o640, "above ")
            .dir("r", 0o755)
            .file("r/a", 0o644, "hidden")
            .file("r", 0o644, "replaced ")
            .file("s", 0o644, "once")
            .file("s", 0o600, "twice");
        Image::builder(Format::Oci)
            .base()
            .layer(&lower, Packing::Zstd)
            .layer(&upper, Packing::Plain)
            .build()
    };
    let mut outputs = Vec::new();
    for options in [Node::options(), Node::options().pull_cgroup(0)] {
        let node = options.start();
        let reference = node.push("things/leaning", "1", &build());
        node.pull(&reference).unwrap();
        all_layers_are_whole(&node);
        let pod = node.run_pod("looks");
        let script = "cat /d/x /d/y /r /s; stat -c '%n %a %u:%g %s' /d /d/x /d/y /r /s";
        outputs.push(pod.output_as(pod.container_of(&reference, &["sh", "-c", script])));
        pod.remove();
        node.remove_image(&reference).unwrap();
        eventually("what was replaced is gone", || {
            let mut left = layers(&node).into_iter();
            let trash = left.any(|path| path.to_string_lossy().contains("trash-"));
            (!trash).then_some(())
        });
    }
    assert!(
        outputs[0].starts_with("below above replaced twice"),
        "{}",
        outputs[0]
    );
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn hostile_layers_are_refused_with_the_same_words() {
    let tar = Layer::new().file("file", 0o644, noise(9, 600_000)).tar();
    let packed = |data: Vec<u8>, packing, diff_id: String| {
        Image::builder(Format::Oci)
            .packed_layer(data, packing, diff_id)
            .build()
    };
    let gzip = |layer: &Layer| {
        Image::builder(Format::Oci)
            .layer(layer, Packing::Gzip)
            .build()
    };
    let whole = berth_tests::image::pack(&tar, Packing::Gzip);
    let of_tar = berth_tests::sha256(&tar);
    let mut damaged = whole.clone();
    damaged[300_000] ^= 0xff;
    let trailing = [&whole[..], b"and more"].concat();
    let images = [
        gzip(&Layer::new().file("a/../../../etc/x", 0o644, "x")),
        gzip(&Layer::new().hard_link("stolen", "etc/shadow")),
        gzip(&Layer::new().file(&"n".repeat(300), 0o644, "x")),
        gzip(
            &Layer::new()
                .symlink("a", "b")
                .symlink("b", "a")
                .file("a/x", 0o644, "x"),
        ),
        packed(whole[..300_000].to_vec(), Packing::Gzip, of_tar.clone()),
        packed(damaged, Packing::Gzip, of_tar.clone()),
        packed(trailing, Packing::Gzip, of_tar.clone()),
        packed(noise(5, 4096), Packing::Zstd, of_tar.clone()),
        packed(whole, Packing::Gzip, berth_tests::sha256(b"another")),
        packed(
            noise(4, 4096),
            Packing::Plain,
            berth_tests::sha256(&noise(4, 4096)),
        ),
    ];
    let mut said: Vec<Vec<(Code, String)>> = Vec::new();
    for options in [Node::options(), Node::options().pull_cgroup(0)] {
        let node = options.start();
        let refused = images.iter().map(|image| {
            let reference = node.push("hostile", &node.fresh("v"), image);
            let status = node
                .pull(&reference)
                .expect_err("a hostile image was pulled");
            (status.code(), status.message().replace(&reference, "IT"))
        });
        said.push(refused.collect());
        no_layers(&node);
        no_writers(&node);
    }
    for (without, with) in said[0].iter().zip(&said[1]) {
        assert_eq!(without, with);
    }
    // What the kernel refuses is told as it refuses it.
    let codes: Vec<Code> = said[0].iter().map(|(code, _)| *code).collect();
    assert_eq!(codes[2], Code::Internal, "{said:?}");
    let others = codes
        .iter()
        .filter(|code| **code == Code::FailedPrecondition);
    assert_eq!(others.count(), images.len() - 1, "{said:?}");
}

#[test]
fn a_layer_of_wrong_bytes_is_the_registrys_fault_as_it_is_without() {
    for options in [Node::options(), Node::options().pull_cgroup(0)] {
        let node = options.start();
        let image = image(5);
        let reference = node.push("wrong", "1", &image);
        let mut data = image.layers[0].data.clone();
        data[2_000_000] ^= 1;
        node.registry()
            .corrupt(&image.layers[0].digest, &data)
            .unwrap();
        let status = node.pull(&reference).unwrap_err();
        assert_eq!(status.code(), Code::DataLoss, "{status}");
        no_layers(&node);
    }
}

#[test]
fn a_full_disk_is_named_and_gets_its_room_back() {
    let small = Small::mount("size=32m");
    let node = small.options().pull_cgroup(0).start();
    let reference = node.push("things/large", "1", &image_disk::image());
    let mut pulled = false;
    for left in (0..16).map(|step| step * 700_000) {
        small.fill(left);
        let before = small.free();
        let Err(status) = node.pull(&reference) else {
            pulled = true;
            break;
        };
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("small on"), "{status}");
        eventually("the room is given back", || {
            (small.free() >= before).then_some(())
        });
    }
    assert!(pulled, "there was room in the end");
}

#[test]
fn a_killed_writer_is_an_error_that_says_so_and_leaves_nothing() {
    let node = Node::options().pull_cgroup(0).start();
    let image = image(11);
    let stalling = Stalling::start(&node, &image);
    let (pull, writer) = half_pulled(&node, &stalling);
    kill(Pid::from_raw(writer), Signal::SIGKILL).unwrap();
    stalling.go_on();
    let status = node
        .wait(async { pull.await.unwrap().map(tonic::Response::new) })
        .unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    assert!(
        status.message().contains("was killed (signal 9)"),
        "{status}"
    );
    assert_eq!(node.list_images(), []);
    no_layers(&node);
    no_writers(&node);
    assert_eq!(node.pull(&stalling.reference()).unwrap(), image.id());
    all_layers_are_whole(&node);
}

#[test]
fn a_writer_ends_with_a_killed_daemon_and_leaves_nothing() {
    let node = Node::options().pull_cgroup(0).start();
    let image = image(13);
    let stalling = Stalling::start(&node, &image);
    let (_pull, writer) = half_pulled(&node, &stalling);
    node.kill_daemon();
    eventually("the writer ends", || {
        let there = Path::new("/proc").join(writer.to_string()).join("exe");
        fs::read_link(there).is_err().then_some(())
    });
    no_writers(&node);
    node.start_daemon();
    no_layers(&node);
    stalling.go_on();
    assert_eq!(node.pull(&stalling.reference()).unwrap(), image.id());
    all_layers_are_whole(&node);
}

#[test]
fn an_import_is_written_there_as_well() {
    let node = Node::start();
    let image = image(17);
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    let archive = node.root().join("image.tar");
    let path = archive.to_str().unwrap();
    succeeded(&node.berth(&["image", "export", &reference, "--output", path]));
    let elsewhere = Node::options().pull_cgroup(0).start();
    succeeded(&elsewhere.berth(&["image", "import", path]));
    assert_eq!(elsewhere.image(&reference).unwrap().id, image.id());
    all_layers_are_whole(&elsewhere);
    // The pages of what was written are the cgroup's.
    let files = ["memory.max_usage_in_bytes", "memory.peak"];
    let peaks = elsewhere.pull_cgroups().into_iter().flat_map(|dir| {
        files.map(|file| {
            fs::read_to_string(dir.join(file))
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        })
    });
    let peak = peaks.flatten().max().expect("memory is counted here");
    assert!(peak > 4 << 20, "{peak}");
    // Written back by the kernel's own threads, and the cgroup's all the same.
    let on_a_disk = nix::sys::stat::major(fs::metadata(elsewhere.root()).unwrap().dev()) != 0;
    if is_cgroup_v2() && on_a_disk {
        let stats = elsewhere.pull_cgroups().into_iter();
        let stat = stats.filter_map(|dir| fs::read_to_string(dir.join("io.stat")).ok());
        let text: String = stat.collect();
        let words = text.split_whitespace();
        let written = words.filter_map(|word| word.strip_prefix("wbytes=")?.parse::<u64>().ok());
        assert!(written.max() > Some(4 << 20), "{text}");
    }
    no_writers(&elsewhere);
}

#[test]
fn a_cgroup_that_somebody_removes_is_made_again() {
    let node = Node::options().pull_cgroup(50).start();
    let dirs = node.pull_cgroups();
    assert!(!dirs.is_empty());
    for dir in &dirs {
        if is_systemd_driver() {
            let slice = dir.file_name().unwrap();
            let stopped = Command::new("systemctl").arg("stop").arg(slice).status();
            assert!(stopped.unwrap().success());
        } else {
            fs::remove_dir(dir).unwrap();
        }
    }
    assert!(node.pull_cgroups().is_empty());
    node.base_image();
    assert_eq!(node.pull_cgroups(), dirs);
}

#[test]
fn without_the_option_nothing_of_it_is_there() {
    let node = Node::prepare("");
    // Also where all nodes are to have it.
    let _ = fs::remove_dir_all(node.root().join("etc/conf.d"));
    node.start_daemon();
    node.base_image();
    assert!(node.pull_cgroups().is_empty());
    assert_eq!(doctor(&node, &[], "pull cgroup"), []);
}
