//! Seccomp profiles compiled to what the kernel takes.
//!
//! ```text
//! arch == native ──> number ──> halving over runs of numbers ──> return
//! arch == 32-bit ──> the same with its own table             └─> compare arguments ──> return
//! other          ──> kill the process
//! ```
//!
//! A call that no table knows answers ENOSYS under a profile that denies by default: the C
//! library then takes an older call, where EPERM would be an error of its own. Programs that
//! only load the number and the architecture before they return "allow" are answered by the
//! kernel's bitmap (5.11) and never run: that is why conditions on arguments come last.
//!
//! Source: seccomp(2); OCI runtime-spec, `config-linux.md`, "Seccomp".

mod arch;
mod bpf;
mod profile;
mod spec;

pub use arch::Arch;

use crate::capability::CapSet;
use bpf::{Comparison, Instruction, Outcome, Rule};
use profile::{Action, Profile, Syscalls};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Our own profile: what nearly every program needs, and with a capability what that is for.
const DEFAULT: &[u8] = include_bytes!("default.json");

/// Longest program. Source: BPF_MAXINSNS in linux/bpf_common.h.
const MOST_INSTRUCTIONS: usize = 4096;

/// Longest profile that is read; Docker's has 20 KB.
const LONGEST_PROFILE: u64 = 1 << 20;

/// How many compiled filters are kept: a node has a handful of profiles and capability sets.
const KEPT: usize = 128;

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const MAX_ERRNO: u32 = 4095;

const FLAG_TSYNC: u32 = 1;
const FLAG_LOG: u32 = 2;
const FLAG_SPEC_ALLOW: u32 = 4;

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("seccomp profiles are not known for the architecture {0}")]
    Architecture(&'static str),
    #[error("cannot read the seccomp profile {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the seccomp profile {path} is not a file of at most {LONGEST_PROFILE} bytes")]
    NotAProfile { path: PathBuf },
    #[error("the seccomp profile is not in the JSON form of the OCI runtime-spec")]
    Json(#[source] serde_json::Error),
    #[error(
        "the seccomp profile asks for a listener (SCMP_ACT_NOTIFY, listenerPath): not supported"
    )]
    Listener,
    #[error("the seccomp profile has {0:?}, which is no architecture")]
    UnknownArchitecture(String),
    #[error("the seccomp profile has the flag {0:?}, which is unknown or needs a listener")]
    Flag(String),
    #[error("the seccomp profile names argument {index} of {name}: there are six, from 0")]
    ArgumentIndex { name: String, index: u32 },
    #[error("the seccomp profile has errno {0}: the largest is {MAX_ERRNO}")]
    Errno(u32),
    #[error("the seccomp profile has {0:?}, which is no kernel version")]
    KernelVersion(String),
    #[error("the seccomp profile makes {0} instructions: the kernel takes {MOST_INSTRUCTIONS}")]
    TooLong(usize),
}

/// A program for the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// struct sock_filter array, 8 bytes each.
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_* bits.
    pub flags: u32,
}

/// A profile and a set of capabilities: what a filter depends on, on one machine.
type Key = (Vec<u8>, u64);

/// Compiles profiles and keeps what it compiled.
pub struct Compiler {
    arch: Arch,
    kernel: (u32, u32),
    kept: Mutex<HashMap<Key, Arc<Filter>>>,
}

impl Compiler {
    /// For the machine and kernel this runs on.
    ///
    /// # Errors
    /// An architecture without a table.
    pub fn new() -> Result<Self, Error> {
        let arch = Arch::native().ok_or(Error::Architecture(std::env::consts::ARCH))?;
        let release = rustix::system::uname();
        // A kernel that does not say is taken for the oldest one that Berth runs on.
        let kernel = profile::parse_kernel(&release.release().to_string_lossy()).unwrap_or((5, 4));
        Ok(Self::of(arch, kernel))
    }

