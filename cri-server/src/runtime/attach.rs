//! Attach: a URL at which a client joins the streams of a running container.

use super::exec::{check, no_token, running};
use super::find;
use crate::daemon::Daemon;
use crate::streaming::{Errand, Job, Wanted};
use berth_proto::runtime_v1 as cri;
use tonic::Status;

/// The client is attached when it comes to the URL.
pub fn attach(
    daemon: &Daemon,
    request: &cri::AttachRequest,
) -> Result<cri::AttachResponse, Status> {
    let found = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    let wanted = Wanted {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        tty: request.tty,
    };
    check(wanted)?;
    running(&found)?;
    let container = found.id.to_string();
    let errand = Errand::Command(Job::Attach { container }, wanted);
    let url = daemon
        .streaming
        .url(errand)
        .map_err(|error| no_token(&error))?;
    Ok(cri::AttachResponse { url })
}
