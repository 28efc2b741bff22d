//! CheckpointContainer. Where CRIU passes its own check the whole of it is asked
//! for, restored images included; where it does not, the refusal that says so.

use berth_proto::runtime_v1 as cri;
use berth_tests::container::LinuxConfig as _;
use berth_tests::deadline::{eventually, slowness};
use berth_tests::host::Host;
use berth_tests::{Container, Node, Pod};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tonic::{Code, Status};

/// A value that is nowhere but in memory, and a number that rises.
const COUNTER: &str = "read k < /proc/sys/kernel/random/uuid; n=0; rm -r /etc/group /www; \
    mkdir /www; echo new > /www/new; while :; do n=$((n + 1)); echo $n > /count; echo $k $n; sleep 0.1; done";

fn request(container: &Container<'_>, location: &Path) -> cri::CheckpointContainerRequest {
    cri::CheckpointContainerRequest {
        container_id: container.id.clone(),
        location: location.display().to_string(),
        timeout: i64::from(50 * slowness()),
    }
}

pub fn checkpoint(container: &Container<'_>, location: &Path) -> Result<(), Status> {
    let node = container.node;
    let asked = request(container, location);
    node.wait(node.runtime().checkpoint_container(asked))
        .map(drop)
}

/// Whether CRIU works here. Where it does not, this has asserted that Berth says so.
pub fn works(container: &Container<'_>, location: &Path) -> bool {
    let check = Command::new("criu").arg("check").output();
    if check.is_ok_and(|output| output.status.success()) {
        return true;
    }
    let error = checkpoint(container, location).expect_err("CRIU does not work here");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("CRIU"), "{error}");
    assert_eq!(container.state(), cri::ContainerState::ContainerRunning);
    assert_eq!(beside(location), [""; 0]);
    println!("CRIU does not work here: {}", error.message());
    false
}

/// What is in the location's directory, but for the location itself.
pub fn beside(location: &Path) -> Vec<String> {
    let entries = fs::read_dir(location.parent().unwrap()).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path != location)
        .map(|path| path.display().to_string())
        .collect()
}

pub fn place(node: &Node) -> PathBuf {
    let directory = node.root().join("checkpoints");
    fs::create_dir_all(&directory).unwrap();
    directory.join("checkpoint.tar")
}

fn last(text: &str) -> Option<(String, u64)> {
    let (key, number) = text.lines().last()?.split_once(' ')?;
    Some((key.to_owned(), number.parse().ok()?))
}

fn counted(container: &Container<'_>) -> (String, u64) {
    eventually("it counts", || last(&container.stdout()))
}

/// It runs, and not just by name.
pub fn goes_on(container: &Container<'_>) {
    let (key, before) = counted(container);
    eventually("it goes on counting", || {
        (counted(container).1 > before + 1).then_some(())
    });
    assert_eq!(counted(container).0, key);
    assert_eq!(container.exec(&["echo", "runs"]), "runs\n");
}

/// A counter that has begun.
pub fn counter<'n>(pod: &Pod<'n>) -> Container<'n> {
    let container = pod.start(&["sh", "-c", COUNTER]);
    eventually("it counts", || (counted(&container).1 > 2).then_some(()));
    container
}

