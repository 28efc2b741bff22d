//! Running CNI plugins: the runtime's side of the specification.
//!
//! A plugin is a program that may be missing, hang, babble or lie; it gets a
//! deadline and a bound on its output, and what it said is part of the error.
//! Plugins of Berth's own are called without a program.
//!
//! Source: CNI specification 1.1.0, sections 2 to 4.

use crate::plugin;
use crate::process::{self, ProcessError};
use crate::spec::{CniResult, ConfigError, NetworkList, PluginError, VALID_ATTACHMENTS};
use serde_json::{Map, Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What of a program's gibberish is shown.
const MAX_EXCERPT_BYTES: usize = 1024;

/// Largest configuration file that is read, in bytes: real ones have a few thousand.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Why a network's plugins did not do their work.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The plugin said so.
    #[error("CNI plugin {plugin} failed {command}: {error}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// "ADD".
        command: &'static str,
        /// What it said.
        error: Box<PluginError>,
    },
    /// The plugin is not there.
    #[error("CNI plugin {plugin} is not in {dirs}")]
    Missing {
        /// Its type.
        plugin: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// It did not run, or not to its end.
    #[error("CNI plugin {plugin} failed {command}")]
    Run {
        /// Its type.
        plugin: String,
        /// "ADD".
        command: &'static str,
        /// Why not.
        source: ProcessError,
    },
    /// It did not keep to the specification.
    #[error("CNI plugin {plugin} answered {command} with {what}: {excerpt:?}")]
    Nonsense {
        /// Its type.
        plugin: String,
        /// "ADD".
        command: &'static str,
        /// What it was instead.
        what: String,
        /// The beginning of what it wrote.
        excerpt: String,
    },
}

/// The attachment a command is about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// CNI_CONTAINERID.
    pub container_id: &'a str,
    /// CNI_NETNS; `None` when the namespace is gone.
    pub netns: Option<&'a Path>,
    /// CNI_IFNAME.
    pub ifname: &'a str,
    /// CNI_ARGS.
    pub args: &'a str,
    /// What plugins may ask for by capability.
    pub capabilities: &'a Map<String, Value>,
}

/// Runs plugins.
#[derive(Clone, Debug)]
pub struct Client {
    /// Where they are looked for, first match wins; also CNI_PATH.
    pub bin_dirs: Vec<PathBuf>,
    /// How long each may take.
    pub deadline: Duration,
}

impl Client {
    /// The first plugin of `list` that is not there.
    pub fn missing(&self, list: &NetworkList) -> Option<CniError> {
        let kinds = list
            .plugins
            .iter()
            .map(kind_of)
            .filter(|kind| *kind != plugin::TYPE);
        kinds.map(|kind| self.find(kind)).find_map(Result::err)
    }