    /// For another machine.
    pub fn of(arch: Arch, kernel: (u32, u32)) -> Self {
        Self {
            arch,
            kernel,
            kept: Mutex::default(),
        }
    }

    /// The filter of RuntimeDefault for a container with the capabilities `caps`.
    ///
    /// # Errors
    /// Never in practice: the profile is our own.
    pub fn compile_default(&self, caps: CapSet) -> Result<Arc<Filter>, Error> {
        self.compile(DEFAULT, caps)
    }

    /// The filter of a profile on this node. The file is read each time: it may have changed.
    ///
    /// # Errors
    /// It cannot be read, is no plain file, or is no profile.
    pub fn compile_file(&self, path: &Path, caps: CapSet) -> Result<Arc<Filter>, Error> {
        self.compile(&Self::read(path)?, caps)
    }

    /// A profile on this node, as it is.
    ///
    /// # Errors
    /// It cannot be read or is no plain file of a profile's size.
    pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
        let failed = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        // A FIFO would otherwise wait for a writer.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let mut json = Vec::new();
        if metadata.is_file() {
            file.take(LONGEST_PROFILE + 1)
                .read_to_end(&mut json)
                .map_err(failed)?;
        }
        if !metadata.is_file() || json.len() as u64 > LONGEST_PROFILE {
            return Err(Error::NotAProfile {
                path: path.to_owned(),
            });
        }
        Ok(json)
    }

    /// The filter of a profile for a container with the capabilities `caps`.
    ///
    /// # Errors
    /// It is no profile, or asks for what Berth or the kernel cannot do.
    pub fn compile(&self, json: &[u8], caps: CapSet) -> Result<Arc<Filter>, Error> {
        let key = (json.to_vec(), caps.bits());
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(filter) = kept().get(&key) {
            return Ok(Arc::clone(filter));
        }
        let profile: Profile = serde_json::from_slice(json).map_err(Error::Json)?;
        let filter = Arc::new(self.translate(&profile, caps)?);
        let mut kept = kept();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, Arc::clone(&filter));
        Ok(filter)
    }

    fn translate(&self, profile: &Profile, caps: CapSet) -> Result<Filter, Error> {
        if !profile.listener_path.is_empty() {
            return Err(Error::Listener);
        }
        let default = result(profile.default_action, profile.default_errno_ret)?;
        let architectures = self.architectures(profile)?;
        let mut tables = BTreeMap::new();
        for arch in architectures {
            tables.insert(arch, self.rules(profile, arch, default, caps)?);
        }
        let program = assemble(&tables, default, denies(profile.default_action));
        if program.len() > MOST_INSTRUCTIONS {
            return Err(Error::TooLong(program.len()));
        }
        let program = program
            .iter()
            .flat_map(|i| {
                let [a, b] = i.code.to_ne_bytes();
                let [c, d, e, f] = i.k.to_ne_bytes();
                [a, b, i.jt, i.jf, c, d, e, f]
            })
            .collect();
        Ok(Filter {
            program,
            flags: flags(profile.flags.as_deref())?,
        })
    }

    /// The native one and those of the profile that can run beside it.
    fn architectures(&self, profile: &Profile) -> Result<BTreeSet<Arch>, Error> {
        let mut all = BTreeSet::from([self.arch]);
        let mapped = profile
            .arch_map
            .iter()
            .filter(|map| Arch::of_profile(&map.architecture) == Some(self.arch))
            .flat_map(|map| map.sub_architectures.iter().flatten());
        for name in profile.architectures.iter().chain(mapped) {
            if !name.starts_with("SCMP_ARCH_") {
                return Err(Error::UnknownArchitecture(name.clone()));
            }
            // Others' processes do not run here.
            all.extend(Arch::of_profile(name).filter(|arch| self.arch.runs(*arch)));
        }
        Ok(all)
    }

    /// What the profile says of each number of `arch`. Names that it does not have are passed
    /// over, as everywhere: profiles are written for all architectures and kernels.
    fn rules(
        &self,
        profile: &Profile,
        arch: Arch,
        default: u32,
        caps: CapSet,
    ) -> Result<BTreeMap<u32, Vec<Rule>>, Error> {
        let mut table: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
        for entry in &profile.syscalls {
            if !self.applies(entry, caps)? {
                continue;
            }
            let result = result(entry.action, entry.errno_ret)?;
            // Says what holds anyway; as with runc it does not stand in another entry's way.
            if result == default {
                continue;
            }
            for name in entry.names.iter().chain(&entry.name) {
                let rules = rules(entry, name, arch, result)?;
                if let Some(number) = arch.number(name) {
                    table.entry(number).or_default().extend(rules);
                }
                if let Some((number, mask, value)) = arch.multiplexed(name)
                    && entry.args.iter().flatten().next().is_none()
                {
                    let comparison = Comparison {
                        index: 0,
                        operator: profile::Operator::MaskedEqual,
                        value: mask,
                        value_two: value,
                        wide: false,
                    };
                    let rule = Rule {
                        comparisons: vec![comparison],
                        result,
                    };
                    table.entry(number).or_default().push(rule);
                }
            }
        }
        Ok(table)
    }

    /// Source: the includes and excludes of moby's `profiles/seccomp`: all of the capabilities
    /// included have to be there, none of those excluded.
    fn applies(&self, entry: &Syscalls, caps: CapSet) -> Result<bool, Error> {
        let has = |name: &String| CapSet::named(name).is_ok_and(|cap| caps.contains(cap));
        let here = |name: &String| name == self.arch.short();
        let at_least = |version: &String| match profile::parse_kernel(version) {
            Some(version) => Ok(self.kernel >= version),
            None => Err(Error::KernelVersion(version.clone())),
        };
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        if let Some(includes) = &entry.includes {
            let arches = list(&includes.arches);
            if !list(&includes.caps).iter().all(has)
                || !(arches.is_empty() || arches.iter().any(here))
                || !includes.min_kernel.as_ref().map_or(Ok(true), at_least)?
            {
                return Ok(false);
            }
        }
        if let Some(excludes) = &entry.excludes
            && (list(&excludes.caps).iter().any(has)
                || list(&excludes.arches).iter().any(here)
                || excludes.min_kernel.as_ref().map_or(Ok(false), at_least)?)
        {
            return Ok(false);
        }
        Ok(true)
    }
}

