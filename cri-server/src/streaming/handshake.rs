//! What a client's HTTP request asks to upgrade to, and what it is answered.
//!
//! Source: RFC 6455, 4.2; k8s.io/apimachinery `httpstream` and `wsstream`.

use crate::wire::channels::Protocol;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use sha1::{Digest as _, Sha1};

/// The header in which SPDY's subprotocol is agreed on.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// Where a server that agrees to none lists its own.
const ACCEPTED_PROTOCOLS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-version");

/// Exec and attach over SPDY, the best first.
const COMMAND_OVER_SPDY: &[&str] = &[
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];

/// Port-forward, over SPDY and in a tunnel.
const FORWARD: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// What is asked for, by the path of the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Exec and attach.
    Command,
    PortForward,
}

/// What a connection becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// SPDY, and the version of `channel.k8s.io` for a command.
    Spdy { version: u8 },
    /// SPDY within WebSocket messages.
    Tunnel,
    /// Channels within WebSocket messages, and the version of `channel.k8s.io`.
    Channels { protocol: Protocol, version: u8 },
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("this is for clients that upgrade to SPDY/3.1 or WebSocket")]
    NoUpgrade,
    #[error("the WebSocket handshake is not of version 13, or has no key")]
    Handshake,
    #[error("none of the client's protocols ({0}) is known here")]
    Protocol(String),
}

/// An upgrade agreed on, and the answer that says so.
pub type Agreed = (Upgrade, Response<String>);

/// Reads the headers of a request and picks a protocol.
///
/// # Errors
/// See [`Refusal`].
pub fn agree(kind: Kind, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    if !lists(headers, header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        return Err(Refusal::NoUpgrade);
    }
    let mut wanted = lists(headers, header::UPGRADE);
    match wanted.next() {
        Some(name) if name.eq_ignore_ascii_case("websocket") => over_websocket(kind, headers),
        Some(name) if name.eq_ignore_ascii_case("SPDY/3.1") => over_spdy(kind, headers),
        _ => Err(Refusal::NoUpgrade),
    }
}

fn over_spdy(kind: Kind, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    let known = match kind {
        Kind::Command => COMMAND_OVER_SPDY,
        Kind::PortForward => &[FORWARD],
    };
    let offered: Vec<&str> = lists(headers, STREAM_PROTOCOL).collect();
    let picked = match &offered[..] {
        // Clients from before protocols were agreed on.
        [] => *known.last().unwrap_or(&FORWARD),
        offered => *offered
            .iter()
            .find(|name| known.contains(name))
            .ok_or_else(|| Refusal::Protocol(offered.join(", ")))?,
    };
    let mut response = switching("SPDY/3.1");
    set(&mut response, STREAM_PROTOCOL, picked);
    Ok((
        Upgrade::Spdy {
            version: version(picked),
        },
        response,
    ))
}

fn over_websocket(kind: Kind, headers: &HeaderMap) -> Result<Agreed, Refusal> {
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or(Refusal::Handshake)?;
    if headers
        .get(header::SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        return Err(Refusal::Handshake);
    }
    let offered: Vec<&str> = lists(headers, header::SEC_WEBSOCKET_PROTOCOL).collect();
    let (picked, upgrade) = match &offered[..] {
        [] => ("", channels("channel.k8s.io").ok_or(Refusal::Handshake)?),
        offered => offered
            .iter()
            .find_map(|name| Some((*name, websocket_protocol(kind, name)?)))
            .ok_or_else(|| Refusal::Protocol(offered.join(", ")))?,
    };
    let mut response = switching("websocket");
    set(
        &mut response,
        header::SEC_WEBSOCKET_ACCEPT,
        &accept(key.as_bytes()),
    );
    if !picked.is_empty() {
        set(&mut response, header::SEC_WEBSOCKET_PROTOCOL, picked);
    }
    Ok((upgrade, response))
}

fn websocket_protocol(kind: Kind, name: &str) -> Option<Upgrade> {
    match (kind, name) {
        (Kind::PortForward, TUNNEL) => Some(Upgrade::Tunnel),
        (Kind::PortForward, FORWARD) => channels("v4.channel.k8s.io"),
        // Only commands have a close signal.
        (Kind::PortForward, "v5.channel.k8s.io") => None,
        (Kind::Command | Kind::PortForward, name) => channels(name),
    }
}

fn channels(name: &str) -> Option<Upgrade> {
    let (base64, close_signal) = match name {
        "channel.k8s.io" | "v4.channel.k8s.io" => (false, false),
        "base64.channel.k8s.io" | "v4.base64.channel.k8s.io" => (true, false),
        "v5.channel.k8s.io" => (false, true),
        _ => return None,
    };
    let protocol = Protocol {
        base64,
        close_signal,
    };
    Some(Upgrade::Channels {
        protocol,
        version: version(name),
    })
}

