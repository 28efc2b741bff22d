//! Tar archives: v7, ustar, GNU and PAX, one entry after the other.
//!
//! ```text
//! [x or g header, records][L or K header, name] header data, padded to 512 ... 0 0
//! ```
//!
//! Nothing here touches a file system. Memory is bounded by
//! [`MAX_EXTENSION_BYTES`], however long the archive.
//! Source: POSIX.1-2017, `pax`, "ustar Interchange Format" and "pax Extended
//! Header"; GNU tar manual, "Basic Tar Format" and "Extensions".

use super::UnpackError;
use super::stream::Source;

const BLOCK: usize = 512;

/// Bounds one PAX header, one GNU long name and all global PAX records
/// together: 1 MiB, room for sixteen of the largest xattrs the kernel takes.
pub const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Longest path of an entry, in bytes. Source: limits.h, PATH_MAX.
pub const MAX_PATH_BYTES: usize = 4096;
/// Largest value of an xattr, in bytes. Source: linux/limits.h, XATTR_SIZE_MAX.
pub const MAX_XATTR_BYTES: usize = 64 << 10;
/// Longest name of an xattr, in bytes. Source: linux/limits.h, XATTR_NAME_MAX.
pub const MAX_XATTR_NAME_BYTES: usize = 255;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with data.
    File,
    /// Another name of an earlier file.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
}

/// A point in time as archives have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// 0 to 999,999,999, always counted forward.
    pub nanoseconds: u32,
}

/// One entry, all extensions applied.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As the archive says it: not checked, not normalised.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a symbolic or hard link, else empty.
    pub link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data that follow.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// `SCHILY.xattr.` records keep their prefix; the rest are as POSIX names them.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// Reads entries; after each, its data must be read or skipped by [`Archive::data`].
pub struct Archive<'s> {
    source: &'s mut Source,
    globals: Records,
    /// Bytes of data of the last entry not yet taken, and padding behind them.
    remaining: u64,
    padding: u64,
}

