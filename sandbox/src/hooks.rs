//! OCI hooks of a container: where they come from and when they are run.
//!
//! ```text
//! CDI devices ──> spec.hooks ──┬─ prestart, createRuntime, createContainer, startContainer ──> the monitor's
//!                              └─ poststart, poststop ─────────────────────────────────────> the daemon's
//! ```
//!
//! The monitor's children run what has to be run between two steps of a start, and
//! a start goes to its end whatever becomes of the daemon. The daemon has the rest
//! run (by `berth-monitor --hooks`): nothing waits for them in the launcher, and
//! poststop is due also where the monitor is gone.
//!
//! Source: OCI runtime-spec, config.md "POSIX-platform Hooks", runtime.md "State"
//! and "Lifecycle".

use crate::cdi::Edits;
use berth_proto::monitor_v1 as proto;
use oci_spec::runtime::{self as oci, Spec};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a hook without a timeout may take: as long as the kubelet gives a start.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Most hooks of one container.
const MOST: usize = 256;

/// Why hooks cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It is not looked up anywhere.
    #[error("the {kind} hook {} is no absolute path", path.display())]
    NotAbsolute {
        /// "createContainer".
        kind: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// The monitor's messages are text here, and execve takes no NUL.
    #[error("the {kind} hook {path:?} is not UTF-8, or holds a NUL")]
    NotText {
        /// "createContainer".
        kind: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// A hook that may take no time.
    #[error("the {kind} hook {} has the timeout {seconds}: it has to be greater than 0", path.display())]
    BadTimeout {
        /// "createContainer".
        kind: &'static str,
        /// As given.
        path: PathBuf,
        /// As given.
        seconds: i64,
    },
    /// More than anybody has.
    #[error("{count} hooks are more than a container can have ({MOST})")]
    TooMany {
        /// How many.
        count: usize,
    },
}

/// The hooks of one container by kind, each in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In the host's namespaces, before the change of root.
    pub prestart: Vec<proto::Hook>,
    /// The same.
    pub create_runtime: Vec<proto::Hook>,
    /// The host's programs in the container's namespaces, before the change of root.
    pub create_container: Vec<proto::Hook>,
    /// The container's programs, right before its own.
    pub start_container: Vec<proto::Hook>,
    /// In the host's namespaces, once it runs.
    pub poststart: Vec<proto::Hook>,
    /// In the host's namespaces, once it is gone.
    pub poststop: Vec<proto::Hook>,
}

impl Plan {
    /// What a spec asks for.
    ///
    /// # Errors
    /// The first hook that cannot be run.
    pub fn of(spec: &Spec) -> Result<Plan, HookError> {
        match spec.hooks() {
            Some(hooks) => Plan::of_hooks(hooks),
            None => Ok(Plan::default()),
        }
    }

    /// What a spec's hooks ask for.
    ///
    /// # Errors
    /// The first hook that cannot be run.
    pub fn of_hooks(hooks: &oci::Hooks) -> Result<Plan, HookError> {
        #[allow(deprecated)]
        let prestart = hooks.prestart();
        let plan = Plan {
            prestart: list("prestart", prestart)?,
            create_runtime: list("createRuntime", hooks.create_runtime())?,
            create_container: list("createContainer", hooks.create_container())?,
            start_container: list("startContainer", hooks.start_container())?,
            poststart: list("poststart", hooks.poststart())?,
            poststop: list("poststop", hooks.poststop())?,
        };
        let count = plan.all().count();
        if count > MOST {
            return Err(HookError::TooMany { count });
        }
        Ok(plan)
    }

    fn all(&self) -> impl Iterator<Item = &proto::Hook> {
        let after = self.poststart.iter().chain(&self.poststop);
        self.launchers().chain(after)
    }

    /// Those that the monitor runs.
    fn launchers(&self) -> impl Iterator<Item = &proto::Hook> {
        let host = self.prestart.iter().chain(&self.create_runtime);
        let container = self.create_container.iter().chain(&self.start_container);
        host.chain(container)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all().next().is_none()
    }

