//! Filters against a model of what profiles mean, run by an interpreter, and in the kernel.

use super::profile::Operator;
use super::*;
use berth_sys::seccomp::Filter as Loaded;
use proptest::prelude::*;
use rustix::io::Errno;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

const ADMIN: &str = "SYS_ADMIN";

/// struct seccomp_data, less the instruction pointer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Data {
    pub arch: u32,
    pub number: u32,
    pub args: [u64; 6],
}

impl Data {
    fn of(arch: Arch, name: &str, args: &[u64]) -> Self {
        let number = arch.number(name).unwrap();
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        Self {
            arch: arch.audit(),
            number,
            args: all,
        }
    }

    fn word(&self, offset: u32) -> u32 {
        match offset {
            bpf::NUMBER => self.number,
            bpf::ARCH => self.arch,
            _ => {
                let at = offset - 16;
                let arg = self.args[(at / 8) as usize];
                if at.is_multiple_of(8) {
                    arg as u32
                } else {
                    (arg >> 32) as u32
                }
            }
        }
    }
}

/// What the kernel would return, and after how many instructions.
pub(super) fn run(filter: &Filter, data: &Data) -> (u32, usize) {
    let code: Vec<(u16, u8, u8, u32)> = filter
        .program
        .chunks_exact(8)
        .map(|c| {
            let k = u32::from_ne_bytes([c[4], c[5], c[6], c[7]]);
            (u16::from_ne_bytes([c[0], c[1]]), c[2], c[3], k)
        })
        .collect();
    let (mut at, mut steps, mut a) = (0usize, 0, 0u32);
    loop {
        let (op, jt, jf, k) = code[at];
        (at, steps) = (at + 1, steps + 1);
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match op {
            bpf::LOAD => a = data.word(k),
            bpf::AND => a &= k,
            bpf::JUMP => at += k as usize,
            bpf::JUMP_EQ => at += jump(a == k),
            bpf::JUMP_GT => at += jump(a > k),
            bpf::JUMP_GE => at += jump(a >= k),
            bpf::RETURN => return (k, steps),
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn caps(names: &[&str]) -> CapSet {
    names.iter().fold(CapSet::EMPTY, |set, name| {
        set.union(CapSet::named(name).unwrap())
    })
}

fn compiler() -> Compiler {
    Compiler::of(Arch::X86_64, (6, 12))
}

fn default_filter(caps: CapSet) -> Arc<Filter> {
    compiler().compile_default(caps).unwrap()
}

pub(super) fn errno(value: u32) -> u32 {
    RET_ERRNO | value
}

#[test]
fn the_default_profile_allows_what_programs_need() {
    let filter = default_filter(CapSet::defaults());
    for arch in [Arch::X86_64, Arch::X86, Arch::X32] {
        for name in [
            "read",
            "write",
            "futex",
            "openat",
            "execve",
            "exit_group",
            "mmap",
            "ptrace",
        ] {
            // mmap stands in for both of x86.
            let Some(_) = arch.number(name) else { continue };
            assert_eq!(
                run(&filter, &Data::of(arch, name, &[])).0,
                RET_ALLOW,
                "{arch:?} {name}"
            );
        }
    }
    for name in [
        "statmount",
        "mseal",
        "setxattrat",
        "file_getattr",
        "rseq",
        "futex_wait",
    ] {
        assert_eq!(
            run(&filter, &Data::of(Arch::X86_64, name, &[])).0,
            RET_ALLOW,
            "{name}"
        );
    }
}

#[test]
fn the_default_profile_refuses_what_reaches_the_host() {
    let filter = default_filter(CapSet::defaults());
    for arch in [Arch::X86_64, Arch::X86, Arch::X32] {
        for name in [
            "io_uring_setup",
            "keyctl",
            "add_key",
            "request_key",
            "bpf",
            "kexec_load",
            "mount",
            "umount2",
            "pivot_root",
            "setns",
            "unshare",
            "open_by_handle_at",
            "userfaultfd",
            "perf_event_open",
            "init_module",
            "reboot",
            "swapon",
            "move_pages",
            "open_tree_attr",
            "fsopen",
            "quotactl",
            "settimeofday",
        ] {
            let got = run(&filter, &Data::of(arch, name, &[])).0;
            assert_eq!(got, errno(EPERM), "{arch:?} {name}");
        }
    }
}

#[test]
fn new_namespaces_need_the_capability() {
    let clone = |flags| Data::of(Arch::X86_64, "clone", &[flags]);
    let clone3 = Data::of(Arch::X86_64, "clone3", &[]);
    let without = default_filter(CapSet::defaults());
    assert_eq!(run(&without, &clone(0x3d_0f00)).0, RET_ALLOW);
    for bit in [
        0x2_0000,
        0x200_0000,
        0x400_0000,
        0x800_0000,
        0x1000_0000,
        0x2000_0000,
        0x4000_0000,
    ] {
        assert_eq!(run(&without, &clone(bit | 17)).0, errno(EPERM), "{bit:#x}");
    }
    assert_eq!(run(&without, &clone3).0, errno(ENOSYS));
    let with = default_filter(caps(&[ADMIN]));
    assert_eq!(run(&with, &clone(0x1000_0000)).0, RET_ALLOW);
    assert_eq!(run(&with, &clone3).0, RET_ALLOW);
    assert_eq!(
        run(&with, &Data::of(Arch::X86_64, "mount", &[])).0,
        RET_ALLOW
    );
}

#[test]
fn a_capability_brings_its_calls() {
    for (cap, name) in [
        ("SYS_TIME", "settimeofday"),
        ("BPF", "bpf"),
        ("PERFMON", "perf_event_open"),
        ("SYS_NICE", "mbind"),
        ("SYS_CHROOT", "chroot"),
        ("SYSLOG", "syslog"),
        ("DAC_READ_SEARCH", "open_by_handle_at"),
    ] {
        let data = Data::of(Arch::X86_64, name, &[]);
        assert_eq!(
            run(&default_filter(caps(&[cap])), &data).0,
            RET_ALLOW,
            "{name}"
        );
        assert_eq!(
            run(&default_filter(CapSet::EMPTY), &data).0,
            errno(EPERM),
            "{name}"
        );
    }
}

#[test]
fn bits_the_kernel_throws_away_get_nothing_past_the_filter() {
    let filter = default_filter(CapSet::defaults());
    let socket = |family: u64| run(&filter, &Data::of(Arch::X86_64, "socket", &[family])).0;
    assert_eq!(
        (socket(1), socket(2), socket(41)),
        (RET_ALLOW, RET_ALLOW, RET_ALLOW)
    );
    assert_eq!(socket(40), errno(EPERM));
    assert_eq!(socket(1 << 32 | 40), errno(EPERM));
    let personality = |p| run(&filter, &Data::of(Arch::X86_64, "personality", &[p])).0;
    for allowed in [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff, u64::MAX] {
        assert_eq!(personality(allowed), RET_ALLOW, "{allowed:#x}");
    }
    assert_eq!(personality(0x0004_0000), errno(EPERM));
}

#[test]
fn what_is_not_invented_yet_does_not_exist() {
    let filter = default_filter(CapSet::defaults());
    let raw = |arch: Arch, number| {
        run(
            &filter,
            &Data {
                arch: arch.audit(),
                number,
                args: [0; 6],
            },
        )
        .0
    };
    for number in [1000, 470, u32::MAX, X32 | 1000] {
        assert_eq!(raw(Arch::X86_64, number), errno(ENOSYS), "{number}");
    }
    assert_eq!(raw(Arch::X86, 600), errno(ENOSYS));
    // A hole in the table.
    assert_eq!(raw(Arch::X86_64, 400), errno(ENOSYS));
    // No machine that runs here.
    assert_eq!(raw(Arch::Aarch64, 63), RET_KILL_PROCESS);
    let only_native = compiler().compile(br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#, CapSet::EMPTY);
    let only_native = only_native.unwrap();
    let raw = |arch: Arch, number| {
        run(
            &only_native,
            &Data {
                arch: arch.audit(),
                number,
                args: [0; 6],
            },
        )
        .0
    };
    assert_eq!(raw(Arch::X86, 3), RET_KILL_PROCESS);
    assert_eq!(raw(Arch::X86_64, X32), RET_KILL_PROCESS);
    assert_eq!(raw(Arch::X86_64, 1000), RET_ALLOW);
}

const X32: u32 = arch::X32_BIT;

#[test]
fn arm_machines_have_their_own_tables() {
    let filter = Compiler::of(Arch::Aarch64, (6, 12))
        .compile_default(CapSet::defaults())
        .unwrap();
    for (arch, name) in [
        (Arch::Aarch64, "read"),
        (Arch::Aarch64, "newfstatat"),
        (Arch::Arm, "set_tls"),
        (Arch::Arm, "open"),
        (Arch::Arm, "sync_file_range2"),
    ] {
        assert_eq!(
            run(&filter, &Data::of(arch, name, &[])).0,
            RET_ALLOW,
            "{name}"
        );
    }
    assert_eq!(
        run(&filter, &Data::of(Arch::Aarch64, "mount", &[])).0,
        errno(EPERM)
    );
    assert_eq!(
        run(&filter, &Data::of(Arch::X86_64, "read", &[])).0,
        RET_KILL_PROCESS
    );
}

#[test]
fn calls_that_x86_has_twice_are_caught_twice() {
    let json = br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
        "syscalls":[{"names":["socket","semget"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
    let filter = compiler().compile(json, CapSet::EMPTY).unwrap();
    let x86 = |name, first| run(&filter, &Data::of(Arch::X86, name, &[first])).0;
    assert_eq!(
        (x86("socket", 0), x86("socketcall", 1)),
        (errno(13), errno(13))
    );
    assert_eq!(
        (x86("socketcall", 2), x86("ipc", 2)),
        (RET_ALLOW, errno(13))
    );
    assert_eq!(
        (x86("ipc", 0x1_0002), x86("ipc", 3)),
        (errno(13), RET_ALLOW)
    );
}

#[test]
fn dockers_old_form_and_conditions_on_kernel_and_machine_are_understood() {
    let json = br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5,"syscalls":[
        {"name":"read","action":"SCMP_ACT_ALLOW","args":null,"includes":{}},
        {"names":["write"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"6.13"}},
        {"names":["open"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"5.10"}},
        {"names":["close"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}},
        {"names":["stat"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64"]}},
        {"names":["no_such_call","lseek"],"action":"SCMP_ACT_LOG"},
        {"names":["getpid"],"action":"SCMP_ACT_TRAP","excludes":{"arches":["amd64"]}}]}"#;
    let filter = compiler().compile(json, CapSet::EMPTY).unwrap();
    let expected = [
        ("read", RET_ALLOW),
        ("write", errno(5)),
        ("open", RET_ALLOW),
        ("close", errno(5)),
        ("stat", RET_ALLOW),
        ("lseek", RET_LOG),
        ("getpid", errno(5)),
    ];
    for (name, result) in expected {
        assert_eq!(
            run(&filter, &Data::of(Arch::X86_64, name, &[])).0,
            result,
            "{name}"
        );
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let compile = |json: &str| {
        compiler()
            .compile(json.as_bytes(), CapSet::EMPTY)
            .unwrap_err()
    };
    for (json, expected) in [
        ("", "JSON"),
        ("{}", "JSON"),
        (r#"{"defaultAction":"SCMP_ACT_WHAT"}"#, "JSON"),
        (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "listener"),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
            "listener",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["x86"]}"#,
            "architecture",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["NEW"]}"#,
            "NEW",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#,
            "5000",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],
            "action":"SCMP_ACT_ERRNO","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
            "argument 6 of read",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],
            "action":"SCMP_ACT_ERRNO","includes":{"minKernel":"new"}}]}"#,
            "kernel version",
        ),
    ] {
        let error = compile(json).to_string();
        assert!(error.contains(expected), "{json}: {error}");
    }
    let many: Vec<String> = (0..900)
        .map(|n| {
            format!(
                r#"{{"names":["read"],"action":"SCMP_ACT_ALLOW",
                "args":[{{"index":0,"value":{n},"op":"SCMP_CMP_EQ"}}]}}"#
            )
        })
        .collect();
    let json = format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{}]}}"#,
        many.join(",")
    );
    assert!(matches!(compile(&json), Error::TooLong(4500..5000)));
    let fifo = Path::new("/dev/null");
    assert!(matches!(
        compiler().compile_file(fifo, CapSet::EMPTY),
        Err(Error::NotAProfile { .. })
    ));
}

