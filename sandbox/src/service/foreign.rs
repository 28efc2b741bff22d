//! Containers of pods whose handler is an OCI runtime.
//!
//! ```text
//! run/bundles/<container>/config.json     the OCI spec, made anew at each start
//!                         rootfs          the container's root file system, mounted
//!                         volumes/<n>     image volumes, mounted; in a user namespace all
//!                                         that is to be bound, owners mapped
//!                         userns          a link to the pod's user namespace
//! ```
//!
//! The mounts stand in the host's table, as such a runtime needs paths. They,
//! the bundle and what the runtime keeps go when the container has ended. Its hooks
//! are the runtime's to run.
//!
//! Source: OCI runtime-spec, `bundle.md`.

use super::create_container::invalid;
use super::{Inner, internal};
use crate::cgroup::Cgroup;
use crate::container::ContainerRecord;
use crate::container_spec::{ContainerSpec, SeccompProfile};
use crate::error::{Kind, Result, SandboxError};
use crate::handler::{BUILT_IN, OciRuntime, SYSTEMD_MODE};
use crate::hooks::Plan;
use crate::monitor::Monitor;
use crate::pod::PodRecord;
use crate::pod_spec::{PidMode, PodSpec};
use crate::{launch, oci, seccomp};
use berth_proto::monitor_v1::{self, feature, reply, request};
use berth_sys::Errno;
use berth_sys::mount::{self, Change};
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Mount, Spec};
use rustix::fs::{FileType, Mode, OFlags};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// What the bundle says it follows: nothing newer is in it, and crun 1.8 refuses
/// versions it does not know.
const OCI_VERSION: &str = "1.0.2";

/// Source: crun(1), `run.oci.systemd.subgroup`.
const CRUN_SUBGROUP: &str = "run.oci.systemd.subgroup";

/// Largest base spec read. Unit: bytes.
const MOST_BASE_SPEC: u64 = 1 << 20;

/// What the bundle that was laid out has.
#[derive(Debug, Default)]
pub(super) struct Bundle {
    /// Hooks are run while the container starts.
    pub hooked: bool,
    /// Who the streams are to belong to, where that is somebody else than inside.
    pub stream_owner: Option<monitor_v1::Owner>,
}

impl Inner {
    /// The OCI runtime of a pod, with its handler's name; `None` for the built-in
    /// launcher.
    ///
    /// # Errors
    /// `WrongState` where the node has lost the pod's handler.
    pub(super) fn oci_runtime(&self, pod: &PodSpec) -> Result<Option<&OciRuntime>> {
        let name = pod.runtime_handler.as_str();
        if BUILT_IN.contains(&name) {
            return Ok(None);
        }
        match self.settings.handlers.oci(name) {
            Some(runtime) => Ok(Some(runtime)),
            None => {
                let text = format!("this node has no runtime handler {name:?} any more");
                Err(SandboxError::new(Kind::WrongState, text))
            }
        }
    }

    /// What a pod may not ask for where an OCI runtime is its handler.
    pub(super) fn check_handler(&self, pod: &PodSpec) -> Result<()> {
        let Some(runtime) = self.oci_runtime(pod)? else {
            return Ok(());
        };
        if pod.namespaces.user.is_some() && !runtime.features.user_namespaces {
            let name = &pod.runtime_handler;
            let text = format!(
                "the runtime handler {name:?} cannot have pods in user namespaces: its command \
                 \"features\" does not say that the runtime can, or it is crun, with which they \
                 do not start; the built-in handler can"
            );
            return Err(SandboxError::new(Kind::Unsupported, text));
        }
        Ok(())
    }

    pub(super) fn bundle(&self, container: &ContainerRecord) -> PathBuf {
        self.settings
            .run
            .join("bundles")
            .join(container.id.as_str())
    }

