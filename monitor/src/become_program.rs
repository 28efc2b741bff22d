//! The last steps before a container's program runs, the same for its init
//! and for an exec: who it is, what it may do, what it is.
//!
//! The order is the kernel's: limits while we may still raise them, the
//! bounding set while we have CAP_SETPCAP, the seccomp filter as late as its
//! own needs allow. Between filter and execve there is nothing but capset, two
//! prctls and execve itself.
//!
//! Source: OCI runtime-spec, config.md "process"; capabilities(7);
//! CVE-2024-21626 (working directory outside the root).

use crate::beneath::Root;
use crate::status::{self, Failed, Note, Step};
use berth_proto::monitor_v1::{Owner, Process};
use berth_sys::process::Strings;
use berth_sys::seccomp::Filter;
use berth_sys::{Errno, caps, process};
use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// CAP_SYS_ADMIN's bit.
const SYS_ADMIN: u64 = 1 << 21;

/// PATH where the environment has none. Source: what execvp of musl uses.
const DEFAULT_PATH: &[u8] = b"/usr/local/bin:/bin:/usr/bin";

/// What has to be opened, written or made while the host's /proc is in sight.
pub struct Prepared {
    apparmor: Option<(OwnedFd, Vec<u8>)>,
    selinux: Option<(OwnedFd, Vec<u8>)>,
    filter: Option<Filter>,
    argv: Strings,
    env: Strings,
}

/// Checks the request, sets the OOM score and opens what is written to later.
pub fn prepare(wanted: &Process) -> Result<Prepared, Failed> {
    let this = crate::beneath::proc_dir("/proc/self").step("open", "/proc/self")?;
    set_oom_score(&this, wanted.oom_score_adj.unwrap_or(0))?;
    let open = |path: &str| {
        rustix::fs::openat(&this, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
    };
    let apparmor = match wanted.apparmor_profile.as_str() {
        "" => None,
        name => {
            let file = open("attr/apparmor/exec")
                .or_else(|_| open("attr/exec"))
                .step("set AppArmor profile", name)?;
            Some((file, format!("exec {name}").into_bytes()))
        }
    };
    let selinux = match wanted.selinux_label.as_str() {
        "" => None,
        label => {
            // For the keyring to come; the kernel forgets it at execve.
            write_at(&this, "attr/keycreate", label.as_bytes()).step("label keys", label)?;
            let file = open("attr/exec").step("set SELinux label", label)?;
            Some((file, label.as_bytes().to_vec()))
        }
    };
    let filter = match wanted.seccomp.as_slice() {
        [] => None,
        bytes => Some(Filter::new(bytes, wanted.seccomp_flags).step("seccomp", "the filter")?),
    };
    if wanted.argv.first().is_none_or(Vec::is_empty) {
        return Err(Failed::invalid("exec", "no program is given"));
    }
    let strings = |list: &[Vec<u8>], what: &str| {
        Strings::new(list.to_vec())
            .ok_or_else(|| Failed::invalid("exec", format!("a NUL in the {what}")))
    };
    Ok(Prepared {
        apparmor,
        selinux,
        filter,
        argv: strings(&wanted.argv, "arguments")?,
        env: strings(&wanted.env, "environment")?,
    })
}

/// Writes oom_score_adj; without CAP_SYS_RESOURCE one below the current is not
/// allowed, and then the current one stays.
fn set_oom_score(this: &OwnedFd, score: i32) -> Result<(), Failed> {
    let text = score.to_string();
    match write_at(this, "oom_score_adj", text.as_bytes()) {
        Ok(()) | Err(Errno::ACCESS | Errno::PERM) => Ok(()),
        Err(error) => Err(Failed::new("set oom_score_adj", text, error)),
    }
}

/// Writes a file of procfs or cgroupfs in one go.
pub fn write_at(dir: impl AsFd, path: &str, content: &[u8]) -> Result<(), Errno> {
    let file = rustix::fs::openat(dir, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    write_whole(&file, content)
}

fn write_whole(file: &OwnedFd, content: &[u8]) -> Result<(), Errno> {
    match rustix::io::write(file, content)? {
        count if count == content.len() => Ok(()),
        _ => Err(Errno::IO),
    }
}

/// Joins the cgroup on v1: this process has one thread, so `tasks` moves all of
/// it without the lock over all processes that cgroup.procs takes.
pub fn enter_cgroups(tasks_files: &[String]) -> Result<(), Failed> {
    for path in tasks_files {
        write_at(CWD, path, b"0").step("enter cgroup", path)?;
    }
    Ok(())
}

/// What only the host's own root may do, so before a user namespace is joined:
/// the OOM score, hard limits that are to be higher, owners of the streams.
pub fn before_user_namespace<'a>(
    wanted: &Process,
    streams: impl IntoIterator<Item = &'a OwnedFd>,
) -> Result<(), Failed> {
    let this = crate::beneath::proc_dir("/proc/self").step("open", "/proc/self")?;
    set_oom_score(&this, wanted.oom_score_adj.unwrap_or(0))?;
    for limit in &wanted.rlimits {
        let name = || format!("limit {}", limit.resource);
        let (soft, hard) = process::limit(limit.resource).step("set limit", name())?;
        if hard < limit.hard {
            // Without CAP_SYS_RESOURCE there is no way; `set_limits` does what it can.
            let _ = process::set_limit(limit.resource, soft, limit.hard);
        }
    }
    give_streams(wanted, streams);
    Ok(())
}

/// The user a program is to run as needs to own its streams, so that it can
/// open /dev/stdout again. What is no pipe is left alone.
pub fn give_streams<'a>(wanted: &Process, streams: impl IntoIterator<Item = &'a OwnedFd>) {
    let (uid, gid) = (wanted.uid, wanted.gid);
    let owner = wanted.stream_owner.unwrap_or(Owner { uid, gid });
    give_streams_to(owner, streams);
}

