//! What the default filter answers to every system call there is, with the
//! default capabilities and with each one alone: `answers.txt`, which is made by
//! nobody but people who changed the profile and read what that changes.
//!
//! ```text
//! NUMBER NAME ANSWER [CAPABILITY ...]     answers with the capability: allowed
//! NUMBER NAME(FIRST ARGUMENT) ...         one line for each argument that matters
//! ```
//!
//! The compiled program is run, for every number from 0 to past the last one.

use super::tests::{Data, errno, run};
use super::*;
use std::fmt::Write as _;

const TABLE: &str = include_str!("answers.txt");

/// How far beyond the last known call is looked.
const BEYOND: u32 = 40;

/// First arguments that the profile tells apart.
/// Source: linux/personality.h, linux/sched.h, linux/socket.h.
const ARGUMENTS: [(&str, &[u64]); 3] = [
    (
        "personality",
        &[0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff, 1, 0x4_0000],
    ),
    // AF_UNIX, AF_INET, AF_NETLINK, AF_VSOCK.
    ("socket", &[1, 2, 16, 40]),
    // SIGCHLD; then CLONE_NEWTIME to CLONE_NEWNET, each alone.
    (
        "clone",
        &[
            17,
            0x80,
            0x2_0000,
            0x200_0000,
            0x400_0000,
            0x800_0000,
            0x1000_0000,
            0x2000_0000,
            0x4000_0000,
        ],
    ),
];

fn word(answer: u32) -> String {
    match answer {
        RET_ALLOW => "allow".into(),
        answer if answer == errno(EPERM) => "EPERM".into(),
        answer if answer == errno(ENOSYS) => "ENOSYS".into(),
        other => format!("{other:#x}"),
    }
}

/// Names by number, of all that any architecture knows.
fn names(arch: Arch) -> BTreeMap<u32, String> {
    let x86 = syscalls::x86_64::Sysno::iter().map(|call| call.name());
    let arm = syscalls::aarch64::Sysno::iter().map(|call| call.name());
    x86.chain(arm)
        .chain(["statmount", "listmount", "mseal", "setxattrat"])
        .chain([
            "getxattrat",
            "listxattrat",
            "removexattrat",
            "open_tree_attr",
        ])
        .chain(["file_getattr", "file_setattr"])
        .filter_map(|name| Some((arch.number(name)?, name.to_owned())))
        .collect()
}

fn table(arch: Arch) -> String {
    let compiler = Compiler::of(arch, (6, 12));
    let compile = |caps| compiler.compile_default(caps).unwrap();
    let (bare, usual) = (compile(CapSet::EMPTY), compile(CapSet::defaults()));
    let alone: Vec<_> = CapSet::up_to(40)
        .names()
        .map(|name| {
            let caps = CapSet::named(&name).unwrap();
            (name.replace("CAP_", ""), caps, compile(caps))
        })
        .collect();
    let names = names(arch);
    let mut text = String::new();
    for number in 0..=arch.last() + BEYOND {
        let name = names.get(&number).map_or("-", String::as_str);
        let special = ARGUMENTS.iter().find(|(special, _)| *special == name);
        for argument in special.map_or(&[0][..], |(_, arguments)| arguments) {
            let data = Data {
                arch: arch.audit(),
                number,
                args: [*argument, 0, 0, 0, 0, 0],
            };
            let of = |filter: &Filter| run(filter, &data).0;
            let without = of(&bare);
            let mut allowing = Vec::new();
            for (name, caps, filter) in &alone {
                match of(filter) {
                    same if same == without => {}
                    RET_ALLOW => allowing.push((name, *caps)),
                    other => panic!("{number} with {name} answers {other:#x}"),
                }
            }
            // What the default ones answer follows from each alone.
            let among = allowing
                .iter()
                .any(|(_, caps)| CapSet::defaults().contains(*caps));
            let expected = if among { RET_ALLOW } else { without };
            assert_eq!(of(&usual), expected, "{number} {name}");
            let called = match special {
                Some(_) => format!("{name}({argument:#x})"),
                None => name.to_owned(),
            };
            let _ = write!(text, "{number} {called} {}", word(without));
            for (name, _) in allowing {
                let _ = write!(text, " {name}");
            }
            text.push('\n');
        }
    }
    text
}

fn section(name: &str) -> String {
    let text = TABLE
        .split("\n== ")
        .find_map(|part| part.strip_prefix(name));
    let text = text.and_then(|part| part.strip_prefix(" ==\n"));
    text.unwrap_or_default().trim_end().to_owned() + "\n"
}

#[test]
fn every_system_call_of_x86_64_and_arm64_is_answered_as_the_table_says() {
    for (name, arch) in [("x86_64", Arch::X86_64), ("aarch64", Arch::Aarch64)] {
        let (now, then) = (table(arch), section(name));
        let changed: Vec<_> = now
            .lines()
            .zip(then.lines().chain(std::iter::repeat("")))
            .filter(|(now, then)| now != then)
            .take(20)
            .collect();
        if std::env::var_os("BERTH_PRINT_ANSWERS").is_some() {
            println!("\n== {name} ==\n{now}");
        }
        assert!(now == then, "{name}: answered, in the table: {changed:#?}");
    }
}

#[test]
fn what_reaches_the_host_is_in_the_table_as_refused() {
    for arch in ["x86_64", "aarch64"] {
        let table = section(arch);
        let answer = |name: &str| {
            let line = table
                .lines()
                .find(|line| line.split(' ').nth(1) == Some(name));
            line.unwrap_or_else(|| panic!("no {name} on {arch}"))
                .splitn(3, ' ')
                .nth(2)
                .unwrap()
                .to_owned()
        };
        for name in [
            "kexec_load",
            "add_key",
            "request_key",
            "keyctl",
            "userfaultfd",
            "io_uring_setup",
            "swapon",
            "nfsservctl",
        ] {
            assert_eq!(answer(name), "EPERM", "{name}");
        }
        for (name, capability) in [
            ("mount", "SYS_ADMIN"),
            ("setns", "SYS_ADMIN"),
            ("init_module", "SYS_MODULE"),
            ("reboot", "SYS_BOOT"),
            ("open_by_handle_at", "DAC_READ_SEARCH"),
            ("settimeofday", "SYS_TIME"),
            ("clone(0x10000000)", "SYS_ADMIN"),
        ] {
            assert_eq!(answer(name), format!("EPERM {capability}"), "{name}");
        }
        assert_eq!(answer("clone3"), "ENOSYS SYS_ADMIN");
        // Past the last one, and so on.
        let last = table.lines().last().unwrap();
        assert!(last.ends_with(" - ENOSYS"), "{last}");
    }
}
