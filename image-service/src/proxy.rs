//! Through which proxy a host is asked: hosts.toml's `proxy`, else HTTPS_PROXY, HTTP_PROXY and
//! NO_PROXY of the daemon's environment.
//!
//! ```text
//! NO_PROXY := item { "," item }
//! item     := "*" | address | address "/" bits | [ "." ] name [ ":" port ]
//! ```
//! A name stands for itself and everything below it, with a dot before it only for what is
//! below. Loopback is never asked through a proxy of the environment: a proxy's own loopback is
//! somewhere else.
//! Source: Go's `golang.org/x/net/http/httpproxy`, which is what kubelet and containerd do.

use std::fmt;
use std::net::IpAddr;
use url::Url;

/// Where requests to a host go.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// As the environment says.
    #[default]
    Environment,
    /// Straight to it.
    Direct,
    /// By this one.
    Through(ProxyUrl),
}

/// An http or https URL of a proxy. Its Debug and Display show no password.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ProxyUrl(Url);

/// A text that is no proxy's address; shows nothing of it but the scheme, as it may hold a
/// password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadProxy {
    /// No URL with a host.
    #[error("the proxy is not a URL such as http://proxy.example:3128, or \"direct\"")]
    NotAUrl,
    /// SOCKS and the like.
    #[error("a proxy of the scheme {0:?} is not supported, only http and https are")]
    Scheme(String),
}

impl ProxyUrl {
    /// From a URL; `http://` may be left out, as in the environment.
    ///
    /// # Errors
    /// [`BadProxy`].
    pub fn parse(text: &str) -> Result<ProxyUrl, BadProxy> {
        let text = text.trim();
        let full = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let url = Url::parse(&full).map_err(|_| BadProxy::NotAUrl)?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(BadProxy::Scheme(url.scheme().into()));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(BadProxy::NotAUrl);
        }
        Ok(ProxyUrl(url))
    }

    /// With its password, for the HTTP client only.
    pub(crate) fn url(&self) -> &Url {
        &self.0
    }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.host_str().unwrap_or_default();
        let secret = if self.0.username().is_empty() && self.0.password().is_none() {
            ""
        } else {
            "[redacted]@"
        };
        write!(f, "{}://{secret}{host}", self.0.scheme())?;
        match self.0.port() {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Proxy::Environment => f.write_str("environment"),
            Proxy::Direct => f.write_str("direct"),
            Proxy::Through(url) => write!(f, "{url}"),
        }
    }
}

/// What the environment says of proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ProxyEnvironment {
    http: Option<ProxyUrl>,
    https: Option<ProxyUrl>,
    exceptions: Vec<Exception>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Exception {
    Everything,
    Net(IpAddr, u8),
    Name {
        name: String,
        /// Itself too, not only what is below.
        itself: bool,
        port: Option<u16>,
    },
}

impl ProxyEnvironment {
    /// That of this process: HTTP_PROXY, HTTPS_PROXY, NO_PROXY, upper case before lower. What
    /// is no proxy's address is left out with a warning.
    pub fn of_this_process() -> ProxyEnvironment {
        ProxyEnvironment::read(|name| std::env::var(name).ok())
    }

    /// From variables by name.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> ProxyEnvironment {
        let either = |name: &str| {
            let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
            set(name).or_else(|| set(&name.to_ascii_lowercase()))
        };
        let proxy = |name: &str| {
            let text = either(name)?;
            match ProxyUrl::parse(&text) {
                Ok(url) => Some(url),
                Err(error) => {
                    tracing::warn!(variable = name, %error, "a proxy of the environment is not used");
                    None
                }
            }
        };
        ProxyEnvironment {
            http: proxy("HTTP_PROXY"),
            https: proxy("HTTPS_PROXY"),
            exceptions: exceptions(&either("NO_PROXY").unwrap_or_default()),
        }
    }

    /// The proxy for a request to `url`.
    pub fn proxy_of(&self, url: &Url) -> Option<&ProxyUrl> {
        let proxy = match url.scheme() {
            "http" => self.http.as_ref(),
            "https" => self.https.as_ref(),
            _ => None,
        }?;
        let host = url.host_str()?;
        if crate::hosts::is_loopback(host) {
            return None;
        }
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address: Option<IpAddr> = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .ok();
        let port = url.port_or_known_default();
        let excepted = |exception: &Exception| match exception {
            Exception::Everything => true,
            Exception::Net(net, bits) => {
                address.is_some_and(|address| within(address, *net, *bits))
            }
            Exception::Name {
                name,
                itself,
                port: only,
            } => {
                let below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.ends_with('.'));
                (below || (*itself && host == *name)) && only.is_none_or(|only| Some(only) == port)
            }
        };
        (!self.exceptions.iter().any(excepted)).then_some(proxy)
    }
}

