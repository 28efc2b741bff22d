//! Capabilities of this thread, as 64-bit sets in the order of
//! linux/capability.h.
//!
//! Source: capabilities(7), capset(2), prctl(2).

use crate::{Errno, Result, check};

/// The three sets capset(2) takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// In force.
    pub effective: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// Kept through exec of a file that inherits them.
    pub inheritable: u64,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3.
const VERSION: u32 = 0x2008_0522;

fn prctl(operation: i32, a: u64, b: u64) -> Result<i32> {
    // SAFETY: the operations used below take integers only.
    let result = unsafe { libc::prctl(operation, a, b, 0_u64, 0_u64) };
    check(result.into()).map(|value| value as i32)
}

/// Every capability the running kernel knows, as a set.
pub fn known() -> u64 {
    let mut set = 0;
    for number in 0..64_u64 {
        if prctl(libc::PR_CAPBSET_READ, number, 0).is_err() {
            break;
        }
        set |= 1 << number;
    }
    set
}

/// This thread's sets.
///
/// # Errors
/// The kernel's (none are known for these arguments).
pub fn get() -> Result<Sets> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 means two of `Data`, which are ours to write to; the
    // kernel writes to the header only for a version it does not know.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    let whole = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    let [low, high] = data;
    Ok(Sets {
        effective: whole(low.effective, high.effective),
        permitted: whole(low.permitted, high.permitted),
        inheritable: whole(low.inheritable, high.inheritable),
    })
}

/// Sets this thread's sets.
///
/// # Errors
/// EPERM where a set would grow beyond what is permitted.
pub fn set(sets: Sets) -> Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 means two of `Data`, which live through the call; the
    // kernel writes to the header only for a version it does not know.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// Drops what is not in `keep` from the bounding set, for good.
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn bound(keep: u64) -> Result<()> {
    for number in 0..64_u64 {
        if keep & (1 << number) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_READ, number, 0) {
            Ok(0) => {}
            Ok(_) => drop(prctl(libc::PR_CAPBSET_DROP, number, 0)?),
            // Beyond the last one.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Replaces the ambient set.
///
/// # Errors
/// EPERM for one that is not permitted and inheritable; EINVAL for an unknown one.
pub fn ambient(set: u64) -> Result<()> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as u64,
        0,
    )?;
    for number in (0..64_u64).filter(|number| set & (1 << number) != 0) {
        prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as u64,
            number,
        )?;
    }
    Ok(())
}

/// Whether permitted capabilities survive leaving user ID 0.
///
/// # Errors
/// EPERM where the secure bits lock it.
pub fn keep_over_setuid(keep: bool) -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, keep.into(), 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_the_old_capabilities_and_not_all_bits() {
        let known = known();
        assert_eq!(known & 0x3f_ffff_ffff, 0x3f_ffff_ffff);
        assert_ne!(known, u64::MAX);
        assert_eq!(get().unwrap().permitted & !known, 0);
    }
}
