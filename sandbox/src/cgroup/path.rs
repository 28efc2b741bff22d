//! Paths of cgroups as people and the kubelet write them.

/// Not a path that a cgroup can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path:?} is not a cgroup path: {why}")]
pub struct BadPath {
    path: String,
    why: &'static str,
}

/// Longest path; longer ones could not be opened with the mount point in front.
const LONGEST: usize = 3072;

/// One leading slash, none at the end, no empty part: "/a/b". "/" and "" are refused: nothing
/// of Berth's lies in the root.
pub(super) fn normal(path: &str) -> Result<String, BadPath> {
    let bad = |why| BadPath {
        path: path.chars().take(120).collect(),
        why,
    };
    if path.len() > LONGEST {
        return Err(bad("it is too long"));
    }
    let mut normal = String::with_capacity(path.len() + 1);
    for part in path.split('/').filter(|part| !part.is_empty()) {
        if part == "." || part == ".." {
            return Err(bad("it climbs"));
        }
        if part.len() > 255 {
            return Err(bad("a part is longer than 255 bytes"));
        }
        if part.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(bad("it has a control character"));
        }
        normal.push('/');
        normal.push_str(part);
    }
    if normal.is_empty() {
        Err(bad("it names the root"))
    } else {
        Ok(normal)
    }
}

/// "/a", "/a/b" of "/a/b".
pub(super) fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let ends = path
        .char_indices()
        .skip(1)
        .filter(|(_, c)| *c == '/')
        .map(|(at, _)| at);
    ends.chain([path.len()]).map(|end| &path[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_made_normal_or_refused() {
        assert_eq!(normal("berth").unwrap(), "/berth");
        assert_eq!(
            normal("//kubepods/burstable//podX/").unwrap(),
            "/kubepods/burstable/podX"
        );
        for bad in [
            "",
            "/",
            "/a/../b",
            "./a",
            "/a\n",
            &"/a".repeat(2000),
            &"a".repeat(256),
        ] {
            normal(bad).unwrap_err();
        }
    }

    #[test]
    fn prefixes_go_from_the_outside_in() {
        assert_eq!(
            prefixes("/a/bc/d").collect::<Vec<_>>(),
            ["/a", "/a/bc", "/a/bc/d"]
        );
        assert_eq!(prefixes("/a").collect::<Vec<_>>(), ["/a"]);
    }
}