fn tar(args: &[&str], directory: &Path) -> String {
    let output = Command::new("tar")
        .args(args)
        .current_dir(directory)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tar {args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

/// Everything an archive has to have, unpacked.
fn unpacked(node: &Node, container: &Container<'_>, location: &Path, handler: &str) -> PathBuf {
    let mode = fs::metadata(location).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let directory = node.root().join(node.fresh("unpacked"));
    fs::create_dir(&directory).unwrap();
    tar(&["-xf", &location.display().to_string()], &directory);
    for name in [
        "bind.mounts",
        "config.dump",
        "container.log",
        "deleted.files",
        "dump.log",
        "rootfs-diff.tar",
        "spec.dump",
        "stats-dump",
        "checkpoint/core-1.img",
        "checkpoint/descriptors.json",
        "checkpoint/inventory.img",
        "checkpoint/pages-1.img",
    ] {
        assert!(
            directory.join(name).is_file(),
            "{name} is not in the archive"
        );
    }
    let config = json_of(&directory.join("config.dump"));
    assert_eq!(config["id"], container.id.as_str());
    assert_eq!(config["runtime"], handler);
    assert_eq!(config["rootfsImageName"], node.base_image().as_str());
    assert_eq!(
        config["rootfsImageRef"],
        container.status().image_ref.as_str()
    );
    let spec = json_of(&directory.join("spec.dump"));
    assert_eq!(
        spec["annotations"]["io.kubernetes.cri.container-name"],
        container.status().metadata.unwrap().name.as_str()
    );
    assert_eq!(
        json_of(&directory.join("deleted.files")),
        json!(["/etc/group", "/www/index.html"])
    );
    let mounts = json_of(&directory.join("bind.mounts"));
    let hosts = mounts.as_array().unwrap().iter();
    let hosts = hosts.filter(|mount| mount["destination"] == "/etc/hosts");
    assert_eq!(
        hosts
            .map(|mount| mount["file_type"].clone())
            .collect::<Vec<_>>(),
        ["file"]
    );
    directory
}

/// A container that runc has restored; gone with this.
struct Restored<'a> {
    runtime: &'a str,
    state: PathBuf,
    _network: Host,
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        let deleted = Command::new(self.runtime)
            .arg("--root")
            .arg(&self.state)
            .args(["delete", "--force", "restored"])
            .status();
        assert!(deleted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Restores what is in `images` on the container's image and its changes, in a
/// network of its own, and reads what the restored process prints.
fn restore(node: &Node, images: &Path, runtime: &str) -> Vec<String> {
    let bundle = node.root().join(node.fresh("bundle"));
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&rootfs).unwrap();
    // The base image has one layer.
    let layers = fs::read_dir(node.root().join("lib/images/layers")).unwrap();
    let layers: Vec<_> = layers
        .map(|entry| entry.unwrap().path().join("fs"))
        .filter(|path| path.join("bin/busybox").exists())
        .collect();
    assert_eq!(layers.len(), 1);
    let copied = Command::new("cp")
        .args(["-a", "."])
        .arg(&rootfs)
        .current_dir(&layers[0])
        .status();
    assert!(copied.unwrap().success());
    let diff = images.join("rootfs-diff.tar").display().to_string();
    tar(&["-xf", &diff], &rootfs);
    for deleted in json_of(&images.join("deleted.files")).as_array().unwrap() {
        let path = deleted.as_str().unwrap().trim_start_matches('/').to_owned();
        fs::remove_file(rootfs.join(path)).unwrap();
    }
    let network = Host::new().unwrap();
    let netns = network.handle().unwrap();
    let mut spec = json_of(&images.join("spec.dump"));
    spec["ociVersion"] = json!("1.0.2");
    spec["root"] = json!({"path": "rootfs"});
    spec["linux"]["cgroupsPath"] = json!(format!("/berth-restored-{}", std::process::id()));
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        let namespace = namespace.as_object_mut().unwrap();
        namespace.remove("path");
        if namespace["type"] == "network" {
            let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
            namespace.insert("path".into(), json!(path));
        }
    }
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let state = bundle.join("state");
    // crun wants it to be there.
    fs::create_dir(bundle.join("work")).unwrap();
    let mut child = Command::new(runtime)
        .arg("--root")
        .arg(&state)
        .args(["restore", "--detach", "--bundle"])
        .arg(&bundle)
        .arg("--image-path")
        .arg(images.join("checkpoint"))
        .arg("--work-path")
        .arg(bundle.join("work"))
        .arg("restored")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(bundle.join("said")).unwrap())
        .spawn()
        .unwrap();
    let out = child.stdout.take().unwrap();
    let ended = child.wait().unwrap();
    if !ended.success() {
        let said = fs::read_to_string(bundle.join("said")).unwrap_or_default();
        let log = fs::read_to_string(bundle.join("work/restore.log")).unwrap_or_default();
        let errors: Vec<_> = log
            .lines()
            .filter(|l| l.contains("Error") || l.contains("Warn"))
            .collect();
        panic!("{runtime} restore: {ended}\n{said}\n{}", errors.join("\n"));
    }
    let _restored = Restored {
        runtime,
        state,
        _network: network,
    };
    let lines = BufReader::new(out).lines();
    let lines = lines.take(4).map(Result::unwrap).collect();
    assert_eq!(fs::read_to_string(rootfs.join("www/new")).unwrap(), "new\n");
    let count = fs::read_to_string(rootfs.join("count")).unwrap();
    assert!(count.trim().parse::<u64>().unwrap() > 2, "{count}");
    lines
}