/// The rules of one entry for one call: all its comparisons together, but, as with runc, each
/// for itself where an argument is compared twice.
fn rules(entry: &Syscalls, name: &str, arch: Arch, result: u32) -> Result<Vec<Rule>, Error> {
    let mut comparisons = Vec::new();
    for arg in entry.args.iter().flatten() {
        if arg.index > 5 {
            return Err(Error::ArgumentIndex {
                name: name.to_owned(),
                index: arg.index,
            });
        }
        comparisons.push(Comparison {
            index: arg.index,
            operator: arg.op,
            value: arg.value,
            value_two: arg.value_two,
            wide: arch.compares_all(name, arg.index),
        });
    }
    let indexes: BTreeSet<u32> = comparisons.iter().map(|c| c.index).collect();
    if indexes.len() == comparisons.len() {
        return Ok(vec![Rule {
            comparisons,
            result,
        }]);
    }
    Ok(comparisons
        .into_iter()
        .map(|c| Rule {
            comparisons: vec![c],
            result,
        })
        .collect())
}

/// A SECCOMP_RET_* value.
fn result(action: Action, errno: Option<u32>) -> Result<u32, Error> {
    let errno = errno.unwrap_or(EPERM);
    if errno > MAX_ERRNO {
        return Err(Error::Errno(errno));
    }
    Ok(match action {
        Action::KillThread => RET_KILL_THREAD,
        Action::KillProcess => RET_KILL_PROCESS,
        Action::Trap => RET_TRAP,
        Action::Errno => RET_ERRNO | errno,
        Action::Trace => RET_TRACE | errno,
        Action::Allow => RET_ALLOW,
        Action::Log => RET_LOG,
        Action::Notify => return Err(Error::Listener),
    })
}

