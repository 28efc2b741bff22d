//! Frames with file descriptors over a unix stream socket: how the daemon and
//! a monitor talk.
//!
//! ```text
//! u32, little endian: length of the body | body
//! ```
//!
//! Descriptors travel as SCM_RIGHTS with the first byte of their frame. The
//! kernel hands them over with the read that takes that byte, and may join
//! them to earlier bytes of the same read; therefore a read here never asks
//! for more than is left of the current header or body.
//!
//! Both directions work on blocking and non-blocking sockets. What a peer can
//! make us hold is bounded: body length and number of descriptors by
//! [`Bounds`], and memory grows with what has arrived, not with what was
//! announced. Descriptors that come are close-on-exec.
//!
//! Source: unix(7), "Ancillary messages"; `SCM_MAX_FD` in linux/socket.h.

use crate::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most descriptors the kernel takes in one message. Source: SCM_MAX_FD.
pub const MAX_FDS: usize = 253;

/// How much of an announced body is made room for at a time, in bytes.
const STEP: usize = 16 << 10;

/// Room for [`MAX_FDS`] descriptors and a second control message's header.
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS)) + 64;

/// What a frame may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of the body.
    pub frame_bytes: usize,
    /// Descriptors, at most [`MAX_FDS`].
    pub fds: usize,
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer announced, or the caller gave, more than the bound.
    #[error("a frame of {bytes} bytes is over the bound of {bound}")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// What is accepted.
        bound: usize,
    },
    /// More descriptors than the bound.
    #[error("a frame has more than {bound} file descriptors")]
    TooManyFds {
        /// What is accepted.
        bound: usize,
    },
    /// The peer closed in the middle of a frame.
    #[error("the connection ended inside a frame")]
    Truncated,
    /// The kernel refused.
    #[error("the socket failed")]
    Socket(#[source] Errno),
}

/// One whole frame.
#[derive(Debug, Default)]
pub struct Frame {
    /// The body.
    pub bytes: Vec<u8>,
    /// The descriptors, in the order they were sent.
    pub fds: Vec<OwnedFd>,
}

/// What [`FrameReader::read`] found.
#[derive(Debug)]
pub enum Received {
    /// A whole frame.
    Frame(Frame),
    /// Nothing more for now (a non-blocking socket).
    WouldBlock,
    /// The peer closed between two frames.
    Closed,
}

/// Puts frames together from what arrives, however it is cut.
#[derive(Debug)]
pub struct FrameReader {
    bounds: Bounds,
    header: [u8; 4],
    header_len: usize,
    frame: Frame,
    body_len: usize,
}

impl FrameReader {
    /// A reader that refuses frames over `bounds`.
    pub fn new(bounds: Bounds) -> FrameReader {
        FrameReader {
            bounds,
            header: [0; 4],
            header_len: 0,
            frame: Frame::default(),
            body_len: 0,
        }
    }

    /// Reads until a frame is whole, nothing is left or the peer is gone.
    ///
    /// # Errors
    /// Any error ends the connection: what comes after it cannot be made sense of.
    pub fn read(&mut self, socket: impl AsFd) -> Result<Received, WireError> {
        let socket = socket.as_fd();
        loop {
            if self.header_len < 4 {
                let mut header = self.header;
                let count = match self.receive(socket, &mut header[self.header_len..])? {
                    Some(0) if self.header_len == 0 && self.frame.fds.is_empty() => {
                        return Ok(Received::Closed);
                    }
                    Some(0) => return Err(WireError::Truncated),
                    Some(count) => count,
                    None => return Ok(Received::WouldBlock),
                };
                self.header = header;
                self.header_len += count;
                if self.header_len < 4 {
                    continue;
                }
                self.body_len = u32::from_le_bytes(self.header) as usize;
                if self.body_len > self.bounds.frame_bytes {
                    return Err(WireError::TooLong {
                        bytes: self.body_len,
                        bound: self.bounds.frame_bytes,
                    });
                }
            }
            let have = self.frame.bytes.len();
            if have == self.body_len {
                self.header_len = 0;
                return Ok(Received::Frame(std::mem::take(&mut self.frame)));
            }
            let mut bytes = std::mem::take(&mut self.frame.bytes);
            bytes.resize(have + STEP.max(have).min(self.body_len - have), 0);
            let got = self.receive(socket, &mut bytes[have..]);
            bytes.truncate(have + got.as_ref().ok().copied().flatten().unwrap_or(0));
            self.frame.bytes = bytes;
            match got? {
                Some(0) => return Err(WireError::Truncated),
                Some(_) => {}
                None => return Ok(Received::WouldBlock),
            }
        }
    }

