//! CheckpointContainer: look, record, freeze, dump, thaw, archive.
//!
//! ```text
//! <location's directory>/.berth-checkpoint-<container>/     what the archive is made of
//! lib/checkpoints/<container>.rec                           what to put back
//! ```
//!
//! All that can be known before is asked before anything is frozen. From the
//! freeze to the thaw the container stands still: memory and files are of one
//! moment. Whatever becomes of the rest, the container goes on, and nothing but
//! a whole archive stays; after a crash the next start sees to that by the record.
//!
//! A stop has the right of way: it has a checkpoint given up and thawed first.

use super::{Inner, Sandboxes, blocking, internal, now};
use crate::cgroup::Cgroup;
use crate::checkpoint::criu::{self, Criu, CriuError, Dump};
use crate::checkpoint::journal::{Journal, Session};
use crate::checkpoint::{archive, files, mounts};
use crate::container::ContainerRecord;
use crate::container_spec::ContainerSpec;
use crate::error::{Kind, Result, SandboxError};
use crate::handler::OciRuntime;
use crate::id::ContainerId;
use crate::operation::{Stage, lock};
use crate::pod::PodRecord;
use crate::pod_spec::PidMode;
use berth_store::atomic_file::Durability;
use berth_store::{crash, record};
use oci_spec::runtime::Spec;
use rustix::process::{Pid, Resource, Rlimit, Signal};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a checkpoint may take that nobody set a limit for: what the kubelet
/// waits for any call. Source: kubelet, `runtimeRequestTimeout`.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// How long processes may take to stand still.
const FREEZE: Duration = Duration::from_secs(10);

/// How long what dumps may take to put everything back once it is to give up,
/// before it is killed; and how long it may then take to be gone.
const GIVE_UP: Duration = Duration::from_secs(10);
const GONE: Duration = Duration::from_secs(5);

/// How long a stop waits for a checkpoint to let go.
const LET_GO: Duration = Duration::from_secs(30);

/// How long until a program that runs is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Longest path of a location; the kernel takes no longer one.
const LONGEST_LOCATION: usize = 4096;

/// What a program that fails has said, beside what it logs.
const SAID: &str = "said";

/// The archive before it has its name.
const ARCHIVE: &str = "archive.tar";

/// Most that is told of what a program said. Unit: bytes.
const MOST_SAID: usize = 2048;

/// The checkpoints that are being made, by container.
#[derive(Default)]
pub(super) struct Checkpoints(Mutex<HashMap<ContainerId, Arc<Running>>>);

struct Running {
    location: PathBuf,
    called_off: AtomicBool,
    /// Whether the container may be frozen by it.
    holds: watch::Sender<bool>,
}

/// Takes a checkpoint off the list at its end.
struct Turn<'a>(&'a Inner, &'a ContainerId, Arc<Running>);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.2.holds.send_replace(false);
        lock(&self.0.checkpoints.0).remove(self.1);
    }
}

/// Who dumps.
enum Dumper {
    BuiltIn(Criu),
    Runtime(OciRuntime),
}

impl Sandboxes {
    /// Writes a checkpoint of a running container to `location`, an absolute
    /// path, and leaves it running; `None` means [`DEFAULT_TIMEOUT`]. A second
    /// call for the same location joins the first.
    ///
    /// # Errors
    /// `Missing` where CRIU is not there or does not work on this node, or the
    /// location's directory is not there; `WrongState` where the container does
    /// not run, is stopped meanwhile, or is being checkpointed to elsewhere;
    /// `Unsupported` for what the handler cannot checkpoint; `DeadlineExceeded`;
    /// `Internal` with CRIU's own reason. Nothing is at the location then that
    /// was not before.
    pub async fn checkpoint_container(
        &self,
        id: &str,
        location: &Path,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let container = self.0.container(id)?;
        let subject = container.spec.name.name.clone();
        let object = format!("{id} {}", location.display());
        let (location, timeout) = (location.to_owned(), timeout.unwrap_or(DEFAULT_TIMEOUT));
        self.0
            .operation(
                "CheckpointContainer",
                object,
                subject,
                |me, stage| async move {
                    me.checkpoint(&container.id, location, timeout, &stage)
                        .await
                        .map(|()| String::new())
                },
            )
            .await
            .map(drop)
    }
}

