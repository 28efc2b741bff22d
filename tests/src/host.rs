//! A network namespace that plays "the host": its own loopback, uplink, default
//! route and nftables, so that a test changes nothing of the machine's.
//!
//! It is held by a descriptor alone, nothing is pinned: when the last process in
//! it and this value are gone, so is the namespace, whatever happened to the test.

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

pub struct Host {
    netns: File,
    ports: AtomicU16,
}

impl Host {
    /// A namespace with `lo` up and, as this needs no kernel module beyond veth,
    /// one end of a veth pair as the uplink (198.18.0.1/24, default route).
    pub fn new() -> Result<Self> {
        let netns = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("cannot open the network namespace")
        })
        .join()
        .expect("the thread that makes a network namespace does not panic")?;
        let host = Self {
            netns,
            ports: AtomicU16::new(5000),
        };
        for line in [
            "link set lo up",
            "link add up0 type veth peer name up0far",
            "addr add 198.18.0.1/24 dev up0",
            "link set up0far up",
            "link set up0 up",
            "route add default via 198.18.0.254 dev up0",
        ] {
            let args: Vec<&str> = line.split(' ').collect();
            host.run("ip", &args)?;
        }
        Ok(host)
    }

    /// Runs `work` on a thread of its own inside the namespace. Programs started
    /// there are inside it too.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.netns, CloneFlags::CLONE_NEWNET)
                        .expect("cannot enter the test's network namespace");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A port nobody listens on yet. Not one of those the kernel gives to clients:
    /// who connects to such a one before its server listens may meet himself.
    pub fn fresh_port(&self) -> u16 {
        self.ports.fetch_add(1, Ordering::SeqCst)
    }

    /// A descriptor of the namespace, for a thread that outlives a call of [`Self::enter`].
    pub fn handle(&self) -> Result<File> {
        Ok(self.netns.try_clone()?)
    }

    /// What a program printed that ran inside the namespace.
    ///
    /// # Errors
    /// When it cannot be started or does not end with 0.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let Output {
            status,
            stdout,
            stderr,
        } = self
            .enter(|| Command::new(program).args(args).output())
            .with_context(|| format!("cannot run {program}"))?;
        let stderr = String::from_utf8_lossy(&stderr);
        ensure!(
            status.success(),
            "{program} {}: {status}: {stderr}",
            args.join(" ")
        );
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    /// The inode number that tells this namespace from others.
    pub fn inode(&self) -> u64 {
        self.netns.metadata().map(|meta| meta.ino()).unwrap_or(0)
    }

    /// Names of the links in it.
    pub fn links(&self) -> Vec<String> {
        let json = self
            .run("ip", &["-json", "link", "show"])
            .unwrap_or_default();
        let Ok(serde_json::Value::Array(links)) = serde_json::from_str(&json) else {
            return Vec::new();
        };
        links
            .iter()
            .filter_map(|l| Some(l.get("ifname")?.as_str()?.to_owned()))
            .collect()
    }

    /// Elements of nftables sets and maps in it, as "table/set element".
    pub fn nft_elements(&self) -> Vec<String> {
        let json = self
            .run("nft", &["-j", "list", "ruleset"])
            .unwrap_or_default();
        let Ok(ruleset) = serde_json::from_str::<serde_json::Value>(&json) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for object in ruleset["nftables"].as_array().into_iter().flatten() {
            for kind in ["set", "map"] {
                let (set, name) = (&object[kind], &object[kind]["name"]);
                for element in set["elem"].as_array().into_iter().flatten() {
                    found.push(format!("{}/{name} {element}", set["table"]));
                }
            }
        }
        found
    }
}
