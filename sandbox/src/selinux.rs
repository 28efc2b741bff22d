//! SELinux: whether it is there, and which labels pods and containers get.
//!
//! ```text
//! pod        user:role:type of lxc_contexts, or as asked for     level s0:cA,cB, of no other pod
//! container  the pod's; parts it asks for are its own
//! files      the "file" context of lxc_contexts with the level of the process
//! ```
//!
//! The pair of categories is in the pod's record, so what is in use is known from
//! the records alone. A privileged container, and one in the host's PID or IPC
//! namespace that asks for nothing, gets no process label (the policy decides what
//! it becomes) but its files are labelled all the same.
//!
//! Source: selinux(8), selinux_lxc_contexts(5); kernel, `security/selinux/selinuxfs.c`;
//! opencontainers/selinux, containerd and CRI-O for who gets a label.

pub mod relabel;

use crate::container_spec::SelinuxLabel;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;

/// How many categories a policy has that nobody built otherwise: c0 to c1023.
///
/// Source: what the policies of distributions are built with (`MCS_CATS`).
pub const CATEGORIES: u32 = 1024;

/// Longest label that is taken: a mount option has at most 255 bytes.
///
/// Source: fsconfig(2).
const LONGEST: usize = 255;

/// The type that may do everything: what it has is not relabelled.
///
/// Source: container-selinux; CRI-O does the same.
const SUPER_PRIVILEGED: &str = "spc_t";

/// Why there are no labels, or not these.
#[derive(Debug, thiserror::Error)]
pub enum SelinuxError {
    /// A file of the kernel's or the policy's could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not user:role:type or user:role:type:level.
    #[error("{text:?} is no SELinux label")]
    NotALabel {
        /// As found.
        text: String,
    },
    /// A level that cannot be one.
    #[error("{level:?} is no SELinux level, like \"s0:c1,c2\"")]
    BadLevel {
        /// As given.
        level: String,
    },
    /// The loaded policy does not have it.
    #[error("the SELinux label {label:?} is not valid in this node's policy")]
    Unknown {
        /// The label, put together.
        label: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Every pair is some pod's.
    #[error("no pair of the {categories} SELinux categories is free")]
    NoneFree {
        /// How many categories there are.
        categories: u32,
    },
}

/// user:role:type:level; the level is empty where the policy has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    user: String,
    role: String,
    kind: String,
    level: String,
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        match self.level.as_str() {
            "" => Ok(()),
            level => write!(f, ":{level}"),
        }
    }
}

impl FromStr for Context {
    type Err = SelinuxError;

    fn from_str(text: &str) -> Result<Self, SelinuxError> {
        let bad = || SelinuxError::NotALabel {
            text: text.chars().take(LONGEST).collect(),
        };
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let mut part = || parts.next().filter(|part| !part.is_empty());
        let (user, role, kind) = (part(), part(), part());
        let (Some(user), Some(role), Some(kind)) = (user, role, kind) else {
            return Err(bad());
        };
        let level = parts.next().unwrap_or_default();
        if text.len() > LONGEST || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad());
        }
        Ok(Self {
            user,
            role,
            kind,
            level,
        })
    }
}

/// The labels of a pod or a container, as recorded. An empty one is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels {
    /// Of its processes and their keys.
    pub process: String,
    /// Of its files and file systems.
    pub mount: String,
}

impl Labels {
    /// Whether volumes of who has these labels are left as they are.
    pub fn keeps_volumes(&self) -> bool {
        let kind = self.process.parse::<Context>().map(|context| context.kind);
        self.mount.is_empty() || kind.is_ok_and(|kind| kind == SUPER_PRIVILEGED)
    }

    /// The two categories that these labels keep others from.
    pub fn pair(&self) -> Option<Pair> {
        let context: Context = self.mount.parse().ok()?;
        Pair::of_level(&context.level)
    }
}

/// Two categories, the smaller first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair(u32, u32);

