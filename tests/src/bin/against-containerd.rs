//! `make bench`: Berth and Debian's containerd with runc start pods in turns, on
//! the same image, in the same network namespace, each on its own bridge.
//!
//! Arguments go to `berth-bench`; the default is `start -n 50`. `pull` is measured with the images
//! of `berth_tests::bulk`, one after the other, or with the one that `--only` names, on a file
//! system of its own.

use anyhow::{Context, Result, ensure};
use berth_tests::host::Host;
use berth_tests::{Format, Image, Node, Packing, eventually};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use serde_json::json;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Set where [`on_its_own_file_system`] has run.
const INSIDE: &str = "BERTH_BENCH_INSIDE";

fn main() -> Result<()> {
    if std::env::args().nth(1).is_some_and(|what| what == "pull")
        && std::env::var_os(INSIDE).is_none()
    {
        return on_its_own_file_system();
    }
    let node = Node::start();
    // Whatever this machine has: BBR paces, also on loopback, and most nodes do not. Of those that do
    // not, a namespace may always choose this one.
    node.host
        .enter(|| fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno"))
        .context("cannot choose reno")?;
    let image = Image::builder(Format::Oci).base().build();
    let reference = node.registry().push("bench/base", "1", &image)?;
    // What holds containerd's pods together; ours do without.
    let program = berth_tests::Layer::new().file("pause", 0o755, berth_tests::image::PROBE);
    let pause = Image::builder(Format::Oci)
        .layer(&program, Packing::Gzip)
        .run("Entrypoint", json!(["/pause"]))
        .build();
    let pause = node.registry().push("bench/pause", "1", &pause)?;
    let containerd = Containerd::start(&node.host, node.root(), &pause)?;

    let mut arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.is_empty() {
        arguments = ["start", "-n", "50"].map(str::to_owned).to_vec();
    }
    let mut failed = None;
    if arguments.first().is_some_and(|what| what == "pull") {
        let only = only(&mut arguments)?;
        for weight in berth_tests::bulk::WEIGHTS {
            if only.as_ref().is_some_and(|only| *only != weight.name) {
                continue;
            }
            let reference = push_bulk(&node, weight)?;
            println!("\n== {} ==", weight.name);
            let mut arguments = arguments.clone();
            let layers = node.root().join("bulk").join(weight.name);
            arguments.extend(["--layers".into(), layers.display().to_string()]);
            let scratch = node.root().display().to_string();
            arguments.extend(["--scratch".into(), scratch]);
            failed = failed.or(bench(&node, &containerd, arguments, &reference).err());
        }
    } else {
        failed = bench(&node, &containerd, arguments, &reference).err();
    }
    drop(containerd);
    // Its bridge stays, as its plugins leave it.
    _ = node.host.run("ip", &["link", "del", "bench0"]);
    failed.map_or(Ok(()), Err)
}

/// Runs this program again with everything it writes on a fresh ext4 with a journal, as nodes have
/// it. A machine's own may lack one, and ext4 without a journal makes every new file look at all
/// inodes that were deleted in the last minutes: then pulls measure the removals before them.
/// Source: kernel, `fs/ext4/ialloc.c`, `recently_deleted`.
///
/// The mount is in a namespace of its own and its file has no name any more: nothing can stay.
fn on_its_own_file_system() -> Result<()> {
    const BYTES: u64 = 32 << 30;
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let (image, at) = (dir.path().join("ext4"), dir.path().join("mnt"));
    File::create_new(&image)?.set_len(BYTES)?;
    fs::create_dir(&at)?;
    let run = |program: &str, words: &[&OsStr]| -> Result<String> {
        let output = Command::new(program)
            .args(words)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        ensure!(output.status.success(), "{program}: {}", output.status);
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let (image_word, at_word) = (image.as_os_str(), at.as_os_str());
    // Nothing is left to be done while pulls are timed.
    let options = "lazy_itable_init=0,lazy_journal_init=0";
    run(
        "mkfs.ext4",
        &["-qFE".as_ref(), options.as_ref(), image_word],
    )?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    run(
        "mount",
        &["-o".as_ref(), "loop".as_ref(), image_word, at_word],
    )?;
    let find = ["-no", "SOURCE", "--mountpoint"].map(OsStr::new);
    let device = run("findmnt", &[&find[..], &[at_word]].concat())?;
    // Written once and not twice, where the file system below can do that.
    _ = run("losetup", &["--direct-io=on".as_ref(), device.as_ref()]);
    fs::remove_file(&image)?;
    let status = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env("BERTH_TEST_DIR", &at)
        .env(INSIDE, "1")
        .status()?;
    nix::mount::umount2(&at, MntFlags::MNT_DETACH)?;
    ensure!(status.success(), "the measurement: {status}");
    Ok(())
}

/// Takes `--only NAME` out of the arguments: one of the images instead of all.
fn only(arguments: &mut Vec<String>) -> Result<Option<String>> {
    let Some(at) = arguments.iter().position(|word| word == "--only") else {
        return Ok(None);
    };
    let end = arguments.len().min(at + 2);
    let only = arguments.drain(at..end).nth(1);
    let known = berth_tests::bulk::WEIGHTS.map(|weight| weight.name);
    ensure!(
        only.as_deref().is_some_and(|only| known.contains(&only)),
        "--only takes one of {known:?}"
    );
    Ok(only)
}

/// An image of that weight in the registry, and its layers beside it as files.
fn push_bulk(node: &Node, weight: berth_tests::bulk::Weight) -> Result<String> {
    let image = weight.image(u64::from(std::process::id()));
    let dir = node.root().join("bulk").join(weight.name);
    fs::create_dir_all(&dir)?;
    for (nth, layer) in image.layers.iter().enumerate() {
        fs::write(dir.join(format!("{nth:03}")), &layer.data)?;
    }
    let bytes: u64 = image.layers.iter().map(|layer| layer.size).sum();
    println!(
        "{}: {} MiB in {} layers",
        weight.name,
        bytes >> 20,
        image.layers.len()
    );
    node.registry().push("bench/bulk", weight.name, &image)
}

fn bench(
    node: &Node,
    containerd: &Containerd,
    arguments: Vec<String>,
    reference: &str,
) -> Result<()> {
    let bench = std::env::current_exe()?.with_file_name("berth-bench");
    let mut command = Command::new(&bench);
    command
        .args(arguments)
        .arg("--socket")
        .arg(node.socket())
        .arg("--socket")
        .arg(&containerd.socket)
        .args(["--image", reference])
        .args(["--cgroup-parent", &format!("/{}", node.footprint().cgroup)])
        // What streams are read into is not given back to the kernel and asked for again, page
        // by page: the client must not be what limits them. Source: mallopt(3).
        .env("MALLOC_MMAP_THRESHOLD_", "33554432")
        .env("MALLOC_TRIM_THRESHOLD_", "1073741824");
    // Where the runtimes' streaming servers are.
    let status = node
        .host
        .enter(|| command.status())
        .with_context(|| format!("cannot run {}", bench.display()))?;
    ensure!(status.success(), "berth-bench: {status}");
    Ok(())
}

struct Containerd {
    child: Child,
    socket: PathBuf,
    state: PathBuf,
}

impl Containerd {
    /// Below `root`, with the standard CNI plugins and the node's registry.
    fn start(host: &Host, root: &Path, pause: &str) -> Result<Self> {
        let dir = root.join("containerd");
        let cni = dir.join("cni");
        fs::create_dir_all(&cni)?;
        let network = json!({
            "cniVersion": "1.0.0", "name": "bench", "plugins": [{
                "type": "bridge", "bridge": "bench0", "isGateway": true, "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "dataDir": dir.join("leases"),
                    "ranges": [[{"subnet": "10.199.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }, {"type": "portmap", "capabilities": {"portMappings": true}}],
        });
        fs::write(cni.join("10-bench.conflist"), network.to_string())?;
        let socket = dir.join("c.sock");
        let show = |path: &Path| path.display().to_string();
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n[grpc]\naddress = {socket:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {pause:?}\n\
             disable_tcp_service = true\nrestrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\n\
             conf_dir = {cni:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = {certs:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {opt:?}\n",
            root = show(&dir.join("root")),
            state = show(&dir.join("state")),
            socket = show(&socket),
            cni = show(&cni),
            certs = show(&root.join("etc/certs.d")),
            opt = show(&dir.join("opt")),
        );
        let file = dir.join("config.toml");
        fs::write(&file, config)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = host.enter(|| command.spawn()).context(
            "cannot run containerd: install containerd, runc, containernetworking-plugins",
        )?;
        let containerd = Self {
            child,
            socket: socket.clone(),
            state: dir.join("state"),
        };
        eventually("containerd listens", || UnixStream::connect(&socket).ok());
        Ok(containerd)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
        // Its own mounts, of pods berth-bench could not remove.
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for point in table
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4))
        {
            if Path::new(point).starts_with(&self.state) {
                _ = nix::mount::umount2(point, MntFlags::MNT_DETACH);
            }
        }
    }
}
