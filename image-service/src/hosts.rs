//! Where to ask for an image: `certs.d/<host>/hosts.toml`, in containerd's format.
//!
//! ```toml
//! server = "https://registry.example"     # asked last; without it the registry itself
//! [host."https://mirror.example:5000"]    # asked in the file's order
//! capabilities = ["pull", "resolve"]      # also push, referrers; all when not given
//! ca = "ca.pem"                           # or a list; relative to the file
//! client = [["cert.pem", "key.pem"]]      # or one file with both
//! skip_verify = false
//! override_path = false                   # true: no /v2 behind the URL's path
//! dial_timeout = "10s"
//! proxy = "http://proxy.example:3128"     # or "direct"; ours: containerd passes over it
//! [host."https://mirror.example:5000".header]
//! x-name = "value"                        # or a list
//! ```
//! The keys below a host may also stand at the top, for the server; `fallback` (ours, too) only
//! there: `"never"` leaves the registry itself out where there are mirrors, `"origin"` asks it
//! last. A directory is looked for
//! as `host_port_`, `host:port` and `_default`, in each of the configured directories in their
//! order; the first that exists is used. One without hosts.toml may hold Docker's `*.crt` (CAs)
//! and `*.cert` with `*.key` (client). A registry that nothing is said about is asked over
//! https, one on a loopback address over http unless its port is 443: nobody else can listen
//! in. (containerd tries https without verification first there.) An unknown key is an error: a
//! misspelt `skip_verify` or `ca` must not be found out by a failing pull.
//! Source: containerd `docs/hosts.md`.

use crate::proxy::{Proxy, ProxyUrl};
use crate::reference::DEFAULT_HOST;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use url::Url;

/// Docker Hub's images are named after one host and served by another.
const DOCKER_HUB: &str = "registry-1.docker.io";
/// The directory for registries that have none of their own.
const DEFAULT_DIRECTORY: &str = "_default";
/// Largest hosts.toml or registries.conf, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most mirrors in one file: each may cost a connect timeout.
const MAX_HOSTS: usize = 32;

/// Why the configuration of a registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what the format says.
    #[error("{path} is not valid: {why}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key, and what is wrong with it.
        why: String,
    },
}

/// TLS settings of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// PEM files of CAs trusted beside the system's.
    pub ca: Vec<PathBuf>,
    /// PEM files of our certificate and its key; the second is `None` when one file has both.
    pub client: Option<(PathBuf, Option<PathBuf>)>,
    /// The server's certificate is not verified.
    pub skip_verify: bool,
}

/// One place that serves a registry's images.
#[derive(Clone, PartialEq, Eq)]
pub struct Host {
    /// Scheme, host, port and path, without a slash at the end; `/v2` is part of the path.
    pub url: Url,
    /// May be asked for content by digest.
    pub pull: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// How to speak TLS with it.
    pub tls: Tls,
    /// Sent with every request to it; may be secret.
    pub headers: HeaderMap,
    /// How long connecting may take, if the file says.
    pub dial_timeout: Option<Duration>,
    /// The registry this mirrors; `None` for the registry itself. Sent as `ns`.
    pub mirror_of: Option<String>,
    /// The way to it.
    pub proxy: Proxy,
    /// The file or directory that says all this; `None` for a registry nothing is said about.
    pub said_by: Option<PathBuf>,
}

/// Whether the registry itself is asked when its mirrors do not have something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// After its mirrors.
    #[default]
    Origin,
    /// Not where there are mirrors.
    Never,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.headers.keys().map(HeaderName::as_str).collect();
        f.debug_struct("Host")
            .field("url", &self.url.as_str())
            .field("pull", &self.pull)
            .field("resolve", &self.resolve)
            .field("tls", &self.tls)
            .field("headers", &names)
            .field("dial_timeout", &self.dial_timeout)
            .field("mirror_of", &self.mirror_of)
            .field("proxy", &self.proxy)
            .field("said_by", &self.said_by)
            .finish()
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<toml::Spanned<String>, RawHost>,
    // The keys of the server itself; serde cannot flatten and deny unknown keys at once.
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<RawClient>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
    proxy: Option<String>,
    fallback: Option<toml::Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<RawClient>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(&self) -> &[String] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawClient {
    One(String),
    Many(Vec<OneOrMany>),
}

/// The places to ask for images of `registry` (`host[:port]`), in order; never empty. Reads the
/// directories anew at every call. `fallback` counts where the file says nothing of it. Blocking.
///
/// # Errors
/// [`HostsError`] naming the file and, where it is one, the key.
pub fn hosts(
    certs_d: &[PathBuf],
    registry: &str,
    fallback: Fallback,
) -> Result<Vec<Host>, HostsError> {
    Ok(configured(certs_d, registry, fallback, true)?
        .unwrap_or_else(|| vec![plain(registry, false)]))
}

