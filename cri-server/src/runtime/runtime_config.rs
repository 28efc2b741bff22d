//! RuntimeConfig: what the kubelet must do the same way.

use crate::daemon::Daemon;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::cgroup::Driver;

/// The cgroup driver, as found out at start.
pub fn runtime_config(daemon: &Daemon) -> cri::RuntimeConfigResponse {
    let driver = match daemon.sandboxes.cgroups().driver() {
        Driver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        Driver::Systemd => cri::CgroupDriver::Systemd,
    };
    let linux = cri::LinuxRuntimeConfiguration {
        cgroup_driver: driver.into(),
    };
    cri::RuntimeConfigResponse { linux: Some(linux) }
}
