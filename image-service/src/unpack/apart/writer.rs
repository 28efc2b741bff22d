//! The process that writes one layer.

use super::super::{Early, Parents, Summary, Target, UnpackError, recipe, unpack};
use super::said::{Outcome, Said};
use super::{ASK, ApartError, Below, LENGTH_BYTES, Order, VIEW};
use crate::digest::Digest;
use berth_sys::wire::{self, Bounds, FrameReader, Received};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

/// An order: paths of a cgroup in a dozen hierarchies, and four descriptors.
const ORDER: Bounds = Bounds {
    frame_bytes: 256 << 10,
    fds: 4,
};

/// Writes the layer that the daemon at the other end of `socket` orders, and tells it what came
/// of it. To be called before this process has any thread but its first, of which it makes what
/// enters the cgroup. Ends the process when the daemon ends.
///
/// # Errors
/// The daemon cannot be understood, or is gone.
pub fn serve(socket: OwnedFd) -> Result<(), ApartError> {
    let socket = UnixStream::from(socket);
    let talk = |source| ApartError::Talk { source };
    let received = FrameReader::new(ORDER).read(&socket).map_err(talk)?;
    let Received::Frame(frame) = received else {
        // The daemon had second thoughts.
        return Ok(());
    };
    let order: Order =
        serde_json::from_slice(&frame.bytes).map_err(|source| ApartError::Language { source })?;
    let outcome = match obey(&order, frame.fds, &socket) {
        Ok((summary, digest)) => Outcome::Done { summary, digest },
        Err(said) => Outcome::Failed(said),
    };
    let answer = serde_json::to_vec(&outcome).map_err(|source| ApartError::Language { source })?;
    wire::send_frame(&socket, &answer, &[]).map_err(talk)
}

fn obey(order: &Order, fds: Vec<OwnedFd>, socket: &UnixStream) -> Result<(Summary, Digest), Said> {
    for path in &order.enter {
        enter(path).map_err(|errno| Said::Enter {
            path: path.clone(),
            errno: errno.raw_os_error(),
        })?;
    }
    // The daemon must outlive a shortage of memory; a layer is written again.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    end_with_the_daemon(socket).map_err(|error| Said::Read(error.into()))?;
    let mut fds = fds.into_iter();
    let (Some(root), Some(attic), Some(notes)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Said::Handed);
    };
    let beside = fds.next();
    let (mut view, mut asking) = (None, None);
    match (order.below, beside) {
        (Below::None | Below::Unknown, None) => {}
        (Below::Merged, Some(fd)) => view = Some(fd),
        (Below::Later, Some(fd)) => asking = Some(UnixStream::from(fd)),
        _ => return Err(Said::Handed),
    }
    let wait = || ask_for_parents(asking.as_ref());
    let parents = match (order.below, &view) {
        (Below::None, _) => Parents::None,
        (Below::Later, _) => Parents::Later(&wait),
        (Below::Merged, Some(view)) => Parents::Merged(view.as_fd()),
        (Below::Unknown | Below::Merged, _) => Parents::Unknown,
    };
    let unpacked = write(order, socket, &root, &attic, &notes, parents)?;
    let (summary, digest) = &unpacked;
    if !summary.is_exact && *digest == order.diff_id {
        // What an entry wrote and a later one replaced is not there to be checked.
        let noted = fresh(&notes).and_then(|writer| crate::layer::note_files(&root, writer));
        noted.map_err(|errno| Said::Notes {
            errno: errno.raw_os_error(),
        })?;
    }
    Ok(unpacked)
}

fn write(
    order: &Order,
    socket: &UnixStream,
    root: &OwnedFd,
    attic: &OwnedFd,
    notes: &OwnedFd,
    parents: Parents<'_>,
) -> Result<(Summary, Digest), UnpackError> {
    let failed = |action| {
        move |source| UnpackError::Entry {
            action,
            entry: "the layer".into(),
            source,
        }
    };
    let mut count = 0u64;
    // The attic is this layer's alone.
    let mut attic_names = || {
        count += 1;
        count.to_string()
    };
    let early = Early::default();
    let target = Target {
        root: rustix::io::fcntl_dupfd_cloexec(root, 0).map_err(failed("open"))?,
        attic: attic.as_fd(),
        attic_names: &mut attic_names,
        parents,
        early: Some(&early),
        recipe: fresh(notes).map_err(failed("write the recipe of"))?,
    };
    unpack(
        Sent::over(socket),
        order.compression,
        order.diff_id.algorithm(),
        order.limit_bytes,
        target,
    )
}

/// The merged view of the layers below, once the daemon has it. Why it has none, it knows itself.
fn ask_for_parents(asking: Option<&UnixStream>) -> Result<OwnedFd, UnpackError> {
    let socket = asking.ok_or(UnpackError::LeansOnParents)?;
    wire::send_frame(socket, ASK, &[]).map_err(|_| UnpackError::LeansOnParents)?;
    match FrameReader::new(VIEW).read(socket) {
        Ok(Received::Frame(frame)) => frame.fds.into_iter().next(),
        Ok(Received::Closed | Received::WouldBlock) | Err(_) => None,
    }
    .ok_or(UnpackError::LeansOnParents)
}

/// The recipe, from its beginning.
fn fresh(notes: &OwnedFd) -> Result<recipe::Writer, Errno> {
    let open = || {
        let mut file = File::from(notes.try_clone()?);
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        recipe::Writer::new(file)
    };
    open().map_err(|error: io::Error| recipe::errno(&error))
}

/// Moves this process, or its only thread, into the cgroup of that file.
fn enter(path: &Path) -> Result<(), Errno> {
    let open = || File::options().write(true).open(path);
    let written = open().and_then(|mut file| file.write_all(b"0"));
    written.map_err(|error| recipe::errno(&error))
}

/// A thread that waits for nothing else: what is being written must not go on when the next
/// daemon removes it.
fn end_with_the_daemon(socket: &UnixStream) -> io::Result<()> {
    let socket = socket.try_clone()?;
    thread::Builder::new()
        .name("daemon-watch".into())
        .stack_size(64 << 10)
        .spawn(move || {
            loop {
                // Asked for nothing, it says that the other end is closed; also with much unread.
                let mut polled = [PollFd::new(&socket, PollFlags::empty())];
                match rustix::event::poll(&mut polled, None) {
                    Ok(_)
                        if polled[0]
                            .revents()
                            .intersects(PollFlags::HUP | PollFlags::ERR) =>
                    {
                        berth_sys::process::exit(1);
                    }
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(_) => berth_sys::process::exit(1),
                }
            }
        })
        .map(drop)
}

/// The blob, as the daemon passes it on.
struct Sent<'a> {
    socket: &'a UnixStream,
    /// Of the chunk that is being read.
    left: usize,
    ended: bool,
}

impl<'a> Sent<'a> {
    fn over(socket: &'a UnixStream) -> Sent<'a> {
        Sent {
            socket,
            left: 0,
            ended: false,
        }
    }
}

impl Read for Sent<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let cut = || io::Error::new(io::ErrorKind::UnexpectedEof, "the blob was cut");
        if self.left == 0 && !self.ended {
            let mut length = [0; LENGTH_BYTES];
            self.socket.read_exact(&mut length).map_err(|_| cut())?;
            self.left = u32::from_le_bytes(length) as usize;
            self.ended = self.left == 0;
        }
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        let room = buffer.len().min(self.left);
        let count = self.socket.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(cut());
        }
        self.left -= count;
        Ok(count)
    }
}
