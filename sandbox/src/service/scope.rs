//! The process that holds a container's scope open until its init is in there:
//! only with the systemd cgroup driver, see `cgroup::systemd`.

use super::{Inner, internal};
use crate::cgroup::{DeviceRule, Driver};
use crate::container::ContainerRecord;
use crate::error::Result;
use std::process::{Child, Stdio};

/// Holds a scope; it ends when this is dropped, and by itself when the daemon ends.
pub(super) struct Held(Option<Child>);

impl Held {
    /// Nothing to hold.
    pub(super) const NOTHING: Held = Held(None);
}

impl Inner {
    /// Makes the container's scope, limits it and holds it. Without systemd there is nothing
    /// to hold. Blocking.
    pub(super) fn hold_scope(
        &self,
        container: &ContainerRecord,
        devices: &[DeviceRule],
    ) -> Result<Held> {
        let cgroup = match &container.cgroup {
            Some(cgroup) if self.cgroups.driver() == Driver::Systemd => cgroup,
            Some(_) | None => return Ok(Held(None)),
        };
        let holder = self
            .program
            .command()
            .arg("--hold")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(internal("cannot start the holder of a scope"))?;
        let pid = holder.id();
        let held = Held(Some(holder));
        self.cgroups
            .open_scope(cgroup, pid, &container.spec.resources, devices)
            .map_err(internal(format!(
                "cannot make the cgroup of container {}",
                container.id
            )))?;
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(mut holder) = self.0.take() else {
            return;
        };
        // It has ended already where this fails.
        let _ = holder.kill();
        let mut wait = move || {
            let _ = holder.wait();
        };
        // Waiting takes a moment in which nobody else shall have to.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(wait)),
            Err(_) => wait(),
        }
    }
}
