//! RemoveImage: the image goes with all its names.

use crate::convert::{Field, image};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// An image that is gone counts as removed.
pub async fn remove_image(
    daemon: Arc<Daemon>,
    request: cri::RemoveImageRequest,
) -> Result<cri::RemoveImageResponse, Status> {
    let name = image::name(&Field::root("image"), request.image.as_ref())?;
    match daemon.images.service().remove(name).await {
        Ok(_) => Ok(cri::RemoveImageResponse {}),
        Err(error) => Err(Status::internal(rpc::chain(&error))),
    }
}
