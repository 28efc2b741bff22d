//! WebSocket frames, as a server reads and writes them.
//!
//! Payload is unmasked in place and handed on as it comes; no message is collected, so
//! the length of a message costs nothing. Extensions are not negotiated.
//!
//! Source: RFC 6455, 5.

use bytes::{Buf as _, Bytes, BytesMut};

/// Longest payload of a control frame. Source: RFC 6455, 5.5.
pub const MAX_CONTROL_BYTES: usize = 125;

/// Longest head of a frame that a server sends (it does not mask).
pub const MAX_HEAD_BYTES: usize = 10;

/// The end was orderly.
pub const CLOSE_NORMAL: u16 = 1000;
/// This end is going away.
pub const CLOSE_GOING_AWAY: u16 = 1001;
/// What came was not as the protocol says.
pub const CLOSE_PROTOCOL: u16 = 1002;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// What is in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Binary,
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A part of a message; `first` and `last` parts are marked, and may be empty.
    Data {
        kind: Kind,
        first: bool,
        last: bool,
        bytes: Bytes,
    },
    /// To be answered with a pong of the same content.
    Ping(Bytes),
    Pong,
    /// The peer sends no more.
    Close,
}

/// Why a connection's bytes are refused. There is no way to go on after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WebSocketError {
    #[error("a frame from a client that is not masked, or from a server that is")]
    Masking,
    #[error("a frame with bits of an extension that was not agreed on")]
    Reserved,
    #[error("a frame of the unknown kind {0}")]
    Opcode(u8),
    #[error("a control frame in parts, or longer than {MAX_CONTROL_BYTES} bytes")]
    Control,
    #[error("a message begins within another, or goes on that has not begun")]
    Order,
    #[error("a frame of a length that is no number of bytes")]
    Length,
}

/// Turns bytes into messages.
pub struct Decoder {
    masked: bool,
    /// The message whose next frame has to come.
    message: Option<Kind>,
    frame: Option<Payload>,
}

/// The rest of a frame.
struct Payload {
    kind: Kind,
    first: bool,
    /// The frame ends its message.
    last: bool,
    left: u64,
    mask: [u8; 4],
    at: usize,
}

impl Decoder {
    /// What a server reads: frames are masked.
    pub fn server() -> Self {
        Self {
            masked: true,
            message: None,
            frame: None,
        }
    }

    /// What a client reads.
    pub fn client() -> Self {
        Self {
            masked: false,
            message: None,
            frame: None,
        }
    }

    /// Takes what comes next out of `buffer`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// See [`WebSocketError`]; the connection cannot go on.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, WebSocketError> {
        loop {
            if let Some(frame) = &mut self.frame {
                if buffer.is_empty() && frame.left > 0 {
                    return Ok(None);
                }
                let length = usize::try_from(frame.left)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                let mut bytes = buffer.split_to(length);
                if self.masked {
                    unmask(&mut bytes, frame.mask, frame.at);
                }
                frame.at = (frame.at + length) % 4;
                frame.left -= length as u64;
                let whole = frame.left == 0;
                let event = Event::Data {
                    kind: frame.kind,
                    first: std::mem::take(&mut frame.first),
                    last: whole && frame.last,
                    bytes: bytes.freeze(),
                };
                if whole {
                    self.frame = None;
                }
                return Ok(Some(event));
            }
            let Some(head) = Head::parse(buffer, self.masked)? else {
                return Ok(None);
            };
            if head.opcode >= CLOSE {
                // At most 125 bytes, so that much may wait in the buffer.
                let length = usize::try_from(head.length).unwrap_or(usize::MAX);
                if buffer.len() < head.bytes + length {
                    return Ok(None);
                }
                buffer.advance(head.bytes);
                let mut content = buffer.split_to(length);
                unmask(&mut content, head.mask, 0);
                return Ok(Some(match head.opcode {
                    CLOSE => Event::Close,
                    PING => Event::Ping(content.freeze()),
                    _ => Event::Pong,
                }));
            }
            let (kind, first) = match (head.opcode, self.message) {
                (CONTINUATION, Some(kind)) => (kind, false),
                (TEXT, None) => (Kind::Text, true),
                (BINARY, None) => (Kind::Binary, true),
                _ => return Err(WebSocketError::Order),
            };
            buffer.advance(head.bytes);
            self.message = (!head.fin).then_some(kind);
            let (last, left, mask) = (head.fin, head.length, head.mask);
            self.frame = Some(Payload {
                kind,
                first,
                last,
                left,
                mask,
                at: 0,
            });
        }
    }
}

