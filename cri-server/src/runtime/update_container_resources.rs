//! UpdateContainerResources: new limits for a container, all or none of them.

use super::find;
use crate::convert::{Field, resources};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// What is not given stays as it is; devices always do.
pub async fn update_container_resources(
    daemon: Arc<Daemon>,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, Status> {
    let container = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    if request.windows.is_some() {
        let field = Field::root("windows");
        return Err(field.invalid("is given, but this node runs Linux").into());
    }
    if let Some(linux) = &request.linux {
        let given = resources::resources(&Field::root("linux"), linux)?;
        daemon
            .sandboxes
            .update_container_resources(container.id.as_str(), given)
            .await
            .map_err(|error| rpc::status(&error))?;
    }
    Ok(cri::UpdateContainerResourcesResponse {})
}
