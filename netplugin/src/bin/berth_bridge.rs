//! `berth-bridge`: the built-in network for any runtime that speaks CNI.
#![forbid(unsafe_code)]

use berth_netplugin::plugin::{Call, run};
use berth_netplugin::spec::{PluginError, code};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Longest configuration that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    let answer = call();
    let failed = answer.is_err();
    let text = match &answer {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => result.to_string(),
        Err(error) => serde_json::to_string(error).unwrap_or_default(),
    };
    let written = writeln!(std::io::stdout(), "{text}");
    if failed || written.is_err() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn call() -> Result<Option<Value>, PluginError> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let command = variable("CNI_COMMAND");
    let config = match command.as_str() {
        "" => {
            let why = "CNI_COMMAND is missing: this program is called by a container runtime";
            return Err(PluginError::new(code::INVALID_ENVIRONMENT, why, ""));
        }
        "VERSION" => Value::Null,
        _ => read_config()?,
    };
    let netns =
        Some(PathBuf::from(variable("CNI_NETNS"))).filter(|path| !path.as_os_str().is_empty());
    run(&Call {
        command: &command,
        container_id: &variable("CNI_CONTAINERID"),
        netns: netns.as_deref(),
        ifname: &variable("CNI_IFNAME"),
        config: &config,
    })
}

fn read_config() -> Result<Value, PluginError> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_CONFIG_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| {
            PluginError::new(
                code::IO,
                "cannot read the network configuration",
                error.to_string(),
            )
        })?;
    serde_json::from_slice(&bytes).map_err(|error| {
        PluginError::new(
            code::DECODE,
            "the network configuration is not JSON",
            error.to_string(),
        )
    })
}
