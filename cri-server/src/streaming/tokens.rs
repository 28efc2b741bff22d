//! What Exec, Attach and PortForward were asked for, until a client comes for it with
//! the token in its URL: once, and soon.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most tokens at a time. Source: k8s.io/cri-streaming, `maxInFlight`.
pub const MAX_TOKENS: usize = 1000;

/// Random bytes in a token: it is all a client has to show.
const TOKEN_BYTES: usize = 18;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(
        "{MAX_TOKENS} streaming requests are waiting for their clients; wait for some to expire"
    )]
    TooMany,
    #[error("the kernel gives no random bytes")]
    Random(#[source] rustix::io::Errno),
}

/// Requests by token.
pub struct Tokens<T> {
    lifetime: Duration,
    waiting: Mutex<HashMap<String, Waiting<T>>>,
}

struct Waiting<T> {
    until: Instant,
    request: T,
}

impl<T> Tokens<T> {
    /// No tokens; each will be good for `lifetime`.
    pub fn new(lifetime: Duration) -> Self {
        Self {
            lifetime,
            waiting: Mutex::default(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<String, Waiting<T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a request; the token for it, made of characters that need no escaping in a URL.
    ///
    /// # Errors
    /// Too many are waiting.
    pub fn insert(&self, request: T) -> Result<String, TokenError> {
        let mut random = [0; TOKEN_BYTES];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(TokenError::Random)?;
        let token = URL_SAFE_NO_PAD.encode(random);
        let now = Instant::now();
        let mut waiting = self.waiting();
        if waiting.len() >= MAX_TOKENS {
            waiting.retain(|_, waiting| waiting.until > now);
        }
        if waiting.len() >= MAX_TOKENS {
            return Err(TokenError::TooMany);
        }
        let until = now + self.lifetime;
        waiting.insert(token.clone(), Waiting { until, request });
        Ok(token)
    }

    /// The request of a token, which is no good any more then.
    pub fn take(&self, token: &str) -> Option<T> {
        let waiting = self.waiting().remove(token)?;
        (waiting.until > Instant::now()).then_some(waiting.request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once() {
        let tokens = Tokens::new(Duration::from_secs(60));
        let (first, second) = (tokens.insert(1).unwrap(), tokens.insert(2).unwrap());
        assert_ne!(first, second);
        assert_eq!(first.len(), 24);
        assert_eq!(tokens.take(&first), Some(1));
        assert_eq!(tokens.take(&first), None);
        assert_eq!(tokens.take("nonsense"), None);
        assert_eq!(tokens.take(&second), Some(2));
    }

    #[test]
    fn a_token_is_good_for_its_lifetime_only() {
        let tokens = Tokens::new(Duration::ZERO);
        let token = tokens.insert(1).unwrap();
        assert_eq!(tokens.take(&token), None);
    }

    #[test]
    fn tokens_are_bounded_and_expired_ones_make_room() {
        let tokens = Tokens::new(Duration::from_secs(60));
        for request in 0..MAX_TOKENS {
            tokens.insert(request).unwrap();
        }
        assert!(matches!(tokens.insert(0), Err(TokenError::TooMany)));
        let tokens = Tokens::new(Duration::ZERO);
        for request in 0..3 * MAX_TOKENS {
            tokens.insert(request).unwrap();
        }
        assert!(tokens.waiting().len() <= MAX_TOKENS);
    }
}
