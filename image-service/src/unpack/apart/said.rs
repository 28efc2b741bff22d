//! What a writer answers: errors that are the same on the other side.

use super::super::{Compression, Summary, UnpackError};
use super::ApartError;
use crate::digest::Digest;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The whole answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    Done { summary: Summary, digest: Digest },
    Failed(Said),
}

/// An [`UnpackError`] on its way.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    Enter {
        path: PathBuf,
        errno: i32,
    },
    Handed,
    /// The layer's files could not be read back for the recipe.
    Notes {
        errno: i32,
    },
    Read(SaidIo),
    Decompress {
        compression: Compression,
        source: SaidIo,
    },
    NoFormat {
        said: Compression,
    },
    TrailingBytes {
        compression: Compression,
    },
    Truncated {
        offset: u64,
    },
    TooLarge {
        limit_bytes: u64,
    },
    Header {
        offset: u64,
        why: String,
    },
    Path {
        entry: String,
        why: String,
    },
    LinkTarget {
        entry: String,
        target: String,
        why: String,
    },
    Xattr {
        entry: String,
        name: String,
    },
    Unsupported {
        entry: String,
        what: String,
    },
    Entry {
        action: String,
        entry: String,
        errno: i32,
    },
    LeansOnParents,
    /// What unpacking itself never says.
    Other {
        text: String,
    },
}

/// An [`io::Error`] on its way: the kernel's, or a text.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SaidIo {
    errno: Option<i32>,
    text: String,
}

impl From<io::Error> for SaidIo {
    fn from(error: io::Error) -> SaidIo {
        SaidIo {
            errno: error.raw_os_error(),
            text: error.to_string(),
        }
    }
}

impl From<SaidIo> for io::Error {
    fn from(said: SaidIo) -> io::Error {
        match said.errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::other(said.text),
        }
    }
}

impl From<UnpackError> for Said {
    fn from(error: UnpackError) -> Said {
        match error {
            UnpackError::Read { source } => Said::Read(source.into()),
            UnpackError::Decompress {
                compression,
                source,
            } => Said::Decompress {
                compression,
                source: source.into(),
            },
            UnpackError::NoFormat { said } => Said::NoFormat { said },
            UnpackError::TrailingBytes { compression } => Said::TrailingBytes { compression },
            UnpackError::Truncated { offset } => Said::Truncated { offset },
            UnpackError::TooLarge { limit_bytes } => Said::TooLarge { limit_bytes },
            UnpackError::Header { offset, why } => Said::Header { offset, why },
            UnpackError::Path { entry, why } => Said::Path {
                entry,
                why: why.into(),
            },
            UnpackError::LinkTarget { entry, target, why } => Said::LinkTarget {
                entry,
                target,
                why: why.into(),
            },
            UnpackError::Xattr { entry, name } => Said::Xattr { entry, name },
            UnpackError::Unsupported { entry, what } => Said::Unsupported { entry, what },
            UnpackError::Entry {
                action,
                entry,
                source,
            } => Said::Entry {
                action: action.into(),
                entry,
                errno: source.raw_os_error(),
            },
            UnpackError::LeansOnParents => Said::LeansOnParents,
            error @ (UnpackError::DiffId { .. }
            | UnpackError::Store { .. }
            | UnpackError::Record { .. }
            | UnpackError::Parents { .. }
            | UnpackError::Apart { .. }) => Said::Other {
                text: error.to_string(),
            },
        }
    }
}

