//! The end-to-end suites. One program: they share a fixture, and two of them
//! must not fight over a machine's two processors.
#![forbid(unsafe_code)]

mod bad_requests;
mod cdi;
mod cgroups;
mod cni;
mod cni_crashes;
mod configuration;
mod containers;
mod crashes;
mod crowd;
mod doctor;
mod escapes;
mod exec;
mod handlers;
mod hangs;
mod hostile_images;
mod hung_disk;
mod image_archives;
mod image_damage;
mod image_disk;
mod image_sizes;
mod image_volumes;
mod images;
mod joins;
mod log_torture;
mod logs;
mod metrics;
mod mounts;
mod network;
mod network_builtin;
mod network_crowd;
mod pods;
mod pulls;
mod resources;
mod restarts;
mod runtime_info;
mod security;
mod stats;
mod stop;
mod streaming;
mod streaming_forward;
mod streaming_holdings;
mod streaming_server;
mod unpacking;
mod userns;
