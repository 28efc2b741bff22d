//! PullImage: an image from a registry, whole or not at all.

use crate::convert::{Field, image};
use crate::daemon::Daemon;
use crate::rpc;
use berth_image_service::auth::Credentials;
use berth_image_service::pull::PullError;
use berth_image_service::registry::RegistryError;
use berth_proto::runtime_v1 as cri;
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
            Err(status(&error))
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

/// What the registry's answer is in gRPC's terms.
fn registry_code(error: &RegistryError) -> Code {
    match error {
        RegistryError::NotFound { .. } => Code::NotFound,
        RegistryError::Unauthorized { .. } => Code::Unauthenticated,
        RegistryError::Denied { .. } => Code::PermissionDenied,
        RegistryError::TooManyRequests { .. } => Code::ResourceExhausted,
        RegistryError::Server { .. }
        | RegistryError::Tls { .. }
        | RegistryError::Unreachable { .. }
        | RegistryError::Stalled { .. } => Code::Unavailable,
        RegistryError::TooLarge { .. } | RegistryError::Length { .. } => Code::DataLoss,
        RegistryError::Status { .. } | RegistryError::Redirect { .. } => Code::Unknown,
        RegistryError::Credentials(_) => Code::InvalidArgument,
        RegistryError::NoHost { .. }
        | RegistryError::Hosts { .. }
        | RegistryError::Certificate { .. }
        | RegistryError::Client { .. } => Code::FailedPrecondition,
    }
}

fn status(error: &PullError) -> Status {
    let code = match error {
        PullError::Reference(_) => Code::InvalidArgument,
        PullError::Registry { source, .. } => registry_code(source),
        PullError::Wrong { .. } => Code::DataLoss,
        PullError::Manifest { .. } | PullError::Unpack { .. } => Code::FailedPrecondition,
        PullError::Layers { .. }
        | PullError::Content { .. }
        | PullError::Record { .. }
        | PullError::Aborted { .. } => Code::Internal,
    };
    Status::new(code, rpc::chain(error))
}
