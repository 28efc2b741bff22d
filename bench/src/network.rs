//! What a pod's network costs to make, and what it lets through.
//!
//! Nothing of it needs a runtime: the host and the pods are network namespaces,
//! the built-in network is called as the daemon calls it, and Debian's plugins
//! are run as every runtime runs them.

use anyhow::{Context as _, Result, bail, ensure};
use berth_netplugin::bandwidth::Bandwidth;
use berth_netplugin::bridge::{Attach, Bridge, Settings};
use berth_netplugin::netns;
use berth_sys::clone::flag;
use berth_sys::namespace::unshare;
use clap::Args;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Most that the built-in network may take for a pod, at the median.
const LIMIT: Duration = Duration::from_millis(3);

/// How much faster than Debian's plugins it has to be.
const FASTER: f64 = 5.0;

/// Least part of a hand-made pair's throughput.
const THROUGHPUT: f64 = 0.97;

/// How the network is measured.
#[derive(Args, Clone)]
pub struct SetUp {
    /// Where CNI plugins are.
    #[arg(long, default_value = "/usr/lib/cni")]
    cni_bin_dir: PathBuf,
    /// Pods that have a network meanwhile.
    #[arg(long, default_value_t = 0)]
    existing: usize,
    /// Addresses of both families.
    #[arg(long)]
    dual_stack: bool,
}

/// How throughput is measured.
#[derive(Args, Clone)]
pub struct Throughput {
    /// Length of one run. Short ones in turns: what else the machine does is then in both.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
}

/// A network namespace, held by a descriptor alone.
struct Netns(File);

impl Netns {
    fn new() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(flag::NEWNET).context("cannot make a network namespace: this needs root")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        match made.join() {
            Ok(file) => Ok(Self(file?)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A path that other processes can open too.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(netns::run_in(self.0.as_fd(), work)?)
    }

    fn sh(&self, script: &str) -> Result<String> {
        let run = || Command::new("/bin/sh").args(["-ec", script]).output();
        output(script, self.enter(run)??)
    }
}

fn output(what: &str, output: Output) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        bail!("{what}: {}: {stdout}{stderr}", output.status);
    }
    Ok(text(&output.stdout))
}

/// A host: a namespace with a loopback and a way out.
fn host() -> Result<Netns> {
    let host = Netns::new()?;
    host.sh("ip link set lo up
         ip link add up0 type veth peer name up1
         ip link set up1 up; ip link set up0 up
         ip address add 198.51.100.1/24 dev up0
         ip route add default via 198.51.100.2")?;
    Ok(host)
}

fn settings(dir: &Path, dual_stack: bool) -> Settings {
    Settings {
        ipv6: if dual_stack {
            "fd77::/64".parse().ok()
        } else {
            None
        },
        ..Settings::new(dir.join("berth"))
    }
}

fn attach(bridge: &Bridge, id: &str, netns: &Path) -> Result<berth_netplugin::bridge::Attachment> {
    Ok(bridge.add(&Attach {
        id,
        name: id,
        netns,
        ifname: "eth0",
        port_mappings: &[],
        bandwidth: Bandwidth::default(),
    })?)
}

/// Debian's `bridge` with `host-local`, called as a runtime calls it.
struct Plugins {
    program: PathBuf,
    dirs: PathBuf,
    config: Value,
}

impl Plugins {
    fn new(
        dirs: &Path,
        state: &Path,
        bridge: &str,
        subnet: &str,
        masquerade: bool,
    ) -> Result<Self> {
        let program = dirs.join("bridge");
        ensure!(
            program.is_file(),
            "{} is missing: it is in the package containernetworking-plugins",
            program.display()
        );
        let config = json!({
            "cniVersion": "1.0.0", "name": bridge, "type": "bridge", "bridge": bridge,
            "isGateway": true, "ipMasq": masquerade, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": state.join("host-local"),
                "ranges": [[{ "subnet": subnet }]], "routes": [{ "dst": "0.0.0.0/0" }]
            }
        });
        Ok(Self {
            program,
            dirs: dirs.to_owned(),
            config,
        })
    }

    fn call(&self, verb: &str, id: &str, netns: &Path) -> Result<()> {
        let mut child = Command::new(&self.program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.dirs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.config.to_string().as_bytes())?;
        }
        output(verb, child.wait_with_output()?)?;
        Ok(())
    }
}

