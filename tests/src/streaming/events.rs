//! From the thread that reads a connection to whoever wants a stream of it.

use super::{Event, PATIENCE};
use anyhow::{Result, bail, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

/// How many pieces may wait for a reader before the connection is read no further.
const QUEUE: usize = 1024;

/// Where what comes on a stream is put.
#[derive(Clone)]
pub struct Sink {
    events: SyncSender<Event>,
    left: Arc<AtomicI64>,
}

/// Where it is taken from.
pub struct Events {
    events: Receiver<Event>,
    /// Bytes that are only counted, see [`Events::count`].
    left: Arc<AtomicI64>,
}

pub fn queue() -> (Sink, Events) {
    let (sender, events) = mpsc::sync_channel(QUEUE);
    let left = Arc::<AtomicI64>::default();
    let sink = Sink {
        events: sender,
        left: left.clone(),
    };
    (sink, Events { events, left })
}

impl Sink {
    /// A reader that is gone does not care.
    pub fn send(&self, event: Event) {
        if let Event::Data(bytes) = &event
            && self.left.load(Ordering::Relaxed) > 0
        {
            if counted(&self.left, bytes.len()) > 0 {
                return;
            }
            let _ = self.events.send(Event::Counted);
            return;
        }
        let _ = self.events.send(event);
    }
}

/// What is left after `bytes`.
fn counted(left: &AtomicI64, bytes: usize) -> i64 {
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    left.fetch_sub(bytes, Ordering::Relaxed) - bytes
}

impl Events {
    /// # Errors
    /// Nothing comes in time, or nothing will.
    pub fn recv_timeout(&self, limit: Duration) -> Result<Event, RecvTimeoutError> {
        self.events.recv_timeout(limit)
    }

    /// Waits for as many bytes and looks at none: the thread that reads the connection counts
    /// them, so that a reader costs as little as it can.
    ///
    /// # Errors
    /// More come with the last of them, or the stream breaks.
    pub fn count(&self, bytes: usize) -> Result<()> {
        if bytes > 0 {
            self.left.store(i64::try_from(bytes)?, Ordering::Relaxed);
            loop {
                match self.events.recv_timeout(PATIENCE)? {
                    Event::Data(piece) if counted(&self.left, piece.len()) > 0 => {}
                    Event::Data(_) | Event::Counted => break,
                    other => bail!("{other:?} before all has come"),
                }
            }
        }
        let left = self.left.swap(0, Ordering::Relaxed);
        ensure!(left == 0, "{} bytes too many", -left);
        Ok(())
    }
}
