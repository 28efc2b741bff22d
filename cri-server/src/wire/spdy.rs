//! SPDY/3.1 frames.
//!
//! ```text
//! control  1 | version (15) | type (16) | flags (8) | length (24) | length bytes
//! data     0 | stream ID (31)           | flags (8) | length (24) | length bytes
//! ```
//!
//! Control frames are short and decoded whole; the payload of a data frame is handed on
//! as it comes, so a frame of 16 MiB costs no more than one of a byte.
//!
//! Source: SPDY Protocol Draft 3 and its successor 3.1 (session flow control).

use super::headers::{Deflater, Headers, HeadersError, Inflater};
use bytes::{Buf as _, Bytes, BytesMut};

/// The protocol's version field; SPDY/3.1 kept the 3.
const VERSION: u16 = 3;

/// Bytes before the content of every frame.
pub const HEAD_BYTES: usize = 8;

/// Longest control frame, in bytes without its head.
pub const MAX_CONTROL_BYTES: usize = 32 << 10;

/// Longest payload of a data frame: the length has 24 bits.
pub const MAX_DATA_BYTES: usize = (1 << 24) - 1;

/// How much of a stream may be under way before the receiver says more; both ends begin
/// with it. Source: draft 3, 2.6.8.
pub const INITIAL_WINDOW: u32 = 64 << 10;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

const FIN: u8 = 1;
const UNIDIRECTIONAL: u8 = 2;

const SETTING_MAX_STREAMS: u32 = 4;
const SETTING_INITIAL_WINDOW: u32 = 7;

/// Why a stream was reset. Source: draft 3, 2.6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// The stream's frames made no sense.
    Protocol = 1,
    /// There is no such stream.
    InvalidStream = 2,
    /// It was not even looked at.
    Refused = 3,
    /// Not wanted any more.
    Cancel = 5,
    /// Something failed here.
    Internal = 6,
}

/// What a frame, or a piece of a data frame, says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A stream is opened.
    SynStream {
        id: u32,
        /// Nothing will come on it.
        fin: bool,
        /// Nothing may be sent on it.
        unidirectional: bool,
        headers: Headers,
    },
    /// A stream that this end opened is accepted.
    SynReply { id: u32, fin: bool },
    /// Both directions of a stream end at once.
    Rst { id: u32, status: u32 },
    /// What the peer's end can take.
    Settings { initial_window: Option<u32> },
    /// To be answered with the same ID where the ID is of the peer's kind.
    Ping { id: u32 },
    /// The peer opens no more streams.
    GoAway,
    /// More headers.
    Headers { id: u32, fin: bool },
    /// More may be sent; stream 0 is the whole connection.
    WindowUpdate { id: u32, bytes: u32 },
    /// Payload, a part of a data frame or all of it. `fin` comes with the last part.
    Data { id: u32, fin: bool, bytes: Bytes },
}

/// Why a connection's bytes are refused. There is no way to go on after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("a frame of SPDY version {0}, not 3")]
    Version(u16),
    #[error("a control frame of {0} bytes, more than {MAX_CONTROL_BYTES}")]
    TooLong(usize),
    #[error("a control frame of type {0} with a length that does not fit")]
    Length(u16),
    #[error("a frame of type {0} for stream 0")]
    NoStream(u16),
    #[error(transparent)]
    Headers(#[from] HeadersError),
}

/// Turns bytes into frames.
#[derive(Default)]
pub struct Decoder {
    inflater: Inflater,
    payload: Option<Payload>,
}

/// The rest of a data frame.
struct Payload {
    id: u32,
    fin: bool,
    left: usize,
}

impl Decoder {
    /// The stream whose payload comes next, and how much of it, in bytes.
    pub fn coming(&self) -> Option<(u32, usize)> {
        let payload = self.payload.as_ref()?;
        Some((payload.id, payload.left))
    }

    /// So many bytes of [`Decoder::coming`] were taken from before the buffer.
    pub fn passed(&mut self, bytes: usize) {
        if let Some(payload) = &mut self.payload {
            debug_assert!(bytes <= payload.left);
            payload.left = payload.left.saturating_sub(bytes);
        }
    }

