//! Where to ask for one reference, in which order, and which file says so.
//!
//! ```text
//! registries.conf     host/repository ──> mirrors, location     (host', repository')
//!                                             │
//! certs.d             each of their hosts ──> mirrors, server   + CA, headers, proxy, ...
//! ```
//! Both formats may be used together: registries.conf says where a name is served, certs.d how
//! its hosts are reached, and that may again be through mirrors. `_default` of certs.d counts
//! for the registry a reference names, not for the mirrors that registries.conf names.
//! All files are read anew for every pull.

use crate::auth_file::{AuthFile, AuthFileError};
use crate::hosts::{self, Fallback, Host, HostsError};
use crate::proxy::ProxyEnvironment;
use crate::reference::{Reference, is_repository};
use crate::registries_conf::{Location, PullFrom, RegistriesConf, ShortNameError};
use std::path::PathBuf;

/// Most places to ask for one reference: each may cost a connect timeout.
const MAX_SOURCES: usize = 64;

/// Which files say how registries are reached.
#[derive(Clone, Debug, Default)]
pub struct RegistryFiles {
    /// Directories in the format of [`crate::hosts`], searched in order.
    pub certs_d: Vec<PathBuf>,
    /// A file in the format of [`crate::registries_conf`], with drop-ins beside it; need not be
    /// there.
    pub registries_conf: Option<PathBuf>,
    /// The node's own credentials, in the format of Docker's config.json; need not be there.
    pub auth_file: Option<PathBuf>,
    /// Where hosts.toml says nothing of it.
    pub fallback: Fallback,
    /// The daemon's environment.
    pub proxies: ProxyEnvironment,
}

