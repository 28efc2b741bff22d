//! PullImage: an image from a registry, whole or not at all.

use crate::convert::{Field, image};
use crate::daemon::Daemon;
use crate::rpc;
use berth_image_service::auth::Credentials;
use berth_image_service::disk;
use berth_image_service::pull::{Kind, PullError};
use berth_proto::runtime_v1 as cri;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tonic::{Code, Status};

/// The answer's reference is the image's ID, as in every other message.
pub async fn pull_image(
    daemon: Arc<Daemon>,
    request: cri::PullImageRequest,
) -> Result<cri::PullImageResponse, Status> {
    let name = image::name(&Field::root("image"), request.image.as_ref())?.to_owned();
    let credentials = request
        .auth
        .map(credentials)
        .filter(|given| *given != Credentials::default());
    let begun = Instant::now();
    let outcome = daemon.images.pull(&name, credentials).await;
    match outcome {
        Ok((pulled, first)) => {
            // A pull that several waited for is counted once.
            let bytes = if first { pulled.bytes } else { 0 };
            daemon.metrics.pull(begun.elapsed(), bytes, true);
            tracing::info!(image = %name, id = %pulled.image_id, took = ?begun.elapsed(), "pulled");
            Ok(cri::PullImageResponse {
                image_ref: pulled.image_id,
            })
        }
        Err(error) => {
            daemon.metrics.pull(begun.elapsed(), 0, false);
            Err(status(&error, daemon.images.service().dir()))
        }
    }
}

fn credentials(auth: cri::AuthConfig) -> Credentials {
    Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}

/// What the kubelet recognises at the beginning of a message and shows as the reason; only
/// under the code UNKNOWN, of which it takes the code away. Source: k8s.io/cri-api
/// `pkg/errors`; kubelet `remote_image.go`, `image_manager.go`.
const REGISTRY_UNAVAILABLE: &str = "RegistryUnavailable";
/// The same, of an image that the policy does not accept.
pub const SIGNATURE_VALIDATION_FAILED: &str = "SignatureValidationFailed";

fn status(error: &PullError, lib: &Path) -> Status {
    let chain = rpc::chain(error);
    if disk::is_full(error) {
        let full = disk::describe(lib);
        return Status::resource_exhausted(format!("{chain}; {full}"));
    }
    let (code, prefix) = match error.kind() {
        Kind::Invalid => (Code::InvalidArgument, None),
        Kind::NotFound => (Code::NotFound, None),
        Kind::Unauthorized => (Code::Unauthenticated, None),
        Kind::Denied => (Code::PermissionDenied, None),
        Kind::TooManyRequests | Kind::Unavailable => (Code::Unknown, Some(REGISTRY_UNAVAILABLE)),
        Kind::Untrusted => (Code::Unknown, Some(SIGNATURE_VALIDATION_FAILED)),
        Kind::Configuration => (Code::FailedPrecondition, None),
        Kind::BadImage => (bad_image_code(error), None),
        Kind::Local => (Code::Internal, None),
    };
    match prefix {
        Some(prefix) => Status::new(code, format!("{prefix}: {chain}")),
        None => Status::new(code, chain),
    }
}

/// DATA_LOSS for bytes that are not what their digest or length says, FAILED_PRECONDITION for an
/// image that is what it says and cannot be used.
fn bad_image_code(error: &PullError) -> Code {
    match error {
        PullError::Registry { .. } | PullError::Wrong { .. } => Code::DataLoss,
        _ => Code::FailedPrecondition,
    }
}
