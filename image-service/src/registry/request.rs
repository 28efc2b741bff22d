//! One request: challenged at most once, redirected by hand, tried again as long as it may help.

use super::answer::{checked, detail};
use super::{Endpoint, Place, Registry, RegistryError, Turn};
use crate::auth::{self, AuthError, Challenge, Challenged};
use crate::retry::Retries;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::{Client, Response};
use std::error::Error as StdError;
use std::sync::Arc;
use url::Url;

/// Most redirects of one request; registries use one or two.
const MAX_REDIRECTS: usize = 5;

/// One request to one host.
pub(super) struct Ask<'a> {
    pub method: Method,
    /// Below the repository: `manifests/latest`.
    pub path: &'a str,
    pub accept: Option<&'static str>,
    pub range_from: u64,
    /// Content that is verified afterwards may come in the clear.
    pub by_digest: bool,
}

impl Registry {
    /// Sends a request until it succeeds or its failure is final.
    pub(super) async fn send(&self, turn: Turn, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let mut retries = Retries::new(turn.is_last);
        loop {
            let error = match self.authorized(turn.at, ask).await {
                Ok(response) => {
                    let key = self.endpoints[turn.at].host.url.as_str();
                    self.shared.health.succeeded(key);
                    return Ok(response);
                }
                Err(error) => error,
            };
            let pause = if error.passes_soon() {
                retries.next(error.retry_after())
            } else {
                None
            };
            let Some(pause) = pause else {
                self.remember(turn.at, &error);
                return Err(error);
            };
            tracing::debug!(error = &error as &dyn StdError, ?pause, "will ask again");
            tokio::time::sleep(pause).await;
        }
    }

    /// Sends a request, and once more if it is challenged.
    async fn authorized(&self, at: usize, ask: &Ask<'_>) -> Result<Response, RegistryError> {
        let endpoint = &self.endpoints[at];
        let mut url = endpoint.host.url.clone();
        let base = url.path().trim_end_matches('/');
        let path = format!("{base}/{}/{}", endpoint.repository, ask.path);
        url.set_path(&path);
        if let Some(registry) = &endpoint.host.mirror_of {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let (mut known, to_come) = endpoint.authorizer.known();
        if known.is_none() && !to_come.is_empty() {
            match self.answer(endpoint, &to_come, None).await? {
                Ok(answer) => known = Some(answer),
                // Who wants to be left alone is not asked again behind the registry's answer.
                Err(source) if source.is_busy() => {
                    return Err(RegistryError::Unauthorized {
                        place: Place::of(&url),
                        detail: Default::default(),
                        source: Some(source),
                    });
                }
                // What cannot be answered now is told when the registry asks.
                Err(_) => {}
            }
        }
        let (response, at_home) = self.follow(endpoint, ask, &url, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED || !at_home {
            return checked(response).await;
        }
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(auth::parse_challenges)
            .collect();
        let unauthorized = |detail, source| RegistryError::Unauthorized {
            place: Place::of(&url),
            detail,
            source,
        };
        let answer = match self.answer(endpoint, &challenges, known.as_ref()).await? {
            Ok(answer) => answer,
            Err(source) => return Err(unauthorized(detail(response).await, Some(source))),
        };
        let (response, at_home) = self.follow(endpoint, ask, &url, Some(&answer)).await?;
        if response.status() == StatusCode::UNAUTHORIZED && at_home {
            endpoint.authorizer.forget();
            let source = challenges.iter().find_map(|challenge| match challenge {
                Challenge::Bearer { realm, .. } => Some(AuthError::Useless {
                    host: Url::parse(realm).map_or_else(|_| String::new(), |u| auth::authority(&u)),
                }),
                Challenge::Basic => None,
            });
            return Err(unauthorized(detail(response).await, source));
        }
        checked(response).await
    }

    /// The outer error is ours, the inner one the answer's.
    async fn answer(
        &self,
        endpoint: &Endpoint,
        challenges: &[Challenge],
        refused: Option<&HeaderValue>,
    ) -> Result<Result<HeaderValue, AuthError>, RegistryError> {
        let secure = challenges.iter().any(Challenge::wants_https);
        let scheme = if secure { "https" } else { "http" };
        let asked = Challenged {
            http: self.client(endpoint, scheme).await?,
            host: &endpoint.host.url,
            challenges,
            refused,
            patience: self.shared.timeouts.document,
        };
        Ok(endpoint.authorizer.answer(asked).await)
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
            let request = client
                .request(ask.method.clone(), url.clone())
                .headers(headers)
                .send();
            let patience = self.shared.timeouts.no_progress;
            let response = RegistryError::within(patience, &Place::of(&url), request).await?;
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
        let (host, shared) = (endpoint.host.clone(), Arc::clone(&self.shared));
        cell.get_or_try_init(|| async move {
            let get = move || {
                let proxies = &shared.files.proxies;
                shared.clients.get(&host, secure, shared.timeouts, proxies)
            };
            tokio::task::spawn_blocking(get)
                .await
                .expect("building a client does not panic")
        })
        .await
    }
}