/// Why there is nobody to ask.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    /// A file cannot be used.
    #[error("the configuration of {registry} cannot be used")]
    Hosts {
        /// The registry.
        registry: String,
        /// Which file and key.
        source: HostsError,
    },
    /// The node's credentials.
    #[error("the node's own credentials cannot be used")]
    Auth(#[from] AuthFileError),
    /// The name is none, or ambiguous.
    #[error("cannot tell which image is meant")]
    Name(#[from] ShortNameError),
    /// Pulling from there is forbidden.
    #[error("{prefix} is blocked by {}", said_by.display())]
    Blocked {
        /// The registry's prefix.
        prefix: String,
        /// Which file says so.
        said_by: PathBuf,
    },
}

/// One place to ask.
#[derive(Clone, Debug)]
pub struct Source {
    /// How it is reached.
    pub host: Host,
    /// What the image's repository is called there.
    pub repository: String,
    /// The registries.conf that sent us there.
    pub redirected_by: Option<PathBuf>,
}

/// The files as they are now.
pub(crate) struct Read {
    pub conf: RegistriesConf,
    pub auth: AuthFile,
}

impl RegistryFiles {
    /// Reads what holds for all registries. Blocking.
    ///
    /// # Errors
    /// [`SourcesError`].
    pub(crate) fn read(&self) -> Result<Read, SourcesError> {
        let conf = match &self.registries_conf {
            None => RegistriesConf::default(),
            Some(path) => RegistriesConf::load(path).map_err(|source| SourcesError::Hosts {
                registry: "all registries".into(),
                source,
            })?,
        };
        let auth = AuthFile::load(self.auth_file.as_deref(), &conf.credential_helpers)?;
        Ok(Read { conf, auth })
    }

    /// The places to ask for `reference`, in order; never empty. Blocking.
    ///
    /// # Errors
    /// [`SourcesError`].
    pub fn sources(
        &self,
        conf: &RegistriesConf,
        reference: &Reference,
    ) -> Result<Vec<Source>, SourcesError> {
        let failed = |source| SourcesError::Hosts {
            registry: reference.host().into(),
            source,
        };
        let Some((registry, matched)) = conf.registry(reference) else {
            let hosts =
                hosts::hosts(&self.certs_d, reference.host(), self.fallback).map_err(failed)?;
            return Ok(named_as(hosts, reference.repository(), None));
        };
        if registry.blocked {
            return Err(SourcesError::Blocked {
                prefix: registry.prefix.clone(),
                said_by: registry.said_by.clone(),
            });
        }
        let name = reference.name();
        // A prefix may reach into the tag; then nothing of the name is left.
        let rest = name.get(matched..).unwrap_or_default();
        let by = Some(registry.said_by.clone());
        let mut found = Vec::new();
        for mirror in &registry.mirrors {
            let wanted = match mirror.pull_from {
                PullFrom::All => true,
                PullFrom::DigestOnly => reference.digest().is_some(),
                PullFrom::TagOnly => reference.digest().is_none(),
            };
            if !wanted {
                continue;
            }
            let repository = checked(&mirror.location, rest, registry)?;
            let hosts = self.hosts_at(&mirror.location, false).map_err(failed)?;
            let mut hosts = named_as(hosts, &repository, by.clone());
            for source in &mut hosts {
                source.host.mirror_of = Some(reference.host().into());
                // The tag's own registry may have moved on; that is for the operator to weigh.
            }
            found.extend(hosts);
        }
        let fall_back = self.fallback == Fallback::Origin || registry.mirrors.is_empty();
        if fall_back || found.is_empty() {
            let (location, repository) = match &registry.location {
                Some(location) => (location.clone(), checked(location, rest, registry)?),
                None => {
                    let location = Location {
                        host: reference.host().into(),
                        path: String::new(),
                        insecure: registry.insecure,
                    };
                    (location, reference.repository().to_owned())
                }
            };
            let hosts = self.hosts_at(&location, true).map_err(failed)?;
            found.extend(named_as(hosts, &repository, by));
        }
        found.truncate(MAX_SOURCES);
        Ok(found)
    }

    fn hosts_at(&self, location: &Location, or_default: bool) -> Result<Vec<Host>, HostsError> {
        let registry = &location.host;
        let said = hosts::configured(&self.certs_d, registry, self.fallback, or_default)?;
        if !location.insecure {
            return Ok(said.unwrap_or_else(|| vec![hosts::plain(registry, false)]));
        }
        if let Some(mut hosts) = said {
            for host in &mut hosts {
                host.tls.skip_verify = true;
            }
            return Ok(hosts);
        }
        let with_scheme = |scheme: &str| {
            let mut host = hosts::plain(registry, true);
            host.tls.skip_verify = true;
            // Between http and https this cannot fail.
            let _ = host.url.set_scheme(scheme);
            host
        };
        let first = hosts::plain(registry, false);
        let schemes = if first.url.scheme() == "http" {
            ["http", "https"]
        } else {
            ["https", "http"]
        };
        Ok(schemes.map(with_scheme).into())
    }
}

fn named_as(hosts: Vec<Host>, repository: &str, by: Option<PathBuf>) -> Vec<Source> {
    let source = |host| Source {
        host,
        repository: repository.into(),
        redirected_by: by.clone(),
    };
    hosts.into_iter().map(source).collect()
}

/// The repository behind a prefix that stands for something else; it must still be one.
fn checked(
    location: &Location,
    rest: &str,
    registry: &crate::registries_conf::Registry,
) -> Result<String, SourcesError> {
    let repository = location.repository(rest);
    if is_repository(&repository) {
        return Ok(repository);
    }
    Err(SourcesError::Hosts {
        registry: registry.prefix.clone(),
        source: HostsError::Invalid {
            path: registry.said_by.clone(),
            why: format!(
                "prefix {:?} leaves no repository: {repository:?}",
                registry.prefix
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn sources(files: &RegistryFiles, conf: &str, name: &str) -> Vec<String> {
        let mut parsed = RegistriesConf::default();
        parsed.apply(Path::new("/c/r.conf"), conf).unwrap();
        let reference: Reference = name.parse().unwrap();
        let found = files.sources(&parsed, &reference).unwrap();
        found
            .iter()
            .map(|source| format!("{} {}", source.host.url, source.repository))
            .collect()
    }

    #[test]
    fn names_are_rewritten_and_hosts_looked_up_in_certs_d() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let mut files = RegistryFiles {
            certs_d: vec![dir.path().into()],
            ..RegistryFiles::default()
        };
        let conf = "[[registry]]\nprefix = \"a.b/team\"\nlocation = \"in.side:5000/deep\"\n\
                    [[registry.mirror]]\nlocation = \"m.n/x\"\n\
                    [[registry.mirror]]\nlocation = \"o.p\"\npull-from-mirror = \"digest-only\"\n";
        assert_eq!(
            sources(&files, conf, "a.b/team/app"),
            ["https://m.n/v2 x/app", "https://in.side:5000/v2 deep/app"]
        );
        let digest = format!("a.b/team/app@sha256:{}", "0".repeat(64));
        assert_eq!(
            sources(&files, conf, &digest),
            [
                "https://m.n/v2 x/app",
                "https://o.p/v2 app",
                "https://in.side:5000/v2 deep/app"
            ]
        );
        assert_eq!(sources(&files, conf, "a.b/other"), ["https://a.b/v2 other"]);
        write("m.n", "server = \"http://m.n:81\"");
        write("_default", "[host.\"https://d\"]");
        assert_eq!(
            sources(&files, conf, "a.b/team/app"),
            [
                "http://m.n:81/v2 x/app",
                "https://d/v2 deep/app",
                "https://in.side:5000/v2 deep/app"
            ]
        );
        files.fallback = Fallback::Never;
        assert_eq!(
            sources(&files, conf, "a.b/team/app"),
            ["http://m.n:81/v2 x/app"]
        );
        assert_eq!(sources(&files, "", "a.b/c"), ["https://d/v2 c"]);
    }

    #[test]
    fn what_is_blocked_is_refused_and_what_is_insecure_tried_both_ways() {
        let files = RegistryFiles::default();
        let mut conf = RegistriesConf::default();
        let text = "[[registry]]\nprefix = \"a.b\"\nblocked = true\n\
                    [[registry]]\nprefix = \"a.b/ok\"\ninsecure = true\n\
                    [[registry]]\nprefix = \"*.w.x\"\n[[registry.mirror]]\nlocation = \"m.n\"\n\
                    [[registry]]\nprefix = \"p.q/r\"\nlocation = \"s.t\"\n";
        conf.apply(Path::new("/c/r.conf"), text).unwrap();
        let error = files.sources(&conf, &"a.b/c".parse().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "a.b is blocked by /c/r.conf");
        assert_eq!(
            sources(&files, text, "a.b/ok/x"),
            ["https://a.b/v2 ok/x", "http://a.b/v2 ok/x"]
        );
        assert_eq!(
            sources(&files, text, "y.w.x/team/app"),
            ["https://m.n/v2 team/app", "https://y.w.x/v2 team/app"]
        );
        let error = files.sources(&conf, &"p.q/r:1".parse().unwrap());
        assert!(matches!(error, Err(SourcesError::Hosts { .. })));
    }
}
