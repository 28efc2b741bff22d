//! The sending side of a connection, which all of its streams share, and what is known
//! of its other end.
//!
//! Payload is written by whoever has it, straight from its buffer, one whole frame at a
//! time. Short frames (answers to pings, windows, resets) are collected and go out with
//! the next frame, or by a task that does only this, so that who reads the connection
//! never waits for who writes it.

use super::inbox::{Inbox, Pushed};
use super::splice::Pipe;
use super::transport::Writer;
use super::watch::Watch;
use crate::wire::websocket;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How much may wait in all streams of a connection together, in bytes.
const HELD_BYTES: usize = 16 << 20;

/// How many bytes of short frames may wait. A client that makes us answer more than
/// this without reading is up to no good.
const CONTROL_BYTES: usize = 64 << 10;

/// How often a connection that is not read is looked at for whether its client is there.
const LOOK: Duration = Duration::from_millis(250);

/// How often a WebSocket client hears of us while it is not read, so that it does not
/// miss answers to its pings. Source: client-go gives up after 60 s without a pong.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How long the client has to close its end after we have closed ours.
const LINGER: Duration = Duration::from_secs(2);

/// The connection cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client is gone")]
pub struct Gone;

/// How frames are packed for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// As they are.
    Plain,
    /// They are WebSocket frames already.
    Messages,
    /// Each write becomes a WebSocket message.
    Tunnel,
}

/// What the streams of a connection share.
pub struct Link {
    writer: tokio::sync::Mutex<Sending>,
    control: Mutex<Control>,
    control_waits: Notify,
    envelope: Envelope,
    gone: CancellationToken,
    watch: Watch,
    idle_limit: Duration,
    held: AtomicUsize,
    room: Notify,
    begun: Instant,
    /// When something was last sent or received, in milliseconds since `begun`.
    moved: AtomicU64,
}

struct Sending {
    to: Writer,
    /// A frame was begun and not finished: nothing can follow it.
    torn: bool,
}

