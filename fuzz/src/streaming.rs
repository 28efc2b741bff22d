//! What clients of the streaming server send.

use berth_cri_server::wire::channels::{self, Protocol};
use berth_cri_server::wire::spdy::{self, Frame, MAX_CONTROL_BYTES};
use berth_cri_server::wire::websocket::{Decoder, Event, MAX_CONTROL_BYTES as MAX_PING_BYTES};
use bytes::BytesMut;

/// Feeds `data` in pieces whose sizes its first byte sets, and hands on each frame. A
/// decoder may keep no more than one control frame back, and however the bytes are cut,
/// it says the same.
pub fn spdy(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let whole = spdy_frames(bytes, bytes.len().max(1));
    let pieces = spdy_frames(bytes, usize::from(cut).max(1));
    assert_eq!(whole, pieces);
}

/// Each stream's bytes together, then everything else in order; whether it was refused.
type Said = (Vec<(u32, Vec<u8>)>, Vec<String>, bool);

fn spdy_frames(bytes: &[u8], size: usize) -> Said {
    let (mut decoder, mut buffer) = (spdy::Decoder::default(), BytesMut::new());
    let (mut data, mut rest): (Vec<(u32, Vec<u8>)>, Vec<String>) = Default::default();
    for piece in bytes.chunks(size) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Frame::Data { id, fin, bytes })) => {
                    match data.last_mut() {
                        Some((last, all)) if *last == id => all.extend_from_slice(&bytes),
                        _ => data.push((id, bytes.to_vec())),
                    }
                    if fin {
                        rest.push(format!("end of {id}"));
                    }
                }
                Ok(Some(frame)) => rest.push(format!("{frame:?}")),
                Ok(None) => break,
                Err(_) => return (data, rest, true),
            }
        }
        assert!(buffer.len() <= MAX_CONTROL_BYTES + spdy::HEAD_BYTES);
    }
    (data, rest, false)
}

/// The same for WebSocket, with Kubernetes' channels on top. The first byte says how it is
/// cut and which protocol is spoken.
pub fn websocket_channels(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else {
        return;
    };
    let protocol = Protocol {
        base64: how & 1 != 0,
        close_signal: how & 2 != 0,
    };
    let whole = messages(bytes, protocol, bytes.len().max(1));
    let pieces = messages(bytes, protocol, usize::from(how >> 2).max(1));
    // What was refused may have been refused a piece later.
    if whole.1 == pieces.1 && !whole.1 {
        assert_eq!(whole.0, pieces.0);
    }
}

fn messages(bytes: &[u8], protocol: Protocol, size: usize) -> (Vec<(u8, Vec<u8>)>, bool) {
    let (mut decoder, mut buffer) = (Decoder::server(), BytesMut::new());
    let mut channels = channels::Decoder::new(protocol);
    let mut said: Vec<(u8, Vec<u8>)> = Vec::new();
    for piece in bytes.chunks(size) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Event::Ping(content))) => assert!(content.len() <= MAX_PING_BYTES),
                Ok(Some(event)) => match channels.event(event) {
                    Ok(Some(channels::Said::Data { channel, bytes })) => match said.last_mut() {
                        Some((last, all)) if *last == channel => all.extend_from_slice(&bytes),
                        _ => said.push((channel, bytes.to_vec())),
                    },
                    Ok(Some(channels::Said::Close { channel })) => said.push((channel, Vec::new())),
                    Ok(None) => {}
                    Err(_) => return (said, true),
                },
                Ok(None) => break,
                Err(_) => return (said, true),
            }
        }
        assert!(buffer.len() <= MAX_PING_BYTES + 14);
    }
    (said, false)
}
