//! UpdateContainerResources: new limits for a container. Not there yet; what is
//! asked for is checked all the same.

use super::find;
use crate::convert::{Field, resources};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tonic::Status;

/// UNIMPLEMENTED, after the request's own mistakes.
pub async fn update_container_resources(
    daemon: Arc<Daemon>,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, Status> {
    find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    if request.windows.is_some() {
        let field = Field::root("windows");
        return Err(field.invalid("is given, but this node runs Linux").into());
    }
    if let Some(linux) = &request.linux {
        resources::resources(&Field::root("linux"), linux)?;
    }
    Err(rpc::not_yet("UpdateContainerResources"))
}
