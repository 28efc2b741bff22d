//! Version: who answers here.

use berth_proto::runtime_v1 as cri;

/// What `kubectl get nodes -o wide` and `crictl version` show.
pub fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        // The kubelet API's version, fixed since the beginning of CRI.
        version: "0.1.0".into(),
        runtime_name: "berth".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: "v1".into(),
    }
}
