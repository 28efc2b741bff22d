//! Who we are to a registry: challenges and tokens.
//!
//! request ── 401 + WWW-Authenticate ──> Basic: the credentials themselves
//!                                  └──> Bearer: a token from the realm ──> request again, once
//!
//! Nothing is sent before a registry asks. What opened a repository is kept for all pulls, by
//! registry, repository and credentials, so that nobody rides on another's secret; a token is
//! fetched anew shortly before it expires, without being challenged again.
//! Source: distribution-spec 1.1; distribution "Token Authentication Specification" and
//! "OAuth2 Token Authentication"; RFC 9110, 11.6.1 for the challenge's grammar.

pub use crate::auth_file::{AuthFileError, SecretSource};
use crate::auth_file::{Found, Helpers};
pub use crate::credentials::{BadCredentials, Credentials};
use crate::credentials::{Identity, Secret};
use crate::retry;
use base64::Engine as _;
use http::{HeaderValue, header};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use url::Url;

/// Largest answer of a token service that is read, in bytes: tokens with many claims have some
/// 10 KiB.
const MAX_TOKEN_BYTES: usize = 1 << 20;
/// Largest challenge looked at, in bytes.
const MAX_CHALLENGE_BYTES: usize = 16 << 10;
/// How long a token counts that does not say it. Source: "Token Authentication Specification",
/// "Token Response Fields".
const UNSAID_LIFE: Duration = Duration::from_secs(60);
/// The longest a token is kept, whatever it says.
const LONGEST_LIFE: Duration = Duration::from_secs(3600);
/// A token this close to its end is not used any more: a request takes time, too.
const MARGIN: Duration = Duration::from_secs(10);
/// Redirects of one token request that are followed.
const MAX_REDIRECTS: usize = 5;
/// Most (registry, repository, credentials) remembered.
const MAX_KNOWN: usize = 4096;

/// Why a challenge could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The registry wants something we do not have.
    #[error("the registry asks for credentials and the pull has none for it")]
    NoCredentials,
    /// No scheme we speak.
    #[error("the registry's challenge is none of Basic and Bearer with a realm")]
    Challenge,
    /// The realm is not a URL, or would have secrets sent in the clear.
    #[error("the registry's token service {realm:?} is not an https address")]
    Realm {
        /// Where the registry sent us, without query.
        realm: String,
    },
    /// The token service said no.
    #[error("the token service at {host} refused with status {status}")]
    Refused {
        /// The service's host.
        host: String,
        /// The HTTP status.
        status: u16,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// The token service sends us elsewhere, or in circles.
    #[error("the token service at {host} redirects, which is not followed: {why}")]
    Redirect {
        /// The service's host.
        host: String,
        /// Why not.
        why: &'static str,
    },
    /// The token service could not be talked to.
    #[error("the token service at {host} cannot be reached")]
    Unreachable {
        /// The service's host.
        host: String,
        /// What went wrong; without the URL, whose query may be private.
        source: reqwest::Error,
    },
    /// The answer has no token.
    #[error("the token service at {host} answered without a token")]
    NoToken {
        /// The service's host.
        host: String,
    },
    /// A token that was just given does not open what it was asked for.
    #[error(
        "the token that the service at {host} gave is refused: it is for another scope, or another registry"
    )]
    Useless {
        /// The service's host.
        host: String,
    },
    /// The credentials themselves are malformed.
    #[error("the credentials cannot be used")]
    Credentials(#[from] BadCredentials),
    /// The node's own credentials cannot be had.
    #[error("the node's own credentials cannot be used")]
    File(#[from] AuthFileError),
}

impl AuthError {
    /// True when trying again later may help, false when the answer is a refusal.
    pub fn is_transient(&self) -> bool {
        match self {
            AuthError::Unreachable { .. } => true,
            AuthError::Refused { status, .. } => *status >= 500 || *status == 429,
            AuthError::NoCredentials
            | AuthError::Challenge
            | AuthError::Realm { .. }
            | AuthError::Redirect { .. }
            | AuthError::NoToken { .. }
            | AuthError::Useless { .. }
            | AuthError::Credentials(_)
            | AuthError::File(_) => false,
        }
    }
}

impl AuthError {
    /// How long the token service wants to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            AuthError::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// True when the token service wants to be left alone.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, AuthError::Refused { status: 429, .. })
    }
}

/// One way a registry offers to authenticate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// True when answering it takes a request over https.
    pub fn wants_https(&self) -> bool {
        match self {
            Challenge::Basic => false,
            Challenge::Bearer { realm, .. } => !realm.starts_with("http:"),
        }
    }
}