    /// What the monitor is told; `None` where it has none to run. `state` is what
    /// [`state`] gives without status and pid.
    pub fn for_launch(&self, bundle: &str, state: &str) -> Option<proto::Hooks> {
        self.launchers().next()?;
        Some(proto::Hooks {
            bundle: bundle.to_owned(),
            state: state.to_owned(),
            prestart: self.prestart.clone(),
            create_runtime: self.create_runtime.clone(),
            create_container: self.create_container.clone(),
            start_container: self.start_container.clone(),
        })
    }

    /// The longest that the monitor's hooks may take together.
    pub fn longest_start(&self) -> Duration {
        let total = self
            .launchers()
            .fold(0_u64, |sum, hook| sum.saturating_add(hook.timeout_ms));
        Duration::from_millis(total)
    }
}

fn list(kind: &'static str, hooks: &Option<Vec<oci::Hook>>) -> Result<Vec<proto::Hook>, HookError> {
    hooks.iter().flatten().map(|hook| one(kind, hook)).collect()
}

fn one(kind: &'static str, hook: &oci::Hook) -> Result<proto::Hook, HookError> {
    let given = hook.path();
    if !given.is_absolute() {
        let path = given.clone();
        return Err(HookError::NotAbsolute { kind, path });
    }
    let args = hook.args().as_deref().unwrap_or_default();
    let env = hook.env().as_deref().unwrap_or_default();
    let nul = args.iter().chain(env).any(|text| text.contains('\0'));
    let text = given.to_str().filter(|text| !text.contains('\0') && !nul);
    let path = text.ok_or_else(|| HookError::NotText {
        kind,
        path: given.clone(),
    })?;
    let timeout = match hook.timeout() {
        None => PATIENCE,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds),
            Ok(0) | Err(_) => {
                return Err(HookError::BadTimeout {
                    kind,
                    path: given.clone(),
                    seconds,
                });
            }
        },
    };
    let bytes = |list: &[String]| list.iter().map(|text| text.clone().into_bytes()).collect();
    Ok(proto::Hook {
        path: path.to_owned(),
        args: bytes(args),
        env: bytes(env),
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    })
}

/// The hooks that the container's devices ask for; `None` for none.
pub fn of_devices(edits: &Edits) -> Option<oci::Hooks> {
    let mut hooks = oci::Hooks::default();
    let mut any = false;
    for hook in edits.0.iter().flat_map(|edits| &edits.hooks) {
        let mut made = oci::Hook::default();
        made.set_path(hook.path.clone())
            .set_args(Some(hook.args.clone()).filter(|args| !args.is_empty()))
            .set_env(Some(hook.env.clone()).filter(|env| !env.is_empty()))
            // As the specification of devices has it: 0 is none.
            .set_timeout(hook.timeout.filter(|seconds| *seconds != 0));
        #[allow(deprecated)]
        let list = match hook.hook_name.as_str() {
            "prestart" => hooks.prestart_mut(),
            "createRuntime" => hooks.create_runtime_mut(),
            "createContainer" => hooks.create_container_mut(),
            "startContainer" => hooks.start_container_mut(),
            "poststart" => hooks.poststart_mut(),
            "poststop" => hooks.poststop_mut(),
            // Refused when the file was read.
            _ => continue,
        };
        list.get_or_insert_default().push(made);
        any = true;
    }
    any.then_some(hooks)
}

/// The container's state as hooks read it; without `status` and `pid` where it is
/// the monitor that knows them.
pub fn state(
    id: &str,
    bundle: &Path,
    annotations: &HashMap<String, String>,
    status: Option<&str>,
    pid: Option<i32>,
) -> String {
    let mut state = serde_json::json!({
        "ociVersion": crate::oci::OCI_VERSION,
        "id": id,
        "bundle": bundle.to_string_lossy(),
        "annotations": annotations,
    });
    if let Some(status) = status {
        state["status"] = status.into();
    }
    if let Some(pid) = pid {
        state["pid"] = pid.into();
    }
    state.to_string()
}

