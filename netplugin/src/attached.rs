//! What CNI plugins were run with, one record for each pod:
//!
//! ```text
//! DIR/attachments/<pod>    configuration, arguments, capabilities, result
//! ```
//!
//! It is on disk before the first plugin runs and until DEL is through, so that
//! DEL gets what ADD got whatever became of the configuration and the daemon.

use crate::spec::{NetworkList, is_name};
use berth_store::atomic_file::{Durability, is_temporary};
use berth_store::{Record, RecordError, record};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::io;
use std::path::{Path, PathBuf};

/// What CNI plugins were told for a pod, and what they gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// CNI_CONTAINERID.
    pub id: String,
    /// The configuration, as it was then.
    pub list: NetworkList,
    /// CNI_ARGS.
    pub args: String,
    /// What was offered to plugins by capability.
    pub capabilities: Map<String, Value>,
    /// Where the pod's network namespace was then.
    #[serde(default)]
    pub netns: PathBuf,
    /// `None` until ADD is through.
    pub result: Option<Value>,
}

impl Record for Attached {
    const KIND: &'static str = "attachment";
    const VERSION: u32 = 1;
}

/// The directory of them.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    /// The one below `state_dir`, made where there is none.
    pub fn open(state_dir: &Path) -> Result<Self, (PathBuf, io::Error)> {
        let dir = state_dir.join("attachments");
        match std::fs::create_dir_all(&dir) {
            Ok(()) => Ok(Self { dir }),
            Err(error) => Err((dir, error)),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Durable when it returns.
    pub fn keep(&self, attached: &Attached) -> Result<(), RecordError> {
        record::save(&self.dir.join(&attached.id), attached, Durability::PowerCut)
    }

    /// That of a pod; `id` has passed [`is_id`].
    pub fn find(&self, id: &str) -> Result<Option<Attached>, RecordError> {
        match record::load(&self.dir.join(id)) {
            Ok(attached) => Ok(Some(attached)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn forget(&self, id: &str) -> Result<(), RecordError> {
        record::remove(&self.dir.join(id), Durability::PowerCut)
    }

    /// Whose there are, sorted.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            if let Ok(name) = entry?.file_name().into_string()
                && !is_temporary(&name)
                && is_id(&name)
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }
}

/// IDs name files, and CNI allows them no more than names.
pub(crate) fn is_id(id: &str) -> bool {
    is_name(id) && id.len() <= 128
}