/// Milliseconds of each round, by what was timed.
#[derive(Default)]
struct Row {
    name: &'static str,
    add: Vec<f64>,
    del: Vec<f64>,
}

impl Row {
    fn named(name: &'static str) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}

/// The value below which `part` of all are.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // The cut is what is meant.
    sorted[((sorted.len() - 1) as f64 * part) as usize]
}

/// Gives pods their network in turns, by ours and by Debian's plugins.
///
/// # Errors
/// When something fails, and when ours is slower than it has to be.
pub fn set_up(options: &SetUp, rounds: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let host = host()?;
    let bridge = Bridge::open(settings(dir.path(), options.dual_stack))?;
    let plain = Plugins::new(
        &options.cni_bin_dir,
        dir.path(),
        "plain0",
        "10.188.0.0/16",
        false,
    )?;
    let full = Plugins::new(
        &options.cni_bin_dir,
        dir.path(),
        "masq0",
        "10.189.0.0/16",
        true,
    )?;
    let mut pods = Vec::new();
    for number in 0..options.existing {
        let pod = Netns::new()?;
        host.enter(|| attach(&bridge, &format!("existing{number}"), &pod.path()))??;
        pods.push(pod);
    }
    let (mut made, mut ours) = (Vec::new(), Row::named("built in (masquerading)"));
    let mut theirs = [
        (Row::named("bridge + host-local"), plain),
        (Row::named("the same with ipMasq"), full),
    ];
    // The first round makes bridges and warms caches, and is not counted.
    for round in 0..=rounds {
        let id = format!("round{round}");
        let begin = Instant::now();
        let pod = Netns::new()?;
        made.push(begin.elapsed().as_secs_f64() * 1000.0);
        let path = pod.path();
        let [add, del] = host.enter(|| -> Result<_> {
            Ok([
                timed(|| attach(&bridge, &id, &path))?,
                timed(|| Ok(bridge.del(&id, "eth0")?))?,
            ])
        })??;
        ours.add.push(add);
        ours.del.push(del);
        drop(pod);
        for (row, plugins) in &mut theirs {
            let pod = Netns::new()?;
            let path = pod.path();
            let [add, del] = host.enter(|| -> Result<_> {
                Ok([
                    timed(|| plugins.call("ADD", &id, &path))?,
                    timed(|| plugins.call("DEL", &id, &path))?,
                ])
            })??;
            row.add.push(add);
            row.del.push(del);
        }
    }
    let rows = [ours].into_iter().chain(theirs.map(|(row, _)| row));
    let rows: Vec<Row> = rows
        .map(|mut row| {
            row.add.remove(0);
            row.del.remove(0);
            row
        })
        .collect();
    println!(
        "network of a pod, {rounds} rounds, {} pods beside, in ms",
        options.existing
    );
    println!(
        "{:<26}{:>10}{:>10}{:>10}{:>10}",
        "", "set up", "90 of 100", "99", "taken back"
    );
    for row in &rows {
        let add = |part| quantile(&row.add, part);
        println!(
            "{:<26}{:>10.2}{:>10.2}{:>10.2}{:>10.2}",
            row.name,
            add(0.5),
            add(0.9),
            add(0.99),
            quantile(&row.del, 0.5)
        );
    }
    println!(
        "{:<26}{:>10.2}",
        "(making the namespace)",
        quantile(&made, 0.5)
    );
    let median = |row: &Row| quantile(&row.add, 0.5);
    let ours = median(&rows[0]);
    for row in &rows[1..] {
        println!("{} / built in: {:.1} x", row.name, median(row) / ours);
    }
    let limit = LIMIT.as_secs_f64() * 1000.0;
    ensure!(ours <= limit, "{ours:.2} ms is more than {limit:.0} ms");
    let faster = median(&rows[1]) / ours;
    ensure!(
        faster >= FASTER,
        "{faster:.1} times faster is less than {FASTER:.0} times"
    );
    Ok(())
}

/// A server that ends with its owner.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(pod: &Netns, address: &str) -> Result<Self> {
        let spawn = || {
            Command::new("iperf3")
                .args(["--server", "--bind", address, "--forceflush"])
                .stdout(Stdio::null())
                .spawn()
        };
        let server = Self(pod.enter(spawn)?.context("cannot run iperf3")?);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !pod.sh("ss -Hltn 'sport = :5201'")?.contains(":5201") {
            ensure!(Instant::now() < deadline, "iperf3 does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

/// Gbit per second between two pods, by iperf3.
fn send(from: &Netns, to: &str, seconds: u32) -> Result<f64> {
    let script = format!("iperf3 --json --client {to} --time {seconds}");
    let deadline = Instant::now() + Duration::from_secs(10);
    let text = loop {
        match from.sh(&script) {
            Ok(text) => break text,
            // The server is not done yet with the run before.
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let report: Value = serde_json::from_str(&text)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("iperf3 does not say how fast it was")? / 1e9)
}

/// Two pods of the built-in network, and two with veth pairs on a bridge made by
/// hand beside it, send in turns.
///
/// # Errors
/// When something fails, and when ours lets less through than it has to.
pub fn throughput(options: &Throughput, rounds: usize) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let host = host()?;
    let bridge = Bridge::open(settings(dir.path(), false))?;
    let ours = [Netns::new()?, Netns::new()?];
    let mut address = String::new();
    for (number, pod) in ours.iter().enumerate() {
        let attached = host.enter(|| attach(&bridge, &format!("pod{number}"), &pod.path()))??;
        address = attached.ips[0].address().to_string();
    }
    let theirs = [Netns::new()?, Netns::new()?];
    host.sh("ip link add hand0 type bridge; ip link set hand0 up; ip address add 10.190.0.1/16 dev hand0")?;
    for (number, pod) in theirs.iter().enumerate() {
        let path = pod.path();
        host.sh(&format!(
            "ip link add h{number} type veth peer name eth0 netns {}
             ip link set h{number} master hand0 up",
            path.display()
        ))?;
        pod.sh(&format!(
            "ip link set lo up; ip address add 10.190.0.{}/16 dev eth0; ip link set eth0 up",
            number + 2
        ))?;
    }
    let _servers = [
        Server::start(&ours[1], &address)?,
        Server::start(&theirs[1], "10.190.0.3")?,
    ];
    let (mut built_in, mut by_hand) = (Vec::new(), Vec::new());
    // The first round warms up, and is not counted; who is first changes.
    for round in 0..=rounds {
        let run = |mine: bool| match mine {
            true => send(&ours[0], &address, options.seconds),
            false => send(&theirs[0], "10.190.0.3", options.seconds),
        };
        let first = run(round % 2 == 0)?;
        let second = run(round % 2 != 0)?;
        let (mine, hand) = if round % 2 == 0 {
            (first, second)
        } else {
            (second, first)
        };
        if round > 0 {
            built_in.push(mine);
            by_hand.push(hand);
        }
    }
    println!(
        "between two pods, {rounds} rounds of {} s, in Gbit/s",
        options.seconds
    );
    println!("{:<26}{:>10}{:>10}", "", "median", "best");
    for (name, values) in [("built in", &built_in), ("by hand", &by_hand)] {
        println!(
            "{name:<26}{:>10.2}{:>10.2}",
            quantile(values, 0.5),
            quantile(values, 1.0)
        );
    }
    let ratios: Vec<f64> = built_in
        .iter()
        .zip(&by_hand)
        .map(|(mine, hand)| mine / hand)
        .collect();
    let part = quantile(&ratios, 0.5);
    println!("built in / by hand: {part:.3}, the median of the rounds");
    ensure!(part >= THROUGHPUT, "{part:.3} is less than {THROUGHPUT}");
    Ok(())
}
