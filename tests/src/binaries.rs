//! Finds the programs under test, and builds them first where nobody says where
//! they are.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The variable that names the folder of `berth`, `berth-monitor` and `berth-bridge`.
pub const VARIABLE: &str = "BERTH_BIN_DIR";

/// The folder they are in: what [`VARIABLE`] says, or the target folder this test
/// was built into, after a `cargo build` of them.
///
/// # Panics
/// When they cannot be built: no test can run without.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| match std::env::var_os(VARIABLE) {
        Some(named) => PathBuf::from(named),
        None => build().unwrap_or_else(|err| panic!("cannot build what is tested: {err:#}")),
    })
}

/// The `berth` command.
pub fn berth() -> PathBuf {
    folder().join("berth")
}

fn build() -> Result<PathBuf> {
    // target/PROFILE/deps/THIS, or target/PROFILE/THIS for a program of this crate.
    let this = std::env::current_exe()?;
    let profile = this
        .ancestors()
        .skip(1)
        .find(|dir| !dir.ends_with("deps"))
        .context("this test is not in a target folder")?;
    ensure!(
        profile.with_file_name("CACHEDIR.TAG").exists(),
        "{} is not in a target folder: say with {VARIABLE} where the programs are",
        this.display()
    );
    // Test programs run side by side; cargo would build for each of them.
    let lock = File::create(profile.join(".berth-tests-build"))?;
    lock.lock()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(["build", "--quiet", "--bins"])
        .args([
            "-p",
            "berth-cri-server",
            "-p",
            "berth-monitor",
            "-p",
            "berth-netplugin",
        ])
        .arg("--target-dir")
        .arg(profile.parent().context("a target folder has a parent")?);
    if profile.ends_with("release") {
        command.arg("--release");
    }
    // What cargo says of this package to its test would be news to build scripts (ring's looks at all
    // of these), which would then run again, here and at the next `cargo build`.
    for (name, _) in std::env::vars_os() {
        let told = ["OUT_DIR", "CARGO_PKG_", "CARGO_MANIFEST_"];
        if told
            .iter()
            .any(|told| name.as_encoded_bytes().starts_with(told.as_bytes()))
        {
            command.env_remove(name);
        }
    }
    let status = command.status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo build: {status}");
    Ok(profile.to_owned())
}
