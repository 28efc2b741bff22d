//! The socket under a client, after its HTTP upgrade.

use anyhow::{Context, Result, bail};
use berth_cri_server::wire::websocket::{self, Event, Kind};
use bytes::{Bytes, BytesMut};
use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// The parts of a URL we are given.
#[derive(Clone, Debug)]
pub struct Url {
    pub scheme: String,
    /// ADDRESS:PORT.
    pub host: String,
    pub path: String,
}

impl Url {
    /// # Errors
    /// It is no such URL.
    pub fn parse(text: &str) -> Result<Self> {
        let (scheme, rest) = text
            .split_once("://")
            .with_context(|| format!("{text} is no URL"))?;
        let (host, path) = rest
            .split_once('/')
            .with_context(|| format!("{text} has no path"))?;
        Ok(Self {
            scheme: scheme.to_owned(),
            host: host.to_owned(),
            path: format!("/{path}"),
        })
    }
}

/// The server answered with something else than 101.
#[derive(Debug)]
pub struct Refused {
    pub status: u16,
    pub text: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HTTP {}: {}", self.status, self.text)
    }
}

impl std::error::Error for Refused {}

/// A socket, and what came behind the answer already.
pub struct Socket {
    pub stream: TcpStream,
    pub read: BytesMut,
}

impl Socket {
    /// Sends the request with these headers and takes the answer, which has to be 101.
    ///
    /// # Errors
    /// [`Refused`], or there is no server.
    pub fn upgrade(url: &str, method: &str, headers: &[(&str, &str)]) -> Result<Self> {
        let url = Url::parse(url)?;
        let mut stream =
            TcpStream::connect(&url.host).with_context(|| format!("nobody at {}", url.host))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut request = format!("{method} {} HTTP/1.1\r\nHost: {}\r\n", url.path, url.host);
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("Content-Length: 0\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut read = BytesMut::new();
        let end = loop {
            if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            let mut chunk = [0; 4096];
            let length = stream.read(&mut chunk)?;
            if length == 0 {
                bail!("the server closed before it answered");
            }
            read.extend_from_slice(&chunk[..length]);
        };
        let head = read.split_to(end);
        let head = String::from_utf8_lossy(&head).into_owned();
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status: u16 = status.with_context(|| format!("no HTTP: {head}"))?;
        if status != 101 {
            let mut rest = read.to_vec();
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            // The body may come later; kept open afterwards.
            if rest.is_empty() {
                let mut chunk = [0; 4096];
                let length = stream.read(&mut chunk).unwrap_or(0);
                rest.extend_from_slice(&chunk[..length]);
            }
            let text = head + &String::from_utf8_lossy(&rest);
            return Err(Refused { status, text }.into());
        }
        stream.set_read_timeout(None)?;
        Ok(Self { stream, read })
    }
}

/// Closes a socket so that the other end hears of it at once.
pub fn kill(stream: &TcpStream) {
    // Closed already is as good.
    let _ = stream.shutdown(Shutdown::Both);
}

/// How bytes are packed on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Envelope {
    Plain,
    /// Each write is a masked binary message.
    WebSocket,
}

/// A mask as good as any: the server cannot tell.
pub const MASK: [u8; 4] = [0x5a, 0x00, 0xff, 0x13];

/// A client's frame: the head with the mask, and the content masked.
pub fn masked(kind: Kind, content: &mut [u8]) -> Vec<u8> {
    let mut head = Vec::new();
    websocket::head(&mut head, kind, content.len());
    head[1] |= 0x80;
    head.extend_from_slice(&MASK);
    websocket::unmask(content, MASK, 0);
    head
}

/// Writes parts as one.
///
/// # Errors
/// The socket's.
pub fn send(stream: &mut TcpStream, envelope: Envelope, parts: &[&[u8]]) -> std::io::Result<()> {
    if envelope == Envelope::WebSocket {
        let mut content = parts.concat();
        let head = masked(Kind::Binary, &mut content);
        return write_all(stream, &[&head, &content]);
    }
    write_all(stream, parts)
}

fn write_all(stream: &mut TcpStream, parts: &[&[u8]]) -> std::io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut slices = &mut slices[..];
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let written = stream.write_vectored(slices)?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut slices, written);
    }
    Ok(())
}

/// Reads once, 256 KiB at most; false at the end.
///
/// # Errors
/// The socket's.
pub fn fill(stream: &mut TcpStream, buffer: &mut BytesMut) -> std::io::Result<bool> {
    const MOST: usize = 256 << 10;
    let mut read = Vec::with_capacity(MOST);
    // Unlike std's this needs no memory that was written to before.
    let length = rustix::io::retry_on_intr(|| {
        rustix::io::read(&*stream, rustix::buffer::spare_capacity(&mut read))
    })?;
    if length == 0 {
        return Ok(false);
    }
    if buffer.is_empty() {
        *buffer = Bytes::from(read).into();
    } else {
        buffer.extend_from_slice(&read);
    }
    Ok(true)
}

/// Bytes out of the messages of a tunnel.
pub struct Tunnel {
    pub decoder: websocket::Decoder,
    pub raw: BytesMut,
}

impl Tunnel {
    /// As [`fill`], out of messages.
    ///
    /// # Errors
    /// The socket's, or what comes is no tunnel.
    pub fn fill(&mut self, stream: &mut TcpStream, buffer: &mut BytesMut) -> Result<bool> {
        let before = buffer.len();
        loop {
            match self.decoder.next(&mut self.raw)? {
                Some(Event::Data { bytes, .. }) => buffer.extend_from_slice(&bytes),
                Some(Event::Close) => return Ok(false),
                Some(Event::Ping(_) | Event::Pong) => {}
                None if buffer.len() > before => return Ok(true),
                None => {
                    if !fill(stream, &mut self.raw)? {
                        return Ok(false);
                    }
                }
            }
        }
    }
}
