//! CRIU itself: where it is, whether it works here, and what it said.
//!
//! Source: criu(8).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long `criu check` may take: it forks, maps and traces a little, and an
/// emulated machine needs some seconds for that.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long until a program that runs is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Most that is read of what a program says, and of the end of a log. Unit: bytes.
const MOST_BYTES: u64 = 64 << 10;

/// How many lines of CRIU's own reasons are told.
const MOST_REASONS: usize = 3;

/// Errors that it logs and goes on from, or that say nothing more.
const KNOWN_NOISE: [&str; 2] = ["rlimit: Can't setup", "Dumping FAILED"];

/// The oldest CRIU that knows namespaces of somebody else's and frozen groups of
/// cgroup v2. Source: CRIU's release notes, 3.14 and 3.15; containerd asks for 3.16.
const OLDEST: (u32, u32) = (3, 16);

/// The first one that can leave a network alone. Source: CRIU's release notes, 3.19.
const KNOWS_NO_LOCK: (u32, u32) = (3, 19);

/// Deleted files that are still open go into the images up to this size. Unit: bytes.
const LARGEST_GHOST: &str = "256M";

/// Why no checkpoint can be made on this node.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// Nobody installed it.
    #[error("a checkpoint needs CRIU: there is no program criu in PATH")]
    Absent,
    /// A program that CRIU runs is missing.
    #[error("a checkpoint needs the program {program}, which is not in PATH")]
    NoProgram {
        /// Which.
        program: &'static str,
    },
    /// It cannot be run.
    #[error("cannot run {} for a checkpoint", path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It does not end.
    #[error("it does not end: {} {what} took longer than {} s", path.display(), PATIENCE.as_secs())]
    Late {
        /// The program.
        path: PathBuf,
        /// What it was asked.
        what: &'static str,
    },
    /// It is too old, or says nothing that can be understood.
    #[error("CRIU {} or later is needed; {} --version says {said:?}", version(OLDEST), path.display())]
    Version {
        /// The program.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// This kernel lacks something.
    #[error("CRIU does not work on this kernel: {} check: {said}", path.display())]
    Check {
        /// The program.
        path: PathBuf,
        /// Its last words.
        said: String,
    },
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// A CRIU that passed its own check on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    /// The program.
    pub path: PathBuf,
    /// Major and minor.
    pub version: (u32, u32),
}

impl Criu {
    /// Finds it and has it check this kernel. Blocks for up to a minute, some ten
    /// milliseconds mostly.
    ///
    /// # Errors
    /// What is missing.
    pub fn usable() -> Result<Criu, CriuError> {
        let path = find("criu").ok_or(CriuError::Absent)?;
        let (_, said) = run(&path, &["--version"])?;
        let criu = match parse_version(&said) {
            Some(version) if version >= OLDEST => Criu { path, version },
            _ => return Err(CriuError::Version { path, said }),
        };
        let (good, said) = run(&criu.path, &["check"])?;
        if !good {
            let path = criu.path;
            let said = last_line(&said)
                .unwrap_or("it fails without a word")
                .to_owned();
            return Err(CriuError::Check { path, said });
        }
        // It archives what is on a tmpfs with it.
        if find("tar").is_none() {
            return Err(CriuError::NoProgram { program: "tar" });
        }
        Ok(criu)
    }

