//! What the monitor's children tell it before they become something else, and
//! how a failed step is put into words.
//!
//! One datagram of a SOCK_SEQPACKET pair per note:
//!
//! ```text
//! 'R'                                            ready: exec comes next
//! 'C' + one descriptor                           the master of the console
//! 'P' pid:i32le                                  the process an OCI runtime made
//! 'F' errno:i32le stage 0 detail                 a step failed
//! ```
//!
//! The socket is close-on-exec: its end after 'R' means that execve succeeded,
//! its end without means that the child died on the way.

use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Longest note: a stage and a path.
const MAX_NOTE: usize = 4096 + 256;

/// Most descriptors with one: stdin, stdout, stderr.
pub const MAX_FDS: usize = 3;

/// A step that could not be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{stage} {detail}")]
pub struct Failed {
    /// The step, as [`proto::Failure::stage`].
    pub stage: String,
    /// The object.
    pub detail: String,
    /// errno, 0 for none.
    pub errno: i32,
}

impl Failed {
    /// A step the kernel refused.
    pub fn new(stage: &str, detail: impl Into<String>, errno: Errno) -> Failed {
        Failed {
            stage: stage.into(),
            detail: detail.into(),
            errno: errno.raw_os_error(),
        }
    }

    /// A request that makes no sense.
    pub fn invalid(stage: &str, detail: impl Into<String>) -> Failed {
        Failed::new(stage, detail, Errno::INVAL)
    }

    /// As the protocol says it.
    pub fn into_proto(self) -> proto::Failure {
        proto::Failure {
            stage: self.stage,
            errno: self.errno,
            detail: self.detail,
            not_found: false,
        }
    }
}

/// Gives an errno the words that make it an error message.
pub trait Step<T> {
    /// `stage` is the step, `detail` its object.
    fn step(self, stage: &str, detail: impl AsRef<[u8]>) -> Result<T, Failed>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, stage: &str, detail: impl AsRef<[u8]>) -> Result<T, Failed> {
        self.map_err(|errno| {
            Failed::new(
                stage,
                String::from_utf8_lossy(detail.as_ref()).into_owned(),
                errno,
            )
        })
    }
}

/// One datagram.
#[derive(Debug)]
pub enum Note {
    /// All is prepared; execve comes next.
    Ready,
    /// The console's master.
    Console(OwnedFd),
    /// What an OCI runtime has made; answered by [`Note::Ready`].
    Process(i32),
    /// Why it goes no further.
    Failed(Failed),
}

/// What [`receive`] found.
#[derive(Debug)]
pub enum Heard {
    /// A note.
    Note(Note),
    /// None for now.
    Nothing,
    /// None will come any more.
    End,
}

/// A connected pair, close-on-exec on both sides.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Sends a note without waiting for room: there is always room for the few
/// that are ever on their way.
///
/// # Errors
/// EPIPE when nobody is there.
pub fn send(socket: impl AsFd, note: &Note) -> Result<(), Errno> {
    let (bytes, fd) = encode(note);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    send_datagram(socket, &bytes, &fds)
}

/// Sends a datagram with at most [`MAX_FDS`] descriptors, without waiting.
///
/// # Errors
/// EPIPE when nobody is there, EAGAIN when nobody reads.
pub fn send_datagram(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
}

fn encode(note: &Note) -> (Vec<u8>, Option<BorrowedFd<'_>>) {
    match note {
        Note::Ready => (b"R".to_vec(), None),
        Note::Console(fd) => (b"C".to_vec(), Some(fd.as_fd())),
        Note::Process(pid) => ([b"P", &pid.to_le_bytes()[..]].concat(), None),
        Note::Failed(failed) => (encode_failed(failed), None),
    }
}