/// What to say of a hook that failed.
pub fn told(failure: &proto::Failure) -> String {
    let proto::Failure {
        stage,
        detail,
        errno,
        ..
    } = failure;
    match errno {
        0 => format!("{stage} {detail}"),
        errno => {
            let why = std::io::Error::from_raw_os_error(*errno);
            format!("{stage} {detail}: {why}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdi::{ContainerEdits, Hook};

    fn edits(hooks: &[(&str, &str, Option<i64>)]) -> Edits {
        let hooks = hooks.iter().map(|(name, path, timeout)| Hook {
            hook_name: (*name).to_owned(),
            path: PathBuf::from(path),
            args: vec!["hook".into(), (*name).to_owned()],
            env: vec!["A=1".into()],
            timeout: *timeout,
        });
        Edits(vec![ContainerEdits {
            hooks: hooks.collect(),
            ..ContainerEdits::default()
        }])
    }

    #[test]
    fn each_kind_of_a_device_goes_where_it_is_run() {
        let kinds = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        let all: Vec<_> = kinds
            .iter()
            .map(|kind| (*kind, "/bin/hook", Some(3)))
            .collect();
        let plan = Plan::of_hooks(&of_devices(&edits(&all)).unwrap()).unwrap();
        let lists = [
            &plan.prestart,
            &plan.create_runtime,
            &plan.create_container,
            &plan.start_container,
            &plan.poststart,
            &plan.poststop,
        ];
        for (kind, list) in kinds.iter().zip(lists) {
            assert_eq!(list.len(), 1, "{kind}");
            assert_eq!(list[0].args[1], kind.as_bytes());
            assert_eq!(list[0].env, [b"A=1".to_vec()]);
            assert_eq!(list[0].timeout_ms, 3000);
        }
        assert_eq!(plan.longest_start(), Duration::from_secs(12));
        let launch = plan.for_launch("/bundle", "{}").unwrap();
        assert_eq!(launch.create_container, plan.create_container);
        assert_eq!(of_devices(&Edits::default()), None);
    }

    #[test]
    fn what_comes_after_a_start_is_not_the_monitors() {
        let after = edits(&[("poststart", "/p", None), ("poststop", "/p", None)]);
        let plan = Plan::of_hooks(&of_devices(&after).unwrap()).unwrap();
        assert!(!plan.is_empty());
        assert_eq!(plan.for_launch("/bundle", "{}"), None);
        assert_eq!(plan.longest_start(), Duration::ZERO);
        assert_eq!(plan.poststart[0].timeout_ms, 120_000);
        assert!(Plan::of(&Spec::default()).unwrap().is_empty());
    }

    #[test]
    fn hooks_that_make_no_sense_are_refused_by_name() {
        let cases = [
            ("bin/hook", None, "no absolute path"),
            ("/bin/\0hook", None, "NUL"),
            ("/bin/hook", Some(-1), "-1"),
        ];
        for (path, timeout, said) in cases {
            let hooks = of_devices(&edits(&[("createRuntime", path, timeout)])).unwrap();
            let error = Plan::of_hooks(&hooks).unwrap_err().to_string();
            assert!(
                error.contains("createRuntime") && error.contains(said),
                "{error}"
            );
        }
        let many = vec![("poststop", "/p", None); MOST + 1];
        let error = Plan::of_hooks(&of_devices(&edits(&many)).unwrap()).unwrap_err();
        assert!(matches!(error, HookError::TooMany { .. }), "{error}");
    }

    #[test]
    fn the_state_has_what_the_specification_wants() {
        let annotations = HashMap::from([("k".to_owned(), "v".to_owned())]);
        let text = state(
            "id",
            Path::new("/b"),
            &annotations,
            Some("running"),
            Some(3),
        );
        let made: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.2.0", "id": "id", "bundle": "/b", "annotations": {"k": "v"},
            "status": "running", "pid": 3,
        });
        assert_eq!(made, expected);
    }
}
