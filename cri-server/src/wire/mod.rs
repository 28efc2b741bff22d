//! What comes over the network from a streaming client, as bytes: SPDY/3.1 frames,
//! WebSocket frames, and Kubernetes' channels inside WebSocket messages.
//!
//! Nothing here does any I/O or keeps more than a bounded amount: each decoder takes
//! bytes as they come, cut anywhere, and hands payload on in pieces without collecting
//! it. The connections that stand on this are in `streaming`.

pub mod base64_stream;
pub mod channels;
pub mod headers;
pub mod spdy;
pub mod websocket;