impl<'s> Archive<'s> {
    /// An archive whose first header is the source's next bytes.
    pub fn new(source: &'s mut Source) -> Archive<'s> {
        Archive {
            source,
            globals: Vec::new(),
            remaining: 0,
            padding: 0,
        }
    }

    /// The next entry, or `None` at the end of the archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, UnpackError> {
        self.skip_data()?;
        let mut long_path = None;
        let mut long_link = None;
        let mut records = Records::new();
        let mut pending = false;
        loop {
            let offset = self.source.position();
            let mut block = [0; BLOCK];
            // Archives without an end marker exist; the digest says whether one is whole.
            if !self.source.read_exact(&mut block)? || block.iter().all(|&b| b == 0) {
                if pending {
                    return Err(UnpackError::Truncated { offset });
                }
                return Ok(None);
            }
            let header = Header {
                block: &block,
                offset,
            };
            header.verify_checksum()?;
            let size = header.number(124, 12, "size")?;
            let size = u64::try_from(size).map_err(|_| header.bad("size is negative"))?;
            match header.block[156] {
                b'x' | b'X' => {
                    records = parse_records(&self.extension(size, offset)?, offset)?;
                    pending = true;
                }
                b'g' => {
                    let bytes = self.extension(size, offset)?;
                    self.merge_globals(parse_records(&bytes, offset)?, offset)?;
                }
                b'L' => {
                    long_path = Some(until_nul(&self.extension(size, offset)?).to_vec());
                    pending = true;
                }
                b'K' => {
                    long_link = Some(until_nul(&self.extension(size, offset)?).to_vec());
                    pending = true;
                }
                // A volume label names the archive, nothing in it.
                b'V' => self.source.skip(padded(size, &header)?)?,
                _ => {
                    let entry = self.entry(&header, size, long_path, long_link, records)?;
                    self.remaining = entry.size;
                    self.padding = padded(entry.size, &header)? - entry.size;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The next bytes of the entry's data; empty at its end.
    pub fn data(&mut self) -> Result<&[u8], UnpackError> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let offset = self.source.position();
        let bytes = self.source.fill()?;
        if bytes.is_empty() {
            return Err(UnpackError::Truncated { offset });
        }
        let count = usize::try_from(self.remaining).map_or(bytes.len(), |r| r.min(bytes.len()));
        Ok(&bytes[..count])
    }

    /// Takes `count` of the bytes [`Archive::data`] showed.
    pub fn consume(&mut self, count: usize) {
        self.remaining -= count as u64;
        self.source.consume_data(count);
    }

    fn skip_data(&mut self) -> Result<(), UnpackError> {
        self.source.skip(self.remaining)?;
        self.source.skip(self.padding)?;
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    fn extension(&mut self, size: u64, offset: u64) -> Result<Vec<u8>, UnpackError> {
        if size > MAX_EXTENSION_BYTES {
            return Err(UnpackError::Header {
                offset,
                why: format!("an extended header of {size} bytes, over {MAX_EXTENSION_BYTES}"),
            });
        }
        let mut bytes = vec![0; size as usize];
        if !bytes.is_empty() && !self.source.read_exact(&mut bytes)? {
            return Err(UnpackError::Truncated { offset });
        }
        self.source
            .skip(size.next_multiple_of(BLOCK as u64) - size)?;
        Ok(bytes)
    }

    fn merge_globals(&mut self, records: Records, offset: u64) -> Result<(), UnpackError> {
        for (key, value) in records {
            self.globals.retain(|(known, _)| *known != key);
            if !value.is_empty() {
                self.globals.push((key, value));
            }
        }
        let total: usize = self.globals.iter().map(|(k, v)| k.len() + v.len()).sum();
        if total as u64 > MAX_EXTENSION_BYTES {
            return Err(UnpackError::Header {
                offset,
                why: format!("global PAX records of {total} bytes, over {MAX_EXTENSION_BYTES}"),
            });
        }
        Ok(())
    }

    fn entry(
        &self,
        header: &Header<'_>,
        size: u64,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        records: Records,
    ) -> Result<Entry, UnpackError> {
        let unsupported = |what: &str| UnpackError::Unsupported {
            entry: super::shown(&header.path()),
            what: what.to_owned(),
        };
        let kind = match header.block[156] {
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(unsupported("a sparse file")),
            other => {
                return Err(unsupported(&format!(
                    "an entry of type {:?}",
                    char::from(other)
                )));
            }
        };
        let mut entry = Entry {
            path: long_path.unwrap_or_else(|| header.path()),
            kind,
            link: match kind {
                Kind::HardLink | Kind::Symlink => {
                    long_link.unwrap_or_else(|| until_nul(&header.block[157..257]).to_vec())
                }
                _ => Vec::new(),
            },
            mode: (header.number(100, 8, "mode")? & 0o7777) as u32,
            uid: 0,
            gid: 0,
            size,
            mtime: Time::default(),
            device: (0, 0),
            xattrs: Vec::new(),
        };
        let mut uid = None;
        let mut gid = None;
        let mut mtime = None;
        for (key, value) in self.globals.iter().chain(&records) {
            let number = || parse_decimal(value).ok_or_else(|| header.bad_record(key));
            match key.as_slice() {
                _ if value.is_empty() && !key.starts_with(XATTR) => {}
                b"path" => entry.path = value.clone(),
                b"linkpath" if !entry.link.is_empty() || is_link(kind) => {
                    entry.link = value.clone();
                }
                b"size" => entry.size = number()?,
                b"uid" => uid = Some(number()?),
                b"gid" => gid = Some(number()?),
                b"mtime" => {
                    mtime = Some(parse_time(value).ok_or_else(|| header.bad_record(key))?);
                }
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(unsupported("a sparse file"));
                }
                _ if key.starts_with(XATTR) => {
                    let name = &key[XATTR.len()..];
                    let fits = (1..=MAX_XATTR_NAME_BYTES).contains(&name.len())
                        && value.len() <= MAX_XATTR_BYTES
                        && !name.contains(&0);
                    if !fits {
                        return Err(UnpackError::Xattr {
                            entry: super::shown(&entry.path),
                            name: super::shown(name),
                        });
                    }
                    entry.xattrs.retain(|(known, _)| known != name);
                    entry.xattrs.push((name.to_vec(), value.clone()));
                }
                _ => {}
            }
        }
        let id = |record: Option<u64>, at, what: &'static str| {
            let id = match record {
                Some(id) => i128::from(id),
                None => i128::from(header.number(at, 8, what)?),
            };
            // The largest u32 means "leave it" to chown(2).
            u32::try_from(id)
                .ok()
                .filter(|&id| id != u32::MAX)
                .ok_or_else(|| header.bad(&format!("{what} {id} is out of range")))
        };
        entry.uid = id(uid, 108, "uid")?;
        entry.gid = id(gid, 116, "gid")?;
        entry.mtime = match mtime {
            Some(time) => time,
            None => Time {
                seconds: header.number(136, 12, "mtime")?,
                nanoseconds: 0,
            },
        };
        match kind {
            // The v7 way to say "directory", still written by some.
            Kind::File if entry.path.ends_with(b"/") => entry.kind = Kind::Directory,
            Kind::File => {}
            Kind::CharDevice | Kind::BlockDevice => {
                let part = |at, what: &str| {
                    u32::try_from(header.number(at, 8, what)?)
                        .map_err(|_| header.bad(&format!("{what} is out of range")))
                };
                entry.device = (part(329, "device major")?, part(337, "device minor")?);
                entry.size = 0;
            }
            // No data follows these, whatever the size says: GNU tar and Go agree.
            Kind::HardLink | Kind::Symlink | Kind::Directory | Kind::Fifo => entry.size = 0,
        }
        Ok(entry)
    }
}

const XATTR: &[u8] = b"SCHILY.xattr.";

fn is_link(kind: Kind) -> bool {
    matches!(kind, Kind::HardLink | Kind::Symlink)
}

fn padded(size: u64, header: &Header<'_>) -> Result<u64, UnpackError> {
    size.checked_next_multiple_of(BLOCK as u64)
        .filter(|&padded| i64::try_from(padded).is_ok())
        .ok_or_else(|| header.bad(&format!("size {size} is out of range")))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes
        .iter()
        .position(|&b| b == 0)
        .map_or(bytes, |end| &bytes[..end])
}

/// Whether a block is a header, or one of the end marker.
pub(super) fn is_header(block: &[u8]) -> bool {
    <&[u8; BLOCK]>::try_from(block).is_ok_and(|block| {
        let header = Header { block, offset: 0 };
        block.iter().all(|&b| b == 0) || header.verify_checksum().is_ok()
    })
}

struct Header<'a> {
    block: &'a [u8; BLOCK],
    offset: u64,
}

impl Header<'_> {
    fn bad(&self, why: &str) -> UnpackError {
        UnpackError::Header {
            offset: self.offset,
            why: why.into(),
        }
    }

