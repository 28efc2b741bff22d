//! What can go wrong with a pod or a container, in kinds a caller can act on.
//!
//! The text names attempt and object; the cause is [`std::error::Error::source`].
//! Errors are cheap to clone because one outcome may go to several callers that
//! joined the same operation.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What a caller may want to tell apart; `cri-server` picks the gRPC code by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No sandbox of that ID.
    PodNotFound,
    /// No container of that ID.
    ContainerNotFound,
    /// The request can never succeed as it is.
    Invalid,
    /// The object is not in a state that allows this.
    WrongState,
    /// The time given has passed.
    DeadlineExceeded,
    /// Something that Berth, this kernel or this node does not do.
    Unsupported,
    /// A file or program the request names is not there (in the image, on the host).
    Missing,
    /// The kernel, the disk, the network or the monitor refused.
    Internal,
}

/// Why an operation on a pod or container failed.
#[derive(Clone)]
pub struct SandboxError {
    kind: Kind,
    message: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl SandboxError {
    /// An error without a cause of its own.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// An error caused by another one.
    pub fn caused(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            source: Some(Arc::from(source.into())),
        }
    }

    /// What a caller may want to tell apart.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The message and every cause below it, joined by ": ".
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }

    pub(crate) fn no_pod(id: &str) -> Self {
        Self::new(Kind::PodNotFound, format!("no pod sandbox {}", clip(id)))
    }

    pub(crate) fn no_container(id: &str) -> Self {
        Self::new(
            Kind::ContainerNotFound,
            format!("no container {}", clip(id)),
        )
    }
}

/// At most 80 characters: what strangers send may be megabytes long.
fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

impl fmt::Display for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.chain())
    }
}

impl Error for SandboxError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source
            .as_deref()
            .map(|error| error as &(dyn Error + 'static))
    }
}

/// What this crate's calls return.
pub type Result<T> = std::result::Result<T, SandboxError>;