    /// What the monitor is told of the runtime; `None` for the built-in launcher.
    ///
    /// # Errors
    /// The monitor is too old, or the handler is gone.
    pub(super) fn runtime_for_monitor(
        &self,
        pod: &PodSpec,
        container: &ContainerRecord,
        monitor: &Monitor,
    ) -> Result<Option<monitor_v1::OciRuntime>> {
        let Some(runtime) = self.oci_runtime(pod)? else {
            return Ok(None);
        };
        if monitor.hello.features & feature::OCI_RUNTIME == 0 {
            let text =
                "the pod's monitor is of an earlier version: it knows the built-in handler only";
            return Err(SandboxError::new(Kind::Unsupported, text));
        }
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut options = runtime.options.clone();
        if in_systemd_mode(runtime, container).is_some() {
            options.push(SYSTEMD_MODE.to_owned());
        }
        Ok(Some(monitor_v1::OciRuntime {
            program: text(&runtime.path),
            root: text(&runtime.root),
            options,
            bundle: text(&self.bundle(container)),
        }))
    }

    /// Where the pod's namespaces can be joined, by kind.
    pub(super) async fn held_namespaces(monitor: &Monitor) -> Result<BTreeMap<String, PathBuf>> {
        let asked = monitor.ask(request::Body::Inspect(monitor_v1::Inspect {}), Vec::new());
        let (answer, _) = asked
            .await
            .map_err(internal("the monitor does not say what it holds"))?;
        let reply::Body::State(state) = answer else {
            let text = "the monitor's answer does not fit";
            return Err(SandboxError::new(Kind::Internal, text));
        };
        let pid = monitor.hello.pid;
        let path = |fd: i32| PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
        let held = state.held.into_iter();
        Ok(held.map(|held| (held.kind, path(held.fd))).collect())
    }

    /// Lays the bundle out.
    ///
    /// Blocks on whatever the container has mounted.
    pub(super) fn make_bundle(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        held: &BTreeMap<String, PathBuf>,
    ) -> Result<Bundle> {
        let Some(runtime) = self.oci_runtime(&pod.spec)? else {
            return Ok(Bundle::default());
        };
        let failed = || format!("cannot make the bundle of container {}", container.id);
        let (mut spec, raw_env) = self.runtime_spec(container)?;
        if let Some(variable) = raw_env
            .iter()
            .find(|entry| std::str::from_utf8(entry).is_err())
        {
            let name = String::from_utf8_lossy(variable).into_owned();
            let text =
                format!("the environment variable {name:?} is not UTF-8, as an OCI runtime wants");
            return Err(SandboxError::new(Kind::Invalid, text));
        }
        self.clear_bundle(container).map_err(internal(failed()))?;
        let dir = self.bundle(container);
        let make = |path: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(path)
        };
        make(&dir.join("rootfs")).map_err(internal(failed()))?;
        fs::create_dir_all(&runtime.root).map_err(internal(failed()))?;

