//! A SPDY/3.1 client.

use super::events::{self, Events, Sink};
use super::socket::{self, Envelope, Socket, Tunnel};
use super::{Event, PATIENCE};
use anyhow::{Context, Result, bail};
use berth_cri_server::wire::headers::Headers;
use berth_cri_server::wire::spdy::{self, Decoder, Encoder, Frame};
use berth_cri_server::wire::websocket;
use bytes::BytesMut;
use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Longest payload of one frame.
const FRAME_BYTES: usize = 64 << 10;

/// A connection; it ends with [`Connection::kill`] or when all handles are gone.
#[derive(Clone)]
pub struct Connection(Arc<Owner>);

struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        socket::kill(&self.0.socket);
    }
}

struct Shared {
    socket: TcpStream,
    envelope: Envelope,
    /// What is written with, and the headers' compression.
    out: Mutex<(TcpStream, Encoder)>,
    streams: Mutex<Streams>,
    replied: Condvar,
    next: AtomicU32,
    /// Bytes read that the server is to hear of; `None` for a client without windows.
    window: Option<u32>,
}

#[derive(Default)]
struct Streams {
    open: HashMap<u32, Open>,
    next: u32,
    gone: bool,
    pongs: u32,
}

struct Open {
    replied: Option<bool>,
    events: Sink,
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Upgrades a POST, as kubectl does.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open(url: &str, protocol: &str) -> Result<Self> {
        Self::with_window(url, protocol, None)
    }

    /// A client that says how much may be under way on each stream, and keeps to it that
    /// it hears of no more.
    ///
    /// # Errors
    /// The server refuses.
    pub fn with_window(url: &str, protocol: &str, window: Option<u32>) -> Result<Self> {
        let headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("X-Stream-Protocol-Version", protocol),
        ];
        let socket = Socket::upgrade(url, "POST", &headers)?;
        Self::over(socket, Envelope::Plain, window)
    }

    /// SPDY within WebSocket messages.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open_tunnel(url: &str, protocol: &str) -> Result<Self> {
        let headers = super::websocket::headers(protocol);
        let socket = Socket::upgrade(url, "GET", &headers)?;
        Self::over(socket, Envelope::WebSocket, None)
    }

    fn over(socket: Socket, envelope: Envelope, window: Option<u32>) -> Result<Self> {
        let reading = socket.stream.try_clone()?;
        let shared = Arc::new(Shared {
            envelope,
            out: Mutex::new((socket.stream.try_clone()?, Encoder::default())),
            socket: socket.stream,
            streams: Mutex::default(),
            replied: Condvar::new(),
            next: AtomicU32::new(0),
            window,
        });
        if let Some(window) = window {
            shared.control(|out, _| {
                spdy::settings(out, window, 100);
                spdy::window_update(out, 0, 1 << 20);
            })?;
        }
        let reader = shared.clone();
        let read = socket.read;
        std::thread::Builder::new()
            .name("spdy-client".into())
            .spawn(move || reader.read(reading, read))?;
        Ok(Self(Arc::new(Owner(shared))))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Opens a stream and waits until it is accepted.
    ///
    /// # Errors
    /// It is refused, or the connection is gone.
    pub fn stream(&self, headers: &[(&str, &str)]) -> Result<(Sender, Events)> {
        let (sender, events) = self.begin(headers)?;
        let shared = self.shared();
        let (mut streams, waited) = shared
            .replied
            .wait_timeout_while(lock(&shared.streams), PATIENCE, |streams| {
                !streams.gone
                    && streams
                        .open
                        .get(&sender.id)
                        .is_some_and(|open| open.replied.is_none())
            })
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            bail!("stream {} gets no reply", sender.id);
        }
        match streams
            .open
            .get_mut(&sender.id)
            .and_then(|open| open.replied)
        {
            Some(true) => {}
            _ => bail!("stream {} is refused", sender.id),
        }
        drop(streams);
        Ok((sender, events))
    }

    /// Opens a stream and does not wait.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn begin(&self, headers: &[(&str, &str)]) -> Result<(Sender, Events)> {
        let shared = self.shared();
        let (sender, events) = events::queue();
        let mut out = lock(&shared.out);
        let id = {
            let mut streams = lock(&shared.streams);
            let id = streams.next * 2 + 1;
            streams.next += 1;
            streams.open.insert(
                id,
                Open {
                    replied: None,
                    events: sender,
                },
            );
            id
        };
        let mut bytes = Vec::new();
        let (stream, encoder) = &mut *out;
        encoder.syn_stream(
            &mut bytes,
            id,
            &Headers::new(headers.iter().copied()),
            false,
        );
        socket::send(stream, shared.envelope, &[&bytes]).context("cannot open a stream")?;
        drop(out);
        Ok((
            Sender {
                shared: shared.clone(),
                id,
            },
            events,
        ))
    }

    /// A number no other call gave.
    pub fn fresh(&self) -> u32 {
        self.shared().next.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn raw(&self, bytes: &[u8]) -> Result<()> {
        let shared = self.shared();
        Ok(socket::send(
            &mut lock(&shared.out).0,
            shared.envelope,
            &[bytes],
        )?)
    }

    /// Answers to pings so far.
    pub fn pongs(&self) -> u32 {
        lock(&self.shared().streams).pongs
    }

    /// Whether the server has closed the connection.
    pub fn is_gone(&self) -> bool {
        lock(&self.shared().streams).gone
    }

    /// Closes the socket without a word.
    pub fn kill(&self) {
        socket::kill(&self.shared().socket);
    }
}

