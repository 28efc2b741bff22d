//! Capabilities by name, and which of them a container gets.
//!
//! Source: capabilities(7); linux/capability.h of kernel 6.12, whose last is 40; CRI `Capability`.

use crate::container_spec::Capabilities;
use std::fmt;
use std::io;
use std::path::Path;

/// The names in the order of their bits, without CAP_.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container gets that asks for nothing: the 14 that Docker and containerd give, so that
/// images work here as there.
const DEFAULTS: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A name that no kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a capability")]
pub struct UnknownCapability(pub String);

/// A set of capabilities, as bits in the order of linux/capability.h.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CapSet(u64);

impl CapSet {
    pub const EMPTY: Self = Self(0);

    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Those from 0 to `last`, the number in /proc/sys/kernel/cap_last_cap.
    pub fn up_to(last: u32) -> Self {
        Self(u64::MAX >> (63 - last.min(63)))
    }

    /// What this process can hand on at all: its bounding set.
    ///
    /// # Errors
    /// /proc/self/status cannot be read or lacks `CapBnd`.
    pub fn of_this_process() -> io::Result<Self> {
        let text = std::fs::read_to_string(Path::new("/proc/self/status"))?;
        let bits = text
            .lines()
            .find_map(|line| u64::from_str_radix(line.strip_prefix("CapBnd:")?.trim(), 16).ok());
        bits.map(Self)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The 14 of a container that asks for nothing.
    pub fn defaults() -> Self {
        DEFAULTS.iter().fold(Self::EMPTY, |set, name| {
            set.union(Self::named(name).unwrap_or_default())
        })
    }

    /// The set of one capability: "NET_ADMIN", also with CAP_ and in lower case.
    ///
    /// # Errors
    /// There is none of that name; "ALL" is none.
    pub fn named(name: &str) -> Result<Self, UnknownCapability> {
        let upper = name.trim().to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        NAMES
            .iter()
            .position(|known| *known == bare)
            .map(|bit| Self(1 << bit))
            .ok_or_else(|| UnknownCapability(name.chars().take(80).collect()))
    }

    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of `other` are in here.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// "CAP_CHOWN" and so on, in the order of the bits; those without a name are left out.
    pub fn names(self) -> impl Iterator<Item = String> {
        NAMES
            .iter()
            .enumerate()
            .filter(move |(bit, _)| self.0 >> bit & 1 == 1)
            .map(|(_, name)| format!("CAP_{name}"))
    }
}

impl fmt::Debug for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

/// The five sets of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    pub bounding: CapSet,
    pub effective: CapSet,
    pub permitted: CapSet,
    pub inheritable: CapSet,
    pub ambient: CapSet,
    /// Asked for by name, and neither this kernel nor this process has it. The container starts
    /// without it, as with the other runtimes.
    pub unavailable: CapSet,
}

/// What a container gets.
///
/// "ALL" in `drop` takes the defaults away and "ALL" in `add`, names in `add` and `add_ambient`
/// are given all the same; a name in `drop` is taken from everyone. A privileged container has
/// all that is `available`, whatever it asks for. Nothing is inheritable but what is ambient:
/// it would outlive a change of user.
///
/// Source: CRI `Capability`; CVE-2022-24769 on inheritable sets.
///
/// # Errors
/// A name that is no capability.
pub fn resolve(
    asked: &Capabilities,
    privileged: bool,
    available: CapSet,
) -> Result<Sets, UnknownCapability> {
    resolve_from(asked, privileged, available, CapSet::defaults())
}

/// As [`resolve`], where who asks for nothing gets `usual`.
///
/// # Errors
/// A name that is no capability.
pub fn resolve_from(
    asked: &Capabilities,
    privileged: bool,
    available: CapSet,
    usual: CapSet,
) -> Result<Sets, UnknownCapability> {
    let [add, drop, ambient] =
        [&asked.add, &asked.drop, &asked.add_ambient].map(|names| parse(names));
    let (add, drop, ambient) = (add?, drop?, ambient?);
    if privileged {
        return Ok(Sets {
            bounding: available,
            effective: available,
            permitted: available,
            ..Sets::default()
        });
    }
    let base = match (add.all, drop.all) {
        (_, true) => CapSet::EMPTY,
        (true, false) => available,
        (false, false) => usual,
    };
    let ambient_wanted = if ambient.all {
        available
    } else {
        ambient.named
    };
    let wanted = base
        .union(add.named)
        .union(ambient_wanted)
        .without(drop.named);
    let held = wanted.intersection(available);
    let ambient = ambient_wanted.intersection(held);
    Ok(Sets {
        bounding: held,
        effective: held,
        permitted: held,
        inheritable: ambient,
        ambient,
        unavailable: add
            .named
            .union(ambient_wanted)
            .without(drop.named)
            .without(available),
    })
}

