//! How a layer's archive is put together again from the layer's files, and what each file's
//! content must be.
//!
//! ```text
//! zstd frame, with its checksum, of records:
//!   R <u32 length> <bytes>                            bytes of the archive: headers, padding
//!   F <u16 length> <path> <u64 size> <u32 crc32>      here comes a file's content
//!   C <u16 length> <path> <u64 size> <u32 crc32>      a file copied from the parent layers:
//!                                                     it is in the layer, not in the archive
//! ```
//! Numbers are little-endian; paths are of the layer, without symbolic links. With all of `R`
//! and `F` in order the archive is whole, and its digest is the layer's diff ID. Where one entry
//! of the archive replaced another (`exact` is false) there are only `F`s, of what is there.
//!
//! The checksum of one file is there to name the one that is damaged; that all is well is for
//! the diff ID to say.

use rustix::io::Errno;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};

/// Bytes of one `R` record at most.
const RAW_BYTES: usize = 64 << 10;
/// Bytes of an `R` record before its content.
const RAW_HEAD: usize = 5;
/// zstd's level: headers are so repetitive that the cheapest takes a hundredth of them.
const LEVEL: i32 = 1;
/// A path is at most a directory's, a slash and a name.
const MAX_PATH_BYTES: usize = 4096 + 1 + 255;

/// What one file's content must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileNote {
    /// From the layer's root, without symbolic links.
    pub path: Vec<u8>,
    /// Bytes.
    pub size: u64,
    /// CRC-32 of the content.
    pub crc32: u32,
}

/// One step of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Bytes of the archive.
    Raw(Vec<u8>),
    /// The content of a file.
    File(FileNote),
    /// A file that is in the layer and not in its archive.
    Copied(FileNote),
}

/// Writes a recipe. What goes wrong is told by [`Writer::finish`].
pub struct Writer {
    out: zstd::stream::write::Encoder<'static, File>,
    /// Records not yet compressed: the encoder is asked for many at once.
    pending: Vec<u8>,
    /// Where in `pending` the `R` record begins that is being added to.
    raw_at: Option<usize>,
    failed: Option<io::Error>,
}

impl Writer {
    /// Into `file`, from its beginning.
    ///
    /// # Errors
    /// The encoder's.
    pub fn new(file: File) -> io::Result<Writer> {
        let mut out = zstd::stream::write::Encoder::new(file, LEVEL)?;
        out.include_checksum(true)?;
        Ok(Writer {
            out,
            pending: Vec::with_capacity(2 * RAW_BYTES),
            raw_at: None,
            failed: None,
        })
    }

    /// The archive goes on with `bytes`.
    pub fn raw(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(RAW_BYTES) {
            let length = self
                .raw_at
                .map_or(0, |at| self.pending.len() - at - RAW_HEAD);
            if length + part.len() > RAW_BYTES {
                self.end_record();
            }
            if self.raw_at.is_none() {
                self.raw_at = Some(self.pending.len());
                self.pending.extend_from_slice(b"R\0\0\0\0");
            }
            self.pending.extend_from_slice(part);
        }
    }

    /// The archive goes on with a file's content.
    pub fn file(&mut self, note: &FileNote) {
        self.note(b'F', note);
    }

    /// A file was copied from the parents.
    pub fn copied(&mut self, note: &FileNote) {
        self.note(b'C', note);
    }

    fn note(&mut self, kind: u8, note: &FileNote) {
        self.end_record();
        let length = note.path.len().min(MAX_PATH_BYTES) as u16;
        let record = &mut self.pending;
        record.push(kind);
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&note.path[..usize::from(length)]);
        record.extend_from_slice(&note.size.to_le_bytes());
        record.extend_from_slice(&note.crc32.to_le_bytes());
    }

    /// Closes an open `R` record, and compresses what has gathered.
    fn end_record(&mut self) {
        if let Some(at) = self.raw_at.take() {
            let length = (self.pending.len() - at - RAW_HEAD) as u32;
            self.pending[at + 1..at + RAW_HEAD].copy_from_slice(&length.to_le_bytes());
        }
        if self.pending.len() >= RAW_BYTES {
            self.compress();
        }
    }

    fn compress(&mut self) {
        if self.failed.is_none()
            && let Err(error) = self.out.write_all(&self.pending)
        {
            self.failed = Some(error);
        }
        self.pending.clear();
    }

    /// Ends the recipe; all of it is in the file then.
    ///
    /// # Errors
    /// The first that any write met.
    pub fn finish(mut self) -> io::Result<()> {
        self.end_record();
        self.compress();
        match self.failed {
            Some(error) => Err(error),
            None => self.out.finish().map(drop),
        }
    }
}

