//! The subnets that this node's pods have their addresses from, as the kubelet
//! says with UpdateRuntimeConfig, and the CNI configuration that may be made of
//! them.
//!
//! ```text
//! DIR/pod-cidr           the subnets: the kubelet says them once
//! CONF/10-berth.conflist the template, rendered
//! ```

use crate::address::IpNet;
use crate::spec::{ConfigError, NetworkList};
use crate::template::{self, TemplateError};
use berth_store::atomic_file::{self, Durability};
use berth_store::{Record, RecordError, record};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The file that a template becomes.
pub const FILE: &str = "10-berth.conflist";

/// Why there is no configuration from the template.
#[derive(Debug, thiserror::Error)]
pub enum PodCidrError {
    /// The subnets.
    #[error("cannot keep the node's pod network")]
    Keep {
        /// Why not.
        source: RecordError,
    },
    /// The template.
    #[error("cannot read the CNI template {path}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The template says what cannot be.
    #[error("the CNI template {path} is wrong")]
    Template {
        /// Its path.
        path: PathBuf,
        /// Where and what.
        source: TemplateError,
    },
    /// What the template becomes is no configuration.
    #[error("the CNI template {path} does not become a CNI configuration")]
    Config {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The result.
    #[error("cannot write {path}")]
    Write {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    subnets: Vec<IpNet>,
}

impl Record for Kept {
    const KIND: &'static str = "pod-cidr";
    const VERSION: u32 = 1;
}

/// The subnets, and the template.
#[derive(Debug)]
pub(crate) struct PodCidr {
    record: PathBuf,
    conf_dir: PathBuf,
    template: Option<PathBuf>,
    subnets: Mutex<Vec<IpNet>>,
}

impl PodCidr {
    /// What an earlier daemon was told, where it was told.
    pub fn open(state_dir: &Path, conf_dir: PathBuf, template: Option<PathBuf>) -> Self {
        let path = state_dir.join("pod-cidr");
        let kept = record::load::<Kept>(&path).unwrap_or_else(|error| {
            if !error.is_absent() {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the node's pod network is not known any more");
            }
            Kept::default()
        });
        Self {
            record: path,
            conf_dir,
            template,
            subnets: Mutex::new(kept.subnets),
        }
    }

    pub fn subnets(&self) -> Vec<IpNet> {
        let subnets = self.subnets.lock().unwrap_or_else(PoisonError::into_inner);
        subnets.clone()
    }

    pub fn set(&self, subnets: &[IpNet]) -> Result<(), PodCidrError> {
        let mut known = self.subnets.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == subnets {
            return Ok(());
        }
        let kept = Kept {
            subnets: subnets.into(),
        };
        record::save(&self.record, &kept, Durability::PowerCut)
            .map_err(|source| PodCidrError::Keep { source })?;
        *known = kept.subnets;
        Ok(())
    }

    /// Where the rendered template is.
    pub fn rendered(&self) -> PathBuf {
        self.conf_dir.join(FILE)
    }

    /// Makes the configuration; false where there is no template, or no subnet yet.
    pub fn render(&self) -> Result<bool, PodCidrError> {
        let subnets = self.subnets();
        let Some(path) = self.template.as_ref().filter(|_| !subnets.is_empty()) else {
            return Ok(false);
        };
        let template = std::fs::read_to_string(path).map_err(|source| PodCidrError::Read {
            path: path.clone(),
            source,
        })?;
        let text =
            template::render(&template, &subnets).map_err(|source| PodCidrError::Template {
                path: path.clone(),
                source,
            })?;
        NetworkList::parse(&text).map_err(|source| PodCidrError::Config {
            path: path.clone(),
            source,
        })?;
        let to = self.rendered();
        if std::fs::read_to_string(&to).is_ok_and(|now| now == text) {
            return Ok(true);
        }
        let written = std::fs::create_dir_all(&self.conf_dir).and_then(|()| {
            atomic_file::replace(&to, text.as_bytes(), Durability::PowerCut)?;
            // Others look at it too.
            std::fs::set_permissions(&to, PermissionsExt::from_mode(0o644))
        });
        written.map_err(|source| PodCidrError::Write {
            path: to.clone(),
            source,
        })?;
        tracing::info!(path = %to.display(), "CNI configuration made from the template");
        Ok(true)
    }
}
