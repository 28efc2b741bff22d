//! How a pull may fail, and whose fault that is.

use crate::content::{BadBlob, ContentError};
use crate::digest::Digest;
use crate::layer::StoreError;
use crate::manifest::ManifestError;
use crate::policy::PolicyError;
use crate::reference::BadReference;
use crate::registry::RegistryError;
use crate::sources::SourcesError;
use crate::unpack::UnpackError;
use berth_store::RecordError;
use std::error::Error as StdError;
use std::fmt;

/// Why an image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The reference is none.
    #[error("cannot pull the image")]
    Reference(#[from] BadReference),
    /// No host gave what was asked for; this is the last one's reason.
    #[error("cannot get the {what} of {image}{earlier}")]
    Registry {
        /// "manifest", "config", "layer sha256:...".
        what: String,
        /// The reference.
        image: String,
        /// What the hosts before it said.
        earlier: Earlier,
        /// What the last host said.
        source: Box<RegistryError>,
    },
    /// A host gave something else than what was asked for.
    #[error("the {what} of {image} from {host} is wrong{earlier}")]
    Wrong {
        /// "manifest", "config", "layer sha256:...".
        what: String,
        /// The reference.
        image: String,
        /// Who sent it.
        host: String,
        /// What the hosts before it said.
        earlier: Earlier,
        /// What is wrong.
        source: BadBlob,
    },
    /// The manifest, index or config is not one we can use.
    #[error("{image} cannot be used")]
    Manifest {
        /// The reference.
        image: String,
        /// Why.
        source: ManifestError,
    },
    /// A layer could not be unpacked.
    #[error("layer {layer} of {image} cannot be unpacked")]
    Unpack {
        /// The reference.
        image: String,
        /// Digest of the layer as it is sent.
        layer: Digest,
        /// Why.
        source: UnpackError,
    },
    /// The store of layers.
    #[error("cannot store the layers of {image}")]
    Layers {
        /// The reference.
        image: String,
        /// Why.
        source: StoreError,
    },
    /// Manifests and configs could not be stored.
    #[error("cannot store the manifests of {image}")]
    Content {
        /// The reference.
        image: String,
        /// Why.
        source: ContentError,
    },
    /// The image's record could not be written.
    #[error("cannot record {image}")]
    Record {
        /// The reference.
        image: String,
        /// Why.
        source: RecordError,
    },
    /// This node's policy does not accept it.
    #[error("{image} is not accepted")]
    Policy {
        /// The reference.
        image: String,
        /// Why not.
        source: Box<PolicyError>,
    },
    /// The pull ended without a result: a bug, or the daemon is going down.
    #[error("the pull of {image} was broken off")]
    Aborted {
        /// The reference.
        image: String,
    },
}

/// What kind of failure a pull ended with, for the caller's own codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked for is malformed: the reference or the credentials.
    Invalid,
    /// The registry does not have it.
    NotFound,
    /// Credentials are missing or wrong.
    Unauthorized,
    /// Credentials do not allow it.
    Denied,
    /// The registry asks for patience.
    TooManyRequests,
    /// The registry cannot be reached or fails.
    Unavailable,
    /// The configuration of the registry, or of this node's trust in it.
    Configuration,
    /// What came is not what was asked for, or not an image we can use.
    BadImage,
    /// The policy does not accept it: it is rejected, or has no valid signature.
    Untrusted,
    /// This node could not store it.
    Local,
}

