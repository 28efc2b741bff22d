//! Making a pod's namespaces.
//!
//! ```text
//! monitor ── fork ──> maker ── clone(user, net, ipc, uts) ──> founder
//!                      │  writes its ID maps, waits for it     │ loopback up, host name, sysctls
//!                      │  opens its namespaces, pins the net   │ (ends)
//!                      │  clone(PID, as the monitor's child) ──────────────> pod init
//!                      └─ sends descriptors and the pod init's pid (ends)
//! ```
//!
//! Two processes, as who is in a new user namespace may neither write its own
//! maps nor pin anything in the host's mount namespace. Pod init exists only
//! where the pod shares its PID namespace: it reaps, in an empty read-only
//! root of its own without capabilities, so that a container which looks at
//! process 1 finds nothing of the host.

use crate::init::{become_root, write_sysctls};
use crate::status::{self, Failed, Heard, Note, Step};
use berth_proto::monitor_v1 as proto;
use berth_sys::clone::{self, Forked, Options, flag};
use berth_sys::mount::{self, attr};
use berth_sys::namespace::{self, Kind};
use berth_sys::{Errno, caps, process, wire};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What the maker sends as the frame's body: pod init's pid (0 for none) and a
/// letter for each descriptor. A frame that begins with 'F' is a failure.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Pod init, a child of the monitor.
    pub init: i32,
    /// What the descriptors are, in order.
    pub kinds: Vec<Kind>,
}

impl Made {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![b'M'];
        bytes.extend_from_slice(&self.init.to_le_bytes());
        bytes.extend(self.kinds.iter().map(|kind| match kind {
            Kind::Net => b'n',
            Kind::Ipc => b'i',
            Kind::Uts => b'h',
            Kind::User => b'u',
            Kind::Pid => b'p',
        }));
        bytes
    }

    /// Reads what the maker sent.
    ///
    /// # Errors
    /// Its failure, or that it makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Made, Failed> {
        let nonsense = || Failed::invalid("make namespaces", "the answer makes no sense");
        match bytes {
            [b'M', a, b, c, d, kinds @ ..] => {
                let kinds = kinds.iter().map(|letter| match letter {
                    b'n' => Some(Kind::Net),
                    b'i' => Some(Kind::Ipc),
                    b'h' => Some(Kind::Uts),
                    b'u' => Some(Kind::User),
                    b'p' => Some(Kind::Pid),
                    _ => None,
                });
                Ok(Made {
                    init: i32::from_le_bytes([*a, *b, *c, *d]),
                    kinds: kinds.collect::<Option<_>>().ok_or_else(nonsense)?,
                })
            }
            _ => Err(status::decode_failed(bytes).ok_or_else(nonsense)?),
        }
    }
}

/// The life of the maker; `answer` goes to the monitor.
pub fn maker(request: &proto::MakeNamespaces, answer: BorrowedFd<'_>) -> i32 {
    process::reset_signals();
    let sent = match make(request) {
        Ok((made, fds)) => {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            wire::send_frame(answer, &made.encode(), &fds)
        }
        Err(failed) => wire::send_frame(answer, &status::encode_failed(&failed), &[]),
    };
    i32::from(sent.is_err())
}

fn make(request: &proto::MakeNamespaces) -> Result<(Made, Vec<OwnedFd>), Failed> {
    let with_user = !request.uid_map.is_empty() || !request.gid_map.is_empty();
    let asked = [
        (with_user, flag::NEWUSER, Kind::User),
        (request.net, flag::NEWNET, Kind::Net),
        (request.ipc, flag::NEWIPC, Kind::Ipc),
        (request.uts, flag::NEWUTS, Kind::Uts),
    ];
    let mut made = Made::default();
    let mut fds = Vec::new();
    let flags = asked
        .iter()
        .filter(|one| one.0)
        .fold(0, |flags, one| flags | one.1);
    if flags != 0 {
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let options = Options {
            namespaces: flags,
            ..Options::default()
        };
        match clone::fork(options).step("clone", "the pod's namespaces")? {
            Forked::Child => {
                let keep = vec![theirs.as_raw_fd()];
                process::child(keep, || founder(request, with_user, &theirs))
            }
            Forked::Parent { pid, .. } => {
                drop(theirs);
                if with_user {
                    write_map(pid, "gid_map", &request.gid_map)?;
                    write_map(pid, "uid_map", &request.uid_map)?;
                }
                status::send(&ours, &Note::Ready).step("report", "maps")?;
                expect_ready(&ours)?;
                for (_, _, kind) in asked.iter().filter(|one| one.0) {
                    fds.push(namespace::open(pid, *kind).step("open namespace", kind.name())?);
                    made.kinds.push(*kind);
                }
                drop(ours);
                let _ = process::wait_for(pid);
            }
        }
    }
    let of = |made: &Made, kind| made.kinds.iter().position(|&made| made == kind);
    if let Some(net) = of(&made, Kind::Net).and_then(|at| fds.get(at))
        && !request.net_pin.is_empty()
    {
        namespace::pin(net, Path::new(&request.net_pin))
            .step("pin the network namespace", &request.net_pin)?;
    }
    if request.pid {
        if let Some(user) = of(&made, Kind::User).and_then(|at| fds.get(at)) {
            namespace::join(user, Kind::User).step("join namespace", "user")?;
            become_root()?;
        }
        let options = Options {
            namespaces: flag::NEWPID,
            sibling: true,
            ..Options::default()
        };
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        match clone::fork(options).step("clone", "pod init")? {
            Forked::Child => process::child(vec![theirs.as_raw_fd()], move || {
                pod_init(theirs, &request.init_label)
            }),
            Forked::Parent { pid, .. } => {
                drop(theirs);
                made.init = pid;
                // No container may see it before it has hidden itself.
                expect_ready(&ours)?;
            }
        }
    }
    Ok((made, fds))
}

