//! Paths as archives write them.

use super::super::archive::{Entry, MAX_PATH_BYTES};
use super::super::{UnpackError, shown};

/// `path` without empty and "." components. What begins with "/" begins at the image's root, as
/// every path of an archive does: kaniko writes "/" for the root itself.
pub(super) fn normalised(path: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let refuse = |why| UnpackError::Path {
        entry: shown(path),
        why,
    };
    if path.len() > MAX_PATH_BYTES {
        return Err(refuse("is longer than 4096 bytes"));
    }
    if path.contains(&0) {
        return Err(refuse("has a NUL byte"));
    }
    let mut clean = Vec::with_capacity(path.len());
    for part in components(path) {
        if part == b".." {
            return Err(refuse("has a \"..\" component"));
        }
        if !clean.is_empty() {
            clean.push(b'/');
        }
        clean.extend_from_slice(part);
    }
    Ok(clean)
}

pub(super) fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// Directory and last component; both empty for the root.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() {
        return name.to_vec();
    }
    [directory, b"/", name].concat()
}

pub(super) fn no_nul<'e>(entry: &Entry, text: &'e [u8]) -> Result<&'e [u8], UnpackError> {
    if text.contains(&0) {
        return Err(bad_path(entry, "links to a name with a NUL byte"));
    }
    Ok(text)
}

pub(super) fn bad_path(entry: &Entry, why: &'static str) -> UnpackError {
    UnpackError::Path {
        entry: shown(&entry.path),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_their_dots_and_nothing_else() {
        let clean =
            |path: &str| normalised(path.as_bytes()).map(|clean| String::from_utf8(clean).unwrap());
        assert_eq!(clean("./a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(clean("./").unwrap(), "");
        assert_eq!(clean("..a/b..").unwrap(), "..a/b..");
        assert_eq!(clean("/").unwrap(), "");
        assert_eq!(clean("//a/").unwrap(), "a");
        for bad in ["..", "/..", "a/../b", "a/..", "a\0b"] {
            clean(bad).unwrap_err();
        }
    }
}
