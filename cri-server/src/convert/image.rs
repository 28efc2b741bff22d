//! CRI's ImageSpec, both ways.

use super::field::{Field, Quoted, Result};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container_spec::ImageRequest;

/// Longest reference, in bytes: far above any registry's own bound.
const REFERENCE_BYTES: usize = 4096;

/// The reference or ID in an ImageSpec; what it means is up to the image service.
pub fn name<'a>(field: &Field<'_>, spec: Option<&'a cri::ImageSpec>) -> Result<&'a str> {
    let image = spec.map(|spec| spec.image.as_str()).unwrap_or_default();
    let field = field.at("image");
    if image.is_empty() {
        return Err(field.invalid("must not be empty"));
    }
    if image.len() > REFERENCE_BYTES || image.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(field.invalid(format!("{} is not an image", Quoted(image))));
    }
    Ok(image)
}

/// A container's image as asked for.
pub fn request(field: &Field<'_>, spec: &cri::ImageSpec) -> Result<ImageRequest> {
    Ok(ImageRequest {
        image: name(field, Some(spec))?.to_owned(),
        user_specified_image: spec.user_specified_image.clone(),
        runtime_handler: spec.runtime_handler.clone(),
        annotations: spec.annotations.clone().into_iter().collect(),
    })
}

/// A container's image as CRI shows it.
pub fn to_cri(request: &ImageRequest) -> cri::ImageSpec {
    cri::ImageSpec {
        image: request.image.clone(),
        annotations: request.annotations.clone().into_iter().collect(),
        user_specified_image: request.user_specified_image.clone(),
        runtime_handler: request.runtime_handler.clone(),
        image_ref: String::new(),
    }
}
