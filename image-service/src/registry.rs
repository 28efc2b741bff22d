//! Talking to registries: manifests and blobs over HTTP, from the first configured host that
//! has them.
//!
//! [`Registries`] lives as long as the daemon and keeps connections, tokens and what is known of
//! hosts in trouble; one [`Registry`] serves one pull. A request that is challenged is answered
//! once; a redirect is followed by hand, so that neither `Authorization` nor configured headers
//! reach another host; what may pass (429, 5xx, a lost connection) is tried again as
//! [`crate::retry`] says.
//! Source: distribution-spec 1.1, "Pulling manifests", "Pulling blobs", "Error codes".

mod answer;
mod blob;
mod error;
mod request;

pub use blob::Blob;
pub use error::{Detail, Place, RegistryError};

use crate::auth::{self, Authorizer, Credentials, Holder, Tokens};
use crate::auth_file::{AuthFile, Found, Helpers, SecretSource};
use crate::clients::Clients;
use crate::digest::Digest;
use crate::health::Health;
use crate::hosts::Host;
use crate::manifest;
use crate::reference::Reference;
use crate::retry::Retries;
use crate::sources::{RegistryFiles, Source, SourcesError};
use http::{Method, header};
use request::Ask;
use reqwest::{Client, Response};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;

/// How long to wait for a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, TLS included, where hosts.toml says nothing.
    pub connect: Duration,
    /// For the next byte of an answer.
    pub no_progress: Duration,
    /// For all of a manifest, config or token.
    pub document: Duration,
    /// Over how much waiting for the network a layer's rate is measured. Time that passes while
    /// the unpacking is behind is no waiting.
    pub rate_window: Duration,
    /// The least a layer must bring, in bytes per second; 0: anything will do.
    pub min_rate: u64,
}

impl Default for Timeouts {
    /// 15 s: a dead mirror must not use up the kubelet's two minutes. 60 s: registries that
    /// fetch from elsewhere first are silent for long. 1 KiB/s over 30 s: the slowest links
    /// there are bring more, even with several layers at once.
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(15),
            no_progress: Duration::from_secs(60),
            document: Duration::from_secs(90),
            rate_window: Duration::from_secs(30),
            min_rate: 1024,
        }
    }
}

/// All registries, for all pulls.
pub struct Registries {
    files: RegistryFiles,
    timeouts: Timeouts,
    clients: Clients,
    tokens: Arc<Tokens>,
    health: Health,
    helpers: Helpers,
}

/// One way to one host.
struct Endpoint {
    host: Host,
    repository: String,
    redirected_by: Option<std::path::PathBuf>,
    /// `host[:port]`.
    name: String,
    authorizer: Authorizer,
    clear: OnceCell<Client>,
    secure: OnceCell<Client>,
}

/// What a pull asks and whom.
pub struct Registry {
    shared: Arc<Registries>,
    endpoints: Vec<Endpoint>,
    registry: String,
}

/// One of the hosts to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Which.
    pub at: usize,
    /// Nobody can be asked after it.
    pub is_last: bool,
}

impl Registries {
    /// Nothing is read or sent yet.
    pub fn new(files: RegistryFiles, timeouts: Timeouts) -> Arc<Registries> {
        Arc::new(Registries {
            files,
            timeouts,
            clients: Clients::default(),
            tokens: Arc::default(),
            health: Health::default(),
            helpers: Helpers::in_path(),
        })
    }

