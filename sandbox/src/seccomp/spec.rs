//! A profile as an OCI spec has it: conditions decided for one machine and one
//! set of capabilities, for runtimes that compile it themselves.

use super::profile::{Profile, Syscalls};
use super::{Compiler, DEFAULT, Error};
use crate::capability::CapSet;
use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

impl Compiler {
    /// RuntimeDefault's.
    ///
    /// # Errors
    /// Never in practice: the profile is our own.
    pub fn oci_default(&self, caps: CapSet) -> Result<LinuxSeccomp, Error> {
        self.oci(DEFAULT, caps)
    }

    /// That of a profile's JSON.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn oci(&self, json: &[u8], caps: CapSet) -> Result<LinuxSeccomp, Error> {
        // Whatever the built-in launcher refuses is refused.
        self.compile(json, caps)?;
        let mut value: Value = serde_json::from_slice(json).map_err(Error::Json)?;
        let profile: Profile = serde_json::from_slice(json).map_err(Error::Json)?;
        let entries = value["syscalls"].as_array().cloned().unwrap_or_default();
        let mut decided = Vec::new();
        for (mut entry, typed) in entries.into_iter().zip(&profile.syscalls) {
            if self.applies(typed, caps)? {
                decide(&mut entry, typed);
                decided.push(entry);
            }
        }
        value["syscalls"] = Value::Array(decided);
        let architectures = self.architectures(&profile)?;
        value["architectures"] = architectures
            .iter()
            .map(|arch| json!(arch.profile_name()))
            .collect();
        if let Some(object) = value.as_object_mut() {
            object.retain(|key, value| {
                let known = [
                    "defaultAction",
                    "defaultErrnoRet",
                    "architectures",
                    "flags",
                    "syscalls",
                ];
                known.contains(&key.as_str()) && !value.is_null()
            });
        }
        serde_json::from_value(value).map_err(Error::Json)
    }
}

/// Leaves of an entry what an OCI spec knows.
fn decide(entry: &mut Value, typed: &Syscalls) {
    if let Some(object) = entry.as_object_mut() {
        let names: Vec<_> = typed.names.iter().chain(&typed.name).cloned().collect();
        object.insert("names".into(), json!(names));
        object.retain(|key, value| {
            ["names", "action", "errnoRet", "args"].contains(&key.as_str()) && !value.is_null()
        });
    }
}
