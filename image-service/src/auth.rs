//! Who we are to a registry: credentials, challenges, tokens.
//!
//! request ── 401 + WWW-Authenticate ──> Basic: the credentials themselves
//!                                  └──> Bearer: a token from the realm ──> request again, once
//!
//! Nothing is sent before a registry asks, and what was found out is kept per registry and
//! repository for one pull. Secrets live in types whose Debug shows none of them.
//! Source: distribution-spec 1.1; distribution "Token Authentication Specification" and
//! "OAuth2 Token Authentication"; RFC 9110, 11.6.1 for the challenge's grammar.

use base64::Engine as _;
use http::HeaderValue;
use serde::Deserialize;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use url::Url;

/// Largest answer of a token service that is read, in bytes: tokens with many claims have some
/// 10 KiB.
const MAX_TOKEN_BYTES: usize = 1 << 20;
/// Largest challenge looked at, in bytes.
const MAX_CHALLENGE_BYTES: usize = 16 << 10;

/// CRI `AuthConfig`: every field may be empty.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// `username:password` in base64.
    pub auth: String,
    /// The host these are for, or its URL; empty: the image's registry and its configured
    /// mirrors, as containerd has it.
    pub server_address: String,
    /// A refresh token to get access tokens with.
    pub identity_token: String,
    /// An access token to send as it is.
    pub registry_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| if text.is_empty() { "" } else { "[redacted]" };
        f.debug_struct("Credentials")
            .field("username", &shown(&self.username))
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

/// The `auth` field is not what it should be. Its content is nowhere in the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCredentials {
    /// Not base64.
    #[error("the credentials' auth field is not base64")]
    Base64,
    /// No colon, or not text.
    #[error("the credentials' auth field is not base64 of username:password")]
    NoPassword,
}

/// What the credentials come down to.
#[derive(Clone)]
enum Secret {
    Basic { username: String, password: String },
    Identity(String),
    Bearer(String),
}

impl Credentials {
    /// What to use, the most specific field that is filled in, in containerd's order.
    fn secret(&self) -> Result<Option<Secret>, BadCredentials> {
        if !self.username.is_empty() {
            return Ok(Some(Secret::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            }));
        }
        if !self.identity_token.is_empty() {
            return Ok(Some(Secret::Identity(self.identity_token.clone())));
        }
        if !self.auth.is_empty() {
            let (username, password) = decode_auth(&self.auth)?;
            return Ok(Some(Secret::Basic { username, password }));
        }
        if !self.registry_token.is_empty() {
            return Ok(Some(Secret::Bearer(self.registry_token.clone())));
        }
        Ok(None)
    }

    /// True unless `server_address` names another registry than `host`.
    fn are_for(&self, host: &str) -> bool {
        let address = self.server_address.trim();
        let address = address
            .split_once("://")
            .map_or(address, |(_, rest)| rest)
            .split('/')
            .next()
            .unwrap_or_default();
        address.is_empty() || canonical(address) == canonical(host)
    }
}

/// Docker Hub goes by three names.
fn canonical(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    match &*host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".into(),
        _ => host,
    }
}

/// Username and password of the `auth` field: standard base64, strictly, of `username:password`.
fn decode_auth(auth: &str) -> Result<(String, String), BadCredentials> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(auth)
        .map_err(|_| BadCredentials::Base64)?;
    let text = String::from_utf8(bytes).map_err(|_| BadCredentials::NoPassword)?;
    let (username, password) = text.split_once(':').ok_or(BadCredentials::NoPassword)?;
    if username.is_empty() {
        return Err(BadCredentials::NoPassword);
    }
    // Docker's own config files pad the password with NULs.
    Ok((username.into(), password.trim_end_matches('\0').into()))
}

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
    /// The credentials themselves are malformed.
    #[error("the credentials cannot be used")]
    Credentials(#[from] BadCredentials),
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
            | AuthError::NoToken { .. }
            | AuthError::Credentials(_) => false,
        }
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

/// What one pull knows about authenticating; shared by its requests.
pub(crate) struct Authorizer {
    credentials: Option<Credentials>,
    known: Mutex<HashMap<(String, String), HeaderValue>>,
    /// Requests that are challenged at the same time fetch one token.
    fetching: tokio::sync::Mutex<()>,
}