        spec.set_version(OCI_VERSION.to_owned());
        self.join_namespaces(&mut spec, container, held)?;
        self.add_seccomp(&mut spec, container)?;
        self.add_annotations(&mut spec, pod, &container.spec, runtime);
        // The runtime opens them by name again.
        drop(self.relabelled(pod, container)?);
        self.have_scope_made(&mut spec, container, runtime)?;
        let rootfs = self.rootfs(&pod.spec, container)?;
        attach(&rootfs, &dir.join("rootfs")).map_err(internal(failed()))?;
        let mut volumes = self.mounted_images(&pod.spec, container)?;
        make_sources(&spec, &volumes).map_err(internal(failed()))?;
        if pod.spec.namespaces.user.is_some() {
            check_devices(&spec)?;
            self.bring_sources(&mut spec, &mut volumes)?;
        }
        for (i, (target, fd)) in volumes.into_iter().enumerate() {
            let place = dir.join("volumes").join(i.to_string());
            make(&dir.join("volumes")).map_err(internal(failed()))?;
            place_for(&fd, &place).map_err(internal(failed()))?;
            attach(&fd, &place).map_err(internal(failed()))?;
            set_source(&mut spec, &target, place);
        }
        let spec = with_base(&spec, runtime.base_spec.as_deref()).map_err(invalid(failed()))?;
        let hooks = Plan::of(&spec).map_err(invalid(failed()))?;
        let text = serde_json::to_string(&spec).map_err(internal(failed()))?;
        fs::write(dir.join("config.json"), text).map_err(internal(failed()))?;
        let process = spec.process().as_ref();
        let user = process.map(oci_spec::runtime::Process::user);
        Ok(Bundle {
            hooked: !hooks.is_empty(),
            stream_owner: user.and_then(|user| launch::stream_owner(&spec, user)),
        })
    }

    /// For a pod in a user namespace: what is to be bound, as mounts of the bundle's own by
    /// their targets. There the runtime looks for sources as a user who may not enter the
    /// directories they are in; and it need not know how to map their owners.
    fn bring_sources(
        &self,
        spec: &mut Spec,
        volumes: &mut BTreeMap<PathBuf, OwnedFd>,
    ) -> Result<()> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for one in &mut mounts {
            let target = one.destination().clone();
            let (Some("bind"), Some(source)) = (one.typ().as_deref(), one.source().clone()) else {
                continue;
            };
            // Everybody may look there; with all that is mounted in it, it would be in the
            // host's table once more.
            if source == Path::new("/sys") {
                continue;
            }
            let mapping = launch::mapping(one.uid_mappings(), one.gid_mappings());
            let has = |name: &str| one.options().iter().flatten().any(|option| option == name);
            let (recursive, deep) = (has("rbind"), has("ridmap"));
            if let std::collections::btree_map::Entry::Vacant(free) = volumes.entry(target) {
                let failed = || format!("cannot bring {} into the bundle", source.display());
                let copy = mount::clone_tree(&source, recursive).map_err(internal(failed()))?;
                if let Some(mapping) = &mapping {
                    let mapped = self.mapped(mapping)?;
                    let change = Change {
                        idmap: Some(mapped.namespace.as_fd()),
                        ..Change::default()
                    };
                    mount::set_attr(&copy, change, deep).map_err(internal(failed()))?;
                }
                free.insert(copy);
            }
            one.set_uid_mappings(None).set_gid_mappings(None);
            if let Some(options) = one.options_mut() {
                options.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap"));
            }
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    pub(super) fn join_namespaces(
        &self,
        spec: &mut Spec,
        container: &ContainerRecord,
        held: &BTreeMap<String, PathBuf>,
    ) -> Result<()> {
        let target = match &container.spec.security.pid {
            PidMode::Target(_) => self.pid_target(container)?,
            PidMode::Pod | PidMode::Container | PidMode::Node => None,
        };
        let target = target.and_then(|target| target.state.pid());
        let Some(linux) = spec.linux_mut() else {
            return Ok(());
        };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in namespaces.iter_mut().filter(|one| one.path().is_some()) {
            let path = match (namespace.typ(), target) {
                (LinuxNamespaceType::Pid, Some(pid)) => Some(format!("/proc/{pid}/ns/pid").into()),
                (LinuxNamespaceType::Pid, None) => held.get("pid").cloned(),
                (LinuxNamespaceType::Ipc, _) => held.get("ipc").cloned(),
                (LinuxNamespaceType::Uts, _) => held.get("uts").cloned(),
                (LinuxNamespaceType::User, _) => match held.get("user") {
                    Some(held) => Some(self.named_user_namespace(container, held)?),
                    None => None,
                },
                _ => continue,
            };
            let kind = namespace.typ().to_string();
            let path = path.ok_or_else(|| {
                let text = format!("the pod's monitor holds no {kind} namespace");
                SandboxError::new(Kind::Internal, text)
            })?;
            namespace.set_path(Some(path));
        }
        linux.set_namespaces(Some(namespaces));
        Ok(())
    }

    /// The spec that the container's runtime was given; `None` for the built-in launcher.
    ///
    /// # Errors
    /// `Internal` where it cannot be read.
    pub(super) fn bundle_spec(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
    ) -> Result<Option<Spec>> {
        if self.oci_runtime(&pod.spec)?.is_none() {
            return Ok(None);
        }
        let path = self.bundle(container).join("config.json");
        let text = || format!("cannot read the spec of container {}", container.id);
        let bytes = fs::read(path).map_err(internal(text()))?;
        let spec = serde_json::from_slice(&bytes).map_err(internal(text()))?;
        Ok(Some(spec))
    }

    /// A name of the bundle's own for the user namespace. runc since 1.1.11 takes any path that
    /// begins with /proc/PID for that process's namespace: here that would be the host's.
    fn named_user_namespace(&self, container: &ContainerRecord, held: &Path) -> Result<PathBuf> {
        let name = self.bundle(container).join("userns");
        std::os::unix::fs::symlink(held, &name).map_err(internal(format!(
            "cannot make the bundle of container {}",
            container.id
        )))?;
        Ok(name)
    }

    fn add_seccomp(&self, spec: &mut Spec, container: &ContainerRecord) -> Result<()> {
        let security = &container.spec.security;
        if security.privileged {
            return Ok(());
        }
        let caps = oci::bounding_set(spec);
        let profile = match &security.seccomp {
            SeccompProfile::Unconfined => return Ok(()),
            SeccompProfile::RuntimeDefault => self.seccomp.oci_default(caps),
            SeccompProfile::Localhost(path) => {
                seccomp::Compiler::read(path).and_then(|json| self.seccomp.oci(&json, caps))
            }
        };
        let profile = profile.map_err(invalid("cannot use the seccomp profile"))?;
        if let Some(linux) = spec.linux_mut() {
            linux.set_seccomp(Some(profile));
        }
        Ok(())
    }

    /// Tells a runtime in systemd mode which scope to make and how to limit it.
    fn have_scope_made(
        &self,
        spec: &mut Spec,
        container: &ContainerRecord,
        runtime: &OciRuntime,
    ) -> Result<()> {
        let (Some(name), Some(cgroup)) = (in_systemd_mode(runtime, container), &container.cgroup)
        else {
            return Ok(());
        };
        let said = self
            .cgroups
            .said_to_runtime(cgroup, &container.spec.resources)
            .map_err(invalid(format!("cannot limit container {}", container.id)))?;
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(name.into()));
            if let (Some(said), Some(resources)) = (said, linux.resources_mut()) {
                oci::limit(resources, &said);
            }
        }
        // crun would make another cgroup in it; limits and statistics are the scope's.
        let mut all = spec.annotations().clone().unwrap_or_default();
        all.insert(CRUN_SUBGROUP.to_owned(), String::new());
        spec.set_annotations(Some(all));
        Ok(())
    }

    /// Those that the runtime is to be told of; the container's win.
    fn add_annotations(
        &self,
        spec: &mut Spec,
        pod: &PodRecord,
        container: &ContainerSpec,
        runtime: &OciRuntime,
    ) {
        let mut all = spec.annotations().clone().unwrap_or_default();
        let asked = pod.spec.annotations.iter().chain(&container.annotations);
        for (key, value) in asked.filter(|(key, _)| runtime.is_told(key)) {
            all.insert(key.clone(), value.clone());
        }
        spec.set_annotations(Some(all));
    }

    /// Has the runtime forget the container and takes its bundle apart. What is
    /// gone counts as forgotten; a container of the built-in launcher has none.
    ///
    /// Blocks.
    pub(super) fn forget_bundle(&self, container: &ContainerRecord) -> Result<()> {
        if !self.bundle(container).exists() {
            return Ok(());
        }
        let text = || {
            format!(
                "cannot have the runtime of container {} forget it",
                container.id
            )
        };
        let view = self.objects.view();
        let runtime = view
            .pod(container.pod.as_str())
            .and_then(|pod| self.settings.handlers.oci(&pod.spec.runtime_handler));
        if let Some(runtime) = runtime {
            runtime
                .delete(container.id.as_str())
                .map_err(internal(text()))?;
        }
        self.clear_bundle(container).map_err(internal(text()))
    }

    /// Takes the bundle's mounts and files away.
    pub(super) fn clear_bundle(&self, container: &ContainerRecord) -> io::Result<()> {
        clear(&self.bundle(container))
    }

    /// Takes bundles away whose containers are not there any more. Blocks.
    pub(super) fn sweep_bundles(&self) {
        let view = self.objects.view();
        for dir in entries(&self.settings.run.join("bundles")).unwrap_or_default() {
            let name = dir.file_name().and_then(|name| name.to_str());
            if name.is_none_or(|id| view.container(id).is_some()) {
                continue;
            }
            if let Err(error) = clear(&dir) {
                tracing::warn!(bundle = %dir.display(), %error, "a bundle of nobody's stays");
            }
        }
    }
}

