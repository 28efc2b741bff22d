//! The process that holds a container's scope open until its init is in there:
//! only with the systemd cgroup driver, see `cgroup::systemd`.

use super::{Inner, internal};
use crate::cgroup::{Cgroup, Cgroups, DeviceRule, Driver, Entered};
use crate::container::ContainerRecord;
use crate::error::Result;
use std::process::{Child, Stdio};
use std::sync::Arc;

/// Holds a scope; it ends when this is dropped, and by itself when the daemon ends.
#[derive(Default)]
pub(super) struct Held {
    holder: Option<Child>,
    _slice: Option<Entered>,
}

impl Held {
    /// Holds the slice of a container, in which an OCI runtime is about to make the scope.
    pub(super) fn slice_of(cgroups: &Arc<Cgroups>, cgroup: &Cgroup) -> Held {
        Held {
            holder: None,
            _slice: Some(cgroups.enter_slice(cgroup)),
        }
    }
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
            Some(_) | None => return Ok(Held::default()),
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
        let held = Held {
            holder: Some(holder),
            _slice: None,
        };
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
        let Some(mut holder) = self.holder.take() else {
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
