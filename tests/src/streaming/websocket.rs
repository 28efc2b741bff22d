//! A WebSocket client that speaks Kubernetes' channels.

use super::Event;
use super::events::{self, Events, Sink};
use super::socket::{self, Socket, masked};
use anyhow::Result;
use berth_cri_server::wire::base64_stream;
use berth_cri_server::wire::channels::{self, Protocol, Said};
use berth_cri_server::wire::websocket::{Decoder, Event as Frame, Kind};
use bytes::BytesMut;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The headers of a handshake.
pub fn headers(protocol: &str) -> Vec<(&str, &str)> {
    let mut headers = vec![
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    if !protocol.is_empty() {
        headers.push(("Sec-WebSocket-Protocol", protocol));
    }
    headers
}

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
    out: Mutex<TcpStream>,
    protocol: Protocol,
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Upgrades; what comes on each of `channels` channels.
    ///
    /// # Errors
    /// The server refuses.
    pub fn open(url: &str, protocol: &str, channels: usize) -> Result<(Self, Vec<Events>)> {
        let socket = Socket::upgrade(url, "GET", &headers(protocol))?;
        let reading = socket.stream.try_clone()?;
        let base64 = protocol.contains("base64");
        let shared = Arc::new(Shared {
            out: Mutex::new(socket.stream.try_clone()?),
            socket: socket.stream,
            protocol: Protocol {
                base64,
                close_signal: protocol.starts_with("v5"),
            },
        });
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..channels).map(|_| events::queue()).unzip();
        let reader = shared.clone();
        std::thread::Builder::new()
            .name("websocket-client".into())
            .spawn(move || reader.read(reading, socket.read, &senders))?;
        Ok((Self(Arc::new(Owner(shared))), receivers))
    }

    /// Where bytes for a channel go in.
    pub fn sender(&self, number: u8) -> Sender {
        let shared = self.0.0.clone();
        Sender { shared, number }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn raw(&self, bytes: &[u8]) -> Result<()> {
        use std::io::Write as _;
        Ok(lock(&self.0.0.out).write_all(bytes)?)
    }

    /// Closes the socket without a word.
    pub fn kill(&self) {
        socket::kill(&self.0.0.socket);
    }
}

impl Shared {
    fn read(&self, mut from: TcpStream, mut buffer: BytesMut, channels: &[Sink]) {
        let mut decoder = Decoder::client();
        // The server sends no close signals.
        let protocol = Protocol {
            close_signal: false,
            ..self.protocol
        };
        let mut messages = channels::Decoder::new(protocol);
        let mut code = None;
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Frame::Close)) => {
                    // All of the tests' servers end in good order when they close.
                    code = Some(1000);
                }
                Ok(Some(frame)) => match messages.event(frame) {
                    Ok(Some(Said::Data { channel, bytes })) => {
                        if let Some(events) = channels.get(usize::from(channel)) {
                            events.send(Event::Data(bytes));
                        }
                    }
                    Ok(_) => {}
                    Err(_) => break,
                },
                Ok(None) => match socket::fill(&mut from, &mut buffer) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => break,
                },
                Err(_) => break,
            }
            if code.is_some() {
                break;
            }
        }
        for events in channels {
            events.send(Event::Gone(code));
        }
        // Answers a close with a close of the socket, as clients do.
        socket::kill(&self.socket);
    }
}

/// Where bytes for a channel go in.
#[derive(Clone)]
pub struct Sender {
    shared: Arc<Shared>,
    number: u8,
}

impl Sender {
    /// Sends a message on the channel.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        // As client-go does: messages of 32 KiB.
        for piece in bytes.chunks(32 << 10) {
            let mut content = Vec::with_capacity(piece.len() + 1);
            if self.shared.protocol.base64 {
                content.push(b'0' + self.number);
                content.extend_from_slice(base64_stream::encode(piece).as_bytes());
            } else {
                content.push(self.number);
                content.extend_from_slice(piece);
            }
            self.send(self.shared.protocol.kind(), &mut content)?;
        }
        Ok(())
    }

    /// Ends the channel, in protocols that can.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn close(&self) -> Result<()> {
        if self.shared.protocol.close_signal {
            self.send(Kind::Binary, &mut [channels::CLOSE_SIGNAL, self.number])?;
        }
        Ok(())
    }

    fn send(&self, kind: Kind, content: &mut [u8]) -> Result<()> {
        let head = masked(kind, content);
        let mut out = lock(&self.shared.out);
        socket::send(&mut out, socket::Envelope::Plain, &[&head, content])?;
        Ok(())
    }
}
