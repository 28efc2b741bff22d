//! CreateContainer: everything of a container but its first process.

use super::{find, image_policy};
use crate::convert::{self, Field, image};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// A repeated call for the same name and attempt joins the running one, or gives
/// the container that is there; the first call's configuration counts.
pub async fn create_container(
    daemon: Arc<Daemon>,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, Status> {
    let pod = find::pod_record(&daemon.sandboxes.view(), &request.pod_sandbox_id)?;
    let mut spec = convert::container_spec(request.config.as_ref(), &pod.spec, &daemon.facts)?;
    let given = request
        .config
        .as_ref()
        .and_then(|config| config.image.as_ref());
    let config = Field::root("config");
    let name = image::name(&config.at("image"), given)?;
    let find = |name: &str| {
        daemon.images.container_image(name).ok_or_else(|| {
            let name = convert::field::Quoted(name);
            Status::not_found(format!("image {name} is not on this node"))
        })
    };
    let image = find(name)?;
    let volumes = request.config.iter().flat_map(|config| &config.mounts);
    let volumes = volumes.filter_map(|mount| mount.image.as_ref());
    image_policy::check(&daemon, given.into_iter().chain(volumes)).await?;
    for mount in &mut spec.mounts {
        if let Some(wanted) = &mount.image {
            mount.image_id = find(&wanted.image)?.id;
        }
    }
    let id = daemon
        .sandboxes
        .create_container(pod.id.as_str(), spec, image)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::CreateContainerResponse {
        container_id: id.to_string(),
    })
}
