//! What Berth keeps on disk: small durable records, replaced atomically, and
//! the named points at which a test can make the daemon die.
#![forbid(unsafe_code)]

pub mod atomic_file;
pub mod crash;
pub mod exit;
pub mod record;

pub use record::{Record, RecordError};
