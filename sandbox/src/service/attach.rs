//! Attach: a client joins the streams of a running container.
//!
//! ```text
//! container ── pipes ──> logger ──> log
//!                           ├────> client 1 (pipes; the other ends are here)
//!                           └────> client 2
//! ```
//!
//! The container's logger passes everything on, so several clients see all of
//! it and none can take a line from the log. A client that does not keep up
//! makes the container wait, as a terminal would, but only for seconds: then it
//! is dropped. Detaching changes nothing but with `stdin_once`, where the
//! container's input ends with the first client that had it.

use super::exec_session::Streams;
use super::{Inner, Sandboxes, internal};
use crate::container::ContainerRecord;
use crate::error::{Kind, Result, SandboxError};
use crate::monitor::{Monitor, MonitorError};
use berth_proto::monitor_v1::{self, detached::Reason, feature, request};
use futures_util::FutureExt as _;
use futures_util::future::Shared;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

/// What a client wants of a container's streams; at least one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachRequest {
    /// The client thinks that the container has a terminal; what counts is
    /// whether it has, see [`AttachSession::tty`].
    pub tty: bool,
    /// It sends input.
    pub stdin: bool,
    /// It wants the output.
    pub stdout: bool,
    /// It wants the error output.
    pub stderr: bool,
}

/// Why a client is attached no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachEnd {
    /// The container closed its streams; all of its output was passed on.
    ContainerEnded,
    /// This side closed its descriptors.
    HungUp,
    /// It took too little of the output while the container waited for it.
    TooSlow,
    /// The monitor, or the container's logger, went away.
    Lost,
}

impl AttachEnd {
    /// Why, in words for a user.
    pub fn reason(self) -> &'static str {
        match self {
            Self::ContainerEnded => "the container closed its streams",
            Self::HungUp => "the client hung up",
            Self::TooSlow => "the client took too little of the output",
            Self::Lost => "the container's logger went away",
        }
    }
}

/// A client's place at a container's streams. Closing all of its descriptors
/// detaches.
///
/// All are pipes, with a terminal too; close-on-exec and blocking.
pub struct AttachSession {
    /// To the container's stdin or terminal. Closing it ends the container's
    /// input only with `stdin_once`. EPIPE when the container takes no input.
    pub stdin: Option<OwnedFd>,
    /// What it writes to stdout, or to its terminal. Ends with the session.
    pub stdout: Option<OwnedFd>,
    /// What it writes to stderr; `None` with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The container has a terminal: everything comes from `stdout`, and
    /// resizing works.
    pub tty: bool,
    control: AttachControl,
}

/// What can be done to an attached client's session; cheap to clone.
#[derive(Clone)]
pub struct AttachControl {
    monitor: Arc<Monitor>,
    container_id: String,
    attach_id: String,
    ended: Shared<oneshot::Receiver<monitor_v1::Detached>>,
}

impl AttachSession {
    /// To resize and wait from elsewhere.
    pub fn control(&self) -> AttachControl {
        self.control.clone()
    }

    /// As [`AttachControl::resize`].
    ///
    /// # Errors
    /// As there.
    pub async fn resize(&self, width: u32, height: u32) -> Result<()> {
        self.control.resize(width, height).await
    }

    /// As [`AttachControl::ended`].
    pub async fn ended(&self) -> AttachEnd {
        self.control.ended().await
    }
}

impl AttachControl {
    /// Sets the size of the container's terminal in characters.
    ///
    /// # Errors
    /// `Invalid` where it has no terminal; `WrongState` when it has ended.
    pub async fn resize(&self, width: u32, height: u32) -> Result<()> {
        let resize = monitor_v1::ResizeTty {
            container_id: self.container_id.clone(),
            exec_id: String::new(),
            width,
            height,
        };
        resize_tty(&self.monitor, resize).await
    }

