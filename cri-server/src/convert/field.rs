//! Where in a request something is, and what is wrong with it.

use std::fmt::{self, Write as _};

/// Why a request was refused. The text names the field by its path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// The request can never succeed, here or anywhere.
    #[error("{field}: {problem}")]
    Invalid { field: String, problem: String },
    /// CRI allows it; this version of Berth, or this node, does not do it.
    #[error("{field}: {feature}")]
    Unsupported {
        field: String,
        feature: &'static str,
    },
}

/// Everything in `convert` returns this.
pub type Result<T> = std::result::Result<T, Refused>;

/// The path of a field: `config.mounts[3].host_path`. It is put into words only
/// when something is refused.
#[derive(Clone, Copy)]
pub struct Field<'a> {
    parent: Option<&'a Field<'a>>,
    part: Part<'a>,
}

#[derive(Clone, Copy)]
enum Part<'a> {
    Name(&'a str),
    Index(usize),
    Key(&'a str),
}

impl<'a> Field<'a> {
    /// A field of the request itself.
    pub const fn root(name: &'a str) -> Self {
        Self {
            parent: None,
            part: Part::Name(name),
        }
    }

    /// The field `name` of this message.
    pub fn at(&'a self, name: &'a str) -> Field<'a> {
        Field {
            parent: Some(self),
            part: Part::Name(name),
        }
    }

    /// Item `index` of this repeated field.
    pub fn index(&'a self, index: usize) -> Field<'a> {
        Field {
            parent: Some(self),
            part: Part::Index(index),
        }
    }

    /// The entry `key` of this map.
    pub fn key(&'a self, key: &'a str) -> Field<'a> {
        Field {
            parent: Some(self),
            part: Part::Key(key),
        }
    }

    /// What is here is wrong.
    pub fn invalid(&self, problem: impl Into<String>) -> Refused {
        Refused::Invalid {
            field: self.to_string(),
            problem: problem.into(),
        }
    }

    /// What is here is not done by Berth; `feature` says so in a few words.
    pub fn unsupported(&self, feature: &'static str) -> Refused {
        Refused::Unsupported {
            field: self.to_string(),
            feature,
        }
    }
}

impl fmt::Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.part {
            Part::Name(name) if self.parent.is_some() => write!(f, ".{name}"),
            Part::Name(name) => f.write_str(name),
            Part::Index(index) => write!(f, "[{index}]"),
            Part::Key(key) => write!(f, "[{}]", Quoted(key)),
        }
    }
}

/// A stranger's text in quotes: control characters escaped, at most 80 characters.
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for (count, character) in self.0.chars().enumerate() {
            // A hostile value may be megabytes long; the message need not be.
            if count == 80 {
                return f.write_str("…\"");
            }
            write!(f, "{}", character.escape_debug())?;
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_written_as_in_the_proto_file() {
        let config = Field::root("config");
        let mounts = config.at("mounts");
        let mount = mounts.index(3);
        assert_eq!(
            mount.at("host_path").to_string(),
            "config.mounts[3].host_path"
        );
        let sysctls = config.at("sysctls");
        assert_eq!(
            sysctls.key("a\"b").to_string(),
            "config.sysctls[\"a\\\"b\"]"
        );
    }

    #[test]
    fn a_hostile_value_is_cut_and_escaped() {
        let text = Quoted(&"\n".repeat(1 << 20)).to_string();
        assert!(text.len() < 200 && !text.contains('\n'));
    }
}
