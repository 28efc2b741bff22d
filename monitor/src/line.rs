//! The CRI log format: what a container wrote, cut into lines.
//!
//! ```text
//! 2006-01-02T15:04:05.000000000Z stdout F a whole line
//! 2006-01-02T15:04:05.000000000Z stderr P the first part of a long line
//! ```
//!
//! The bytes of a line are kept as they are, NUL and invalid UTF-8 too. A line
//! is written once its newline has come; one longer than the limit is written
//! in parts, all but the last marked P. What is left without a newline at the
//! end counts as a whole line.
//!
//! Source: Kubernetes, design proposal "CRI: log management"; RFC 3339.

/// Which stream a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; a terminal too.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// As it stands in a log.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// Nanoseconds since 1970 as RFC 3339 in UTC, always with nine digits.
pub fn timestamp(nanoseconds: i64) -> [u8; 30] {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days to civil date over 400-year eras that begin on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);

    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    let mut put = |at: std::ops::Range<usize>, mut value: i64| {
        for digit in text[at].iter_mut().rev() {
            *digit = b'0' + (value % 10) as u8;
            value /= 10;
        }
    };
    put(0..4, year.clamp(0, 9999));
    put(5..7, month);
    put(8..10, day);
    put(11..13, second / 3_600);
    put(14..16, second / 60 % 60);
    put(17..19, second % 60);
    put(20..29, nanoseconds.rem_euclid(1_000_000_000));
    text
}

/// Length of what stands before a line's text: stamp, stream, tag.
pub const PREFIX_BYTES: usize = "2006-01-02T15:04:05.000000000Z stdout F ".len();

/// Cuts one stream into lines.
#[derive(Debug)]
pub struct Splitter {
    stream: Stream,
    limit: usize,
    /// What has come since the last line or part, at most `limit` bytes.
    pending: Vec<u8>,
    /// Parts of the current line have been written.
    open: bool,
}

impl Splitter {
    /// `limit` is the longest line, or part of one, in bytes without the
    /// newline; at least 1 is used.
    pub fn new(stream: Stream, limit: usize) -> Splitter {
        Splitter {
            stream,
            limit: limit.max(1),
            pending: Vec::new(),
            open: false,
        }
    }

    /// Takes what was read at `now` (nanoseconds since 1970) and appends the
    /// lines it completes to `out`: how many. All of one read have the same
    /// stamp, as they came out of the pipe at once.
    pub fn feed(&mut self, mut bytes: &[u8], now: i64, out: &mut Vec<u8>) -> u64 {
        let whole = self.prefix(now, b'F');
        let part = self.prefix(now, b'P');
        let mut lines = 0;
        while !bytes.is_empty() {
            let room = self.limit - self.pending.len();
            // One more than fits, to see whether a newline follows exactly.
            let window = &bytes[..bytes.len().min(room.saturating_add(1))];
            match memchr::memchr(b'\n', window) {
                Some(at) => {
                    out.extend_from_slice(&whole);
                    if !self.pending.is_empty() {
                        out.extend_from_slice(&self.pending);
                        self.pending.clear();
                    }
                    append(out, bytes, at + 1);
                    bytes = &bytes[at + 1..];
                    self.open = false;
                    lines += 1;
                }
                None if window.len() > room => {
                    out.extend_from_slice(&part);
                    out.extend_from_slice(&self.pending);
                    self.pending.clear();
                    out.extend_from_slice(&bytes[..room]);
                    out.push(b'\n');
                    bytes = &bytes[room..];
                    self.open = true;
                }
                None => {
                    self.pending.extend_from_slice(bytes);
                    break;
                }
            }
        }
        lines
    }

    /// Appends what is left at the end of the stream; true when that was a line.
    pub fn finish(&mut self, now: i64, out: &mut Vec<u8>) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        self.end_line(now, out);
        true
    }

    /// Gives up the line that has begun, as the rest of it will not come. Parts
    /// that were written are ended, so that the next line is one of its own.
    pub fn abandon(&mut self, now: i64, out: &mut Vec<u8>) -> Abandoned {
        if self.open {
            self.end_line(now, out);
            return Abandoned::Line { bytes: 0 };
        }
        let bytes = self.pending.len() as u64;
        self.pending.clear();
        match bytes {
            0 => Abandoned::Nothing,
            bytes => Abandoned::Line { bytes },
        }
    }

    /// A line of our own in the container's log.
    pub fn remark(&self, text: &str, now: i64, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix(now, b'F'));
        out.extend_from_slice(text.as_bytes());
        out.push(b'\n');
    }

    fn end_line(&mut self, now: i64, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix(now, b'F'));
        out.extend_from_slice(&self.pending);
        out.push(b'\n');
        self.pending.clear();
        self.open = false;
    }

    fn prefix(&self, now: i64, tag: u8) -> [u8; PREFIX_BYTES] {
        let mut prefix = *b"0000-00-00T00:00:00.000000000Z stdout F ";
        prefix[..30].copy_from_slice(&timestamp(now));
        prefix[31..37].copy_from_slice(self.stream.name().as_bytes());
        prefix[PREFIX_BYTES - 2] = tag;
        prefix
    }
}