#[test]
fn a_compiled_profile_is_kept() {
    let compiler = compiler();
    let [a, b] = [(); 2].map(|()| compiler.compile_default(CapSet::defaults()).unwrap());
    assert!(Arc::ptr_eq(&a, &b));
    assert_ne!(*compiler.compile_default(caps(&[ADMIN])).unwrap(), *a);
    for n in 0..2 * KEPT as u64 {
        compiler.compile_default(CapSet::from_bits(n)).unwrap();
    }
    assert!(compiler.kept.lock().unwrap().len() <= KEPT);
}

#[test]
fn the_usual_calls_take_few_instructions() {
    let filter = default_filter(CapSet::defaults());
    assert!(
        filter.program.len() / 8 < 1200,
        "{}",
        filter.program.len() / 8
    );
    for name in ["read", "write", "futex"] {
        let (_, steps) = run(&filter, &Data::of(Arch::X86_64, name, &[]));
        assert!(steps <= 14, "{name}: {steps}");
    }
}

/// In the kernel, on this machine: a thread of its own holds the filter.
#[test]
fn the_kernel_does_what_the_profile_says() {
    let filter = Compiler::new()
        .unwrap()
        .compile_default(CapSet::defaults())
        .unwrap();
    let loaded = Loaded::new(&filter.program, filter.flags).unwrap();
    std::thread::spawn(move || {
        loaded.install().expect("this test needs root");
        let family = rustix::net::AddressFamily::from_raw;
        let socket = |number| {
            rustix::net::socket(family(number), rustix::net::SocketType::STREAM, None).map(drop)
        };
        socket(1).unwrap();
        assert_eq!(socket(40), Err(Errno::PERM));
        let mounted = rustix::mount::mount_bind("/", "/proc/1/nonexistent");
        assert_eq!(mounted, Err(Errno::PERM));
        // With a filter that let it pass it were EINVAL or EFAULT.
        let opened = rustix::mount::fsopen("tmpfs", rustix::mount::FsOpenFlags::empty());
        assert_eq!(opened.map(drop), Err(Errno::PERM));
        // Forks, executes, reads and writes: what programs do.
        let said = Command::new("sh")
            .args(["-c", "echo a | (cat; ls / | wc -l)"])
            .output()
            .unwrap();
        assert!(
            said.status.success() && said.stdout.starts_with(b"a\n"),
            "{said:?}"
        );
        let denied = Command::new("unshare")
            .args(["-U", "true"])
            .output()
            .unwrap();
        assert!(!denied.status.success());
    })
    .join()
    .unwrap();
}