/// The challenges of one `WWW-Authenticate` header that we know; unknown schemes and what does
/// not parse are left out.
pub(crate) fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    if header.len() > MAX_CHALLENGE_BYTES {
        return found;
    }
    let mut rest = header;
    let mut scheme = String::new();
    let mut parameters: HashMap<String, String> = HashMap::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)))
            .unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            break;
        }
        let after = after.trim_start_matches([' ', '\t']);
        let Some(value) = after.strip_prefix('=') else {
            // No "=" behind it: a new scheme begins.
            close(&mut found, &scheme, &mut parameters);
            scheme = word.to_ascii_lowercase();
            rest = after;
            continue;
        };
        let value = value.trim_start_matches([' ', '\t']);
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => {
                let Some(parsed) = unquote(quoted) else {
                    break;
                };
                parsed
            }
            None => {
                let end = value.find([',', ' ', '\t']).unwrap_or(value.len());
                (value[..end].to_owned(), &value[end..])
            }
        };
        parameters.insert(word.to_ascii_lowercase(), value);
        rest = after;
    }
    close(&mut found, &scheme, &mut parameters);
    found
}

fn close(found: &mut Vec<Challenge>, scheme: &str, parameters: &mut HashMap<String, String>) {
    match scheme {
        "basic" => found.push(Challenge::Basic),
        "bearer" => {
            if let Some(realm) = parameters.remove("realm") {
                found.push(Challenge::Bearer {
                    realm,
                    service: parameters.remove("service"),
                    scope: parameters.remove("scope"),
                });
            }
        }
        _ => {}
    }
    parameters.clear();
}

/// The text up to the closing quote and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

/// What opened which repository, for all pulls.
#[derive(Default)]
pub(crate) struct Tokens(Mutex<HashMap<Door, Arc<Entry>>>);

#[derive(Clone, PartialEq, Eq, Hash)]
struct Door {
    /// `scheme://host:port`: what opens a mirror in the clear is not sent to one with TLS.
    origin: String,
    repository: String,
    who: Identity,
}

#[derive(Default)]
struct Entry {
    /// Requests that are challenged at the same time fetch one token.
    fetching: tokio::sync::Mutex<()>,
    known: Mutex<Option<Known>>,
}

#[derive(Clone)]
struct Known {
    value: HeaderValue,
    /// `None`: until it is refused.
    expires: Option<Instant>,
    challenges: Vec<Challenge>,
}

impl Entry {
    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tokens {
    fn entry(&self, door: Door) -> Arc<Entry> {
        let mut doors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if doors.len() >= MAX_KNOWN && !doors.contains_key(&door) {
            let now = Instant::now();
            doors.retain(|_, entry| {
                let known = entry.known();
                let fresh = |known: &Known| known.expires.is_none_or(|at| at > now);
                known.as_ref().is_some_and(fresh)
            });
            if doors.len() >= MAX_KNOWN {
                doors.clear();
            }
        }
        Arc::clone(doors.entry(door).or_default())
    }
}

/// Whose credentials a host gets, as far as is known without running a program.
#[derive(Clone, Debug)]
pub(crate) enum Holder {
    /// Nobody's.
    Nobody,
    /// These.
    Secret(Secret, SecretSource),
    /// Programs know.
    Helpers(Vec<String>),
}

impl Holder {
    /// From what the node's file says.
    pub fn of(found: Found) -> Holder {
        match found {
            Found::Secret(secret, source) => Holder::Secret(secret, source),
            Found::Ask { helpers, .. } => Holder::Helpers(helpers),
            Found::Nothing => Holder::Nobody,
        }
    }

    fn identity(&self) -> Identity {
        match self {
            Holder::Nobody => Identity::NOBODY,
            Holder::Secret(secret, _) => Identity::of(secret),
            Holder::Helpers(names) => Identity::of_helpers(names),
        }
    }
}

/// What one pull shows one host for one repository.
pub(crate) struct Authorizer {
    tokens: Arc<Tokens>,
    helpers: Helpers,
    holder: Holder,
    door: Door,
    /// `host[:port]`, what helpers and messages call it.
    host: String,
    /// What the helpers said, once they were asked.
    secret: OnceCell<Option<Secret>>,
}

/// Who challenged.
pub(crate) struct Challenged<'a> {
    /// The configured host's client, so that its CA holds for its token service.
    pub http: &'a reqwest::Client,
    /// `scheme://host[:port]` of the host that sent the challenge.
    pub host: &'a Url,
    pub challenges: &'a [Challenge],
    /// What was sent and refused.
    pub refused: Option<&'a HeaderValue>,
    /// How long a token service may take.
    pub patience: Duration,
}

impl Authorizer {
    /// For `repository` at `host`.
    pub fn new(
        tokens: Arc<Tokens>,
        helpers: Helpers,
        holder: Holder,
        host: &Url,
        repository: &str,
    ) -> Authorizer {
        let door = Door {
            origin: host.origin().ascii_serialization(),
            repository: repository.into(),
            who: holder.identity(),
        };
        Authorizer {
            tokens,
            helpers,
            holder,
            door,
            host: authority(host),
            secret: OnceCell::new(),
        }
    }

