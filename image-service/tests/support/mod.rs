//! Registries and images for the tests: Debian's docker-registry, a small server that can
//! misbehave on purpose, and images made by hand. Everything is on loopback and ends with the
//! value that stands for it.
#![allow(dead_code)] // Each test binary uses a part of this.

use berth_image_service::auth::Credentials;
use berth_image_service::digest::Digest;
use berth_image_service::progress::Progress;
use berth_image_service::pull::PullError;
use berth_image_service::registry::{RegistryError, Timeouts};
use berth_image_service::service::{ImageService, Pulled, Settings};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub const USER: &str = "berth";
pub const PASSWORD: &str = "secret";
/// bcrypt of `PASSWORD`, cost 5: what docker-registry reads.
const HTPASSWD: &str = "berth:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

pub fn credentials() -> Credentials {
    Credentials {
        username: USER.into(),
        password: PASSWORD.into(),
        ..Credentials::default()
    }
}

/// Waits for `ready`, for at most 20 s.
pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ready() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An image service below a directory of its own.
pub struct Node {
    pub service: ImageService,
    pub dir: tempfile::TempDir,
}

impl Node {
    pub fn new() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let service = Node::open(dir.path());
        Node { service, dir }
    }

    pub fn open(dir: &Path) -> ImageService {
        ImageService::open(settings(dir)).unwrap()
    }

    /// With settings of its own.
    pub fn with(change: impl FnOnce(&mut Settings)) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(dir.path());
        change(&mut settings);
        let service = ImageService::open(settings).unwrap();
        Node { service, dir }
    }

    /// Writes a file of the configuration: "registries.conf", "auth.json", "policy.json".
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// As after a restart of the daemon.
    pub fn reopened(self) -> Node {
        let Node { service, dir } = self;
        drop(service);
        let service = Node::open(dir.path());
        Node { service, dir }
    }

    pub fn hosts_toml(&self, host: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(host);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    pub async fn pull(&self, reference: &str) -> Result<Pulled, Arc<PullError>> {
        self.pull_as(reference, None).await
    }

    pub async fn pull_as(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
    ) -> Result<Pulled, Arc<PullError>> {
        self.service
            .pull(reference, credentials, &Progress::new())
            .await
    }

    /// A pull that must fail: the whole message, and that nothing is listed.
    pub async fn refused(&self, reference: &str) -> String {
        let error = self.pull(reference).await.expect_err("it must be refused");
        assert_eq!(self.service.list(), Vec::new());
        chain(&*error)
    }
}

