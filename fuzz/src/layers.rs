//! What layers are made of: archives of strangers, and what is kept beside them on disk.

use berth_image_service::layer::{self, LayerId};
use berth_image_service::unpack::recipe::{Reader, Step};
use berth_image_service::unpack::{Compression, read_entries};

/// Bytes an archive may have uncompressed: a few compressed ones can become very many.
const LIMIT_BYTES: u64 = 4 << 20;

/// A layer's blob, compressed as its first bytes say: read to its end or refused, the same way
/// every time, and never more than allowed.
pub fn archive(data: &[u8]) {
    let compression = Compression::of_magic(data);
    let first = read_entries(data, compression, Some(LIMIT_BYTES));
    let again = read_entries(data, compression, Some(LIMIT_BYTES));
    match (first, again) {
        (Ok(first), Ok(again)) => assert_eq!(first, again),
        (Err(first), Err(again)) => assert_eq!(first.to_string(), again.to_string()),
        (first, again) => panic!("{first:?} and then {again:?}"),
    }
}

/// What is kept of a layer's archive: steps are bounded, whatever the file says.
pub fn recipe(data: &[u8]) {
    let Ok(mut reader) = Reader::new(data) else {
        return;
    };
    let mut bytes = 0;
    while let Ok(Some(step)) = reader.next_step() {
        match step {
            Step::Raw(raw) => {
                assert!(raw.len() <= 64 << 10);
                bytes += raw.len();
            }
            Step::File(note) | Step::Copied(note) => assert!(note.path.len() < 5000),
        }
        // zstd has made a lot of a little.
        if bytes > LIMIT_BYTES as usize {
            return;
        }
    }
}

/// A layer's record: its name is one that a directory may have.
pub fn record(data: &[u8]) {
    if let Ok(info) = layer::parse_record(data) {
        let name = info.id.to_string();
        assert!(!name.contains('/') && !name.starts_with('.'));
        assert_eq!(name.parse::<LayerId>().as_ref(), Ok(&info.id));
    }
}
