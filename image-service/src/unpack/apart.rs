//! A layer unpacked by a process of its own, in a cgroup where it does not stand in others' way.
//!
//! ```text
//! daemon                                        writer (the same program, one for each layer)
//!   spawn ────────────────────────────────────>   waits
//!   into its cgroup, or told how to enter
//!   order, descriptors of the empty layer ────>   enters the cgroup, has no thread before
//!   u32 length | bytes of the blob, ... 0 ────>   decompress, hash, write, note the recipe
//!   <──────────────────────────────────────────   summary and diff ID, or the error; ends
//!
//!   <── needs the layers below ── over a second socket ── their view, once they are here ──>
//! ```
//! All but the last goes over one socket. The blob stays compressed on the way: decoders of strangers'
//! data run in the writer, too. A blob whose reader fails has no end mark, and nothing that was
//! made of it counts. The writer ends when the daemon does, whatever it is doing; the daemon
//! returns only when the writer has ended, so that nobody writes any more into what is removed.
//!
//! Threads of the daemon could not do this: on cgroup v2 all threads of a process are in one
//! cgroup as far as `io` and `memory` are concerned.
//! Source: kernel, `cgroup-v2.rst`, "Threads" and "Writeback".

mod said;
mod writer;

use super::{Compression, Summary, UnpackError};
use crate::digest::Digest;
use berth_sys::pidfd::Ended;
use berth_sys::wire::{self, Bounds, FrameReader, Received, WireError};
use rustix::io::Errno;
use said::{Outcome, Said};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
pub use writer::serve;

/// Bytes of the blob sent at once, with their length before them.
const CHUNK_BYTES: usize = 128 << 10;
const LENGTH_BYTES: usize = 4;
/// What an answer may be: a few printable paths and texts of decoders.
const ANSWER: Bounds = Bounds {
    frame_bytes: 256 << 10,
    fds: 0,
};

/// What a writer sends that needs the layers below.
const ASK: &[u8] = b"parents";
const ASKED: Bounds = Bounds {
    frame_bytes: 64,
    fds: 0,
};
/// What it gets: the descriptor of their merged view.
const VIEW: Bounds = Bounds {
    frame_bytes: 64,
    fds: 1,
};

/// Any error of a [`Place`].
pub type PlaceError = Box<dyn Error + Send + Sync>;

/// The cgroup that writers run in.
pub trait Place: fmt::Debug + Send + Sync {
    /// Puts the process `pid` there, which does nothing yet; or gives the files to which it has
    /// to write "0" itself. Blocks.
    ///
    /// # Errors
    /// It cannot be there; it then writes nothing anywhere.
    fn admit(&self, pid: u32) -> Result<Vec<PathBuf>, PlaceError>;
}

/// Why a layer could not be written by a process of its own.
#[derive(Debug, thiserror::Error)]
pub enum ApartError {
    /// The kernel started no process.
    #[error("cannot start the process that writes it")]
    Spawn {
        /// What the kernel said.
        source: io::Error,
    },
    /// It cannot be put into its cgroup.
    #[error("the process that writes it cannot be put into its cgroup")]
    Admit {
        /// Why not.
        source: PlaceError,
    },
    /// It could not enter its cgroup.
    #[error("the process that writes it cannot enter its cgroup by {path}")]
    Enter {
        /// The file of the cgroup.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// It ended before it was done: somebody killed it, or it ran out of memory.
    #[error("the process that writes it {}", ending(.ended))]
    Died {
        /// How.
        ended: Ended,
    },
    /// The socket to it failed.
    #[error("the process that writes it cannot be talked to")]
    Talk {
        /// In what way.
        source: WireError,
    },
    /// It speaks another language.
    #[error("the process that writes it gave no answer that can be understood")]
    Language {
        /// In what way.
        source: serde_json::Error,
    },
    /// What it was handed is not what it needs.
    #[error("the process that writes it was not handed what it needs")]
    Handed,
}

fn ending(ended: &Ended) -> String {
    match ended {
        // What the OOM killer sends, too.
        Ended::Signal(9) => {
            "was killed (signal 9): by somebody, or for lack of memory in its cgroup".to_owned()
        }
        Ended::Signal(signal) => format!("was ended by signal {signal}"),
        Ended::Code(code) => format!("ended with exit code {code}"),
    }
}

/// Starts the processes that write layers.
pub struct Writers {
    /// Held open, so that a writer is of the daemon's version whatever is installed meanwhile.
    program: OwnedFd,
    arguments: Vec<OsString>,
    place: Arc<dyn Place>,
}

impl fmt::Debug for Writers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Writers").field(&self.place).finish()
    }
}