    /// The command line that dumps what `dump` says and leaves it running.
    pub fn arguments(&self, dump: &Dump<'_>) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut all: Vec<String> = ["dump", "--leave-running", "-v4", "--log-file=dump.log"]
            .map(str::to_owned)
            .into();
        // One word each: some values are optional to CRIU.
        let mut option = |name: &str, value: String| all.push(format!("{name}={value}"));
        option("--tree", dump.pid.to_string());
        option("--images-dir", text(dump.images));
        option("--work-dir", text(dump.work));
        option("--freeze-cgroup", text(dump.freezer));
        option("--manage-cgroups", "soft".to_owned());
        option("--ghost-limit", LARGEST_GHOST.to_owned());
        option("--timeout", dump.timeout.as_secs().max(1).to_string());
        // The pod's network is in use by others, and what is established ends with
        // the images: nothing has to be held back.
        let lock = if self.version >= KNOWS_NO_LOCK {
            "skip"
        } else {
            "nftables"
        };
        option("--network-lock", lock.to_owned());
        for (kind, (inode, key)) in &dump.namespaces {
            option("--external", format!("{kind}[{inode}]:{key}"));
        }
        for (mount_point, key) in &dump.mounts {
            option("--external", format!("mnt[{mount_point}]:{key}"));
        }
        for flag in ["--skip-in-flight", "--ext-unix-sk", "--file-locks"] {
            all.push(flag.to_owned());
        }
        // Who restores has to say so too, so it is not said for nothing.
        if dump.has_connections {
            all.push("--tcp-close".to_owned());
        }
        all
    }
}

/// What CRIU is told of a container.
#[derive(Debug)]
pub struct Dump<'a> {
    /// Its first process, as the host counts.
    pub pid: i32,
    /// Where the images go.
    pub images: &'a Path,
    /// Where log and statistics go.
    pub work: &'a Path,
    /// The directory of its cgroup that can be frozen.
    pub freezer: &'a Path,
    /// How long CRIU may take to hold all processes.
    pub timeout: Duration,
    /// Namespaces that are not the container's: inode and key by kind.
    pub namespaces: BTreeMap<&'static str, (u64, &'static str)>,
    /// Mounts that come from outside: key by mount point.
    pub mounts: BTreeMap<String, String>,
    /// Somebody in the network namespace has connections: they end with the images.
    pub has_connections: bool,
}

/// Whether a /proc/PID/net/tcp or tcp6 has connections, other than such that nobody
/// holds any more.
///
/// Source: proc_pid_net(5); the kernel's `tcp_states.h`.
pub fn has_connections(table: &str) -> bool {
    const CLOSED: &str = "07";
    const LISTENS: &str = "0A";
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(3);
        let state = fields.next();
        let inode = fields.nth(5);
        state.is_some_and(|state| state != CLOSED && state != LISTENS)
            && inode.is_some_and(|inode| inode != "0")
    })
}

/// Whether an OCI runtime has checkpoints: some are built without. Blocks as
/// [`Criu::usable`] does.
///
/// # Errors
/// It cannot be run, or does not end.
pub fn has_command(runtime: &Path) -> Result<bool, CriuError> {
    let (good, _) = run(runtime, &["checkpoint", "--help"])?;
    Ok(good)
}

/// A program in PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(&path, name)
}

fn find_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .map(|dir| dir.join(name))
        .find(|place| place.is_file())
}

/// Whether it succeeded, and what it said on both streams.
fn run(path: &Path, what: &[&'static str]) -> Result<(bool, String), CriuError> {
    let failed = |source| CriuError::Run {
        path: path.into(),
        source,
    };
    let mut child = Command::new(path)
        .args(what)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let read = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.take(MOST_BYTES).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let until = Instant::now() + PATIENCE;
    let ended = loop {
        match child.try_wait().map_err(failed)? {
            Some(ended) => break ended,
            None if Instant::now() >= until => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(CriuError::Late {
                    path: path.into(),
                    what: what.first().copied().unwrap_or_default(),
                });
            }
            None => std::thread::sleep(LOOK_AGAIN),
        }
    };
    let said = [out, err].map(|reader| reader.join().unwrap_or_default());
    Ok((ended.success(), said.concat()))
}