fn denies(action: Action) -> bool {
    match action {
        Action::KillThread | Action::KillProcess | Action::Trap | Action::Errno => true,
        Action::Trace | Action::Allow | Action::Log | Action::Notify => false,
    }
}

/// Without a word on flags speculation is left as it is, as with runc since 1.2: before 5.16
/// a filter otherwise slows the whole process down.
fn flags(names: Option<&[String]>) -> Result<u32, Error> {
    let Some(names) = names else {
        return Ok(FLAG_SPEC_ALLOW);
    };
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags | FLAG_TSYNC),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | FLAG_SPEC_ALLOW),
        _ => Err(Error::Flag(name.clone())),
    })
}

/// The whole program, the native architecture first.
fn assemble(
    tables: &BTreeMap<Arch, BTreeMap<u32, Vec<Rule>>>,
    default: u32,
    denies: bool,
) -> Vec<Instruction> {
    let unknown = if denies { RET_ERRNO | ENOSYS } else { default };
    let mut code = vec![bpf::load(bpf::ARCH)];
    for (&arch, table) in tables.iter().filter(|(arch, _)| **arch != Arch::X32) {
        let mut segments = segments(arch, table, default, unknown);
        if arch == Arch::X86_64 {
            // Of the same audit number; -1 is what a tracer writes to skip a call.
            segments.extend(match tables.get(&Arch::X32) {
                Some(table) => self::segments(Arch::X32, table, default, unknown),
                None => vec![
                    (arch::X32_BIT, Outcome::Return(RET_KILL_PROCESS)),
                    (u32::MAX, Outcome::Return(unknown)),
                ],
            });
        }
        let mut body = vec![bpf::load(bpf::NUMBER)];
        body.extend(bpf::tree(&segments));
        code.extend(bpf::block(arch.audit(), body));
    }
    code.push(bpf::ret(RET_KILL_PROCESS));
    code
}

/// Runs of numbers with the same outcome: the default holds for the calls the table says nothing
/// of, `unknown` for numbers that are no call's, in between and above.
fn segments(
    arch: Arch,
    table: &BTreeMap<u32, Vec<Rule>>,
    default: u32,
    unknown: u32,
) -> Vec<(u32, Outcome)> {
    let last = arch.last();
    let first = match arch {
        Arch::X32 => arch::X32_BIT,
        Arch::X86_64 | Arch::X86 | Arch::Aarch64 | Arch::Arm => 0,
    };
    let known = |number: u32| number <= last && arch.knows(number);
    let mut starts = BTreeSet::from([first, last + 1]);
    starts.extend(table.keys().flat_map(|number| [*number, number + 1]));
    starts.extend((first + 1..=last).filter(|number| known(*number) != known(number - 1)));
    let mut segments: Vec<(u32, Outcome)> = Vec::new();
    for start in starts {
        let otherwise = if known(start) { default } else { unknown };
        let outcome = table
            .get(&start)
            .map_or(Outcome::Return(otherwise), |rules| outcome(rules, default));
        if segments.last().is_none_or(|(_, before)| *before != outcome) {
            segments.push((start, outcome));
        }
    }
    segments
}

/// A rule without comparisons makes the others of its call void, the first one if there are
/// several: libseccomp has it so too.
fn outcome(rules: &[Rule], default: u32) -> Outcome {
    match rules.iter().find(|rule| rule.comparisons.is_empty()) {
        Some(always) => Outcome::Return(always.result),
        None => Outcome::Check(rules.to_vec(), default),
    }
}

#[cfg(test)]
mod answers;
#[cfg(test)]
mod tests;
