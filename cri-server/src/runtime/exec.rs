//! Exec: a URL at which a command is run in a container, with streams.

use super::find;
use crate::convert::{Field, Refused, container};
use crate::daemon::Daemon;
use crate::streaming::{Errand, Job, TokenError, Wanted};
use berth_proto::runtime_v1 as cri;
use berth_sandbox::container::{ContainerRecord, ContainerState};
use tonic::Status;

/// The command is run when a client comes to the URL.
pub fn exec(daemon: &Daemon, request: cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
    let found = find::container_record(&daemon.sandboxes.view(), &request.container_id)?;
    let wanted = Wanted {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        tty: request.tty,
    };
    check(wanted)?;
    let field = Field::root("cmd");
    if request.cmd.is_empty() {
        return Err(field.invalid("must not be empty").into());
    }
    let command = container::words(&field, &request.cmd)?;
    running(&found)?;
    let container = found.id.to_string();
    let errand = Errand::Command(Job::Exec { container, command }, wanted);
    let url = daemon
        .streaming
        .url(errand)
        .map_err(|error| no_token(&error))?;
    Ok(cri::ExecResponse { url })
}

/// What exec and attach have in common. Source: CRI, `ExecRequest`, `AttachRequest`.
pub(super) fn check(wanted: Wanted) -> Result<(), Refused> {
    if wanted.tty && wanted.stderr {
        let problem = "must not be set with tty: a terminal has one output";
        return Err(Field::root("stderr").invalid(problem));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        let problem = "one of stdin, stdout and stderr must be set";
        return Err(Field::root("stdin").invalid(problem));
    }
    Ok(())
}

/// Refuses a container that has no process.
pub(super) fn running(container: &ContainerRecord) -> Result<(), Status> {
    if matches!(container.state, ContainerState::Running { .. }) {
        return Ok(());
    }
    let text = format!("container {} does not run", container.id);
    Err(Status::failed_precondition(text))
}

pub(super) fn no_token(error: &TokenError) -> Status {
    let text = crate::rpc::chain(error);
    match error {
        TokenError::TooMany => Status::resource_exhausted(text),
        TokenError::Random(_) => Status::internal(text),
    }
}
