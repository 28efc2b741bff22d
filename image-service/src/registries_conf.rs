//! `registries.conf` with its drop-ins, version 2 of the format: where a name is really served,
//! its mirrors, what is blocked, and what short names mean.
//!
//! ```toml
//! unqualified-search-registries = ["registry.example"]
//! short-name-mode = "enforcing"            # permissive, disabled
//! credential-helpers = ["containers-auth.json", "NAME"]
//! [[registry]]
//! prefix = "registry.example/team"         # or "*.example"; that of location when left out
//! location = "internal.example:5000/team"  # stands in for the prefix
//! blocked = false
//! insecure = false                         # also without a valid certificate, also over http
//! mirror-by-digest-only = false
//! [[registry.mirror]]
//! location = "mirror.example/team"
//! insecure = false
//! pull-from-mirror = "all"                 # digest-only, tag-only
//! [aliases]
//! "busybox" = "registry.example/library/busybox"
//! ```
//! `registries.conf.d/*.conf` beside the file is read after it in the order of the names: a
//! `[[registry]]` replaces the earlier one with the same prefix, an alias the earlier one of the
//! same name ("" removes it), any other key its value. The longest prefix counts. An unknown key
//! is an error.
//! Source: containers-registries.conf(5) and containers-registries.conf.d(5).

use crate::hosts::{HostsError, line_of, read};
use crate::reference::{BadReference, Reference, is_host};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Most registries, mirrors of one, aliases, search registries and drop-ins that are taken.
const MAX_REGISTRIES: usize = 4096;
const MAX_MIRRORS: usize = 32;
const MAX_ALIASES: usize = 65_536;
const MAX_SEARCHED: usize = 16;
const MAX_DROP_INS: usize = 256;

/// Where one name is served: a host and the beginning of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// `host[:port]`.
    pub host: String,
    /// The rest, without slashes at its ends; may be empty.
    pub path: String,
    /// Reached also without a valid certificate, and also over http.
    pub insecure: bool,
}

/// When a mirror is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullFrom {
    /// For every reference.
    All,
    /// Only for references by digest.
    DigestOnly,
    /// Only for references by tag.
    TagOnly,
}

/// One mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Where it is.
    pub location: Location,
    /// When it is asked.
    pub pull_from: PullFrom,
}

/// One `[[registry]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    /// What a name begins with, or `*.` and a domain.
    pub prefix: String,
    /// What stands in for the prefix; `None`: the name itself.
    pub location: Option<Location>,
    /// Where `location` is `None`: whether the registry itself is.
    pub insecure: bool,
    /// Nothing is pulled from it.
    pub blocked: bool,
    /// In the file's order.
    pub mirrors: Vec<Mirror>,
    /// The file that says so.
    pub said_by: PathBuf,
}

/// What a short name without an alias means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShortNameMode {
    /// With several search registries it is ambiguous, an error: nobody is there to choose.
    #[default]
    Enforcing,
    /// As `Disabled`: nobody is there to choose.
    Permissive,
    /// The search registries are tried in their order.
    Disabled,
}

/// The whole configuration. The default is what a node without a file has: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistriesConf {
    /// By prefix.
    registries: BTreeMap<String, Registry>,
    /// Full names by short ones, with the file that says so.
    aliases: BTreeMap<String, (String, PathBuf)>,
    search: Vec<String>,
    mode: ShortNameMode,
    /// Where credentials come from, in this order.
    pub credential_helpers: Vec<String>,
}