fn registry_kind(error: &RegistryError) -> Kind {
    match error {
        RegistryError::Credentials(_) => Kind::Invalid,
        RegistryError::NotFound { .. } => Kind::NotFound,
        // A token service in trouble says nothing about the credentials.
        RegistryError::Unauthorized { .. } if error.is_transient() => Kind::Unavailable,
        RegistryError::Unauthorized { .. } => Kind::Unauthorized,
        RegistryError::Denied { .. } => Kind::Denied,
        RegistryError::TooManyRequests { .. } => Kind::TooManyRequests,
        RegistryError::Server { .. }
        | RegistryError::Status { .. }
        | RegistryError::Tls { .. }
        | RegistryError::Unreachable { .. }
        | RegistryError::Stalled { .. }
        | RegistryError::Slow { .. }
        | RegistryError::Range { .. }
        | RegistryError::Redirect { .. } => Kind::Unavailable,
        RegistryError::TooLarge { .. } | RegistryError::Length { .. } => Kind::BadImage,
        RegistryError::Sources(SourcesError::Name(_)) => Kind::Invalid,
        RegistryError::NoHost { .. }
        | RegistryError::Sources(_)
        | RegistryError::Certificate { .. }
        | RegistryError::Client { .. } => Kind::Configuration,
    }
}

pub(crate) fn unpack_kind(error: &UnpackError) -> Kind {
    match error {
        UnpackError::Read { .. }
        | UnpackError::Decompress { .. }
        | UnpackError::NoFormat { .. }
        | UnpackError::TrailingBytes { .. }
        | UnpackError::Truncated { .. }
        | UnpackError::TooLarge { .. }
        | UnpackError::Header { .. }
        | UnpackError::Path { .. }
        | UnpackError::LinkTarget { .. }
        | UnpackError::Xattr { .. }
        | UnpackError::Unsupported { .. }
        | UnpackError::LeansOnParents
        | UnpackError::DiffId { .. } => Kind::BadImage,
        UnpackError::Entry { .. }
        | UnpackError::Store { .. }
        | UnpackError::Record { .. }
        | UnpackError::Parents { .. }
        | UnpackError::Apart { .. } => Kind::Local,
    }
}

impl PullError {
    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        match self {
            PullError::Reference(_) => Kind::Invalid,
            PullError::Registry { source, .. } => registry_kind(source),
            PullError::Wrong { .. } | PullError::Manifest { .. } => Kind::BadImage,
            PullError::Unpack { source, .. } => unpack_kind(source),
            PullError::Policy { source, .. } => source.kind(),
            PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Aborted { .. } => Kind::Local,
        }
    }

    pub(crate) fn from_registry(what: &str, image: &str, source: RegistryError) -> PullError {
        PullError::Registry {
            what: what.into(),
            image: image.into(),
            earlier: Earlier::default(),
            source: Box::new(source),
        }
    }

    /// What the registry said, where it is the registry that refused.
    pub fn registry(&self) -> Option<&RegistryError> {
        match self {
            PullError::Registry { source, .. } => Some(source),
            PullError::Reference(_)
            | PullError::Wrong { .. }
            | PullError::Manifest { .. }
            | PullError::Unpack { .. }
            | PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Policy { .. }
            | PullError::Aborted { .. } => None,
        }
    }

    /// True when another host may do better.
    pub(crate) fn is_the_hosts(&self) -> bool {
        matches!(self, PullError::Registry { .. } | PullError::Wrong { .. })
    }
}

/// What the hosts tried before the last one said, for the message.
#[derive(Debug, Default)]
pub struct Earlier(pub(crate) Vec<String>);

impl fmt::Display for Earlier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for said in &self.0 {
            write!(f, "; before that: {said}")?;
        }
        Ok(())
    }
}

impl Earlier {
    /// Remembers why a host was passed over, and puts all of them into the last one's error.
    pub(crate) fn note(&mut self, error: &PullError) {
        tracing::info!(error = error as &dyn StdError, "trying the next host");
        let cause = error.source().map(ToString::to_string);
        self.0.push(cause.unwrap_or_else(|| error.to_string()));
    }

    pub(crate) fn into_error(self, mut error: PullError) -> PullError {
        match &mut error {
            PullError::Registry { earlier, .. } | PullError::Wrong { earlier, .. } => {
                *earlier = self;
            }
            PullError::Reference(_)
            | PullError::Manifest { .. }
            | PullError::Unpack { .. }
            | PullError::Layers { .. }
            | PullError::Content { .. }
            | PullError::Record { .. }
            | PullError::Policy { .. }
            | PullError::Aborted { .. } => {}
        }
        error
    }
}
