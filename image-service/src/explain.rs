//! What a pull would do, without doing it: every host it would ask, in order, by which file, with
//! which CA, proxy and credentials, and what each answers.

use crate::auth::{Credentials, Holder};
use crate::hosts::Host;
use crate::policy::{Policy, PolicyError};
use crate::reference::Reference;
use crate::registries_conf;
use crate::registry::{Registries, Registry, RegistryError, Route, Turn};
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

/// How long one host may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a name comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The full reference.
    pub reference: String,
    /// Why the name means it, where it is a short one.
    pub because: String,
    /// What the policy says of it.
    pub policy: String,
    /// Why no host can be asked; "" when they can.
    pub problem: String,
    /// The hosts, in the order a pull asks them now.
    pub hosts: Vec<HostExplanation>,
}

/// One host and how it is reached. Every text is for people, "" where there is nothing to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostExplanation {
    /// Where requests go, the repository included.
    pub url: String,
    /// "pull, resolve".
    pub capabilities: String,
    /// The files that say so.
    pub said_by: String,
    /// CAs, client certificate, whether anything is verified.
    pub tls: String,
    /// Its proxy, or "none".
    pub proxy: String,
    /// Where its credentials come from, or "none".
    pub credentials: String,
    /// Why it is asked later than its place: what failed, and for how long that counts.
    pub aside: String,
    /// What it says to the manifest; "not asked" where it may not be.
    pub answer: String,
}

/// Explains a pull of `name`. Every host is asked for the manifest's head, nothing is fetched.
pub async fn explain(
    registries: &Arc<Registries>,
    policy: Result<Policy, PolicyError>,
    name: &str,
    credentials: Option<Credentials>,
) -> Vec<Explanation> {
    let references = match registries.references(name).await {
        Ok(references) => references,
        Err(error) => {
            return vec![Explanation {
                reference: name.into(),
                because: String::new(),
                policy: String::new(),
                problem: chain(&error),
                hosts: Vec::new(),
            }];
        }
    };
    let mut explanations = Vec::new();
    let said_by = registries.alias_said_by(name).await;
    let count = references.len();
    for reference in references {
        let because = match &said_by {
            _ if !registries_conf::is_short(name) => String::new(),
            Some(path) => format!("alias of {}", path.display()),
            None if reference.host() == crate::reference::DEFAULT_HOST && count == 1 => {
                "a short name is of docker.io".into()
            }
            None => "unqualified-search-registries".into(),
        };
        let mut explanation = Explanation {
            reference: reference.to_string(),
            because,
            policy: match &policy {
                Ok(policy) => policy.decision(&reference).summary(),
                Err(error) => chain(error),
            },
            problem: String::new(),
            hosts: Vec::new(),
        };
        match registries.open(&reference, credentials.clone()).await {
            Ok(registry) => explanation.hosts = hosts(&Arc::new(registry), &reference).await,
            Err(error) => explanation.problem = chain(&error),
        }
        explanations.push(explanation);
    }
    explanations
}

async fn hosts(registry: &Arc<Registry>, reference: &Reference) -> Vec<HostExplanation> {
    let routes = registry.routes();
    let turns = match reference.digest() {
        Some(_) => registry.pullers(),
        None => registry.resolvers(),
    };
    // The order of now: hosts in trouble come last. Those that are not asked come behind.
    let mut order: Vec<usize> = turns.iter().flatten().map(|turn| turn.at).collect();
    let rest: Vec<usize> = routes
        .iter()
        .map(|route| route.at)
        .filter(|at| !order.contains(at))
        .collect();
    let asked = order.len();
    order.extend(rest);
    let mut explained = Vec::new();
    for (nth, at) in order.into_iter().enumerate() {
        let Some(route) = routes.iter().find(|route| route.at == at) else {
            continue;
        };
        let mut explanation = describe(route);
        explanation.answer = if nth < asked {
            answer(registry, at, reference).await
        } else {
            "not asked: its capabilities do not allow it".into()
        };
        explained.push(explanation);
    }
    explained
}

