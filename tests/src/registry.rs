//! A real registry (Debian's docker-registry) on the test host's loopback.
//!
//! Further instances may serve the same data with other ways in: HTTPS, a
//! password, a token service. Pushes always go through the open one.

use crate::deadline::within;
use crate::host::Host;
use crate::http::{self, Request, Response, Server};
use crate::image::{Blob, Image};
use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, KeyPair, SigningKey as _};
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The one user a protected instance lets in.
pub const USER: &str = "pilot";
pub const PASSWORD: &str = "harbour: 42";
/// What the token service takes instead of a password.
pub const IDENTITY_TOKEN: &str = "identity-token-of-pilot";

const SERVICE: &str = "berth-test-registry";
const ISSUER: &str = "berth-test-issuer";

/// How to get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Open,
    Basic,
    /// A bearer token, for whoever shows the password or the identity token.
    Token,
    /// HTTPS, open, under a CA of the test's own.
    Tls,
}

/// One running instance.
pub struct Registry {
    host: Arc<Host>,
    root: PathBuf,
    child: Child,
    tokens: Option<Server>,
    pub port: u16,
    /// PEM file of the CA to trust; only with [`Access::Tls`].
    pub ca: Option<PathBuf>,
}

impl Registry {
    /// Starts one; `root` holds the data, shared by every instance given the same.
    pub fn start(host: &Arc<Host>, root: &Path, access: Access) -> Result<Self> {
        fs::create_dir_all(root)?;
        let port = host.fresh_port();
        let own = root.join(port.to_string());
        fs::create_dir_all(&own)?;
        let mut config = json!({
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": false}},
            "storage": {
                "filesystem": {"rootdirectory": root.join("data")},
                "maintenance": {"uploadpurging": {"enabled": false}},
            },
            "http": {"addr": format!("127.0.0.1:{port}"), "secret": "not one"},
        });
        let (mut tokens, mut ca) = (None, None);
        match access {
            Access::Open => {}
            Access::Basic => {
                config["auth"] = json!({"htpasswd": {
                    "realm": "berth-test", "path": password_file(&own)?,
                }});
            }
            Access::Token => {
                let (server, cert) = token_service(host, &own)?;
                config["auth"] = json!({"token": {
                    "realm": format!("http://127.0.0.1:{}/token", server.port),
                    "service": SERVICE, "issuer": ISSUER, "rootcertbundle": cert,
                }});
                tokens = Some(server);
            }
            Access::Tls => {
                let files = certificate(&own)?;
                config["http"]["tls"] = json!({"certificate": files.certificate, "key": files.key});
                ca = Some(files.ca);
            }
        }
        // JSON is YAML.
        let file = own.join("config.yml");
        fs::write(&file, config.to_string())?;
        let log = File::create(own.join("log"))?;
        let child = host
            .enter(|| {
                Command::new("docker-registry")
                    .arg("serve")
                    .arg(&file)
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .spawn()
            })
            .context("cannot run docker-registry: make setup installs it")?;
        let mut registry = Self {
            host: Arc::clone(host),
            root: root.to_owned(),
            child,
            tokens,
            port,
            ca,
        };
        registry.wait_until_it_listens()?;
        Ok(registry)
    }

