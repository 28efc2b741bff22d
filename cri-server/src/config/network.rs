//! What the keys of `[network]` say beyond their types.

use super::sections::Network;
use std::path::{Path, PathBuf};

impl Network {
    /// `cni_handler_dirs`, by handler; what is wrong there is left out.
    pub fn handler_dirs(&self) -> impl Iterator<Item = (String, PathBuf)> {
        let pairs = self.cni_handler_dirs.iter();
        pairs
            .filter_map(|text| handler_dir(text))
            .map(|(name, dir)| (name.into(), dir.into()))
    }

    /// A key about CNI with a value that cannot be, and why not.
    pub(super) fn wrong_cni(&self) -> Option<(&'static str, String)> {
        let bad = self
            .cni_handler_dirs
            .iter()
            .find(|text| handler_dir(text).is_none());
        if let Some(text) = bad {
            let problem = format!("{text:?} is not HANDLER=DIR with an absolute path");
            return Some(("network.cni_handler_dirs", problem));
        }
        let name = &self.cni_network;
        if !name.is_empty() && !berth_netplugin::spec::is_name(name) {
            let problem = format!("{name:?} cannot be a CNI network's name");
            return Some(("network.cni_network", problem));
        }
        let seconds = [
            ("network.cni_timeout_seconds", self.cni_timeout_seconds),
            ("network.gc_seconds", self.gc_seconds),
        ];
        let zero = seconds.into_iter().find(|(_, seconds)| *seconds == 0);
        zero.map(|(key, _)| (key, "must be at least 1".into()))
    }
}

fn handler_dir(text: &str) -> Option<(&str, &Path)> {
    let (name, dir) = text.split_once('=')?;
    let dir = Path::new(dir);
    (!name.is_empty() && dir.is_absolute()).then_some((name, dir))
}
