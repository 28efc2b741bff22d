//! Which devices a container may touch.

use super::{Cgroup, Error, Version, file};
use berth_sys::bpf::{self, Instruction};
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// Character and block devices.
    All,
    Char,
    Block,
}

/// One rule, later ones override earlier ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRule {
    pub allow: bool,
    pub kind: DeviceKind,
    /// `None`: every one.
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Letters of "rwm": read, write, mknod.
    pub access: String,
}

impl DeviceRule {
    /// Everything, for privileged containers.
    pub fn everything() -> Self {
        Self {
            allow: true,
            kind: DeviceKind::All,
            major: None,
            minor: None,
            access: "rwm".into(),
        }
    }

    /// What every container gets: nothing but nodes may be made, and the harmless devices used.
    ///
    /// Source: OCI runtime-spec, `config-linux.md`, "Default Devices".
    pub fn defaults() -> Vec<Self> {
        let rule = |allow, kind, major, minor, access: &str| Self {
            allow,
            kind,
            major,
            minor,
            access: access.to_owned(),
        };
        let char =
            |major, minor: u32| rule(true, DeviceKind::Char, Some(major), Some(minor), "rwm");
        vec![
            rule(false, DeviceKind::All, None, None, "rwm"),
            rule(true, DeviceKind::Char, None, None, "m"),
            rule(true, DeviceKind::Block, None, None, "m"),
            char(1, 3),
            char(1, 5),
            char(1, 7),
            char(1, 8),
            char(1, 9),
            char(5, 0),
            char(5, 2),
            rule(true, DeviceKind::Char, Some(136), None, "rwm"),
        ]
    }

    /// As `devices.allow` and `devices.deny` take it: "c 1:3 rwm".
    fn v1(&self) -> String {
        let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let kind = match self.kind {
            DeviceKind::All => "a",
            DeviceKind::Char => "c",
            DeviceKind::Block => "b",
        };
        format!(
            "{kind} {}:{} {}",
            number(self.major),
            number(self.minor),
            self.access
        )
    }
}

/// By the devices controller of v1, or by a program where there is none.
pub(super) fn apply(cgroup: &Cgroup, rules: &[DeviceRule]) -> Result<(), Error> {
    match (cgroup.version, cgroup.directory("devices"), &cgroup.unified) {
        (Version::V1, Some(directory), _) => apply_v1(directory, rules),
        (_, _, Some(unified)) => apply_v2(unified, rules),
        (_, _, None) => Err(Error::NoController {
            controller: "devices",
            what: "a list of devices",
        }),
    }
}

fn apply_v1(directory: &Path, rules: &[DeviceRule]) -> Result<(), Error> {
    let [allow, deny] = ["devices.allow", "devices.deny"].map(|name| directory.join(name));
    for rule in rules {
        file::write(if rule.allow { &allow } else { &deny }, &rule.v1())?;
    }
    Ok(())
}

/// Attached again, the same program twice says the same as once.
pub(super) fn apply_v2(directory: &Path, rules: &[DeviceRule]) -> Result<(), Error> {
    let failed = |errno: rustix::io::Errno| Error::Devices {
        path: directory.to_owned(),
        source: errno.into(),
    };
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty()).map_err(failed)?;
    bpf::attach_device_filter(fd.as_fd(), &program(rules)).map_err(failed)
}

/// eBPF that returns 1 for what the rules allow: the last one that fits decides, and what none
/// fits is allowed, as in a v1 cgroup that nothing was written to.
///
/// ```text
/// r2 type, r3 access, r4 major, r5 minor       rule n: does it fit? ──> r0 = allow, exit
///                                                │ no
///                                              rule n-1 ...
/// ```
///
/// Source: struct bpf_cgroup_dev_ctx in linux/bpf.h; opcodes in linux/bpf_common.h.
fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const AND: u8 = 0x57;
    const SHIFT_RIGHT: u8 = 0x77;
    const MOVE: u8 = 0xb7;
    const MOVE_REGISTER: u8 = 0xbf;
    const JUMP_EQ: u8 = 0x15;
    const JUMP_NOT_EQ: u8 = 0x55;
    const EXIT: u8 = 0x95;
    const ACCESS_ALL: i32 = 0b111;

    let op = |code, target: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: target | source << 4,
        offset,
        immediate,
    };
    let mut code = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(MOVE_REGISTER, 3, 2, 0, 0),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(AND, 2, 0, 0, 0xffff),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut steps = Vec::new();
        // A jump here goes behind the rule.
        match rule.kind {
            DeviceKind::All => {}
            DeviceKind::Block => steps.push(op(JUMP_NOT_EQ, 2, 0, 0, 1)),
            DeviceKind::Char => steps.push(op(JUMP_NOT_EQ, 2, 0, 0, 2)),
        }
        let access = rule.access.bytes().fold(0, |all, letter| {
            all | match letter {
                b'm' => 1,
                b'r' => 2,
                b'w' => 4,
                _ => 0,
            }
        });
        if access != ACCESS_ALL {
            steps.push(op(MOVE_REGISTER, 6, 3, 0, 0));
            if rule.allow {
                // Fits if nothing beyond it is wanted.
                steps.push(op(AND, 6, 0, 0, ACCESS_ALL & !access));
                steps.push(op(JUMP_NOT_EQ, 6, 0, 0, 0));
            } else {
                steps.push(op(AND, 6, 0, 0, access));
                steps.push(op(JUMP_EQ, 6, 0, 0, 0));
            }
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                // Device numbers have at most 20 bits, so the sign does not matter.
                steps.push(op(JUMP_NOT_EQ, register, 0, 0, number.cast_signed()));
            }
        }
        steps.push(op(MOVE, 0, 0, 0, i32::from(rule.allow)));
        steps.push(op(EXIT, 0, 0, 0, 0));
        for (behind, step) in (0i16..).zip(steps.iter_mut().rev()) {
            if matches!(step.code, JUMP_EQ | JUMP_NOT_EQ) {
                step.offset = behind;
            }
        }
        let always = steps.len() == 2;
        code.extend(steps);
        if always {
            // The verifier refuses what can never be reached.
            return code;
        }
    }
    code.push(op(MOVE, 0, 0, 0, 1));
    code.push(op(EXIT, 0, 0, 0, 0));
    code
}