impl Inner {
    async fn checkpoint(
        self: &Arc<Self>,
        id: &ContainerId,
        location: PathBuf,
        timeout: Duration,
        stage: &Stage,
    ) -> Result<()> {
        let until = Instant::now() + timeout;
        stage.enter("check");
        let container = self.container(id.as_str())?;
        let Some(pid) = container.state.pid() else {
            let text = format!("container {id} does not run: only a running one has a checkpoint");
            return Err(SandboxError::new(Kind::WrongState, text));
        };
        let pod = self.pod(container.pod.as_str())?;
        let (me, record, place) = (self.clone(), container.clone(), location.clone());
        let of = pod.clone();
        let dumper = blocking(move || me.check_checkpoint(&of, &record, &place)).await?;
        let held = Inner::held_namespaces(&*self.monitor(&container.pod)?).await?;

        let running = self.begin_checkpoint(id, &location)?;
        let (me, stage) = (self.clone(), stage.clone());
        blocking(move || {
            let turn = Turn(&me, &container.id, running);
            let spec = me.checkpoint_spec(&pod, &container, &held)?;
            let cgroup = container.cgroup.as_ref().ok_or_else(|| {
                let text = format!("container {} has no cgroup", container.id);
                SandboxError::new(Kind::Internal, text)
            })?;
            let making = Making {
                me: &me,
                container: &container,
                pod: &pod,
                pid,
                cgroup,
                spec,
                dumper,
                work: work_directory(&location, &container.id),
                location,
                until,
                running: &turn.2,
                stage,
            };
            making.make()
        })
        .await
    }

