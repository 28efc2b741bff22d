//! The node's own credentials: a file in the format of Docker's `config.json`, and credential
//! helpers, programs that know the secrets.
//!
//! ```json
//! {"auths": {"registry.example/team": {"auth": "BASE64 of username:password"},
//!            "other.example": {"identitytoken": "..."}},
//!  "credHelpers": {"third.example": "ecr-login"}, "credsStore": "pass"}
//! ```
//! For `registry.example/team/app`: `credHelpers` of the host; else the entry of `auths` with
//! the longest name, of the repository, of what is above it, of the host, where `*` stands for
//! any part of a host's label; else `credsStore`; else the helpers of `registries.conf`. Read
//! anew at every pull. The file is not strict: Docker's own has many more keys.
//!
//! A helper is `docker-credential-NAME`, looked for in PATH; it gets the address on standard
//! input and has ten seconds and 64 KiB to answer. What it writes to standard error is not shown:
//! it may be secret.
//! Source: `docker/docker-credential-helpers`, "Usage"; containers-auth.json(5); Kubernetes,
//! "Pull an Image from a Private Registry", for `*`.

use crate::credentials::{BadCredentials, Credentials, Secret, canonical};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Largest file, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// How long a helper may take: those of clouds ask a service of theirs.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most a helper may say, in bytes: tokens have some 10 KiB.
const MAX_HELPER_BYTES: usize = 64 << 10;
/// The user name of secrets that are identity tokens. Source: docker-credential-helpers.
const TOKEN_USER: &str = "<token>";
/// Docker Hub's name in files and to helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Why the node's own credentials cannot be had. No message has any of a secret.
#[derive(Debug, thiserror::Error)]
pub enum AuthFileError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what the format says.
    #[error("{path} is not a Docker configuration: {why}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line and column.
        why: String,
    },
    /// An entry is malformed.
    #[error("{path}: the entry {entry:?} cannot be used")]
    Entry {
        /// The file.
        path: PathBuf,
        /// The key in `auths`.
        entry: String,
        /// What is wrong with it.
        source: BadCredentials,
    },
    /// A name that would be a path.
    #[error("{name:?} is not the name of a credential helper")]
    HelperName {
        /// As the file has it.
        name: String,
    },
    /// The helper cannot be run.
    #[error("cannot run docker-credential-{name}")]
    Helper {
        /// The helper.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not answer as it should.
    #[error("docker-credential-{name} {why}")]
    HelperAnswer {
        /// The helper.
        name: String,
        /// What it did.
        why: String,
    },
}

#[derive(Default, Deserialize)]
struct RawFile {
    #[serde(default)]
    auths: BTreeMap<String, RawEntry>,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default, rename = "credsStore")]
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// The file as it is now. Without one it knows nobody.
#[derive(Default)]
pub struct AuthFile {
    path: PathBuf,
    raw: RawFile,
    helpers: Vec<String>,
}

/// Where a secret comes from; for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// The pull's own AuthConfig.
    Pull,
    /// An entry of the node's file.
    File {
        /// The file.
        path: PathBuf,
        /// The key in `auths`.
        entry: String,
    },
    /// A program.
    Helper {
        /// Without `docker-credential-`.
        name: String,
    },
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretSource::Pull => f.write_str("the pull's own"),
            SecretSource::File { path, entry } => write!(f, "{}, {entry}", path.display()),
            SecretSource::Helper { name } => write!(f, "docker-credential-{name}"),
        }
    }
}

/// What the file says of one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The secret itself.
    Secret(Secret, SecretSource),
    /// These know, one after the other.
    Ask {
        helpers: Vec<String>,
        /// The file names this host, not only a program for all of them.
        for_this_host: bool,
    },
    /// Nothing.
    Nothing,
}

