//! Compiles the .proto files without an installed protoc.

use prost::Message as _;
use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=protos");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let grpc = env::var_os("CARGO_FEATURE_GRPC").is_some();
    let mut files = vec!["monitor_v1.proto"];
    if grpc {
        files.extend(["runtime_v1.proto", "admin_v1.proto"]);
    }
    let descriptors = protox::compile(files, ["protos"])?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        // Its Debug is written by hand: a derived one would print credentials.
        .skip_debug(["runtime.v1.AuthConfig"])
        .compile_fds(descriptors)?;
    Ok(())
}
