//! What a container writes.

use berth_monitor::line::{PREFIX_BYTES, Splitter, Stream};
use berth_monitor::log::counts::Counts;
use berth_monitor::log::tap::Tap;

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

/// Output of which the disk took some. The first byte is the line limit, the
/// seven lower bits of each next one a chunk's length; its highest bit says
/// that there is no room for it. Every byte and line is counted once, the log
/// says what is missing, and what it has are lines of the output in order.
pub fn drops(data: &[u8]) {
    let Some((&limit, mut rest)) = data.split_first() else {
        return;
    };
    let mut tap = Tap::new(Stream::Stdout, usize::from(limit));
    let (mut written, mut out, mut counts) = (Vec::new(), Vec::new(), Counts::default());
    while let Some((&control, after)) = rest.split_first() {
        let length = after.len().min(usize::from(control & 0x7f));
        // The remarks about what is missing begin with a bracket.
        let chunk: Vec<u8> = after[..length]
            .iter()
            .map(|&byte| if byte == b'[' { b'(' } else { byte })
            .collect();
        tap.feed(&chunk, control & 0x80 == 0, 0, &mut out, &mut counts);
        written.extend_from_slice(&chunk);
        rest = &after[length..];
    }
    tap.finish(0, &mut out, &mut counts);

    let mut lines: Vec<&[u8]> = written.split(|byte| *byte == b'\n').collect();
    if lines.last().is_some_and(|last| last.is_empty()) {
        lines.pop();
    }
    assert_eq!(counts.bytes + counts.dropped_bytes, written.len() as u64);
    assert_eq!(counts.lines + counts.dropped_lines, lines.len() as u64);

    let (mut said, mut begun) = ((0, 0), Vec::new());
    let mut left = lines.into_iter();
    for line in out.split_inclusive(|byte| *byte == b'\n') {
        let (tag, text) = (line[PREFIX_BYTES - 2], &line[PREFIX_BYTES..line.len() - 1]);
        if tag == b'F' && text.starts_with(b"[berth: ") {
            let text = String::from_utf8_lossy(text);
            let mut numbers = text.split(' ').filter_map(|word| word.parse::<u64>().ok());
            said.0 += numbers.next().expect("a remark says how many lines");
            said.1 += numbers.next().expect("a remark says how many bytes");
            assert!(begun.is_empty(), "a remark inside a line");
            continue;
        }
        begun.extend_from_slice(text);
        if tag == b'F' {
            // The beginning of a line, where the rest of it was dropped.
            assert!(
                left.any(|line| line.starts_with(&begun)),
                "what was not written"
            );
            begun.clear();
        }
    }
    assert_eq!(said, (counts.dropped_lines, counts.dropped_bytes));
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
