//! A SPDY/3.1 connection as its server.
//!
//! ```text
//! bytes ── Source ── frames ──> inbox of each stream ──> whoever reads the stream
//!                       └──> answers, soon
//! whoever writes a stream ── windows ──> Link ── one frame at a time ──> bytes
//! ```
//!
//! Windows: this end gives each stream [`WINDOW`] and says when it has read half of it.
//! The client's windows are kept to once it has shown that it knows windows at all:
//! the clients of Kubernetes (moby/spdystream) never open theirs, and would otherwise
//! get 64 KiB and no more. What they may send is bounded by not reading on.

use super::inbox::{Broken, INBOX_BYTES, Inbox, Pushed};
use super::link::{Gone, Link};
use super::source::Source;
use super::splice::Pipe;
use crate::wire::headers::Headers;
use crate::wire::spdy::{self, Decoder, Encoder, Frame, INITIAL_WINDOW, Reset};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

/// How much a client may have under way on one stream.
const WINDOW: u32 = INBOX_BYTES as u32;

/// How much it may have under way in all.
const SESSION_WINDOW: u32 = 16 << 20;

/// Streams open at a time. kubectl uses two for each forwarded connection.
const MAX_STREAMS: usize = 2048;

/// Longest payload put into one frame, so that streams take turns.
pub const FRAME_BYTES: usize = 256 << 10;

/// From so much payload on, the rest of a frame may pass by, in bytes.
const SPLICED_BYTES: usize = 16 << 10;

/// A connection that brings so much at once is one to splice from, in bytes.
const BUSY_BYTES: usize = 64 << 10;

/// A connection; its streams come out of [`Opened`].
#[derive(Clone)]
pub struct Spdy(Arc<Shared>);

struct Shared {
    link: Link,
    encoder: Mutex<Encoder>,
    streams: Mutex<Streams>,
    windows: Mutex<Windows>,
    /// The client has opened a window, or said how large they are.
    knows_windows: AtomicBool,
    /// There was a stream whose bytes go on to a socket.
    passes: AtomicBool,
}

/// How payload passes the daemon by.
#[derive(Default)]
struct Splicing {
    pipe: Option<Pipe>,
    /// What comes next may.
    likely: bool,
}

#[derive(Default)]
struct Streams {
    open: HashMap<u32, Arc<Entry>>,
    /// The highest ID so far.
    last: u32,
}

/// What concerns all streams.
struct Windows {
    /// What a new stream of ours may send.
    initial: u32,
    /// What the connection may still send; `None` until the client opens it.
    session: Option<i64>,
    sent: i64,
    /// Bytes read here since the client was told.
    read: u32,
}

struct Entry {
    id: u32,
    headers: Headers,
    inbox: Inbox,
    state: Mutex<EntryState>,
    /// The window was opened, or the stream reset.
    opened: Notify,
}

struct EntryState {
    /// What may still be sent.
    window: i64,
    /// Bytes read here since the client was told.
    read: u32,
    /// The client will send no more.
    remote_ended: bool,
    /// We will send no more.
    local_ended: bool,
    /// Either side broke it off.
    reset: bool,
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Streams that the client opens, in order.
pub type Opened = mpsc::UnboundedReceiver<Stream>;

impl Spdy {
    /// Serves SPDY over `link` and `source`, of which `buffer` was read already.
    pub fn serve(link: Link, source: Source, buffer: BytesMut) -> (Self, Opened) {
        let windows = Windows {
            initial: INITIAL_WINDOW,
            session: None,
            sent: 0,
            read: 0,
        };
        let shared = Arc::new(Shared {
            link,
            encoder: Mutex::default(),
            streams: Mutex::default(),
            windows: Mutex::new(windows),
            knows_windows: AtomicBool::new(false),
            passes: AtomicBool::new(false),
        });
        shared.link.soon(|out| {
            spdy::settings(out, WINDOW, MAX_STREAMS as u32);
            spdy::window_update(out, 0, SESSION_WINDOW - INITIAL_WINDOW);
        });
        // Bounded by MAX_STREAMS: what is not taken from it counts as open.
        let (sender, opened) = mpsc::unbounded_channel();
        let sending = shared.clone();
        tokio::spawn(async move { sending.link.send_control().await });
        let reading = shared.clone();
        tokio::spawn(async move { reading.read(source, buffer, &sender).await });
        (Self(shared), opened)
    }

    /// The connection all streams share.
    pub fn link(&self) -> &Link {
        &self.0.link
    }

