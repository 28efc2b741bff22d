//! One stream on its way into the log: cut into lines, or dropped, and counted.
//!
//! ```text
//! logging ── no room ──> dropping ── room, and a line begins ──> remark, logging
//! ```
//!
//! Only whole lines are dropped: one whose beginning is logged already is ended
//! and counts as dropped, and logging goes on at the beginning of a line.
//! Every byte read is counted once, as logged or as dropped.

use super::counts::Counts;
use crate::line::{Abandoned, Splitter, Stream};

/// One stream.
#[derive(Debug)]
pub struct Tap {
    stream: Stream,
    splitter: Splitter,
    dropping: Option<Missing>,
}

/// What is missing since the last line that was logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Missing {
    lines: u64,
    bytes: u64,
    /// A line has begun whose end has not come.
    mid_line: bool,
}

impl Tap {
    /// `limit` is the longest line, or part of one, in bytes.
    pub fn new(stream: Stream, limit: usize) -> Tap {
        Tap {
            stream,
            splitter: Splitter::new(stream, limit),
            dropping: None,
        }
    }

    /// Takes what was read at `now`; the lines that are to be logged are
    /// appended to `out`. Without `room` they are dropped.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        room: bool,
        now: i64,
        out: &mut Vec<u8>,
        counts: &mut Counts,
    ) {
        let rest = match (room, self.dropping.is_some()) {
            (true, false) => bytes,
            (true, true) => self.resume(bytes, now, out, counts),
            (false, true) => self.drop(bytes, counts),
            (false, false) => {
                let mut missing = Missing::default();
                if let Abandoned::Line { bytes } = self.splitter.abandon(now, out) {
                    missing.mid_line = true;
                    missing.bytes = bytes;
                    counts.bytes -= bytes;
                    counts.dropped_bytes += bytes;
                }
                self.dropping = Some(missing);
                self.drop(bytes, counts)
            }
        };
        counts.bytes += rest.len() as u64;
        counts.lines += self.splitter.feed(rest, now, out);
    }

    /// Appends what there is to say at the end of the stream.
    pub fn finish(&mut self, now: i64, out: &mut Vec<u8>, counts: &mut Counts) {
        if let Some(mut missing) = self.dropping.take() {
            if missing.mid_line {
                missing.lines += 1;
                counts.dropped_lines += 1;
            }
            self.remark(missing, now, out);
        }
        counts.lines += u64::from(self.splitter.finish(now, out));
    }

    /// Drops all of it: nothing is left.
    fn drop<'a>(&mut self, bytes: &'a [u8], counts: &mut Counts) -> &'a [u8] {
        if let Some(missing) = &mut self.dropping
            && let Some(last) = bytes.last()
        {
            let lines = memchr::memchr_iter(b'\n', bytes).count() as u64;
            missing.lines += lines;
            missing.bytes += bytes.len() as u64;
            missing.mid_line = *last != b'\n';
            counts.dropped_lines += lines;
            counts.dropped_bytes += bytes.len() as u64;
        }
        &[]
    }

    /// Drops the rest of the line that has begun; what follows it.
    fn resume<'a>(
        &mut self,
        bytes: &'a [u8],
        now: i64,
        out: &mut Vec<u8>,
        counts: &mut Counts,
    ) -> &'a [u8] {
        let begun = self.dropping.is_some_and(|missing| missing.mid_line);
        let end = match begun {
            false => 0,
            true => memchr::memchr(b'\n', bytes).map_or(bytes.len(), |at| at + 1),
        };
        self.drop(&bytes[..end], counts);
        if let Some(missing) = self.dropping.take_if(|missing| !missing.mid_line) {
            self.remark(missing, now, out);
        }
        &bytes[end..]
    }

    fn remark(&self, missing: Missing, now: i64, out: &mut Vec<u8>) {
        let text = format!(
            "[berth: {} lines, {} bytes of {} were dropped here: the log could not be written in time]",
            missing.lines,
            missing.bytes,
            self.stream.name()
        );
        self.splitter.remark(&text, now, out);
    }
}