struct Head {
    fin: bool,
    opcode: u8,
    length: u64,
    mask: [u8; 4],
    /// Its own length.
    bytes: usize,
}

impl Head {
    fn parse(buffer: &[u8], masked: bool) -> Result<Option<Self>, WebSocketError> {
        let &[first, second, ref rest @ ..] = buffer else {
            return Ok(None);
        };
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        if first & 0x70 != 0 {
            return Err(WebSocketError::Reserved);
        }
        if !matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG) {
            return Err(WebSocketError::Opcode(opcode));
        }
        if (second & 0x80 != 0) != masked {
            return Err(WebSocketError::Masking);
        }
        let short = second & 0x7f;
        if opcode >= CLOSE && (!fin || short > 125) {
            return Err(WebSocketError::Control);
        }
        let (length, after) = match short {
            126 => match rest.split_first_chunk() {
                Some((bytes, after)) => (u16::from_be_bytes(*bytes).into(), after),
                None => return Ok(None),
            },
            127 => match rest.split_first_chunk() {
                Some((bytes, after)) => (u64::from_be_bytes(*bytes), after),
                None => return Ok(None),
            },
            short => (short.into(), rest),
        };
        if length > i64::MAX as u64 {
            return Err(WebSocketError::Length);
        }
        let (mask, after) = match (masked, after.split_first_chunk()) {
            (false, _) => ([0; 4], after),
            (true, Some((mask, after))) => (*mask, after),
            (true, None) => return Ok(None),
        };
        let bytes = buffer.len() - after.len();
        Ok(Some(Self {
            fin,
            opcode,
            length,
            mask,
            bytes,
        }))
    }
}