impl Shared {
    fn control(&self, write: impl FnOnce(&mut Vec<u8>, &mut Encoder)) -> Result<()> {
        let mut out = lock(&self.out);
        let mut bytes = Vec::new();
        let (stream, encoder) = &mut *out;
        write(&mut bytes, encoder);
        Ok(socket::send(stream, self.envelope, &[&bytes])?)
    }

    fn read(&self, mut from: TcpStream, read: BytesMut) {
        // How it broke does not matter to a test; that it did comes out of the streams.
        let _ = self.take_all(&mut from, read);
        let mut streams = lock(&self.streams);
        streams.gone = true;
        // They stay: who still waits for a reply that has come is to find it.
        let all: Vec<_> = streams
            .open
            .values()
            .map(|open| open.events.clone())
            .collect();
        drop(streams);
        self.replied.notify_all();
        for events in all {
            events.send(Event::Gone(None));
        }
    }

    fn take_all(&self, from: &mut TcpStream, read: BytesMut) -> Result<()> {
        let mut decoder = Decoder::default();
        let (mut buffer, mut tunnel) = match self.envelope {
            Envelope::Plain => (read, None),
            Envelope::WebSocket => {
                let decoder = websocket::Decoder::client();
                (BytesMut::new(), Some(Tunnel { decoder, raw: read }))
            }
        };
        loop {
            let Some(frame) = decoder.next(&mut buffer)? else {
                let more = match &mut tunnel {
                    None => socket::fill(from, &mut buffer)?,
                    Some(tunnel) => tunnel.fill(from, &mut buffer)?,
                };
                if more {
                    continue;
                }
                return Ok(());
            };
            match frame {
                Frame::Data { id, fin, bytes } => {
                    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    self.tell(id, Event::Data(bytes), fin);
                    if self.window.is_some() && length > 0 {
                        self.control(|out, _| {
                            spdy::window_update(out, id, length);
                            spdy::window_update(out, 0, length);
                        })?;
                    }
                }
                Frame::SynReply { id, .. } => self.replied(id, true),
                Frame::Rst { id, .. } => {
                    self.replied(id, false);
                    self.tell(id, Event::Reset, false);
                }
                Frame::Ping { .. } => lock(&self.streams).pongs += 1,
                _ => {}
            }
        }
    }

    fn replied(&self, id: u32, accepted: bool) {
        if let Some(open) = lock(&self.streams).open.get_mut(&id) {
            open.replied.get_or_insert(accepted);
        }
        self.replied.notify_all();
    }

    fn tell(&self, id: u32, event: Event, fin: bool) {
        let events = lock(&self.streams)
            .open
            .get(&id)
            .map(|open| open.events.clone());
        let Some(events) = events else { return };
        if !matches!(&event, Event::Data(bytes) if bytes.is_empty()) {
            events.send(event);
        }
        if fin {
            events.send(Event::End);
            // Kept open: the other direction may go on.
        }
    }
}

/// The sending side of a stream.
#[derive(Clone)]
pub struct Sender {
    shared: Arc<Shared>,
    pub id: u32,
}

impl Sender {
    /// Sends bytes.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(FRAME_BYTES) {
            let head = spdy::data_head(self.id, piece.len(), false);
            let mut out = lock(&self.shared.out);
            socket::send(&mut out.0, self.shared.envelope, &[&head, piece])?;
        }
        Ok(())
    }

    /// Ends this side.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn close(&self) -> Result<()> {
        let head = spdy::data_head(self.id, 0, true);
        Ok(socket::send(
            &mut lock(&self.shared.out).0,
            self.shared.envelope,
            &[&head],
        )?)
    }

    /// Breaks the stream off.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn reset(&self) -> Result<()> {
        lock(&self.shared.streams).open.remove(&self.id);
        self.shared
            .control(|out, _| spdy::rst(out, self.id, spdy::Reset::Cancel))
    }
}
