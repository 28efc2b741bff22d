//! Architectures, and their system calls by name.
//!
//! Source: the `syscalls` crate, made from the kernel's own tables, complete to 6.17; x32 from
//! arch/x86/entry/syscalls/syscall_64.tbl; AUDIT_ARCH_* from linux/audit.h.

use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    X86_64,
    X86,
    /// Pointers of 32 bits in the 64-bit mode; shares the audit number of x86_64.
    X32,
    Aarch64,
    Arm,
}

/// What x32 adds to every number.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// x32 has these under numbers of its own, not those of x86_64.
const X32_OWN: [(&str, u32); 36] = [
    ("rt_sigaction", 512),
    ("rt_sigreturn", 513),
    ("ioctl", 514),
    ("readv", 515),
    ("writev", 516),
    ("recvfrom", 517),
    ("sendmsg", 518),
    ("recvmsg", 519),
    ("execve", 520),
    ("ptrace", 521),
    ("rt_sigpending", 522),
    ("rt_sigtimedwait", 523),
    ("rt_sigqueueinfo", 524),
    ("sigaltstack", 525),
    ("timer_create", 526),
    ("mq_notify", 527),
    ("kexec_load", 528),
    ("waitid", 529),
    ("set_robust_list", 530),
    ("get_robust_list", 531),
    ("vmsplice", 532),
    ("move_pages", 533),
    ("preadv", 534),
    ("pwritev", 535),
    ("rt_tgsigqueueinfo", 536),
    ("recvmmsg", 537),
    ("sendmmsg", 538),
    ("process_vm_readv", 539),
    ("process_vm_writev", 540),
    ("setsockopt", 541),
    ("getsockopt", 542),
    ("io_setup", 543),
    ("io_submit", 544),
    ("execveat", 545),
    ("preadv2", 546),
    ("pwritev2", 547),
];

/// x86_64 has these and x32 does not.
const NOT_X32: [&str; 13] = [
    "uselib",
    "_sysctl",
    "create_module",
    "get_kernel_syms",
    "query_module",
    "nfsservctl",
    "set_thread_area",
    "get_thread_area",
    "epoll_ctl_old",
    "epoll_wait_old",
    "vserver",
    "uretprobe",
    "uprobe",
];

/// By this name in profiles and in the kernel's headers, by another one in the table.
const AARCH64_OWN: [(&str, u32); 1] = [("newfstatat", 79)];

/// Calls of 32-bit ARM outside its table. Source: arch/arm/include/uapi/asm/unistd.h.
const ARM_OWN: [(&str, u32); 7] = [
    ("sync_file_range2", 341),
    ("breakpoint", 0xf_0001),
    ("cacheflush", 0xf_0002),
    ("usr26", 0xf_0003),
    ("usr32", 0xf_0004),
    ("set_tls", 0xf_0005),
    ("get_tls", 0xf_0006),
];

