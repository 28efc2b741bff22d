//! SPDY/3 header blocks: names and values, length-prefixed, in one zlib stream per
//! direction that was primed with a dictionary.
//!
//! Source: SPDY Protocol Draft 3, 2.6.10 "Name/Value Header Block", and 2.6.10.1 for the
//! dictionary.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::sync::LazyLock;

/// Longest header block, in bytes after decompression. Kubernetes sends three short
/// headers; HTTP servers commonly take 16 KiB.
pub const MAX_BLOCK_BYTES: usize = 16 << 10;

/// Most headers in one block.
pub const MAX_HEADERS: usize = 64;

/// The words of the dictionary that stand with their lengths before them.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

/// What follows them, as it is.
const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417",
    "502504505203 Non-Authoritative Information204 No Content301 Moved Permanently",
    "400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error",
    "501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec",
    " 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,",
    "image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,public",
    "privatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS {
        // Words are at most 19 bytes long.
        bytes.extend_from_slice(&(word.len() as u32).to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
});

/// Why a header block was refused. The zlib stream cannot be used after most of them, so
/// the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadersError {
    #[error("a header block is not a zlib stream with SPDY's dictionary")]
    Zlib,
    #[error("a header block is longer than {MAX_BLOCK_BYTES} bytes")]
    TooLong,
    #[error("a header block has more than {MAX_HEADERS} headers")]
    TooMany,
    #[error("a header block ends in the middle of a header")]
    CutOff,
    #[error("a header block has bytes after its last header")]
    Trailing,
    #[error("a header is not text")]
    NotText,
    #[error("a header is there twice, or has no name")]
    BadName,
}

/// The headers of one frame, names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// Headers of these names and values.
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let own = |(name, value): (&str, &str)| (name.to_ascii_lowercase(), value.to_owned());
        Self(pairs.into_iter().map(own).collect())
    }

    /// The value of the header `name`, whatever its case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut named = self
            .0
            .iter()
            .filter(|(own, _)| own.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.as_str())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn parse(block: &[u8]) -> Result<Self, HeadersError> {
        let mut rest = block;
        let count = number(&mut rest)?;
        if count > MAX_HEADERS {
            return Err(HeadersError::TooMany);
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let name = text(&mut rest)?.to_ascii_lowercase();
            let value = text(&mut rest)?.to_owned();
            if name.is_empty() || headers.iter().any(|(other, _)| *other == name) {
                return Err(HeadersError::BadName);
            }
            headers.push((name, value));
        }
        if rest.is_empty() {
            Ok(Self(headers))
        } else {
            Err(HeadersError::Trailing)
        }
    }

    fn write(&self) -> Vec<u8> {
        // Blocks we make are a handful of short headers.
        let mut block = (self.0.len() as u32).to_be_bytes().to_vec();
        for (name, value) in &self.0 {
            for part in [name, value] {
                block.extend_from_slice(&(part.len() as u32).to_be_bytes());
                block.extend_from_slice(part.as_bytes());
            }
        }
        block
    }
}

fn number(rest: &mut &[u8]) -> Result<usize, HeadersError> {
    let (bytes, after) = rest.split_first_chunk().ok_or(HeadersError::CutOff)?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes) as usize)
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, HeadersError> {
    let length = number(rest)?;
    let (bytes, after) = rest.split_at_checked(length).ok_or(HeadersError::CutOff)?;
    *rest = after;
    std::str::from_utf8(bytes).map_err(|_| HeadersError::NotText)
}

/// The receiving end of one direction's header stream.
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// The headers of the next block.
    ///
    /// # Errors
    /// See [`HeadersError`]; nothing more can be read from this stream then.
    pub fn headers(&mut self, compressed: &[u8]) -> Result<Headers, HeadersError> {
        let mut block = Vec::with_capacity(1024);
        let mut rest = compressed;
        loop {
            if block.len() == block.capacity() {
                if block.len() >= MAX_BLOCK_BYTES {
                    return Err(HeadersError::TooLong);
                }
                block.reserve(block.len());
            }
            let (read, written) = (self.0.total_in(), block.len());
            let outcome = self
                .0
                .decompress_vec(rest, &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.0.total_in() - read).unwrap_or(usize::MAX);
            rest = rest.get(used..).ok_or(HeadersError::Zlib)?;
            match outcome {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| HeadersError::Zlib)?;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(HeadersError::Zlib),
                Ok(Status::Ok | Status::BufError) => {
                    let full = block.len() == block.capacity();
                    if rest.is_empty() && !full {
                        break;
                    }
                    if !full && used == 0 && block.len() == written {
                        return Err(HeadersError::Zlib);
                    }
                }
            }
        }
        if block.len() > MAX_BLOCK_BYTES {
            return Err(HeadersError::TooLong);
        }
        Headers::parse(&block)
    }
}

