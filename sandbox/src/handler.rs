//! Runtime handlers: who launches the containers of a pod.
//!
//! `""` and `berth` are the launcher in the pod's monitor. Every other one is an
//! OCI runtime with a command line; `runc` and `crun` are there where they are
//! in PATH, further ones by configuration. A pod's handler is fixed when it is
//! made. Its namespaces, network and cgroup are made by Berth either way.
//!
//! Source: CRI `RunPodSandboxRequest.runtime_handler`; OCI runtime-spec,
//! `runtime.md` and `features.md`.

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names of the launcher in the monitor.
pub const BUILT_IN: [&str; 2] = ["", "berth"];

/// Runtimes that are offered where they are installed.
pub const KNOWN: [&str; 2] = ["runc", "crun"];

/// The option that has a runtime make cgroups through systemd.
///
/// Source: runc(8), crun(1); gVisor's runsc and youki have it as well.
pub const SYSTEMD_MODE: &str = "--systemd-cgroup";

/// By this annotation of its features crun is known. Source: crun, `src/features.c`.
const CRUN_VERSION: &str = "run.oci.crun.version";

/// How long a runtime may take to say what it can do, or to delete.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most of what a runtime says that is read. Unit: bytes.
const MOST_BYTES: u64 = 1 << 20;

/// An OCI runtime as it is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OciRuntime {
    /// The program: an absolute path.
    pub path: PathBuf,
    /// Where it keeps what it knows of containers.
    pub root: PathBuf,
    /// Options that come before its commands.
    pub options: Vec<String>,
    /// With the cgroup driver systemd, Berth makes a container's scope and the runtime is given
    /// its path; else the runtime makes the scope, told by [`SYSTEMD_MODE`].
    pub joins_scope: bool,
    /// A privileged container does not get the host's devices.
    pub privileged_without_host_devices: bool,
    /// Annotations of the pod and the container that it is told of: whole keys,
    /// or beginnings that end in "*".
    pub annotations: Vec<String>,
    /// An OCI spec whose fields count where Berth's says nothing.
    pub base_spec: Option<PathBuf>,
    /// What it says it can do.
    pub features: Features,
}

/// What a runtime can do of what CRI asks about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Mounts that are read-only with all below them.
    pub recursive_read_only_mounts: bool,
    /// Containers that join the user namespace of their pod. It need not be able to map the
    /// owners of mounts: Berth does.
    pub user_namespaces: bool,
}

/// A runtime that does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// It cannot be run.
    #[error("cannot run {}", path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It did not end in time, and was killed.
    #[error("{} {command} took longer than {} s", path.display(), PATIENCE.as_secs())]
    Late {
        /// The program.
        path: PathBuf,
        /// The command.
        command: &'static str,
    },
    /// It failed.
    #[error("{} {command}: {said}", path.display())]
    Failed {
        /// The program.
        path: PathBuf,
        /// The command.
        command: &'static str,
        /// What it said, or how it ended.
        said: String,
    },
}

impl OciRuntime {
    /// Asks it for its features; one that does not know the question has none.
    pub fn ask_features(&mut self) {
        let answer = self.run("features", &[]).ok();
        let answer = answer.and_then(|text| serde_json::from_str(&text).ok());
        self.features = answer.map_or(Features::default(), |answer| features(&answer));
    }

