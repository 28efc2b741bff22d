#![forbid(unsafe_code)]

pub mod auth;
pub mod content;
pub mod digest;
pub mod gc;
pub mod hosts;
pub mod image;
pub mod layer;
pub mod manifest;
pub mod progress;
pub mod pull;
pub mod reference;
pub mod registry;
pub mod service;
pub mod snapshot;
pub mod unpack;
pub mod usage;
