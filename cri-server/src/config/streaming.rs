//! What the section `streaming` means.

use super::sections::Streaming;
use super::setting::TlsVersion;
use crate::streaming::{Settings, TlsFiles};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn named(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

impl Streaming {
    /// The streaming server's settings.
    ///
    /// # Errors
    /// The key that is wrong, and what is wrong with it.
    pub fn settings(&self) -> Result<Settings, (&'static str, String)> {
        let address = self.address.parse::<SocketAddr>().map_err(|_| {
            let problem = format!(
                "{:?} is not ADDRESS:PORT, such as 127.0.0.1:0",
                self.address
            );
            ("streaming.address", problem)
        })?;
        let tls = match (named(&self.tls_certificate), named(&self.tls_key)) {
            (Some(certificate), Some(key)) => Some(TlsFiles {
                certificate,
                key,
                client_ca: named(&self.tls_client_ca),
                only_1_3: self.tls_min_version == TlsVersion::Tls13,
            }),
            (None, None) => None,
            (Some(_), None) => {
                return Err((
                    "streaming.tls_key",
                    "must be set with tls_certificate".into(),
                ));
            }
            (None, Some(_)) => {
                return Err((
                    "streaming.tls_certificate",
                    "must be set with tls_key".into(),
                ));
            }
        };
        if tls.is_none() && named(&self.tls_client_ca).is_some() {
            return Err((
                "streaming.tls_client_ca",
                "needs tls_certificate and tls_key".into(),
            ));
        }
        let seconds = |key, value: u32| {
            let bounded = (1..=MOST_SECONDS).contains(&value);
            let problem = || (key, format!("must be 1 to {MOST_SECONDS}"));
            bounded
                .then(|| Duration::from_secs(value.into()))
                .ok_or_else(problem)
        };
        Ok(Settings {
            address,
            tls,
            token_lifetime: seconds(
                "streaming.token_lifetime_seconds",
                self.token_lifetime_seconds,
            )?,
            idle_timeout: seconds("streaming.idle_timeout_seconds", self.idle_timeout_seconds)?,
        })
    }
}

/// A year: longer is a typing error.
const MOST_SECONDS: u32 = 365 * 24 * 3600;
