//! Installing a seccomp filter that was compiled elsewhere.
//!
//! Source: seccomp(2); `struct sock_filter` in linux/filter.h.

use crate::{Errno, Result, check};

/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`: hands a descriptor back, which nobody
/// here would take.
const NEW_LISTENER: u32 = 1 << 3;

/// One instruction.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

#[repr(C)]
struct Program {
    len: u16,
    filter: *const Instruction,
}

/// True when [`Filter::install`] would take this: whole instructions, not none, not
/// over BPF_MAXINSNS, and no flag that needs an answer.
pub fn acceptable(filter: &[u8], flags: u32) -> bool {
    !filter.is_empty()
        && filter.len().is_multiple_of(8)
        && filter.len() / 8 <= 4096
        && flags & NEW_LISTENER == 0
}

/// A filter in the kernel's own form, ready to be installed.
pub struct Filter {
    instructions: Vec<Instruction>,
    flags: u32,
}

impl Filter {
    /// Takes an array of `struct sock_filter` in native byte order.
    ///
    /// # Errors
    /// EINVAL for what is not [`acceptable`].
    pub fn new(bytes: &[u8], flags: u32) -> Result<Filter> {
        if !acceptable(bytes, flags) {
            return Err(Errno::INVAL);
        }
        let instructions = bytes
            .chunks_exact(8)
            .map(|c| Instruction {
                code: u16::from_ne_bytes([c[0], c[1]]),
                jt: c[2],
                jf: c[3],
                k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
            })
            .collect();
        Ok(Filter {
            instructions,
            flags,
        })
    }

    /// Puts it in force for this thread, for good. Allocates nothing.
    ///
    /// # Errors
    /// EACCES without CAP_SYS_ADMIN and no_new_privs; EINVAL for a program the
    /// kernel does not accept.
    pub fn install(&self) -> Result<()> {
        let len = u16::try_from(self.instructions.len()).map_err(|_| Errno::INVAL)?;
        let program = Program {
            len,
            filter: self.instructions.as_ptr(),
        };
        // SAFETY: `program` describes the vector's own length and outlives the
        // call; the kernel copies it and checks every instruction. A filter
        // can only make later system calls fail or end this process.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        check(result).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_instructions_and_listeners_are_refused() {
        let allow = [6, 0, 0, 0, 0, 0, 0xff, 0x7f];
        assert!(acceptable(&allow, 0));
        assert!(!acceptable(&allow[..7], 0));
        assert!(!acceptable(&[], 0));
        assert!(!acceptable(&allow, NEW_LISTENER));
        assert!(!acceptable(&vec![0; 8 * 4097], 0));
    }
}
