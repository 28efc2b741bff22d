//! What a status means, and what the registry says to it.

use super::error::{Detail, Place, RegistryError};
use crate::retry;
use http::StatusCode;
use reqwest::Response;
use std::time::Duration;

/// How much of an error's body is read, in bytes.
const MAX_ERROR_BYTES: usize = 8 << 10;
/// How long an error's body is waited for.
const ERROR_BODY_TIME: Duration = Duration::from_secs(3);

/// The response if it is a success, else what it means.
pub(crate) async fn checked(response: Response) -> Result<Response, RegistryError> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let place = Place::of(response.url());
    let retry_after = retry::retry_after_of(&response);
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
            retry_after,
        },
        status => RegistryError::Status {
            place,
            status: status.as_u16(),
            detail,
        },
    })
}

/// The registry's own words on a failure, from the start of the body.
pub(crate) async fn detail(mut response: Response) -> Detail {
    let mut body = Vec::new();
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ERROR_BYTES {
                break;
            }
        }
    };
    // What came until then may be enough, and is no reason to wait.
    let _ = tokio::time::timeout(ERROR_BODY_TIME, read).await;
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

#[cfg(test)]
mod tests {
    use super::*;

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