    fn bad_record(&self, key: &[u8]) -> UnpackError {
        self.bad(&format!(
            "the PAX record {} has no valid value",
            super::shown(key)
        ))
    }

    fn verify_checksum(&self) -> Result<(), UnpackError> {
        let stored = self.number(148, 8, "checksum")?;
        let bytes = || {
            let spaces = std::iter::repeat_n(b' ', 8);
            self.block[..148]
                .iter()
                .copied()
                .chain(spaces)
                .chain(self.block[156..].iter().copied())
        };
        let unsigned: i64 = bytes().map(i64::from).sum();
        if stored == unsigned {
            return Ok(());
        }
        // Some old systems summed signed bytes.
        let signed: i64 = bytes().map(|b| i64::from(b as i8)).sum();
        if stored == signed {
            return Ok(());
        }
        Err(self.bad("the header's checksum is wrong"))
    }

    /// The path in the header itself.
    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.block[..100]);
        let prefix = until_nul(&self.block[345..500]);
        // GNU headers, "ustar  ", have times where ustar has the prefix.
        if &self.block[257..263] != b"ustar\0" || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    /// An octal or base-256 number.
    fn number(&self, at: usize, len: usize, what: &str) -> Result<i64, UnpackError> {
        let field = &self.block[at..at + len];
        parse_number(field).ok_or_else(|| self.bad(&format!("{what} is not a number")))
    }
}

