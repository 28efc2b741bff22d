//! What strangers send, thrown at the code that reads it.
//!
//! A target is a function over bytes that panics where a promise is broken. Its
//! corpus is `corpus/NAME/`, one input a file; `tests/corpus.rs` replays all of
//! it on stable Rust, `make fuzz` looks for more with libFuzzer.
//!
//! A new target: a function in a module here, a line in [`TARGETS`], and at
//! least one input in its corpus. An input that found something goes into the
//! corpus with the fix.
#![forbid(unsafe_code)]

mod images;
mod layers;
mod logs;
mod network;
mod streaming;

/// One thing to be fuzzed.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and its corpus'.
    pub name: &'static str,
    /// Takes any bytes and must come back.
    pub run: fn(&[u8]),
}

/// All targets, by name.
pub const TARGETS: &[Target] = &[
    target("auth-file", images::auth_file),
    target("cni-conflist", network::conflist),
    target("cni-result", network::answer),
    target("cni-template", network::conf_template),
    target("cni-runtime-config", network::runtime_config),
    target("hosts-toml", images::hosts_toml),
    target("image-config", images::config),
    target("image-index", images::index),
    target("image-manifest", images::manifest),
    target("image-policy", images::policy),
    target("layer-archive", layers::archive),
    target("layer-recipe", layers::recipe),
    target("layer-record", layers::record),
    target("log-drops", logs::drops),
    target("log-lines", logs::lines),
    target("reference", images::reference),
    target("registries-conf", images::registries_conf),
    target("signature-manifest", images::signatures),
    target("spdy", streaming::spdy),
    target("websocket-channels", streaming::websocket_channels),
    target("www-authenticate", images::challenge),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// The target of that name.
pub fn find(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|target| target.name == name)
}
