//! Kubernetes' channels inside WebSocket messages: the first byte of each message says
//! which channel the rest is for.
//!
//! | protocol | a message |
//! |---|---|
//! | `channel.k8s.io`, `v4.channel.k8s.io` | the number, then bytes |
//! | `v5.channel.k8s.io` | the same; 255 and a number: that channel ends |
//! | `base64.channel.k8s.io`, `v4.base64.channel.k8s.io` | the number as a digit, then base64 |
//!
//! Source: k8s.io/streaming `wsstream`, KEP-4006.

use super::base64_stream::Base64Stream;
use super::websocket::{Event, Kind};
use bytes::{Buf as _, Bytes};

/// The channel that carries v5's close signal.
pub const CLOSE_SIGNAL: u8 = 255;

/// How a message is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Digit and base64 instead of number and bytes.
    pub base64: bool,
    /// 255 ends a channel.
    pub close_signal: bool,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Bytes for a channel, possibly one that nobody has heard of.
    Data { channel: u8, bytes: Bytes },
    /// No more will come on a channel.
    Close { channel: u8 },
}

/// Why a connection's messages are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    #[error("a close signal that does not name one channel")]
    CloseSignal,
    #[error("a message for a channel that is not a digit")]
    Digit,
    #[error(transparent)]
    Base64(#[from] super::base64_stream::NotBase64),
}

/// Reads messages as they come, cut anywhere.
pub struct Decoder {
    protocol: Protocol,
    /// The channel of the message that is being read.
    channel: Option<u8>,
    /// The channel that a close signal has named so far.
    closes: Option<u8>,
    base64: Base64Stream,
}

impl Decoder {
    /// A reader of that protocol's messages.
    pub fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            channel: None,
            closes: None,
            base64: Base64Stream::default(),
        }
    }

    /// What a part of a message says; `None` where it says nothing yet. Empty messages
    /// and messages without content say nothing.
    ///
    /// # Errors
    /// See [`ChannelError`]; the connection cannot go on.
    pub fn part(
        &mut self,
        first: bool,
        last: bool,
        mut bytes: Bytes,
    ) -> Result<Option<Said>, ChannelError> {
        if first {
            self.channel = None;
        }
        if self.channel.is_none() && !bytes.is_empty() {
            let mut channel = bytes.get_u8();
            if self.protocol.base64 {
                channel = channel.checked_sub(b'0').ok_or(ChannelError::Digit)?;
            }
            self.channel = Some(channel);
        }
        let Some(channel) = self.channel else {
            return Ok(None);
        };
        if self.protocol.close_signal && channel == CLOSE_SIGNAL {
            return self.close_signal(last, &bytes);
        }
        if self.protocol.base64 {
            let plain = self.base64.push(&bytes)?;
            if last {
                self.base64.end()?;
            }
            bytes = Bytes::from(plain);
        }
        Ok((!bytes.is_empty()).then_some(Said::Data { channel, bytes }))
    }

    fn close_signal(&mut self, last: bool, bytes: &[u8]) -> Result<Option<Said>, ChannelError> {
        for &channel in bytes {
            if self.closes.replace(channel).is_some() {
                return Err(ChannelError::CloseSignal);
            }
        }
        if !last {
            return Ok(None);
        }
        let channel = self.closes.take().ok_or(ChannelError::CloseSignal)?;
        Ok(Some(Said::Close { channel }))
    }

    /// As [`Decoder::part`], for what a WebSocket decoder gives; `None` for what is no message.
    ///
    /// # Errors
    /// See [`Decoder::part`].
    pub fn event(&mut self, event: Event) -> Result<Option<Said>, ChannelError> {
        match event {
            Event::Data {
                first, last, bytes, ..
            } => self.part(first, last, bytes),
            Event::Ping(_) | Event::Pong | Event::Close => Ok(None),
        }
    }
}

impl Protocol {
    /// What kind of message carries it.
    pub fn kind(self) -> Kind {
        if self.base64 {
            Kind::Text
        } else {
            Kind::Binary
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: Protocol = Protocol {
        base64: false,
        close_signal: false,
    };
    const V5: Protocol = Protocol {
        base64: false,
        close_signal: true,
    };
    const BASE64: Protocol = Protocol {
        base64: true,
        close_signal: false,
    };

    fn whole(protocol: Protocol, message: &'static [u8]) -> Result<Option<Said>, ChannelError> {
        Decoder::new(protocol).part(true, true, Bytes::from_static(message))
    }

    fn data(channel: u8, bytes: &'static [u8]) -> Said {
        Said::Data {
            channel,
            bytes: Bytes::from_static(bytes),
        }
    }

    #[test]
    fn the_first_byte_is_the_channel() {
        assert_eq!(whole(V4, b"\0foo\n"), Ok(Some(data(0, b"foo\n"))));
        assert_eq!(whole(V4, b"\xff\0"), Ok(Some(data(255, b"\0"))));
        assert_eq!(whole(V4, b""), Ok(None));
        assert_eq!(whole(V4, b"\x01"), Ok(None));
        assert_eq!(whole(BASE64, b"0Zm9vCgo="), Ok(Some(data(0, b"foo\n\n"))));
        assert_eq!(whole(BASE64, b"\0Zm9v"), Err(ChannelError::Digit));
        assert!(matches!(
            whole(BASE64, b"0Zm9"),
            Err(ChannelError::Base64(_))
        ));
    }

    #[test]
    fn v5_ends_a_channel() {
        assert_eq!(whole(V5, b"\xff\0"), Ok(Some(Said::Close { channel: 0 })));
        assert_eq!(whole(V5, b"\xff"), Err(ChannelError::CloseSignal));
        assert_eq!(whole(V5, b"\xff\0\0"), Err(ChannelError::CloseSignal));
        let mut decoder = Decoder::new(V5);
        assert_eq!(
            decoder.part(true, false, Bytes::from_static(b"\xff")),
            Ok(None)
        );
        let end = decoder.part(false, true, Bytes::from_static(b"\x02"));
        assert_eq!(end, Ok(Some(Said::Close { channel: 2 })));
    }

    #[test]
    fn a_message_in_parts_stays_on_its_channel() {
        let mut decoder = Decoder::new(V4);
        assert_eq!(decoder.part(true, false, Bytes::new()), Ok(None));
        let mut part = |last, bytes| decoder.part(false, last, Bytes::from_static(bytes));
        assert_eq!(part(false, b"\x02a"), Ok(Some(data(2, b"a"))));
        assert_eq!(part(true, b"\x01"), Ok(Some(data(2, b"\x01"))));
    }
}