/// What the directories say of `registry`; `None` when they say nothing. `_default` counts only
/// where `or_default` says so.
pub(crate) fn configured(
    certs_d: &[PathBuf],
    registry: &str,
    fallback: Fallback,
    or_default: bool,
) -> Result<Option<Vec<Host>>, HostsError> {
    for dir in certs_d {
        for name in directory_names(registry) {
            let dir = dir.join(&name);
            if (name == DEFAULT_DIRECTORY && !or_default) || !dir.is_dir() {
                continue;
            }
            let file = dir.join("hosts.toml");
            return match read(&file) {
                Ok(text) => parse(&file, &text, registry, fallback).map(Some),
                Err(HostsError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    Ok(Some(vec![with_docker_files(&dir, registry)?]))
                }
                Err(error) => Err(error),
            };
        }
    }
    Ok(None)
}

fn directory_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.ends_with(']')
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.into());
    names.push(DEFAULT_DIRECTORY.into());
    names
}

/// The line a byte of `text` is on, counted from 1.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    let before = &text.as_bytes()[..at.min(text.len())];
    before.iter().filter(|b| **b == b'\n').count() + 1
}

pub(crate) fn read(path: &Path) -> Result<String, HostsError> {
    let read = || {
        let length = std::fs::metadata(path)?.len();
        if length > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("{length} bytes long")));
        }
        std::fs::read_to_string(path)
    };
    read().map_err(|source| HostsError::Read {
        path: path.into(),
        source,
    })
}

/// The registry itself with nothing configured, or only TLS files.
pub(crate) fn plain(registry: &str, has_tls_files: bool) -> Host {
    let (host, port) = split_port(registry);
    let scheme = if is_loopback(host) && port != Some("443") && !has_tls_files {
        "http"
    } else {
        "https"
    };
    let served_by = if registry == DEFAULT_HOST {
        DOCKER_HUB
    } else {
        registry
    };
    let url = format!("{scheme}://{served_by}/v2");
    Host {
        url: Url::parse(&url).expect("a reference's host is a URL's host"),
        pull: true,
        resolve: true,
        tls: Tls::default(),
        headers: HeaderMap::new(),
        dial_timeout: None,
        mirror_of: None,
        proxy: Proxy::Environment,
        said_by: None,
    }
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    }
}

/// True for `localhost` and loopback addresses, without a port.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn with_docker_files(dir: &Path, registry: &str) -> Result<Host, HostsError> {
    let error = |source| HostsError::Read {
        path: dir.into(),
        source,
    };
    let mut tls = Tls::default();
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(error)? {
        paths.push(entry.map_err(error)?.path());
    }
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => tls.client = Some((path.clone(), Some(path.with_extension("key")))),
            _ => {}
        }
    }
    let mut host = plain(registry, tls != Tls::default());
    host.tls = tls;
    host.said_by = Some(dir.into());
    Ok(host)
}

/// Parses a hosts.toml for `registry`; `path` is for errors and for the files named in it.
///
/// # Errors
/// [`HostsError::Invalid`].
pub fn parse(
    path: &Path,
    text: &str,
    registry: &str,
    fallback: Fallback,
) -> Result<Vec<Host>, HostsError> {
    let invalid = |why: String| HostsError::Invalid {
        path: path.into(),
        why,
    };
    let raw: RawFile = toml::from_str(text).map_err(|error| {
        let line = line_of(text, error.span().map_or(0, |span| span.start));
        invalid(format!("line {line}: {}", error.message()))
    })?;
    if raw.host.len() > MAX_HOSTS {
        return Err(invalid(format!("more than {MAX_HOSTS} hosts")));
    }
    let mut in_order: Vec<(toml::Spanned<String>, RawHost)> = raw.host.into_iter().collect();
    in_order.sort_by_key(|(key, _)| key.span().start);
    let fallback = match &raw.fallback {
        None => fallback,
        Some(word) => match word.get_ref().as_str() {
            "origin" => Fallback::Origin,
            "never" => Fallback::Never,
            other => {
                let line = line_of(text, word.span().start);
                return Err(invalid(format!(
                    "line {line}: fallback {other:?} is neither origin nor never"
                )));
            }
        },
    };
    let mut hosts = Vec::new();
    for (url, host) in in_order {
        // What stands before an "@" is a password that should not be there.
        let shown = url.get_ref().rsplit('@').next().unwrap_or_default();
        let line = line_of(text, url.span().start);
        let key = format!("line {line}: host.{shown:?}");
        hosts.push(convert(path, &key, Some(url.get_ref()), host, registry).map_err(invalid)?);
    }
    let server = RawHost {
        capabilities: raw.capabilities,
        ca: raw.ca,
        client: raw.client,
        skip_verify: raw.skip_verify,
        header: raw.header,
        override_path: raw.override_path,
        dial_timeout: raw.dial_timeout,
        proxy: raw.proxy,
    };
    let url = raw.server.as_deref().filter(|url| !url.is_empty());
    let server = convert(path, "server", url, server, registry).map_err(invalid)?;
    // A server that is named instead of the registry is no fallback to it.
    if fallback == Fallback::Origin || hosts.is_empty() || server.mirror_of.is_some() {
        hosts.push(server);
    }
    Ok(hosts)
}

