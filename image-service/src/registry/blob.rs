//! One layer as a stream that outlives its connections and its hosts.
//!
//! ```text
//! host A ──> bytes ── reset ──> host A from there ── stall, or too many resets ──> host B from there
//! ```
//! What has been passed on is never asked for again, unless a server knows no ranges. A host is
//! left when it refuses, stalls (less than the least rate over a window of waiting) or breaks off
//! again and again without bringing anything; all counts have a bound, so the stream ends.
//! Source: RFC 9110, 14 (range requests).

use super::request::Ask;
use super::{Place, Registry, RegistryError, Timeouts, Turn};
use crate::digest::Digest;
use crate::retry;
use bytes::Bytes;
use http::{Method, StatusCode, header};
use reqwest::Response;
use std::collections::{BTreeSet, VecDeque};
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often in a row a host may break off without having brought [`MIN_GAIN`].
const MAX_FRUITLESS: u32 = 4;
/// What a connection must bring to have been worth it, in bytes; the last one may bring less.
const MIN_GAIN: u64 = 512;
/// How often a layer may break off at one host altogether.
const MAX_BREAKS: u32 = 200;
/// How often one host may stall before the next is asked, or the layer given up.
const MAX_STALLS: u32 = 2;

/// A layer that is being received.
pub struct Blob {
    registry: Arc<Registry>,
    /// The one that is asked now first.
    hosts: VecDeque<usize>,
    path: String,
    size: u64,
    /// Bytes passed on.
    seen: u64,
    to_skip: u64,
    /// What was seen when the connection began.
    begun_at: u64,
    breaks: u32,
    fruitless: u32,
    stalls: u32,
    rate: Rate,
    response: Option<Response>,
    ended: bool,
    senders: BTreeSet<usize>,
    said: Vec<String>,
}

impl Registry {
    /// The layer with `digest` and `size`, from the first of `hosts` that has it. Nothing is
    /// sent before the first [`Blob::next`].
    pub fn blob(self: &Arc<Self>, hosts: &[Turn], digest: &Digest, size: u64) -> Blob {
        let timeouts = self.shared.timeouts;
        Blob {
            registry: Arc::clone(self),
            hosts: hosts.iter().map(|turn| turn.at).collect(),
            path: format!("blobs/{digest}"),
            size,
            seen: 0,
            to_skip: 0,
            begun_at: 0,
            breaks: 0,
            fruitless: 0,
            stalls: 0,
            rate: Rate::new(timeouts),
            response: None,
            ended: false,
            senders: BTreeSet::new(),
            said: Vec::new(),
        }
    }
}

impl Blob {
    /// Every host that sent a part of it.
    pub fn senders(&self) -> &BTreeSet<usize> {
        &self.senders
    }