impl From<Said> for UnpackError {
    fn from(said: Said) -> UnpackError {
        match said {
            Said::Enter { path, errno } => ApartError::Enter {
                path,
                source: Errno::from_raw_os_error(errno),
            }
            .into(),
            Said::Handed => ApartError::Handed.into(),
            Said::Notes { errno } => UnpackError::Entry {
                action: "read back",
                entry: "the layer".into(),
                source: Errno::from_raw_os_error(errno),
            },
            Said::Read(source) => UnpackError::Read {
                source: source.into(),
            },
            Said::Decompress {
                compression,
                source,
            } => UnpackError::Decompress {
                compression,
                source: source.into(),
            },
            Said::NoFormat { said } => UnpackError::NoFormat { said },
            Said::TrailingBytes { compression } => UnpackError::TrailingBytes { compression },
            Said::Truncated { offset } => UnpackError::Truncated { offset },
            Said::TooLarge { limit_bytes } => UnpackError::TooLarge { limit_bytes },
            Said::Header { offset, why } => UnpackError::Header { offset, why },
            Said::Path { entry, why } => UnpackError::Path {
                entry,
                why: word(&why),
            },
            Said::LinkTarget { entry, target, why } => UnpackError::LinkTarget {
                entry,
                target,
                why: word(&why),
            },
            Said::Xattr { entry, name } => UnpackError::Xattr { entry, name },
            Said::Unsupported { entry, what } => UnpackError::Unsupported { entry, what },
            Said::Entry {
                action,
                entry,
                errno,
            } => UnpackError::Entry {
                action: word(&action),
                entry,
                source: Errno::from_raw_os_error(errno),
            },
            Said::LeansOnParents => UnpackError::LeansOnParents,
            Said::Other { text } => UnpackError::Read {
                source: io::Error::other(text),
            },
        }
    }
}

/// Words that are kept: more than unpacking has. They are the program's own, no layer's, and
/// kept for good; a writer gone mad must not fill the daemon's memory with them.
const MAX_WORDS: usize = 256;
/// Longer than any of them.
const MAX_WORD_BYTES: usize = 256;

/// The constant that a writer had.
fn word(text: &str) -> &'static str {
    static WORDS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut words = WORDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = words.get(text) {
        return known;
    }
    if words.len() >= MAX_WORDS || text.len() > MAX_WORD_BYTES {
        return "handle";
    }
    let kept: &'static str = Box::leak(text.into());
    words.insert(kept);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::is_full;
    use crate::pull::error::unpack_kind;
    use std::error::Error;

    fn chain(error: &UnpackError) -> Vec<String> {
        let mut texts = vec![error.to_string()];
        let mut next = error.source();
        while let Some(error) = next {
            texts.push(error.to_string());
            next = error.source();
        }
        texts
    }

    #[test]
    fn every_error_of_unpacking_comes_back_as_it_was() {
        let compression = Compression::Zstd;
        let entry = || "\"etc/passwd\"".to_owned();
        let errors = [
            UnpackError::Read {
                source: io::Error::other("the download was cut"),
            },
            UnpackError::Read {
                source: io::Error::from_raw_os_error(5),
            },
            UnpackError::Decompress {
                compression,
                source: io::Error::new(io::ErrorKind::InvalidData, "corrupt deflate stream"),
            },
            UnpackError::NoFormat {
                said: Compression::Gzip,
            },
            UnpackError::TrailingBytes { compression },
            UnpackError::Truncated { offset: 7 },
            UnpackError::TooLarge { limit_bytes: 8 },
            UnpackError::Header {
                offset: 512,
                why: "checksum".into(),
            },
            UnpackError::Path {
                entry: entry(),
                why: "climbs",
            },
            UnpackError::LinkTarget {
                entry: entry(),
                target: entry(),
                why: "does not exist",
            },
            UnpackError::Xattr {
                entry: entry(),
                name: "user.x".into(),
            },
            UnpackError::Unsupported {
                entry: entry(),
                what: "a door".into(),
            },
            UnpackError::Entry {
                action: "write",
                entry: entry(),
                source: Errno::NOSPC,
            },
            UnpackError::LeansOnParents,
        ];
        for error in errors {
            let (texts, kind, full) = (chain(&error), unpack_kind(&error), is_full(&error));
            let sent = serde_json::to_vec(&Outcome::Failed(error.into())).unwrap();
            let Outcome::Failed(said) = serde_json::from_slice(&sent).unwrap() else {
                panic!("{texts:?}");
            };
            let back = UnpackError::from(said);
            assert_eq!(chain(&back), texts);
            assert_eq!(unpack_kind(&back), kind, "{texts:?}");
            assert_eq!(is_full(&back), full, "{texts:?}");
        }
    }

    #[test]
    fn words_are_kept_once_and_only_so_many() {
        assert!(std::ptr::eq(
            word("set the owner of"),
            word("set the owner of")
        ));
        assert_eq!(word(&"x".repeat(MAX_WORD_BYTES + 1)), "handle");
    }
}
