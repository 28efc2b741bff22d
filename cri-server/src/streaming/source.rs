//! The receiving side of a connection: bytes as they are, or out of WebSocket messages.

use super::link::Link;
use super::transport::Reader;
use crate::wire::websocket::{self, Event, Kind};
use bytes::{BufMut as _, BytesMut};
use std::io;
use tokio::net::TcpStream;

/// How much is asked for at once, in bytes. Large enough that a copy of gigabytes is
/// bound by the copying, not by waking up.
pub const READ_BYTES: usize = 128 << 10;

/// Below this much free space a new buffer is begun.
const LEAST_BYTES: usize = 32 << 10;

/// Where the frames of a connection come from.
pub enum Source {
    Plain(Reader),
    /// WebSocket messages whose contents are one stream of bytes.
    Tunnel {
        from: Reader,
        decoder: websocket::Decoder,
        raw: BytesMut,
    },
}

impl Source {
    /// Bytes out of the messages that come from `from`, of which `raw` was read already.
    pub fn tunnel(from: Reader, raw: BytesMut) -> Self {
        let decoder = websocket::Decoder::server();
        Self::Tunnel { from, decoder, raw }
    }

    /// The socket, where frames come as they are.
    pub fn plain(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(from) => from.plain(),
            Self::Tunnel { .. } => None,
        }
    }

    /// Adds at most `most` bytes to `buffer`, where frames come as they are; false at the end.
    ///
    /// # Errors
    /// The connection broke; a tunnel.
    pub async fn fill_short(&mut self, buffer: &mut BytesMut, most: usize) -> io::Result<bool> {
        match self {
            Self::Plain(from) => {
                let read = from.read_buf(&mut buffer.limit(most)).await?;
                Ok(read > 0)
            }
            Self::Tunnel { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Adds what has come to `buffer`; false at the end. Answers what WebSocket itself asks.
    ///
    /// # Errors
    /// The connection broke, or what came is no WebSocket.
    pub async fn fill(&mut self, buffer: &mut BytesMut, link: &Link) -> io::Result<bool> {
        match self {
            Self::Plain(from) => read(from, buffer).await.map(|read| read > 0),
            Self::Tunnel { from, decoder, raw } => {
                let before = buffer.len();
                loop {
                    let event = decoder.next(raw).map_err(io::Error::other)?;
                    match event {
                        Some(Event::Data {
                            kind: Kind::Binary,
                            bytes,
                            ..
                        }) => {
                            buffer.extend_from_slice(&bytes);
                        }
                        Some(Event::Data {
                            kind: Kind::Text, ..
                        }) => {
                            return Err(io::Error::other("a text message within a tunnel"));
                        }
                        Some(Event::Ping(content)) => {
                            link.soon_outside(|out| websocket::pong(out, &content));
                        }
                        Some(Event::Pong) => {}
                        Some(Event::Close) => return Ok(false),
                        None if buffer.len() > before => return Ok(true),
                        None => {
                            if read(from, raw).await? == 0 {
                                return Ok(false);
                            }
                            link.touch();
                        }
                    }
                }
            }
        }
    }
}

/// Reads once into the free space of `buffer`; 0 at the end.
pub async fn read(from: &mut Reader, buffer: &mut BytesMut) -> io::Result<usize> {
    if buffer.capacity() - buffer.len() < LEAST_BYTES {
        buffer.reserve(READ_BYTES);
    }
    from.read_buf(buffer).await
}