    /// Says goodbye and closes. The streams should be closed by then.
    pub async fn finish(&self) {
        let last = lock(&self.0.streams).last;
        self.0.link.soon(|out| spdy::goaway(out, last, 0));
        self.0.link.finish().await;
    }
}

impl Shared {
    /// Reads until the client is gone; then every stream is broken off.
    async fn read(
        self: &Arc<Self>,
        mut source: Source,
        mut buffer: BytesMut,
        opened: &mpsc::UnboundedSender<Stream>,
    ) {
        let mut decoder = Decoder::default();
        let mut splicing = Splicing::default();
        let wrong = loop {
            match decoder.next(&mut buffer) {
                Ok(Some(frame)) => {
                    if self.take(frame, opened).await.is_err() {
                        break None;
                    }
                }
                Ok(None) => {
                    let filled = tokio::select! {
                        filled = self.fill(&mut source, &mut buffer, &mut decoder, &mut splicing) => filled,
                        () = self.link.gone().cancelled() => break None,
                    };
                    match filled {
                        Ok(true) => self.link.touch(),
                        Ok(false) => break None,
                        Err(error) => {
                            tracing::debug!(%error, "a streaming connection broke");
                            break None;
                        }
                    }
                }
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = wrong {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "a client does not speak SPDY/3.1"
            );
            let last = lock(&self.streams).last;
            self.link.soon(|out| spdy::goaway(out, last, 1));
            // One attempt: a client that does not read is none.
            let _ =
                tokio::time::timeout(std::time::Duration::from_secs(1), self.link.send(&[], &[]))
                    .await;
        }
        self.link.gone().cancel();
        let open = std::mem::take(&mut lock(&self.streams).open);
        for entry in open.into_values() {
            self.broken_off(&entry);
        }
    }

    /// Reads what comes next into `buffer`, or past it to where it goes; false at the end.
    async fn fill(
        &self,
        source: &mut Source,
        buffer: &mut BytesMut,
        decoder: &mut Decoder,
        splicing: &mut Splicing,
    ) -> io::Result<bool> {
        let (id, left) = decoder.coming().unwrap_or_default();
        let entry = (left >= SPLICED_BYTES).then(|| self.entry(id)).flatten();
        let to = entry.as_ref().and_then(|entry| entry.inbox.socket());
        if to.is_some() && splicing.pipe.is_none() {
            splicing.pipe = Pipe::new().ok();
        }
        let (Some(from), Some(entry), Some(to), Some(pipe)) =
            (source.plain(), entry, to, &splicing.pipe)
        else {
            // No further than to where payload that can be spliced may begin.
            let short = (left + spdy::HEAD_BYTES).checked_sub(buffer.len());
            if let Some(most) = short.filter(|most| *most > 0 && left < SPLICED_BYTES)
                && std::mem::take(&mut splicing.likely)
            {
                return source.fill_short(buffer, most).await;
            }
            let before = buffer.len();
            let more = source.fill(buffer, &self.link).await?;
            let busy = buffer.len() - before >= BUSY_BYTES;
            splicing.likely =
                busy && source.plain().is_some() && self.passes.load(Ordering::Relaxed);
            return Ok(more);
        };
        let came = pipe.fill(from, left).await?;
        if came == 0 {
            return Ok(false);
        }
        // Up to here, dropping this loses nothing; from here on it does not wait, but for room.
        decoder.passed(came);
        splicing.likely = true;
        let rest = pipe.pour(&to, came)?;
        let through = came - rest.len();
        self.credit(through);
        self.stream_credit(&entry, through);
        if !rest.is_empty() {
            self.keep(&entry, rest).await.map_err(io::Error::other)?;
        }
        Ok(true)
    }

    /// Puts payload into the stream's inbox, or past it.
    async fn keep(&self, entry: &Entry, bytes: Bytes) -> Result<(), Gone> {
        let length = bytes.len();
        let Pushed { kept, through } = self.link.deliver(&entry.inbox, bytes).await?;
        self.credit(length - kept);
        self.stream_credit(entry, through);
        Ok(())
    }

    async fn take(
        self: &Arc<Self>,
        frame: Frame,
        opened: &mpsc::UnboundedSender<Stream>,
    ) -> Result<(), Gone> {
        match frame {
            Frame::Data { id, fin, bytes } => self.data(id, fin, bytes).await?,
            Frame::SynStream {
                id,
                fin,
                unidirectional,
                headers,
            } => {
                self.open(id, fin, unidirectional, headers, opened);
            }
            Frame::Rst { id, .. } => {
                if let Some(entry) = lock(&self.streams).open.remove(&id) {
                    self.broken_off(&entry);
                }
            }
            Frame::Headers { id, fin } | Frame::SynReply { id, fin } => {
                if fin && let Some(entry) = self.entry(id) {
                    self.remote_end(&entry);
                }
            }
            // Pings of ours would be even; there are none.
            Frame::Ping { id } if id % 2 == 1 => self.link.soon(|out| spdy::ping(out, id)),
            Frame::Settings {
                initial_window: Some(window),
            } => self.initial_window(window),
            Frame::WindowUpdate { id, bytes } => self.open_window(id, bytes),
            // After a GOAWAY the client finishes its streams and closes.
            Frame::Ping { .. }
            | Frame::GoAway
            | Frame::Settings {
                initial_window: None,
            } => {}
        }
        Ok(())
    }

    fn entry(&self, id: u32) -> Option<Arc<Entry>> {
        lock(&self.streams).open.get(&id).cloned()
    }

    async fn data(&self, id: u32, fin: bool, bytes: Bytes) -> Result<(), Gone> {
        let length = bytes.len();
        let Some(entry) = self.entry(id) else {
            // Under way when the stream was broken off; or never opened.
            if id > lock(&self.streams).last {
                self.link
                    .soon(|out| spdy::rst(out, id, Reset::InvalidStream));
            }
            self.credit(length);
            return Ok(());
        };
        if length > 0 {
            self.keep(&entry, bytes).await?;
        }
        if fin {
            self.remote_end(&entry);
        }
        Ok(())
    }

    fn open(
        self: &Arc<Self>,
        id: u32,
        fin: bool,
        unidirectional: bool,
        headers: Headers,
        opened: &mpsc::UnboundedSender<Stream>,
    ) {
        let mut streams = lock(&self.streams);
        let refusal = if id.is_multiple_of(2) || id <= streams.last {
            Some(Reset::Protocol)
        } else if streams.open.len() >= MAX_STREAMS {
            Some(Reset::Refused)
        } else {
            None
        };
        streams.last = streams.last.max(id);
        if let Some(reason) = refusal {
            self.link.soon(|out| spdy::rst(out, id, reason));
            return;
        }
        let state = EntryState {
            window: lock(&self.windows).initial.into(),
            read: 0,
            remote_ended: fin,
            local_ended: unidirectional,
            reset: false,
        };
        let entry = Arc::new(Entry {
            id,
            headers,
            inbox: Inbox::default(),
            state: Mutex::new(state),
            opened: Notify::new(),
        });
        if fin {
            entry.inbox.end();
        }
        streams.open.insert(id, entry.clone());
        drop(streams);
        let stream = Stream {
            shared: self.clone(),
            entry,
        };
        // Where nobody takes streams any more, dropping it resets it.
        let _ = opened.send(stream);
    }

    fn remote_end(&self, entry: &Entry) {
        entry.inbox.end();
        let closed = {
            let mut state = lock(&entry.state);
            state.remote_ended = true;
            state.local_ended
        };
        if closed {
            lock(&self.streams).open.remove(&entry.id);
        }
    }

    fn broken_off(&self, entry: &Entry) {
        lock(&entry.state).reset = true;
        self.session_read(entry.inbox.break_off());
        entry.opened.notify_one();
    }

    fn initial_window(&self, window: u32) {
        self.knows_windows.store(true, Ordering::Relaxed);
        let before = std::mem::replace(&mut lock(&self.windows).initial, window);
        let change = i64::from(window) - i64::from(before);
        for entry in lock(&self.streams).open.values() {
            lock(&entry.state).window += change;
            entry.opened.notify_one();
        }
    }

    fn open_window(&self, id: u32, bytes: u32) {
        self.knows_windows.store(true, Ordering::Relaxed);
        if id == 0 {
            let mut windows = lock(&self.windows);
            let session = i64::from(INITIAL_WINDOW) - windows.sent;
            *windows.session.get_or_insert(session) += i64::from(bytes);
            drop(windows);
            for entry in lock(&self.streams).open.values() {
                entry.opened.notify_one();
            }
        } else if let Some(entry) = self.entry(id) {
            lock(&entry.state).window += i64::from(bytes);
            entry.opened.notify_one();
        }
    }

    /// Bytes have left an inbox.
    fn session_read(&self, bytes: usize) {
        self.link.released(bytes);
        self.credit(bytes);
    }

    /// Bytes are not kept here, or no longer: the client may send as many more.
    fn credit(&self, bytes: usize) {
        let mut windows = lock(&self.windows);
        // An inbox holds far less than 4 GiB.
        windows.read = windows.read.saturating_add(bytes as u32);
        if windows.read >= SESSION_WINDOW / 2 {
            let read = std::mem::take(&mut windows.read);
            drop(windows);
            self.link.soon(|out| spdy::window_update(out, 0, read));
        }
    }

    fn stream_read(&self, entry: &Entry, bytes: usize) {
        self.session_read(bytes);
        self.stream_credit(entry, bytes);
    }

    /// The client may send as many more on the stream.
    fn stream_credit(&self, entry: &Entry, bytes: usize) {
        let mut state = lock(&entry.state);
        state.read = state.read.saturating_add(bytes as u32);
        if state.read >= WINDOW / 2 && !state.remote_ended && !state.reset {
            let read = std::mem::take(&mut state.read);
            drop(state);
            self.link
                .soon(|out| spdy::window_update(out, entry.id, read));
        }
    }
}

/// One stream. Dropping one that has not ended on both sides resets it.
pub struct Stream {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
}

impl Stream {
    /// Its number in the connection.
    pub fn id(&self) -> u32 {
        self.entry.id
    }

