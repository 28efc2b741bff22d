//! ExecSync: a command in a container, its output and its exit code.

use super::find;
use crate::convert::{Field, container};
use crate::daemon::Daemon;
use crate::rpc;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use tokio::sync::oneshot;
use tonic::Status;

/// DEADLINE_EXCEEDED past the timeout; a timeout of 0 is none. Unlike other
/// work the command ends with its caller, which is there as long as `caller`'s
/// sender: nobody else would take the output.
pub async fn exec_sync(
    daemon: Arc<Daemon>,
    request: cri::ExecSyncRequest,
    caller: oneshot::Receiver<()>,
) -> Result<cri::ExecSyncResponse, Status> {
    let id = find::container(&daemon.sandboxes.view(), &request.container_id)?;
    let command = Field::root("cmd");
    if request.cmd.is_empty() {
        return Err(command.invalid("must not be empty").into());
    }
    let words = container::words(&command, &request.cmd)?;
    let timeout = rpc::seconds(&Field::root("timeout"), request.timeout)?;
    let timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
    let output = tokio::select! {
        output = daemon.sandboxes.exec_sync(&id, words, timeout) => output,
        _ = caller => return Err(Status::cancelled("the caller hung up; the command was killed")),
    };
    let output = output.map_err(|error| rpc::status(&error))?;
    Ok(cri::ExecSyncResponse {
        stdout: output.stdout,
        stderr: output.stderr,
        exit_code: output.exit_code,
    })
}