fn convert(
    path: &Path,
    key: &str,
    url: Option<&str>,
    raw: RawHost,
    registry: &str,
) -> Result<Host, String> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let tls = Tls {
        ca: raw
            .ca
            .iter()
            .flat_map(OneOrMany::list)
            .map(|file| dir.join(file))
            .collect(),
        client: client(dir, key, raw.client)?,
        skip_verify: raw.skip_verify.unwrap_or(false),
    };
    let mut host = plain(registry, tls != Tls::default());
    if let Some(text) = url {
        host.url = base_url(text, raw.override_path.unwrap_or(false))
            .map_err(|why| format!("{key}: {why}"))?;
        let name = crate::auth::authority(&host.url);
        let hub = registry == DEFAULT_HOST && name == DOCKER_HUB;
        host.mirror_of = (name != registry && !hub).then(|| registry.to_owned());
    }
    if let Some(capabilities) = raw.capabilities {
        (host.pull, host.resolve) = (false, false);
        for capability in capabilities {
            match &*capability {
                "pull" => host.pull = true,
                "resolve" => host.resolve = true,
                "push" | "referrers" => {}
                other => {
                    return Err(format!(
                        "{key}: capability {other:?} is none of pull, resolve, push, referrers"
                    ));
                }
            }
        }
    }
    for (name, values) in &raw.header {
        let header: HeaderName = name
            .parse()
            .map_err(|_| format!("{key}: {name:?} is not a header name"))?;
        for value in values.list() {
            let mut value = HeaderValue::from_str(value)
                .map_err(|_| format!("{key}: the value of header {name:?} is not valid"))?;
            value.set_sensitive(true);
            host.headers.append(header.clone(), value);
        }
    }
    host.dial_timeout = match raw.dial_timeout {
        None => None,
        Some(text) => Some(
            parse_duration(&text)
                .ok_or_else(|| format!("{key}: dial_timeout {text:?} is not a duration"))?,
        ),
    };
    host.proxy = match raw.proxy.as_deref() {
        None => Proxy::Environment,
        Some("direct" | "") => Proxy::Direct,
        Some(text) => {
            Proxy::Through(ProxyUrl::parse(text).map_err(|error| format!("{key}: proxy: {error}"))?)
        }
    };
    host.tls = tls;
    host.said_by = Some(path.into());
    Ok(host)
}

fn client(
    dir: &Path,
    key: &str,
    raw: Option<RawClient>,
) -> Result<Option<(PathBuf, Option<PathBuf>)>, String> {
    let pairs = match raw {
        None => return Ok(None),
        Some(RawClient::One(file)) => vec![OneOrMany::One(file)],
        Some(RawClient::Many(pairs)) => pairs,
    };
    let [pair] = &pairs[..] else {
        return Err(format!("{key}: client must name exactly one certificate"));
    };
    match pair.list() {
        [both] => Ok(Some((dir.join(both), None))),
        [cert, key] if key.is_empty() => Ok(Some((dir.join(cert), None))),
        [cert, key] => Ok(Some((dir.join(cert), Some(dir.join(key))))),
        _ => Err(format!("{key}: client takes a certificate and its key")),
    }
}

/// The URL requests are made below.
fn base_url(text: &str, override_path: bool) -> Result<Url, String> {
    let text = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    // What stands before an "@" is a password that should not be there.
    let shown = text.rsplit('@').next().unwrap_or_default();
    let mut url = Url::parse(&text).map_err(|error| format!("{shown:?} is not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("{shown:?} is not an http or https URL"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("credentials do not belong into a URL".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("{shown:?} has a query or a fragment"));
    }
    if url.host_str() == Some(DEFAULT_HOST) {
        url.set_host(Some(DOCKER_HUB))
            .map_err(|error| error.to_string())?;
    }
    let path = url.path().trim_end_matches('/').to_owned();
    if override_path || path.ends_with("/v2") {
        url.set_path(&path);
    } else {
        url.set_path(&format!("{path}/v2"));
    }
    Ok(url)
}

/// Go's `time.ParseDuration` for what is not negative: `1m30s`, `1.5h`, `200ms`.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0f64;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let value: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let seconds = match &rest[..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += value * seconds;
        rest = &rest[end..];
    }
    if text.is_empty() {
        return None;
    }
    Duration::try_from_secs_f64(total).ok()
}

#[cfg(test)]
mod tests;