/// Why a name cannot be made a reference.
#[derive(Debug, thiserror::Error)]
pub enum ShortNameError {
    /// It is none, whatever stands before it.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// Several registries could be meant.
    #[error(
        "{name:?} is a short name that could be of {registries}: short-name-mode is \"enforcing\"; \
         write the registry before the name, or give it an alias"
    )]
    Ambiguous {
        /// As it was given.
        name: String,
        /// The search registries.
        registries: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawFile {
    unqualified_search_registries: Option<Vec<String>>,
    short_name_mode: Option<Spanned<String>>,
    credential_helpers: Option<Vec<String>>,
    // Known to the format, for a store that we do not have.
    #[serde(rename = "additional-layer-store-auth-helper")]
    _additional_layer_store_auth_helper: Option<String>,
    #[serde(default)]
    registry: Vec<Spanned<RawRegistry>>,
    #[serde(default)]
    aliases: BTreeMap<Spanned<String>, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawRegistry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<RawMirror>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawMirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<String>,
}

impl RegistriesConf {
    /// Reads `path` and the drop-ins in `<path>.d`; what is not there says nothing. Blocking.
    ///
    /// # Errors
    /// [`HostsError`] with the file and, where it is one, the line.
    pub fn load(path: &Path) -> Result<RegistriesConf, HostsError> {
        let mut conf = RegistriesConf::default();
        match read(path) {
            Ok(text) => conf.apply(path, &text)?,
            Err(HostsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        for file in drop_ins(path)? {
            conf.apply(&file, &read(&file)?)?;
        }
        Ok(conf)
    }

    /// Changes what the file `path` with the content `text` says.
    ///
    /// # Errors
    /// [`HostsError::Invalid`] with file and line.
    pub fn apply(&mut self, path: &Path, text: &str) -> Result<(), HostsError> {
        let invalid = |line: usize, why: String| HostsError::Invalid {
            path: path.into(),
            why: format!("line {line}: {why}"),
        };
        let raw: RawFile = toml::from_str(text).map_err(|error| {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            let message = error.message();
            if message.contains("unknown field `registries`") {
                return invalid(
                    line,
                    "[registries.…] is version 1 of the format; version 2 has [[registry]]".into(),
                );
            }
            invalid(line, message.to_owned())
        })?;
        if let Some(mode) = raw.short_name_mode {
            self.mode = match mode.get_ref().as_str() {
                "enforcing" | "" => ShortNameMode::Enforcing,
                "permissive" => ShortNameMode::Permissive,
                "disabled" => ShortNameMode::Disabled,
                other => {
                    let line = line_of(text, mode.span().start);
                    let why = format!(
                        "short-name-mode {other:?} is none of enforcing, permissive, disabled"
                    );
                    return Err(invalid(line, why));
                }
            };
        }
        if let Some(search) = raw.unqualified_search_registries {
            let bad = search.iter().find(|registry| {
                let host = registry.split('/').next().unwrap_or_default();
                !is_host(host)
            });
            if let Some(bad) = bad {
                let why = format!("unqualified-search-registries: {bad:?} is not a registry");
                return Err(invalid(1, why));
            }
            if search.len() > MAX_SEARCHED {
                let why = format!("more than {MAX_SEARCHED} unqualified-search-registries");
                return Err(invalid(1, why));
            }
            self.search = search;
        }
        if let Some(helpers) = raw.credential_helpers {
            self.credential_helpers = helpers;
        }
        for (name, full) in raw.aliases {
            let line = line_of(text, name.span().start);
            let short = name.into_inner();
            if full.is_empty() {
                self.aliases.remove(&short);
                continue;
            }
            let parsed: Result<Reference, _> = full.parse();
            let qualified = parsed.is_ok() && !is_short(&full);
            let has_tag = full.contains('@')
                || full
                    .rsplit('/')
                    .next()
                    .is_some_and(|last| last.contains(':'));
            if !qualified || has_tag || !is_short(&short) {
                let why = format!(
                    "alias {short:?} = {full:?}: want a name without registry, tag and digest, and one with a registry"
                );
                return Err(invalid(line, why));
            }
            self.aliases.insert(short, (full, path.into()));
        }
        for registry in raw.registry {
            let line = line_of(text, registry.span().start);
            let registry =
                convert(registry.into_inner(), path).map_err(|why| invalid(line, why))?;
            self.registries.insert(registry.prefix.clone(), registry);
        }
        if self.registries.len() > MAX_REGISTRIES || self.aliases.len() > MAX_ALIASES {
            return Err(invalid(
                1,
                format!("more than {MAX_REGISTRIES} registries or {MAX_ALIASES} aliases"),
            ));
        }
        Ok(())
    }

    /// How many prefixes it says something about.
    pub fn len(&self) -> usize {
        self.registries.len()
    }

    /// True when it says nothing about any prefix.
    pub fn is_empty(&self) -> bool {
        self.registries.is_empty()
    }

    /// What `name` means, to be tried in this order; never empty. A name with a registry means
    /// itself.
    ///
    /// # Errors
    /// [`ShortNameError`].
    pub fn references(&self, name: &str) -> Result<Vec<Reference>, ShortNameError> {
        let itself: Reference = name.parse()?;
        if !is_short(name) {
            return Ok(vec![itself]);
        }
        let end = name
            .find('@')
            .unwrap_or(name.len())
            .min(name.find(':').unwrap_or(name.len()));
        let (bare, rest) = name.split_at(end);
        if let Some((full, _)) = self.aliases.get(bare) {
            return Ok(vec![format!("{full}{rest}").parse()?]);
        }
        match (self.search.as_slice(), self.mode) {
            ([], _) => Ok(vec![itself]),
            ([_, _, ..], ShortNameMode::Enforcing) => Err(ShortNameError::Ambiguous {
                name: name.into(),
                registries: self.search.join(", "),
            }),
            (search, _) => search
                .iter()
                .map(|registry| {
                    let full = format!("{}/{name}", registry.trim_end_matches('/'));
                    Ok(full.parse()?)
                })
                .collect(),
        }
    }

    /// Which file says what a short name means, for people.
    pub fn alias_said_by(&self, name: &str) -> Option<&Path> {
        let bare = name.split(['@', ':']).next().unwrap_or_default();
        self.aliases.get(bare).map(|(_, path)| path.as_path())
    }

    /// The `[[registry]]` with the longest prefix of `reference`, and what of the reference's
    /// name that prefix is, in bytes.
    pub fn registry(&self, reference: &Reference) -> Option<(&Registry, usize)> {
        let text = reference.to_string();
        let host_bytes = reference.host().len();
        self.registries
            .values()
            .filter_map(|registry| {
                let matched = match registry.prefix.strip_prefix("*.") {
                    Some(domain) => {
                        let below = reference.host().split(':').next().unwrap_or_default();
                        below
                            .strip_suffix(domain)
                            .is_some_and(|rest| rest.ends_with('.'))
                            .then_some(host_bytes)?
                    }
                    None => {
                        let rest = text.strip_prefix(registry.prefix.as_str())?;
                        let whole = rest.is_empty() || rest.starts_with(['/', ':', '@']);
                        // A port is part of the host, not something below it.
                        let cut_port = registry.prefix.len() < host_bytes;
                        (whole && !cut_port).then_some(registry.prefix.len())?
                    }
                };
                Some((registry, matched))
            })
            .max_by_key(|(registry, _)| registry.prefix.len())
    }
}

impl Location {
    /// The repository here of an image whose name goes on with `rest` behind the prefix.
    pub fn repository(&self, rest: &str) -> String {
        let rest = rest.trim_start_matches('/');
        match (self.path.as_str(), rest) {
            ("", rest) => rest.into(),
            (path, "") => path.into(),
            (path, rest) => format!("{path}/{rest}"),
        }
    }
}

/// True for a name that says no registry.
pub fn is_short(name: &str) -> bool {
    let first = match name.split_once('/') {
        None => return true,
        Some((first, _)) => first,
    };
    !(first == "localhost"
        || first.contains(['.', ':', '['])
        || first.bytes().any(|b| b.is_ascii_uppercase()))
}

fn convert(raw: RawRegistry, path: &Path) -> Result<Registry, String> {
    let prefix = if raw.prefix.is_empty() {
        raw.location.clone()
    } else {
        raw.prefix
    };
    let prefix = prefix.trim_end_matches('/').to_owned();
    match prefix.strip_prefix("*.") {
        Some(domain) if is_host(domain) && !domain.contains([':', '/']) => {}
        Some(_) => return Err(format!("prefix {prefix:?} is not \"*.\" and a domain")),
        None => {
            let host = prefix.split('/').next().unwrap_or_default();
            if !is_host(host) {
                return Err(format!(
                    "prefix {prefix:?} begins with no registry; a location or a prefix is needed"
                ));
            }
        }
    }
    let place = |text: &str, insecure| {
        let text = text.trim_end_matches('/');
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let good = is_host(host)
            && (path.is_empty() || format!("x.y/{path}").parse::<Reference>().is_ok())
            && !path.contains([':', '@']);
        if !good {
            let shown = text.rsplit('@').next().unwrap_or_default();
            return Err(format!(
                "location {shown:?} is not a registry and a path in it"
            ));
        }
        Ok(Location {
            host: host.to_ascii_lowercase(),
            path: path.into(),
            insecure,
        })
    };
    let location = match raw.location.as_str() {
        "" => None,
        text => Some(place(text, raw.insecure)?),
    };
    if raw.mirror.len() > MAX_MIRRORS {
        return Err(format!("more than {MAX_MIRRORS} mirrors"));
    }
    let mut mirrors = Vec::new();
    for mirror in raw.mirror {
        let pull_from = match (
            mirror.pull_from_mirror.as_deref(),
            raw.mirror_by_digest_only,
        ) {
            (None | Some(""), false) | (Some("all"), false) => PullFrom::All,
            (None | Some(""), true) => PullFrom::DigestOnly,
            (Some("digest-only"), false) => PullFrom::DigestOnly,
            (Some("tag-only"), false) => PullFrom::TagOnly,
            (Some("all" | "digest-only" | "tag-only"), true) => {
                return Err(
                    "mirror-by-digest-only and a mirror's pull-from-mirror exclude each other"
                        .into(),
                );
            }
            (Some(other), _) => {
                return Err(format!(
                    "pull-from-mirror {other:?} is none of all, digest-only, tag-only"
                ));
            }
        };
        mirrors.push(Mirror {
            location: place(&mirror.location, mirror.insecure)?,
            pull_from,
        });
    }
    Ok(Registry {
        prefix,
        location,
        insecure: raw.insecure,
        blocked: raw.blocked,
        mirrors,
        said_by: path.into(),
    })
}

/// `<path>.d/*.conf`, in the order of their names.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, HostsError> {
    let mut dir = path.as_os_str().to_owned();
    dir.push(".d");
    let dir = PathBuf::from(dir);
    let failed = |source| HostsError::Read {
        path: dir.clone(),
        source,
    };
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(failed)?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "conf")
        {
            files.push(file);
        }
        if files.len() > MAX_DROP_INS {
            return Err(failed(io::Error::other(format!(
                "more than {MAX_DROP_INS} files"
            ))));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
