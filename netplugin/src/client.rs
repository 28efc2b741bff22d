//! Running CNI plugins: the runtime's side of the specification.
//!
//! A plugin is a program that may be missing, hang, babble or lie; it gets a
//! deadline and a bound on its output, and what it said is part of the error.
//! Plugins of Berth's own are called without a program.
//!
//! Source: CNI specification 1.1.0, sections 2 to 4.

use crate::plugin;
use crate::process::{self, ProcessError};
use crate::result::{self, ResultError};
use crate::spec::{NetworkList, PluginError, VALID_ATTACHMENTS, VERSIONS, code};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What of a program's gibberish is shown.
const MAX_EXCERPT_BYTES: usize = 1024;

/// How long a plugin may take to say what it is (VERSION, STATUS): nothing is done for it.
const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a plugin may take for GC: no pod gets or loses its network meanwhile.
const GC_DEADLINE: Duration = Duration::from_secs(30);

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
    /// The plugin does not speak what the configuration is written in.
    #[error("CNI plugin {plugin} speaks {spoken}, but its configuration is of version {wanted}")]
    Version {
        /// Its type.
        plugin: String,
        /// What it speaks.
        spoken: String,
        /// What it would have to.
        wanted: String,
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

impl CniError {
    /// The plugin's own code, where it gave one.
    pub fn code(&self) -> Option<u32> {
        match self {
            CniError::Plugin { error, .. } => Some(error.code),
            CniError::Missing { .. }
            | CniError::Version { .. }
            | CniError::Run { .. }
            | CniError::Nonsense { .. } => None,
        }
    }
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

/// What a program was when it said which versions it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

/// The versions a program speaks; `None` where it did not say.
type Spoken = Option<Vec<String>>;

/// Runs plugins.
#[derive(Debug)]
pub struct Client {
    /// Where they are looked for, first match wins; also CNI_PATH.
    bin_dirs: Vec<PathBuf>,
    /// How long each may take for ADD, DEL and CHECK.
    deadline: Duration,
    /// One for each program that is or was used.
    versions: Mutex<HashMap<PathBuf, (Identity, Spoken)>>,
}

impl Client {
    /// Of the plugins in `bin_dirs`, first match wins, each of which may take
    /// `deadline` for ADD, DEL and CHECK, and less for the rest.
    pub fn new(bin_dirs: Vec<PathBuf>, deadline: Duration) -> Self {
        Self {
            bin_dirs,
            deadline,
            versions: Mutex::default(),
        }
    }

    /// The first plugin of `list` that is not there.
    pub fn missing(&self, list: &NetworkList) -> Option<CniError> {
        let kinds = list
            .plugins
            .iter()
            .map(kind_of)
            .filter(|kind| *kind != plugin::TYPE);
        kinds.map(|kind| self.find(kind)).find_map(Result::err)
    }

    /// The versions that the plugin says it speaks (VERSION); `None` where it
    /// does not say in the way of the specification. Asked once for each program.
    ///
    /// # Errors
    /// `Missing`.
    pub fn versions(&self, kind: &str) -> Result<Spoken, CniError> {
        if kind == plugin::TYPE {
            return Ok(Some(VERSIONS.map(str::to_owned).into()));
        }
        let program = self.find(kind)?;
        let identity = std::fs::metadata(&program).ok().map(|about| Identity {
            device: about.dev(),
            inode: about.ino(),
            bytes: about.size(),
            changed: (about.ctime(), about.ctime_nsec()),
        });
        let known = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((then, spoken)) = known.get(&program)
            && Some(*then) == identity
        {
            return Ok(spoken.clone());
        }
        drop(known);
        let spoken = self.ask_versions(kind, &program);
        if let Some(identity) = identity {
            let mut known = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(program, (identity, spoken.clone()));
        }
        Ok(spoken)
    }

    fn ask_versions(&self, kind: &str, program: &Path) -> Spoken {
        let mut process = self.process(program, "VERSION");
        // Wanted by plugins made before VERSION had its present form.
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            process.env(variable, "dummy");
        }
        let config = json!({ "cniVersion": VERSIONS[VERSIONS.len() - 1] }).to_string();
        let deadline = self.deadline.min(PROBE_DEADLINE);
        let done = process::run(&mut process, config.as_bytes(), deadline);
        let done = done.inspect_err(|error| {
            let error = error as &dyn std::error::Error;
            tracing::warn!(
                plugin = kind,
                error,
                "the CNI plugin does not say its versions"
            );
        });
        let answer: Value = serde_json::from_slice(&done.ok()?.stdout).ok()?;
        let versions = answer.get("supportedVersions")?.as_array()?;
        let versions = versions.iter().filter_map(Value::as_str).map(str::to_owned);
        Some(versions.collect()).filter(|versions: &Vec<String>| !versions.is_empty())
    }

    /// The list in the best version that it is good for and all its plugins
    /// speak. A plugin that does not say what it speaks is taken at the list's word.
    ///
    /// # Errors
    /// `Missing`; `Version` when there is none.
    pub fn negotiate(&self, mut list: NetworkList) -> Result<NetworkList, CniError> {
        let spoken = list
            .plugins
            .iter()
            .filter_map(|plugin| {
                let kind = kind_of(plugin);
                Some(
                    self.versions(kind)
                        .transpose()?
                        .map(|spoken| (kind, spoken)),
                )
            })
            .collect::<Result<Vec<(&str, Vec<String>)>, _>>()?;
        let lacks = |version: &str| {
            let without = |(_, spoken): &&(&str, Vec<String>)| !spoken.iter().any(|v| v == version);
            spoken.iter().find(without)
        };
        let offered = list.offered.iter().rev().chain([&list.version]);
        let good = offered.into_iter().find(|version| lacks(version).is_none());
        match (good.cloned(), lacks(&list.version)) {
            (Some(version), _) => list.version = version,
            (None, Some((kind, spoken))) => {
                return Err(CniError::Version {
                    plugin: (*kind).into(),
                    spoken: spoken.join(", "),
                    wanted: match list.offered.is_empty() {
                        true => list.version,
                        false => list.offered.join(" or "),
                    },
                });
            }
            (None, None) => {}
        }
        Ok(list)
    }

    /// Runs ADD through the list, each plugin with its predecessor's result;
    /// the last result, in the list's version.
    ///
    /// # Errors
    /// The first failure; what was made before it is for [`Client::del`].
    pub fn add(&self, list: &NetworkList, subject: &Subject<'_>) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in &list.plugins {
            let config = configure(list, plugin, subject.capabilities, result.as_ref());
            let answer = self.call("ADD", plugin, config, Some(subject), self.deadline)?;
            let said = excerpt(answer.to_string().as_bytes());
            let converted = result::convert(answer, &list.version);
            let converted = converted.map_err(|error: ResultError| CniError::Nonsense {
                plugin: kind_of(plugin).into(),
                command: "ADD",
                what: format!("what is no result ({error})"),
                excerpt: said,
            })?;
            result = Some(converted);
        }
        Ok(result.unwrap_or_default())
    }

    /// Runs DEL through the list backwards, with ADD's result where there is
    /// one, each plugin for at most `deadline`. A plugin that does not know the
    /// container has nothing to give back.
    ///
    /// # Errors
    /// The first failure; all plugins are run.
    pub fn del(
        &self,
        list: &NetworkList,
        subject: &Subject<'_>,
        result: Option<&Value>,
        deadline: Duration,
    ) -> Result<(), CniError> {
        let mut failure = Ok(());
        // Before 0.4.0 DEL knew no result.
        let result = result.filter(|_| list.speaks("0.4.0"));
        let deadline = self.deadline.min(deadline);
        for plugin in list.plugins.iter().rev() {
            let config = configure(list, plugin, subject.capabilities, result);
            match self.call("DEL", plugin, config, Some(subject), deadline) {
                Ok(_) => {}
                // Source: section 5, "Error": no cleaning up is needed.
                Err(error) if error.code() == Some(code::UNKNOWN_CONTAINER) => {}
                Err(error) => failure = failure.and(Err(error)),
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
            self.call("CHECK", plugin, config, Some(subject), self.deadline)?;
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
        let deadline = self.deadline.min(PROBE_DEADLINE);
        for plugin in &list.plugins {
            let config = configure(list, plugin, &Map::new(), None);
            self.call("STATUS", plugin, config, None, deadline)?;
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
        let deadline = self.deadline.min(GC_DEADLINE);
        let mut failure = Ok(());
        for plugin in &list.plugins {
            let mut config = configure(list, plugin, &Map::new(), None);
            config.insert(VALID_ATTACHMENTS.into(), Value::Array(live.clone()));
            if let Err(error) = self.call("GC", plugin, config, None, deadline) {
                failure = failure.and(Err(error));
            }
        }
        failure
    }

    fn find(&self, kind: &str) -> Result<PathBuf, CniError> {
        let is_program = |path: &PathBuf| {
            std::fs::metadata(path).is_ok_and(|about| about.is_file() && about.mode() & 0o111 != 0)
        };
        let mut candidates = self.bin_dirs.iter().map(|dir| dir.join(kind));
        candidates.find(is_program).ok_or_else(|| {
            let dirs = self.bin_dirs.iter().map(|dir| dir.display().to_string());
            CniError::Missing {
                plugin: kind.into(),
                dirs: dirs.collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// A program with the command, and nothing else of the daemon's that it could mistake.
    fn process(&self, program: &Path, command: &str) -> Command {
        let mut process = Command::new(program);
        let path = std::env::join_paths(&self.bin_dirs).unwrap_or_default();
        process
            .current_dir("/")
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", path);
        let others = [
            "CNI_CONTAINERID",
            "CNI_NETNS",
            "CNI_IFNAME",
            "CNI_ARGS",
            "CNI_NETNS_OVERRIDE",
        ];
        let systemds = [
            "NOTIFY_SOCKET",
            "LISTEN_PID",
            "LISTEN_FDS",
            "WATCHDOG_PID",
            "WATCHDOG_USEC",
        ];
        for variable in others.into_iter().chain(systemds) {
            process.env_remove(variable);
        }
        process
    }

    fn call(
        &self,
        command: &'static str,
        plugin: &Map<String, Value>,
        config: Map<String, Value>,
        subject: Option<&Subject<'_>>,
        deadline: Duration,
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
        let mut process = self.process(&self.find(kind)?, command);
        if let Some(subject) = subject {
            process
                .env("CNI_CONTAINERID", subject.container_id)
                .env("CNI_NETNS", subject.netns.unwrap_or(Path::new("")))
                .env("CNI_IFNAME", subject.ifname)
                .env("CNI_ARGS", subject.args);
        }
        let done = process::run(&mut process, config.to_string().as_bytes(), deadline).map_err(
            |source| CniError::Run {
                plugin: kind.into(),
                command,
                source,
            },
        )?;
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