/// The bytes of [`Note::Failed`]; a plain write(2) of them does where seccomp
/// may refuse sendmsg.
pub fn encode_failed(failed: &Failed) -> Vec<u8> {
    let mut bytes = vec![b'F'];
    bytes.extend_from_slice(&failed.errno.to_le_bytes());
    bytes.extend_from_slice(failed.stage.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(failed.detail.as_bytes());
    bytes.truncate(MAX_NOTE);
    bytes
}

/// Reads what [`encode_failed`] made.
pub fn decode_failed(bytes: &[u8]) -> Option<Failed> {
    let [b'F', a, b, c, d, text @ ..] = bytes else {
        return None;
    };
    let mut parts = text.splitn(2, |&byte| byte == 0);
    let mut part = || String::from_utf8_lossy(parts.next().unwrap_or(b"")).into_owned();
    Some(Failed {
        errno: i32::from_le_bytes([*a, *b, *c, *d]),
        stage: part(),
        detail: part(),
    })
}

fn decode(bytes: &[u8], fd: Option<OwnedFd>) -> Option<Note> {
    let note = match (bytes, fd) {
        (b"R", _) => Note::Ready,
        (b"C", Some(fd)) => Note::Console(fd),
        ([b'P', a, b, c, d], _) => Note::Process(i32::from_le_bytes([*a, *b, *c, *d])),
        (bytes, _) if bytes.first() == Some(&b'F') => Note::Failed(decode_failed(bytes)?),
        _ => return None,
    };
    Some(note)
}

/// Takes one note, without waiting. What cannot be read is passed over.
pub fn receive(socket: impl AsFd) -> Heard {
    let socket = socket.as_fd();
    loop {
        match receive_datagram(socket) {
            Datagram::Nothing => return Heard::Nothing,
            Datagram::End => return Heard::End,
            Datagram::Bytes(bytes, fds) => {
                if let Some(note) = decode(&bytes, fds.into_iter().next()) {
                    return Heard::Note(note);
                }
            }
        }
    }
}

/// What [`receive_datagram`] found.
#[derive(Debug)]
pub enum Datagram {
    /// One, with its descriptors.
    Bytes(Vec<u8>, Vec<OwnedFd>),
    /// None for now.
    Nothing,
    /// None will come any more.
    End,
}

/// Takes one datagram, without waiting.
pub fn receive_datagram(socket: impl AsFd) -> Datagram {
    let socket = socket.as_fd();
    let mut bytes = [0; MAX_NOTE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            rustix::net::recvmsg(socket, &mut parts, &mut control, flags)
        };
        let length = match got {
            Ok(message) => message.bytes,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Datagram::Nothing,
            Err(_) => return Datagram::End,
        };
        let mut fds = Vec::new();
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = item {
                fds.extend(some);
            }
        }
        return match length {
            0 => Datagram::End,
            length => Datagram::Bytes(bytes[..length.min(MAX_NOTE)].to_vec(), fds),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_arrive_as_they_were_sent_and_then_the_end() {
        let (a, b) = pair().unwrap();
        let failed = Failed::new("exec", "/foo", Errno::NOENT);
        assert!(matches!(receive(&b), Heard::Nothing));
        send(&a, &Note::Ready).unwrap();
        send(
            &a,
            &Note::Console(rustix::io::fcntl_dupfd_cloexec(&b, 3).unwrap()),
        )
        .unwrap();
        send(&a, &Note::Failed(failed.clone())).unwrap();
        drop(a);
        assert!(matches!(receive(&b), Heard::Note(Note::Ready)));
        assert!(matches!(receive(&b), Heard::Note(Note::Console(_))));
        match receive(&b) {
            Heard::Note(Note::Failed(got)) => assert_eq!(got, failed),
            other => panic!("{other:?}"),
        }
        assert!(matches!(receive(&b), Heard::End));
    }

    #[test]
    fn nonsense_is_passed_over() {
        let (a, b) = pair().unwrap();
        for bytes in [&b"?"[..], b"F", b"F12", b"C", b"N"] {
            rustix::net::send(&a, bytes, SendFlags::empty()).unwrap();
        }
        assert!(matches!(receive(&b), Heard::Nothing));
    }
}