/// The calls that go through one number on x86, by the first argument there.
/// Source: linux/net.h, linux/ipc.h.
const SOCKETCALL: [(&str, u64); 20] = [
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// Arguments that the kernel declares as `int` or `unsigned int`: it looks at the lower half of
/// the register only, so a filter that compared all of it could be walked round with a bit that
/// the kernel throws away (CVE-2019-10063 was that).
const NARROW: [(&str, u32); 27] = [
    ("socket", 0),
    ("socket", 1),
    ("socket", 2),
    ("socketpair", 0),
    ("socketpair", 1),
    ("socketpair", 2),
    ("setsockopt", 1),
    ("setsockopt", 2),
    ("getsockopt", 1),
    ("getsockopt", 2),
    ("personality", 0),
    ("ioctl", 1),
    ("fcntl", 1),
    ("fcntl64", 1),
    ("prctl", 0),
    ("bpf", 0),
    ("seccomp", 0),
    ("keyctl", 0),
    ("setns", 1),
    ("madvise", 2),
    ("futex", 1),
    ("prlimit64", 1),
    ("setrlimit", 0),
    ("quotactl", 0),
    ("memfd_create", 1),
    ("kill", 1),
    ("perf_event_open", 3),
];

impl Arch {
    /// That of this program, where Berth knows it.
    pub fn native() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// "SCMP_ARCH_X86_64" and so on, as profiles have it.
    pub(super) fn of_profile(name: &str) -> Option<Self> {
        match name {
            "SCMP_ARCH_X86_64" => Some(Self::X86_64),
            "SCMP_ARCH_X86" => Some(Self::X86),
            "SCMP_ARCH_X32" => Some(Self::X32),
            "SCMP_ARCH_AARCH64" => Some(Self::Aarch64),
            "SCMP_ARCH_ARM" => Some(Self::Arm),
            _ => None,
        }
    }

    /// The other way.
    pub(super) fn profile_name(self) -> &'static str {
        match self {
            Self::X86_64 => "SCMP_ARCH_X86_64",
            Self::X86 => "SCMP_ARCH_X86",
            Self::X32 => "SCMP_ARCH_X32",
            Self::Aarch64 => "SCMP_ARCH_AARCH64",
            Self::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// As `includes.arches` of a profile has it.
    pub(super) fn short(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::X86 => "x86",
            Self::X32 => "x32",
            Self::Aarch64 => "arm64",
            Self::Arm => "arm",
        }
    }

    /// Whether processes of `other` can run on a machine of this one.
    pub(super) fn runs(self, other: Self) -> bool {
        match self {
            Self::X86_64 => matches!(other, Self::X86_64 | Self::X86 | Self::X32),
            Self::Aarch64 => matches!(other, Self::Aarch64 | Self::Arm),
            Self::X86 | Self::X32 | Self::Arm => self == other,
        }
    }

    /// `arch` of struct seccomp_data.
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Whether the upper halves of arguments are not always zero.
    pub(super) fn wide(self) -> bool {
        matches!(self, Self::X86_64 | Self::X32 | Self::Aarch64)
    }

    /// Whether `index` of `name` has to be compared in all its 64 bits.
    pub(super) fn compares_all(self, name: &str, index: u32) -> bool {
        self.wide() && !NARROW.contains(&(name, index))
    }

    /// The number of a call; `None` where this architecture, or this table, has no such call.
    pub(super) fn number(self, name: &str) -> Option<u32> {
        let id = |id: i32| u32::try_from(id).ok();
        match self {
            Self::X86_64 => id(syscalls::x86_64::Sysno::from_str(name).ok()?.id()),
            Self::X86 => id(syscalls::x86::Sysno::from_str(name).ok()?.id()),
            Self::X32 if NOT_X32.contains(&name) => None,
            Self::X32 => own(&X32_OWN, name)
                .or_else(|| Self::X86_64.number(name))
                .map(|number| number | X32_BIT),
            Self::Aarch64 => own(&AARCH64_OWN, name)
                .or_else(|| id(syscalls::aarch64::Sysno::from_str(name).ok()?.id())),
            Self::Arm => {
                own(&ARM_OWN, name).or_else(|| id(syscalls::arm::Sysno::from_str(name).ok()?.id()))
            }
        }
    }

    /// Whether a number up to the highest is a call's: the tables have gaps.
    pub(super) fn knows(self, number: u32) -> bool {
        let own = |list: &[(&str, u32)]| list.iter().any(|(_, own)| *own == number);
        let id = number as usize;
        match self {
            Self::X86_64 => syscalls::x86_64::Sysno::new(id).is_some(),
            Self::X86 => syscalls::x86::Sysno::new(id).is_some(),
            Self::X32 => true,
            Self::Aarch64 => own(&AARCH64_OWN) || syscalls::aarch64::Sysno::new(id).is_some(),
            Self::Arm => own(&ARM_OWN) || syscalls::arm::Sysno::new(id).is_some(),
        }
    }

    /// The highest number of the table; what is above was not invented yet.
    pub(super) fn last(self) -> u32 {
        let id = match self {
            Self::X86_64 => syscalls::x86_64::Sysno::last().id(),
            Self::X86 => syscalls::x86::Sysno::last().id(),
            // Its own numbers end above the shared ones.
            Self::X32 => {
                return X32_BIT | Self::X86_64.last().max(X32_OWN[X32_OWN.len() - 1].1);
            }
            Self::Aarch64 => syscalls::aarch64::Sysno::last().id(),
            Self::Arm => syscalls::arm::Sysno::last().id(),
        };
        id.unsigned_abs()
    }

    /// Where x86 has a call a second time: the number it shares with others, and which mask and
    /// value of the first argument stand for it.
    pub(super) fn multiplexed(self, name: &str) -> Option<(u32, u64, u64)> {
        if self != Self::X86 {
            return None;
        }
        let find = |list: &[(&str, u64)]| {
            list.iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| *value)
        };
        if let Some(value) = find(&SOCKETCALL) {
            return Some((self.number("socketcall")?, u64::from(u32::MAX), value));
        }
        // The upper 16 bits are a version.
        find(&IPC).and_then(|value| Some((self.number("ipc")?, 0xffff, value)))
    }
}

fn own(list: &[(&str, u32)], name: &str) -> Option<u32> {
    list.iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        // arch/x86/entry/syscalls/syscall_64.tbl, syscall_32.tbl; asm-generic/unistd.h
        for (arch, name, number) in [
            (Arch::X86_64, "read", Some(0)),
            (Arch::X86_64, "clone3", Some(435)),
            (Arch::X86_64, "statmount", Some(457)),
            (Arch::X86_64, "listmount", Some(458)),
            (Arch::X86_64, "mseal", Some(462)),
            (Arch::X86_64, "setxattrat", Some(463)),
            (Arch::X86_64, "open_tree_attr", Some(467)),
            (Arch::X86_64, "file_getattr", Some(468)),
            (Arch::X86_64, "socketcall", None),
            (Arch::X86, "read", Some(3)),
            (Arch::X86, "socketcall", Some(102)),
            (Arch::X86, "clock_gettime64", Some(403)),
            (Arch::X86, "umount", Some(22)),
            (Arch::X86, "umount2", Some(52)),
            (Arch::X32, "read", Some(X32_BIT)),
            (Arch::X32, "execve", Some(X32_BIT | 520)),
            (Arch::X32, "uselib", None),
            (Arch::Aarch64, "read", Some(63)),
            (Arch::Aarch64, "clone", Some(220)),
            (Arch::Aarch64, "open", None),
            (Arch::Aarch64, "newfstatat", Some(79)),
            (Arch::Aarch64, "file_setattr", Some(469)),
            (Arch::Arm, "set_tls", Some(0xf_0005)),
            (Arch::Arm, "arm_fadvise64_64", Some(270)),
        ] {
            assert_eq!(arch.number(name), number, "{arch:?} {name}");
        }
    }
}
