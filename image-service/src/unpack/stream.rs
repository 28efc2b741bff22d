//! The bytes of a layer's archive: decompressed and hashed as they pass.
//!
//! ```text
//! reader ──> magic checked ──> gzip, zstd or as it is ──┬──> archive     the caller's thread
//!            one thread                                 └──> hash        one thread
//! ```
//! The three work on different blocks at the same time; a handful of blocks goes round, so
//! memory does not depend on the layer. A layer that fits one block needs no threads.

use super::UnpackError;
use super::recipe;
use crate::digest::{Algorithm, Digest, Hasher};
use flate2::bufread::MultiGzDecoder;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;

/// Compressed bytes held at once.
const INPUT_BYTES: usize = 64 << 10;
/// Decompressed bytes in one block; also the largest single write to a file.
const BLOCK_BYTES: usize = 256 << 10;
/// Blocks that wait for one consumer; with those at work at most ten are in memory.
const BLOCKS_AHEAD: usize = 3;
/// Largest zstd window accepted, as a power of two: 128 MiB, what `zstd`
/// itself takes without `--long`. More would let a layer choose our memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// What a blob may have beyond the bound on the archive: data that cannot be compressed grows a
/// little. Less than a deflate block's head for every 16 KiB of the largest bound, and no matter.
const INPUT_SLACK: u64 = 1 << 20;
/// A tar header.
const TAR_BLOCK: usize = 512;

/// How a layer's archive is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    #[default]
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

/// Reads `blob` to its end and lets `consume` see it uncompressed, in order; gives what
/// `consume` gave and the digest of the whole uncompressed archive.
///
/// The blob's first bytes decide over how it is compressed; `said` is what its media type says,
/// which builders get wrong, and serves for errors. The digest protects from what matters.
/// Refuses a blob that goes on after its compressed data, and one with more than `limit_bytes`,
/// before or after decompression: also compressed data that never becomes anything has an end.
/// What follows the archive's end marker counts into the digest and is otherwise of no interest,
/// as in every tar reader.
/// Source: containerd and CRI-O look at the first bytes, too.
///
/// # Errors
/// Those of `consume`; `Read`, `Decompress`, `NoFormat`, `TrailingBytes`, `TooLarge`,
/// `Truncated`.
pub fn read<T>(
    blob: impl Read + Send,
    said: Compression,
    algorithm: Algorithm,
    limit_bytes: Option<u64>,
    consume: impl FnOnce(&mut Source) -> Result<T, UnpackError>,
) -> Result<(T, Digest), UnpackError> {
    let mut decode = Decode::open(blob, said, limit_bytes)?;
    let compression = decode.compression;
    let mut first = Block::new();
    let more = decode.fill(&mut first)?;
    let mut hasher = Hasher::new(algorithm);
    if !more {
        decode.end()?;
        hasher.update(first.bytes());
        let mut source = Source::new(compression, Some(Arc::new(first)), None);
        let consumed = consume(&mut source)?;
        source.drain()?;
        return Ok((consumed, hasher.finish()));
    }
    thread::scope(|scope| {
        let (to_archive, archive_blocks) = mpsc::sync_channel(BLOCKS_AHEAD);
        let (to_hash, hash_blocks) = mpsc::sync_channel::<Arc<Block>>(BLOCKS_AHEAD);
        let (spent, returned) = mpsc::channel();
        let hash_spent = spent.clone();
        let cannot = |source| UnpackError::Read { source };
        let hashing = thread::Builder::new()
            .name("layer-hash".into())
            .spawn_scoped(scope, move || {
                for block in hash_blocks {
                    hasher.update(block.bytes());
                    let _ = hash_spent.send(block);
                }
                hasher.finish()
            })
            .map_err(cannot)?;
        thread::Builder::new()
            .name("layer-decode".into())
            .spawn_scoped(scope, move || {
                decode.run(first, &to_archive, &to_hash, &returned);
            })
            .map_err(cannot)?;
        let mut source = Source::new(
            compression,
            None,
            Some(Feed {
                blocks: archive_blocks,
                spent,
            }),
        );
        let consumed = consume(&mut source)?;
        source.drain()?;
        drop(source);
        let digest = hashing.join().map_err(|_| UnpackError::Read {
            source: io::Error::other("the hashing thread panicked"),
        })?;
        Ok((consumed, digest))
    })
}