    /// Whose credentials are shown.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// What to send from the start, if it was found out before and is still good; else the
    /// challenges that are known to come.
    pub fn known(&self) -> (Option<HeaderValue>, Vec<Challenge>) {
        let entry = self.tokens.entry(self.door.clone());
        let known = entry.known();
        match &*known {
            None => (None, Vec::new()),
            Some(known) if known.expires.is_none_or(|at| at > Instant::now()) => {
                (Some(known.value.clone()), Vec::new())
            }
            Some(known) => (None, known.challenges.clone()),
        }
    }

    /// The `Authorization` header that answers a challenge, which [`Authorizer::known`] then
    /// gives too.
    pub async fn answer(&self, asked: Challenged<'_>) -> Result<HeaderValue, AuthError> {
        let entry = self.tokens.entry(self.door.clone());
        let _alone = entry.fetching.lock().await;
        // Another request may have been here while this one waited.
        if let (Some(known), _) = self.known()
            && Some(&known) != asked.refused
        {
            return Ok(known);
        }
        let secret = self.secret().await?;
        let (value, life) = match secret {
            Some(Secret::Bearer(token)) => (format!("Bearer {token}"), None),
            secret => self.negotiate(&asked, secret).await?,
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| AuthError::NoToken {
            host: self.host.clone(),
        })?;
        value.set_sensitive(true);
        *entry.known() = Some(Known {
            value: value.clone(),
            expires: life.map(|life| {
                let life = life.min(LONGEST_LIFE);
                // A token that lives for less than the margin is good for the request it is for.
                Instant::now() + life.saturating_sub(MARGIN)
            }),
            challenges: asked.challenges.to_vec(),
        });
        Ok(value)
    }

    /// What was answered last is worth nothing: the next request begins anew.
    pub fn forget(&self) {
        *self.tokens.entry(self.door.clone()).known() = None;
    }

    async fn secret(&self) -> Result<Option<Secret>, AuthError> {
        match &self.holder {
            Holder::Nobody => Ok(None),
            Holder::Secret(secret, _) => Ok(Some(secret.clone())),
            Holder::Helpers(names) => {
                let asked = self.secret.get_or_try_init(|| async {
                    let found = self.helpers.ask(names, &self.host).await?;
                    Ok::<_, AuthFileError>(found.map(|(secret, _)| secret))
                });
                Ok(asked.await?.clone())
            }
        }
    }

    async fn negotiate(
        &self,
        asked: &Challenged<'_>,
        secret: Option<Secret>,
    ) -> Result<(String, Option<Duration>), AuthError> {
        for challenge in asked.challenges {
            match (challenge, &secret) {
                (
                    Challenge::Bearer {
                        realm,
                        service,
                        scope,
                    },
                    _,
                ) => {
                    let service = TokenService {
                        http: asked.http,
                        url: realm_url(realm, asked.host)?,
                        service: service.as_deref().unwrap_or_default(),
                        scopes: merge_scopes(&self.door.repository, scope.as_deref()),
                        patience: asked.patience,
                    };
                    let (token, life) = service.token(secret.as_ref()).await?;
                    return Ok((format!("Bearer {token}"), Some(life)));
                }
                (Challenge::Basic, Some(Secret::Basic { username, password })) => {
                    let pair = format!("{username}:{password}");
                    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
                    return Ok((format!("Basic {encoded}"), None));
                }
                (Challenge::Basic, _) => {}
            }
        }
        if asked.challenges.contains(&Challenge::Basic) {
            return Err(AuthError::NoCredentials);
        }
        Err(AuthError::Challenge)
    }
}

/// Where to fetch a token; a realm that would have a secret sent in the clear is refused.
fn realm_url(realm: &str, asked: &Url) -> Result<Url, AuthError> {
    let bad = || AuthError::Realm {
        realm: realm.split('?').next().unwrap_or_default().into(),
    };
    let url = Url::parse(realm).map_err(|_| bad())?;
    // A registry that is itself talked to in the clear has no secret to lose by it.
    let clear = url.scheme() == "http" && asked.scheme() == "http";
    if url.host_str().is_none() || !(url.scheme() == "https" || clear) {
        return Err(bad());
    }
    Ok(url)
}

