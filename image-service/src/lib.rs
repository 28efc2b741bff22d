#![forbid(unsafe_code)]

pub mod auth;
pub mod content;
pub mod digest;
pub mod hosts;
pub mod image;
pub mod manifest;
pub mod progress;
pub mod reference;
pub mod registry;
