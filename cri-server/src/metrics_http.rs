//! The metrics' HTTP listener: GET /metrics, plain text, on the configured address only.

use crate::daemon::Daemon;
use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections served at a time: Prometheus uses one, a flood must not use descriptors.
const CONNECTIONS: usize = 16;

/// How long a connection may take to send its headers.
const HEADERS: Duration = Duration::from_secs(5);

/// Binds `address`.
///
/// # Errors
/// The address is taken or not of this node.
pub async fn bind(address: &str) -> std::io::Result<TcpListener> {
    let address: SocketAddr = address.parse().map_err(std::io::Error::other)?;
    TcpListener::bind(address).await
}

/// Answers on `listener` until dropped.
pub async fn serve(listener: TcpListener, daemon: Arc<Daemon>) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed, so a permit always comes.
        let Ok(permit) = free.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                // Out of descriptors: a moment later there may be one.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let daemon = daemon.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request: Request<Incoming>| {
                let daemon = daemon.clone();
                async move {
                    let answer = answer(&daemon, request.method(), request.uri().path()).await;
                    Ok::<_, Infallible>(answer)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a metrics connection broke off");
            }
        });
    }
}

async fn answer(daemon: &Daemon, method: &Method, path: &str) -> Response<String> {
    let (status, kind, body) = match (method, path) {
        (&Method::GET, "/metrics") => {
            daemon.metrics.logs(&daemon.sandboxes.log_totals().await);
            match daemon.metrics.render(&daemon.sandboxes.view()) {
                Ok(text) => (StatusCode::OK, "text/plain; version=0.0.4", text),
                Err(error) => (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "text/plain",
                    error.to_string(),
                ),
            }
        }
        (_, "/metrics") => (
            StatusCode::METHOD_NOT_ALLOWED,
            "text/plain",
            "GET only\n".into(),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain",
            "only /metrics is here\n".into(),
        ),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
