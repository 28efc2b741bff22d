//! Small rules that many fields share: names, paths, IDs, lists of CPUs.

use super::field::{Field, Quoted, Result};
use std::path::{Component, Path, PathBuf};

/// Longest name of a pod, container or namespace, in bytes.
/// Source: Kubernetes object names are at most 253 characters.
const NAME_BYTES: usize = 253;

/// Longest path, in bytes, without its NUL. Source: PATH_MAX, linux/limits.h.
const PATH_BYTES: usize = 4095;

/// Text that goes to the kernel: no NUL.
pub fn no_nul(field: &Field<'_>, text: &str) -> Result<()> {
    match text.contains('\0') {
        true => Err(field.invalid("must not hold a NUL character")),
        false => Ok(()),
    }
}

/// A name of a pod, a container or a namespace; never empty.
pub fn name(field: &Field<'_>, text: &str) -> Result<String> {
    if text.is_empty() {
        return Err(field.invalid("must not be empty"));
    }
    optional_name(field, text)
}

/// A name that may be empty.
pub fn optional_name(field: &Field<'_>, text: &str) -> Result<String> {
    if text.len() > NAME_BYTES {
        return Err(field.invalid(format!("is longer than {NAME_BYTES} bytes")));
    }
    if text
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || c == '/')
        || text == "."
        || text == ".."
    {
        let problem = format!(
            "{} is not a name: no spaces, slashes or control characters",
            Quoted(text)
        );
        return Err(field.invalid(problem));
    }
    Ok(text.to_owned())
}

/// A host name: labels of letters, digits and inner hyphens, at most 64 bytes in all.
/// Source: RFC 1123 section 2.1; __NEW_UTS_LEN, linux/utsname.h.
pub fn host_name(field: &Field<'_>, text: &str) -> Result<String> {
    if text.len() > 64 {
        return Err(field.invalid(format!("{} is longer than 64 bytes", Quoted(text))));
    }
    let label = |label: &str| {
        let ends = [label.bytes().next(), label.bytes().next_back()];
        label.len() <= 63
            && ends
                .iter()
                .all(|end| end.is_some_and(|b| b.is_ascii_alphanumeric()))
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !text.is_empty() && !text.split('.').all(label) {
        let problem = format!(
            "{} is not a host name: letters, digits and hyphens (RFC 1123)",
            Quoted(text)
        );
        return Err(field.invalid(problem));
    }
    Ok(text.to_owned())
}

fn path_text(field: &Field<'_>, text: &str) -> Result<()> {
    no_nul(field, text)?;
    match text.len() > PATH_BYTES {
        true => Err(field.invalid(format!("is longer than {PATH_BYTES} bytes"))),
        false => Ok(()),
    }
}

/// An absolute path on the host. ".." is refused: what it leads to depends on
/// symbolic links that may change.
pub fn host_path(field: &Field<'_>, text: &str) -> Result<PathBuf> {
    path_text(field, text)?;
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err(field.invalid(format!("{} is not an absolute path", Quoted(text))));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(field.invalid(format!("{} holds \"..\"", Quoted(text))));
    }
    Ok(path.components().collect())
}