    /// Runs ADD through the list, each plugin with its predecessor's result;
    /// the last result, as it was given.
    ///
    /// # Errors
    /// The first failure; what was made before it is for [`Client::del`].
    pub fn add(&self, list: &NetworkList, subject: &Subject<'_>) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in &list.plugins {
            let config = configure(list, plugin, subject.capabilities, result.as_ref());
            let answer = self.call("ADD", plugin, config, Some(subject))?;
            if let Err(error) = serde_json::from_value::<CniResult>(answer.clone()) {
                return Err(CniError::Nonsense {
                    plugin: kind_of(plugin).into(),
                    command: "ADD",
                    what: format!("what is no result ({error})"),
                    excerpt: excerpt(answer.to_string().as_bytes()),
                });
            }
            result = Some(answer);
        }
        Ok(result.unwrap_or_default())
    }

    /// Runs DEL through the list backwards, with ADD's result where there is one.
    ///
    /// # Errors
    /// The first failure; all plugins are run.
    pub fn del(
        &self,
        list: &NetworkList,
        subject: &Subject<'_>,
        result: Option<&Value>,
    ) -> Result<(), CniError> {
        let mut failure = Ok(());
        // Before 0.4.0 DEL knew no result.
        let result = result.filter(|_| list.speaks("0.4.0"));
        for plugin in list.plugins.iter().rev() {
            let config = configure(list, plugin, subject.capabilities, result);
            if let Err(error) = self.call("DEL", plugin, config, Some(subject)) {
                failure = failure.and(Err(error));
            }
        }
        failure
    }

    /// Runs CHECK through the list; lists without it are fine.
    ///
    /// # Errors
    /// The first failure.
    pub fn check(
        &self,
        list: &NetworkList,
        subject: &Subject<'_>,
        result: &Value,
    ) -> Result<(), CniError> {
        if list.disable_check || !list.speaks("0.4.0") {
            return Ok(());
        }
        for plugin in &list.plugins {
            let config = configure(list, plugin, subject.capabilities, Some(result));
            self.call("CHECK", plugin, config, Some(subject))?;
        }
        Ok(())
    }

    /// Asks each plugin whether it could do ADD; lists before 1.1 are taken to.
    ///
    /// # Errors
    /// The first that could not.
    pub fn status(&self, list: &NetworkList) -> Result<(), CniError> {
        if !list.speaks("1.1.0") {
            return Ok(());
        }
        for plugin in &list.plugins {
            self.call(
                "STATUS",
                plugin,
                configure(list, plugin, &Map::new(), None),
                None,
            )?;
        }
        Ok(())
    }

    /// Tells the plugins which attachments, by container and interface, exist;
    /// lists before 1.1 do not want to know.
    ///
    /// # Errors
    /// The first failure; all plugins are run.
    pub fn gc(&self, list: &NetworkList, live: &[(&str, &str)]) -> Result<(), CniError> {
        if list.disable_gc || !list.speaks("1.1.0") {
            return Ok(());
        }
        let live: Vec<Value> = live
            .iter()
            .map(|(id, ifname)| json!({ "containerID": id, "ifname": ifname }))
            .collect();
        let mut failure = Ok(());
        for plugin in &list.plugins {
            let mut config = configure(list, plugin, &Map::new(), None);
            config.insert(VALID_ATTACHMENTS.into(), Value::Array(live.clone()));
            if let Err(error) = self.call("GC", plugin, config, None) {
                failure = failure.and(Err(error));
            }
        }
        failure
    }

    fn find(&self, kind: &str) -> Result<PathBuf, CniError> {
        let candidates = self.bin_dirs.iter().map(|dir| dir.join(kind));
        candidates
            .into_iter()
            .find(|path| path.is_file())
            .ok_or_else(|| CniError::Missing {
                plugin: kind.into(),
                dirs: self
                    .bin_dirs
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    fn call(
        &self,
        command: &'static str,
        plugin: &Map<String, Value>,
        config: Map<String, Value>,
        subject: Option<&Subject<'_>>,
    ) -> Result<Value, CniError> {
        let kind = kind_of(plugin);
        let config = Value::Object(config);
        if kind == plugin::TYPE {
            let call = plugin::Call {
                command,
                container_id: subject.map_or("", |subject| subject.container_id),
                netns: subject.and_then(|subject| subject.netns),
                ifname: subject.map_or("", |subject| subject.ifname),
                config: &config,
            };
            return plugin::run(&call)
                .map(Option::unwrap_or_default)
                .map_err(|error| CniError::Plugin {
                    plugin: kind.into(),
                    command,
                    error: error.into(),
                });
        }
        let mut process = Command::new(self.find(kind)?);
        let path = std::env::join_paths(&self.bin_dirs).unwrap_or_default();
        process
            .current_dir("/")
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", path);
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"] {
            process.env_remove(variable);
        }
        if let Some(subject) = subject {
            process
                .env("CNI_CONTAINERID", subject.container_id)
                .env("CNI_NETNS", subject.netns.unwrap_or(Path::new("")))
                .env("CNI_IFNAME", subject.ifname)
                .env("CNI_ARGS", subject.args);
        }
        let done = process::run(&mut process, config.to_string().as_bytes(), self.deadline)
            .map_err(|source| CniError::Run {
                plugin: kind.into(),
                command,
                source,
            })?;
        let nonsense = |what: String, bytes: &[u8]| CniError::Nonsense {
            plugin: kind.into(),
            command,
            what,
            excerpt: excerpt(bytes),
        };
        if !done.status.success() {
            return Err(match serde_json::from_slice(&done.stdout) {
                Ok(error) => CniError::Plugin {
                    plugin: kind.into(),
                    command,
                    error,
                },
                Err(_) => {
                    let said = [&done.stdout[..], &done.stderr].concat();
                    nonsense(format!("{} and no CNI error", done.status), &said)
                }
            });
        }
        if command != "ADD" {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&done.stdout)
            .map_err(|error| nonsense(format!("what is not JSON ({error})"), &done.stdout))
    }
}

fn kind_of(plugin: &Map<String, Value>) -> &str {
    plugin
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// What a plugin is given. Source: section 3, "Deriving request configuration".
fn configure(
    list: &NetworkList,
    plugin: &Map<String, Value>,
    offered: &Map<String, Value>,
    result: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    config.insert("cniVersion".into(), list.version.clone().into());
    config.insert("name".into(), list.name.clone().into());
    config.remove("prevResult");
    let wanted = config.remove("capabilities");
    if let Some(Value::Object(wanted)) = wanted {
        let runtime: Map<String, Value> = offered
            .iter()
            .filter(|(name, _)| wanted.get(*name) == Some(&Value::Bool(true)))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime.is_empty() {
            config.insert("runtimeConfig".into(), Value::Object(runtime));
        }
    }
    if let Some(result) = result {
        config.insert("prevResult".into(), result.clone());
    }
    config
}

fn excerpt(bytes: &[u8]) -> String {
    let short = &bytes[..bytes.len().min(MAX_EXCERPT_BYTES)];
    String::from_utf8_lossy(short).trim().to_owned()
}

/// What a directory of configurations holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The first that is valid, and its file.
    pub network: Option<(PathBuf, NetworkList)>,
    /// Files before it that are not valid, and why.
    pub problems: Vec<(PathBuf, LoadError)>,
}

/// Why a file gives no network.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It is longer than any real one.
    #[error("is {0} bytes long")]
    TooLong(u64),
    /// It says nothing valid.
    #[error("is not a CNI configuration: {0}")]
    Config(ConfigError),
}

/// The network that the directory `dir` configures: the first valid file, by
/// name, that ends in .conflist, .conf or .json. A directory that is absent
/// configures none. It is read anew each time, so nothing has to be watched.
pub fn load(dir: &Path) -> Loaded {
    let mut loaded = Loaded::default();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return loaded,
        Err(error) => {
            loaded.problems.push((dir.into(), LoadError::Read(error)));
            return loaded;
        }
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conflist" | "conf" | "json")) && !path.is_dir()
        })
        .collect();
    files.sort();
    for path in files {
        match read(&path) {
            Ok(list) => {
                loaded.network = Some((path, list));
                break;
            }
            Err(error) => loaded.problems.push((path, error)),
        }
    }
    loaded
}

fn read(path: &Path) -> Result<NetworkList, LoadError> {
    let length = std::fs::metadata(path).map_err(LoadError::Read)?.len();
    if length > MAX_CONFIG_BYTES {
        return Err(LoadError::TooLong(length));
    }
    let text = std::fs::read_to_string(path).map_err(LoadError::Read)?;
    NetworkList::parse(&text).map_err(LoadError::Config)
}
