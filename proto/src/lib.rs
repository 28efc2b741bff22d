//! The messages Berth speaks: CRI v1, the monitor's protocol and our own
//! admin service. Types only, no logic.
//!
//! Generated at build time from `protos/`; no protoc is needed.
#![forbid(unsafe_code)]

/// CRI v1, package `runtime.v1`: what the kubelet and crictl speak.
///
/// Source: `tests/data/cri-v1.tsv` lists every RPC, field and enum value.
#[cfg(feature = "grpc")]
#[allow(clippy::all, missing_docs, rustdoc::all)]
pub mod runtime_v1 {
    tonic::include_proto!("runtime.v1");

    /// Shows which fields are set and never what they hold.
    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let mask = |text: &str| if text.is_empty() { "" } else { "[redacted]" };
            f.debug_struct("AuthConfig")
                .field("username", &mask(&self.username))
                .field("password", &mask(&self.password))
                .field("auth", &mask(&self.auth))
                .field("server_address", &self.server_address)
                .field("identity_token", &mask(&self.identity_token))
                .field("registry_token", &mask(&self.registry_token))
                .finish()
        }
    }
}

/// What `berth status` and other commands of ours ask the daemon.
#[cfg(feature = "grpc")]
#[allow(clippy::all, missing_docs, rustdoc::all)]
pub mod admin_v1 {
    tonic::include_proto!("berth.admin.v1");
}

/// The daemon and a pod's monitor; framing and file descriptors are described
/// in `protos/monitor_v1.proto`.
#[allow(clippy::all, missing_docs, rustdoc::all)]
pub mod monitor_v1 {
    include!(concat!(env!("OUT_DIR"), "/berth.monitor.v1.rs"));

    /// The protocol's version, in [`Hello`] and [`HelloReply`].
    pub const PROTOCOL: u32 = 1;

    /// The bits of [`HelloReply::features`].
    pub mod feature {
        /// The base protocol: everything in `monitor_v1.proto` as of 0.1.0.
        pub const BASE: u64 = 1;
        /// Attach and Detached.
        pub const ATTACH: u64 = 1 << 1;
        /// Launch and Exec through an OCI runtime; State has the held namespaces.
        pub const OCI_RUNTIME: u64 = 1 << 2;
        /// Launch with hooks, CallOff; State says what is starting.
        pub const HOOKS: u64 = 1 << 3;
        /// Directories that stay writable on a read-only root.
        pub const VOLUMES: u64 = 1 << 4;
    }

    /// Longest frame either side accepts, in bytes: larger than the kernel's
    /// bound on argv and env together (2 MiB), so whatever can be exec'd fits.
    pub const MAX_FRAME_BYTES: usize = 4 << 20;

    /// Most file descriptors with one frame. Source: SCM_MAX_FD, linux/socket.h.
    pub const MAX_FDS: usize = 253;
}

/// The compiled descriptors of everything above, a `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
