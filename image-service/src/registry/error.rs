//! What may go wrong between us and a registry, each with what was asked and what it said.

use crate::auth::{self, AuthError, BadCredentials};
use crate::sources::SourcesError;
use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// What was asked, for messages: scheme, host and path, never a query or a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(String);

impl Place {
    pub(crate) fn of(url: &Url) -> Place {
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
pub struct Detail(pub(crate) Option<String>);

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
        /// When to come again, if it said.
        retry_after: Option<Duration>,
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
        /// What went wrong, where it was not our patience that ended.
        source: Option<reqwest::Error>,
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
    /// Bytes come, but too few of them.
    #[error("{place}: only {bytes} bytes came in {} s of waiting", waited.as_secs())]
    Slow {
        /// What was asked.
        place: Place,
        /// What came.
        bytes: u64,
        /// In how long.
        waited: Duration,
    },
    /// The answer to a request for the rest is something else.
    #[error("{place}: asked for the bytes from {from}, it answers with {found:?}")]
    Range {
        /// What was asked.
        place: Place,
        /// The first byte that was asked for.
        from: u64,
        /// The Content-Range header.
        found: String,
    },
    /// The credentials are malformed.
    #[error("the credentials cannot be used")]
    Credentials(#[from] BadCredentials),
    /// The configuration of the registry.
    #[error(transparent)]
    Sources(#[from] SourcesError),
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
            | RegistryError::Stalled { .. }
            | RegistryError::Slow { .. } => true,
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
            | RegistryError::Range { .. }
            | RegistryError::Credentials(_)
            | RegistryError::Sources(_)
            | RegistryError::Certificate { .. }
            | RegistryError::Client { .. } => false,
        }
    }

    /// True when it is worth asking the same host again at once: not after a timeout, which
    /// was patient enough.
    pub(crate) fn passes_soon(&self) -> bool {
        match self {
            RegistryError::Unreachable { source, .. } => !source.is_timeout(),
            RegistryError::Stalled { .. } | RegistryError::Slow { .. } => false,
            error => error.is_transient(),
        }
    }

    /// True when the host is worth setting aside: it is its fault, and not this one thing's.
    pub(crate) fn is_trouble(&self) -> bool {
        matches!(
            self,
            RegistryError::TooManyRequests { .. }
                | RegistryError::Server { .. }
                | RegistryError::Unreachable { .. }
                | RegistryError::Stalled { .. }
                | RegistryError::Slow { .. }
                | RegistryError::Tls { .. }
                | RegistryError::Range { .. }
        )
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            RegistryError::TooManyRequests { retry_after, .. }
            | RegistryError::Server { retry_after, .. } => *retry_after,
            RegistryError::Unauthorized { source, .. } => source.as_ref()?.retry_after(),
            _ => None,
        }
    }

    /// What `answer` gives, for as long as `patience` lasts.
    pub(crate) async fn within<T>(
        patience: Duration,
        place: &Place,
        answer: impl Future<Output = Result<T, reqwest::Error>>,
    ) -> Result<T, RegistryError> {
        match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer.map_err(|error| RegistryError::transport(place.clone(), error)),
            Err(_) => Err(RegistryError::Stalled {
                place: place.clone(),
                source: None,
            }),
        }
    }

    pub(crate) fn transport(place: Place, error: reqwest::Error) -> RegistryError {
        let source = error.without_url();
        if source.is_timeout() {
            return if source.is_connect() {
                RegistryError::Unreachable { place, source }
            } else {
                let source = Some(source);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_shows_no_query() {
        let url = Url::parse("https://u:p@a.example:5000/v2/b?sig=secret#x").unwrap();
        assert_eq!(Place::of(&url).to_string(), "https://a.example:5000/v2/b");
    }
}