    /// Takes the next frame, or what has come of it, out of `buffer`; `None` when more
    /// bytes are needed. Control frames of unknown types are skipped, as the draft says.
    ///
    /// # Errors
    /// See [`SpdyError`]; the connection cannot go on.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        loop {
            if let Some(payload) = &mut self.payload {
                if buffer.is_empty() && payload.left > 0 {
                    return Ok(None);
                }
                let bytes = buffer.split_to(payload.left.min(buffer.len())).freeze();
                payload.left -= bytes.len();
                let (id, done) = (payload.id, payload.left == 0);
                let fin = done && payload.fin;
                if done {
                    self.payload = None;
                }
                if bytes.is_empty() && !fin {
                    continue;
                }
                return Ok(Some(Frame::Data { id, fin, bytes }));
            }
            let Some(head) = buffer.first_chunk::<HEAD_BYTES>() else {
                return Ok(None);
            };
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let flags = head[4];
            let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
            if first & 1 << 31 == 0 {
                if first == 0 {
                    return Err(SpdyError::NoStream(0));
                }
                buffer.advance(HEAD_BYTES);
                self.payload = Some(Payload {
                    id: first,
                    fin: flags & FIN != 0,
                    left: length,
                });
                continue;
            }
            let version = (first >> 16) as u16 & 0x7fff;
            if version != VERSION {
                return Err(SpdyError::Version(version));
            }
            if length > MAX_CONTROL_BYTES {
                return Err(SpdyError::TooLong(length));
            }
            if buffer.len() < HEAD_BYTES + length {
                return Ok(None);
            }
            buffer.advance(HEAD_BYTES);
            let content = buffer.split_to(length);
            if let Some(frame) = self.control(first as u16, flags, &content)? {
                return Ok(Some(frame));
            }
        }
    }

    fn control(
        &mut self,
        kind: u16,
        flags: u8,
        content: &[u8],
    ) -> Result<Option<Frame>, SpdyError> {
        let fin = flags & FIN != 0;
        let word = |at: usize| {
            let bytes = content
                .get(at..at + 4)
                .and_then(|bytes| bytes.first_chunk());
            bytes
                .map(|bytes| u32::from_be_bytes(*bytes))
                .ok_or(SpdyError::Length(kind))
        };
        let stream = || match word(0)? & 0x7fff_ffff {
            0 => Err(SpdyError::NoStream(kind)),
            id => Ok(id),
        };
        let exactly = |length: usize| {
            if content.len() == length {
                Ok(())
            } else {
                Err(SpdyError::Length(kind))
            }
        };
        let frame = match kind {
            SYN_STREAM => {
                let block = content.get(10..).ok_or(SpdyError::Length(kind))?;
                // Also for a stream that will be refused: the stream of headers goes on.
                let headers = self.inflater.headers(block)?;
                let (id, unidirectional) = (stream()?, flags & UNIDIRECTIONAL != 0);
                Frame::SynStream {
                    id,
                    fin,
                    unidirectional,
                    headers,
                }
            }
            SYN_REPLY | HEADERS => {
                let block = content.get(4..).ok_or(SpdyError::Length(kind))?;
                self.inflater.headers(block)?;
                let id = stream()?;
                if kind == SYN_REPLY {
                    Frame::SynReply { id, fin }
                } else {
                    Frame::Headers { id, fin }
                }
            }
            RST_STREAM => {
                exactly(8)?;
                Frame::Rst {
                    id: stream()?,
                    status: word(4)?,
                }
            }
            SETTINGS => {
                let count = word(0)? as usize;
                // The length bounds the count.
                if content.len() - 4 != count.saturating_mul(8) {
                    return Err(SpdyError::Length(kind));
                }
                let entries = content[4..].chunks_exact(8);
                let mut windows = entries.filter_map(|entry| {
                    let (id, value) = entry.split_first_chunk::<4>()?;
                    // The first byte holds flags.
                    let id = u32::from_be_bytes(*id) & 0x00ff_ffff;
                    let value = u32::from_be_bytes(*value.first_chunk()?);
                    (id == SETTING_INITIAL_WINDOW).then_some(value)
                });
                Frame::Settings {
                    initial_window: windows.next(),
                }
            }
            PING => {
                exactly(4)?;
                Frame::Ping { id: word(0)? }
            }
            GOAWAY => {
                exactly(8)?;
                Frame::GoAway
            }
            WINDOW_UPDATE => {
                exactly(8)?;
                let mask = 0x7fff_ffff;
                Frame::WindowUpdate {
                    id: word(0)? & mask,
                    bytes: word(4)? & mask,
                }
            }
            // Source: draft 3, 2.2.1: unknown control frames are ignored.
            _ => return Ok(None),
        };
        Ok(Some(frame))
    }
}