/// The same, to somebody as the host counts.
pub fn give_streams_to<'a>(owner: Owner, streams: impl IntoIterator<Item = &'a OwnedFd>) {
    for stream in streams {
        let is_fifo = rustix::fs::fstat(stream)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
        if is_fifo {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            let _ = rustix::fs::fchown(stream, Some(uid), Some(gid));
        }
    }
}

/// Leaves the session keyring that came from the daemon: keys are not for the
/// processes of a container, and those of one are not for another's.
pub fn own_keyring(container_id: &str) -> Result<(), Failed> {
    let name = format!("_ses.{container_id}");
    match berth_sys::process::join_session_keyring(&name) {
        // Built without keys, or a key of that name belongs to somebody of before.
        Err(Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
        other => other.step("keyctl", name),
    }
}

/// Makes `slave` the controlling terminal and all three streams.
pub fn install_terminal(wanted: &Process, slave: &OwnedFd) -> Result<(), Failed> {
    let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    if wanted.tty_width != 0 || wanted.tty_height != 0 {
        berth_sys::pty::resize(slave, size(wanted.tty_width), size(wanted.tty_height))
            .step("resize terminal", "console")?;
    }
    // The group is devpts' own choice (gid=).
    let _ = rustix::fs::fchown(slave, Some(Uid::from_raw(wanted.uid)), None);
    berth_sys::pty::make_controlling(slave).step("set controlling terminal", "console")?;
    for number in 0..=2 {
        berth_sys::fd::install_stdio(slave, number).step("dup2", "console")?;
    }
    Ok(())
}

/// The very last steps: capabilities, filter, execve. Returns only a failure.
pub type LastSteps<'a> = dyn Fn(&CStr, &Strings, &Strings) -> Failed + 'a;

/// Goes through all that is left and becomes the program. `before_exec` is
/// called when nothing but the filter and execve is to come, with just these: a
/// child of it can become another program in the program's place.
///
/// Returns only a failure, which the caller must send with
/// [`status::encode_failed`] and write(2): the filter may be in force.
pub fn become_program(
    wanted: &Process,
    prepared: &Prepared,
    status: BorrowedFd<'_>,
    before_exec: impl FnOnce(&LastSteps<'_>) -> Result<(), Failed>,
) -> Failed {
    match try_become(wanted, prepared, status, before_exec) {
        Ok(never) => match never {},
        Err(failed) => failed,
    }
}

fn try_become(
    wanted: &Process,
    prepared: &Prepared,
    status: BorrowedFd<'_>,
    before_exec: impl FnOnce(&LastSteps<'_>) -> Result<(), Failed>,
) -> Result<std::convert::Infallible, Failed> {
    set_limits(wanted)?;
    rustix::process::umask(Mode::from_raw_mode(wanted.umask.unwrap_or(0o022) & 0o777));

    caps::bound(wanted.cap_bounding).step("drop capabilities", "bounding set")?;
    caps::keep_over_setuid(true).step("keep capabilities", "")?;
    // As root first: the user may not be allowed to search the way there, yet
    // may work there; over NFS it can be the other way round.
    let cwd = if wanted.cwd.is_empty() {
        "/"
    } else {
        wanted.cwd.as_str()
    };
    let early = change_directory(cwd);
    set_user(wanted)?;
    match early {
        Ok(()) => {}
        Err(Errno::ACCESS | Errno::PERM) => change_directory(cwd).step("chdir", cwd)?,
        Err(error) => return Err(Failed::new("chdir", cwd, error)),
    }
    let inside = process::working_directory().step("chdir", cwd)?;
    if !inside.starts_with(b"/") {
        return Err(Failed::new(
            "chdir",
            format!("{cwd} is outside the container"),
            Errno::PERM,
        ));
    }

    // What this node does not have itself it cannot give: a privileged
    // container gets all there is. The effective set went with user ID 0;
    // CAP_SYS_ADMIN stays in force for as long as the filter needs it.
    let ours = caps::get().step("read capabilities", "")?.permitted;
    let wanted_sets = caps::Sets {
        effective: wanted.cap_effective & ours,
        permitted: wanted.cap_permitted & ours,
        inheritable: wanted.cap_inheritable & ours,
    };
    let program = find_program(wanted)?;
    if wanted.no_new_privs {
        rustix::thread::set_no_new_privs(true).step("set no_new_privs", "")?;
    }
    if let Some((file, label)) = &prepared.apparmor {
        write_whole(file, label).step("set AppArmor profile", &wanted.apparmor_profile)?;
    }
    if let Some((file, label)) = &prepared.selinux {
        write_whole(file, label).step("set SELinux label", &wanted.selinux_label)?;
    }
    let set_caps = || {
        caps::set(wanted_sets).step("set capabilities", "")?;
        caps::ambient(wanted.cap_ambient & wanted_sets.permitted & wanted_sets.inheritable)
            .step("set capabilities", "ambient set")
    };
    let confine = || match &prepared.filter {
        // With no_new_privs anybody may install it, so it comes last.
        Some(filter) if wanted.no_new_privs => {
            set_caps()?;
            filter.install().step("seccomp", "the filter")
        }
        Some(filter) => {
            let with_admin = caps::Sets {
                effective: wanted_sets.effective | SYS_ADMIN,
                permitted: wanted_sets.permitted | SYS_ADMIN,
                ..wanted_sets
            };
            caps::set(with_admin).step("set capabilities", "CAP_SYS_ADMIN for seccomp")?;
            filter.install().step("seccomp", "the filter")?;
            set_caps()
        }
        None => set_caps(),
    };
    let last_steps = |program: &CStr, argv: &Strings, env: &Strings| match confine() {
        Ok(()) => Failed::new(
            "exec",
            String::from_utf8_lossy(program.to_bytes()),
            process::exec(program, argv, env),
        ),
        Err(failed) => failed,
    };
    before_exec(&last_steps)?;
    // Whatever is still open goes with exec; 0 to 2 are the container's.
    berth_sys::fd::close_on_exec_from(3).step("close_range", "")?;
    status::send(status, &Note::Ready).step("report", "ready")?;
    Err(last_steps(&program, &prepared.argv, &prepared.env))
}

/// chdir that follows no magic link, so not /proc/self/fd/N either.
fn change_directory(path: &str) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", flags, Mode::empty())?;
    let dir = Root(root.as_fd()).open(path, flags, ResolveFlags::empty())?;
    rustix::process::fchdir(dir)
}

/// Sets the limits; one that only CAP_SYS_RESOURCE could raise is set as high
/// as it may be.
fn set_limits(wanted: &Process) -> Result<(), Failed> {
    for limit in &wanted.rlimits {
        let name = || format!("limit {}", limit.resource);
        match process::set_limit(limit.resource, limit.soft, limit.hard) {
            Err(Errno::PERM) => {
                let (_, most) = process::limit(limit.resource).step("set limit", name())?;
                let hard = limit.hard.min(most);
                process::set_limit(limit.resource, limit.soft.min(hard), hard)
                    .step("set limit", name())?;
            }
            other => other.step("set limit", name())?,
        }
    }
    Ok(())
}

fn set_user(wanted: &Process) -> Result<(), Failed> {
    let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
    let groups: Vec<Gid> = wanted
        .groups
        .iter()
        .map(|&group| Gid::from_raw(group))
        .collect();
    rustix::thread::set_thread_groups(&groups).step("setgroups", format!("{:?}", wanted.groups))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("setgid", wanted.gid.to_string())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("setuid", wanted.uid.to_string())
}

/// Where `argv[0]` is: itself when it has a slash, else the first in the
/// container's PATH that may be executed.
fn find_program(wanted: &Process) -> Result<CString, Failed> {
    let name = wanted.argv.first().map(Vec::as_slice).unwrap_or_default();
    let text = String::from_utf8_lossy(name);
    let c_string =
        |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Failed::invalid("exec", text.as_ref()));
    if name.contains(&b'/') {
        return c_string(name.to_vec());
    }
    let mut found = Errno::NOENT;
    for candidate in candidates(name, &wanted.env) {
        let candidate = c_string(candidate)?;
        let is_file = rustix::fs::stat(&candidate)
            .map(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        match is_file {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                if error == Errno::ACCESS {
                    found = error;
                }
                continue;
            }
        }
        // Real and effective IDs are the same by now.
        match rustix::fs::accessat(CWD, &candidate, Access::EXEC_OK, AtFlags::empty()) {
            Ok(()) => return Ok(candidate),
            Err(error) => found = error,
        }
    }
    Err(Failed::new(
        "exec",
        format!("{text}: not found in $PATH"),
        found,
    ))
}

/// `name` in each directory of the PATH in `env`; the last PATH counts, as it
/// does for getenv of most programs that build their environment in order.
fn candidates(name: &[u8], env: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(b"PATH="));
    path.unwrap_or(DEFAULT_PATH)
        .split(|&byte| byte == b':')
        .map(|dir| {
            let dir = if dir.is_empty() { b"." } else { dir };
            [dir, b"/", name].concat()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_the_containers() {
        let env = [b"A=b".to_vec(), b"PATH=/a::/b".to_vec()];
        assert_eq!(
            candidates(b"x", &env),
            [b"/a/x".to_vec(), b"./x".to_vec(), b"/b/x".to_vec()]
        );
        assert_eq!(candidates(b"x", &[])[0], b"/usr/local/bin/x");
    }

    #[test]
    fn a_request_without_a_program_or_with_a_nul_is_refused() {
        let process = |argv: &[&[u8]]| Process {
            argv: argv.iter().map(|arg| arg.to_vec()).collect(),
            ..Process::default()
        };
        for argv in [&[][..], &[&b""[..]], &[b"a\0b"]] {
            let failed = prepare(&process(argv)).err().unwrap();
            assert_eq!(failed.stage, "exec");
        }
        assert!(prepare(&process(&[b"a"])).is_ok());
    }
}