/// An absolute path in the container, cleaned: no ".", no "..", no double slashes.
pub fn container_path(field: &Field<'_>, text: &str) -> Result<String> {
    path_text(field, text)?;
    if !text.starts_with('/') {
        return Err(field.invalid(format!("{} is not an absolute path", Quoted(text))));
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

/// A path below something else: relative and without "..". May be empty.
pub fn relative_path(field: &Field<'_>, text: &str) -> Result<PathBuf> {
    path_text(field, text)?;
    let path = Path::new(text);
    if path.is_absolute() {
        return Err(field.invalid(format!("{} must be relative", Quoted(text))));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(field.invalid(format!("{} holds \"..\"", Quoted(text))));
    }
    Ok(path
        .components()
        .filter(|part| *part != Component::CurDir)
        .collect())
}

/// An ID as a caller may send it: one of ours, the beginning of one, or one that
/// never was. It never becomes part of a path, but what looks like one is an attack
/// or a mistake and is told so.
pub fn id<'a>(field: &Field<'_>, text: &'a str) -> Result<&'a str> {
    if text.is_empty() {
        return Err(field.invalid("must not be empty"));
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if text.len() > 128 || !text.bytes().all(plain) {
        return Err(field.invalid(format!("{} is not an ID", Quoted(text))));
    }
    Ok(text)
}

/// A list such as "0-3,7". May be empty.
/// Source: cpuset(7), list format.
pub fn cpu_list(field: &Field<'_>, text: &str) -> Result<String> {
    let text = text.trim();
    let number = |text: &str| text.parse::<u32>().ok().filter(|_| !text.starts_with('+'));
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => match (number(first), number(last)) {
            (Some(first), Some(last)) => first <= last,
            _ => false,
        },
        None => number(part).is_some(),
    };
    if !text.is_empty() && !text.split(',').all(range) {
        return Err(field.invalid(format!("{} is not a list such as 0-3,7", Quoted(text))));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELD: Field<'static> = Field::root("f");

    #[test]
    fn container_paths_are_cleaned() {
        for (given, cleaned) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("//a/./b/", "/a/b"),
            ("/a/../b", "/b"),
            ("/../../etc", "/etc"),
        ] {
            assert_eq!(container_path(&FIELD, given).unwrap(), cleaned);
        }
        for bad in ["", "a", "./a", "../a", "/a\0b"] {
            container_path(&FIELD, bad).unwrap_err();
        }
        container_path(&FIELD, &"/a".repeat(3000)).unwrap_err();
    }

    #[test]
    fn host_paths_are_absolute_and_without_dot_dot() {
        assert_eq!(
            host_path(&FIELD, "/var//lib/./x/").unwrap(),
            Path::new("/var/lib/x")
        );
        for bad in ["", "var/lib", "/var/../etc", "/..", "/a\0"] {
            host_path(&FIELD, bad).unwrap_err();
        }
    }

    #[test]
    fn relative_paths_stay_below() {
        assert_eq!(
            relative_path(&FIELD, "web/0.log").unwrap(),
            Path::new("web/0.log")
        );
        assert_eq!(
            relative_path(&FIELD, "./0.log").unwrap(),
            Path::new("0.log")
        );
        assert_eq!(relative_path(&FIELD, "").unwrap(), Path::new(""));
        for bad in ["/etc/passwd", "../x", "a/../../x", "a/.."] {
            relative_path(&FIELD, bad).unwrap_err();
        }
    }

    #[test]
    fn host_names_follow_rfc_1123() {
        for good in ["", "a", "web-1", "WEB", "1a", "a.b.c", &"a".repeat(63)] {
            host_name(&FIELD, good).expect(good);
        }
        for bad in [
            "-a",
            "a-",
            "a_b",
            "a b",
            ".",
            "a..b",
            "a.",
            "ä",
            "a\n",
            &"a".repeat(64),
            &"a.".repeat(40),
        ] {
            host_name(&FIELD, bad).expect_err(bad);
        }
    }

    #[test]
    fn names_have_no_slashes_spaces_or_control_characters() {
        name(&FIELD, "nginx_sandbox.1-a").unwrap();
        optional_name(&FIELD, "").unwrap();
        for bad in [
            "",
            "a/b",
            "a b",
            "a\n",
            ".",
            "..",
            "\u{7f}",
            &"n".repeat(254),
        ] {
            name(&FIELD, bad).expect_err(bad);
        }
    }

    #[test]
    fn an_id_may_be_unknown_but_not_a_path() {
        for good in [
            "abc",
            &"0".repeat(64),
            "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
        ] {
            id(&FIELD, good).expect(good);
        }
        for bad in ["", "../x", "a/b", "a.b", "a b", "a\0", &"0".repeat(200)] {
            id(&FIELD, bad).expect_err(bad);
        }
    }

    #[test]
    fn cpu_lists() {
        for good in ["", "0", "0-3", "0-3,7", "1,2,3", " 0-1\n"] {
            cpu_list(&FIELD, good).expect(good);
        }
        for bad in ["-1", "3-0", "a", "0,,1", "0-", "+1", "0 1", "99999999999"] {
            cpu_list(&FIELD, bad).expect_err(bad);
        }
    }
}