async fn answer(registry: &Registry, at: usize, reference: &Reference) -> String {
    // Not patient: what is asked again tells nothing more.
    let turn = Turn { at, is_last: false };
    let wanted = match reference.digest() {
        Some(digest) => digest.to_string(),
        None => reference.tag().unwrap_or_default().to_owned(),
    };
    let begun = std::time::Instant::now();
    let outcome = tokio::time::timeout(PATIENCE, registry.look(turn, &wanted)).await;
    let took = begun.elapsed().as_millis();
    match outcome {
        Ok(Ok(Some(digest))) => format!("has it: {digest} ({took} ms)"),
        Ok(Ok(None)) => format!("has it, and does not say its digest ({took} ms)"),
        Ok(Err(error)) => format!("{} ({took} ms)", chain(&error)),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    }
}

fn describe(route: &Route<'_>) -> HostExplanation {
    let host: &Host = route.host;
    let mut said_by: Vec<String> = Vec::new();
    said_by.extend(route.redirected_by.map(|path| path.display().to_string()));
    said_by.extend(host.said_by.as_ref().map(|path| path.display().to_string()));
    if said_by.is_empty() {
        said_by.push("the reference itself, no file says anything".into());
    }
    let mut capabilities = Vec::new();
    if host.pull {
        capabilities.push("pull");
    }
    if host.resolve {
        capabilities.push("resolve");
    }
    HostExplanation {
        url: format!(
            "{}/{}",
            host.url.as_str().trim_end_matches('/'),
            route.repository
        ),
        capabilities: capabilities.join(", "),
        said_by: said_by.join(", "),
        tls: tls(host),
        proxy: match &route.proxy {
            None => "none".into(),
            Some(proxy) => match host.proxy {
                crate::proxy::Proxy::Environment => format!("{proxy} (environment)"),
                _ => format!("{proxy} (hosts.toml)"),
            },
        },
        credentials: match route.holder {
            Holder::Nobody => "none".into(),
            Holder::Secret(secret, source) => format!("{secret:?}: {source}"),
            Holder::Helpers(names) => {
                let names: Vec<_> = names
                    .iter()
                    .map(|name| format!("docker-credential-{name}"))
                    .collect();
                format!("asked when needed: {}", names.join(", "))
            }
        },
        aside: match &route.aside {
            None => String::new(),
            Some((left, why)) => format!("set aside for {} s more: {why}", left.as_secs() + 1),
        },
        answer: String::new(),
    }
}

fn tls(host: &Host) -> String {
    if host.url.scheme() == "http" {
        return "none, plain http".into();
    }
    let mut parts = vec![if host.tls.skip_verify {
        "certificate not verified".to_owned()
    } else if host.tls.ca.is_empty() {
        "system CAs".to_owned()
    } else {
        let files: Vec<_> = host
            .tls
            .ca
            .iter()
            .map(|ca| ca.display().to_string())
            .collect();
        format!("system CAs and {}", files.join(", "))
    }];
    if let Some((certificate, _)) = &host.tls.client {
        parts.push(format!("client certificate {}", certificate.display()));
    }
    parts.join("; ")
}

/// An error and its causes.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

impl Registry {
    /// The digest a host has for a tag or digest, and all that it says when it has none.
    async fn look(
        &self,
        turn: Turn,
        tag_or_digest: &str,
    ) -> Result<Option<crate::digest::Digest>, RegistryError> {
        match self.digest_of(turn, tag_or_digest).await? {
            Some(digest) => Ok(Some(digest)),
            // Refusals to HEAD have no words; the manifest itself is small.
            None => {
                let limit = crate::content::MAX_DOCUMENT_BYTES;
                let document = self.manifest(turn, tag_or_digest, limit).await?;
                Ok(Some(crate::digest::Digest::sha256(&document.bytes)))
            }
        }
    }
}