/// 4 for "v4.channel.k8s.io", 1 for "channel.k8s.io".
fn version(name: &str) -> u8 {
    let number = name
        .strip_prefix('v')
        .and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// The words of a header that may be there several times, with commas between.
fn lists(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers
        .get_all(name)
        .into_iter()
        .filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

/// Source: RFC 6455, 4.2.2, 5.4.
fn accept(key: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(hash.finalize())
}

fn switching(to: &'static str) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(to));
    response
}

fn set(response: &mut Response<String>, name: HeaderName, value: &str) {
    // Names of protocols and base64 are what headers may hold.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

impl Refusal {
    /// The answer that says so.
    pub fn response(&self, kind: Kind) -> Response<String> {
        let mut response = Response::new(format!("{self}\n"));
        *response.status_mut() = match self {
            Self::NoUpgrade | Self::Handshake => StatusCode::BAD_REQUEST,
            Self::Protocol(_) => StatusCode::FORBIDDEN,
        };
        let known = match kind {
            Kind::Command => COMMAND_OVER_SPDY,
            Kind::PortForward => &[FORWARD],
        };
        if matches!(self, Self::Protocol(_)) {
            for name in known {
                response
                    .headers_mut()
                    .append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(kind: Kind, lines: &[(&'static str, &str)]) -> Result<Upgrade, Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        agree(kind, &headers).map(|(upgrade, _)| upgrade)
    }

    fn spdy(protocols: &str) -> Vec<(&'static str, &str)> {
        vec![
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", protocols),
        ]
    }

    fn websocket(protocols: &str) -> Vec<(&'static str, &str)> {
        vec![
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", protocols),
        ]
    }

    #[test]
    fn the_client_s_first_choice_that_we_know_is_taken() {
        let command = |lines: Vec<_>| asked(Kind::Command, &lines);
        assert_eq!(
            command(spdy("v9.channel.k8s.io, v4.channel.k8s.io, channel.k8s.io")),
            Ok(Upgrade::Spdy { version: 4 })
        );
        assert_eq!(
            command(spdy("channel.k8s.io")),
            Ok(Upgrade::Spdy { version: 1 })
        );
        assert_eq!(command(spdy("")), Ok(Upgrade::Spdy { version: 1 }));
        assert!(matches!(
            command(spdy("v9.channel.k8s.io")),
            Err(Refusal::Protocol(_))
        ));
        let Ok(Upgrade::Channels {
            protocol,
            version: 5,
        }) = command(websocket("v5.channel.k8s.io"))
        else {
            panic!("v5");
        };
        assert!(protocol.close_signal && !protocol.base64);
        let Ok(Upgrade::Channels {
            protocol,
            version: 4,
        }) = command(websocket("x, v4.base64.channel.k8s.io"))
        else {
            panic!("base64");
        };
        assert!(protocol.base64);
        assert!(matches!(
            command(websocket(TUNNEL)),
            Err(Refusal::Protocol(_))
        ));
    }

    #[test]
    fn port_forward_has_protocols_of_its_own() {
        let forward = |lines: Vec<_>| asked(Kind::PortForward, &lines);
        assert_eq!(
            forward(spdy("portforward.k8s.io")),
            Ok(Upgrade::Spdy { version: 1 })
        );
        assert_eq!(forward(websocket(TUNNEL)), Ok(Upgrade::Tunnel));
        assert!(matches!(
            forward(websocket("portforward.k8s.io")),
            Ok(Upgrade::Channels { .. })
        ));
        assert!(matches!(
            forward(websocket("v5.channel.k8s.io")),
            Err(Refusal::Protocol(_))
        ));
        assert!(matches!(
            forward(spdy("v4.channel.k8s.io")),
            Err(Refusal::Protocol(_))
        ));
    }

    #[test]
    fn what_does_not_upgrade_is_refused() {
        let mut lines = spdy("v4.channel.k8s.io");
        lines[0].1 = "close";
        assert_eq!(asked(Kind::Command, &lines), Err(Refusal::NoUpgrade));
        lines[0].1 = "upgrade";
        lines[1].1 = "h2c";
        assert_eq!(asked(Kind::Command, &lines), Err(Refusal::NoUpgrade));
        let mut lines = websocket("v4.channel.k8s.io");
        lines[2].1 = "8";
        assert_eq!(asked(Kind::Command, &lines), Err(Refusal::Handshake));
    }

    #[test]
    fn the_answer_to_the_rfc_s_key() {
        assert_eq!(
            accept(b"dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }
}