fn settings(dir: &Path) -> Settings {
    let mut settings = Settings::new(dir.join("images"), dir.join("containers"));
    settings.certs_d = vec![dir.join("certs.d")];
    settings.registries_conf = Some(dir.join("registries.conf"));
    settings.auth_file = Some(dir.join("auth.json"));
    settings.policy = Some(dir.join("policy.json"));
    settings.timeouts = Timeouts {
        connect: Duration::from_secs(2),
        no_progress: Duration::from_secs(2),
        ..Timeouts::default()
    };
    settings
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What the registry said of a pull that failed.
pub fn registry_error(error: &PullError) -> &RegistryError {
    error
        .registry()
        .unwrap_or_else(|| panic!("not the registry's: {}", chain(error)))
}

/// An image as a registry has it: every blob, manifests included, by digest.
#[derive(Clone, Default)]
pub struct Picture {
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub manifest: Vec<u8>,
    pub media_type: String,
    pub image_id: String,
    pub layers: Vec<String>,
}

pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut root = tar::Header::new_gnu();
    root.set_entry_type(tar::EntryType::Directory);
    root.set_mode(0o755);
    root.set_size(0);
    builder
        .append_data(&mut root, "./", std::io::empty())
        .unwrap();
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Bytes that do not compress.
pub fn noise(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut bytes = Vec::with_capacity(count + 4);
    while bytes.len() < count {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

impl Picture {
    /// Layers given as tars, packed as `packing` says ("gzip", "zstd", "tar").
    pub fn of(tars: &[Vec<u8>], packing: &str, config: Value) -> Picture {
        let mut picture = Picture::default();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for tar in tars {
            let (blob, suffix) = match packing {
                "gzip" => (gzip(tar), "+gzip"),
                "zstd" => (zstd::encode_all(&tar[..], 1).unwrap(), "+zstd"),
                _ => (tar.clone(), ""),
            };
            diff_ids.push(Digest::sha256(tar).to_string());
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            let layer = picture.add(&media_type, blob);
            picture
                .layers
                .push(layer["digest"].as_str().unwrap().into());
            layers.push(layer);
        }
        let config = json!({
            "os": "linux", "architecture": "amd64", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = picture.add(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().into_bytes(),
        );
        picture.image_id = config["digest"].as_str().unwrap().into();
        picture.media_type = "application/vnd.oci.image.manifest.v1+json".into();
        picture.manifest = json!({
            "schemaVersion": 2, "mediaType": picture.media_type,
            "config": config, "layers": layers,
        })
        .to_string()
        .into_bytes();
        let manifest = picture.manifest.clone();
        picture.add("", manifest);
        picture
    }

    /// One gzip layer with a file whose content is `seed`.
    pub fn small(seed: &str) -> Picture {
        let tar = tar_of(&[("etc/seed", seed.as_bytes())]);
        Picture::of(
            &[tar],
            "gzip",
            json!({"Cmd": ["/bin/true"], "User": "1000:1000"}),
        )
    }

    /// Keeps a blob and gives its descriptor.
    pub fn add(&mut self, media_type: &str, blob: Vec<u8>) -> Value {
        let digest = Digest::sha256(&blob).to_string();
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": blob.len()});
        self.blobs.insert(digest, blob);
        descriptor
    }

    pub fn digest(&self) -> String {
        Digest::sha256(&self.manifest).to_string()
    }

    /// The same in Docker's media types.
    pub fn dockerised(mut self) -> Picture {
        let old = String::from_utf8(self.manifest.clone()).unwrap();
        self.blobs.remove(&self.digest());
        self.media_type = "application/vnd.docker.distribution.manifest.v2+json".into();
        let new = old
            .replace(
                "application/vnd.oci.image.manifest.v1+json",
                &self.media_type,
            )
            .replace(
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.docker.container.image.v1+json",
            )
            .replace(
                "application/vnd.oci.image.layer.v1.tar+gzip",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            );
        self.manifest = new.clone().into_bytes();
        self.add("", new.into_bytes());
        self
    }

    /// An index whose entry for this platform is this image.
    pub fn indexed(mut self) -> Picture {
        let this = json!({
            "mediaType": self.media_type, "digest": self.digest(), "size": self.manifest.len(),
            "platform": {"os": "linux", "architecture": "amd64"},
        });
        let other = json!({
            "mediaType": self.media_type, "digest": Digest::sha256(b"s390x"), "size": 3,
            "platform": {"os": "linux", "architecture": "s390x"},
        });
        self.media_type = "application/vnd.oci.image.index.v1+json".into();
        self.manifest = json!({
            "schemaVersion": 2, "mediaType": self.media_type, "manifests": [other, this],
        })
        .to_string()
        .into_bytes();
        let manifest = self.manifest.clone();
        self.add("", manifest);
        self
    }
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With query.
    pub target: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// An answer; the connection is closed behind it.
#[derive(Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Content-Length, where it is not the body's.
    pub announced: Option<u64>,
    /// After the body nothing more comes, but the connection stays open so long.
    pub silence: Duration,
    /// The body comes in pieces of so many bytes, with a pause before each.
    pub trickle: Option<(usize, Duration)>,
    /// The connection ends with a reset instead of a close.
    pub reset: bool,
}

impl Reply {
    pub fn status(status: u16) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            announced: None,
            silence: Duration::ZERO,
            trickle: None,
            reset: false,
        }
    }

    /// Only the bytes `request` asks for, of an answer with all of them.
    pub fn ranged(mut self, request: &Request) -> Reply {
        let from = request
            .header("range")
            .strip_prefix("bytes=")
            .and_then(|range| range.strip_suffix('-'))
            .and_then(|from| from.parse::<usize>().ok());
        if let (Some(from), 200) = (from, self.status) {
            let size = self.body.len();
            self.body.drain(..from.min(size));
            self.status = 206;
            let range = format!("bytes {from}-{}/{size}", size.saturating_sub(1));
            return self.with("content-range", range);
        }
        self
    }

    /// Announces all of the body and sends the first `count` bytes of it.
    pub fn cut(mut self, count: usize) -> Reply {
        self.announced = Some(self.body.len() as u64);
        self.body.truncate(count);
        self
    }

    pub fn ok(body: impl Into<Vec<u8>>) -> Reply {
        let mut reply = Reply::status(200);
        reply.body = body.into();
        reply
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn announcing(mut self, length: u64) -> Reply {
        self.announced = Some(length);
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server whose every answer is the test's.
pub struct Server {
    pub address: SocketAddr,
    pub requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Server {
        Server::start_with(None, handler)
    }

    pub fn start_with(
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            stop: Arc::default(),
        };
        let (requests, stop) = (Arc::clone(&server.requests), Arc::clone(&server.stop));
        let handler: Arc<Handler> = Arc::new(handler);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (requests, handler, tls) =
                    (Arc::clone(&requests), Arc::clone(&handler), tls.clone());
                std::thread::spawn(move || {
                    stream
                        .set_read_timeout(Some(Duration::from_secs(20)))
                        .unwrap();
                    let plain = stream.try_clone().unwrap();
                    let reset = move || {
                        let now = Some(Duration::ZERO);
                        rustix::net::sockopt::set_socket_linger(&plain, now).unwrap();
                    };
                    // A client may well go away in the middle.
                    let _ = match tls {
                        None => answer(stream, &requests, &*handler, reset),
                        Some(config) => {
                            let connection = rustls::ServerConnection::new(config).unwrap();
                            answer(
                                rustls::StreamOwned::new(connection, stream),
                                &requests,
                                &*handler,
                                reset,
                            )
                        }
                    };
                });
            }
        });
        server
    }

    /// Serves `picture` under any repository and tag, as a registry should.
    pub fn of(picture: Picture) -> Server {
        Server::start(move |request| serve(&picture, request))
    }

    pub fn name(&self) -> String {
        self.address.to_string()
    }

    pub fn reference(&self) -> String {
        format!("{}/a/b:1", self.address)
    }

    pub fn seen(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub fn count(&self, wanted: impl Fn(&Request) -> bool) -> usize {
        self.seen().iter().filter(|r| wanted(r)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

/// What a registry that has only `picture` answers.
pub fn serve(picture: &Picture, request: &Request) -> Reply {
    let path = request.path();
    if let Some((_, name)) = path.rsplit_once("/manifests/") {
        let bytes = if name.contains(':') {
            picture.blobs.get(name)
        } else {
            Some(&picture.manifest)
        };
        return match bytes {
            Some(bytes) => Reply::ok(bytes.clone())
                .with("content-type", media_type(bytes))
                .with("docker-content-digest", Digest::sha256(bytes).to_string()),
            None => Reply::status(404),
        };
    }
    let blob = path
        .rsplit_once("/blobs/")
        .and_then(|(_, digest)| picture.blobs.get(digest));
    match blob {
        Some(blob) => Reply::ok(blob.clone()).ranged(request),
        None => Reply::status(404),
    }
}

fn media_type(manifest: &[u8]) -> String {
    let value: Value = serde_json::from_slice(manifest).unwrap_or_default();
    value["mediaType"]
        .as_str()
        .unwrap_or("application/json")
        .into()
}

fn answer(
    stream: impl Read + Write,
    requests: &Mutex<Vec<Request>>,
    handler: &Handler,
    reset: impl Fn(),
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, target) = (words.next(), words.next());
    let mut request = Request {
        method: method.unwrap_or_default().into(),
        target: target.unwrap_or_default().into(),
        headers: BTreeMap::new(),
        body: Vec::new(),
    };
    if request.target.is_empty() {
        return Ok(());
    }
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .insert(name.to_ascii_lowercase(), value.trim().into());
    }
    let length = request.header("content-length").parse().unwrap_or(0);
    request.body = vec![0; length];
    stream.read_exact(&mut request.body)?;
    requests.lock().unwrap().push(request.clone());
    let reply = handler(&request);
    let length = reply.announced.unwrap_or(reply.body.len() as u64);
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    head += &format!("content-length: {length}\r\n");
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let stream = stream.get_mut();
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    if request.method != "HEAD" {
        match reply.trickle {
            None => stream.write_all(&reply.body)?,
            Some((count, pause)) => {
                for piece in reply.body.chunks(count) {
                    std::thread::sleep(pause);
                    stream.write_all(piece)?;
                    stream.flush()?;
                }
            }
        }
    }
    stream.flush()?;
    if reply.reset {
        reset();
    }
    if !reply.silence.is_zero() {
        std::thread::sleep(reply.silence);
    }
    Ok(())
}

/// A CA of the test's own and a server certificate for 127.0.0.1 and localhost.
pub struct Ca {
    pub pem: String,
    pub server: Arc<rustls::ServerConfig>,
}

impl Ca {
    pub fn new() -> Ca {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let ca = parameters.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::new(parameters, ca_key);
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        Ca {
            pem: ca.pem(),
            server: Arc::new(server),
        }
    }
}

/// Debian's docker-registry on a free loopback port.
pub struct DockerRegistry {
    child: Child,
    pub address: String,
    _dir: tempfile::TempDir,
    basic: bool,
}

impl DockerRegistry {
    /// With `basic`, only [`credentials`] are let in.
    pub fn start(basic: bool) -> DockerRegistry {
        let dir = tempfile::tempdir().unwrap();
        // Another process may take the port between our look and the registry's bind.
        for _ in 0..5 {
            if let Some((child, address)) = try_start(dir.path(), basic) {
                return DockerRegistry {
                    child,
                    address,
                    _dir: dir,
                    basic,
                };
            }
        }
        panic!("docker-registry does not start; is the package docker-registry installed?");
    }

    pub fn push(&self, repository: &str, tag: &str, picture: &Picture) {
        for (digest, blob) in &picture.blobs {
            let (status, headers) =
                self.send("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
            assert_eq!(status, 202);
            let location = headers["location"].clone();
            let path = location.split(&self.address).last().unwrap();
            let (status, _) = self.send(
                "PUT",
                &format!("{path}&digest={digest}"),
                "application/octet-stream",
                blob,
            );
            assert_eq!(status, 201);
            if blob != &picture.manifest && media_type_of_manifest(blob).is_some() {
                let kind = media_type_of_manifest(blob).unwrap();
                let path = format!("/v2/{repository}/manifests/{digest}");
                assert_eq!(self.send("PUT", &path, &kind, blob).0, 201);
            }
        }
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, _) = self.send("PUT", &path, &picture.media_type, &picture.manifest);
        assert_eq!(status, 201);
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> (u16, BTreeMap<String, String>) {
        use base64::Engine as _;
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n",
            self.address,
            body.len()
        );
        if !content_type.is_empty() {
            head += &format!("content-type: {content_type}\r\n");
        }
        if self.basic {
            let pair = format!("{USER}:{PASSWORD}");
            let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
            head += &format!("authorization: Basic {encoded}\r\n");
        }
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(b"\r\n").unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        answer.push_str(&String::from_utf8_lossy(&bytes));
        let mut lines = answer.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let headers = lines
            .map_while(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        (status.parse().unwrap(), headers)
    }
}

fn media_type_of_manifest(blob: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(blob).ok()?;
    Some(value["mediaType"].as_str()?.to_owned())
}

fn try_start(dir: &Path, basic: bool) -> Option<(Child, String)> {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = format!("127.0.0.1:{port}");
    let htpasswd: PathBuf = dir.join("htpasswd");
    std::fs::write(&htpasswd, HTPASSWD).unwrap();
    let mut config = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
         http:\n  addr: {address}\n  secret: x\n",
        dir.join("data").display()
    );
    if basic {
        config += &format!(
            "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
            htpasswd.display()
        );
    }
    let file = dir.join("config.yml");
    std::fs::write(&file, config).unwrap();
    let mut child = Command::new("docker-registry")
        .arg("serve")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the package docker-registry is needed");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if TcpStream::connect(&address).is_ok() {
            return Some((child, address));
        }
        if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