/// The sending end of one direction's header stream.
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        let mut stream = Compress::new(Compression::new(6), true);
        // Only fails after the first byte has been compressed.
        let set = stream.set_dictionary(&DICTIONARY);
        debug_assert!(set.is_ok());
        Self(stream)
    }
}

impl Deflater {
    /// The next block. Blocks must be sent in the order they were made in.
    pub fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let plain = headers.write();
        let mut block = Vec::with_capacity(plain.len() + 64);
        let mut rest = &plain[..];
        loop {
            let before = self.0.total_in();
            // Deflating into memory fails only when the stream was ended, which it never is.
            let outcome = self.0.compress_vec(rest, &mut block, FlushCompress::Sync);
            debug_assert!(outcome.is_ok());
            let used = usize::try_from(self.0.total_in() - before).unwrap_or(0);
            rest = rest.get(used..).unwrap_or_default();
            // Room left over means that the flush is complete.
            if rest.is_empty() && block.len() < block.capacity() {
                return block;
            }
            block.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_one_everybody_has() {
        // The identifier that zlib puts into a stream that was made with it. Source: the
        // SPDY/3 implementations all send 78 bb e3 c6 a7 c2 at the start.
        assert_eq!(DICTIONARY.len(), 1423);
        let begin = &Deflater::default().block(&Headers::default())[..6];
        assert_eq!(begin[0], 0x78);
        assert_eq!(begin[1] & 0x20, 0x20, "a preset dictionary");
        assert_eq!(&begin[2..], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn blocks_of_one_stream_come_back_one_after_the_other() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for round in 0..20 {
            let id = round.to_string();
            let headers =
                Headers::new([("streamType", "data"), ("port", "80"), ("requestID", &id)]);
            let block = deflater.block(&headers);
            let back = inflater.headers(&block).unwrap();
            assert_eq!(back, headers);
            assert_eq!(back.get("requestid"), Some(id.as_str()));
            assert_eq!(back.get("streamType"), Some("data"));
        }
        assert_eq!(
            inflater
                .headers(&deflater.block(&Headers::default()))
                .unwrap()
                .len(),
            0
        );
    }

    fn refusal(plain: &[u8]) -> HeadersError {
        let mut stream = Compress::new(Compression::new(6), true);
        stream.set_dictionary(&DICTIONARY).unwrap();
        let mut block = Vec::with_capacity(plain.len() + 100);
        stream
            .compress_vec(plain, &mut block, FlushCompress::Sync)
            .unwrap();
        Inflater::default().headers(&block).unwrap_err()
    }

    #[test]
    fn what_is_no_header_block_is_refused() {
        assert_eq!(
            Inflater::default().headers(b"not zlib at all"),
            Err(HeadersError::Zlib)
        );
        assert_eq!(refusal(&[0, 0, 0]), HeadersError::CutOff);
        assert_eq!(refusal(&[0, 0, 0, 1]), HeadersError::CutOff);
        assert_eq!(
            refusal(&[0, 0, 0, 1, 0, 0, 0, 9, b'a']),
            HeadersError::CutOff
        );
        assert_eq!(refusal(&[0xff; 4]), HeadersError::TooMany);
        assert_eq!(refusal(&[0, 0, 0, 0, 1]), HeadersError::Trailing);
        assert_eq!(
            refusal(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            HeadersError::BadName
        );
        let latin = [0, 0, 0, 1, 0, 0, 0, 1, 0xe9, 0, 0, 0, 0];
        assert_eq!(refusal(&latin), HeadersError::NotText);
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        assert_eq!(refusal(&vec![0; 64 << 20]), HeadersError::TooLong);
        assert_eq!(
            refusal(&vec![0; MAX_BLOCK_BYTES + 1]),
            HeadersError::TooLong
        );
    }
}