/// Takes a bundle's mounts and files away, one by one: a mount that stays must not
/// be emptied.
fn clear(dir: &Path) -> io::Result<()> {
    let mut places = vec![dir.join("rootfs")];
    places.extend(entries(&dir.join("volumes"))?);
    for place in places {
        loop {
            match mount::detach(&place) {
                Ok(()) => {}
                Err(Errno::INVAL | Errno::NOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        remove(&place)?;
    }
    remove(&dir.join("volumes"))?;
    for file in entries(dir)? {
        remove(&file)?;
    }
    remove(dir)
}

/// Slice, prefix and name of the scope that the runtime is to make; `None` where it is given a
/// cgroup by its path.
fn in_systemd_mode(runtime: &OciRuntime, container: &ContainerRecord) -> Option<String> {
    let cgroup = container.cgroup.as_ref();
    cgroup
        .filter(|_| !runtime.joins_scope)
        .and_then(Cgroup::for_systemd_mode)
}

/// An OCI process as a runtime's `exec` takes it.
///
/// # Errors
/// The spec has no process.
pub(super) fn exec_process(spec: &Spec, command: &[String], tty: bool) -> Result<String> {
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| SandboxError::new(Kind::Internal, "the container's spec has no process"))?;
    let mut process = process.clone();
    process
        .set_args(Some(command.to_vec()))
        .set_terminal(Some(tty));
    serde_json::to_string(&process).map_err(internal("cannot say how the command is to run"))
}

/// In a user namespace no device node can be made, and a runtime binds what the host has at the
/// path that the container is to have it at.
///
/// # Errors
/// `Unsupported` where that is not the device that is meant.
fn check_devices(spec: &Spec) -> Result<()> {
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_ref());
    for device in devices.into_iter().flatten() {
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            _ => FileType::CharacterDevice,
        };
        let number = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
        let wanted = rustix::fs::makedev(number(device.major()), number(device.minor()));
        let same = rustix::fs::stat(device.path()).is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == kind && found.st_rdev == wanted
        });
        if !same {
            let text = format!(
                "the device {} is another one on the host, or none: in a user namespace only the \
                 built-in handler can give a device another path",
                device.path().display()
            );
            return Err(SandboxError::new(Kind::Unsupported, text));
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Removes a file or an empty directory; what is gone counts as removed.
fn remove(path: &Path) -> io::Result<()> {
    let outcome = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A directory or a file, as what is to be mounted there.
fn place_for(what: &OwnedFd, place: &Path) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(what)?.st_mode);
    match kind {
        FileType::Directory => fs::create_dir(place),
        _ => fs::File::create(place).map(drop),
    }
}

