//! PortForward: a URL at which connections to a pod's ports can be made.

use super::exec::no_token;
use super::find;
use crate::convert::Field;
use crate::daemon::Daemon;
use crate::rpc;
use crate::streaming::{Errand, MAX_PORTS};
use berth_proto::runtime_v1 as cri;
use tonic::Status;

/// Ports are dialled as the client asks for them; those of the request are for clients
/// that cannot ask (channels over WebSocket).
pub fn port_forward(
    daemon: &Daemon,
    request: &cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, Status> {
    let pod = find::pod_record(&daemon.sandboxes.view(), &request.pod_sandbox_id)?;
    let field = Field::root("port");
    if request.port.len() > MAX_PORTS {
        return Err(field.invalid(format!("at most {MAX_PORTS} ports")).into());
    }
    let mut ports = Vec::with_capacity(request.port.len());
    for (at, &port) in request.port.iter().enumerate() {
        let number = u16::try_from(port).ok().filter(|port| *port != 0);
        let invalid = || field.index(at).invalid(format!("{port} is not a port"));
        ports.push(number.ok_or_else(invalid)?);
    }
    let pod = pod.id.to_string();
    // A pod that is not ready has no network to dial into.
    let network = daemon.sandboxes.pod_network(&pod);
    network.map_err(|error| rpc::status(&error))?;
    let errand = Errand::PortForward { pod, ports };
    let url = daemon
        .streaming
        .url(errand)
        .map_err(|error| no_token(&error))?;
    Ok(cri::PortForwardResponse { url })
}
