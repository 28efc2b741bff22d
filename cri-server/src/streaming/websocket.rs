//! A WebSocket connection that carries Kubernetes' channels, as its server.

use super::inbox::{Broken, Inbox};
use super::link::{Gone, Link};
use super::source::read;
use super::transport::Reader;
use crate::wire::base64_stream;
use crate::wire::channels::{self, Protocol, Said};
use crate::wire::websocket::{self as wire, Decoder, Event};
use bytes::{Bytes, BytesMut};
use std::error::Error;
use std::sync::Arc;
use tokio::net::TcpStream;

/// Longest content of one message.
const MESSAGE_BYTES: usize = 128 << 10;

/// A connection with a fixed number of channels.
#[derive(Clone)]
pub struct WebSocket(Arc<Shared>);

struct Shared {
    link: Link,
    protocol: Protocol,
    /// By number; `None` where nothing is taken from the client.
    inboxes: Vec<Option<Inbox>>,
}

impl WebSocket {
    /// Serves channels over `link` and `from`, of which `buffer` was read already.
    /// `readable` says, by number, which channels the client may send on.
    pub fn serve(
        link: Link,
        from: Reader,
        buffer: BytesMut,
        protocol: Protocol,
        readable: &[bool],
    ) -> Self {
        let inboxes = readable
            .iter()
            .map(|&readable| readable.then(Inbox::default));
        let shared = Arc::new(Shared {
            link,
            protocol,
            inboxes: inboxes.collect(),
        });
        let sending = shared.clone();
        tokio::spawn(async move { sending.link.send_control().await });
        let reading = shared.clone();
        tokio::spawn(async move { reading.read(from, buffer).await });
        Self(shared)
    }

    /// The connection all channels share.
    pub fn link(&self) -> &Link {
        &self.0.link
    }

    /// The channel of that number.
    pub fn channel(&self, number: u8) -> Channel {
        let shared = self.0.clone();
        Channel { shared, number }
    }

    /// Says that this was all, and closes.
    pub async fn finish(&self, code: u16) {
        self.0.link.soon_outside(|out| wire::close(out, code));
        self.0.link.finish().await;
    }
}

impl Shared {
    /// Reads until the client is gone; then every channel is broken off.
    async fn read(&self, mut from: Reader, mut buffer: BytesMut) {
        let outcome = self.take_all(&mut from, &mut buffer).await;
        if let Err(error) = outcome {
            tracing::info!(
                error = &*error,
                "a client's WebSocket connection is refused"
            );
            self.link
                .soon_outside(|out| wire::close(out, wire::CLOSE_PROTOCOL));
            // One attempt: a client that does not read is none.
            let _ =
                tokio::time::timeout(std::time::Duration::from_secs(1), self.link.send(&[], &[]))
                    .await;
        }
        self.link.gone().cancel();
        for inbox in self.inboxes.iter().flatten() {
            self.link.released(inbox.break_off());
        }
    }

    async fn take_all(
        &self,
        from: &mut Reader,
        buffer: &mut BytesMut,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut decoder = Decoder::server();
        let mut channels = channels::Decoder::new(self.protocol);
        loop {
            let Some(event) = decoder.next(buffer)? else {
                let read = tokio::select! {
                    read = read(from, buffer) => read,
                    () = self.link.gone().cancelled() => return Ok(()),
                };
                match read {
                    Ok(0) => return Ok(()),
                    Ok(_) => self.link.touch(),
                    Err(error) => {
                        tracing::debug!(%error, "a streaming connection broke");
                        return Ok(());
                    }
                }
                continue;
            };
            match event {
                Event::Data {
                    first, last, bytes, ..
                } => match channels.part(first, last, bytes)? {
                    Some(Said::Data { channel, bytes }) => {
                        // Others are not there, or only for our output.
                        if let Some(inbox) = self.inbox(channel)
                            && self.link.deliver(inbox, bytes).await.is_err()
                        {
                            return Ok(());
                        }
                    }
                    Some(Said::Close { channel }) => {
                        if let Some(inbox) = self.inbox(channel) {
                            inbox.end();
                        }
                    }
                    None => {}
                },
                Event::Ping(content) => self.link.soon_outside(|out| wire::pong(out, &content)),
                Event::Pong => {}
                Event::Close => {
                    self.link
                        .soon_outside(|out| wire::close(out, wire::CLOSE_NORMAL));
                    let _ = tokio::time::timeout(
                        std::time::Duration::from_secs(1),
                        self.link.send(&[], &[]),
                    )
                    .await;
                    return Ok(());
                }
            }
        }
    }

    fn inbox(&self, channel: u8) -> Option<&Inbox> {
        self.inboxes.get(usize::from(channel))?.as_ref()
    }
}

/// One channel.
pub struct Channel {
    shared: Arc<Shared>,
    number: u8,
}

impl Channel {
    /// What came next; `None` once the client has closed it. Dropping the future loses
    /// nothing.
    ///
    /// # Errors
    /// The client is gone, or may not send here.
    pub async fn read(&self) -> Result<Option<Bytes>, Broken> {
        let inbox = self.shared.inbox(self.number).ok_or(Broken)?;
        let bytes = inbox.read().await?;
        self.shared
            .link
            .released(bytes.as_ref().map_or(0, Bytes::len));
        Ok(bytes)
    }

    /// See [`Inbox::pass`].
    pub fn pass(&self, socket: Option<Arc<TcpStream>>) {
        if let Some(inbox) = self.shared.inbox(self.number) {
            inbox.pass(socket);
        }
    }

    /// Forgets what has come and will come.
    pub fn discard(&self) {
        if let Some(inbox) = self.shared.inbox(self.number) {
            self.shared.link.released(inbox.discard());
        }
    }

    /// Sends bytes; none are a message too. Dropping the future is the end of the
    /// connection.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Gone> {
        let kind = self.shared.protocol.kind();
        let mut head = Vec::with_capacity(wire::MAX_HEAD_BYTES + 1);
        let mut rest = bytes;
        loop {
            let (now, later) = rest.split_at(rest.len().min(MESSAGE_BYTES));
            head.clear();
            if self.shared.protocol.base64 {
                let text = base64_stream::encode(now);
                wire::head(&mut head, kind, 1 + text.len());
                head.push(b'0' + self.number);
                self.shared.link.send(&head, text.as_bytes()).await?;
            } else {
                wire::head(&mut head, kind, 1 + now.len());
                head.push(self.number);
                self.shared.link.send(&head, now).await?;
            }
            rest = later;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.discard();
    }
}
