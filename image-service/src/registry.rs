//! Talking to registries: manifests and blobs over HTTP, from the first configured host that
//! has them.
//!
//! One [`Registry`] serves one pull. A request that is challenged is answered once; a redirect
//! is followed by hand, so that neither `Authorization` nor configured headers reach another
//! host; what may pass (429 with a short Retry-After, 5xx, a lost connection) is tried again a
//! few times with growing pauses.
//! Source: distribution-spec 1.1, "Pulling manifests", "Pulling blobs", "Error codes".

use crate::auth::{self, AuthError, Authorizer, BadCredentials, Challenged, Credentials};
use crate::digest::Digest;
use crate::hosts::{self, Host, HostsError};
use crate::manifest;
use crate::reference::Reference;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::{Client, Response};
use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;
use url::Url;

/// Most redirects of one request; registries use one or two.
const MAX_REDIRECTS: usize = 5;
/// How often a request is sent before its failure counts.
const ATTEMPTS: u32 = 3;
/// The first pause between attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest Retry-After that is waited for; the kubelet backs off by itself for more.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(5);
/// How often a blob that broke off is continued.
const MAX_RESUMES: u32 = 5;
/// How much of an error's body is read, in bytes.
const MAX_ERROR_BYTES: usize = 8 << 10;
/// Largest PEM file, in bytes: the bundles of whole distributions have some 250 KiB.
const MAX_PEM_BYTES: u64 = 4 << 20;

/// How long to wait for a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, TLS included, where hosts.toml says nothing.
    pub connect: Duration,
    /// For the next byte of an answer.
    pub no_progress: Duration,
}

impl Default for Timeouts {
    /// 15 s: a dead mirror must not use up the kubelet's two minutes. 60 s: registries that
    /// fetch from elsewhere first are silent for long.
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(15),
            no_progress: Duration::from_secs(60),
        }
    }
}

/// What was asked, for messages: scheme, host and path, never a query or a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(String);