/// XORs with the mask, whose byte `at` is the first to be used. Masking is the same.
pub fn unmask(bytes: &mut [u8], mask: [u8; 4], at: usize) {
    let mut turned = mask;
    turned.rotate_left(at % 4);
    let word = u64::from_ne_bytes([
        turned[0], turned[1], turned[2], turned[3], turned[0], turned[1], turned[2], turned[3],
    ]);
    let mut words = bytes.chunks_exact_mut(8);
    for chunk in &mut words {
        let mut eight = [0; 8];
        eight.copy_from_slice(chunk);
        chunk.copy_from_slice(&(u64::from_ne_bytes(eight) ^ word).to_ne_bytes());
    }
    for (byte, mask) in words.into_remainder().iter_mut().zip(turned.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The head of a frame that is a whole message of `length` bytes, appended to `out`.
pub fn head(out: &mut Vec<u8>, kind: Kind, length: usize) {
    let opcode = match kind {
        Kind::Text => TEXT,
        Kind::Binary => BINARY,
    };
    out.push(0x80 | opcode);
    match length {
        0..=125 => out.push(length as u8),
        126..=0xffff => {
            out.push(126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// Answers a ping; without content it is a sign of life of its own.
pub fn pong(out: &mut Vec<u8>, content: &[u8]) {
    let content = &content[..content.len().min(MAX_CONTROL_BYTES)];
    out.extend_from_slice(&[0x80 | PONG, content.len() as u8]);
    out.extend_from_slice(content);
}

/// Says that no more will be sent, and why.
pub fn close(out: &mut Vec<u8>, code: u16) {
    out.extend_from_slice(&[0x80 | CLOSE, 2]);
    out.extend_from_slice(&code.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(mut decoder: Decoder, bytes: &[u8]) -> Result<Vec<Event>, WebSocketError> {
        let (mut buffer, mut events) = (BytesMut::from(bytes), Vec::new());
        while let Some(event) = decoder.next(&mut buffer)? {
            events.push(event);
        }
        Ok(events)
    }

    fn data(first: bool, last: bool, bytes: &'static [u8]) -> Event {
        let bytes = Bytes::from_static(bytes);
        Event::Data {
            kind: Kind::Text,
            first,
            last,
            bytes,
        }
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // Source: RFC 6455, 5.7.
        let hello = data(true, true, b"Hello");
        assert_eq!(
            events(Decoder::client(), b"\x81\x05Hello").unwrap(),
            std::slice::from_ref(&hello)
        );
        let masked = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        assert_eq!(events(Decoder::server(), &masked).unwrap(), [hello]);
        let parts = b"\x01\x03Hel\x80\x02lo";
        let expected = [data(true, false, b"Hel"), data(false, true, b"lo")];
        assert_eq!(events(Decoder::client(), parts).unwrap(), expected);
        let ping = [
            0x89, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        let expected = [Event::Ping(Bytes::from_static(b"Hello"))];
        assert_eq!(events(Decoder::server(), &ping).unwrap(), expected);
    }

    #[test]
    fn a_ping_may_come_within_a_message() {
        let bytes = b"\x01\x01a\x89\x00\x80\x01b";
        let expected = [
            data(true, false, b"a"),
            Event::Ping(Bytes::new()),
            data(false, true, b"b"),
        ];
        assert_eq!(events(Decoder::client(), bytes).unwrap(), expected);
    }

    #[test]
    fn heads_of_every_length_come_back() {
        for length in [0, 1, 125, 126, 127, 0xffff, 0x1_0000, 0x12_3456] {
            let mut bytes = Vec::new();
            head(&mut bytes, Kind::Binary, length);
            assert!(bytes.len() <= MAX_HEAD_BYTES);
            bytes.resize(bytes.len() + length, 7);
            let all = events(Decoder::client(), &bytes).unwrap();
            let [
                Event::Data {
                    kind: Kind::Binary,
                    first: true,
                    last: true,
                    bytes,
                },
            ] = &all[..]
            else {
                panic!("{length}: {} events", all.len());
            };
            assert_eq!(bytes.len(), length);
        }
    }

    #[test]
    fn a_message_may_come_byte_by_byte() {
        let mut bytes = vec![0x82, 0xfe, 0x01, 0x00, 1, 2, 3, 4];
        let mut content: Vec<u8> = (0..=255).collect();
        unmask(&mut content, [1, 2, 3, 4], 0);
        bytes.extend(content);
        let (mut decoder, mut buffer, mut got) =
            (Decoder::server(), BytesMut::new(), Vec::<u8>::new());
        let mut ended = false;
        for byte in bytes {
            buffer.extend([byte]);
            while let Some(Event::Data { last, bytes, .. }) = decoder.next(&mut buffer).unwrap() {
                assert!(!ended);
                got.extend(&bytes);
                ended = last;
            }
        }
        assert!(ended);
        assert!(got.into_iter().eq(0..=255));
    }

    #[test]
    fn what_is_not_websocket_is_refused() {
        let refusal = |bytes: &[u8]| events(Decoder::client(), bytes).unwrap_err();
        assert_eq!(refusal(b"\xc1\x00"), WebSocketError::Reserved);
        assert_eq!(refusal(b"\x83\x00"), WebSocketError::Opcode(3));
        assert_eq!(refusal(b"\x81\x80"), WebSocketError::Masking);
        assert_eq!(refusal(b"\x09\x00"), WebSocketError::Control);
        assert_eq!(refusal(b"\x89\x7e\x00\x7e"), WebSocketError::Control);
        assert_eq!(refusal(b"\x80\x00"), WebSocketError::Order);
        assert_eq!(refusal(b"\x01\x00\x01\x00"), WebSocketError::Order);
        assert_eq!(
            refusal(b"\x82\x7f\xff\0\0\0\0\0\0\0"),
            WebSocketError::Length
        );
        assert_eq!(
            events(Decoder::server(), b"\x81\x00").unwrap_err(),
            WebSocketError::Masking
        );
    }
}