    /// Waits until the client is attached no longer, and says why. What was
    /// passed on before may still be in the pipes.
    pub async fn ended(&self) -> AttachEnd {
        match self.ended.clone().await.map(|detached| detached.reason()) {
            Ok(Reason::Ended) => AttachEnd::ContainerEnded,
            Ok(Reason::HungUp) => AttachEnd::HungUp,
            Ok(Reason::TooSlow) => AttachEnd::TooSlow,
            Ok(Reason::Lost) | Err(_) => AttachEnd::Lost,
        }
    }
}

pub(super) async fn resize_tty(monitor: &Monitor, resize: monitor_v1::ResizeTty) -> Result<()> {
    const ENOTTY: i32 = 25;
    let told = monitor
        .tell(request::Body::ResizeTty(resize), Vec::new())
        .await;
    told.map_err(|error| {
        let kind = match &error {
            MonitorError::Refused { errno: ENOTTY, .. } => Kind::Invalid,
            MonitorError::Refused {
                not_found: true, ..
            } => Kind::WrongState,
            _ => Kind::Internal,
        };
        SandboxError::caused(kind, "cannot resize the terminal", error)
    })
}

impl Sandboxes {
    /// Attaches a client to a running container.
    ///
    /// # Errors
    /// `ContainerNotFound`; `WrongState` when it does not run; `Invalid` when no
    /// stream is asked for; `Unsupported` where the pod's monitor was started by
    /// a Berth that could not do this.
    pub async fn attach_session(&self, id: &str, attach: AttachRequest) -> Result<AttachSession> {
        let container = self.0.container(id)?;
        let me = self.0.clone();
        // Half a frame to the monitor would be the end of the connection.
        let work = async move { me.attach_session(&container, attach).await };
        tokio::spawn(work)
            .await
            .map_err(internal("attaching broke off"))?
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Inner {
    async fn attach_session(
        self: &Arc<Self>,
        container: &Arc<ContainerRecord>,
        attach: AttachRequest,
    ) -> Result<AttachSession> {
        if !container.state.is_live() {
            let text = format!("container {} does not run", container.id);
            return Err(SandboxError::new(Kind::WrongState, text));
        }
        let tty = container.spec.tty;
        // With a terminal there is one output, whichever was asked for.
        let (stdout, stderr) = if tty {
            (attach.stdout || attach.stderr, false)
        } else {
            (attach.stdout, attach.stderr)
        };
        if !(attach.stdin || stdout || stderr) {
            let text = "none of stdin, stdout and stderr is asked for";
            return Err(SandboxError::new(Kind::Invalid, text));
        }
        let monitor = self.monitor(&container.pod)?;
        if monitor.hello.features & feature::ATTACH == 0 {
            let text = format!(
                "the monitor of pod sandbox {} is of version {} and cannot attach: \
                 pods made before the upgrade have to be made again for that",
                container.pod, monitor.hello.version
            );
            return Err(SandboxError::new(Kind::Unsupported, text));
        }
        let streams = Streams::make(attach.stdin, stdout, stderr)?;
        let attach_id = format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let message = monitor_v1::Attach {
            container_id: container.id.to_string(),
            attach_id: attach_id.clone(),
            stdin_fd: streams.index[0],
            stdout_fd: streams.index[1],
            stderr_fd: streams.index[2],
        };
        let ended = monitor.expect_attach(&attach_id).shared();
        let [stdin, stdout, stderr] = streams.ours;
        let session = AttachSession {
            stdin,
            stdout,
            stderr,
            tty,
            control: AttachControl {
                monitor: monitor.clone(),
                container_id: container.id.to_string(),
                attach_id,
                ended,
            },
        };
        let told = monitor.tell(request::Body::Attach(message), streams.theirs);
        told.await.map_err(|error| {
            const ESRCH: i32 = 3;
            monitor.forget_attach(&session.control.attach_id);
            let kind = match &error {
                MonitorError::Refused { errno: ESRCH, .. }
                | MonitorError::Refused {
                    not_found: true, ..
                } => Kind::WrongState,
                _ => Kind::Internal,
            };
            let text = format!("cannot attach to container {}", container.id);
            SandboxError::caused(kind, text, error)
        })?;
        Ok(session)
    }
}
