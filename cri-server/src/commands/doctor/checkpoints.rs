//! Whether containers can be checkpointed here.

use super::{Finding, Node};
use berth_sandbox::checkpoint::criu::{Criu, CriuError};

/// CRIU is a program of others, and nothing else needs it: what it lacks is no problem.
pub fn criu(_: &Node<'_>) -> Vec<Finding> {
    const SUBJECT: &str = "checkpoints";
    vec![match Criu::usable() {
        Ok(criu) => {
            let (major, minor) = criu.version;
            Finding::good(
                SUBJECT,
                format!("CRIU {major}.{minor} works on this kernel"),
            )
        }
        Err(error) => {
            let advice = match &error {
                CriuError::Absent => "install criu, or do without checkpoints",
                CriuError::NoProgram { .. } => "install it, or do without checkpoints",
                CriuError::Version { .. } | CriuError::Check { .. } => {
                    "install a CRIU that is made for this kernel, or do without checkpoints"
                }
                CriuError::Run { .. } | CriuError::Late { .. } => {
                    "see why it does not run, or do without checkpoints"
                }
            };
            Finding::warning(SUBJECT, crate::rpc::chain(&error), advice)
        }
    }]
}
