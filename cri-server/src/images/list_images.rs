//! ListImages: all, or the one the filter names.

use super::to_cri;
use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;

/// Sorted by ID.
pub fn list_images(daemon: &Daemon, request: &cri::ListImagesRequest) -> cri::ListImagesResponse {
    let spec = request
        .filter
        .as_ref()
        .and_then(|filter| filter.image.as_ref());
    let images = match spec
        .map(|spec| spec.image.as_str())
        .filter(|name| !name.is_empty())
    {
        Some(name) => daemon.images.service().find(name).into_iter().collect(),
        None => daemon.images.service().list(),
    };
    cri::ListImagesResponse {
        images: images.iter().map(|image| to_cri(image)).collect(),
    }
}
