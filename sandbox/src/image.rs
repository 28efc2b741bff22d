//! What a container takes from its image: who it is and how it says its program
//! is run. Kept in the container's record, so a container needs its image's
//! config only once.
//!
//! Source: OCI image-spec, `config.md`; CRI `ContainerStatus.image_ref`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The image a container was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerImage {
    /// The config's digest: "sha256:…".
    pub id: String,
    /// What ContainerStatus gives as `image_ref`: "registry/name@sha256:…", or
    /// the ID again where the image came from no registry.
    pub repo_digest: String,
    pub config: ImageConfig,
}

/// The part of an image's config that says how to run it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// NAME=value each.
    pub env: Vec<String>,
    /// "user", "uid", "user:group" or "uid:gid"; empty for root.
    pub user: String,
    /// Empty: "/".
    pub working_dir: String,
    /// "SIGTERM", "TERM", "15" or "SIGRTMIN+3"; see [`parse_stop_signal`].
    pub stop_signal: Option<String>,
    /// Paths inside the container that want a volume.
    pub volumes: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

/// Names of Linux signals 1 to 31 as this machine counts them, and the aliases.
///
/// Source: signal(7), generic (x86, arm, riscv) numbers.
const SIGNALS: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// SIGRTMIN and SIGRTMAX as programs see them: libc keeps the first two of the
/// kernel's 32 to 64 for itself. Source: signal(7).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of a signal named as images name it: "SIGTERM", "term", "15",
/// "SIGRTMIN+3" or "RTMAX-1". `None` for what is no signal of Linux.
pub fn parse_stop_signal(text: &str) -> Option<i32> {
    let text = text.trim().to_ascii_uppercase();
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().filter(|n| (1..=RTMAX).contains(n));
    }
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => RTMIN,
        (_, Some("")) => RTMAX,
        (Some(rest), _) => RTMIN + offset(rest.strip_prefix('+')?)?,
        (_, Some(rest)) => RTMAX - offset(rest.strip_prefix('-')?)?,
        (None, None) => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// Digits only, and few: `i32::from_str` also takes a sign.
fn offset(text: &str) -> Option<i32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && text.len() <= 2;
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_named_as_images_name_them() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("TERM", 15),
            ("sigquit", 3),
            ("15", 15),
            ("64", 64),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX", 64),
            ("SIGRTMAX-14", 50),
            ("SIGWINCH", 28),
        ] {
            assert_eq!(parse_stop_signal(text), Some(number), "{text}");
        }
        for text in [
            "",
            "SIG",
            "SIGNOPE",
            "0",
            "65",
            "-9",
            "+9",
            "RTMIN-1",
            "RTMIN+31",
            "RTMAX+1",
            "RTMIN++3",
            "99999999999",
        ] {
            assert_eq!(parse_stop_signal(text), None, "{text}");
        }
    }
}