    /// What `name` means, to be tried in this order; never empty. See [`crate::registries_conf`].
    ///
    /// # Errors
    /// [`RegistryError::Sources`].
    pub async fn references(self: &Arc<Self>, name: &str) -> Result<Vec<Reference>, RegistryError> {
        let (shared, name) = (Arc::clone(self), name.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            let read = shared.files.read()?;
            Ok::<_, SourcesError>(read.conf.references(&name)?)
        });
        Ok(found.await.expect("reading files does not panic")?)
    }

    /// Which file makes a short name mean something else, for people.
    pub(crate) async fn alias_said_by(self: &Arc<Self>, name: &str) -> Option<std::path::PathBuf> {
        let (shared, name) = (Arc::clone(self), name.to_owned());
        let found = tokio::task::spawn_blocking(move || {
            let read = shared.files.read().ok()?;
            read.conf.alias_said_by(&name).map(Into::into)
        });
        found.await.ok().flatten()
    }

    /// For one pull of `reference`; reads the configuration now.
    ///
    /// # Errors
    /// [`RegistryError::Sources`], [`RegistryError::Credentials`]; nothing is sent yet.
    pub async fn open(
        self: &Arc<Self>,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Registry, RegistryError> {
        if let Some(credentials) = &credentials {
            credentials.secret()?;
        }
        let (shared, wanted) = (Arc::clone(self), reference.clone());
        let endpoints = tokio::task::spawn_blocking(move || {
            let read = shared.files.read()?;
            let sources = shared.files.sources(&read.conf, &wanted)?;
            sources
                .into_iter()
                .map(|source| shared.endpoint(source, credentials.as_ref(), &read.auth))
                .collect::<Result<Vec<_>, RegistryError>>()
        })
        .await
        .expect("reading the configuration does not panic")?;
        Ok(Registry {
            shared: Arc::clone(self),
            endpoints,
            registry: reference.host().into(),
        })
    }

    fn endpoint(
        &self,
        source: Source,
        pull: Option<&Credentials>,
        auth: &AuthFile,
    ) -> Result<Endpoint, RegistryError> {
        let name = auth::authority(&source.host.url);
        let is_mirror = source.host.mirror_of.is_some();
        let holder = holder(pull, auth, &name, &source.repository, is_mirror)?;
        Ok(Endpoint {
            authorizer: Authorizer::new(
                Arc::clone(&self.tokens),
                self.helpers.clone(),
                holder,
                &source.host.url,
                &source.repository,
            ),
            host: source.host,
            repository: source.repository,
            redirected_by: source.redirected_by,
            name,
            clear: OnceCell::new(),
            secure: OnceCell::new(),
        })
    }
}

/// Whose credentials a host gets: the pull's own when they name it; the node's for a mirror that
/// it has some for; the pull's that name nobody, as containerd has it; the node's.
fn holder(
    pull: Option<&Credentials>,
    auth: &AuthFile,
    host: &str,
    repository: &str,
    is_mirror: bool,
) -> Result<Holder, RegistryError> {
    let own = match pull.filter(|pull| pull.are_for(host)) {
        None => None,
        Some(pull) => pull.secret()?.map(|secret| (secret, pull.are_addressed())),
    };
    let of_pull = |secret| Ok(Holder::Secret(secret, SecretSource::Pull));
    if let Some((secret, true)) = own {
        return of_pull(secret);
    }
    let found = auth.find(host, repository).map_err(SourcesError::from)?;
    match (own, &found) {
        (
            Some(_),
            Found::Secret(..)
            | Found::Ask {
                for_this_host: true,
                ..
            },
        ) if is_mirror => Ok(Holder::of(found)),
        (Some((secret, _)), _) => of_pull(secret),
        (None, _) => Ok(Holder::of(found)),
    }
}

impl Registry {
    /// The hosts that may be asked what a tag means, in order: those in trouble last.
    ///
    /// # Errors
    /// [`RegistryError::NoHost`].
    pub fn resolvers(&self) -> Result<Vec<Turn>, RegistryError> {
        self.capable("resolve", |host| host.resolve)
    }

    /// The hosts that may be asked for content by digest, in order: those in trouble last.
    ///
    /// # Errors
    /// [`RegistryError::NoHost`].
    pub fn pullers(&self) -> Result<Vec<Turn>, RegistryError> {
        self.capable("pull", |host| host.pull)
    }

    fn capable(
        &self,
        capability: &'static str,
        can: impl Fn(&Host) -> bool,
    ) -> Result<Vec<Turn>, RegistryError> {
        let now = Instant::now();
        let capable = (0..self.endpoints.len()).filter(|at| can(&self.endpoints[*at].host));
        let (aside, sound): (Vec<usize>, Vec<usize>) = capable.partition(|at| {
            let key = self.endpoints[*at].host.url.as_str();
            self.shared.health.aside(key, now).is_some()
        });
        let count = aside.len() + sound.len();
        if count == 0 {
            return Err(RegistryError::NoHost {
                registry: self.registry.clone(),
                capability,
            });
        }
        let turns = sound.into_iter().chain(aside).enumerate();
        Ok(turns
            .map(|(nth, at)| Turn {
                at,
                is_last: nth + 1 == count,
            })
            .collect())
    }

