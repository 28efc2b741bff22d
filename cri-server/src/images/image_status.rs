//! ImageStatus: one image, or an empty answer where it is not on this node.

use super::to_cri;
use crate::convert::{Field, Refused, image};
use crate::daemon::Daemon;
use berth_image_service::image::Image;
use berth_proto::runtime_v1 as cri;
use serde_json::json;
use std::collections::HashMap;

/// Absence is not an error: the kubelet asks before every pull.
pub fn image_status(
    daemon: &Daemon,
    request: &cri::ImageStatusRequest,
) -> Result<cri::ImageStatusResponse, Refused> {
    let name = image::name(&Field::root("image"), request.image.as_ref())?;
    let Some(image) = daemon.images.service().find(name) else {
        return Ok(cri::ImageStatusResponse::default());
    };
    let info = if request.verbose {
        info(&image)
    } else {
        HashMap::new()
    };
    Ok(cri::ImageStatusResponse {
        image: Some(to_cri(&image)),
        info,
    })
}

/// What `crictl inspecti` prints.
fn info(image: &Image) -> HashMap<String, String> {
    let config = &image.config;
    let info = json!({
        "manifestDigest": image.manifest_digest,
        // The shape of the OCI image config, which readers of this know.
        "imageSpec": {
            "architecture": config.platform.architecture,
            "os": config.platform.os,
            "variant": config.platform.variant,
            "config": {
                "Env": config.env,
                "Entrypoint": config.entrypoint,
                "Cmd": config.cmd,
                "User": config.user,
                "WorkingDir": config.working_dir,
                "StopSignal": config.stop_signal,
                "Volumes": config.volumes,
                "Labels": config.labels,
                "ExposedPorts": config.exposed_ports,
            },
            "rootfs": { "type": "layers", "diff_ids": config.diff_ids },
        },
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}