    fn wait_until_it_listens(&mut self) -> Result<()> {
        let (host, port, child) = (Arc::clone(&self.host), self.port, &mut self.child);
        let answer = within(Duration::from_secs(30), || {
            if let Ok(Some(status)) = child.try_wait() {
                return Some(Err(status));
            }
            let connected =
                host.enter(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
            connected.then_some(Ok(()))
        });
        let log = || fs::read_to_string(self.root.join(port.to_string()).join("log"));
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(status)) => bail!("docker-registry: {status}: {}", log()?),
            None => bail!("docker-registry does not listen: {}", log()?),
        }
    }

    /// "127.0.0.1:PORT/NAME".
    pub fn name(&self, repository: &str) -> String {
        format!("127.0.0.1:{}/{repository}", self.port)
    }

    /// What the token service was asked, as request targets.
    pub fn token_requests(&self) -> Vec<Request> {
        self.tokens.as_ref().map(Server::seen).unwrap_or_default()
    }

    /// What this instance was asked and answered, in order, by its own access log: "GET /v2/…" and
    /// the status.
    pub fn accesses(&self) -> Vec<(String, u16)> {
        let path = self.root.join(self.port.to_string()).join("log");
        let log = fs::read_to_string(path).unwrap_or_default();
        let access = |line: &str| {
            // Apache's combined format; other lines have no request in quotes.
            let (_, rest) = line.split_once("\"")?;
            let (request, rest) = rest.split_once("\"")?;
            let what = request.strip_suffix(" HTTP/1.1")?;
            let status = rest.split_whitespace().next()?.parse().ok()?;
            Some((what.to_owned(), status))
        };
        log.lines().filter_map(access).collect()
    }

    /// Pushes an image and gives it a tag; the reference to pull it by.
    pub fn push(&self, repository: &str, tag: &str, image: &Image) -> Result<String> {
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(repository, blob)?;
        }
        self.push_manifest(repository, tag, &image.manifest)?;
        Ok(format!("{}:{tag}", self.name(repository)))
    }

    /// Pushes the images of an index by digest, then the index under the tag.
    pub fn push_index(
        &self,
        repository: &str,
        tag: &str,
        images: &[&Image],
        index: &Blob,
    ) -> Result<String> {
        for image in images {
            for blob in image.layers.iter().chain([&image.config]) {
                self.push_blob(repository, blob)?;
            }
            self.push_manifest(repository, &image.manifest.digest, &image.manifest)?;
        }
        self.push_manifest(repository, tag, index)?;
        Ok(format!("{}:{tag}", self.name(repository)))
    }

    pub fn push_manifest(&self, repository: &str, reference: &str, blob: &Blob) -> Result<()> {
        let target = format!("/v2/{repository}/manifests/{reference}");
        let headers = [("content-type", blob.media_type.as_str())];
        let answer = http::send(&self.host, self.port, "PUT", &target, &headers, &blob.data)?;
        ensure!(answer.status == 201, "PUT {target}: {}", describe(&answer));
        Ok(())
    }

    /// Source: OCI distribution-spec, "Pushing a blob monolithically".
    pub fn push_blob(&self, repository: &str, blob: &Blob) -> Result<()> {
        let exists = format!("/v2/{repository}/blobs/{}", blob.digest);
        if http::send(&self.host, self.port, "HEAD", &exists, &[], &[])?.status == 200 {
            return Ok(());
        }
        let target = format!("/v2/{repository}/blobs/uploads/");
        let answer = http::send(&self.host, self.port, "POST", &target, &[], &[])?;
        ensure!(answer.status == 202, "POST {target}: {}", describe(&answer));
        let location = answer
            .headers
            .get("location")
            .context("an upload has no location")?;
        // Absolute or not, the path is what counts.
        let path = location
            .splitn(4, '/')
            .nth(3)
            .filter(|_| location.starts_with("http"));
        let path = path.map_or(location.clone(), |path| format!("/{path}"));
        let separator = if path.contains('?') { '&' } else { '?' };
        let target = format!("{path}{separator}digest={}", blob.digest);
        let headers = [("content-type", "application/octet-stream")];
        let answer = http::send(&self.host, self.port, "PUT", &target, &headers, &blob.data)?;
        ensure!(answer.status == 201, "PUT {target}: {}", describe(&answer));
        Ok(())
    }

    /// Replaces a pushed blob's bytes behind the registry's back: it then serves
    /// these under the old digest.
    pub fn corrupt(&self, digest: &str, data: &[u8]) -> Result<()> {
        let hex = digest
            .strip_prefix("sha256:")
            .context("digests here are sha256")?;
        let path = self.root.join("data/docker/registry/v2/blobs/sha256");
        Ok(fs::write(
            path.join(&hex[..2]).join(hex).join("data"),
            data,
        )?)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn describe(answer: &Response) -> String {
    format!(
        "{} {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    )
}

/// An htpasswd file with [`USER`]; bcrypt is all docker-registry accepts, and
/// this is the hash of [`PASSWORD`] at the lowest cost.
fn password_file(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("htpasswd");
    fs::write(&path, format!("{USER}:{}\n", PASSWORD_BCRYPT))?;
    Ok(path)
}

const PASSWORD_BCRYPT: &str = "$2y$04$abcdefghijklmnopqrstuuQKkx4JQ3R3d5.cJ.1FzuD2cxkRSGZl.";

struct TlsFiles {
    certificate: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

/// A CA and a certificate of 127.0.0.1 and localhost under it.
fn certificate(dir: &Path) -> Result<TlsFiles> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name
        .push(rcgen::DnType::CommonName, "berth test CA");
    let ca_cert = ca.self_signed(&ca_key)?;
    let issuer = rcgen::Issuer::from_params(&ca, &ca_key);
    let key = KeyPair::generate()?;
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let cert = CertificateParams::new(names)?.signed_by(&key, &issuer)?;

    let files = TlsFiles {
        certificate: dir.join("cert.pem"),
        key: dir.join("key.pem"),
        ca: dir.join("ca.pem"),
    };
    fs::write(&files.certificate, cert.pem())?;
    fs::write(&files.key, key.serialize_pem())?;
    fs::write(&files.ca, ca_cert.pem())?;
    Ok(files)
}

/// A token service and the certificate a registry checks its tokens with.
/// Source: the distribution project's "Token Authentication Specification".
fn token_service(host: &Host, dir: &Path) -> Result<(Server, PathBuf)> {
    let key = KeyPair::generate()?;
    let cert = CertificateParams::new(vec![ISSUER.to_owned()])?.self_signed(&key)?;
    let path = dir.join("token-ca.pem");
    fs::write(&path, cert.pem())?;
    let chain = STANDARD.encode(cert.der());
    let server = Server::start(host, move |request| {
        let body = String::from_utf8_lossy(&request.body);
        let query = request
            .target
            .split_once('?')
            .map_or("", |(_, query)| query);
        let field = |name: &str| {
            let pairs = query.split('&').chain(body.split('&'));
            pairs
                .filter_map(|pair| pair.split_once('='))
                .find(|(n, _)| *n == name)
        };
        let password = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let by_password = request.headers.get("authorization") == Some(&password);
        let by_identity = field("refresh_token").is_some_and(|(_, t)| t == IDENTITY_TOKEN);
        if !by_password && !by_identity {
            let body = r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#;
            return Response::new(401, "application/json", body);
        }
        let scopes = field("scope")
            .map(|(_, scope)| decode(scope))
            .unwrap_or_default();
        match token(&key, &chain, &scopes) {
            Ok(token) => {
                let body = json!({"token": token, "access_token": token, "expires_in": 300});
                Response::new(200, "application/json", body.to_string())
            }
            Err(err) => Response::new(500, "text/plain", format!("{err:#}")),
        }
    })?;
    Ok((server, path))
}

fn decode(text: &str) -> String {
    text.replace("%3A", ":")
        .replace("%2F", "/")
        .replace("%2C", ",")
        .replace('+', " ")
        .replace("%20", " ")
        .replace("%3a", ":")
        .replace("%2f", "/")
        .replace("%2c", ",")
}

/// A JWT, signed with ES256, that grants every scope asked for.
fn token(key: &KeyPair, chain: &str, scopes: &str) -> Result<String> {
    let access: Vec<_> = scopes
        .split(' ')
        .filter_map(|scope| {
            let (kind, rest) = scope.split_once(':')?;
            let (name, actions) = rest.rsplit_once(':')?;
            let actions: Vec<_> = actions.split(',').collect();
            Some(json!({"type": kind, "name": name, "actions": actions}))
        })
        .collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [chain]});
    let claims = json!({
        "iss": ISSUER, "sub": USER, "aud": SERVICE, "jti": now.to_string(),
        "iat": now, "nbf": now.saturating_sub(10), "exp": now + 300, "access": access,
    });
    let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(header), encode(claims));
    let signature = fixed_width(&key.sign(text.as_bytes())?)?;
    Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// A JWT's signature is r and s, 32 bytes each; the library's is DER: a SEQUENCE