/// Reads a recipe, step by step. Memory is bounded whatever the file holds.
pub struct Reader<R: Read> {
    from: zstd::stream::read::Decoder<'static, BufReader<R>>,
}

impl<R: Read> Reader<R> {
    /// Of what [`Writer`] wrote.
    ///
    /// # Errors
    /// The decoder's.
    pub fn new(from: R) -> io::Result<Reader<R>> {
        Ok(Reader {
            from: zstd::stream::read::Decoder::new(from)?,
        })
    }

    /// The next step; `None` at the end.
    ///
    /// # Errors
    /// `InvalidData` and `UnexpectedEof` where it is damaged.
    pub fn next_step(&mut self) -> io::Result<Option<Step>> {
        let mut kind = [0];
        if self.from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        match kind[0] {
            b'R' => {
                let mut length = [0; 4];
                self.from.read_exact(&mut length)?;
                let length = u32::from_le_bytes(length) as usize;
                if length > RAW_BYTES {
                    return Err(bad("a record of the recipe is too long"));
                }
                let mut bytes = vec![0; length];
                self.from.read_exact(&mut bytes)?;
                Ok(Some(Step::Raw(bytes)))
            }
            kind @ (b'F' | b'C') => {
                let mut length = [0; 2];
                self.from.read_exact(&mut length)?;
                let length = usize::from(u16::from_le_bytes(length));
                if length > MAX_PATH_BYTES {
                    return Err(bad("a path of the recipe is too long"));
                }
                let mut path = vec![0; length];
                self.from.read_exact(&mut path)?;
                let (mut size, mut crc32) = ([0; 8], [0; 4]);
                self.from.read_exact(&mut size)?;
                self.from.read_exact(&mut crc32)?;
                let note = FileNote {
                    path,
                    size: u64::from_le_bytes(size),
                    crc32: u32::from_le_bytes(crc32),
                };
                Ok(Some(if kind == b'F' {
                    Step::File(note)
                } else {
                    Step::Copied(note)
                }))
            }
            _ => Err(bad("a record of the recipe is of no known kind")),
        }
    }
}

/// What the kernel said, of a failed write.
pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek as _;

    fn written(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = Writer::new(file.try_clone().unwrap()).unwrap();
        write(&mut writer);
        writer.finish().unwrap();
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn steps(bytes: &[u8]) -> io::Result<Vec<Step>> {
        let mut reader = Reader::new(bytes)?;
        let mut steps = Vec::new();
        while let Some(step) = reader.next_step()? {
            steps.push(step);
        }
        Ok(steps)
    }

    #[test]
    fn a_recipe_is_read_as_it_was_written() {
        let note = FileNote {
            path: b"a/b".to_vec(),
            size: 7,
            crc32: 9,
        };
        let long = vec![7; RAW_BYTES + 10];
        let bytes = written(|writer| {
            writer.raw(b"head");
            writer.raw(b"er");
            writer.file(&note);
            writer.copied(&note);
            writer.raw(&long);
        });
        let found = steps(&bytes).unwrap();
        assert_eq!(found[0], Step::Raw(b"header".to_vec()));
        assert_eq!(found[1..3], [Step::File(note.clone()), Step::Copied(note)]);
        let rest: usize = found[3..]
            .iter()
            .map(|step| match step {
                Step::Raw(bytes) => bytes.len(),
                other => panic!("{other:?}"),
            })
            .sum();
        assert_eq!(rest, long.len());
    }

    #[test]
    fn a_damaged_recipe_is_noticed() {
        let bytes = written(|writer| writer.raw(&[3; 1000]));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            if let Ok(found) = steps(&damaged) {
                // A bit that means nothing, in the frame's header.
                assert_eq!(found, steps(&bytes).unwrap(), "byte {at}");
            }
        }
        for length in 1..bytes.len() {
            steps(&bytes[..length]).unwrap_err();
        }
    }
}
