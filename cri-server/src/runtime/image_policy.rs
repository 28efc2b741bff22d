//! Whether the policy of now accepts an image that is here already: it may have changed since the
//! image was pulled.

use crate::daemon::Daemon;
use crate::images::SIGNATURE_VALIDATION_FAILED;
use crate::rpc;
use berth_image_service::policy::PolicyError;
use berth_image_service::pull::Kind;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::{Code, Status};

/// Checks every image that a container is made of: its own, and those of its volumes.
///
/// # Errors
/// As of a pull: FAILED_PRECONDITION where the policy cannot be used, UNKNOWN with the prefix the
/// kubelet knows where it does not accept the image.
pub async fn check(
    daemon: &Arc<Daemon>,
    images: impl IntoIterator<Item = &cri::ImageSpec>,
) -> Result<(), Status> {
    let asked: Vec<(String, String)> = images
        .into_iter()
        .map(|spec| (spec.user_specified_image.clone(), spec.image.clone()))
        .collect();
    let daemon = daemon.clone();
    let work = move || {
        let service = daemon.images.service();
        for (user, image) in &asked {
            // What is not here is told by whoever needs it.
            if let Some(found) = service.find(image) {
                let asked = [user.as_str(), image.as_str()];
                service
                    .check_use(&found, &asked)
                    .map_err(|error| refused(image, &error))?;
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Status::internal("checking the policy broke off"))?
}

fn refused(image: &str, error: &PolicyError) -> Status {
    let message = format!("image {image} is not accepted: {}", rpc::chain(error));
    if error.kind() == Kind::Untrusted {
        return Status::new(
            Code::Unknown,
            format!("{SIGNATURE_VALIDATION_FAILED}: {message}; if it is signed, pull it again"),
        );
    }
    Status::failed_precondition(message)
}