    /// One recvmsg; `None` when it would block.
    fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        into: &mut [u8],
    ) -> Result<Option<usize>, WireError> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut parts = [IoSliceMut::new(into)];
            match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        let message = match got {
            Ok(message) => message,
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(error) => return Err(WireError::Socket(error)),
        };
        for item in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                self.frame.fds.extend(fds);
            }
        }
        if self.frame.fds.len() > self.bounds.fds || message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::TooManyFds {
                bound: self.bounds.fds,
            });
        }
        Ok(Some(message.bytes))
    }
}

/// Frames on their way out, for a socket that must never block its owner.
#[derive(Debug, Default)]
pub struct FrameWriter {
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl FrameWriter {
    /// A writer with nothing to send.
    pub fn new() -> FrameWriter {
        FrameWriter::default()
    }

    /// Queues a frame; [`FrameWriter::flush`] sends it.
    ///
    /// # Errors
    /// `TooLong` for a body whose length does not fit a header, `TooManyFds`.
    pub fn push(&mut self, body: &[u8], fds: Vec<OwnedFd>) -> Result<(), WireError> {
        let bytes = framed(body, fds.len())?;
        self.queued_bytes += bytes.len();
        self.queue.push_back(Outgoing {
            bytes,
            sent: 0,
            fds,
        });
        Ok(())
    }

    /// Bytes that wait to be sent: what an owner bounds.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// True when everything is sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends what the socket takes; true when nothing is left.
    ///
    /// # Errors
    /// `Socket` when the connection is broken.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<bool, WireError> {
        let socket = socket.as_fd();
        while let Some(next) = self.queue.front_mut() {
            let borrowed: Vec<BorrowedFd<'_>> = next.fds.iter().map(AsFd::as_fd).collect();
            match send_part(socket, &next.bytes[next.sent..], &borrowed) {
                Ok(count) => {
                    // The descriptors went with the first byte.
                    drop(borrowed);
                    next.fds.clear();
                    next.sent += count;
                    self.queued_bytes -= count;
                    if next.sent == next.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(WireError::Socket(error)),
            }
        }
        Ok(true)
    }
}

/// Sends one frame on a blocking socket, whole.
///
/// # Errors
/// `TooLong`, `TooManyFds`, or `Socket` when the connection is broken or (on a
/// non-blocking socket) full.
pub fn send_frame(socket: impl AsFd, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    let bytes = framed(body, fds.len())?;
    let mut sent = 0;
    while sent < bytes.len() {
        let with = if sent == 0 { fds } else { &[] };
        sent += send_part(socket.as_fd(), &bytes[sent..], with).map_err(WireError::Socket)?;
    }
    Ok(())
}

fn framed(body: &[u8], fds: usize) -> Result<Vec<u8>, WireError> {
    let length = u32::try_from(body.len()).map_err(|_| WireError::TooLong {
        bytes: body.len(),
        bound: u32::MAX as usize,
    })?;
    if fds > MAX_FDS {
        return Err(WireError::TooManyFds { bound: MAX_FDS });
    }
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(body);
    Ok(bytes)
}

fn send_part(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> crate::Result<usize> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOMANYREFS);
        }
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    const BOUNDS: Bounds = Bounds {
        frame_bytes: 1 << 20,
        fds: 4,
    };

    fn pair() -> (UnixStream, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    fn file(text: &str) -> OwnedFd {
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(fd);
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    }

    fn content(fd: OwnedFd) -> String {
        let mut text = String::new();
        let mut file = std::fs::File::from(fd);
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    fn frame(reader: &mut FrameReader, socket: &UnixStream) -> Frame {
        match reader.read(socket).unwrap() {
            Received::Frame(frame) => frame,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn descriptors_stay_with_their_own_frame() {
        let (a, b) = pair();
        send_frame(&a, b"none", &[]).unwrap();
        let (one, two) = (file("one"), file("two"));
        send_frame(&a, b"two", &[one.as_fd(), two.as_fd()]).unwrap();
        send_frame(&a, b"", &[]).unwrap();
        let mut reader = FrameReader::new(BOUNDS);
        let first = frame(&mut reader, &b);
        assert_eq!((first.bytes.as_slice(), first.fds.len()), (&b"none"[..], 0));
        let second = frame(&mut reader, &b);
        assert_eq!(second.bytes, b"two");
        let texts: Vec<String> = second.fds.into_iter().map(content).collect();
        assert_eq!(texts, ["one", "two"]);
        assert_eq!(frame(&mut reader, &b).bytes, b"");
        assert!(matches!(reader.read(&b).unwrap(), Received::WouldBlock));
        drop(a);
        assert!(matches!(reader.read(&b).unwrap(), Received::Closed));
    }

    #[test]
    fn a_frame_that_comes_byte_by_byte_is_put_together() {
        let (mut a, b) = pair();
        let mut reader = FrameReader::new(BOUNDS);
        for byte in [5, 0, 0, 0, b'h', b'e', b'l', b'l'] {
            a.write_all(&[byte]).unwrap();
            assert!(matches!(reader.read(&b).unwrap(), Received::WouldBlock));
        }
        a.write_all(b"o").unwrap();
        assert_eq!(frame(&mut reader, &b).bytes, b"hello");
    }

    #[test]
    fn an_oversized_announcement_is_refused_before_its_body() {
        let (mut a, b) = pair();
        a.write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = FrameReader::new(BOUNDS).read(&b).unwrap_err();
        assert!(matches!(error, WireError::TooLong { .. }));
    }

    #[test]
    fn a_connection_that_ends_inside_a_frame_is_an_error() {
        for cut in 1..8 {
            let (mut a, b) = pair();
            a.write_all(&[4, 0, 0, 0, 1, 2, 3, 4][..cut]).unwrap();
            drop(a);
            let error = FrameReader::new(BOUNDS).read(&b).unwrap_err();
            assert!(matches!(error, WireError::Truncated), "cut at {cut}");
        }
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (a, b) = pair();
        let fd = file("x");
        send_frame(&a, b"x", &[fd.as_fd(); 5]).unwrap();
        let error = FrameReader::new(BOUNDS).read(&b).unwrap_err();
        assert!(matches!(error, WireError::TooManyFds { .. }));
        assert!(send_frame(&a, b"x", &[fd.as_fd(); 254]).is_err());
    }

    #[test]
    fn a_writer_never_blocks_and_loses_nothing() {
        let (a, b) = pair();
        a.set_nonblocking(true).unwrap();
        let body = vec![7; 700_000];
        let mut writer = FrameWriter::new();
        let mut reader = FrameReader::new(BOUNDS);
        for _ in 0..3 {
            writer.push(&body, vec![file("f")]).unwrap();
        }
        let mut got = 0;
        while got < 3 {
            let _ = writer.flush(&a).unwrap();
            if let Received::Frame(frame) = reader.read(&b).unwrap() {
                assert_eq!((frame.bytes == body, frame.fds.len()), (true, 1));
                got += 1;
            }
        }
        assert!(writer.is_empty());
        assert_eq!(writer.queued_bytes(), 0);
    }
}