/// Turns frames into bytes. Frames with headers must be sent in the order they were made in.
#[derive(Default)]
pub struct Encoder(Deflater);

impl Encoder {
    /// Opens stream `id`.
    pub fn syn_stream(&mut self, out: &mut Vec<u8>, id: u32, headers: &Headers, fin: bool) {
        let block = self.0.block(headers);
        control(out, SYN_STREAM, u8::from(fin) * FIN, 10 + block.len());
        out.extend_from_slice(&id.to_be_bytes());
        // No associated stream, priority 0, no credential slot.
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&block);
    }

    /// Accepts stream `id`.
    pub fn syn_reply(&mut self, out: &mut Vec<u8>, id: u32) {
        let block = self.0.block(&Headers::default());
        control(out, SYN_REPLY, 0, 4 + block.len());
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&block);
    }
}

/// The head of a data frame. `length` is at most [`MAX_DATA_BYTES`].
pub fn data_head(id: u32, length: usize, fin: bool) -> [u8; HEAD_BYTES] {
    debug_assert!(length <= MAX_DATA_BYTES);
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&(id & 0x7fff_ffff).to_be_bytes());
    head[4..].copy_from_slice(&(length as u32).to_be_bytes());
    head[4] = u8::from(fin) * FIN;
    head
}

/// Ends both directions of a stream.
pub fn rst(out: &mut Vec<u8>, id: u32, status: Reset) {
    control(out, RST_STREAM, 0, 8);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&(status as u32).to_be_bytes());
}

/// Says how much may be under way on each stream, and how many streams there may be.
pub fn settings(out: &mut Vec<u8>, initial_window: u32, max_streams: u32) {
    control(out, SETTINGS, 0, 20);
    let (streams, window) = (SETTING_MAX_STREAMS, SETTING_INITIAL_WINDOW);
    for number in [2, streams, max_streams, window, initial_window] {
        out.extend_from_slice(&number.to_be_bytes());
    }
}

/// Asks for, or gives, a sign of life.
pub fn ping(out: &mut Vec<u8>, id: u32) {
    control(out, PING, 0, 4);
    out.extend_from_slice(&id.to_be_bytes());
}

/// No more streams after `last`. Status 0 is an orderly end, 1 a breach of the protocol.
pub fn goaway(out: &mut Vec<u8>, last: u32, status: u32) {
    control(out, GOAWAY, 0, 8);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&status.to_be_bytes());
}

/// Allows `bytes` more on stream `id`, on the connection where that is 0.
pub fn window_update(out: &mut Vec<u8>, id: u32, bytes: u32) {
    control(out, WINDOW_UPDATE, 0, 8);
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&(bytes & 0x7fff_ffff).to_be_bytes());
}