impl Pair {
    /// Those of "s0:c2,c1"; `None` where there are not exactly two.
    fn of_level(level: &str) -> Option<Pair> {
        let (_, categories) = level.rsplit_once(':')?;
        let number = |name: &str| name.strip_prefix('c')?.parse::<u32>().ok();
        let (a, b) = categories.split_once(',')?;
        let (a, b) = (number(a)?, number(b)?);
        (a != b).then_some(Pair(a.min(b), a.max(b)))
    }

    /// The one with this number of all that there are of so many categories.
    fn numbered(mut number: u64, categories: u32) -> Pair {
        let mut first = 0;
        while first + 2 < categories && number >= u64::from(categories - 1 - first) {
            number -= u64::from(categories - 1 - first);
            first += 1;
        }
        Pair(first, first + 1 + u32::try_from(number).unwrap_or(0))
    }

    /// A pair that is not `taken`; where the search begins is up to `seed`.
    fn free(seed: u64, categories: u32, taken: &HashSet<Pair>) -> Option<Pair> {
        let all = u64::from(categories) * u64::from(categories.saturating_sub(1)) / 2;
        let start = seed.checked_rem(all)?;
        // Among one more than are taken one is free.
        let tries = all.min(taken.len() as u64 + 1);
        (0..tries)
            .map(|step| Pair::numbered((start + step) % all, categories))
            .find(|pair| !taken.contains(pair))
    }
}

/// Whether `level` is one: a sensitivity, or a range of two, each perhaps with
/// categories: "s0", "s0:c1,c2", "s0-s15:c0.c1023".
///
/// # Errors
/// `BadLevel`.
pub fn check_level(level: &str) -> Result<(), SelinuxError> {
    let number = |text: &str, letter| {
        let digits = text.strip_prefix(letter).unwrap_or_default();
        (1..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit())
    };
    let category =
        |text: &str| text.split('.').count() <= 2 && text.split('.').all(|c| number(c, 'c'));
    let one = |text: &str| match text.split_once(':') {
        None => number(text, 's'),
        Some((sensitivity, categories)) => {
            number(sensitivity, 's') && categories.split(',').all(category)
        }
    };
    let valid = match level.split_once('-') {
        None => one(level),
        Some((low, high)) => one(low) && one(high),
    };
    valid.then_some(()).ok_or_else(|| SelinuxError::BadLevel {
        level: level.chars().take(LONGEST).collect(),
    })
}

/// What the policy gives to containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contexts {
    process: Context,
    file: Context,
    /// Of a container that runs an init system.
    init: Option<Context>,
    /// Of one in a virtual machine.
    kvm: Option<Context>,
}

impl Contexts {
    /// Those of an lxc_contexts file, `path` in messages.
    ///
    /// # Errors
    /// `NotALabel` where the context of processes or files is missing or wrong.
    fn parse(text: &str) -> Result<Self, SelinuxError> {
        let value = |wanted: &str| {
            let entry = |line: &str| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == wanted).then(|| value.trim().trim_matches('"').to_owned())
            };
            text.lines()
                .filter(|line| !line.trim_start().starts_with('#'))
                .find_map(entry)
        };
        let context = |key| value(key).map(|text| text.parse::<Context>()).transpose();
        let needed = |key| {
            context(key)?.ok_or_else(|| SelinuxError::NotALabel {
                text: format!("the missing entry {key}"),
            })
        };
        Ok(Self {
            process: needed("process")?,
            file: needed("file")?,
            init: context("init_process")?,
            kvm: context("kvm_process")?,
        })
    }
}

/// Where things are: the host's places, or a test's.
#[derive(Clone, Debug)]
pub struct Places {
    /// proc_pid_mountinfo(5).
    pub mountinfo: PathBuf,
    /// The label of this process.
    pub current: PathBuf,
    /// /etc/selinux.
    pub etc: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            mountinfo: "/proc/self/mountinfo".into(),
            current: "/proc/self/attr/current".into(),
            etc: "/etc/selinux".into(),
        }
    }
}

