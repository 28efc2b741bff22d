//! Attaching a device filter to a cgroup: on cgroup v2 the only way to say
//! which devices a container may touch.
//!
//! Source: bpf(2); `union bpf_attr` in linux/bpf.h.

use crate::{Result, check};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Filters of parents, and others of the same cgroup, stay in force: all of
/// them have to agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// One eBPF instruction, as the kernel lays it out: opcode, registers (the
/// target in the lower half), jump offset, immediate value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// The start of `union bpf_attr` for BPF_PROG_LOAD; the rest counts as zero.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The same for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Puts a program of the type BPF_PROG_TYPE_CGROUP_DEVICE in force for the
/// cgroup v2 directory `cgroup`, for as long as that exists.
///
/// # Errors
/// EINVAL or EACCES for a program the kernel does not accept, EPERM without
/// CAP_BPF and CAP_NET_ADMIN or CAP_SYS_ADMIN.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, program: &[Instruction]) -> Result<()> {
    let load = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len().try_into().unwrap_or(u32::MAX),
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: `load` and what it points at outlive the call; the lengths are
    // their own. The kernel only reads, and verifies the program.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<Load>(),
        )
    })?;
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else
    // has. It is close-on-exec: BPF descriptors always are.
    let program = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` outlives the call, its size is its own, and both
    // descriptors are open while it runs.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    })
    .map(drop)
}