    fn begin_checkpoint(&self, id: &ContainerId, location: &Path) -> Result<Arc<Running>> {
        let mut all = lock(&self.checkpoints.0);
        if let Some(other) = all.get(id) {
            let text = format!(
                "container {id} is being checkpointed to {} already",
                other.location.display()
            );
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        let running = Arc::new(Running {
            location: location.to_owned(),
            called_off: AtomicBool::new(false),
            holds: watch::channel(true).0,
        });
        all.insert(id.clone(), running.clone());
        Ok(running)
    }

    /// Has a checkpoint given up that holds the container, and waits until it
    /// does so no more: what is frozen hears no signal.
    pub(super) async fn call_off_checkpoint(&self, id: &ContainerId) {
        let running = lock(&self.checkpoints.0).get(id).cloned();
        let Some(running) = running.filter(|running| *running.holds.borrow()) else {
            return;
        };
        running.called_off.store(true, Ordering::Release);
        let mut holds = running.holds.subscribe();
        let waited = tokio::time::timeout(LET_GO, holds.wait_for(|holds| !holds)).await;
        if waited.is_err() {
            tracing::warn!(container = %id, "its checkpoint does not let go of it");
        }
    }

    /// Everything that can be told before the container is touched. Blocking.
    fn check_checkpoint(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        location: &Path,
    ) -> Result<Dumper> {
        let refused = |kind, text: String| Err(SandboxError::new(kind, text));
        let directory = location.parent().filter(|_| {
            location.is_absolute()
                && location.file_name().is_some()
                && location.as_os_str().len() < LONGEST_LOCATION
        });
        let Some(directory) = directory else {
            let text = format!("{location:?} is no absolute path of a file");
            return refused(Kind::Invalid, text);
        };
        if location.is_dir() {
            return refused(
                Kind::Invalid,
                format!("{} is a directory", location.display()),
            );
        }
        if !directory.is_dir() {
            let text = format!(
                "the directory of the location is not there: {}",
                directory.display()
            );
            return refused(Kind::Missing, text);
        }
        let criu = Criu::usable().map_err(missing)?;
        let name = &container.spec.name.name;
        if container
            .cgroup
            .as_ref()
            .and_then(Cgroup::freezer)
            .is_none()
        {
            let text = format!("container {name} cannot be held still: its cgroup has no freezer");
            return refused(Kind::Missing, text);
        }
        if let Some(runtime) = self.oci_runtime(&pod.spec)? {
            if !criu::has_command(&runtime.path).map_err(missing)? {
                let program = runtime.path.display();
                let text = format!("{program} has no checkpoints: it is built without CRIU");
                return refused(Kind::Unsupported, text);
            }
            // CRIU holds the network with it, and a runtime cannot have it do otherwise.
            if criu::find("iptables").is_none() {
                return Err(missing(CriuError::NoProgram {
                    program: "iptables",
                }));
            }
            return Ok(Dumper::Runtime(runtime.clone()));
        }
        if let Some(what) = cannot(pod, &container.spec) {
            let text = format!("container {name} cannot be checkpointed: it has {what}");
            return refused(Kind::Unsupported, text);
        }
        Ok(Dumper::BuiltIn(criu))
    }

    /// What `spec.dump` says.
    fn checkpoint_spec(
        &self,
        pod: &PodRecord,
        container: &ContainerRecord,
        held: &BTreeMap<String, PathBuf>,
    ) -> Result<Spec> {
        let mut spec = match self.bundle_spec(pod, container)? {
            Some(spec) => spec,
            None => {
                let (mut spec, _) = self.runtime_spec(container)?;
                self.join_namespaces(&mut spec, container, held)?;
                spec
            }
        };
        files::annotate(&mut spec, container, pod);
        Ok(spec)
    }

    fn journal(&self, id: &ContainerId) -> PathBuf {
        let name = format!("{id}.rec");
        self.settings.lib.join("checkpoints").join(name)
    }

    /// Puts everything back: what dumps is gone, the container goes on, and what
    /// was being written is removed. Every step is tried. Blocking.
    fn put_back(&self, journal: &Journal) -> Result<()> {
        let mut failures: Vec<String> = Vec::new();
        if let Some(session) = journal.session
            && !end(session)
        {
            failures.push(format!("processes of session {} are left", session.leader));
        }
        let view = self.objects.view();
        let container = view.container(journal.container.as_str());
        if let Some(cgroup) = container.and_then(|container| container.cgroup.as_ref())
            && !journal.was_frozen
            && let Err(error) = cgroup.thaw()
        {
            failures.push(super::chain(&error));
        }
        match fs::remove_dir_all(&journal.work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                failures.push(format!("{}: {error}", journal.work.display()));
            }
            Ok(()) | Err(_) => {}
        }
        if failures.is_empty() {
            let path = self.journal(&journal.container);
            match record::remove(&path, Durability::ProcessEnd) {
                Err(error) if !error.is_absent() => failures.push(super::chain(&error)),
                Ok(()) | Err(_) => return Ok(()),
            }
        }
        let text = format!(
            "not all of a checkpoint of container {} is put back: {}",
            journal.container,
            failures.join("; ")
        );
        Err(SandboxError::new(Kind::Internal, text))
    }

    /// Ends the checkpoints that a daemon was making that died. Blocking.
    pub(super) fn recover_checkpoints(&self) {
        let Ok(entries) = fs::read_dir(self.settings.lib.join("checkpoints")) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let journal = match record::load::<Journal>(&path) {
                Ok(journal) => journal,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a checkpoint that was being made stays as it is"
                    );
                    continue;
                }
            };
            match self.put_back(&journal) {
                Ok(()) => tracing::info!(container = %journal.container,
                    "took back a checkpoint that was not finished"),
                Err(error) => tracing::warn!(container = %journal.container,
                    error = error.chain(), "a checkpoint is not all taken back"),
            }
        }
    }
}