/// As another process, because it does not outlive it.
#[test]
fn the_kernel_kills_where_the_profile_says_so() {
    const AGAIN: &str = "BERTH_TEST_SECCOMP_KILL";
    if std::env::var_os(AGAIN).is_some() {
        let json = br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["sysinfo"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#;
        let filter = Compiler::new()
            .unwrap()
            .compile(json, CapSet::EMPTY)
            .unwrap();
        Loaded::new(&filter.program, filter.flags)
            .unwrap()
            .install()
            .unwrap();
        rustix::system::sysinfo();
        std::process::exit(0);
    }
    let name = "seccomp::tests::the_kernel_kills_where_the_profile_says_so";
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--test-threads", "1"])
        .env(AGAIN, "1")
        .output()
        .unwrap()
        .status;
    assert_eq!(status.signal(), Some(31), "{status:?}");
}

#[test]
fn the_default_profile_is_short_where_it_is_asked_most() {
    let filter = default_filter(CapSet::defaults());
    let whole = filter.program.len() / 8;
    assert!(whole < 1000, "{whole} instructions");
    for name in ["read", "write", "futex", "openat"] {
        let (_, instructions) = run(&filter, &Data::of(Arch::X86_64, name, &[]));
        assert!(instructions <= 16, "{name}: {instructions} instructions");
    }
}

// A model of what a profile means, written the other way round: by asking each entry.

#[derive(Clone, Debug)]
struct Entry {
    name: &'static str,
    action: &'static str,
    errno: u32,
    args: Vec<(u32, &'static str, u64, u64)>,
}

const CALLS: [&str; 8] = [
    "read",
    "write",
    "close",
    "ioctl",
    "clone",
    "file_setattr",
    "socket",
    "pread64",
];
const ACTIONS: [&str; 5] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4u64,
        Just(u64::MAX),
        Just(0xffff_ffff),
        Just(1 << 32),
        (0..3u64).prop_map(|n| (5 << 32) + n),
        any::<u64>(),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let arg = (
        0..3u32,
        proptest::sample::select(&OPERATORS),
        value(),
        value(),
    );
    (
        proptest::sample::select(&CALLS),
        proptest::sample::select(&ACTIONS),
        1..5u32,
        proptest::collection::vec(arg, 0..4),
    )
        .prop_map(|(name, action, errno, args)| Entry {
            name,
            action,
            errno,
            args,
        })
}

fn json(default: &str, entries: &[Entry]) -> String {
    let entries: Vec<serde_json::Value> = entries
        .iter()
        .map(|entry| {
            let args: Vec<_> = entry
                .args
                .iter()
                .map(|(index, op, value, two)| {
                    serde_json::json!({"index": index, "op": op, "value": value, "valueTwo": two})
                })
                .collect();
            serde_json::json!({"names": [entry.name], "action": entry.action,
                "errnoRet": entry.errno, "args": args})
        })
        .collect();
    serde_json::json!({"defaultAction": default, "defaultErrnoRet": 3, "syscalls": entries,
        "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]})
    .to_string()
}

fn returns(action: &str, errno: u32) -> u32 {
    match action {
        "SCMP_ACT_ALLOW" => RET_ALLOW,
        "SCMP_ACT_ERRNO" => RET_ERRNO | errno,
        "SCMP_ACT_KILL_PROCESS" => RET_KILL_PROCESS,
        "SCMP_ACT_KILL_THREAD" => RET_KILL_THREAD,
        "SCMP_ACT_TRAP" => RET_TRAP,
        other => panic!("{other}"),
    }
}

fn model(default: &str, entries: &[Entry], arch: Arch, name: &str, args: &[u64; 6]) -> u32 {
    let fallback = returns(default, 3);
    let relevant: Vec<&Entry> = entries
        .iter()
        .filter(|e| e.name == name && returns(e.action, e.errno) != fallback)
        .collect();
    if let Some(always) = relevant.iter().find(|e| e.args.is_empty()) {
        return returns(always.action, always.errno);
    }
    for entry in relevant {
        let mut results = entry.args.iter().map(|&(index, op, value, two)| {
            let mask = if arch.compares_all(name, index) {
                u64::MAX
            } else {
                0xffff_ffff
            };
            let (arg, value, two) = (args[index as usize] & mask, value & mask, two & mask);
            match op {
                "SCMP_CMP_NE" => arg != value,
                "SCMP_CMP_LT" => arg < value,
                "SCMP_CMP_LE" => arg <= value,
                "SCMP_CMP_EQ" => arg == value,
                "SCMP_CMP_GE" => arg >= value,
                "SCMP_CMP_GT" => arg > value,
                _ => arg & value == two,
            }
        });
        let mut indexes: Vec<u32> = entry.args.iter().map(|arg| arg.0).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let holds = if indexes.len() == entry.args.len() {
            results.all(|holds| holds)
        } else {
            results.any(|holds| holds)
        };
        if holds {
            return returns(entry.action, entry.errno);
        }
    }
    fallback
}

proptest! {
    #[test]
    fn a_filter_says_what_its_profile_says(
        default in proptest::sample::select(&ACTIONS),
        entries in proptest::collection::vec(entry(), 0..12),
        calls in proptest::collection::vec(
            (proptest::sample::select(&CALLS), proptest::array::uniform6(value())), 1..20),
    ) {
        let filter = compiler().compile(json(default, &entries).as_bytes(), CapSet::EMPTY).unwrap();
        for (name, args) in calls {
            for arch in [Arch::X86_64, Arch::X86, Arch::X32] {
                if arch == Arch::X86 && name == "socket" && args[0] > u64::from(u32::MAX) {
                    continue;
                }
                let data = Data::of(arch, name, &args);
                prop_assert_eq!(
                    run(&filter, &data).0,
                    model(default, &entries, arch, name, &args),
                    "{:?} {} {:x?}", arch, name, args
                );
            }
        }
    }

    #[test]
    fn no_profile_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = compiler().compile(&bytes, CapSet::EMPTY);
    }
}

#[test]
fn operators_have_the_names_of_the_specification() {
    for name in OPERATORS {
        serde_json::from_value::<Operator>(serde_json::json!(name)).unwrap();
    }
}
