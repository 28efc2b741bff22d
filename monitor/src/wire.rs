//! One client's connection: requests in, replies out, nothing that can block
//! or grow without bound.

use berth_proto::monitor_v1 as proto;
use berth_sys::wire::{Bounds, FrameReader, FrameWriter, Received, WireError};
use prost::Message as _;
use std::os::fd::{AsFd, OwnedFd};

/// Bytes of replies a client may leave unread before it is dropped: some
/// thousands of Exited events, or one State of a full pod.
const MAX_QUEUED_BYTES: usize = 4 << 20;

/// Why a connection is dropped.
#[derive(Debug, thiserror::Error)]
pub enum Dropped {
    /// The frame or the socket.
    #[error("the connection failed")]
    Wire(#[from] WireError),
    /// The body is no Request.
    #[error("a frame holds no request")]
    Decode(#[from] prost::DecodeError),
    /// It does not read its replies.
    #[error("the client does not read")]
    Slow,
    /// It hung up.
    #[error("the client closed the connection")]
    Closed,
}

/// A request and what came with it.
pub struct Incoming {
    /// The request.
    pub request: proto::Request,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// One client.
pub struct Connection {
    socket: OwnedFd,
    reader: FrameReader,
    writer: FrameWriter,
    /// It asked for Exited events.
    pub events: bool,
}

impl Connection {
    /// Takes over a non-blocking socket.
    pub fn new(socket: OwnedFd) -> Connection {
        let bounds = Bounds {
            frame_bytes: proto::MAX_FRAME_BYTES,
            fds: proto::MAX_FDS,
        };
        Connection {
            socket,
            reader: FrameReader::new(bounds),
            writer: FrameWriter::new(),
            events: false,
        }
    }

    /// The socket, to wait on.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The next whole request; `None` when there is none for now.
    ///
    /// # Errors
    /// Why the connection is of no more use.
    pub fn next(&mut self) -> Result<Option<Incoming>, Dropped> {
        match self.reader.read(&self.socket)? {
            Received::Frame(frame) => {
                let request = proto::Request::decode(frame.bytes.as_slice())?;
                Ok(Some(Incoming {
                    request,
                    fds: frame.fds,
                }))
            }
            Received::WouldBlock => Ok(None),
            Received::Closed => Err(Dropped::Closed),
        }
    }

    /// Queues a reply and sends what the socket takes.
    ///
    /// # Errors
    /// Why the connection is of no more use.
    pub fn send(&mut self, reply: &proto::Reply, fds: Vec<OwnedFd>) -> Result<(), Dropped> {
        self.writer.push(&reply.encode_to_vec(), fds)?;
        self.flush()?;
        if self.writer.queued_bytes() > MAX_QUEUED_BYTES {
            return Err(Dropped::Slow);
        }
        Ok(())
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// `Wire` when it is broken.
    pub fn flush(&mut self) -> Result<(), Dropped> {
        self.writer.flush(self.socket.as_fd())?;
        Ok(())
    }

    /// True while replies wait for room.
    pub fn is_waiting(&self) -> bool {
        !self.writer.is_empty()
    }
}