/// What a writer is told.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    /// Files to write "0" to, first of all.
    enter: Vec<PathBuf>,
    compression: Compression,
    diff_id: Digest,
    limit_bytes: Option<u64>,
    below: Below,
}

/// [`super::Parents`], whose descriptor travels beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Below {
    None,
    Unknown,
    Later,
    Merged,
}

/// What is to be unpacked.
pub(crate) struct Layer<'a> {
    pub compression: Compression,
    pub diff_id: &'a Digest,
    pub limit_bytes: Option<u64>,
    /// What is below it.
    pub parents: super::Parents<'a>,
    /// The empty directory that becomes the layer.
    pub root: BorrowedFd<'a>,
    /// Where that is, for errors.
    pub root_path: &'a Path,
    /// The empty file that becomes the recipe.
    pub recipe: BorrowedFd<'a>,
}

impl Writers {
    /// Writers are `program` with `arguments`, which is to call [`serve`] with its standard
    /// input, and run in `place`.
    pub fn new(program: OwnedFd, arguments: Vec<OsString>, place: Arc<dyn Place>) -> Writers {
        Writers {
            program,
            arguments,
            place,
        }
    }

    /// As [`super::unpack`], and the files are noted where the recipe is not exact. `attic` is
    /// an empty directory on the same file system, for what later entries replace. Blocks; the
    /// writer has ended when this returns.
    ///
    /// # Errors
    /// The same as there, with the same words, and `Store` and `Apart`.
    pub(crate) fn unpack(
        &self,
        mut blob: impl Read,
        layer: &Layer<'_>,
        attic: BorrowedFd<'_>,
    ) -> Result<(Summary, Digest), UnpackError> {
        let (writer, enter) = self.start()?;
        let order = Order {
            enter,
            compression: layer.compression,
            diff_id: layer.diff_id.clone(),
            limit_bytes: layer.limit_bytes,
            below: match layer.parents {
                super::Parents::None => Below::None,
                super::Parents::Unknown => Below::Unknown,
                super::Parents::Later(_) => Below::Later,
                super::Parents::Merged(_) => Below::Merged,
            },
        };
        let mut fds = vec![layer.root, attic, layer.recipe];
        let spawn = |source| ApartError::Spawn { source };
        let mut asking = None;
        match layer.parents {
            super::Parents::None | super::Parents::Unknown => {}
            super::Parents::Merged(view) => fds.push(view),
            super::Parents::Later(wait) => {
                let (ours, theirs) = UnixStream::pair().map_err(spawn)?;
                asking = Some((ours, theirs, wait));
            }
        }
        if let Some((_, theirs, _)) = &asking {
            fds.push(theirs.as_fd());
        }
        let order = serde_json::to_vec(&order).map_err(|source| ApartError::Language { source })?;
        if let Err(source) = wire::send_frame(&writer.socket, &order, &fds) {
            return Err(writer.failed(source).into());
        }
        let Some((ours, theirs, wait)) = asking else {
            return outcome(writer, &mut blob, layer);
        };
        drop(theirs);
        // The thread ends with the writer, which is gone whichever way this returns.
        std::thread::scope(|scope| {
            let lending = std::thread::Builder::new()
                .name("layer-parents".into())
                .stack_size(256 << 10)
                .spawn_scoped(scope, || lend(&ours, wait))
                .map_err(spawn)?;
            let outcome = outcome(writer, &mut blob, layer);
            let lent = lending.join().unwrap_or(Ok(()));
            match outcome {
                // The writer knows only that there are none.
                Err(UnpackError::LeansOnParents) => lent.and(Err(UnpackError::LeansOnParents)),
                other => other,
            }
        })
    }

