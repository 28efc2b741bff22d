//! Layers written in a cgroup of their own: the image service's writers, put where the sandbox
//! service's cgroups say.

use crate::config::Config;
use crate::serve::{ServeError, start};
use berth_image_service::unpack::apart::{self, Place, PlaceError, Writers};
use berth_sandbox::cgroup::{Cgroups, PullCgroup, PullSettings};
use rustix::fs::{Mode, OFlags};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

/// The command that a writer is, which nobody else calls.
pub const COMMAND: &str = "write-layer";

#[derive(Debug)]
struct InCgroup(PullCgroup);

impl Place for InCgroup {
    fn admit(&self, pid: u32) -> Result<Vec<PathBuf>, PlaceError> {
        Ok(self.0.admit(pid)?)
    }
}

/// What the configuration says of it; `None` where the daemon writes layers itself.
pub fn settings(config: &Config) -> Option<PullSettings> {
    let path = config.images.pull_cgroup.clone();
    (!path.is_empty()).then_some(PullSettings {
        path,
        io_weight: config.images.pull_io_weight,
    })
}

/// Makes the cgroup, says once what it cannot do here, and gives what starts writers in it.
///
/// # Errors
/// There can be no such cgroup: layers would be written where they were not to be.
pub async fn writers(
    config: &Config,
    cgroups: &Arc<Cgroups>,
) -> Result<Option<Arc<Writers>>, ServeError> {
    let Some(settings) = settings(config) else {
        return Ok(None);
    };
    let cgroups = cgroups.clone();
    let made = tokio::task::spawn_blocking(move || {
        let cgroup = PullCgroup::new(cgroups, &settings)?;
        let shortcomings = cgroup.make()?;
        Ok((cgroup, shortcomings))
    });
    let (cgroup, shortcomings) = made
        .await
        .map_err(start("make the cgroup for pulls"))?
        .map_err(ServeError::PullCgroup)?;
    let io_weight = config.images.pull_io_weight;
    tracing::info!(
        cgroup = cgroup.path(),
        io_weight,
        "layers are written in a cgroup of their own"
    );
    for shortcoming in &shortcomings {
        tracing::warn!(
            cgroup = cgroup.path(),
            "images.pull_cgroup does less than it says: {shortcoming}"
        );
    }
    let program = rustix::fs::open(
        "/proc/self/exe",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(start("open this program to run it"))?;
    Ok(Some(Arc::new(Writers::new(
        program,
        vec![COMMAND.into()],
        Arc::new(InCgroup(cgroup)),
    ))))
}

/// Runs `berth write-layer`: one layer, ordered by the daemon at the other end of standard input.
pub fn write_layer() -> Result<(), Box<dyn Error + Send + Sync>> {
    let daemon = berth_sys::fd::inherited(0)?;
    Ok(apart::serve(daemon)?)
}
