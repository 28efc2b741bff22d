//! Which images are pinned: names with `*` for anything, from the configuration.
//!
//! A pattern is compared with every `repository:tag` and `repository@digest` of an image; one
//! without a registry stands for its full form too, so `busybox:*` is `docker.io/library/busybox:*`.
//! The kubelet's collection passes over pinned images.
//! Source: CRI `Image.pinned`.

/// Names that are never offered to garbage collection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// Of these, as the configuration has them.
    pub fn new(patterns: impl IntoIterator<Item = impl Into<String>>) -> Patterns {
        let patterns = patterns.into_iter().map(Into::into);
        Patterns(
            patterns
                .filter(|pattern: &String| !pattern.is_empty())
                .collect(),
        )
    }

    /// Whether `name`, a full one with tag or digest, is pinned.
    pub fn matches(&self, name: &str) -> bool {
        let short = name.strip_prefix("docker.io/").unwrap_or(name);
        let shorter = short.strip_prefix("library/").unwrap_or(short);
        self.0.iter().any(|pattern| {
            [name, short, shorter].iter().any(|name| {
                // Without tag and digest every one of them is meant.
                let end = name.find('@').unwrap_or_else(|| {
                    let last = name.rfind('/').map_or(0, |slash| slash + 1);
                    name[last..].find(':').map_or(name.len(), |at| last + at)
                });
                globs(pattern, name) || globs(pattern, &name[..end])
            })
        })
    }
}

/// `*` stands for any text; in linear space, and in time of the product at most.
pub(crate) fn globs(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_with_stars_for_anything() {
        for (pattern, name, expected) in [
            ("q.io/a:1", "q.io/a:1", true),
            ("q.io/a", "q.io/a:1", true),
            ("q.io/a", "q.io/ab:1", false),
            ("q.io/*", "q.io/a/b@sha256:00", true),
            ("*/pause:*", "q.io/pause:3", true),
            ("*pause*", "q.io/pause:3", true),
            ("q.io:5000/a", "q.io:5000/a:1", true),
            ("busybox", "docker.io/library/busybox:1", true),
            ("busybox:1*", "docker.io/library/busybox:1.36", true),
            ("team/*", "docker.io/team/app:1", true),
            ("*", "a", true),
            ("", "a", false),
            ("a*a", "a", false),
            ("a**b", "axb", true),
        ] {
            assert_eq!(
                Patterns::new([pattern]).matches(name),
                expected,
                "{pattern} {name}"
            );
        }
    }
}
