//! A stream of bytes in both directions, whichever protocol carries it.

use super::inbox::Broken;
use super::link::Gone;
use super::{spdy, websocket};
use bytes::Bytes;
use std::sync::Arc;
use tokio::net::TcpStream;

/// One stream of a client's.
pub enum Channel {
    Spdy(spdy::Stream),
    WebSocket(websocket::Channel),
}

impl Channel {
    /// What came next; `None` at the client's end of it. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The client broke it off, or is gone.
    pub async fn read(&self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Spdy(stream) => stream.read().await,
            Self::WebSocket(channel) => channel.read().await,
        }
    }

    /// Sends bytes. Dropping the future is the end of the connection.
    ///
    /// # Errors
    /// The client takes no more of them.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Gone> {
        match self {
            Self::Spdy(stream) => stream.write(bytes).await,
            Self::WebSocket(channel) => channel.write(bytes).await,
        }
    }

    /// Ends our side, where the protocol can say so.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn close(&self) -> Result<(), Gone> {
        match self {
            Self::Spdy(stream) => stream.close().await,
            Self::WebSocket(_) => Ok(()),
        }
    }

    /// See [`Inbox::pass`](super::inbox::Inbox::pass).
    pub fn pass(&self, socket: Option<Arc<TcpStream>>) {
        match self {
            Self::Spdy(stream) => stream.pass(socket),
            Self::WebSocket(channel) => channel.pass(socket),
        }
    }

    /// Forgets what has come and will come.
    pub fn discard(&self) {
        match self {
            Self::Spdy(stream) => stream.discard(),
            Self::WebSocket(channel) => channel.discard(),
        }
    }
}