/// Major and minor of "Version: 4.1.1".
fn parse_version(said: &str) -> Option<(u32, u32)> {
    let version = said
        .lines()
        .find_map(|line| line.strip_prefix("Version:"))?;
    let mut parts = version.trim().split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn last_line(text: &str) -> Option<&str> {
    text.lines().map(str::trim).rfind(|line| !line.is_empty())
}

/// CRIU's own reasons: the first errors of its log, in its words; `None` where
/// it wrote none. What follows on the first ones is mostly their consequence.
pub fn reasons(log: &Path) -> Option<String> {
    let mut text = Vec::new();
    let mut file = std::fs::File::open(log).ok()?;
    // Errors come at the end, followed by a page of putting things back.
    let length = file.metadata().ok()?.len();
    use std::io::Seek as _;
    file.seek(std::io::SeekFrom::Start(length.saturating_sub(MOST_BYTES)))
        .ok()?;
    file.take(MOST_BYTES).read_to_end(&mut text).ok()?;
    parse_reasons(&String::from_utf8_lossy(&text))
}

/// Lines are "(00.012345) Error (criu/file.c:12): what is wrong".
fn parse_reasons(text: &str) -> Option<String> {
    let mut found: Vec<&str> = Vec::new();
    for line in text.lines() {
        let Some((_, said)) = line.split_once("Error (") else {
            continue;
        };
        let said = said.split_once("): ").map_or(said, |(_, said)| said).trim();
        let known = KNOWN_NOISE.iter().any(|noise| said.starts_with(noise));
        if !said.is_empty() && !known && !found.contains(&said) && found.len() < MOST_REASONS {
            found.push(said);
        }
    }
    (!found.is_empty()).then(|| found.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("Version: 4.1.1\n"), Some((4, 1)));
        assert_eq!(parse_version("Version: 3.17.1\nGitID: v3\n"), Some((3, 17)));
        assert_eq!(parse_version("criu"), None);
        assert!(parse_version("Version: 3.9").unwrap() < OLDEST);
    }

    #[test]
    fn reasons_are_the_first_errors_each_once() {
        let log = "(00.1) Dumping\n(00.2) Error (criu/sk-inet.c:191): Connected TCP socket\n\
            (00.2) Error (criu/sk-inet.c:191): Connected TCP socket\n\
            (00.3) Error (criu/cr-dump.c:1): Dump files (pid: 7) failed with -1\n(00.4) Unlock\n";
        assert_eq!(
            parse_reasons(log).unwrap(),
            "Connected TCP socket; Dump files (pid: 7) failed with -1"
        );
        assert_eq!(parse_reasons("all is well"), None);
    }

    #[test]
    fn a_listener_is_no_connection() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let line = |state: &str, inode: &str| {
            format!(
                "{head}   0: 0100007F:1F90 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0\n"
            )
        };
        assert!(!has_connections(head));
        assert!(!has_connections(&line("0A", "77")));
        assert!(has_connections(&line("01", "77")));
        assert!(!has_connections(&line("06", "0")));
    }

    #[test]
    fn what_is_the_pods_is_named_as_external() {
        let criu = Criu {
            path: "criu".into(),
            version: (4, 1),
        };
        let dump = Dump {
            pid: 7,
            images: Path::new("/w/checkpoint"),
            work: Path::new("/w"),
            freezer: Path::new("/sys/fs/cgroup/x"),
            timeout: Duration::from_millis(10),
            namespaces: BTreeMap::from([("net", (4026, "extRootNetNS"))]),
            mounts: BTreeMap::from([("/data".to_owned(), "/data".to_owned())]),
            has_connections: false,
        };
        let line = criu.arguments(&dump).join(" ");
        assert!(line.contains("--external=net[4026]:extRootNetNS"), "{line}");
        assert!(line.contains("--external=mnt[/data]:/data"), "{line}");
        assert!(line.contains("--timeout=1 --network-lock=skip"), "{line}");
        assert!(!line.contains("--tcp-close"), "{line}");
        let connected = Dump {
            has_connections: true,
            mounts: BTreeMap::new(),
            ..dump
        };
        let line = criu.arguments(&connected).join(" ");
        assert!(line.contains("--tcp-close"), "{line}");
        let dump = connected;
        let older = Criu {
            version: (3, 17),
            ..criu
        };
        let line = older.arguments(&dump).join(" ");
        assert!(line.contains("--network-lock=nftables"), "{line}");
    }
}