/// A tar header that says so or whose checksum is right, or the end marker of an empty archive.
fn looks_like_tar(start: &[u8]) -> bool {
    let Some(block) = start.get(..TAR_BLOCK) else {
        return false;
    };
    block[257..262] == *b"ustar" || super::archive::is_header(block)
}

/// Uncompressed bytes.
struct Block {
    buffer: Box<[u8]>,
    length: usize,
}

impl Block {
    fn new() -> Block {
        Block {
            buffer: vec![0; BLOCK_BYTES].into_boxed_slice(),
            length: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

/// The reader the caller gave, remembering whether it was the one that failed.
struct Tap<R> {
    reader: R,
    failed: Arc<AtomicBool>,
    /// What may still come, in bytes.
    left: u64,
    /// More came.
    too_large: Arc<AtomicBool>,
}

impl<R: Read> Read for Tap<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                Ok(count) => {
                    let Some(left) = self.left.checked_sub(count as u64) else {
                        self.too_large.store(true, Ordering::Relaxed);
                        return Err(io::Error::other("the blob is too large"));
                    };
                    self.left = left;
                    return Ok(count);
                }
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

/// The producing end.
struct Decode<R: Read> {
    decoder: Decoder<R>,
    compression: Compression,
    failed: Arc<AtomicBool>,
    too_large: Arc<AtomicBool>,
    produced: u64,
    limit_bytes: Option<u64>,
}

impl<R: Read> Decode<R> {
    fn open(
        reader: R,
        said: Compression,
        limit_bytes: Option<u64>,
    ) -> Result<Decode<R>, UnpackError> {
        let (failed, too_large) = (Arc::default(), Arc::default());
        let mut tap = Tap {
            reader,
            failed: Arc::clone(&failed),
            left: limit_bytes.map_or(u64::MAX, |limit| limit.saturating_add(INPUT_SLACK)),
            too_large: Arc::clone(&too_large),
        };
        let mut start = Vec::with_capacity(TAR_BLOCK);
        (&mut tap)
            .take(TAR_BLOCK as u64)
            .read_to_end(&mut start)
            .map_err(|source| UnpackError::Read { source })?;
        let compression = Compression::of_magic(&start);
        if compression == Compression::None && said != Compression::None {
            if start.is_empty() {
                return Err(UnpackError::Truncated { offset: 0 });
            }
            if !looks_like_tar(&start) {
                return Err(UnpackError::NoFormat { said });
            }
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
        Ok(Decode {
            decoder,
            compression,
            failed,
            too_large,
            produced: 0,
            limit_bytes,
        })
    }

    /// Fills `block` as far as there is something; `false` at the end of the archive. On an
    /// error `block` has what came before it.
    fn fill(&mut self, block: &mut Block) -> Result<bool, UnpackError> {
        block.length = 0;
        while block.length < block.buffer.len() {
            let room = &mut block.buffer[block.length..];
            let read = match &mut self.decoder {
                Decoder::Plain(reader) => reader.read(room),
                Decoder::Gzip(reader) => reader.read(room),
                Decoder::Zstd(reader) => reader.read(room),
            };
            let count = match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.failure(source)),
                Ok(0) => return Ok(false),
                Ok(count) => count,
            };
            block.length += count;
            self.produced += count as u64;
            if let Some(limit_bytes) = self.limit_bytes
                && self.produced > limit_bytes
            {
                return Err(UnpackError::TooLarge { limit_bytes });
            }
        }
        Ok(true)
    }

    /// The decoders stop where their format ends; the blob must end there too, and only its
    /// reader's own end says that the compressed digest was right.
    fn end(&mut self) -> Result<(), UnpackError> {
        let rest = match &mut self.decoder {
            Decoder::Plain(input) => input.fill_buf().map(<[u8]>::len),
            Decoder::Gzip(decoder) => decoder.get_mut().fill_buf().map(<[u8]>::len),
            Decoder::Zstd(decoder) => decoder.get_mut().fill_buf().map(<[u8]>::len),
        };
        match rest {
            Ok(0) => Ok(()),
            Ok(_) => Err(UnpackError::TrailingBytes {
                compression: self.compression,
            }),
            Err(source) => Err(self.failure(source)),
        }
    }

    fn failure(&self, source: io::Error) -> UnpackError {
        if let Some(limit_bytes) = self.limit_bytes
            && self.too_large.load(Ordering::Relaxed)
        {
            return UnpackError::TooLarge { limit_bytes };
        }
        if self.failed.load(Ordering::Relaxed) {
            return UnpackError::Read { source };
        }
        UnpackError::Decompress {
            compression: self.compression,
            source,
        }
    }

    /// Passes on `first` and everything after it, until the end, an error, or until the archive
    /// is no longer listened to.
    fn run(
        mut self,
        first: Block,
        to_archive: &SyncSender<Result<Arc<Block>, UnpackError>>,
        to_hash: &SyncSender<Arc<Block>>,
        returned: &Receiver<Arc<Block>>,
    ) {
        let send = |block: Block| {
            let block = Arc::new(block);
            to_hash.send(Arc::clone(&block)).is_ok() && to_archive.send(Ok(block)).is_ok()
        };
        if !send(first) {
            return;
        }
        loop {
            // Both consumers give each block back; the second to do so is its last owner.
            let mut block = returned
                .try_iter()
                .find_map(Arc::into_inner)
                .unwrap_or_else(Block::new);
            let filled = self.fill(&mut block);
            if block.length > 0 && !send(block) {
                return;
            }
            let ended = match filled {
                Ok(true) => continue,
                Ok(false) => self.end(),
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                let _ = to_archive.send(Err(error));
            }
            return;
        }
    }
}

struct Feed {
    blocks: Receiver<Result<Arc<Block>, UnpackError>>,
    spent: Sender<Arc<Block>>,
}

/// A layer's archive, uncompressed: the consuming end.
pub struct Source {
    compression: Compression,
    feed: Option<Feed>,
    block: Option<Arc<Block>>,
    start: usize,
    position: u64,
    recipe: Option<Rc<RefCell<recipe::Writer>>>,
}

impl Source {
    fn new(compression: Compression, block: Option<Arc<Block>>, feed: Option<Feed>) -> Source {
        Source {
            compression,
            feed,
            block,
            start: 0,
            position: 0,
            recipe: None,
        }
    }

    /// From now on what is not a file's data is written down there.
    pub fn record(&mut self, recipe: Rc<RefCell<recipe::Writer>>) {
        self.recipe = Some(recipe);
    }

    /// How the blob is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// How many uncompressed bytes were consumed.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next bytes, at least one but at the end of the archive.
    pub fn fill(&mut self) -> Result<&[u8], UnpackError> {
        while self
            .block
            .as_ref()
            .is_none_or(|block| self.start == block.length)
        {
            let Some(feed) = &self.feed else {
                return Ok(&[]);
            };
            if let Some(block) = self.block.take() {
                let _ = feed.spent.send(block);
            }
            match feed.blocks.recv() {
                Ok(block) => self.block = Some(block?),
                // The producer has come to the end.
                Err(_) => return Ok(&[]),
            }
            self.start = 0;
        }
        let block = self.block.as_ref().map_or(&[][..], |block| block.bytes());
        Ok(&block[self.start..])
    }

    fn take(&mut self, count: usize, is_data: bool) {
        if !is_data && let (Some(recipe), Some(block)) = (&self.recipe, &self.block) {
            let bytes = &block.bytes()[self.start..self.start + count];
            recipe.borrow_mut().raw(bytes);
        }
        self.start += count;
        self.position += count as u64;
    }

    /// Takes `count` of the bytes [`Source::fill`] showed, which are a file's data.
    pub fn consume_data(&mut self, count: usize) {
        self.take(count, true);
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
            self.take(count, false);
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
            self.take(now as usize, false);
            count -= now;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), UnpackError> {
        loop {
            let count = self.fill()?.len();
            if count == 0 {
                return Ok(());
            }
            self.take(count, false);
        }
    }
}