    /// A process in its place, that waits for its order; and by which files it has to enter.
    fn start(&self) -> Result<(Writer, Vec<PathBuf>), ApartError> {
        let spawn = |source| ApartError::Spawn { source };
        let (socket, other) = UnixStream::pair().map_err(spawn)?;
        // Neither a hook between fork and exec nor a shared environment: this is a posix_spawn.
        // The descriptor's number is read before it is closed on exec.
        let child = Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()))
            .arg0("berth-layer-writer")
            .args(&self.arguments)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(other))
            .stdout(Stdio::null())
            .spawn()
            .map_err(spawn)?;
        let writer = Writer { child, socket };
        let enter = self
            .place
            .admit(writer.child.id())
            .map_err(|source| ApartError::Admit { source })?;
        Ok((writer, enter))
    }
}

/// Passes the blob on and takes the answer.
fn outcome(
    writer: Writer,
    blob: &mut impl Read,
    layer: &Layer<'_>,
) -> Result<(Summary, Digest), UnpackError> {
    writer
        .send(blob)
        .map_err(|source| UnpackError::Read { source })?;
    match writer.answer()? {
        Outcome::Done { summary, digest } => Ok((summary, digest)),
        Outcome::Failed(Said::Notes { errno }) => Err(UnpackError::Store {
            action: "read",
            path: layer.root_path.to_owned(),
            source: Errno::from_raw_os_error(errno),
        }),
        Outcome::Failed(said) => Err(said.into()),
    }
}

/// Gives the writer the view of the layers below if it asks for it.
fn lend(socket: &UnixStream, wait: &super::Wait<'_>) -> Result<(), UnpackError> {
    // One that closes, or says what it should not, gets none.
    let Ok(Received::Frame(_)) = FrameReader::new(ASKED).read(socket) else {
        let _ = socket.shutdown(std::net::Shutdown::Both);
        return Ok(());
    };
    let view = wait();
    if let Ok(view) = &view {
        // To one that is gone it does not matter.
        let _ = wire::send_frame(socket, b"view", &[view.as_fd()]);
    }
    let _ = socket.shutdown(std::net::Shutdown::Both);
    view.map(drop)
}

/// A running one; killed and waited for when dropped.
struct Writer {
    child: Child,
    socket: UnixStream,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // One that has ended and was waited for is let be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Writer {
    /// Passes the blob on to its end. That the writer takes no more is no error here: it says
    /// why in its answer.
    ///
    /// # Errors
    /// The reader's own.
    fn send(&self, blob: &mut impl Read) -> io::Result<()> {
        let mut chunk = vec![0; LENGTH_BYTES + CHUNK_BYTES];
        loop {
            let count = match blob.read(&mut chunk[LENGTH_BYTES..]) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            // A chunk's length fits, it is a constant.
            chunk[..LENGTH_BYTES].copy_from_slice(&(count as u32).to_le_bytes());
            let sent = (&self.socket).write_all(&chunk[..LENGTH_BYTES + count]);
            if sent.is_err() || count == 0 {
                return Ok(());
            }
        }
    }

    /// Waits for the answer and the writer's end.
    fn answer(mut self) -> Result<Outcome, ApartError> {
        let received = FrameReader::new(ANSWER).read(&self.socket);
        let frame = match received {
            Ok(Received::Frame(frame)) => frame,
            Ok(Received::Closed | Received::WouldBlock)
            | Err(WireError::Truncated | WireError::Socket(_)) => {
                return Err(self.failed(WireError::Truncated));
            }
            Err(source) => return Err(ApartError::Talk { source }),
        };
        // It has nothing left to do but to end.
        let _ = self.child.wait();
        serde_json::from_slice(&frame.bytes).map_err(|source| ApartError::Language { source })
    }

    /// Why there is no talking to it: how it ended, if it did.
    fn failed(mut self, source: WireError) -> ApartError {
        // Its end of the socket is closed, which it never does while it lives.
        match self.child.wait() {
            Ok(status) => ApartError::Died {
                ended: Ended::from_wait_status(status.into_raw()),
            },
            Err(_) => ApartError::Talk { source },
        }
    }
}

impl From<ApartError> for UnpackError {
    fn from(source: ApartError) -> UnpackError {
        UnpackError::Apart { source }
    }
}
