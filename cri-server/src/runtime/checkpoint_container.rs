//! CheckpointContainer: what has to be there for it, told one by one.

use super::find;
use crate::daemon::Daemon;
use crate::rpc::not_yet;
use berth_proto::runtime_v1 as cri;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::process::Command;
use tonic::Status;

/// How long `criu check` may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// FAILED_PRECONDITION where the container does not run, CRIU is not installed
/// or does not work on this kernel; UNIMPLEMENTED where all that is there, as
/// the images themselves are not made yet.
pub async fn checkpoint_container(
    daemon: Arc<Daemon>,
    request: cri::CheckpointContainerRequest,
) -> Result<cri::CheckpointContainerResponse, Status> {
    let container = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    if container.state.pid().is_none() {
        let text = format!("container {} does not run", container.id);
        return Err(Status::failed_precondition(text));
    }
    if !Path::new(&request.location).is_absolute() {
        let text = format!("location {:?} is no absolute path", request.location);
        return Err(Status::invalid_argument(text));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join("criu"));
    let Some(criu) = places.find(|place| place.is_file()) else {
        let text = "a checkpoint needs CRIU: there is no program criu in PATH";
        return Err(Status::failed_precondition(text));
    };
    check(&criu).await?;
    Err(not_yet("CheckpointContainer"))
}

/// What CRIU says of this kernel.
async fn check(criu: &PathBuf) -> Result<(), Status> {
    let asked = Command::new(criu)
        .arg("check")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let answer = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) if answer.status.success() => return Ok(()),
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            let text = format!("cannot run {}: {error}", criu.display());
            return Err(Status::failed_precondition(text));
        }
        Err(_) => {
            let text = format!("{} check does not end", criu.display());
            return Err(Status::failed_precondition(text));
        }
    };
    let said = String::from_utf8_lossy(&answer.stderr);
    let why = said.lines().rfind(|line| !line.trim().is_empty());
    Err(Status::failed_precondition(format!(
        "CRIU does not work on this kernel: criu check: {}",
        why.unwrap_or("it fails without a word")
    )))
}
