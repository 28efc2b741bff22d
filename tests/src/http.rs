//! As much HTTP/1.1 as the tests need: a client that pushes to a registry, and a
//! server that plays a token service or a registry that misbehaves on purpose.
//! One request per connection.

use crate::host::Host;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A peer that says nothing for this long has failed.
const SILENCE: Duration = Duration::from_secs(60);

/// Header names are lower case.
pub type Headers = BTreeMap<String, String>;

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

#[derive(Clone, Debug, Default)]
pub struct Response {
    pub status: u16,
    pub headers: Headers,
    pub body: Vec<u8>,
    /// The Content-Length a server claims, where it is not the body's length: the
    /// connection ends after the body all the same.
    pub claimed_length: Option<usize>,
}

impl Response {
    pub fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let headers = [("content-type".to_owned(), content_type.to_owned())].into();
        Self {
            status,
            headers,
            body: body.into(),
            claimed_length: None,
        }
    }

    pub fn not_found() -> Self {
        Self::new(
            404,
            "application/json",
            r#"{"errors":[{"code":"NOT_FOUND"}]}"#,
        )
    }

    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.insert(name.to_owned(), value.to_owned());
        self
    }
}

/// Sends one request to a port of the host's loopback.
///
/// # Errors
/// When nobody answers. A status of failure is an answer.
pub fn send(
    host: &Host,
    port: u16,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Response> {
    host.enter(|| {
        let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)))
            .with_context(|| format!("nobody listens on port {port}"))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_nodelay(true)?;
        let mut head = format!(
            "{method} {target} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\
             content-length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut reader = BufReader::new(stream);
        let (first, headers) = read_head(&mut reader)?;
        let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
        let Some(status) = status else {
            bail!("not an HTTP answer: {first:?}")
        };
        let mut body = Vec::new();
        if method != "HEAD" {
            match headers.get("content-length") {
                Some(length) => {
                    body.resize(length.parse()?, 0);
                    reader.read_exact(&mut body)?;
                }
                None => _ = reader.read_to_end(&mut body)?,
            }
        }
        Ok(Response {
            status,
            headers,
            body,
            claimed_length: None,
        })
    })
}

fn read_head(reader: &mut impl BufRead) -> Result<(String, Headers)> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = Headers::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Ok((first.trim_end().to_owned(), headers))
}

/// A server on a port of the host's loopback; gone when this value is.
pub struct Server {
    pub port: u16,
    stopping: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Server {
    /// Answers with whatever `handler` says, each connection on its own thread.
    pub fn start(
        host: &Host,
        handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = host.enter(|| TcpListener::bind("127.0.0.1:0"))?;
        let port = listener.local_addr()?.port();
        let stopping = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let handler = Arc::new(handler);
        let thread = thread::spawn({
            let (stopping, seen) = (Arc::clone(&stopping), Arc::clone(&seen));
            move || {
                for stream in listener.incoming() {
                    if stopping.load(Ordering::SeqCst) {
                        break;
                    }
                    let Ok(stream) = stream else { break };
                    let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                    // A client that hangs up in the middle is the client's affair.
                    thread::spawn(move || _ = serve(stream, &*handler, &seen));
                }
            }
        });
        let netns = host.handle()?;
        let wake = Box::new(move || {
            let Ok(netns) = netns.try_clone() else { return };
            let connect = thread::spawn(move || {
                nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)
                    .is_ok()
                    .then(|| TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))))
            });
            _ = connect.join();
        });
        Ok(Self {
            port,
            stopping,
            seen,
            thread: Some(thread),
            wake,
        })
    }

    /// Every request there was, in order of arrival.
    pub fn seen(&self) -> Vec<Request> {
        self.seen
            .lock()
            .expect("no handler panics with the lock held")
            .clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        (self.wake)();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

fn serve(
    stream: TcpStream,
    handler: &(impl Fn(&Request) -> Response + ?Sized),
    seen: &Mutex<Vec<Request>>,
) -> Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let (first, headers) = read_head(&mut reader)?;
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let length = headers
        .get("content-length")
        .and_then(|v| v.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let request = Request {
        method,
        target,
        headers,
        body,
    };
    seen.lock()
        .expect("no handler panics with the lock held")
        .push(request.clone());

    let response = handler(&request);
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let length = response.claimed_length.unwrap_or(response.body.len());
    head.push_str(&format!("content-length: {length}\r\n\r\n"));
    let mut stream = stream;
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(&response.body)?;
    }
    Ok(())
}
