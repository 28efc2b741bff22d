//! `berth`: the daemon that speaks CRI, and the command line beside it.
//!
//! serve ── config ── parts ── recovery ── socket ──> runtime/*, images/*, admin
//!                                                         │
//!                            convert <── each RPC ────────┘──> sandbox, image-service
//!
//! This crate wires and translates; what pods and images are is decided in the
//! crates it uses.
#![forbid(unsafe_code)]

mod admin;
mod commands;
mod config;
mod convert;
mod daemon;
mod image_source;
mod images;
mod logging;
mod metrics;
mod metrics_http;
mod pod_metrics;
mod pull_cgroup;
mod rpc;
mod runtime;
mod serve;
mod socket;
mod streaming;
pub mod wire;
mod writable;

pub use commands::main;