/// Appends the first `length` bytes of `from`. Lines are short and many: pieces
/// of a fixed size are a few instructions each, where a copy of any length is a
/// call that costs more than a line.
#[inline]
fn append(out: &mut Vec<u8>, from: &[u8], length: usize) {
    const PIECE: usize = 32;
    let end = out.len() + length;
    let pieces = length.div_ceil(PIECE);
    if length > 16 * PIECE || pieces * PIECE > from.len() {
        out.extend_from_slice(&from[..length]);
        return;
    }
    let (pieces, _) = from[..pieces * PIECE].as_chunks::<PIECE>();
    for piece in pieces {
        out.extend_from_slice(piece);
    }
    // The last piece may have had some of the next line.
    out.truncate(end);
}

/// What [`Splitter::abandon`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abandoned {
    /// No line had begun.
    Nothing,
    /// One had; so many of its bytes are in no log.
    Line {
        /// Bytes of output.
        bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(limit: usize, chunks: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut splitter = Splitter::new(Stream::Stderr, limit);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk, 0, &mut out);
        }
        splitter.finish(0, &mut out);
        parse(&out)
    }

    /// Tag and text of each line.
    fn parse(mut out: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut lines = Vec::new();
        while let Some(end) = out.iter().position(|&byte| byte == b'\n') {
            let line = &out[..end];
            assert_eq!(&line[..38], b"1970-01-01T00:00:00.000000000Z stderr ");
            lines.push((line[38], line[40..].to_vec()));
            out = &out[end + 1..];
        }
        assert!(out.is_empty());
        lines
    }

    #[test]
    fn times_are_written_as_rfc_3339() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (1, "1970-01-01T00:00:00.000000001Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000000Z"),
            (1_136_214_245_000_000_000, "2006-01-02T15:04:05.000000000Z"),
            (4_107_542_399_999_999_999, "2100-02-28T23:59:59.999999999Z"),
            (4_107_542_400_000_000_000, "2100-03-01T00:00:00.000000000Z"),
            (-1, "1969-12-31T23:59:59.999999999Z"),
        ];
        for (nanoseconds, text) in cases {
            assert_eq!(std::str::from_utf8(&timestamp(nanoseconds)).unwrap(), text);
        }
    }

    #[test]
    fn whole_lines_are_f_and_long_ones_have_p_parts() {
        let f = |text: &str| (b'F', text.as_bytes().to_vec());
        let p = |text: &str| (b'P', text.as_bytes().to_vec());
        assert_eq!(split(4, &[b"a\n\nbc\n"]), [f("a"), f(""), f("bc")]);
        assert_eq!(split(4, &[b"abcd\n"]), [f("abcd")]);
        assert_eq!(split(4, &[b"abcd", b"\n"]), [f("abcd")]);
        assert_eq!(split(4, &[b"abcde\n"]), [p("abcd"), f("e")]);
        assert_eq!(split(4, &[b"abcdefgh\n"]), [p("abcd"), f("efgh")]);
        assert_eq!(
            split(4, &[b"ab", b"cdefghi"]),
            [p("abcd"), p("efgh"), f("i")]
        );
        assert_eq!(split(4, &[b"no newline"]), [p("no n"), p("ewli"), f("ne")]);
        assert_eq!(split(4, &[]), []);
    }

    proptest! {
        /// However it is cut, putting parts and lines together gives what was written.
        #[test]
        fn nothing_is_lost_added_or_longer_than_the_limit(
            chunks in prop::collection::vec(prop::collection::vec(
                prop_oneof![3 => Just(b'\n'), 10 => any::<u8>()], 0..40), 0..20),
            limit in 1..20_usize,
        ) {
            let borrowed: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let lines = split(limit, &borrowed);
            let mut written = chunks.concat();
            let mut together = Vec::new();
            for (tag, text) in &lines {
                prop_assert!(text.len() <= limit);
                prop_assert!(*tag == b'F' || text.len() == limit);
                together.extend_from_slice(text);
                if *tag == b'F' {
                    together.push(b'\n');
                }
            }
            if !written.is_empty() && written.last() != Some(&b'\n') {
                written.push(b'\n');
            }
            prop_assert_eq!(together, written);
        }

        /// The result does not depend on how reads were cut.
        #[test]
        fn cutting_reads_differently_changes_nothing(
            bytes in prop::collection::vec(prop_oneof![1 => Just(b'\n'), 5 => any::<u8>()], 0..200),
            cut in 1..50_usize, limit in 1..30_usize,
        ) {
            let pieces: Vec<&[u8]> = bytes.chunks(cut).collect();
            prop_assert_eq!(split(limit, &pieces), split(limit, &[&bytes]));
        }
    }
}