    /// What the client said of it.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.entry.headers.get(name)
    }

    /// Tells the client that the stream is wanted; it waits for that.
    pub fn accept(&self) {
        let (shared, id) = (&self.shared, self.entry.id);
        shared
            .link
            .soon(|out| lock(&shared.encoder).syn_reply(out, id));
    }

    /// What came next; `None` once the client has ended its side. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// The client has reset the stream, or is gone.
    pub async fn read(&self) -> Result<Option<Bytes>, Broken> {
        let bytes = self.entry.inbox.read().await?;
        if let Some(bytes) = &bytes {
            self.shared.stream_read(&self.entry, bytes.len());
        }
        Ok(bytes)
    }

    /// See [`Inbox::pass`].
    pub fn pass(&self, socket: Option<Arc<TcpStream>>) {
        self.shared.passes.store(true, Ordering::Relaxed);
        self.entry.inbox.pass(socket);
    }

    /// Forgets what has come and will come.
    pub fn discard(&self) {
        self.shared.session_read(self.entry.inbox.discard());
    }

    /// Sends bytes. Dropping the future is the end of the connection.
    ///
    /// # Errors
    /// The client has reset the stream, or is gone; or this side was closed.
    pub async fn write(&self, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let length = self.allowed(bytes.len().min(FRAME_BYTES)).await?;
            let (now, later) = bytes.split_at(length);
            let head = spdy::data_head(self.entry.id, length, false);
            self.shared.link.send(&head, now).await?;
            bytes = later;
        }
        Ok(())
    }