    /// Ends a container and has everything forgotten that the runtime knows of
    /// it. One that it does not know counts as deleted.
    ///
    /// Blocks until it has.
    ///
    /// # Errors
    /// It cannot be run, takes too long, or refuses.
    pub fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        match self.run("delete", &["--force", id]) {
            Ok(_) => Ok(()),
            Err(RuntimeError::Failed { said, .. }) if said.contains("does not exist") => Ok(()),
            // Nothing of it was ever made.
            Err(_) if !self.root.join(id).exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Its output.
    fn run(&self, command: &'static str, arguments: &[&str]) -> Result<String, RuntimeError> {
        let failed = |source| RuntimeError::Run {
            path: self.path.clone(),
            source,
        };
        let mut child = Command::new(&self.path)
            .arg("--root")
            .arg(&self.root)
            .args(&self.options)
            .arg(command)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let streams = [child.stdout.take().map(read), child.stderr.take().map(read)];
        let until = Instant::now() + PATIENCE;
        let ended = loop {
            match child.try_wait().map_err(failed)? {
                Some(ended) => break ended,
                None if Instant::now() >= until => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(RuntimeError::Late {
                        path: self.path.clone(),
                        command,
                    });
                }
                // A runtime takes some ten milliseconds; nothing tells of its end without a thread.
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let [out, err] = streams.map(|reader| {
            let text = reader.and_then(|reader| reader.join().ok());
            text.unwrap_or_default()
        });
        if ended.success() {
            return Ok(out);
        }
        let said = match err.trim() {
            "" => ended.to_string(),
            text => text.to_owned(),
        };
        Err(RuntimeError::Failed {
            path: self.path.clone(),
            command,
            said,
        })
    }

    /// Whether the runtime is told of the annotation.
    pub fn is_told(&self, key: &str) -> bool {
        self.annotations
            .iter()
            .any(|told| match told.strip_suffix('*') {
                Some(beginning) => key.starts_with(beginning),
                None => key == told,
            })
    }
}

fn read(pipe: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.take(MOST_BYTES).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Source: OCI runtime-spec, `features.md`, "mountOptions" and `features-linux.md`, "namespaces".
fn features(answer: &Value) -> Features {
    let has = |list: &Value, name: &str| {
        let list = list.as_array();
        list.is_some_and(|list| list.iter().any(|one| one == name))
    };
    Features {
        recursive_read_only_mounts: has(&answer["mountOptions"], "rro"),
        // crun 1.21 leaves no pid file behind for such a container, and says nothing.
        user_namespaces: has(&answer["linux"]["namespaces"], "user")
            && answer["annotations"][CRUN_VERSION].is_null(),
    }
}

/// The handlers of a node by name, the built-in one apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handlers(BTreeMap<String, OciRuntime>);

impl Handlers {
    /// The configured ones, and those [`KNOWN`] that are in `path` and not
    /// configured. `state` is where runtimes keep their state that have no place
    /// of their own.
    pub fn new(configured: BTreeMap<String, OciRuntime>, path: &[PathBuf], state: &Path) -> Self {
        let mut all = configured;
        for name in KNOWN {
            let mut places = path.iter().map(|dir| dir.join(name));
            if !all.contains_key(name)
                && let Some(path) = places.find(|place| place.is_file())
            {
                let runtime = OciRuntime {
                    path,
                    ..OciRuntime::default()
                };
                all.insert(name.to_owned(), runtime);
            }
        }
        for (name, runtime) in &mut all {
            if runtime.root.as_os_str().is_empty() {
                runtime.root = state.join(name);
            }
            runtime.ask_features();
        }
        Handlers(all)
    }

    /// The OCI runtime of that name; `None` for the built-in handler and for one
    /// that is not there (any more).
    pub fn oci(&self, name: &str) -> Option<&OciRuntime> {
        self.0.get(name)
    }

    /// Whether pods may name it.
    pub fn has(&self, name: &str) -> bool {
        BUILT_IN.contains(&name) || self.0.contains_key(name)
    }

    /// The OCI runtimes by name.
    pub fn oci_runtimes(&self) -> impl Iterator<Item = (&str, &OciRuntime)> {
        self.0
            .iter()
            .map(|(name, runtime)| (name.as_str(), runtime))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn runtimes_in_path_are_offered_and_asked() {
        let dir = tempfile::tempdir().unwrap();
        script(
            dir.path(),
            "crun",
            r#"[ "$3" = features ] && echo '{"mountOptions":["ro","rro"],"linux":{"namespaces":["user"]}}'"#,
        );
        let path = [PathBuf::from("/nowhere"), dir.path().to_owned()];
        let handlers = Handlers::new(BTreeMap::new(), &path, Path::new("/state"));
        assert!(handlers.has("") && handlers.has("berth") && handlers.has("crun"));
        assert!(!handlers.has("runc") && handlers.oci("berth").is_none());
        let crun = handlers.oci("crun").unwrap();
        assert!(crun.features.recursive_read_only_mounts && crun.features.user_namespaces);
        assert_eq!(crun.root, Path::new("/state/crun"));
    }

    #[test]
    fn what_a_runtime_says_is_told_and_one_unknown_container_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = |text: &str| OciRuntime {
            path: script(dir.path(), "runtime", text),
            root: dir.path().join("root"),
            ..OciRuntime::default()
        };
        std::fs::create_dir_all(dir.path().join("root/a")).unwrap();
        let error = runtime("echo no way >&2; exit 1").delete("a").unwrap_err();
        assert!(error.to_string().ends_with("delete: no way"), "{error}");
        runtime("echo container does not exist >&2; exit 1")
            .delete("a")
            .unwrap();
        runtime("exit 1").delete("b").unwrap();
        let missing = OciRuntime {
            path: "/no/such/runtime".into(),
            root: dir.path().join("root"),
            ..OciRuntime::default()
        };
        assert!(matches!(missing.delete("a"), Err(RuntimeError::Run { .. })));
    }

    #[test]
    fn user_namespaces_are_for_those_that_list_them_and_are_not_crun() {
        let mut answer = serde_json::json!({"linux": {"namespaces": ["pid", "user"]}});
        assert!(features(&answer).user_namespaces);
        answer["annotations"][CRUN_VERSION] = "1.21".into();
        assert!(!features(&answer).user_namespaces);
        assert!(!features(&serde_json::json!({})).user_namespaces);
    }

    #[test]
    fn annotations_are_told_by_key_or_beginning() {
        let runtime = OciRuntime {
            annotations: vec!["io.kata.*".into(), "exact".into()],
            ..OciRuntime::default()
        };
        assert!(runtime.is_told("io.kata.hypervisor") && runtime.is_told("exact"));
        assert!(!runtime.is_told("exactly") && !runtime.is_told("io.other"));
    }
}