fn exceptions(text: &str) -> Vec<Exception> {
    let item = |item: &str| {
        let item = item.trim().to_ascii_lowercase();
        if item.is_empty() {
            return None;
        }
        if item == "*" {
            return Some(Exception::Everything);
        }
        if let Some((net, bits)) = item.split_once('/') {
            let net: IpAddr = net.parse().ok()?;
            let bits: u8 = bits.parse().ok()?;
            let most = if net.is_ipv4() { 32 } else { 128 };
            return (bits <= most).then_some(Exception::Net(net, bits));
        }
        let bare = item.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            return Some(Exception::Net(address, bits));
        }
        let (name, port) = match item.rsplit_once(':') {
            Some((name, port)) => (name.to_owned(), Some(port.parse().ok()?)),
            None => (item, None),
        };
        let name = name.strip_prefix('*').unwrap_or(&name);
        let (name, itself) = match name.strip_prefix('.') {
            Some(name) => (name, false),
            None => (name, true),
        };
        (!name.is_empty()).then(|| Exception::Name {
            name: name.into(),
            itself,
            port,
        })
    };
    text.split(',').filter_map(item).collect()
}

fn within(address: IpAddr, net: IpAddr, bits: u8) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let shift = width - u32::from(bits);
        shift >= 128 || (a ^ b) >> shift == 0
    };
    match (address, net) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            same(u128::from(a.to_bits()), u128::from(b.to_bits()), 32)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(no_proxy: &str) -> ProxyEnvironment {
        let no_proxy = no_proxy.to_owned();
        ProxyEnvironment::read(move |name| match name {
            "HTTP_PROXY" => Some("plain.example:3128".into()),
            "https_proxy" => Some("http://user:secret@secure.example".into()),
            "NO_PROXY" => Some(no_proxy.clone()),
            _ => None,
        })
    }

    fn proxy(environment: &ProxyEnvironment, url: &str) -> Option<String> {
        let url = Url::parse(url).unwrap();
        environment.proxy_of(&url).map(ToString::to_string)
    }

    #[test]
    fn the_scheme_picks_the_proxy_and_no_password_is_shown() {
        let environment = environment("");
        assert_eq!(
            proxy(&environment, "http://a.example/").as_deref(),
            Some("http://plain.example:3128")
        );
        assert_eq!(
            proxy(&environment, "https://a.example/").as_deref(),
            Some("http://[redacted]@secure.example")
        );
        assert!(!format!("{environment:?}").contains("secret"));
        for loopback in [
            "http://localhost:5000/",
            "http://127.1.2.3/",
            "http://[::1]/",
        ] {
            assert_eq!(proxy(&environment, loopback), None, "{loopback}");
        }
        assert_eq!(
            proxy(&ProxyEnvironment::read(|_| None), "http://a.example/"),
            None
        );
    }

    #[test]
    fn exceptions_are_read_as_go_reads_them() {
        for (no_proxy, url, excepted) in [
            ("*", "http://a.b/", true),
            ("a.b", "http://a.b/", true),
            ("a.b", "http://x.a.b/", true),
            ("a.b", "http://xa.b/", false),
            (".a.b", "http://a.b/", false),
            (".a.b", "http://x.a.b/", true),
            ("*.a.b", "http://x.a.b/", true),
            ("A.B", "http://a.b/", true),
            ("a.b:81", "http://a.b/", false),
            ("a.b:81", "http://a.b:81/", true),
            ("a.b:80", "http://a.b/", true),
            ("10.0.0.0/8", "http://10.1.2.3/", true),
            ("10.0.0.0/8", "http://11.1.2.3/", false),
            ("0.0.0.0/0", "http://11.1.2.3/", true),
            ("10.1.2.3", "http://10.1.2.3:5000/", true),
            ("fd00::/8", "http://[fd01::1]/", true),
            ("::/0", "http://[fd01::1]/", true),
            ("fd00::/8", "http://[fe80::1]/", false),
            ("10.0.0.0/40,x", "http://10.1.2.3/", false),
            (" , ,a.b ", "http://a.b/", true),
        ] {
            let found = proxy(&environment(no_proxy), url);
            assert_eq!(found.is_none(), excepted, "{no_proxy} {url}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_showing_it() {
        for bad in [
            "",
            "http://",
            "socks5://u:secret@a",
            "http://u:secret@",
            "//",
        ] {
            let error = ProxyUrl::parse(bad).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        let environment = ProxyEnvironment::read(|_| Some("socks5://a".into()));
        assert_eq!(proxy(&environment, "http://a.example/"), None);
    }
}
