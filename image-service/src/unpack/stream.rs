//! The bytes of a layer's archive: decompressed and hashed as they pass.
//!
//! reader ──> magic checked ──> gzip, zstd or as it is ──> hash ──> archive

use super::UnpackError;
use crate::digest::{Algorithm, Digest, Hasher};
use flate2::bufread::MultiGzDecoder;
use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::rc::Rc;

/// Compressed bytes held at once.
const INPUT_BYTES: usize = 64 << 10;
/// Decompressed bytes held at once; also the largest single write to a file.
const OUTPUT_BYTES: usize = 256 << 10;
/// Largest zstd window accepted, as a power of two: 128 MiB, what `zstd`
/// itself takes without `--long`. More would let a layer choose our memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How a layer's archive is compressed, as its media type says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// gzip, one member or several.
    Gzip,
    /// zstd, one frame or several.
    Zstd,
}

impl Compression {
    /// What the first bytes of a blob look like. Fewer than four bytes, or
    /// none that are known, look uncompressed.
    pub fn of_magic(start: &[u8]) -> Compression {
        match start {
            // Source: RFC 1952, section 2.3.1.
            [0x1f, 0x8b, ..] => Compression::Gzip,
            // Source: RFC 8878, sections 3.1.1 and 3.1.2 (skippable frames).
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "uncompressed",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        })
    }
}

/// The reader the caller gave, remembering whether it was the one that failed.
struct Tap<R> {
    reader: R,
    failed: Rc<Cell<bool>>,
}

impl<R: Read> Read for Tap<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.failed.set(true);
                    return Err(error);
                }
                Ok(count) => return Ok(count),
            }
        }
    }
}

type Input<R> = BufReader<io::Chain<Cursor<Vec<u8>>, Tap<R>>>;

enum Decoder<R: Read> {
    Plain(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Input<R>>),
}

/// A layer's archive, uncompressed.
pub struct Source<R: Read> {
    decoder: Decoder<R>,
    compression: Compression,
    failed: Rc<Cell<bool>>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    hasher: Hasher,
    position: u64,
    limit_bytes: Option<u64>,
}

impl<R: Read> Source<R> {
    /// Reads the first bytes and refuses a blob that is compressed otherwise
    /// than `compression` says. `limit_bytes` bounds the uncompressed size.
    pub fn open(
        reader: R,
        compression: Compression,
        algorithm: Algorithm,
        limit_bytes: Option<u64>,
    ) -> Result<Source<R>, UnpackError> {
        let failed = Rc::new(Cell::new(false));
        let mut tap = Tap {
            reader,
            failed: failed.clone(),
        };
        let mut start = Vec::with_capacity(4);
        (&mut tap)
            .take(4)
            .read_to_end(&mut start)
            .map_err(|source| UnpackError::Read { source })?;
        let found = Compression::of_magic(&start);
        if found != compression {
            if compression != Compression::None && start.is_empty() {
                return Err(UnpackError::Truncated { offset: 0 });
            }
            return Err(UnpackError::OtherCompression {
                said: compression,
                found,
            });
        }
        let input = BufReader::with_capacity(INPUT_BYTES, Cursor::new(start).chain(tap));
        let decoder = match compression {
            Compression::None => Decoder::Plain(input),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
            Compression::Zstd => {
                let decoder = (|| {
                    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                    Ok(decoder)
                })()
                .map_err(|source| UnpackError::Decompress {
                    compression,
                    source,
                })?;
                Decoder::Zstd(decoder)
            }
        };
        Ok(Source {
            decoder,
            compression,
            failed,
            buffer: vec![0; OUTPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            hasher: Hasher::new(algorithm),
            position: 0,
            limit_bytes,
        })
    }

    /// How many uncompressed bytes were consumed.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes, at least one but at the end of the archive.
    pub fn fill(&mut self) -> Result<&[u8], UnpackError> {
        if self.start == self.end {
            let read = loop {
                let read = match &mut self.decoder {
                    Decoder::Plain(reader) => reader.read(&mut self.buffer),
                    Decoder::Gzip(reader) => reader.read(&mut self.buffer),
                    Decoder::Zstd(reader) => reader.read(&mut self.buffer),
                };
                match read {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other,
                }
            };
            let count = read.map_err(|source| self.failure(source))?;
            self.hasher.update(&self.buffer[..count]);
            (self.start, self.end) = (0, count);
            if let Some(limit) = self.limit_bytes
                && self.position + count as u64 > limit
            {
                return Err(UnpackError::TooLarge { limit_bytes: limit });
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    /// Takes `count` of the bytes [`Source::fill`] showed.
    pub fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start);
        self.start += count;
        self.position += count as u64;
    }

    /// Fills `out` whole; `false` when the archive ended before its first byte.
    pub fn read_exact(&mut self, out: &mut [u8]) -> Result<bool, UnpackError> {
        let mut done = 0;
        while done < out.len() {
            let bytes = self.fill()?;
            if bytes.is_empty() {
                if done == 0 {
                    return Ok(false);
                }
                return Err(UnpackError::Truncated {
                    offset: self.position,
                });
            }
            let count = bytes.len().min(out.len() - done);
            out[done..done + count].copy_from_slice(&bytes[..count]);
            self.consume(count);
            done += count;
        }
        Ok(true)
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, mut count: u64) -> Result<(), UnpackError> {
        while count > 0 {
            let available = self.fill()?.len() as u64;
            if available == 0 {
                return Err(UnpackError::Truncated {
                    offset: self.position,
                });
            }
            let now = available.min(count);
            self.consume(now as usize);
            count -= now;
        }
        Ok(())
    }

    /// Reads to the end of the archive and of the compressed bytes, and gives
    /// the digest of the whole archive and its size in bytes.
    ///
    /// What follows the archive's end marker counts into the digest and is
    /// otherwise of no interest, as in every tar reader.
    pub fn finish(mut self) -> Result<(Digest, u64), UnpackError> {
        loop {
            let count = self.fill()?.len();
            if count == 0 {
                break;
            }
            self.consume(count);
        }
        // The decoders stop where their format ends; the blob must end there too, and only
        // its reader's own end says that the compressed digest was right.
        let rest = match self.decoder {
            Decoder::Plain(ref mut input) => input.fill_buf().map(<[u8]>::len),
            Decoder::Gzip(ref mut decoder) => decoder.get_mut().fill_buf().map(<[u8]>::len),
            Decoder::Zstd(ref mut decoder) => decoder.get_mut().fill_buf().map(<[u8]>::len),
        };
        match rest {
            Ok(0) => Ok((self.hasher.finish(), self.position)),
            Ok(_) => Err(UnpackError::TrailingBytes {
                compression: self.compression,
            }),
            Err(source) => Err(self.failure(source)),
        }
    }

    fn failure(&self, source: io::Error) -> UnpackError {
        if self.failed.get() {
            return UnpackError::Read { source };
        }
        UnpackError::Decompress {
            compression: self.compression,
            source,
        }
    }
}