impl AuthFile {
    /// Reads `path`, a file that need not be there. `helpers` are asked after it. Blocking.
    ///
    /// # Errors
    /// [`AuthFileError`].
    pub fn load(path: Option<&Path>, helpers: &[String]) -> Result<AuthFile, AuthFileError> {
        let mut file = AuthFile {
            helpers: helpers
                .iter()
                // Stands for the file itself.
                .filter(|name| *name != "containers-auth.json")
                .cloned()
                .collect(),
            ..AuthFile::default()
        };
        let Some(path) = path else { return Ok(file) };
        file.path = path.into();
        let read = || {
            let length = std::fs::metadata(path)?.len();
            if length > MAX_FILE_BYTES {
                return Err(io::Error::other(format!("{length} bytes long")));
            }
            std::fs::read(path)
        };
        let bytes = match read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(file),
            Err(source) => {
                return Err(AuthFileError::Read {
                    path: path.into(),
                    source,
                });
            }
        };
        file.raw = parse(path, &bytes)?;
        Ok(file)
    }

    /// What is known for `repository` of `host`.
    ///
    /// # Errors
    /// [`AuthFileError::Entry`].
    pub(crate) fn find(&self, host: &str, repository: &str) -> Result<Found, AuthFileError> {
        let helper = self
            .raw
            .cred_helpers
            .iter()
            .filter(|(key, _)| rank(key, host, "").is_some())
            .max_by_key(|(key, _)| rank(key, host, ""));
        if let Some((_, name)) = helper {
            return Ok(Found::Ask {
                helpers: vec![name.clone()],
                for_this_host: true,
            });
        }
        let entries = self.raw.auths.iter();
        let best = entries
            // Where a store has the secret, the entry is empty.
            .filter(|(_, entry)| !entry.credentials().are_empty())
            .filter_map(|(key, entry)| Some((rank(key, host, repository)?, key, entry)))
            .max_by_key(|(rank, ..)| *rank);
        if let Some((_, key, entry)) = best {
            let secret = entry
                .credentials()
                .secret()
                .map_err(|source| AuthFileError::Entry {
                    path: self.path.clone(),
                    entry: shown(key),
                    source,
                })?;
            if let Some(secret) = secret {
                let source = SecretSource::File {
                    path: self.path.clone(),
                    entry: shown(key),
                };
                return Ok(Found::Secret(secret, source));
            }
        }
        let store = Some(self.raw.creds_store.clone()).filter(|name| !name.is_empty());
        let asked: Vec<String> = store.into_iter().chain(self.helpers.clone()).collect();
        if asked.is_empty() {
            return Ok(Found::Nothing);
        }
        Ok(Found::Ask {
            helpers: asked,
            for_this_host: false,
        })
    }
}