/// What was dumped goes on where it was.
fn whole(node: &Node, pod: &Pod<'_>, handler: &str, restorer: &str) {
    let container = counter(pod);
    let location = place(node);
    if !works(&container, &location) {
        return;
    }
    let (key, before) = counted(&container);
    checkpoint(&container, &location)
        .unwrap_or_else(|error| panic!("{handler}: {error}\n{}", node.log()));
    goes_on(&container);
    assert_eq!(beside(&location), [""; 0]);
    let images = unpacked(node, &container, &location, handler);
    let logged = fs::read_to_string(images.join("container.log")).unwrap();
    let at = logged.trim_end().rsplit(' ').next().unwrap().to_owned();
    let at: u64 = at.parse().unwrap();
    assert!(at >= before, "{at} {before}");

    let printed = restore(node, &images, restorer);
    let numbers: Vec<u64> = printed
        .iter()
        .map(|line| {
            let (restored, number) = last(line).unwrap();
            assert_eq!(restored, key, "another memory: {printed:?}");
            number
        })
        .collect();
    // What was in a pipe at the moment is in the images and in neither log.
    assert!(
        numbers[0] <= at + 2 && numbers[0] >= before,
        "{at}: {numbers:?}"
    );
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
    goes_on(&container);
    container.stop(0).unwrap();
    pod.remove();
}

#[test]
fn a_running_container_is_checkpointed_and_its_images_go_on_where_it_was() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    whole(&node, &pod, "berth", "runc");
}

#[test]
fn a_container_of_another_runtime_is_checkpointed_by_it() {
    let node = Node::start();
    for handler in ["runc", "crun"] {
        let run = node.try_run_by(handler, node.pod_config(handler));
        let pod = run.unwrap();
        let has = Command::new(handler)
            .args(["checkpoint", "--help"])
            .output();
        if !has.unwrap().status.success() {
            // Debian 12's crun is built without CRIU.
            let container = counter(&pod);
            let location = place(&node);
            if works(&container, &location) {
                let error = checkpoint(&container, &location).unwrap_err();
                assert_eq!(error.code(), Code::Unimplemented, "{error}");
                assert!(error.message().contains("has no checkpoints"), "{error}");
                goes_on(&container);
            }
            continue;
        }
        whole(&node, &pod, handler, handler);
    }
}

#[test]
fn volumes_and_masks_of_a_container_do_not_keep_it_from_a_checkpoint() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let volume = node.root().join("volume");
    fs::create_dir(&volume).unwrap();
    let mut config = pod.container(&["sh", "-c", COUNTER]);
    config.mount(&volume, "/data");
    config.mount("/etc/os-release", "/data/file").readonly = true;
    let container = pod.start_as(config);
    eventually("it counts", || (counted(&container).1 > 2).then_some(()));
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    checkpoint(&container, &location).unwrap_or_else(|error| panic!("{error}\n{}", node.log()));
    goes_on(&container);
}

#[test]
fn a_checkpoint_says_beforehand_what_is_missing_for_it() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let idle = pod.create(pod.container(&["sleep", "1000"]));
    let location = place(&node);
    let error = checkpoint(&idle, &location).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("does not run"), "{error}");
    idle.start().unwrap();
    let error = checkpoint(&idle, Path::new("checkpoint.tar")).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let nowhere = node.root().join("no/such/directory/checkpoint.tar");
    let error = checkpoint(&idle, &nowhere).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("no/such/directory"), "{error}");
    let error = checkpoint(&idle, node.root()).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let mut config = pod.container(&["sleep", "1000"]);
    config.tty = true;
    let terminal = pod.start_as(config);
    if !works(&terminal, &location) {
        return;
    }
    let error = checkpoint(&terminal, &location).unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented, "{error}");
    assert!(error.message().contains("terminal"), "{error}");
    assert_eq!(beside(&location), [""; 0]);
}

#[test]
fn what_criu_cannot_dump_is_told_in_its_words_and_runs_on() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    // CRIU does not know PID namespaces inside a container's.
    let script = format!("unshare -p -f sleep 1000 & {COUNTER}");
    let mut config = pod.container(&["sh", "-c", &script]);
    let capabilities = config.security().capabilities.get_or_insert_default();
    capabilities.add_capabilities = vec!["SYS_ADMIN".to_owned()];
    let container = pod.start_as(config);
    eventually("it counts", || (counted(&container).1 > 2).then_some(()));
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    let error = checkpoint(&container, &location).unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert!(error.message().contains("CRIU: "), "{error}");
    assert!(error.message().contains("namespace"), "{error}");
    goes_on(&container);
    assert!(!location.exists());
    assert_eq!(beside(&location), [""; 0]);
}

