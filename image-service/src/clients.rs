//! HTTP clients to registries, kept across pulls with their connections.
//!
//! One for each way of connecting: TLS files, proxy, timeouts. A file that changed makes a new
//! one, so a renewed CA or client certificate counts at the next pull.

use crate::auth::authority;
use crate::hosts::{Host, Tls};
use crate::proxy::{Proxy, ProxyEnvironment, ProxyUrl};
use crate::registry::{RegistryError, Timeouts};
use reqwest::Client;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use url::Url;

/// Largest PEM file, in bytes: the bundles of whole distributions have some 250 KiB.
const MAX_PEM_BYTES: u64 = 4 << 20;
/// Most clients kept; each has its idle connections.
const MAX_CLIENTS: usize = 256;
/// How long a connection nobody uses is kept. Registries close theirs after about a minute.
const IDLE: Duration = Duration::from_secs(50);
/// Where the system's CAs may be; looked at for changes only. Source: rustls-native-certs,
/// openssl-probe.
const SYSTEM_CAS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// Device, inode, size and change time.
type FileState = (u64, u64, u64, i64, i64);

/// All that makes one client differ from another.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Way {
    secure: bool,
    ca: Vec<PathBuf>,
    client: Option<(PathBuf, Option<PathBuf>)>,
    skip_verify: bool,
    /// Of every file; `None` for one that is not there.
    files: Vec<Option<FileState>>,
    connect: Duration,
    proxy: Proxy,
}

/// The clients of this process.
#[derive(Default)]
pub(crate) struct Clients(Mutex<HashMap<Way, Client>>);

impl Clients {
    /// The client to speak to `host`, or where it refers to, with or without TLS. Blocking where
    /// it must be made: reading the system's CAs takes milliseconds.
    ///
    /// # Errors
    /// [`RegistryError::Certificate`], [`RegistryError::Client`].
    pub fn get(
        &self,
        host: &Host,
        secure: bool,
        timeouts: Timeouts,
        environment: &ProxyEnvironment,
    ) -> Result<Client, RegistryError> {
        let none = Tls::default();
        // In the clear no file matters.
        let tls = if secure { &host.tls } else { &none };
        let own = tls.client.iter().flat_map(|(certificate, key)| {
            std::iter::once(certificate.as_path()).chain(key.as_deref())
        });
        let system = SYSTEM_CAS.iter().map(Path::new).filter(|_| secure);
        let way = Way {
            secure,
            ca: tls.ca.clone(),
            client: tls.client.clone(),
            skip_verify: tls.skip_verify,
            files: tls
                .ca
                .iter()
                .map(PathBuf::as_path)
                .chain(own)
                .chain(system)
                .map(state_of)
                .collect(),
            connect: host.dial_timeout.unwrap_or(timeouts.connect),
            proxy: host.proxy.clone(),
        };
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = lock().get(&way) {
            return Ok(client.clone());
        }
        let client = build(host, &way, environment)?;
        let mut clients = lock();
        if clients.len() >= MAX_CLIENTS {
            // Pulls that run keep theirs.
            clients.clear();
        }
        Ok(clients.entry(way).or_insert(client).clone())
    }
}

fn state_of(path: &Path) -> Option<FileState> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ))
}

/// Through which proxy `url` is asked, when `host` is or has sent us there.
pub(crate) fn proxy_of(
    proxy: &Proxy,
    environment: &ProxyEnvironment,
    url: &Url,
) -> Option<ProxyUrl> {
    match proxy {
        Proxy::Environment => environment.proxy_of(url).cloned(),
        Proxy::Direct => None,
        Proxy::Through(proxy) => Some(proxy.clone()),
    }
}

fn build(host: &Host, way: &Way, environment: &ProxyEnvironment) -> Result<Client, RegistryError> {
    // The default of the process; that it is set already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(way.connect)
        .pool_idle_timeout(IDLE)
        // The decision is ours, so that it can be explained.
        .no_proxy();
    if way.proxy != Proxy::Direct {
        let (proxy, environment) = (way.proxy.clone(), environment.clone());
        let choose =
            move |url: &Url| proxy_of(&proxy, &environment, url).map(|proxy| proxy.url().clone());
        builder = builder.proxy(reqwest::Proxy::custom(choose));
    }
    if !way.secure {
        // No CAs: none are needed, and a node without any can use such hosts.
        builder = builder.tls_certs_only([]);
    } else {
        let mut roots = Vec::new();
        for path in &way.ca {
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
        if let Some((certificate, key)) = &way.client {
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
        if way.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
    }
    builder.build().map_err(|source| RegistryError::Client {
        host: authority(&host.url),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_kept_until_one_of_its_files_changes() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let pem = || {
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = rcgen::CertificateParams::new(Vec::new()).unwrap();
            certificate.self_signed(&key).unwrap().pem()
        };
        std::fs::write(&ca, pem()).unwrap();
        let text = "ca = \"ca.pem\"";
        let path = dir.path().join("hosts.toml");
        let hosts =
            crate::hosts::parse(&path, text, "r.example", crate::hosts::Fallback::Origin).unwrap();
        let clients = Clients::default();
        let get = |secure| {
            let environment = ProxyEnvironment::default();
            clients.get(&hosts[0], secure, Timeouts::default(), &environment)
        };
        let count = || clients.0.lock().unwrap().len();
        get(true).unwrap();
        get(true).unwrap();
        assert_eq!(count(), 1);
        get(false).unwrap();
        assert_eq!(count(), 2);
        std::fs::write(&ca, pem() + &pem()).unwrap();
        get(true).unwrap();
        assert_eq!(count(), 3);
        std::fs::remove_file(&ca).unwrap();
        let error = get(true).unwrap_err();
        assert!(matches!(error, RegistryError::Certificate { .. }));
    }
}