fn control(out: &mut Vec<u8>, kind: u16, flags: u8, length: usize) {
    out.extend_from_slice(&(VERSION | 0x8000).to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    // The frames made here are short.
    let length = (length as u32).to_be_bytes();
    out.extend_from_slice(&[flags, length[1], length[2], length[3]]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<Vec<Frame>, SpdyError> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::from(bytes));
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next(&mut buffer)? {
            frames.push(frame);
        }
        assert!(buffer.is_empty(), "{} bytes left", buffer.len());
        Ok(frames)
    }

    #[test]
    fn every_frame_we_make_is_one_we_read() {
        let (mut encoder, mut bytes) = (Encoder::default(), Vec::new());
        let headers = Headers::new([("streamType", "error")]);
        encoder.syn_stream(&mut bytes, 1, &headers, false);
        encoder.syn_reply(&mut bytes, 1);
        settings(&mut bytes, 1 << 20, 100);
        ping(&mut bytes, 7);
        window_update(&mut bytes, 0, 99);
        rst(&mut bytes, 3, Reset::Cancel);
        bytes.extend(data_head(5, 3, true));
        bytes.extend(b"abc");
        bytes.extend(data_head(5, 0, true));
        bytes.extend(data_head(5, 0, false));
        goaway(&mut bytes, 5, 0);
        let data = |bytes: &'static [u8]| Frame::Data {
            id: 5,
            fin: true,
            bytes: Bytes::from_static(bytes),
        };
        let (id, fin) = (1, false);
        assert_eq!(
            decode(&bytes).unwrap(),
            [
                Frame::SynStream {
                    id,
                    fin,
                    unidirectional: false,
                    headers
                },
                Frame::SynReply { id, fin },
                Frame::Settings {
                    initial_window: Some(1 << 20)
                },
                Frame::Ping { id: 7 },
                Frame::WindowUpdate { id: 0, bytes: 99 },
                Frame::Rst { id: 3, status: 5 },
                data(b"abc"),
                data(b""),
                Frame::GoAway,
            ]
        );
    }

    #[test]
    fn a_frame_may_come_byte_by_byte() {
        let mut bytes = data_head(9, 4, true).to_vec();
        bytes.extend(b"wxyz");
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        let (mut text, mut ends) = (Vec::new(), 0);
        for byte in bytes {
            buffer.extend([byte]);
            while let Some(Frame::Data { id, fin, bytes }) = decoder.next(&mut buffer).unwrap() {
                assert_eq!(id, 9);
                text.extend(&bytes);
                ends += usize::from(fin);
            }
        }
        assert_eq!((&text[..], ends), (&b"wxyz"[..], 1));
    }

    #[test]
    fn a_frame_of_16_mib_is_handed_on_as_it_comes() {
        let mut buffer = BytesMut::from(&data_head(1, MAX_DATA_BYTES, false)[..]);
        buffer.extend(b"begin");
        let frame = Decoder::default().next(&mut buffer).unwrap().unwrap();
        assert_eq!(
            frame,
            Frame::Data {
                id: 1,
                fin: false,
                bytes: Bytes::from_static(b"begin")
            }
        );
    }

    #[test]
    fn payload_may_pass_the_buffer_by() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.coming(), None);
        let mut buffer = BytesMut::from(&data_head(5, 10, true)[..]);
        buffer.extend(b"abc");
        let piece = |fin, bytes: &'static [u8]| Frame::Data {
            id: 5,
            fin,
            bytes: Bytes::from_static(bytes),
        };
        assert_eq!(
            decoder.next(&mut buffer).unwrap(),
            Some(piece(false, b"abc"))
        );
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
        assert_eq!(decoder.coming(), Some((5, 7)));
        decoder.passed(4);
        assert_eq!(decoder.coming(), Some((5, 3)));
        decoder.passed(3);
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(piece(true, b"")));
        // One that does not end its stream ends without a word.
        buffer.extend(data_head(5, 2, false));
        assert_eq!(decoder.next(&mut buffer).unwrap(), None);
        decoder.passed(2);
        buffer.extend(data_head(5, 0, true));
        assert_eq!(decoder.next(&mut buffer).unwrap(), Some(piece(true, b"")));
        assert_eq!(decoder.coming(), None);
    }

    #[test]
    fn what_is_not_spdy_is_refused() {
        assert_eq!(
            decode(b"\x80\x02\0\x06\0\0\0\x04\0\0\0\x01"),
            Err(SpdyError::Version(2))
        );
        assert_eq!(decode(b"\0\0\0\0\0\0\0\0"), Err(SpdyError::NoStream(0)));
        assert_eq!(
            decode(b"\x80\x03\0\x06\0\0\0\x03abc"),
            Err(SpdyError::Length(PING))
        );
        assert_eq!(
            decode(b"\x80\x03\0\x01\0\0\0\x01a"),
            Err(SpdyError::Length(SYN_STREAM))
        );
        let hostile_count = b"\x80\x03\0\x04\0\0\0\x04\xff\xff\xff\xff";
        assert_eq!(decode(hostile_count), Err(SpdyError::Length(SETTINGS)));
        let reset_of_none = b"\x80\x03\0\x03\0\0\0\x08\0\0\0\0\0\0\0\x01";
        assert_eq!(decode(reset_of_none), Err(SpdyError::NoStream(RST_STREAM)));
        assert_eq!(
            decode(b"\x80\x03\0\x01\0\xff\xff\xff"),
            Err(SpdyError::TooLong(0xff_ffff))
        );
    }

    #[test]
    fn a_frame_of_a_later_kind_is_skipped() {
        let mut bytes = b"\x80\x03\0\x63\0\0\0\x02ab".to_vec();
        ping(&mut bytes, 1);
        assert_eq!(decode(&bytes).unwrap(), [Frame::Ping { id: 1 }]);
    }
}