    /// What the hosts said that were left.
    pub fn said(&self) -> &[String] {
        &self.said
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// Any [`RegistryError`] of the last host, after all that could be tried was.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        while !self.ended {
            let Some(response) = &mut self.response else {
                self.connect().await?;
                continue;
            };
            let place = Place::of(response.url());
            let error = match self.rate.next(response, &place).await {
                Ok(Some(mut bytes)) => {
                    let skipped = self.to_skip.min(bytes.len() as u64);
                    self.to_skip -= skipped;
                    let bytes = bytes.split_off(skipped as usize);
                    if bytes.is_empty() {
                        continue;
                    }
                    self.seen += bytes.len() as u64;
                    self.senders.extend(self.hosts.front());
                    return Ok(Some(bytes));
                }
                Ok(None) if self.seen >= self.size => {
                    self.ended = true;
                    self.response = None;
                    break;
                }
                Ok(None) => RegistryError::Length {
                    place,
                    expected: self.size,
                    found: self.seen,
                },
                // All that counts is here.
                Err(_) if self.seen >= self.size => {
                    self.ended = true;
                    self.response = None;
                    break;
                }
                Err(error) => error,
            };
            self.response = None;
            self.broke(error).await?;
        }
        Ok(None)
    }

    /// A connection ended too early: waits as long as is due, goes on to the next host where
    /// this one is not worth more.
    async fn broke(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.breaks += 1;
        self.fruitless = if self.seen - self.begun_at >= MIN_GAIN {
            0
        } else {
            self.fruitless + 1
        };
        let stalled = matches!(
            error,
            RegistryError::Stalled { .. } | RegistryError::Slow { .. }
        );
        self.stalls += u32::from(stalled);
        // To somebody else at the first stall, and back here only if there is nobody.
        let most_stalls = if self.hosts.len() > 1 { 1 } else { MAX_STALLS };
        if self.breaks >= MAX_BREAKS
            || self.fruitless >= MAX_FRUITLESS
            || self.stalls >= most_stalls
        {
            return self.leave(error);
        }
        tracing::info!(
            error = &error as &dyn StdError,
            at_bytes = self.seen,
            "a layer's download broke off, going on"
        );
        if self.fruitless > 0 {
            tokio::time::sleep(retry::backoff(self.fruitless)).await;
        }
        Ok(())
    }

    /// On to the next host, or the end.
    fn leave(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        if let Some(at) = self.hosts.front() {
            self.registry.remember(*at, &error);
        }
        if self.hosts.len() <= 1 {
            return Err(error);
        }
        tracing::info!(error = &error as &dyn StdError, "trying the next host");
        self.said.push(error.to_string());
        self.hosts.pop_front();
        (self.breaks, self.fruitless, self.stalls) = (0, 0, 0);
        Ok(())
    }

    async fn connect(&mut self) -> Result<(), RegistryError> {
        while self.response.is_none() {
            let turn = Turn {
                at: self.hosts.front().copied().unwrap_or_default(),
                is_last: self.hosts.len() <= 1,
            };
            match self.ask(turn).await {
                Ok(response) => self.response = Some(response),
                Err(error) => self.leave(error)?,
            }
        }
        self.begun_at = self.seen;
        self.rate.quiet = Duration::ZERO;
        self.rate.begin();
        Ok(())
    }

    async fn ask(&mut self, turn: Turn) -> Result<Response, RegistryError> {
        let ask = Ask {
            method: Method::GET,
            path: &self.path,
            accept: None,
            range_from: self.seen,
            by_digest: true,
        };
        let response = self.registry.send(turn, &ask).await?;
        let continued = self.seen > 0 && response.status() == StatusCode::PARTIAL_CONTENT;
        if continued && let Some(range) = response.headers().get(header::CONTENT_RANGE) {
            let range = range.to_str().unwrap_or_default();
            let first = range
                .strip_prefix("bytes ")
                .and_then(|range| range.split('-').next())
                .and_then(|first| first.trim().parse::<u64>().ok());
            if first != Some(self.seen) {
                return Err(RegistryError::Range {
                    place: Place::of(response.url()),
                    from: self.seen,
                    found: range.chars().take(100).collect(),
                });
            }
        }
        let expected = if continued {
            self.size.saturating_sub(self.seen)
        } else {
            self.size
        };
        if let Some(found) = response.content_length()
            && found != expected
        {
            return Err(RegistryError::Length {
                place: Place::of(response.url()),
                expected,
                found,
            });
        }
        // A server without ranges begins anew.
        self.to_skip = if continued { 0 } else { self.seen };
        Ok(response)
    }
}

/// How much comes in how much waiting. Only waiting for the network counts: a layer may well not
/// be read for minutes, because its parents come first or the disk is slow.
struct Rate {
    no_progress: Duration,
    /// Since the last bytes.
    quiet: Duration,
    window: Duration,
    min_bytes: u64,
    waited: Duration,
    bytes: u64,
}

impl Rate {
    fn new(timeouts: Timeouts) -> Rate {
        let window = timeouts.rate_window;
        Rate {
            no_progress: timeouts.no_progress,
            quiet: Duration::ZERO,
            window,
            min_bytes: (timeouts.min_rate as f64 * window.as_secs_f64()) as u64,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    fn begin(&mut self) {
        (self.waited, self.bytes) = (Duration::ZERO, 0);
    }

    async fn next(
        &mut self,
        response: &mut Response,
        place: &Place,
    ) -> Result<Option<Bytes>, RegistryError> {
        loop {
            let begun = Instant::now();
            let left = self.window.saturating_sub(self.waited);
            let patience = left.min(self.no_progress.saturating_sub(self.quiet));
            let next = tokio::time::timeout(patience, response.chunk()).await;
            self.waited += begun.elapsed();
            self.quiet = match next {
                Ok(_) => Duration::ZERO,
                Err(_) => self.quiet + begun.elapsed(),
            };
            let over = self.waited >= self.window;
            match next {
                Ok(Ok(Some(bytes))) => {
                    self.bytes += bytes.len() as u64;
                    if over && self.bytes >= self.min_bytes {
                        self.begin();
                    }
                    return Ok(Some(bytes));
                }
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(RegistryError::transport(place.clone(), error)),
                Err(_) if self.quiet >= self.no_progress => {
                    return Err(RegistryError::Stalled {
                        place: place.clone(),
                        source: None,
                    });
                }
                Err(_) if self.bytes >= self.min_bytes => self.begin(),
                Err(_) => {
                    return Err(RegistryError::Slow {
                        place: place.clone(),
                        bytes: self.bytes,
                        waited: self.waited,
                    });
                }
            }
        }
    }
}