/// A header's number: octal digits between spaces and NULs, or GNU's base 256
/// with the top bit set, two's complement. Empty is 0.
fn parse_number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The bit below the marker is the sign.
        let negative = first & 0x40 != 0;
        let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        let mut value = start;
        for &byte in rest {
            value = value.checked_mul(256)? + i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let text = until_nul(field).trim_ascii();
    if text.is_empty() {
        return Some(0);
    }
    text.iter().try_fold(0i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

fn parse_decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A PAX time: decimal seconds, perhaps negative, perhaps with a fraction, of
/// which nanoseconds are kept. `-1.5` is a second and a half before 1970.
fn parse_time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|&b| b == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(parse_decimal(whole)?).ok()?;
    let nanoseconds = (0..9).fold(0, |value, place| {
        value * 10 + u32::from(fraction.get(place).map_or(0, |b| b - b'0'))
    });
    Some(match (negative, nanoseconds) {
        (false, _) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds: 0,
        },
        (true, _) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

/// PAX records: `<length> <key>=<value>\n`, where the length counts all of it
/// and the value may hold any byte.
fn parse_records(mut bytes: &[u8], offset: u64) -> Result<Records, UnpackError> {
    let bad = || UnpackError::Header {
        offset,
        why: "a malformed PAX record".into(),
    };
    let mut records = Records::new();
    // Some writers pad the records with NULs.
    while !bytes.is_empty() && !bytes.iter().all(|&b| b == 0) {
        let space = bytes
            .iter()
            .take(20)
            .position(|&b| b == b' ')
            .ok_or_else(bad)?;
        let length = parse_decimal(&bytes[..space])
            .and_then(|length| usize::try_from(length).ok())
            .filter(|&length| length > space + 1 && length <= bytes.len())
            .ok_or_else(bad)?;
        let record = bytes[space + 1..length]
            .strip_suffix(b"\n")
            .ok_or_else(bad)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.is_empty() {
            return Err(bad());
        }
        records.push((key.to_vec(), value.to_vec()));
        bytes = &bytes[length..];
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(parse_number(b"0000644\0"), Some(0o644));
        assert_eq!(parse_number(b"   644 \0"), Some(0o644));
        assert_eq!(parse_number(b"77777777"), Some(0o77777777));
        assert_eq!(parse_number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(parse_number(b"\x80\0\0\0\0\0\x01\0"), Some(256));
        assert_eq!(parse_number(&[0xff; 12]), Some(-1));
        assert_eq!(parse_number(b"0000648\0"), None);
        assert_eq!(parse_number(b"-000644\0"), None);
        assert_eq!(
            parse_number(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
            None
        );
    }

    #[test]
    fn times_count_nanoseconds_forward() {
        let time = |text: &str| parse_time(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time("1.5"), Some((1, 500_000_000)));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("1.0000000019"), Some((1, 1)));
        assert_eq!(time("-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        for bad in ["", "-", "x", "1.x", "1e3", "99999999999999999999", ".5"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn record_values_may_hold_newlines() {
        let records = parse_records(b"8 a=b\nc\n6 d=e\n\0\0", 0).unwrap();
        assert_eq!(
            records,
            [
                (b"a".to_vec(), b"b\nc".to_vec()),
                (b"d".to_vec(), b"e".to_vec())
            ]
        );
        for bad in [
            &b"9 a=b\nc\n"[..],
            b"7 a=b\nc\n",
            b"0 a=b\n",
            b"x a=b\n",
            b"6 abc\n",
            b"5 =b\n",
            b"99999999999999999999 a=b\n",
            b"6 a=b\n\0x",
        ] {
            parse_records(bad, 0).unwrap_err();
        }
    }
}
