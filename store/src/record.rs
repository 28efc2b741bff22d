//! One checksummed, versioned record per file.
//!
//! ```text
//! berth-record 1 <kind> <version> <payload bytes> <crc32 of the payload, 8 hex digits>\n
//! <payload: one JSON object>
//! ```
//!
//! The first number is this format's version, the second the payload's. A
//! damaged record is an error that names the file and costs nothing but itself.

use crate::atomic_file::{self, Durability};
use serde::{Serialize, de::DeserializeOwned};
use std::io;
use std::path::{Path, PathBuf};

const FORMAT: u32 = 1;

/// Largest record that is read, in bytes: container records hold their whole
/// CRI configuration, which gRPC bounds at 16 MiB.
const MAX_RECORD_BYTES: u64 = 32 << 20;

/// Something that is kept as a record.
///
/// `VERSION` grows when a field changes its meaning or goes away; fields that
/// are only added have a serde default and leave it alone.
pub trait Record: Serialize + DeserializeOwned {
    /// What the record is, one word; a file of another kind is refused.
    const KIND: &'static str;
    /// The payload's version; newer ones are refused, older ones migrated by
    /// [`Record::migrate`].
    const VERSION: u32;

    /// Turns the JSON of an older version into today's.
    ///
    /// # Errors
    /// A sentence on why that version cannot be read.
    fn migrate(version: u32, _payload: serde_json::Value) -> Result<serde_json::Value, String> {
        Err(format!("no migration from version {version}"))
    }
}

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("cannot {action} the record {path}")]
    Io {
        /// "read", "write", "remove".
        action: &'static str,
        /// The record's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("the record {path} is damaged: {why}")]
    Damaged {
        /// The record's file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Written by a later Berth.
    #[error("the record {path} has version {found}, this Berth reads up to {known}")]
    TooNew {
        /// The record's file.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
}

impl RecordError {
    /// True when the file is simply not there.
    pub fn is_absent(&self) -> bool {
        matches!(self, RecordError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// The bytes of a record's file.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>, serde_json::Error> {
    let payload = serde_json::to_vec(record)?;
    let crc = crc32fast::hash(&payload);
    let mut bytes = format!(
        "berth-record {FORMAT} {} {} {} {crc:08x}\n",
        R::KIND,
        R::VERSION,
        payload.len()
    )
    .into_bytes();
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// Parses what [`encode`] made. `path` is only for the error.
///
/// # Errors
/// `Damaged` for anything but a whole record of kind `R`, `TooNew` for a later version.
pub fn decode<R: Record>(path: &Path, bytes: &[u8]) -> Result<R, RecordError> {
    let damaged = |why: &str| RecordError::Damaged {
        path: path.into(),
        why: why.into(),
    };
    let line = bytes
        .iter()
        .position(|&b| b == b'\n')
        .ok_or_else(|| damaged("no header line"))?;
    let header = std::str::from_utf8(&bytes[..line]).map_err(|_| damaged("no header line"))?;
    let payload = &bytes[line + 1..];
    let fields: Vec<&str> = header.split(' ').collect();
    let ["berth-record", format, kind, version, length, crc] = fields[..] else {
        return Err(damaged("not a berth record"));
    };
    let number = |text: &str| {
        text.parse::<u32>()
            .map_err(|_| damaged("a header field is no number"))
    };
    if number(format)? > FORMAT {
        return Err(RecordError::TooNew {
            path: path.into(),
            found: number(format)?,
            known: FORMAT,
        });
    }
    if kind != R::KIND {
        return Err(damaged(&format!(
            "it is a {kind} record, not a {} record",
            R::KIND
        )));
    }
    if length.parse() != Ok(payload.len()) {
        return Err(damaged(&format!(
            "{length} bytes announced, {} there",
            payload.len()
        )));
    }
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(payload)) {
        return Err(damaged("the checksum does not match"));
    }
    let version = number(version)?;
    if version > R::VERSION {
        return Err(RecordError::TooNew {
            path: path.into(),
            found: version,
            known: R::VERSION,
        });
    }
    if version == R::VERSION {
        return serde_json::from_slice(payload).map_err(|error| damaged(&error.to_string()));
    }
    let old = serde_json::from_slice(payload).map_err(|error| damaged(&error.to_string()))?;
    let new = R::migrate(version, old).map_err(|why| damaged(&why))?;
    serde_json::from_value(new).map_err(|error| damaged(&error.to_string()))
}

/// Writes `record` to `path`, atomically.
///
/// # Errors
/// `Io` with the old record still in place.
pub fn save<R: Record>(path: &Path, record: &R, durability: Durability) -> Result<(), RecordError> {
    let io = |source| RecordError::Io {
        action: "write",
        path: path.into(),
        source,
    };
    let bytes = encode(record).map_err(|error| io(error.into()))?;
    atomic_file::replace(path, &bytes, durability).map_err(io)
}

/// Reads the record at `path`.
///
/// # Errors
/// `Io` (see [`RecordError::is_absent`]), `Damaged` or `TooNew`.
pub fn load<R: Record>(path: &Path) -> Result<R, RecordError> {
    let io = |source| RecordError::Io {
        action: "read",
        path: path.into(),
        source,
    };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > MAX_RECORD_BYTES {
        return Err(RecordError::Damaged {
            path: path.into(),
            why: format!("{length} bytes long"),
        });
    }
    decode(path, &std::fs::read(path).map_err(io)?)
}

/// Removes the record at `path`; one that is gone counts as removed.
///
/// # Errors
/// `Io` where the kernel refuses.
pub fn remove(path: &Path, durability: Durability) -> Result<(), RecordError> {
    atomic_file::remove(path, durability).map_err(|source| RecordError::Io {
        action: "remove",
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pod {
        name: String,
    }
    impl Record for Pod {
        const KIND: &'static str = "pod";
        const VERSION: u32 = 2;
        fn migrate(
            version: u32,
            mut payload: serde_json::Value,
        ) -> Result<serde_json::Value, String> {
            if version != 1 {
                return Err(format!("no version {version} ever was"));
            }
            payload["name"] = payload["title"].take();
            Ok(payload)
        }
    }

    fn pod() -> Pod {
        Pod { name: "web".into() }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.rec");
        save(&path, &pod(), Durability::PowerCut).unwrap();
        assert_eq!(load::<Pod>(&path).unwrap(), pod());
        remove(&path, Durability::PowerCut).unwrap();
        assert!(load::<Pod>(&path).unwrap_err().is_absent());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let good = encode(&pod()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            if let Ok(read) = decode::<Pod>(Path::new("x"), &bad) {
                // The case of a hex digit is the only thing that may differ.
                assert_eq!(read, pod(), "flipped byte {at}");
            }
            assert!(
                decode::<Pod>(Path::new("x"), &good[..at]).is_err(),
                "cut at {at}"
            );
        }
    }

    #[test]
    fn a_later_version_is_refused_and_an_older_one_migrated() {
        let with = |version: u32, payload: &str| {
            let crc = crc32fast::hash(payload.as_bytes());
            format!(
                "berth-record 1 pod {version} {} {crc:08x}\n{payload}",
                payload.len()
            )
        };
        let newer = with(3, r#"{"name":"web"}"#);
        assert!(matches!(
            decode::<Pod>(Path::new("x"), newer.as_bytes()),
            Err(RecordError::TooNew {
                found: 3,
                known: 2,
                ..
            })
        ));
        let older = with(1, r#"{"title":"web"}"#);
        assert_eq!(
            decode::<Pod>(Path::new("x"), older.as_bytes()).unwrap(),
            pod()
        );
        let oldest = with(0, "{}");
        assert!(decode::<Pod>(Path::new("x"), oldest.as_bytes()).is_err());
    }
}