/// What there is of SELinux.
#[derive(Debug)]
pub enum Found {
    /// Nothing, and why not.
    Absent(&'static str),
    /// It is on, and containers can have no labels: why.
    Unusable(&'static str),
    /// A policy is loaded that knows containers.
    Enabled(Box<Selinux>),
}

/// SELinux as this node has it.
#[derive(Debug)]
pub struct Selinux {
    /// Where selinuxfs is mounted.
    fs: PathBuf,
    enforcing: bool,
    /// Whether labels have levels.
    levels: bool,
    /// The policy's name: "targeted".
    policy: String,
    contexts: Contexts,
    categories: u32,
    /// Held from looking which pairs are taken until one more is.
    choosing: Mutex<()>,
}

/// What of a container's request decides on its labels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// The parts asked for.
    pub label: Option<&'a SelinuxLabel>,
    /// It is privileged.
    pub privileged: bool,
    /// It shares the host's processes or IPC objects.
    pub with_host: bool,
    /// It runs an init system.
    pub init: bool,
    /// It runs in a virtual machine.
    pub kvm: bool,
}

fn read(path: &Path) -> Result<String, SelinuxError> {
    fs::read_to_string(path).map_err(|source| SelinuxError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Where selinuxfs is mounted, and may be written to.
fn selinuxfs(mountinfo: &str) -> Option<PathBuf> {
    let line = mountinfo.lines().find(|line| {
        let kind = line
            .split_once(" - ")
            .and_then(|(_, rest)| rest.split(' ').next());
        kind == Some("selinuxfs")
    })?;
    line.split(' ').nth(4).map(PathBuf::from)
}

/// SELINUXTYPE of /etc/selinux/config; "targeted" where it says nothing.
///
/// Source: selinux_config(5); libselinux, `SELINUXDEFAULT`.
fn policy_name(config: &str) -> &str {
    let value = |line: &'_ str| line.trim().strip_prefix("SELINUXTYPE=").map(str::len);
    let found = config.lines().rev().find(|line| value(line).is_some());
    let name = found.and_then(|line| line.trim().strip_prefix("SELINUXTYPE="));
    name.map(str::trim)
        .filter(|name| !name.is_empty() && !name.contains('/'))
        .unwrap_or("targeted")
}

impl Selinux {
    /// Looks what there is. `categories`: how many are used for pods' levels.
    ///
    /// # Errors
    /// SELinux is on, and what it takes to label containers cannot be read.
    pub fn detect(places: &Places, categories: u32) -> Result<Found, SelinuxError> {
        let Some(fs) = selinuxfs(&read(&places.mountinfo)?) else {
            return Ok(Found::Absent("not in this kernel, or off"));
        };
        // Before a policy is loaded everything has this label and nothing else is known.
        let own = read(&places.current)?;
        if own.trim_end_matches(['\0', '\n']) == "kernel" {
            return Ok(Found::Unusable("no policy is loaded"));
        }
        let config = read(&places.etc.join("config"))?;
        let policy = policy_name(&config).to_owned();
        let path = places.etc.join(&policy).join("contexts/lxc_contexts");
        let text = match read(&path) {
            Err(SelinuxError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Found::Unusable(
                    "its policy has no contexts for containers (lxc_contexts)",
                ));
            }
            other => other?,
        };
        let flag = |name: &str| Ok(read(&fs.join(name))?.trim() == "1");
        Ok(Found::Enabled(Box::new(Self {
            enforcing: flag("enforce")?,
            levels: flag("mls")?,
            policy,
            contexts: Contexts::parse(&text)?,
            categories: categories.max(2),
            choosing: Mutex::default(),
            fs,
        })))
    }

    /// Whether what the policy forbids is refused, or only told, when this was looked at.
    pub fn is_enforcing(&self) -> bool {
        self.enforcing
    }

    /// The policy's name.
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The label of processes that ask for nothing, without a pod's categories.
    pub fn usual_process(&self) -> String {
        self.contexts.process.to_string()
    }

    /// Keeps others from choosing a pair until the record with it is in the view.
    pub(crate) fn choosing(&self) -> std::sync::MutexGuard<'_, ()> {
        crate::operation::lock(&self.choosing)
    }

    /// The labels of a pod. `taken` are the pairs of others, `seed` is where the
    /// search for a free one begins.
    ///
    /// # Errors
    /// `NoneFree`; `BadLevel` or `Unknown` for what is asked for.
    pub fn of_pod(
        &self,
        asked: Option<&SelinuxLabel>,
        seed: u64,
        taken: &HashSet<Pair>,
    ) -> Result<Labels, SelinuxError> {
        let base = &self.contexts.process;
        let given = asked.is_some_and(|label| !label.level.is_empty());
        let level = match (self.levels, given) {
            (false, _) => String::new(),
            (true, true) => base.level.clone(),
            (true, false) => {
                let free = Pair::free(seed, self.categories, taken);
                let Pair(a, b) = free.ok_or(SelinuxError::NoneFree {
                    categories: self.categories,
                })?;
                let sensitivity = base.level.split([':', '-']).next().unwrap_or("s0");
                format!("{sensitivity}:c{a},c{b}")
            }
        };
        let base = Context {
            level,
            ..base.clone()
        };
        self.labels(base, asked)
    }

    /// The labels of a container in a pod that has `pod`.
    ///
    /// # Errors
    /// `BadLevel` or `Unknown` for what is asked for.
    pub fn of_container(&self, pod: &Labels, asked: Asked<'_>) -> Result<Labels, SelinuxError> {
        let pods: Context = pod.process.parse()?;
        let wants = |part: fn(&SelinuxLabel) -> &String| {
            asked.label.is_some_and(|label| !part(label).is_empty())
        };
        let mut base = match asked.label {
            None => pods,
            Some(_) => Context {
                level: pods.level,
                ..self.contexts.process.clone()
            },
        };
        if !wants(|label| &label.r#type) && base.kind == self.contexts.process.kind {
            let other = match (asked.kvm, asked.init) {
                (true, _) => self.contexts.kvm.as_ref(),
                (false, true) => self.contexts.init.as_ref(),
                (false, false) => None,
            };
            if let Some(other) = other {
                base.kind = other.kind.clone();
            }
        }
        let mut labels = self.labels(base, asked.label)?;
        if asked.privileged || (asked.with_host && asked.label.is_none()) {
            labels.process = String::new();
        }
        Ok(labels)
    }

    fn labels(&self, base: Context, asked: Option<&SelinuxLabel>) -> Result<Labels, SelinuxError> {
        let mut process = base;
        let mut mount = self.contexts.file.clone();
        if let Some(asked) = asked {
            let take = |part: &mut String, asked: &String| {
                if !asked.is_empty() {
                    part.clone_from(asked);
                }
            };
            take(&mut process.user, &asked.user);
            take(&mut mount.user, &asked.user);
            take(&mut process.role, &asked.role);
            take(&mut process.kind, &asked.r#type);
            take(&mut process.level, &asked.level);
            if !asked.level.is_empty() {
                check_level(&asked.level)?;
            }
        }
        mount.level.clone_from(&process.level);
        let labels = Labels {
            process: process.to_string(),
            mount: mount.to_string(),
        };
        for label in [&labels.process, &labels.mount] {
            self.check(label)?;
        }
        Ok(labels)
    }

    /// Asks the kernel whether its policy has this label.
    fn check(&self, label: &str) -> Result<(), SelinuxError> {
        let _: Context = label.parse()?;
        fs::OpenOptions::new()
            .write(true)
            .open(self.fs.join("context"))
            .and_then(|mut file| io::Write::write_all(&mut file, label.as_bytes()))
            .map_err(|source| SelinuxError::Unknown {
                label: label.to_owned(),
                source,
            })
    }
}

#[cfg(test)]
mod tests;
