//! CheckpointContainer: a running container's memory and files, as an archive.

use super::find;
use crate::convert::Field;
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::path::Path;
use std::sync::Arc;
use tonic::Status;

/// FAILED_PRECONDITION where the container does not run, CRIU is not installed or
/// does not work on this kernel, or the location has no directory; UNIMPLEMENTED
/// for a container that is of a kind without checkpoints; DEADLINE_EXCEEDED.
/// A timeout of 0 is [`berth_sandbox::service::CHECKPOINT_TIMEOUT`].
pub async fn checkpoint_container(
    daemon: Arc<Daemon>,
    request: cri::CheckpointContainerRequest,
) -> Result<cri::CheckpointContainerResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    let timeout = rpc::seconds(&Field::root("timeout"), request.timeout)?;
    let location = Path::new(&request.location);
    if !location.is_absolute() || request.location.contains('\0') {
        let reason = format!("{location:?} is no absolute path");
        return Err(Field::root("location").invalid(reason).into());
    }
    let timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
    daemon
        .sandboxes
        .checkpoint_container(&id, location, timeout)
        .await
        .map_err(|error| rpc::status(&error))?;
    Ok(cri::CheckpointContainerResponse {})
}