impl Place {
    fn of(url: &Url) -> Place {
        Place(format!(
            "{}://{}{}",
            url.scheme(),
            auth::authority(url),
            url.path()
        ))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a registry said of its refusal; may be nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail(Option<String>);

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// Why a registry did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It is not there.
    #[error("{place}: not found{detail}")]
    NotFound {
        /// What was asked.
        place: Place,
        /// What the registry said.
        detail: Detail,
    },
    /// Without credentials, or with wrong ones.
    #[error("{place}: unauthorized{detail}")]
    Unauthorized {
        /// What was asked.
        place: Place,
        /// What the registry said.
        detail: Detail,
        /// Why the challenge could not be answered, if that is it.
        source: Option<AuthError>,
    },
    /// With credentials that do not allow it.
    #[error("{place}: denied{detail}")]
    Denied {
        /// What was asked.
        place: Place,
        /// What the registry said.
        detail: Detail,
    },
    /// The registry wants to be left alone for a while.
    #[error("{place}: too many requests{detail}")]
    TooManyRequests {
        /// What was asked.
        place: Place,
        /// What the registry said.
        detail: Detail,
        /// For how long, if it said.
        retry_after: Option<Duration>,
    },
    /// The registry, or its token service, is in trouble.
    #[error("{place}: the server failed with status {status}{detail}")]
    Server {
        /// What was asked.
        place: Place,
        /// The status, 5xx.
        status: u16,
        /// What the registry said.
        detail: Detail,
    },
    /// A status that fits nothing.
    #[error("{place}: unexpected status {status}{detail}")]
    Status {
        /// What was asked.
        place: Place,
        /// The status.
        status: u16,
        /// What the registry said.
        detail: Detail,
    },
    /// No TLS connection can be trusted, or made.
    #[error("{place}: no TLS connection")]
    Tls {
        /// What was asked.
        place: Place,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// No connection, or it broke.
    #[error("{place}: unreachable")]
    Unreachable {
        /// What was asked.
        place: Place,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// Nothing came for too long.
    #[error("{place}: no answer in time")]
    Stalled {
        /// What was asked.
        place: Place,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// Larger than is taken.
    #[error("{place}: larger than {limit_bytes} bytes")]
    TooLarge {
        /// What was asked.
        place: Place,
        /// The most that is taken.
        limit_bytes: u64,
    },
    /// Not as large as the manifest says.
    #[error("{place}: {found} bytes long where the manifest says {expected}")]
    Length {
        /// What was asked.
        place: Place,
        /// What the manifest says.
        expected: u64,
        /// What the registry says.
        found: u64,
    },
    /// A redirect that is not followed.
    #[error("{place}: the redirect is not followed: {why}")]
    Redirect {
        /// What was asked.
        place: Place,
        /// Why not.
        why: &'static str,
    },
    /// No configured host may be asked.
    #[error("no configured host of {registry} has the capability {capability:?}")]
    NoHost {
        /// The registry.
        registry: String,
        /// "pull" or "resolve".
        capability: &'static str,
    },
    /// The credentials are malformed.
    #[error("the credentials cannot be used")]
    Credentials(#[from] BadCredentials),
    /// The configuration of the registry.
    #[error("the configuration of {registry} cannot be used")]
    Hosts {
        /// The registry.
        registry: String,
        /// Which file and key.
        source: HostsError,
    },
    /// A CA or client certificate of the configuration.
    #[error("{path}: {why}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The HTTP client cannot be made.
    #[error("cannot make an HTTP client for {host}")]
    Client {
        /// For which host.
        host: String,
        /// Why.
        source: reqwest::Error,
    },
}

impl RegistryError {
    /// True when the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            RegistryError::TooManyRequests { .. }
            | RegistryError::Server { .. }
            | RegistryError::Unreachable { .. }
            | RegistryError::Stalled { .. } => true,
            RegistryError::Unauthorized { source, .. } => {
                source.as_ref().is_some_and(AuthError::is_transient)
            }
            RegistryError::NotFound { .. }
            | RegistryError::Denied { .. }
            | RegistryError::Status { .. }
            | RegistryError::Tls { .. }
            | RegistryError::TooLarge { .. }
            | RegistryError::Length { .. }
            | RegistryError::Redirect { .. }
            | RegistryError::NoHost { .. }
            | RegistryError::Credentials(_)
            | RegistryError::Hosts { .. }
            | RegistryError::Certificate { .. }
            | RegistryError::Client { .. } => false,
        }
    }

    /// True when it is worth asking the same host again at once: not after a timeout, which
    /// was patient enough.
    fn passes_soon(&self) -> bool {
        match self {
            RegistryError::Unreachable { source, .. } => !source.is_timeout(),
            RegistryError::Stalled { .. } => false,
            error => error.is_transient(),
        }
    }

    fn transport(place: Place, error: reqwest::Error) -> RegistryError {
        let source = error.without_url();
        if source.is_timeout() {
            return if source.is_connect() {
                RegistryError::Unreachable { place, source }
            } else {
                RegistryError::Stalled { place, source }
            };
        }
        if is_tls(&source) {
            return RegistryError::Tls { place, source };
        }
        RegistryError::Unreachable { place, source }
    }
}

/// True when rustls is somewhere among the causes; an `io::Error` hides its own inner one.
fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<rustls::Error>() {
            return true;
        }
        let inner = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        if inner.is_some_and(|inner| is_tls(inner)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A manifest as it was sent.
pub struct Document {
    /// What the registry called it.
    pub content_type: Option<String>,
    /// Its bytes, of which nothing is verified yet.
    pub bytes: Vec<u8>,
}

struct Endpoint {
    host: Host,
    name: String,
    /// Made when first used: reading the system's CAs takes milliseconds.
    clear: OnceCell<Client>,
    secure: OnceCell<Client>,
}

/// What a pull asks and whom.
pub struct Registry {
    endpoints: Vec<Endpoint>,
    repository: String,
    registry: String,
    authorizer: Authorizer,
    timeouts: Timeouts,
}

struct Ask<'a> {
    method: Method,
    /// Below the repository: `manifests/latest`.
    path: &'a str,
    accept: Option<&'static str>,
    range_from: u64,
    /// Content that is verified afterwards may come in the clear.
    by_digest: bool,
}

impl Registry {
    /// For one pull of `reference`; reads the configuration below `certs_d` now.
    ///
    /// # Errors
    /// [`RegistryError::Hosts`], [`RegistryError::Credentials`]; nothing is sent yet.
    pub async fn open(
        reference: &Reference,
        certs_d: &[PathBuf],
        credentials: Option<Credentials>,
        timeouts: Timeouts,
    ) -> Result<Registry, RegistryError> {
        let registry = reference.host().to_owned();
        let (dirs, name) = (certs_d.to_vec(), registry.clone());
        let hosts = tokio::task::spawn_blocking(move || hosts::hosts(&dirs, &name))
            .await
            .expect("reading hosts.toml does not panic")
            .map_err(|source| RegistryError::Hosts {
                registry: registry.clone(),
                source,
            })?;
        let endpoints = hosts.into_iter().map(|host| Endpoint {
            name: auth::authority(&host.url),
            host,
            clear: OnceCell::new(),
            secure: OnceCell::new(),
        });
        Ok(Registry {
            endpoints: endpoints.collect(),
            repository: reference.repository().into(),
            registry,
            authorizer: Authorizer::new(credentials)?,
            timeouts,
        })
    }

    /// The hosts that may be asked what a tag means, in order.
    ///
    /// # Errors
    /// [`RegistryError::NoHost`].
    pub fn resolvers(&self) -> Result<Vec<usize>, RegistryError> {
        self.capable("resolve", |host| host.resolve)
    }

    /// The hosts that may be asked for content by digest, in order.
    ///
    /// # Errors
    /// [`RegistryError::NoHost`].
    pub fn pullers(&self) -> Result<Vec<usize>, RegistryError> {
        self.capable("pull", |host| host.pull)
    }

    fn capable(
        &self,
        capability: &'static str,
        can: impl Fn(&Host) -> bool,
    ) -> Result<Vec<usize>, RegistryError> {
        let capable = |at: &usize| can(&self.endpoints[*at].host);
        let found: Vec<usize> = (0..self.endpoints.len()).filter(capable).collect();
        if found.is_empty() {
            return Err(RegistryError::NoHost {
                registry: self.registry.clone(),
                capability,
            });
        }
        Ok(found)
    }

    /// `host[:port]` of a host.
    pub fn name(&self, at: usize) -> &str {
        &self.endpoints[at].name
    }

    /// The digest `tag` has at a host, if that tells without sending the manifest.
    ///
    /// # Errors
    /// Only those that sending the manifest would meet as well.
    pub async fn digest_of(&self, at: usize, tag: &str) -> Result<Option<Digest>, RegistryError> {
        let path = format!("manifests/{tag}");
        let ask = Ask {
            method: Method::HEAD,
            path: &path,
            accept: Some(manifest::ACCEPT),
            range_from: 0,
            by_digest: false,
        };
        match self.send(at, &ask).await {
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

    /// A manifest or index, by tag or digest, of at most `limit_bytes`.
    ///
    /// # Errors
    /// Any [`RegistryError`].
    pub async fn manifest(
        &self,
        at: usize,
        tag_or_digest: &str,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let path = format!("manifests/{tag_or_digest}");
        self.document(at, &path, Some(manifest::ACCEPT), limit_bytes)
            .await
    }

    /// A small blob, whole.
    ///
    /// # Errors
    /// Any [`RegistryError`].
    pub async fn small_blob(
        &self,
        at: usize,
        digest: &Digest,
        limit_bytes: u64,
    ) -> Result<Document, RegistryError> {
        let path = format!("blobs/{digest}");
        self.document(at, &path, None, limit_bytes).await
    }

    async fn document(
        &self,
        at: usize,
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
        let mut response = self.send(at, &ask).await?;
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
        let broken = |error| RegistryError::transport(place.clone(), error);
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            if bytes.len() as u64 + chunk.len() as u64 > limit_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Document {
            content_type,
            bytes,
        })
    }

    /// A layer as a stream, which continues by itself where a connection breaks.
    ///
    /// # Errors
    /// Any [`RegistryError`]; [`RegistryError::Length`] when it cannot be the right one.
    pub async fn blob(
        self: &Arc<Self>,
        at: usize,
        digest: &Digest,
        size: u64,
    ) -> Result<Blob, RegistryError> {
        let mut blob = Blob {
            registry: Arc::clone(self),
            at,
            path: format!("blobs/{digest}"),
            size,
            seen: 0,
            to_skip: 0,
            resumes: 0,
            stalled: false,
            response: None,
        };
        blob.connect().await?;
        Ok(blob)
    }

    /// Sends a request until it succeeds or its failure is final.
    async fn send(&self, at: usize, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let error = match self.authorized(at, ask).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let wait = match &error {
                RegistryError::TooManyRequests { retry_after, .. } => retry_after.unwrap_or(pause),
                _ => pause,
            };
            if !error.passes_soon() || attempt == ATTEMPTS || wait > MAX_RETRY_AFTER {
                return Err(error);
            }
            tracing::debug!(error = &error as &dyn StdError, attempt, "will ask again");
            tokio::time::sleep(wait).await;
            pause *= 2;
            attempt += 1;
        }
    }

    /// Sends a request, and once more if it is challenged.
    async fn authorized(&self, at: usize, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let endpoint = &self.endpoints[at];
        let mut url = endpoint.host.url.clone();
        let base = url.path().trim_end_matches('/');
        let path = format!("{base}/{}/{}", self.repository, ask.path);
        url.set_path(&path);
        if let Some(registry) = &endpoint.host.mirror_of {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let known = self.authorizer.known(&endpoint.name, &self.repository);
        let (response, at_home) = self.follow(endpoint, ask, &url, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED || !at_home {
            return checked(response).await;
        }
        let challenges: Vec<_> = response
            .headers()
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(auth::parse_challenges)
            .collect();
        let secure = challenges.iter().any(auth::Challenge::wants_https);
        let scheme = if secure { "https" } else { "http" };
        let answer = self.authorizer.answer(Challenged {
            http: self.client(endpoint, scheme).await?,
            host: &endpoint.host.url,
            repository: &self.repository,
            challenges: &challenges,
            refused: known.as_ref(),
        });
        let answer = match answer.await {
            Ok(answer) => answer,
            Err(source) => {
                let detail = detail(response).await;
                return Err(RegistryError::Unauthorized {
                    place: Place::of(&url),
                    detail,
                    source: Some(source),
                });
            }
        };
        let (response, _) = self.follow(endpoint, ask, &url, Some(&answer)).await?;
        checked(response).await
    }

    /// Sends a request and follows its redirects; tells whether the answer is the host's own.
    async fn follow(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<(Response, bool), RegistryError> {
        let mut url = url.clone();
        let mut at_home = true;
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = HeaderMap::new();
            if at_home {
                headers.extend(endpoint.host.headers.clone());
                if let Some(value) = authorization {
                    headers.insert(header::AUTHORIZATION, value.clone());
                }
            }
            if let Some(accept) = ask.accept {
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            }
            if ask.range_from > 0 {
                let range = format!("bytes={}-", ask.range_from);
                let range = HeaderValue::from_str(&range).expect("digits are a header");
                headers.insert(header::RANGE, range);
            }
            let client = self.client(endpoint, url.scheme()).await?;
            let response = client
                .request(ask.method.clone(), url.clone())
                .headers(headers)
                .send()
                .await
                .map_err(|error| RegistryError::transport(Place::of(&url), error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, at_home));
            }
            let refused = |why| RegistryError::Redirect {
                place: Place::of(&url),
                why,
            };
            let next = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| refused("it has no valid location"))?;
            if !matches!(next.scheme(), "http" | "https") || next.host_str().is_none() {
                return Err(refused("it leads to something else than http and https"));
            }
            if url.scheme() == "https" && next.scheme() == "http" && !ask.by_digest {
                return Err(refused("it leads from https to http for a tag"));
            }
            at_home = at_home && next.origin() == endpoint.host.url.origin();
            url = next;
        }
        Err(RegistryError::Redirect {
            place: Place::of(&url),
            why: "there are too many",
        })
    }

    async fn client<'a>(
        &self,
        endpoint: &'a Endpoint,
        scheme: &str,
    ) -> Result<&'a Client, RegistryError> {
        // One client for a host that is spoken to in the clear and never refers to https.
        let secure = scheme == "https";
        let cell = if secure {
            &endpoint.secure
        } else {
            &endpoint.clear
        };
        let (host, timeouts) = (endpoint.host.clone(), self.timeouts);
        cell.get_or_try_init(|| async move {
            tokio::task::spawn_blocking(move || build_client(&host, secure, timeouts))
                .await
                .expect("building a client does not panic")
        })
        .await
    }
}

fn build_client(host: &Host, secure: bool, timeouts: Timeouts) -> Result<Client, RegistryError> {
    // The default of the process; that it is set already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(host.dial_timeout.unwrap_or(timeouts.connect))
        .read_timeout(timeouts.no_progress);
    if host.url.host_str().is_some_and(hosts::is_loopback) {
        // As Go has it: a proxy's own loopback is somewhere else.
        builder = builder.no_proxy();
    }
    if !secure {
        // No CAs: none are needed, and a node without any can use such hosts.
        builder = builder.tls_certs_only([]);
    } else {
        let mut roots = Vec::new();
        for path in &host.tls.ca {
            let found = reqwest::Certificate::from_pem_bundle(&pem(path)?).map_err(|_| {
                RegistryError::Certificate {
                    path: path.clone(),
                    why: "not a PEM file of certificates".into(),
                }
            })?;
            if found.is_empty() {
                return Err(RegistryError::Certificate {
                    path: path.clone(),
                    why: "it has no certificate".into(),
                });
            }
            roots.extend(found);
        }
        builder = builder.tls_certs_merge(roots);
        if let Some((certificate, key)) = &host.tls.client {
            let mut both = pem(certificate)?;
            if let Some(key) = key {
                both.push(b'\n');
                both.extend(pem(key)?);
            }
            let identity =
                reqwest::Identity::from_pem(&both).map_err(|_| RegistryError::Certificate {
                    path: certificate.clone(),
                    why: "it and its key are not a PEM certificate and private key".into(),
                })?;
            builder = builder.identity(identity);
        }
        if host.tls.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
    }
    builder.build().map_err(|source| RegistryError::Client {
        host: auth::authority(&host.url),
        source,
    })
}

fn pem(path: &Path) -> Result<Vec<u8>, RegistryError> {
    let read = || {
        let length = std::fs::metadata(path)?.len();
        if length > MAX_PEM_BYTES {
            return Err(std::io::Error::other(format!("{length} bytes long")));
        }
        std::fs::read(path)
    };
    read().map_err(|error| RegistryError::Certificate {
        path: path.into(),
        why: error.to_string(),
    })
}

/// The response if it is a success, else what it means.
async fn checked(response: Response) -> Result<Response, RegistryError> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let place = Place::of(response.url());
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.trim().parse().ok())
        .map(Duration::from_secs);
    let detail = detail(response).await;
    Err(match status {
        StatusCode::UNAUTHORIZED => RegistryError::Unauthorized {
            place,
            detail,
            source: None,
        },
        StatusCode::FORBIDDEN => RegistryError::Denied { place, detail },
        StatusCode::NOT_FOUND => RegistryError::NotFound { place, detail },
        StatusCode::TOO_MANY_REQUESTS => RegistryError::TooManyRequests {
            place,
            detail,
            retry_after,
        },
        status if status.is_server_error() => RegistryError::Server {
            place,
            status: status.as_u16(),
            detail,
        },
        status => RegistryError::Status {
            place,
            status: status.as_u16(),
            detail,
        },
    })
}