/// What comes behind a frame's head.
enum Payload<'a> {
    Here(&'a [u8]),
    /// As many bytes, in a pipe.
    In(&'a Pipe, usize),
}

#[derive(Default)]
struct Control {
    /// WebSocket frames, where WebSocket is the outermost.
    outer: Vec<u8>,
    /// Frames that go into the envelope.
    inner: Vec<u8>,
}

impl Link {
    /// The sending side `to`, of a connection seen by `watch`, which may be idle for
    /// `idle_limit`.
    pub fn new(to: Writer, watch: Watch, envelope: Envelope, idle_limit: Duration) -> Self {
        Self {
            writer: tokio::sync::Mutex::new(Sending { to, torn: false }),
            control: Mutex::default(),
            control_waits: Notify::new(),
            envelope,
            gone: CancellationToken::new(),
            watch,
            idle_limit,
            held: AtomicUsize::new(0),
            room: Notify::new(),
            begun: Instant::now(),
            moved: AtomicU64::new(0),
        }
    }

    /// Cancelled once the connection cannot be used.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Something came.
    pub fn touch(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved.store(now, Ordering::Relaxed);
    }

    /// Returns once nothing was sent or received for as long as may be.
    pub async fn idle(&self) {
        loop {
            let moved = self.begun + Duration::from_millis(self.moved.load(Ordering::Relaxed));
            let until = moved + self.idle_limit;
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until.into()).await;
        }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends short frames soon, in the order of these calls.
    pub fn soon(&self, write: impl FnOnce(&mut Vec<u8>)) {
        self.queue(|control| write(&mut control.inner));
    }

    /// Sends short WebSocket frames soon.
    pub fn soon_outside(&self, write: impl FnOnce(&mut Vec<u8>)) {
        self.queue(|control| write(&mut control.outer));
    }

    fn queue(&self, write: impl FnOnce(&mut Control)) {
        let waiting = {
            let mut control = self.control();
            write(&mut control);
            control.inner.len() + control.outer.len()
        };
        if waiting > CONTROL_BYTES {
            self.gone.cancel();
        }
        self.control_waits.notify_one();
    }

    /// Sends short frames as they come, until the connection is gone.
    pub async fn send_control(&self) {
        loop {
            tokio::select! {
                () = self.control_waits.notified() => {}
                () = self.gone.cancelled() => return,
            }
            if self.send(&[], &[]).await.is_err() {
                return;
            }
        }
    }

    /// Sends a frame. A frame whose sending is broken off is the end of the connection.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&self, head: &[u8], payload: &[u8]) -> Result<(), Gone> {
        self.send_whole(head, Payload::Here(payload)).await
    }

    /// The same with a payload of `length` bytes that are in `pipe`; only where the link
    /// [can do so](Link::can_splice).
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn splice(&self, head: &[u8], pipe: &Pipe, length: usize) -> Result<(), Gone> {
        self.send_whole(head, Payload::In(pipe, length)).await
    }

    /// Whether payload can go out without being looked at.
    pub async fn can_splice(&self) -> bool {
        self.envelope == Envelope::Plain && self.writer.lock().await.to.plain().is_some()
    }

    async fn send_whole(&self, head: &[u8], payload: Payload<'_>) -> Result<(), Gone> {
        let mut sending = tokio::select! {
            biased;
            () = self.gone.cancelled() => return Err(Gone),
            sending = self.writer.lock() => sending,
        };
        if sending.torn {
            self.gone.cancel();
            return Err(Gone);
        }
        let Control { mut outer, inner } = std::mem::take(&mut *self.control());
        let (payload, spliced) = match payload {
            Payload::Here(bytes) => (bytes, None),
            Payload::In(pipe, length) => (&[][..], Some((pipe, length))),
        };
        let length = inner.len() + head.len() + payload.len();
        if outer.is_empty() && length == 0 {
            return Ok(());
        }
        if self.envelope == Envelope::Tunnel && length > 0 {
            websocket::head(&mut outer, websocket::Kind::Binary, length);
        }
        sending.torn = true;
        let mut parts = [&outer[..], &inner, head, payload].map(IoSlice::new);
        let whole = async {
            match (spliced, sending.to.plain()) {
                (None, _) => write_all(&mut sending.to, &mut parts).await,
                (Some((pipe, length)), Some(socket)) => {
                    let head = [&outer[..], &inner, head].concat();
                    pipe.empty(socket, &head, length).await
                }
                (Some(_), None) => Err(std::io::ErrorKind::Unsupported.into()),
            }
        };
        let written = tokio::select! {
            biased;
            () = self.gone.cancelled() => return Err(Gone),
            written = whole => written,
        };
        if let Err(error) = written {
            tracing::debug!(%error, "the client takes no more");
            self.gone.cancel();
            return Err(Gone);
        }
        sending.torn = false;
        self.touch();
        Ok(())
    }

    /// Puts `bytes` into `inbox`; where that is full, waits until somebody has read.
    ///
    /// # Errors
    /// The client has left, though what it sent was not read to the end.
    pub async fn deliver(&self, inbox: &Inbox, bytes: bytes::Bytes) -> Result<Pushed, Gone> {
        let mut heard = Instant::now();
        while inbox.is_full() || self.held.load(Ordering::Relaxed) >= HELD_BYTES {
            tokio::select! {
                () = self.room.notified() => {}
                () = self.gone.cancelled() => return Err(Gone),
                () = tokio::time::sleep(LOOK) => {
                    if self.watch.peer_has_left() {
                        return Err(Gone);
                    }
                    if heard.elapsed() >= HEARTBEAT {
                        heard = Instant::now();
                        self.heartbeat();
                    }
                }
            }
        }
        let pushed = inbox.push(bytes);
        self.held.fetch_add(pushed.kept, Ordering::Relaxed);
        Ok(pushed)
    }

    fn heartbeat(&self) {
        if self.envelope != Envelope::Plain {
            self.soon_outside(|out| websocket::pong(out, &[]));
        }
    }

    /// Bytes have left an inbox.
    pub fn released(&self, bytes: usize) {
        if bytes > 0 {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            self.room.notify_one();
        }
    }

    /// Sends what waits, closes this end and waits a moment for the client to close its
    /// own: a connection closed with unread bytes loses what was sent last.
    pub async fn finish(&self) {
        let sent = tokio::select! {
            sent = self.send(&[], &[]) => sent.is_ok(),
            // A client that takes its time may still take what it was sent.
            () = self.idle() => false,
        };
        if sent {
            let end = async {
                // It fails only where the client has gone already.
                let _ = self.writer.lock().await.to.shutdown().await;
                self.gone.cancelled().await;
            };
            let _ = tokio::time::timeout(LINGER, end).await;
        }
        self.gone.cancel();
    }
}

async fn write_all(to: &mut Writer, mut parts: &mut [IoSlice<'_>]) -> std::io::Result<()> {
    // Removes the empty ones in front.
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        let written = to.write_vectored(parts).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut parts, written);
    }
    to.flush().await
}