pub(super) fn attach(what: &OwnedFd, place: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let onto = rustix::fs::open(place, flags, Mode::empty())?;
    Ok(mount::attach(what, onto)?)
}

/// Has the mount at `target` come from `source`.
fn set_source(spec: &mut Spec, target: &Path, source: PathBuf) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in mounts
        .iter_mut()
        .filter(|mount| mount.destination() == target)
    {
        mount.set_source(Some(source.clone()));
    }
    spec.set_mounts(Some(mounts));
}

/// Makes the directories that bind mounts are to come from and that are not
/// there, as the built-in launcher does.
fn make_sources(spec: &Spec, mounted: &BTreeMap<PathBuf, OwnedFd>) -> io::Result<()> {
    let is_bind = |mount: &&Mount| {
        mount.typ().as_deref() == Some("bind") && !mounted.contains_key(mount.destination())
    };
    for mount in spec.mounts().iter().flatten().filter(is_bind) {
        if let Some(source) = mount.source()
            && !source.exists()
        {
            fs::create_dir_all(source)?;
        }
    }
    Ok(())
}

/// The spec, above the base where there is one.
fn with_base(spec: &Spec, base: Option<&Path>) -> io::Result<Spec> {
    let Some(path) = base else {
        return Ok(spec.clone());
    };
    let ours = serde_json::to_value(spec)?;
    let name =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    if fs::metadata(path).map_err(name)?.len() > MOST_BASE_SPEC {
        return Err(name(io::Error::other("too large for a base spec")));
    }
    let text = fs::read(path).map_err(name)?;
    let mut merged: Value = serde_json::from_slice(&text).map_err(|error| name(error.into()))?;
    let hooks = all_hooks(&merged["hooks"], &ours["hooks"]);
    merge(&mut merged, ours);
    if let Some(hooks) = hooks {
        merged["hooks"] = hooks;
    }
    // What of a base is no spec is found here, not by the runtime.
    serde_json::from_value(merged).map_err(|error| name(error.into()))
}

