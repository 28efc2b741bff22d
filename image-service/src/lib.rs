#![forbid(unsafe_code)]

pub mod auth;
pub mod content;
pub mod digest;
pub mod hosts;
pub mod manifest;
pub mod reference;
