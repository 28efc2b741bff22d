//! Where the parts of one instance are.
//!
//! | | without --root | with --root DIR |
//! |---|---|---|
//! | configuration | /etc/berth | DIR/etc |
//! | CNI configurations | /etc/cni/net.d | DIR/etc/cni/net.d |
//! | images, records | /var/lib/berth | DIR/lib |
//! | sockets, namespaces | /run/berth | DIR/run |

use super::{Config, ConfigError};
use std::io;
use std::path::{Path, PathBuf, absolute};

/// What the command line says about places.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub root: Option<PathBuf>,
    pub config: Option<PathBuf>,
    pub socket: Option<PathBuf>,
}

/// Where the configuration is, before it has been read.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    root: Option<PathBuf>,
    /// Directory of config.toml, conf.d and certs.d.
    pub etc: PathBuf,
    /// `--config`: this file alone instead of `config.toml` and `conf.d`.
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

/// Where everything is: the layout and the configuration together.
#[derive(Clone, Debug, PartialEq)]
pub struct Places {
    /// Durable state.
    pub lib: PathBuf,
    /// Images.
    pub images: PathBuf,
    /// Containers' writable layers.
    pub containers: PathBuf,
    /// What lives until the reboot.
    pub run: PathBuf,
    pub socket: PathBuf,
    pub certs_d: Vec<PathBuf>,
    pub registries_conf: PathBuf,
    pub auth_file: PathBuf,
    pub policy: PathBuf,
    pub cni_conf_dir: PathBuf,
}

impl Layout {
    /// What the command line makes of it. Relative paths count from the working directory.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn find(overrides: &Overrides) -> Result<Layout, ConfigError> {
        let full = |path: &Option<PathBuf>| {
            path.as_ref()
                .map(|path| {
                    absolute(path).map_err(|source| ConfigError::Read {
                        path: path.clone(),
                        source,
                    })
                })
                .transpose()
        };
        let root = full(&overrides.root)?;
        let etc = root
            .as_ref()
            .map_or_else(|| PathBuf::from("/etc/berth"), |root| root.join("etc"));
        Ok(Layout {
            root,
            etc,
            file: full(&overrides.config)?,
            socket: full(&overrides.socket)?,
        })
    }

    /// The files to read, in order.
    pub fn config_files(&self) -> Result<Vec<PathBuf>, ConfigError> {
        if let Some(file) = &self.file {
            return Ok(vec![file.clone()]);
        }
        let mut files = Vec::new();
        let main = self.etc.join("config.toml");
        if exists(&main)? {
            files.push(main);
        }
        let dir = self.etc.join("conf.d");
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
            Err(source) => return Err(ConfigError::Read { path: dir, source }),
        };
        let mut more = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| ConfigError::Read {
                path: dir.clone(),
                source,
            })?;
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "toml")
            {
                more.push(entry.path());
            }
        }
        more.sort();
        files.extend(more);
        Ok(files)
    }

    /// Where everything is according to `config`.
    pub fn places(&self, config: &Config) -> Places {
        let chosen = |path: &Path, below_root: &str, otherwise: &str| {
            if !path.as_os_str().is_empty() {
                return path.to_owned();
            }
            self.root
                .as_ref()
                .map_or_else(|| otherwise.into(), |root| root.join(below_root))
        };
        let beside = |path: &Path, name: &str| {
            if path.as_os_str().is_empty() {
                self.etc.join(name)
            } else {
                path.to_owned()
            }
        };
        let run = chosen(&config.paths.run, "run", "/run/berth");
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None if config.grpc.socket.as_os_str().is_empty() => run.join("berth.sock"),
            None => config.grpc.socket.clone(),
        };
        let certs_d = if config.images.certs_d.is_empty() {
            vec![self.etc.join("certs.d")]
        } else {
            config.images.certs_d.clone()
        };
        let lib = chosen(&config.paths.state, "lib", "/var/lib/berth");
        let apart = |path: &Path, name: &str| match path.as_os_str().is_empty() {
            true => lib.join(name),
            false => path.to_owned(),
        };
        Places {
            images: apart(&config.paths.images, "images"),
            containers: apart(&config.paths.containers, "containers"),
            lib,
            run,
            socket,
            certs_d,
            registries_conf: beside(&config.images.registries_conf, "registries.conf"),
            auth_file: beside(&config.images.auth_file, "auth.json"),
            policy: beside(&config.images.policy, "policy.json"),
            cni_conf_dir: chosen(
                &config.network.cni_conf_dir,
                "etc/cni/net.d",
                "/etc/cni/net.d",
            ),
        }
    }
}

fn exists(path: &Path) -> Result<bool, ConfigError> {
    path.try_exists().map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_of_an_instance_is_below_its_root() {
        let overrides = Overrides {
            root: Some("/srv/a".into()),
            ..Overrides::default()
        };
        let places = Layout::find(&overrides).unwrap().places(&Config::default());
        assert_eq!(places.lib, Path::new("/srv/a/lib"));
        assert_eq!(places.socket, Path::new("/srv/a/run/berth.sock"));
        assert_eq!(places.certs_d, [Path::new("/srv/a/etc/certs.d")]);
        assert_eq!(places.cni_conf_dir, Path::new("/srv/a/etc/cni/net.d"));
    }

    #[test]
    fn without_a_root_it_is_the_usual_places() {
        let places = Layout::find(&Overrides::default())
            .unwrap()
            .places(&Config::default());
        assert_eq!(places.lib, Path::new("/var/lib/berth"));
        assert_eq!(places.run, Path::new("/run/berth"));
        assert_eq!(places.cni_conf_dir, Path::new("/etc/cni/net.d"));
    }

    #[test]
    fn flags_win_over_keys_and_keys_over_the_root() {
        let overrides = Overrides {
            root: Some("/srv/a".into()),
            socket: Some("/tmp/b.sock".into()),
            ..Overrides::default()
        };
        let mut config = Config::default();
        config.grpc.socket = "/tmp/c.sock".into();
        config.paths.state = "/data".into();
        let places = Layout::find(&overrides).unwrap().places(&config);
        assert_eq!(places.socket, Path::new("/tmp/b.sock"));
        assert_eq!(places.lib, Path::new("/data"));
    }
}