#[test]
fn a_full_disk_is_named_and_the_container_runs_on() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let container = counter(&pod);
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    let directory = location.parent().unwrap();
    let mount = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).arg(directory).status();
        assert!(done.unwrap().success());
    };
    mount("mount", &["-t", "tmpfs", "-o", "size=256k", "tmpfs"]);
    let error = checkpoint(&container, &location);
    let (exists, left) = (location.exists(), beside(&location));
    mount("umount", &[]);
    let error = error.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert!(error.message().contains("disk is full"), "{error}");
    assert!(
        error.message().contains(&directory.display().to_string()),
        "{error}"
    );
    assert!(!exists);
    assert_eq!(left, [""; 0]);
    goes_on(&container);
}

/// Processes of this program that dump for the location.
fn dumpers(location: &Path) -> Vec<nix::unistd::Pid> {
    let directory = location.parent().unwrap().display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.contains(&directory) && line.contains("\0dump\0") && !line.contains("--gate") {
            found.push(nix::unistd::Pid::from_raw(pid));
        }
    }
    found
}

#[test]
fn a_dump_that_hangs_is_given_up_in_time_and_the_container_runs_on() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let container = counter(&pod);
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    let timeout = i64::from(4 * slowness());
    let asked = cri::CheckpointContainerRequest {
        timeout,
        ..request(&container, &location)
    };
    let mut client = node.runtime();
    let call = node.spawn(async move { client.checkpoint_container(asked).await });
    let stopped = eventually("CRIU dumps", || {
        let work = dumpers(&location);
        let _ = work
            .iter()
            .map(|pid| nix::sys::signal::kill(*pid, nix::sys::signal::Signal::SIGSTOP))
            .collect::<Vec<_>>();
        (!work.is_empty()).then_some(work)
    });
    println!("stopped {stopped:?}");
    let error = node.wait(async { call.await.unwrap() }).unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    goes_on(&container);
    assert!(!location.exists());
    assert_eq!(beside(&location), [""; 0]);
    checkpoint(&container, &location).unwrap_or_else(|error| panic!("{error}\n{}", node.log()));
    goes_on(&container);
}

#[test]
fn a_stop_has_the_right_of_way() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let container = counter(&pod);
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    let asked = request(&container, &location);
    let mut client = node.runtime();
    let call = node.spawn(async move { client.checkpoint_container(asked).await });
    eventually("CRIU dumps", || {
        (!dumpers(&location).is_empty()).then_some(())
    });
    container.stop(0).unwrap();
    assert_eq!(container.state(), cri::ContainerState::ContainerExited);
    match node.wait(async { call.await.unwrap() }) {
        // It was through with the container by then.
        Ok(_) => assert!(location.exists()),
        Err(error) => {
            assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
            assert!(error.message().contains("stopped"), "{error}");
            assert!(!location.exists());
        }
    }
    assert_eq!(beside(&location), [""; 0]);
}

#[test]
fn a_second_call_joins_the_first_and_one_for_elsewhere_is_refused() {
    let node = Node::start();
    let pod = node.try_run_by("", node.pod_config("web")).unwrap();
    let container = counter(&pod);
    let location = place(&node);
    if !works(&container, &location) {
        return;
    }
    let calls = (0..2).map(|_| {
        let mut client = node.runtime();
        let asked = request(&container, &location);
        async move { client.checkpoint_container(asked).await }
    });
    for answer in node.wait_all(calls.collect()) {
        answer.unwrap();
    }
    let once = node.log().matches("joined the running operation").count();
    assert_eq!(once, 1);

    let asked = request(&container, &location);
    let mut client = node.runtime();
    let call = node.spawn(async move { client.checkpoint_container(asked).await });
    let elsewhere = location.with_file_name("elsewhere.tar");
    eventually("CRIU dumps", || {
        (!dumpers(&location).is_empty()).then_some(())
    });
    match checkpoint(&container, &elsewhere) {
        Err(error) => {
            assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
            assert!(error.message().contains("already"), "{error}");
        }
        // The first one was done before this one's own check of CRIU was.
        Ok(()) => fs::remove_file(&elsewhere).unwrap(),
    }
    node.wait(async { call.await.unwrap() }).unwrap();
    assert_eq!(beside(&location), [""; 0]);
    goes_on(&container);
}

#[test]
fn a_doctor_says_whether_checkpoints_work() {
    let node = Node::start();
    let output = node.berth(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().iter();
    let found: Vec<_> = findings.filter(|f| f["subject"] == "checkpoints").collect();
    assert_eq!(found.len(), 1, "{report}");
    let check = Command::new("criu").arg("check").output();
    let level = match check.is_ok_and(|output| output.status.success()) {
        true => "good",
        false => "warning",
    };
    assert_eq!(found[0]["level"], level, "{report}");
    assert!(
        found[0]["found"].as_str().unwrap().contains("CRIU"),
        "{report}"
    );
}