impl RawEntry {
    fn credentials(&self) -> Credentials {
        Credentials {
            username: self.username.clone(),
            password: self.password.clone(),
            auth: self.auth.clone(),
            server_address: String::new(),
            identity_token: self.identitytoken.clone(),
            registry_token: self.registrytoken.clone(),
        }
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<RawFile, AuthFileError> {
    serde_json::from_slice(bytes).map_err(|error| AuthFileError::Invalid {
        path: path.into(),
        // serde_json's own words may quote what it found.
        why: format!(
            "line {}, column {}: not the JSON it should be",
            error.line(),
            error.column()
        ),
    })
}

/// Reads a file's text and looks a name up in it, for fuzzing.
pub fn exercise(text: &[u8]) {
    if let Ok(raw) = parse(Path::new("config.json"), text) {
        let file = AuthFile {
            raw,
            ..AuthFile::default()
        };
        let _ = file.find("registry.example:5000", "team/app");
    }
}

/// A key as a message may show it: without what stands before an "@".
fn shown(key: &str) -> String {
    let key = key.rsplit('@').next().unwrap_or_default();
    key.chars().take(200).collect()
}

/// How well a key of the file fits, the more the better; `None` when it does not.
fn rank(key: &str, host: &str, repository: &str) -> Option<usize> {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    let (key_host, path) = key.split_once('/').unwrap_or((key, ""));
    let path = path.trim_end_matches('/');
    // Docker's own keys have the API's version behind the host.
    let path = if matches!(path, "v1" | "v2") {
        ""
    } else {
        path
    };
    let (key_host, host) = (canonical(key_host), canonical(host));
    let exact = key_host == host;
    let fits = exact || (key_host.contains('*') && globs(&key_host, &host));
    if !fits {
        return None;
    }
    let below = path.is_empty()
        || repository
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    // The longer path first, then an exact host before a pattern.
    below.then_some(2 * path.len() + usize::from(exact))
}

/// `*.example` for hosts of as many labels; `*` stands within one label only.
fn globs(pattern: &str, host: &str) -> bool {
    let split = |text: &str| -> (Vec<String>, Option<String>) {
        match text.rsplit_once(':') {
            Some((name, port)) => (
                name.split('.').map(str::to_owned).collect(),
                Some(port.to_owned()),
            ),
            None => (text.split('.').map(str::to_owned).collect(), None),
        }
    };
    let ((pattern, pattern_port), (host, port)) = (split(pattern), split(host));
    pattern.len() == host.len()
        && (pattern_port.is_none() || pattern_port == port)
        && pattern
            .iter()
            .zip(&host)
            .all(|(pattern, label)| crate::pinned::globs(pattern, label))
}

/// Runs credential helpers.
#[derive(Clone, Debug)]
pub(crate) struct Helpers {
    /// Where they are looked for.
    dirs: Vec<PathBuf>,
    timeout: Duration,
}

impl Helpers {
    /// Those in this process's PATH.
    pub fn in_path() -> Helpers {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Helpers {
            dirs: std::env::split_paths(&path).collect(),
            timeout: HELPER_TIMEOUT,
        }
    }

    /// Asks `names`, one after the other, for the credentials of `host`; `None` when none has
    /// any.
    ///
    /// # Errors
    /// [`AuthFileError`] of a helper that fails otherwise than by not knowing.
    pub async fn ask(
        &self,
        names: &[String],
        host: &str,
    ) -> Result<Option<(Secret, SecretSource)>, AuthFileError> {
        for name in names {
            if let Some(secret) = ask_helper(self, name, host).await? {
                return Ok(Some((secret, SecretSource::Helper { name: name.clone() })));
            }
        }
        Ok(None)
    }

    fn program(&self, name: &str) -> io::Result<PathBuf> {
        let file = format!("docker-credential-{name}");
        let mut found = self.dirs.iter().map(|dir| dir.join(&file));
        found
            .find(|program| program.is_file())
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is not in PATH"))
    }
}

async fn ask_helper(
    helpers: &Helpers,
    name: &str,
    host: &str,
) -> Result<Option<Secret>, AuthFileError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(plain) {
        return Err(AuthFileError::HelperName { name: shown(name) });
    }
    let failed = |source| AuthFileError::Helper {
        name: name.into(),
        source,
    };
    let odd = |why: &str| AuthFileError::HelperAnswer {
        name: name.into(),
        why: why.into(),
    };
    let address = if canonical(host) == "docker.io" {
        DOCKER_HUB
    } else {
        host
    };
    let mut child = Command::new(helpers.program(name).map_err(failed)?)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // What it starts itself must not outlive it either.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let group = child.id().and_then(|pid| {
        let pid = i32::try_from(pid).ok()?;
        rustix::process::Pid::from_raw(pid)
    });
    let (mut stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let conversation = async {
        if let Some(stdin) = &mut stdin {
            // One that does not read it may still answer.
            let _ = stdin.write_all(format!("{address}\n").as_bytes()).await;
        }
        drop(stdin);
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            let mut stdout = stdout.take(MAX_HELPER_BYTES as u64 + 1);
            stdout.read_to_end(&mut answer).await?;
        }
        if answer.len() > MAX_HELPER_BYTES {
            return Ok((answer, None));
        }
        Ok((answer, Some(child.wait().await?)))
    };
    let outcome = tokio::time::timeout(helpers.timeout, conversation).await;
    let clean_end = matches!(&outcome, Ok(Ok((_, Some(_)))));
    if let (false, Some(group)) = (clean_end, group) {
        // Not reaped yet, so the number is still its own.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let (answer, status) = outcome
        .map_err(|_| odd("did not answer in time"))?
        .map_err(failed)?;
    let Some(status) = status else {
        return Err(odd("said more than 64 KiB"));
    };
    if !status.success() {
        // Source: docker-credential-helpers, `credentials/error.go`.
        let text = String::from_utf8_lossy(&answer);
        if text.contains("credentials not found in native keychain") {
            return Ok(None);
        }
        return Err(odd(&format!("failed with {status}")));
    }
    parse_answer(&answer).ok_or_else(|| odd("did not answer with a user name and a secret"))
}

/// The secret in a helper's answer; the inner `None` is an empty one, which stands for nobody.
fn parse_answer(answer: &[u8]) -> Option<Option<Secret>> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "Username")]
        username: String,
        #[serde(rename = "Secret")]
        secret: String,
    }
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    if answer.secret.is_empty() {
        return Some(None);
    }
    Some(Some(if answer.username == TOKEN_USER {
        Secret::Identity(answer.secret)
    } else {
        Secret::Basic {
            username: answer.username,
            password: answer.secret,
        }
    }))
}

#[cfg(test)]
mod tests;