    /// `host[:port]` of a host.
    pub fn name(&self, at: usize) -> &str {
        &self.endpoints[at].name
    }

    /// How each host is reached, in the configured order, for people.
    pub(crate) fn routes(&self) -> Vec<Route<'_>> {
        let now = Instant::now();
        let route = |(at, endpoint): (usize, &Endpoint)| {
            let environment = &self.shared.files.proxies;
            let url = &endpoint.host.url;
            Route {
                at,
                host: &self.endpoints[at].host,
                repository: &self.endpoints[at].repository,
                redirected_by: self.endpoints[at].redirected_by.as_deref(),
                proxy: crate::clients::proxy_of(&endpoint.host.proxy, environment, url),
                holder: self.endpoints[at].authorizer.holder(),
                aside: self.shared.health.aside(url.as_str(), now),
            }
        };
        self.endpoints.iter().enumerate().map(route).collect()
    }

    /// Remembers that a host sent something else than what it was asked for.
    pub(crate) fn sent_wrong(&self, at: usize, what: String) {
        let key = self.endpoints[at].host.url.as_str();
        self.shared.health.failed(key, None, what, Instant::now());
    }

    fn remember(&self, at: usize, error: &RegistryError) {
        if error.is_trouble() {
            let endpoint = &self.endpoints[at];
            let (key, why) = (endpoint.host.url.as_str(), error.to_string());
            let health = &self.shared.health;
            health.failed(key, error.retry_after(), why, Instant::now());
        }
    }

    /// The digest a tag has at a host, if that tells without sending the manifest; for a digest,
    /// whether the host would give it to us.
    ///
    /// # Errors
    /// Only those that sending the manifest would meet as well.
    pub async fn digest_of(
        &self,
        turn: Turn,
        tag_or_digest: &str,
    ) -> Result<Option<Digest>, RegistryError> {
        let path = format!("manifests/{tag_or_digest}");
        let ask = Ask {
            method: Method::HEAD,
            path: &path,
            accept: Some(manifest::ACCEPT),
            range_from: 0,
            by_digest: tag_or_digest.contains(':'),
        };
        match self.send(turn, &ask).await {
            Ok(response) => Ok(response
                .headers()
                .get("docker-content-digest")
                .and_then(|value| value.to_str().ok())
                .and_then(|text| text.parse().ok())),
            // Not every registry knows HEAD, and its refusals have no body to show.
            Err(
                RegistryError::NotFound { .. }
                | RegistryError::Status { .. }
                | RegistryError::Denied { .. },
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a host has the manifest and would give it to us.
    ///
    /// # Errors
    /// Those that sending the manifest would meet.
    pub(crate) async fn admits(&self, turn: Turn, digest: &Digest) -> Result<(), RegistryError> {
        let path = format!("manifests/{digest}");
        let ask = |method| Ask {
            method,
            path: &path,
            accept: Some(manifest::ACCEPT),
            range_from: 0,
            by_digest: true,
        };
        match self.send(turn, &ask(Method::HEAD)).await {
            // One that does not know HEAD is asked for all of it.
            Err(RegistryError::Status { .. }) => {
                self.send(turn, &ask(Method::GET)).await.map(|_| ())
            }
            other => other.map(|_| ()),
        }
    }

    /// A manifest or index, by tag or digest, of at most `limit_bytes`.
    ///
    /// # Errors
    /// Any [`RegistryError`].
    pub async fn manifest(
        &self,
        turn: Turn,
        tag_or_digest: &str,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let path = format!("manifests/{tag_or_digest}");
        self.document(turn, &path, Some(manifest::ACCEPT), limit_bytes)
            .await
    }

    /// A small blob, whole.
    ///
    /// # Errors
    /// Any [`RegistryError`].
    pub async fn small_blob(
        &self,
        turn: Turn,
        digest: &Digest,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let path = format!("blobs/{digest}");
        self.document(turn, &path, None, limit_bytes).await
    }

    async fn document(
        &self,
        turn: Turn,
        path: &str,
        accept: Option<&'static str>,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let ask = Ask {
            method: Method::GET,
            path,
            accept,
            range_from: 0,
            by_digest: path.contains(':'),
        };
        let mut retries = Retries::new(turn.is_last);
        loop {
            let response = self.send(turn, &ask).await?;
            let error = match self.read(response, limit_bytes).await {
                Ok(document) => return Ok(document),
                Err(error) => error,
            };
            // A body that broke off is as good as no answer.
            let pause = retries.next(None).filter(|_| error.passes_soon());
            let Some(pause) = pause else {
                self.remember(turn.at, &error);
                return Err(error);
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn read(
        &self,
        mut response: Response,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let place = Place::of(response.url());
        let too_large = || RegistryError::TooLarge {
            place: place.clone(),
            limit_bytes,
        };
        if response.content_length().is_some_and(|n| n > limit_bytes) {
            return Err(too_large());
        }
        let content_type = response
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let mut bytes = Vec::new();
        let reading = async {
            let patience = self.shared.timeouts.no_progress;
            while let Some(chunk) =
                RegistryError::within(patience, &place, response.chunk()).await?
            {
                if bytes.len() as u64 + chunk.len() as u64 > limit_bytes {
                    return Err(too_large());
                }
                bytes.extend_from_slice(&chunk);
            }
            Ok(())
        };
        let waited = self.shared.timeouts.document;
        match tokio::time::timeout(waited, reading).await {
            Ok(read) => read?,
            Err(_) => {
                return Err(RegistryError::Slow {
                    place,
                    bytes: bytes.len() as u64,
                    waited,
                });
            }
        }
        Ok(Document {
            content_type,
            bytes,
        })
    }
}

/// A manifest as it was sent.
pub struct Document {
    /// What the registry called it.
    pub content_type: Option<String>,
    /// Its bytes, of which nothing is verified yet.
    pub bytes: Vec<u8>,
}

/// How one host is reached.
pub(crate) struct Route<'a> {
    pub at: usize,
    pub host: &'a Host,
    pub repository: &'a str,
    pub redirected_by: Option<&'a std::path::Path>,
    pub proxy: Option<crate::proxy::ProxyUrl>,
    pub holder: &'a Holder,
    pub aside: Option<(Duration, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_gets_its_own_credentials_and_the_registry_the_pulls() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        let text = r#"{"auths": {"m.n": {"registrytoken": "mirrors"},
                                 "a.b": {"registrytoken": "nodes"}}}"#;
        std::fs::write(&path, text).unwrap();
        let auth = AuthFile::load(Some(&path), &["store".into()]).unwrap();
        let pull = |address: &str| Credentials {
            registry_token: "pulls".into(),
            server_address: address.into(),
            ..Credentials::default()
        };
        let who = |pull: Option<&Credentials>, host: &str, is_mirror: bool| match holder(
            pull, &auth, host, "x", is_mirror,
        )
        .unwrap()
        {
            Holder::Nobody => "nobody".to_owned(),
            Holder::Secret(_, source) => source.to_string(),
            Holder::Helpers(names) => names.join(","),
        };
        let of_file = |entry: &str| format!("{}, {entry}", path.display());
        let (any, named) = (pull(""), pull("https://a.b/v1/"));
        assert_eq!(who(Some(&any), "a.b", false), "the pull's own");
        assert_eq!(who(Some(&any), "m.n", true), of_file("m.n"));
        assert_eq!(who(Some(&any), "other", true), "the pull's own");
        assert_eq!(who(Some(&named), "a.b", false), "the pull's own");
        assert_eq!(who(Some(&named), "m.n", true), of_file("m.n"));
        assert_eq!(who(Some(&named), "other", true), "store");
        assert_eq!(who(None, "a.b", false), of_file("a.b"));
        assert_eq!(who(None, "other", false), "store");
    }
}