/// What the built-in launcher's containers cannot have for a checkpoint.
fn cannot(pod: &PodRecord, spec: &ContainerSpec) -> Option<&'static str> {
    if spec.tty {
        // Its other end is the logger's, which no restore brings back.
        return Some("a terminal, which a checkpoint cannot hold");
    }
    if pod.spec.namespaces.user.is_some() {
        return Some("a user namespace of its pod, which CRIU would make anew");
    }
    None
}

fn missing(error: CriuError) -> SandboxError {
    SandboxError::new(Kind::Missing, super::chain(&error))
}

fn work_directory(location: &Path, id: &ContainerId) -> PathBuf {
    location.with_file_name(format!(".berth-checkpoint-{}", id.short()))
}

/// One checkpoint on its way.
struct Making<'a> {
    me: &'a Inner,
    container: &'a ContainerRecord,
    pod: &'a PodRecord,
    pid: i32,
    cgroup: &'a Cgroup,
    spec: Spec,
    dumper: Dumper,
    work: PathBuf,
    location: PathBuf,
    until: Instant,
    running: &'a Running,
    stage: Stage,
}

impl Making<'_> {
    fn make(&self) -> Result<()> {
        let text = || {
            format!(
                "cannot begin a checkpoint of container {}",
                self.container.id
            )
        };
        let path = self.me.journal(&self.container.id);
        let mut journal = Journal {
            container: self.container.id.clone(),
            work: self.work.clone(),
            was_frozen: self.cgroup.is_frozen().map_err(internal(text()))?,
            session: None,
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(internal(text()))?;
        }
        record::save(&path, &journal, Durability::ProcessEnd).map_err(internal(text()))?;
        crash::point("checkpoint.record");
        let made = self.steps(&mut journal);
        let back = self.me.put_back(&journal);
        crash::point("checkpoint.done");
        match (made, back) {
            (Err(error), Err(back)) => {
                let text = format!("{}; {}", error.chain(), back.chain());
                Err(SandboxError::new(error.kind(), text))
            }
            (made, back) => made.and(back),
        }
    }

    fn steps(&self, journal: &mut Journal) -> Result<()> {
        self.stage.enter("describe");
        self.describe()
            .map_err(|error| self.failed("write down", error))?;
        crash::point("checkpoint.described");

        self.stage.enter("freeze");
        self.may_go_on()
            .map_err(|error| self.failed("freeze", error))?;
        let left = self.until.saturating_duration_since(Instant::now());
        self.cgroup
            .freeze_all(FREEZE.min(left))
            .map_err(|error| self.failed("freeze", io::Error::other(super::chain(&error))))?;
        crash::point("checkpoint.frozen");

        self.stage.enter("dump");
        self.dump(journal)?;
        crash::point("checkpoint.dumped");

        self.stage.enter("files");
        self.copy_files()?;
        crash::point("checkpoint.copied");

        self.stage.enter("thaw");
        if !journal.was_frozen {
            self.cgroup
                .thaw()
                .map_err(internal("cannot let the container go on"))?;
        }
        self.running.holds.send_replace(false);
        crash::point("checkpoint.thawed");

        self.stage.enter("archive");
        let may_go_on = || self.may_go_on();
        archive::pack(&self.work, ARCHIVE, &may_go_on)
            .and_then(|()| fs::rename(self.work.join(ARCHIVE), &self.location))
            .and_then(|()| {
                let directory = self.location.parent().unwrap_or(Path::new("/"));
                fs::File::open(directory)?.sync_all()
            })
            .map_err(|error| self.failed("archive", error))?;
        crash::point("checkpoint.archived");
        Ok(())
    }

    /// Whether it is neither called off nor late.
    fn may_go_on(&self) -> io::Result<()> {
        if self.running.called_off.load(Ordering::Acquire) {
            return Err(io::Error::other("called off"));
        }
        if Instant::now() >= self.until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// Why it has not come to an end, the most telling reason first.
    fn failed(&self, what: &str, error: io::Error) -> SandboxError {
        let id = &self.container.id;
        let gone = self
            .me
            .objects
            .view()
            .container(id.as_str())
            .is_none_or(|container| container.state.pid() != Some(self.pid));
        if self.running.called_off.load(Ordering::Acquire) || gone {
            let text =
                format!("container {id} ended or was stopped while it was being checkpointed");
            return SandboxError::new(Kind::WrongState, text);
        }
        if Instant::now() >= self.until {
            let text = format!(
                "the checkpoint of container {id} was not done in time, and is given up: it runs on"
            );
            return SandboxError::new(Kind::DeadlineExceeded, text);
        }
        let said = error.to_string();
        let full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) || said.contains("No space left on device");
        if full {
            let directory = self.location.parent().unwrap_or(Path::new("/")).display();
            let text = format!(
                "cannot {what} the checkpoint of container {id}: the disk is full that {directory} is on"
            );
            return SandboxError::new(Kind::Internal, text);
        }
        let text = format!("cannot {what} the checkpoint of container {id}");
        // crun looks for it only now.
        let kind = match said.contains("could not load `libcriu") {
            true => Kind::Missing,
            false => Kind::Internal,
        };
        SandboxError::caused(kind, text, error)
    }

    fn images(&self) -> PathBuf {
        self.work.join("checkpoint")
    }

    /// What is known without holding the container.
    fn describe(&self) -> io::Result<()> {
        let make = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path);
        make(&self.work)?;
        make(&self.images())?;
        let spec = serde_json::to_value(&self.spec)?;
        self.write(
            "config.dump",
            &files::config(self.container, self.pod, now()),
        )?;
        self.write("spec.dump", &spec)?;
        self.write("bind.mounts", &files::bind_mounts(&self.spec))?;
        if let Dumper::BuiltIn(_) = self.dumper {
            self.write("checkpoint/descriptors.json", &files::descriptors(self.pid))?;
        }
        Ok(())
    }

    fn write(&self, name: &str, value: &serde_json::Value) -> io::Result<()> {
        let mut file = archive::create(&self.work.join(name))?;
        serde_json::to_writer_pretty(&mut file, value)?;
        file.flush()
    }

    /// Has the processes dumped.
    fn dump(&self, journal: &mut Journal) -> Result<()> {
        let (program, arguments) = match &self.dumper {
            Dumper::BuiltIn(criu) => (criu.path.clone(), self.dump_by_criu(criu)?),
            Dumper::Runtime(runtime) => (runtime.path.clone(), self.dump_by(runtime)),
        };
        let failed = |error| self.failed("dump", error);
        let mut child = self.start(&program, &arguments).map_err(failed)?;
        let ended = self.started(&mut child, journal);
        let good = matches!(&ended, Ok(ended) if ended.success());
        if ended.is_err() {
            // Without its byte it ends by itself.
            drop(child.stdin.take());
            if journal.session.is_none_or(end) {
                let _ = child.wait();
            } else {
                // It hangs in the kernel: nobody else shall wait for that.
                std::thread::spawn(move || child.wait());
            }
        }
        let said = fs::read(self.work.join(SAID)).unwrap_or_default();
        let _ = fs::remove_file(self.work.join(SAID));
        if good {
            return Ok(());
        }
        let error = match ended {
            Err(error) => error,
            Ok(ended) => io::Error::other(self.why(&program, &said, ended)),
        };
        Err(failed(error))
    }

    fn dump_by_criu(&self, criu: &Criu) -> Result<Vec<String>> {
        let text = || format!("cannot look at container {}", self.container.id);
        let read = |path: String| fs::read_to_string(path).map_err(internal(text()));
        let own = mounts::parse(&read(format!("/proc/{}/mountinfo", self.pid))?);
        let host = mounts::parse(&read("/proc/self/mountinfo".to_owned())?);
        let spec_mounts = self.spec.mounts().iter().flatten();
        let binds: BTreeSet<String> = spec_mounts
            .filter(|mount| mount.typ().as_deref() == Some("bind"))
            .map(|mount| mount.destination().to_string_lossy().into_owned())
            .collect();
        let linux = self.spec.linux().as_ref();
        let masked = linux.and_then(|linux| linux.masked_paths().clone());
        let masked = masked.unwrap_or_default().into_iter().collect();
        let inode = |of: &str, kind: &str| {
            let metadata = fs::metadata(format!("/proc/{of}/ns/{kind}"));
            metadata.map(|found| found.ino()).map_err(internal(text()))
        };
        let is_own = |kind: &str| Ok(inode(&self.pid.to_string(), kind)? != inode("self", kind)?);
        let mut namespaces = BTreeMap::new();
        if is_own("net")? {
            let net = inode(&self.pid.to_string(), "net")?;
            namespaces.insert("net", (net, "extRootNetNS"));
        }
        let pid_mode = &self.container.spec.security.pid;
        if matches!(pid_mode, PidMode::Pod | PidMode::Target(_)) {
            let pid = inode(&self.pid.to_string(), "pid")?;
            namespaces.insert("pid", (pid, "extRootPidNS"));
        }
        let freezer = self.cgroup.freezer().unwrap_or(Path::new(""));
        Ok(criu.arguments(&Dump {
            pid: self.pid,
            images: &self.images(),
            work: &self.work,
            freezer,
            timeout: self.until.saturating_duration_since(Instant::now()),
            namespaces,
            has_connections: ["tcp", "tcp6"].iter().any(|name| {
                // There is no tcp6 without IPv6.
                let table = fs::read_to_string(format!("/proc/{}/net/{name}", self.pid));
                table.is_ok_and(|table| criu::has_connections(&table))
            }),
            mounts: mounts::external(&own, &host, &binds, &masked, is_own("cgroup")?),
        }))
    }

    fn dump_by(&self, runtime: &OciRuntime) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut all = vec!["--root".to_owned(), text(&runtime.root)];
        all.extend(runtime.options.iter().cloned());
        let images = text(&self.images());
        let work = text(&self.work);
        all.extend(
            [
                "checkpoint",
                "--leave-running",
                "--ext-unix-sk",
                "--file-locks",
            ]
            .map(str::to_owned),
        );
        all.extend([
            "--image-path".to_owned(),
            images,
            "--work-path".to_owned(),
            work,
        ]);
        all.push(self.container.id.to_string());
        all
    }

    fn start(&self, program: &Path, arguments: &[String]) -> io::Result<Child> {
        let said = archive::create(&self.work.join(SAID))?;
        self.me
            .program
            .command()
            .arg("--gate")
            .arg(program)
            .args(arguments)
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
    }

    /// Writes down who dumps, has it begin, and waits for its end.
    fn started(&self, child: &mut Child, journal: &mut Journal) -> io::Result<ExitStatus> {
        let leader = i32::try_from(child.id()).map_err(io::Error::other)?;
        let start_ticks = start_ticks(leader).ok_or(io::ErrorKind::NotFound)?;
        journal.session = Some(Session {
            leader,
            start_ticks,
        });
        let path = self.me.journal(&self.container.id);
        record::save(&path, journal, Durability::ProcessEnd).map_err(io::Error::other)?;
        if let Some(mut gate) = child.stdin.take() {
            gate.write_all(b".")?;
        }
        crash::point("checkpoint.dumping");
        loop {
            if let Some(ended) = child.try_wait()? {
                return Ok(ended);
            }
            self.may_go_on()?;
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// What it said of its failure.
    fn why(&self, program: &Path, said: &[u8], ended: ExitStatus) -> String {
        let log = self.work.join("dump.log");
        if let Some(reasons) = criu::reasons(&log) {
            return format!("CRIU: {reasons}");
        }
        let said = String::from_utf8_lossy(&said[..said.len().min(MOST_SAID)]);
        match said.trim() {
            "" => format!("{} failed without a word: {ended}", program.display()),
            said => format!("{}: {said}", program.display()),
        }
    }

    /// What has to be of the same moment as the memory.
    fn copy_files(&self) -> Result<()> {
        let failed = |error| self.failed("copy the files of", error);
        let may_go_on = || self.may_go_on();
        let id = &self.container.id;
        let mut to = archive::Writing::create(&self.work.join("rootfs-diff.tar"), &may_go_on)
            .map_err(failed)?;
        let deleted = self
            .me
            .images
            .write_changes(id, &mut to)
            .map_err(|error| failed(io::Error::other(super::chain(&*error))))?;
        to.finish().map_err(failed)?;
        self.write("deleted.files", &deleted.into())
            .map_err(failed)?;
        match fs::File::open(&self.container.log_path) {
            Ok(log) => {
                let mut copy = archive::create(&self.work.join("container.log")).map_err(failed)?;
                let mut from = archive::Reading {
                    from: log,
                    may_go_on: &may_go_on,
                };
                io::copy(&mut from, &mut copy).map(drop).map_err(failed)
            }
            // It has none, or it was rotated away.
            Err(_) => Ok(()),
        }
    }
}

/// Ends a session: its processes can write no more, so they give up and put
/// everything back; what has not done so in time is killed. Whether all is gone.
fn end(session: Session) -> bool {
    if start_ticks(session.leader).is_some_and(|ticks| ticks != session.start_ticks) {
        // The number is somebody else's: nobody is left of the session.
        return true;
    }
    let each = |what: &dyn Fn(Pid)| {
        for pid in members(session.leader)
            .into_iter()
            .filter_map(Pid::from_raw)
        {
            what(pid);
        }
    };
    each(&|pid| {
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        // It has ended where this fails.
        let _ = rustix::process::prlimit(Some(pid), Resource::Fsize, none);
    });
    if is_gone(session.leader, GIVE_UP) {
        return true;
    }
    each(&|pid| {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    });
    is_gone(session.leader, GONE)
}

fn is_gone(session: i32, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        if members(session).is_empty() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The processes of a session that have not ended.
fn members(session: i32) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let fields = stat(*pid);
        let state = field(&fields, 3).is_some_and(|state| state != "Z" && state != "X");
        state && field(&fields, 6).and_then(|id| id.parse().ok()) == Some(session)
    })
    .collect()
}