/// Lines and bytes of output in whole lines of a log, as [`Counts`] counts
/// them: for lines that were counted and then could not be written.
pub fn count(log: &[u8]) -> (u64, u64) {
    let prefix = crate::line::PREFIX_BYTES;
    let (mut lines, mut bytes) = (0, 0);
    for line in log.split_inclusive(|&byte| byte == b'\n') {
        let whole = line.get(prefix - 2) == Some(&b'F');
        lines += u64::from(whole);
        let text = line.len().saturating_sub(prefix + usize::from(!whole));
        bytes += text as u64;
    }
    (lines, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tag and text of each line.
    fn parse(out: &[u8]) -> Vec<(char, String)> {
        let text = String::from_utf8_lossy(out);
        let lines = text.lines();
        lines
            .map(|line| (line.as_bytes()[38] as char, line[40..].to_owned()))
            .collect()
    }

    fn remark(lines: u64, bytes: u64) -> (char, String) {
        let text = format!(
            "[berth: {lines} lines, {bytes} bytes of stdout were dropped here: \
             the log could not be written in time]"
        );
        ('F', text)
    }

    fn run(limit: usize, steps: &[(&str, bool)]) -> (Vec<(char, String)>, Counts) {
        let mut tap = Tap::new(Stream::Stdout, limit);
        let (mut out, mut counts) = (Vec::new(), Counts::default());
        for (text, room) in steps {
            tap.feed(text.as_bytes(), *room, 0, &mut out, &mut counts);
        }
        tap.finish(0, &mut out, &mut counts);
        (parse(&out), counts)
    }

    #[test]
    fn whole_lines_are_dropped_and_logging_goes_on_at_a_line() {
        let f = |text: &str| ('F', text.to_owned());
        let (lines, counts) = run(
            9,
            &[
                ("a\nb", true),
                ("c\nd\ne", false),
                ("f", true),
                ("g\nh\n", true),
            ],
        );
        assert_eq!(lines, [f("a"), remark(3, 9), f("h")]);
        let wanted = Counts {
            lines: 2,
            bytes: 4,
            dropped_lines: 3,
            dropped_bytes: 9,
        };
        assert_eq!(counts, wanted);
    }

    #[test]
    fn a_line_whose_beginning_is_logged_is_ended_and_counts_as_dropped() {
        let (lines, counts) = run(2, &[("abcde", true), ("f\ng\n", false), ("h\n", true)]);
        assert_eq!(
            lines,
            [
                ('P', "ab".to_owned()),
                ('P', "cd".to_owned()),
                ('F', "e".to_owned()),
                remark(2, 4),
                ('F', "h".to_owned()),
            ]
        );
        assert_eq!((counts.lines, counts.dropped_lines), (1, 2));
    }

    #[test]
    fn what_is_missing_at_the_end_is_said() {
        let (lines, counts) = run(9, &[("a\n", false), ("b", false)]);
        assert_eq!(lines, [remark(2, 3)]);
        assert_eq!((counts.lines, counts.dropped_lines), (0, 2));
    }

    proptest! {
        /// Bytes are logged or dropped, once; so are lines; the remarks say it.
        #[test]
        fn everything_is_counted_once(
            steps in prop::collection::vec(("[a-c\n]{0,12}", any::<bool>()), 0..20),
            limit in 1..6_usize,
        ) {
            let steps: Vec<(&str, bool)> =
                steps.iter().map(|(text, room)| (text.as_str(), *room)).collect();
            let (lines, counts) = run(limit, &steps);
            let written: String = steps.iter().map(|(text, _)| *text).collect();
            prop_assert_eq!(counts.bytes + counts.dropped_bytes, written.len() as u64);
            let all = written.lines().count() as u64;
            prop_assert_eq!(counts.lines + counts.dropped_lines, all);
            let said: u64 = lines.iter()
                .filter_map(|(_, text)| text.strip_prefix("[berth: ")?.split(' ').next()?.parse::<u64>().ok())
                .sum();
            prop_assert_eq!(said, counts.dropped_lines);
        }
    }

    #[test]
    fn lines_of_a_log_are_counted_as_they_came() {
        let mut out = Vec::new();
        let mut splitter = Splitter::new(Stream::Stderr, 4);
        splitter.feed(b"abcdef\ng\n\n", 0, &mut out);
        assert_eq!(count(&out), (3, 10));
    }
}
