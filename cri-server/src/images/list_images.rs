//! ListImages and StreamImages: all, or the one the filter names.

use super::to_cri;
use crate::daemon::Daemon;
use crate::runtime::chunks::{Pieces, pieces};
use berth_proto::runtime_v1 as cri;

/// Sorted by ID.
pub fn list_images(daemon: &Daemon, request: &cri::ListImagesRequest) -> cri::ListImagesResponse {
    cri::ListImagesResponse {
        images: filtered(daemon, request.filter.as_ref()),
    }
}

/// The same in pieces.
pub fn stream_images(
    daemon: &Daemon,
    request: &cri::StreamImagesRequest,
) -> Pieces<cri::StreamImagesResponse> {
    let images = filtered(daemon, request.filter.as_ref());
    pieces(images, |images| cri::StreamImagesResponse { images })
}

fn filtered(daemon: &Daemon, filter: Option<&cri::ImageFilter>) -> Vec<cri::Image> {
    let name = filter
        .and_then(|filter| filter.image.as_ref())
        .map(|spec| spec.image.as_str())
        .filter(|name| !name.is_empty());
    let images = match name {
        Some(name) => daemon.images.service().find(name).into_iter().collect(),
        None => daemon.images.service().list(),
    };
    images.iter().map(|image| to_cri(image)).collect()
}
