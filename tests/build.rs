//! Builds `programs/probe.rs`, the program the tests run inside containers, as
//! one static file: an image needs nothing beside it.

use std::{env, path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=programs/probe.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("probe");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let built = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
            "--crate-name",
            "probe",
        ])
        .arg("programs/probe.rs")
        .arg("-o")
        .arg(&out)
        .status()
        .expect("cannot run rustc");
    assert!(built.success(), "rustc could not build programs/probe.rs");
}