struct Named {
    all: bool,
    named: CapSet,
}

fn parse(names: &[String]) -> Result<Named, UnknownCapability> {
    let mut parsed = Named {
        all: false,
        named: CapSet::EMPTY,
    };
    for name in names {
        if ["ALL", "CAP_ALL"]
            .iter()
            .any(|all| name.eq_ignore_ascii_case(all))
        {
            parsed.all = true;
        } else {
            parsed.named = parsed.named.union(CapSet::named(name)?);
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: CapSet = CapSet(0x1ff_ffff_ffff);

    fn ask(add: &[&str], drop: &[&str], ambient: &[&str]) -> Capabilities {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Capabilities {
            add: own(add),
            drop: own(drop),
            add_ambient: own(ambient),
        }
    }

    fn set(names: &[&str]) -> CapSet {
        names.iter().fold(CapSet::EMPTY, |all, name| {
            all.union(CapSet::named(name).unwrap())
        })
    }

    #[test]
    fn names_and_bits_agree_with_the_kernel() {
        // linux/capability.h
        for (name, bit) in [
            ("CHOWN", 0),
            ("NET_ADMIN", 12),
            ("SYS_ADMIN", 21),
            ("MKNOD", 27),
            ("SETFCAP", 31),
            ("CHECKPOINT_RESTORE", 40),
        ] {
            assert_eq!(CapSet::named(name).unwrap().bits(), 1 << bit, "{name}");
        }
        assert_eq!(CapSet::named("cap_net_raw"), CapSet::named("NET_RAW"));
        assert_eq!(CapSet::up_to(40), FULL);
        assert_eq!(CapSet::up_to(63).bits(), u64::MAX);
        assert_eq!(FULL.names().count(), 41);
        // Docker's default as it stands in /proc/1/status of its containers.
        assert_eq!(CapSet::defaults().bits(), 0xa804_25fb);
    }

    #[test]
    fn asking_for_nothing_gives_the_defaults() {
        let sets = resolve(&ask(&[], &[], &[]), false, FULL).unwrap();
        assert_eq!(sets.bounding, CapSet::defaults());
        assert_eq!(
            (sets.effective, sets.permitted),
            (sets.bounding, sets.bounding)
        );
        assert!(sets.inheritable.is_empty() && sets.ambient.is_empty());
    }

    #[test]
    fn what_is_added_survives_drop_all() {
        let sets = resolve(&ask(&["NET_ADMIN"], &["ALL"], &[]), false, FULL).unwrap();
        assert_eq!(sets.bounding, set(&["NET_ADMIN"]));
        let sets = resolve(&ask(&["ALL"], &["CHOWN"], &[]), false, FULL).unwrap();
        assert_eq!(sets.bounding, FULL.without(set(&["CHOWN"])));
        let sets = resolve(&ask(&["ALL", "KILL"], &["all"], &[]), false, FULL).unwrap();
        assert_eq!(sets.bounding, set(&["KILL"]));
    }

    #[test]
    fn a_name_that_is_dropped_is_dropped() {
        let sets = resolve(&ask(&["KILL"], &["KILL"], &["KILL"]), false, FULL).unwrap();
        assert!(!sets.bounding.contains(set(&["KILL"])));
        assert!(sets.ambient.is_empty());
    }

    #[test]
    fn ambient_ones_are_in_every_set() {
        let sets = resolve(&ask(&[], &["ALL"], &["NET_BIND_SERVICE"]), false, FULL).unwrap();
        let expected = set(&["NET_BIND_SERVICE"]);
        let got = [
            sets.bounding,
            sets.effective,
            sets.permitted,
            sets.inheritable,
            sets.ambient,
        ];
        assert_eq!(got, [expected; 5]);
    }

    #[test]
    fn privileged_has_what_there_is() {
        let available = FULL.without(set(&["SYS_RESOURCE"]));
        let sets = resolve(&ask(&[], &["ALL"], &[]), true, available).unwrap();
        assert_eq!((sets.bounding, sets.effective), (available, available));
        let sets = resolve(&ask(&["SYS_RESOURCE"], &[], &[]), false, available).unwrap();
        assert_eq!(sets.unavailable, set(&["SYS_RESOURCE"]));
        assert_eq!(sets.bounding, CapSet::defaults());
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = resolve(&ask(&[], &["NET_ADMN"], &[]), true, FULL).unwrap_err();
        assert_eq!(error.to_string(), "\"NET_ADMN\" is not a capability");
    }

    #[test]
    fn this_process_has_a_bounding_set() {
        let set = CapSet::of_this_process().unwrap();
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap();
        assert!(CapSet::up_to(last.trim().parse().unwrap()).contains(set));
    }
}
