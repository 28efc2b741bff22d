//! Writes to a cgroup's files that can be taken back: an update is all or nothing.

use super::{Error, file};
use std::path::{Path, PathBuf};

/// What was written, and what stood there before.
#[derive(Debug, Default)]
pub struct Journal {
    keeps: bool,
    before: Vec<(PathBuf, String)>,
}

impl Journal {
    /// For a cgroup that is removed where a write fails: nothing is kept.
    pub(super) fn forgetful() -> Self {
        Self::default()
    }

    /// Keeps what stood in each file before it was written.
    pub(super) fn keeping() -> Self {
        Self {
            keeps: true,
            before: Vec::new(),
        }
    }

    pub(super) fn write(&mut self, path: &Path, value: &str) -> Result<(), Error> {
        let before = match self.keeps {
            // A file that is not there fails to be written, too.
            true => file::read_if_there(path)?,
            false => None,
        };
        file::write(path, value)?;
        if let Some(before) = before {
            self.before.push((path.to_owned(), before));
        }
        Ok(())
    }

    /// Brings every file back to what it said, newest first.
    ///
    /// # Errors
    /// The first file that could not be brought back; the others were tried all the same.
    pub fn roll_back(self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for (path, before) in self.before.into_iter().rev() {
            let before = before.trim_end();
            // An empty set of processors is written as an empty line.
            let lines = if before.is_empty() { "\n" } else { before };
            for line in lines.split_inclusive('\n') {
                let restored = file::write(&path, line);
                outcome = outcome.and(restored);
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_taken_back_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a"), "1\n").unwrap();
        std::fs::write(path("b"), "2\n").unwrap();
        let mut journal = Journal::keeping();
        journal.write(&path("a"), "5").unwrap();
        journal.write(&path("b"), "6").unwrap();
        journal.write(&path("a"), "7").unwrap();
        journal.write(&path("missing"), "8").unwrap_err();
        journal.roll_back().unwrap();
        let read = |name| std::fs::read_to_string(path(name)).unwrap();
        assert_eq!(
            (read("a").trim(), read("b").trim()),
            ("1", "2"),
            "as they were"
        );
    }
}