/// Pulling from `repository` and what the challenge asks for beside it, each resource once.
/// Source: "Token Scope Documentation", the grammar `type:name:action{,action}`.
fn merge_scopes(repository: &str, challenged: Option<&str>) -> Vec<String> {
    let own = format!("repository:{repository}:pull");
    let mut resources: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut order = Vec::new();
    let mut others = Vec::new();
    for scope in std::iter::once(&*own).chain(challenged.unwrap_or_default().split(' ')) {
        let Some((resource, actions)) = scope.rsplit_once(':') else {
            if !scope.is_empty() && !others.contains(&scope.to_owned()) {
                others.push(scope.to_owned());
            }
            continue;
        };
        if !resources.contains_key(resource) {
            order.push(resource.to_owned());
        }
        let known = resources.entry(resource.to_owned()).or_default();
        known.extend(actions.split(',').map(str::to_owned));
    }
    let mut merged: Vec<String> = order
        .into_iter()
        .map(|resource| {
            let actions: Vec<_> = resources[&resource].iter().cloned().collect();
            format!("{resource}:{}", actions.join(","))
        })
        .collect();
    merged.extend(others);
    merged
}

struct TokenService<'a> {
    http: &'a reqwest::Client,
    url: Url,
    service: &'a str,
    scopes: Vec<String>,
    patience: Duration,
}

impl TokenService<'_> {
    /// A token and for how long it counts.
    async fn token(&self, secret: Option<&Secret>) -> Result<(String, Duration), AuthError> {
        let identity = match secret {
            Some(Secret::Identity(token)) => Some(token),
            Some(Secret::Basic { .. } | Secret::Bearer(_)) | None => None,
        };
        if let Some(token) = identity {
            let form = [("grant_type", "refresh_token"), ("refresh_token", token)];
            return self.read(&self.url, |url| self.post(url, &form)).await;
        }
        let mut url = self.url.clone();
        {
            let mut query = url.query_pairs_mut();
            if !self.service.is_empty() {
                query.append_pair("service", self.service);
            }
            for scope in &self.scopes {
                query.append_pair("scope", scope);
            }
        }
        let Some(Secret::Basic { username, password }) = secret else {
            return self.read(&url, |url| self.http.get(url)).await;
        };
        let by_get = self
            .read(&url, |url| {
                self.http.get(url).basic_auth(username, Some(password))
            })
            .await;
        match by_get {
            // A service that speaks OAuth 2 only.
            Err(AuthError::Refused {
                status: 404 | 405 | 501,
                ..
            }) => {
                let form = [
                    ("grant_type", "password"),
                    ("username", username),
                    ("password", password),
                ];
                self.read(&self.url, |url| self.post(url, &form)).await
            }
            other => other,
        }
    }

    fn post(&self, url: Url, form: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let form: String = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(form)
            .append_pair("service", self.service)
            .append_pair("client_id", "berth")
            .append_pair("scope", &self.scopes.join(" "))
            .finish();
        self.http
            .post(url)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(form)
    }

    /// The token of the answer to what `request` makes for `url`, or for where that is moved to
    /// on the same host. Every request has the secret in it, so no other host gets one.
    async fn read(
        &self,
        url: &Url,
        request: impl Fn(Url) -> reqwest::RequestBuilder,
    ) -> Result<(String, Duration), AuthError> {
        let host = authority(&self.url);
        let unreachable = |source: reqwest::Error| AuthError::Unreachable {
            host: host.clone(),
            source: source.without_url(),
        };
        let mut url = url.clone();
        let mut redirects = 0;
        let mut response = loop {
            let request = request(url.clone()).timeout(self.patience);
            let response = request.send().await.map_err(unreachable)?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                break response;
            }
            let refused = |why| AuthError::Redirect {
                host: host.clone(),
                why,
            };
            let next = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| refused("it has no valid location"))?;
            if next.origin() != self.url.origin() {
                return Err(refused("it leads to another host"));
            }
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                return Err(refused("there are too many"));
            }
            url = next;
        };
        if !response.status().is_success() {
            return Err(AuthError::Refused {
                host,
                status: response.status().as_u16(),
                retry_after: retry::retry_after_of(&response),
            });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_TOKEN_BYTES {
                return Err(AuthError::NoToken { host });
            }
        }
        parse_token(&body).ok_or(AuthError::NoToken { host })
    }
}

/// `host[:port]` of a URL, the default port left out.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.into(),
    }
}

/// Counted from when it arrived: the service's clock may differ from ours.
fn parse_token(body: &[u8]) -> Option<(String, Duration)> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let life = answer.expires_in.map_or(UNSAID_LIFE, Duration::from_secs);
    [answer.token, answer.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty())
        .map(|token| (token, life))
}

/// Reads the challenges of a header, for fuzzing.
pub fn exercise_challenge(header: &str) {
    for challenge in parse_challenges(header) {
        if let Challenge::Bearer { realm, scope, .. } = challenge {
            let asked = Url::parse("https://registry.example").expect("a URL");
            let _ = realm_url(&realm, &asked);
            let _ = merge_scopes("a/b", scope.as_deref());
        }
    }
}

#[cfg(test)]
mod tests;
