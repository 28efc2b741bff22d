//! TLS of the streaming server. Certificates are read again when their files change:
//! connections that are open keep theirs, a bad file keeps the old ones.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio_rustls::TlsAcceptor;

/// How long files are taken to be as they were.
const FRESH: Duration = Duration::from_secs(1);

/// Where certificates are, and what clients must have.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients must show a certificate of one of these; `None`: clients show nothing.
    pub client_ca: Option<PathBuf>,
    /// The oldest version: 1.3 only, or 1.2 too.
    pub only_1_3: bool,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    #[error("{} has no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("cannot see {}", path.display())]
    Stat {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} and {} do not make a server", certificate.display(), key.display())]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        source: rustls::Error,
    },
    #[error("{} cannot be used to check clients", path.display())]
    ClientCa {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Accepts TLS with the certificates of the moment.
pub struct Tls {
    files: Files,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    stamps: Vec<Stamp>,
    looked: Instant,
}

/// What changes with a file: inode, size, modified.
type Stamp = (u64, u64, i64, i64);

impl Tls {
    /// Reads the certificates.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn open(files: Files) -> Result<Self, TlsError> {
        let current = Current {
            // Before reading: what changes in between is read again.
            stamps: stamps(&files)?,
            acceptor: acceptor(&files)?,
            looked: Instant::now(),
        };
        Ok(Self {
            files,
            current: Mutex::new(current),
        })
    }

    /// What accepts the next connection. May read files.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= FRESH {
            current.looked = Instant::now();
            if let Err(error) = self.refresh(&mut current) {
                tracing::warn!(
                    error = crate::rpc::chain(&error),
                    "the streaming server keeps its old certificate"
                );
            }
        }
        current.acceptor.clone()
    }

    fn refresh(&self, current: &mut Current) -> Result<(), TlsError> {
        let stamps = stamps(&self.files)?;
        if stamps != current.stamps {
            current.acceptor = acceptor(&self.files)?;
            current.stamps = stamps;
            tracing::info!(certificate = %self.files.certificate.display(), "read the streaming server's certificate again");
        }
        Ok(())
    }
}

fn stamps(files: &Files) -> Result<Vec<Stamp>, TlsError> {
    let paths = [
        Some(&files.certificate),
        Some(&files.key),
        files.client_ca.as_ref(),
    ];
    let stamp = |path: &PathBuf| {
        let stat = std::fs::metadata(path).map_err(|source| TlsError::Stat {
            path: path.clone(),
            source,
        })?;
        Ok((stat.ino(), stat.size(), stat.mtime(), stat.mtime_nsec()))
    };
    paths.into_iter().flatten().map(stamp).collect()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read {
        path: path.to_owned(),
        source,
    };
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(read)?.collect();
    let all = all.map_err(read)?;
    if all.is_empty() {
        return Err(TlsError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(all)
}

fn acceptor(files: &Files) -> Result<TlsAcceptor, TlsError> {
    const ONLY_1_3: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let versions = if files.only_1_3 {
        ONLY_1_3
    } else {
        rustls::ALL_VERSIONS
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pair = |source| TlsError::Pair {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(pair)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let unfit = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::ClientCa {
                path: path.clone(),
                source,
            };
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots
                    .add(certificate)
                    .map_err(|error| unfit(error.into()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| unfit(error.into()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::Read {
        path: files.key.clone(),
        source,
    })?;
    let mut config = builder
        .with_single_cert(certificates(&files.certificate)?, key)
        .map_err(pair)?;
    // Upgrades are of HTTP/1.1 only.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