/// Who challenged and what for.
pub(crate) struct Challenged<'a> {
    /// The configured host's client, so that its CA holds for its token service.
    pub http: &'a reqwest::Client,
    /// `scheme://host[:port]` of the host that sent the challenge.
    pub host: &'a Url,
    pub repository: &'a str,
    pub challenges: &'a [Challenge],
    /// What was sent and refused.
    pub refused: Option<&'a HeaderValue>,
}

impl Authorizer {
    /// With `credentials` for every configured host that asks, or for the one they name.
    ///
    /// # Errors
    /// [`BadCredentials`] before anything is sent.
    pub fn new(credentials: Option<Credentials>) -> Result<Authorizer, BadCredentials> {
        if let Some(credentials) = &credentials {
            credentials.secret()?;
        }
        Ok(Authorizer {
            credentials,
            known: Mutex::default(),
            fetching: tokio::sync::Mutex::default(),
        })
    }

    /// What to send to `host` for `repository` from the start, once it was asked for.
    pub fn known(&self, host: &str, repository: &str) -> Option<HeaderValue> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&(host.into(), repository.into())).cloned()
    }

    /// The `Authorization` header that answers a challenge, which [`Authorizer::known`] then
    /// knows too.
    pub async fn answer(&self, asked: Challenged<'_>) -> Result<HeaderValue, AuthError> {
        let _alone = self.fetching.lock().await;
        let host = authority(asked.host);
        // Another request may have been here while this one waited.
        if let Some(known) = self.known(&host, asked.repository)
            && Some(&known) != asked.refused
        {
            return Ok(known);
        }
        let secret = self.secret_for(&host)?;
        let value = match secret {
            Some(Secret::Bearer(token)) => format!("Bearer {token}"),
            secret => self.negotiate(&asked, secret).await?,
        };
        let mut value =
            HeaderValue::from_str(&value).map_err(|_| AuthError::NoToken { host: host.clone() })?;
        value.set_sensitive(true);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert((host, asked.repository.into()), value.clone());
        Ok(value)
    }

    fn secret_for(&self, host: &str) -> Result<Option<Secret>, AuthError> {
        match &self.credentials {
            Some(credentials) if credentials.are_for(host) => Ok(credentials.secret()?),
            _ => Ok(None),
        }
    }

    async fn negotiate(
        &self,
        asked: &Challenged<'_>,
        secret: Option<Secret>,
    ) -> Result<String, AuthError> {
        for challenge in asked.challenges {
            match (challenge, &secret) {
                (Challenge::Bearer { .. }, _) => {
                    let token = self.token(asked, challenge, secret).await?;
                    return Ok(format!("Bearer {token}"));
                }
                (Challenge::Basic, Some(Secret::Basic { username, password })) => {
                    let pair = format!("{username}:{password}");
                    let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
                    return Ok(format!("Basic {encoded}"));
                }
                (Challenge::Basic, _) => {}
            }
        }
        if asked.challenges.contains(&Challenge::Basic) {
            return Err(AuthError::NoCredentials);
        }
        Err(AuthError::Challenge)
    }

    async fn token(
        &self,
        asked: &Challenged<'_>,
        challenge: &Challenge,
        secret: Option<Secret>,
    ) -> Result<String, AuthError> {
        let Challenge::Bearer {
            realm,
            service,
            scope,
        } = challenge
        else {
            return Err(AuthError::Challenge);
        };
        let bad_realm = || AuthError::Realm {
            realm: realm.split('?').next().unwrap_or_default().into(),
        };
        let mut url = Url::parse(realm).map_err(|_| bad_realm())?;
        // A registry that is itself talked to in the clear has no secret to lose by it.
        let clear = url.scheme() == "http" && asked.host.scheme() == "http";
        if url.host_str().is_none() || !(url.scheme() == "https" || clear) {
            return Err(bad_realm());
        }
        let host = authority(&url);
        let own = format!("repository:{}:pull", asked.repository);
        let mut scopes = own.clone();
        if let Some(more) = scope {
            for scope in more.split(' ').filter(|s| !s.is_empty() && *s != own) {
                scopes = format!("{scopes} {scope}");
            }
        }
        let service = service.as_deref().unwrap_or_default();
        let request = match secret {
            Some(Secret::Identity(token)) => {
                let form: String = url::form_urlencoded::Serializer::new(String::new())
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("service", service)
                    .append_pair("client_id", "berth")
                    .append_pair("scope", &scopes)
                    .append_pair("refresh_token", &token)
                    .finish();
                asked
                    .http
                    .post(url)
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(form)
            }
            secret => {
                {
                    let mut query = url.query_pairs_mut();
                    if !service.is_empty() {
                        query.append_pair("service", service);
                    }
                    for scope in scopes.split(' ') {
                        query.append_pair("scope", scope);
                    }
                }
                let request = asked.http.get(url);
                match secret {
                    Some(Secret::Basic { username, password }) => {
                        request.basic_auth(username, Some(password))
                    }
                    Some(Secret::Identity(_) | Secret::Bearer(_)) | None => request,
                }
            }
        };
        let unreachable = |source: reqwest::Error| AuthError::Unreachable {
            host: host.clone(),
            source: source.without_url(),
        };
        let mut response = request.send().await.map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(AuthError::Refused {
                host,
                status: response.status().as_u16(),
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

fn parse_token(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    [answer.token, answer.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
            scope: scope.map(Into::into),
        }
    }

    #[test]
    fn challenges_are_read_as_the_rfc_writes_them() {
        for (header, expected) in [
            ("Basic realm=\"x\"", vec![Challenge::Basic]),
            (
                "Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a/b:pull,push\"",
                vec![bearer(
                    "https://a/t",
                    Some("s"),
                    Some("repository:a/b:pull,push"),
                )],
            ),
            (
                "bearer Realm = \"https://a\" , service=s, Basic realm=\"b\"",
                vec![bearer("https://a", Some("s"), None), Challenge::Basic],
            ),
            ("Negotiate, Basic", vec![Challenge::Basic]),
            ("Bearer realm=\"a\\\"b\"", vec![bearer("a\"b", None, None)]),
            ("Bearer service=\"s\"", vec![]),
            ("Bearer realm=\"open", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(parse_challenges(header), expected, "{header}");
        }
    }

    proptest! {
        #[test]
        fn no_challenge_makes_the_parser_panic(text in "(Bearer |Basic )?[a-z=\",\\\\ é]{0,40}") {
            let _ = parse_challenges(&text);
        }
    }

    #[test]
    fn the_auth_field_is_decoded_strictly() {
        assert_eq!(decode_auth("dTpw"), Ok(("u".into(), "p".into())));
        assert_eq!(decode_auth("dTpwOnEAAA=="), Ok(("u".into(), "p:q".into())));
        assert_eq!(decode_auth("dTo="), Ok(("u".into(), String::new())));
        assert_eq!(decode_auth("dTpw="), Err(BadCredentials::Base64));
        assert_eq!(decode_auth(" dTpw"), Err(BadCredentials::Base64));
        assert_eq!(decode_auth("dQ=="), Err(BadCredentials::NoPassword));
        assert_eq!(decode_auth("OnA="), Err(BadCredentials::NoPassword));
        assert_eq!(decode_auth("/zov"), Err(BadCredentials::NoPassword));
    }

    #[test]
    fn debug_shows_no_secret() {
        let credentials = Credentials {
            username: "secret-u".into(),
            password: "secret-p".into(),
            auth: "secret-a".into(),
            server_address: "registry.example".into(),
            identity_token: "secret-i".into(),
            registry_token: "secret-r".into(),
        };
        let shown = format!("{credentials:?}");
        assert!(!shown.contains("secret-"), "{shown}");
        assert!(shown.contains("registry.example"));
    }

    #[test]
    fn credentials_for_another_registry_are_not_used() {
        let credentials = |address: &str| Credentials {
            server_address: address.into(),
            ..Credentials::default()
        };
        assert!(credentials("").are_for("a.b"));
        assert!(credentials("a.b").are_for("A.b"));
        assert!(credentials("https://a.b:5000/v2/").are_for("a.b:5000"));
        assert!(credentials("https://index.docker.io/v1/").are_for("registry-1.docker.io"));
        assert!(!credentials("a.b").are_for("a.b:5000"));
        assert!(!credentials("b.a").are_for("a.b"));
    }

    #[test]
    fn a_token_is_found_under_both_names() {
        assert_eq!(parse_token(br#"{"token":"a"}"#).as_deref(), Some("a"));
        assert_eq!(
            parse_token(br#"{"token":"","access_token":"b"}"#).as_deref(),
            Some("b")
        );
        assert_eq!(parse_token(br#"{"expires_in":3}"#), None);
        assert_eq!(parse_token(b"<html>"), None);
    }
}