/// of two INTEGERs. Source: RFC 7518, section 3.4.
fn fixed_width(der: &[u8]) -> Result<[u8; 64]> {
    let mut fixed = [0; 64];
    let mut rest = der.get(2..).context("a signature is longer")?;
    for half in fixed.chunks_mut(32) {
        let length = usize::from(*rest.get(1).context("an INTEGER has a length")?);
        let number = rest.get(2..2 + length).context("an INTEGER is whole")?;
        rest = &rest[2 + length..];
        let digits = &number[number.len().saturating_sub(32)..];
        half[32 - digits.len()..].copy_from_slice(digits);
    }
    Ok(fixed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Format, Layer, Packing};

    fn get(host: &Host, port: u16, target: &str, authorization: &str) -> Response {
        let headers = [("authorization", authorization)];
        let headers = if authorization.is_empty() {
            &headers[1..]
        } else {
            &headers[..]
        };
        http::send(host, port, "GET", target, headers, &[]).unwrap()
    }

    #[test]
    fn what_was_pushed_is_served_to_whoever_may_see_it() {
        let host = Arc::new(Host::new().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let open = Registry::start(&host, dir.path(), Access::Open).unwrap();
        let layer = Layer::new().file("hello", 0o644, "hello\n");
        let image = Image::builder(Format::Oci)
            .layer(&layer, Packing::Gzip)
            .build();
        let reference = open.push("some/thing", "1", &image).unwrap();
        assert_eq!(reference, format!("127.0.0.1:{}/some/thing:1", open.port));

        let target = format!("/v2/some/thing/blobs/{}", image.layers[0].digest);
        assert_eq!(
            get(&host, open.port, &target, "").body,
            image.layers[0].data
        );

        let basic = Registry::start(&host, dir.path(), Access::Basic).unwrap();
        let password = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        assert_eq!(get(&host, basic.port, &target, "").status, 401);
        assert_eq!(get(&host, basic.port, &target, &password).status, 200);

        let guarded = Registry::start(&host, dir.path(), Access::Token).unwrap();
        let challenge = get(&host, guarded.port, &target, "");
        assert_eq!(challenge.status, 401);
        let challenge = &challenge.headers["www-authenticate"];
        let realm = challenge
            .split("realm=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        let (_, service) = realm.rsplit_once(':').unwrap();
        let (service, _) = service.split_once('/').unwrap();
        let ask = "/token?service=x&scope=repository:some/thing:pull";
        assert_eq!(get(&host, service.parse().unwrap(), ask, "").status, 401);
        let granted = get(&host, service.parse().unwrap(), ask, &password);
        let granted: serde_json::Value = serde_json::from_slice(&granted.body).unwrap();
        let token = format!("Bearer {}", granted["token"].as_str().unwrap());
        assert_eq!(get(&host, guarded.port, &target, &token).status, 200);

        open.corrupt(&image.layers[0].digest, b"other").unwrap();
        assert_eq!(get(&host, open.port, &target, "").body, b"other");
    }
}
