//! The parts of a checkpoint: CRIU, what it has to be told of a container, and
//! the archive.
//!
//! ```text
//! checkpoint/        CRIU's images, and `descriptors.json`: what stdin, stdout and stderr were
//! config.dump        who the container is, JSON
//! spec.dump          its OCI runtime spec, JSON
//! bind.mounts        what is mounted from outside: source, destination, file or directory
//! rootfs-diff.tar    what it has added to its image or changed
//! deleted.files      what it has deleted, JSON
//! dump.log           what CRIU said
//! stats-dump         how long it took, CRIU's format
//! container.log      its log, where it has one
//! ```
//!
//! Names and keys in the images are those of runc, so that runc and crun can
//! restore what the built-in launcher runs.
//!
//! Source: checkpoint-restore/checkpointctl, `lib/metadata.go`; CRI-O,
//! `internal/lib/checkpoint.go`; containerd, `container_checkpoint_linux.go`;
//! criu(8).

pub mod archive;
pub mod criu;
pub mod files;
pub mod journal;
pub mod mounts;
