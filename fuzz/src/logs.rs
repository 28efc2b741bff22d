//! What a container writes.

use berth_monitor::line::{Splitter, Stream};

/// Output cut into log lines. The first byte is the limit, each next chunk's
/// length comes before it: however it is cut, the same text comes out.
pub fn lines(data: &[u8]) {
    let Some((&limit, mut rest)) = data.split_first() else {
        return;
    };
    let limit = usize::from(limit).max(1);
    let mut splitter = Splitter::new(Stream::Stdout, limit);
    let (mut written, mut out) = (Vec::new(), Vec::new());
    while let Some((&length, after)) = rest.split_first() {
        let chunk = &after[..after.len().min(usize::from(length))];
        splitter.feed(chunk, 0, &mut out);
        written.extend_from_slice(chunk);
        rest = &after[chunk.len()..];
    }
    splitter.finish(0, &mut out);
    if !written.is_empty() && written.last() != Some(&b'\n') {
        written.push(b'\n');
    }
    assert_eq!(joined(&out, limit), written);
}

/// The text of a log: what follows stamp, stream and tag.
fn joined(log: &[u8], limit: usize) -> Vec<u8> {
    const PREFIX: usize = "1970-01-01T00:00:00.000000000Z stdout F ".len();
    let mut text = Vec::new();
    for line in log.split_inclusive(|byte| *byte == b'\n') {
        let (prefix, rest) = line.split_at(PREFIX);
        let content = &rest[..rest.len() - 1];
        assert!(content.len() <= limit);
        text.extend_from_slice(content);
        match prefix[PREFIX - 2] {
            b'F' => text.push(b'\n'),
            b'P' => assert_eq!(content.len(), limit),
            tag => panic!("a line with the tag {tag}"),
        }
    }
    text
}