fn start_ticks(pid: i32) -> Option<u64> {
    field(&stat(pid), 22)?.parse().ok()
}

/// What of /proc/PID/stat comes after the name, which may hold anything.
fn stat(pid: i32) -> String {
    let text = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(") ")
        .map_or_else(String::new, |(_, rest)| rest.to_owned())
}

/// A field as proc_pid_stat(5) counts them, from 3 on.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.split(' ').nth(number.checked_sub(3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    #[test]
    fn fields_are_counted_as_in_the_manual() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_ticks(own).unwrap() > 0);
        assert_eq!(field("S 1 2 3 4", 6), Some("3"));
        assert_eq!(field("S", 0), None);
    }

    #[test]
    fn a_session_is_ended_with_all_that_came_of_it() {
        let mut shell = Command::new("setsid")
            .args([
                "--fork",
                "sh",
                "-c",
                "sleep 1000 & echo $$; exec sleep 1000",
            ])
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = shell.stdout.take().unwrap();
        io::BufRead::read_line(&mut io::BufReader::new(out), &mut line).unwrap();
        shell.wait().unwrap();
        let leader: i32 = line.trim().parse().unwrap();
        let session = Session {
            leader,
            start_ticks: start_ticks(leader).unwrap(),
        };
        let stranger = Session {
            start_ticks: 1,
            ..session
        };
        assert!(end(stranger));
        assert!(!members(leader).is_empty());
        for pid in members(leader) {
            // Neither writes, so neither gives up: it is the kill that ends them.
            assert!(start_ticks(pid).is_some());
        }
        assert!(end(session));
        assert_eq!(members(leader), Vec::<i32>::new());
    }
}