fn write_map(pid: i32, name: &str, map: &[proto::IdRange]) -> Result<(), Failed> {
    let mut text = String::new();
    for range in map {
        let _ = writeln!(
            text,
            "{} {} {}",
            range.container_id, range.host_id, range.length
        );
    }
    let path = format!("/proc/{pid}/{name}");
    crate::become_program::write_at(rustix::fs::CWD, &path, text.as_bytes()).step("write map", name)
}

/// The first process in the namespaces; it leaves once they are set up and held.
fn founder(request: &proto::MakeNamespaces, with_user: bool, maker: &OwnedFd) -> i32 {
    let note = match found(request, with_user, maker) {
        Ok(()) => Note::Ready,
        Err(failed) => Note::Failed(failed),
    };
    let _ = status::send(maker, &note);
    // Until the maker lets go, /proc/PID/ns must be there.
    let mut fds = [PollFd::new(maker, PollFlags::RDHUP)];
    let _ = rustix::event::poll(&mut fds, None);
    0
}

fn found(request: &proto::MakeNamespaces, with_user: bool, maker: &OwnedFd) -> Result<(), Failed> {
    expect_ready(maker)?;
    if with_user {
        become_root()?;
    }
    if request.net {
        process::loopback_up().step("bring up", "lo")?;
    }
    if request.uts && !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes())
            .step("set host name", &request.hostname)?;
    }
    write_sysctls(&request.sysctls, request.net, request.ipc, request.uts)
}

/// Waits for the other side's word.
fn expect_ready(socket: &OwnedFd) -> Result<(), Failed> {
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, None);
        match status::receive(socket) {
            Heard::Note(Note::Ready) => return Ok(()),
            Heard::Note(Note::Failed(failed)) => return Err(failed),
            Heard::Note(_) | Heard::Nothing => {}
            Heard::End => return Err(Failed::new("make namespaces", "", Errno::PIPE)),
        }
    }
}

/// Process 1 of a shared PID namespace; `maker` hears when it has hidden itself.
fn pod_init(maker: OwnedFd, label: &str) -> i32 {
    // If the monitor is gone, so is who knows the containers: all of them end.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"berth-pod-init");
    if let Err(failed) = hide(label) {
        let _ = status::send(&maker, &Note::Failed(failed));
        return 1;
    }
    let told = status::send(&maker, &Note::Ready);
    drop(maker);
    if told.is_err() {
        return 1;
    }
    let Ok(signals) = process::signal_fd(&[libc::SIGCHLD]) else {
        return 1;
    };
    loop {
        while process::reap_any().is_some() {}
        let mut fds = [PollFd::new(&signals, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, None);
        let mut seen = [0_u8; 128];
        while rustix::io::read(&signals, &mut seen).is_ok_and(|count| count > 0) {}
    }
}

/// Gives up everything that could be of use to somebody who gets in here.
fn hide(label: &str) -> Result<(), Failed> {
    let confine = match label {
        "" => None,
        _ => {
            let this = crate::beneath::proc_dir("/proc/self").step("open", "/proc/self")?;
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&this, c"attr/current", flags, Mode::empty());
            Some(file.step("set SELinux label", label)?)
        }
    };
    namespace::unshare(flag::NEWNS).step("unshare", "mount namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(c"/", private).step("make mounts private", "/")?;
    let attrs = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
    let empty = mount::new_fs("tmpfs", "tmpfs", "mode=0555,nr_blocks=1,nr_inodes=1", attrs)
        .step("mount tmpfs", "/")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open(c"/", flags, Mode::empty()).step("open", "/")?;
    mount::attach(&empty, old).step("attach rootfs", "/")?;
    rustix::process::fchdir(&empty).step("fchdir", "/")?;
    rustix::process::pivot_root(c".", c".").step("pivot_root", "/")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).step("detach the old root", "/")?;
    rustix::process::chdir(c"/").step("chdir", "/")?;
    // The standard streams are the daemon's.
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("pipe", "")?;
    berth_sys::fd::install_stdio(&read, 0).step("dup2", "0")?;
    berth_sys::fd::install_stdio(&write, 1).step("dup2", "1")?;
    berth_sys::fd::install_stdio(&write, 2).step("dup2", "2")?;
    if let Some(file) = confine {
        // Without execve that is a right of its own, which not every policy gives.
        // Left as it is, this process is out of the containers' reach.
        let _ = rustix::io::write(&file, label.as_bytes());
    }
    caps::bound(0).step("drop capabilities", "bounding set")?;
    rustix::thread::set_no_new_privs(true).step("set no_new_privs", "")?;
    caps::ambient(0).step("drop capabilities", "ambient set")?;
    caps::set(caps::Sets::default()).step("drop capabilities", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_makers_answer_is_read_as_it_was_meant() {
        let made = Made {
            init: 77,
            kinds: vec![Kind::User, Kind::Net, Kind::Ipc, Kind::Uts],
        };
        assert_eq!(Made::decode(&made.encode()).unwrap(), made);
        let failed = Failed::new("clone", "x", Errno::PERM);
        assert_eq!(
            Made::decode(&status::encode_failed(&failed)).unwrap_err(),
            failed
        );
        assert!(Made::decode(b"M12").is_err());
        assert!(Made::decode(b"M\0\0\0\0?").is_err());
        assert!(Made::decode(b"").is_err());
    }
}