/// The base's hooks, then ours, kind by kind; `None` where one of them has none.
fn all_hooks(base: &Value, ours: &Value) -> Option<Value> {
    let mut all = base.as_object()?.clone();
    for (kind, list) in ours.as_object()? {
        match (
            all.get_mut(kind).and_then(Value::as_array_mut),
            list.as_array(),
        ) {
            (Some(all), Some(list)) => all.extend(list.iter().cloned()),
            _ => _ = all.insert(kind.clone(), list.clone()),
        }
    }
    Some(Value::Object(all))
}

/// Puts `ours` above `base`: objects by key, everything else whole; an empty
/// list of ours says nothing.
fn merge(base: &mut Value, ours: Value) {
    match (base, ours) {
        (Value::Object(base), Value::Object(ours)) => {
            for (key, value) in ours {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (base, Value::Array(ours)) if ours.is_empty() && base.is_array() => {}
        (base, ours) => *base = ours,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_base_counts_where_we_say_nothing() {
        let mut base = json!({"hooks": {"poststop": [1]}, "process": {"cwd": "/base", "rlimits": [2]},
            "mounts": [3]});
        let ours = json!({"process": {"cwd": "/ours", "rlimits": [], "user": null}, "mounts": [4]});
        merge(&mut base, ours);
        assert_eq!(
            base,
            json!({"hooks": {"poststop": [1]}, "process": {"cwd": "/ours", "rlimits": [2], "user": null},
                "mounts": [4]})
        );
    }

    #[test]
    fn a_base_that_is_no_spec_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.json");
        fs::write(&path, r#"{"hooks": 3}"#).unwrap();
        let error = with_base(&Spec::default(), Some(&path)).unwrap_err();
        assert!(error.to_string().contains("base.json"), "{error}");
        fs::write(&path, r#"{"hooks":{"poststop":[{"path":"/bin/true"}]}}"#).unwrap();
        let merged = with_base(&Spec::default(), Some(&path)).unwrap();
        assert_eq!(Plan::of(&merged).unwrap().poststop[0].path, "/bin/true");
        // Those of the container's devices are run after it.
        let mut ours = Spec::default();
        let hooks: oci_spec::runtime::Hooks = serde_json::from_value(json!({
            "poststop": [{"path": "/ours"}], "poststart": [{"path": "/ours"}],
        }))
        .unwrap();
        ours.set_hooks(Some(hooks));
        let merged = Plan::of(&with_base(&ours, Some(&path)).unwrap()).unwrap();
        let paths: Vec<_> = merged
            .poststop
            .iter()
            .map(|hook| hook.path.as_str())
            .collect();
        assert_eq!(paths, ["/bin/true", "/ours"]);
        assert_eq!(merged.poststart.len(), 1);
    }

    #[test]
    fn an_exec_is_the_containers_process_with_another_command() {
        let spec = Spec::default();
        let text = exec_process(&spec, &["ls".into()], true).unwrap();
        let process: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(process["args"], json!(["ls"]));
        assert_eq!(process["terminal"], json!(true));
    }
}