/// The registry's own words on a failure, from the start of the body.
async fn detail(mut response: Response) -> Detail {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ERROR_BYTES {
            break;
        }
    }
    parse_detail(&body)
}

fn parse_detail(body: &[u8]) -> Detail {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(errors) = serde_json::from_slice::<Errors>(body) else {
        return Detail(None);
    };
    let words = errors
        .errors
        .first()
        .map(|one| format!("{}: {}", one.code, one.message));
    // A stranger's text: one line, and not too much of it.
    let clean = |text: String| text.chars().filter(|c| !c.is_control()).take(200).collect();
    Detail(words.map(clean))
}

/// A layer that is being received.
pub struct Blob {
    registry: Arc<Registry>,
    at: usize,
    path: String,
    size: u64,
    seen: u64,
    to_skip: u64,
    resumes: u32,
    /// Silence is waited for once more, not as often as a cut is mended.
    stalled: bool,
    response: Option<Response>,
}

impl Blob {
    async fn connect(&mut self) -> Result<(), RegistryError> {
        let ask = Ask {
            method: Method::GET,
            path: &self.path,
            accept: None,
            range_from: self.seen,
            by_digest: true,
        };
        let response = self.registry.send(self.at, &ask).await?;
        let continued = response.status() == StatusCode::PARTIAL_CONTENT;
        let expected = if continued {
            self.size.saturating_sub(self.seen)
        } else {
            self.size
        };
        if let Some(found) = response.content_length()
            && found != expected
        {
            return Err(RegistryError::Length {
                place: Place::of(response.url()),
                expected,
                found,
            });
        }
        // A server without ranges begins anew.
        self.to_skip = if continued { 0 } else { self.seen };
        self.response = Some(response);
        Ok(())
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// Any [`RegistryError`], after continuing a few times did not help.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let Some(response) = &mut self.response else {
                return Ok(None);
            };
            match response.chunk().await {
                Ok(Some(mut bytes)) => {
                    let skipped = self.to_skip.min(bytes.len() as u64);
                    self.to_skip -= skipped;
                    let bytes = bytes.split_off(skipped as usize);
                    if bytes.is_empty() {
                        continue;
                    }
                    self.seen += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Ok(None) => {
                    self.response = None;
                    return Ok(None);
                }
                Err(error) => {
                    let error = RegistryError::transport(Place::of(response.url()), error);
                    let stalled = matches!(error, RegistryError::Stalled { .. });
                    let over = self.resumes == MAX_RESUMES || self.seen >= self.size;
                    if over || (stalled && std::mem::replace(&mut self.stalled, true)) {
                        return Err(error);
                    }
                    self.resumes += 1;
                    tracing::info!(
                        error = &error as &dyn StdError,
                        at_bytes = self.seen,
                        "a layer's download broke off, going on"
                    );
                    self.connect().await?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_shows_no_query() {
        let url = Url::parse("https://u:p@a.example:5000/v2/b?sig=secret#x").unwrap();
        assert_eq!(Place::of(&url).to_string(), "https://a.example:5000/v2/b");
    }

    #[test]
    fn a_registrys_words_are_cut_to_a_line() {
        let body = r#"{"errors":[{"code":"DENIED","message":"no\nway","detail":{}}]}"#;
        assert_eq!(
            parse_detail(body.as_bytes()).to_string(),
            " (DENIED: noway)"
        );
        assert_eq!(parse_detail(b"<html>").to_string(), "");
        assert_eq!(parse_detail(br#"{"errors":[]}"#).to_string(), "");
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(5000));
        assert!(parse_detail(long.as_bytes()).to_string().len() < 250);
    }
}