    /// Whether [`Stream::splice`] can be.
    pub async fn can_splice(&self) -> bool {
        self.shared.link.can_splice().await
    }

    /// Sends `bytes` that are in `pipe`. Dropping the future is the end of the connection.
    ///
    /// # Errors
    /// As [`Stream::write`]; some may be left in the pipe then.
    pub async fn splice(&self, pipe: &Pipe, mut bytes: usize) -> Result<(), Gone> {
        while bytes > 0 {
            let length = self.allowed(bytes.min(FRAME_BYTES)).await?;
            let head = spdy::data_head(self.entry.id, length, false);
            self.shared.link.splice(&head, pipe, length).await?;
            bytes -= length;
        }
        Ok(())
    }

    /// Takes up to `wanted` bytes from the windows; waits until there is at least one.
    async fn allowed(&self, wanted: usize) -> Result<usize, Gone> {
        loop {
            let opened = self.entry.opened.notified();
            {
                let mut state = lock(&self.entry.state);
                if state.reset || state.local_ended {
                    return Err(Gone);
                }
                let mut windows = lock(&self.shared.windows);
                // A frame's length is far below 2^63.
                let mut length = wanted as i64;
                if self.shared.knows_windows.load(Ordering::Relaxed) {
                    let session = windows.session.unwrap_or(i64::MAX);
                    length = length.min(state.window).min(session);
                }
                if length > 0 {
                    state.window -= length;
                    windows.sent += length;
                    if let Some(session) = &mut windows.session {
                        *session -= length;
                    }
                    return Ok(length as usize);
                }
            }
            tokio::select! {
                () = opened => {}
                () = self.shared.link.gone().cancelled() => return Err(Gone),
            }
        }
    }

    /// Ends our side; the client may go on sending.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn close(&self) -> Result<(), Gone> {
        let closed = {
            let mut state = lock(&self.entry.state);
            if state.local_ended || state.reset {
                return Ok(());
            }
            state.local_ended = true;
            state.remote_ended
        };
        if closed {
            lock(&self.shared.streams).open.remove(&self.entry.id);
        }
        let head = spdy::data_head(self.entry.id, 0, true);
        self.shared.link.send(&head, &[]).await
    }

    /// Breaks it off.
    pub fn reset(&self, reason: Reset) {
        {
            let mut state = lock(&self.entry.state);
            let ended = state.reset || (state.local_ended && state.remote_ended);
            state.reset = true;
            if ended {
                return;
            }
        }
        let id = self.entry.id;
        lock(&self.shared.streams).open.remove(&id);
        self.shared.session_read(self.entry.inbox.discard());
        self.shared.link.soon(|out| spdy::rst(out, id, reason));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reset(Reset::Cancel);
        // One that ended may still hold what nobody has read.
        self.shared.session_read(self.entry.inbox.discard());
    }
}
