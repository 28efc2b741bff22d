//! Base64 that comes in pieces, cut anywhere.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What came is no base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message is not base64")]
pub struct NotBase64;

/// Decodes one message at a time.
#[derive(Default)]
pub struct Base64Stream {
    /// Up to three characters of a group that is not whole.
    rest: Vec<u8>,
    /// A padded group has come: nothing may follow.
    ended: bool,
}

impl Base64Stream {
    /// Decodes what is whole with these characters.
    ///
    /// # Errors
    /// They are not base64.
    pub fn push(&mut self, text: &[u8]) -> Result<Vec<u8>, NotBase64> {
        let mut out = Vec::with_capacity(text.len() / 4 * 3 + 3);
        let mut text = text;
        if !self.rest.is_empty() {
            let missing = (4 - self.rest.len()).min(text.len());
            let (head, tail) = text.split_at(missing);
            self.rest.extend_from_slice(head);
            text = tail;
            if self.rest.len() < 4 {
                return Ok(out);
            }
            let group = std::mem::take(&mut self.rest);
            self.groups(&group, &mut out)?;
        }
        let (whole, rest) = text.split_at(text.len() / 4 * 4);
        self.groups(whole, &mut out)?;
        self.rest.extend_from_slice(rest);
        Ok(out)
    }

    /// The message is over; the next one may begin.
    ///
    /// # Errors
    /// It ended within a group.
    pub fn end(&mut self) -> Result<(), NotBase64> {
        let whole = self.rest.is_empty();
        *self = Self::default();
        if whole { Ok(()) } else { Err(NotBase64) }
    }

    fn groups(&mut self, text: &[u8], out: &mut Vec<u8>) -> Result<(), NotBase64> {
        if text.is_empty() {
            return Ok(());
        }
        if self.ended {
            return Err(NotBase64);
        }
        STANDARD.decode_vec(text, out).map_err(|_| NotBase64)?;
        self.ended = text.ends_with(b"=");
        Ok(())
    }
}

/// The text of these bytes.
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_it_is_cut_it_is_the_same() {
        let plain: Vec<u8> = (0..=255).collect();
        let text = encode(&plain);
        for size in 1..20 {
            let mut stream = Base64Stream::default();
            let mut got = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                got.extend(stream.push(piece).unwrap());
            }
            stream.end().unwrap();
            assert_eq!(got, plain, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_not_base64_is_refused() {
        assert_eq!(Base64Stream::default().push(b"&&&&"), Err(NotBase64));
        let mut stream = Base64Stream::default();
        stream.push(b"Zm8=").unwrap();
        assert_eq!(stream.push(b"Zm8="), Err(NotBase64));
        let mut stream = Base64Stream::default();
        stream.push(b"Zm8").unwrap();
        assert_eq!(stream.end(), Err(NotBase64));
        assert_eq!(stream.end(), Ok(()), "the next message begins afresh");
    }
}
