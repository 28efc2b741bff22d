//! From the work directory to one archive.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use tar::{Builder, EntryType, Header};

/// Asked before each block: an error ends the work.
pub type MayGoOn<'a> = &'a dyn Fn() -> io::Result<()>;

/// Writes a file that only root may read, and asks before each block.
pub struct Writing<'a> {
    file: io::BufWriter<File>,
    may_go_on: MayGoOn<'a>,
}

/// A new file of mode 0600.
pub fn create(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

impl<'a> Writing<'a> {
    /// Begins it.
    ///
    /// # Errors
    /// It is there already, or the file system refuses.
    pub fn create(path: &Path, may_go_on: MayGoOn<'a>) -> io::Result<Self> {
        Ok(Self {
            file: io::BufWriter::with_capacity(256 << 10, create(path)?),
            may_go_on,
        })
    }

    /// Hands on what is left, durably.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn finish(self) -> io::Result<()> {
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.sync_all()
    }
}

impl Write for Writing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.may_go_on)()?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Reads, and asks before each block.
pub struct Reading<'a, R> {
    /// What is read.
    pub from: R,
    /// What is asked.
    pub may_go_on: MayGoOn<'a>,
}

impl<R: Read> Read for Reading<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (self.may_go_on)()?;
        self.from.read(into)
    }
}

/// Puts all entries of `work` into one archive, `work`/`name`, and removes each
/// once it is in there: the disk need not hold them twice.
///
/// # Errors
/// The file system refuses, or the work is to end.
pub fn pack(work: &Path, name: &str, may_go_on: MayGoOn<'_>) -> io::Result<()> {
    let mut archive = Builder::new(Writing::create(&work.join(name), may_go_on)?);
    for entry in sorted(work)? {
        if entry == name {
            continue;
        }
        let path = work.join(&entry);
        if !fs::symlink_metadata(&path)?.is_dir() {
            add(&mut archive, &path, &entry)?;
            fs::remove_file(&path)?;
            continue;
        }
        let mut header = header(&path)?;
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        archive.append_data(&mut header, format!("{entry}/"), io::empty())?;
        for file in sorted(&path)? {
            let inside = path.join(&file);
            add(&mut archive, &inside, &format!("{entry}/{file}"))?;
            fs::remove_file(&inside)?;
        }
        fs::remove_dir(&path)?;
    }
    archive.into_inner()?.finish()
}

fn sorted(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().into_string();
        names.push(name.map_err(|_| io::Error::other("a file whose name is no text"))?);
    }
    names.sort();
    Ok(names)
}

fn add(archive: &mut Builder<Writing<'_>>, path: &Path, name: &str) -> io::Result<()> {
    // CRIU's images are files, and links to files of an earlier dump, which there is not.
    if !fs::symlink_metadata(path)?.is_file() {
        return Ok(());
    }
    let mut header = header(path)?;
    archive.append_data(&mut header, name, File::open(path)?)
}

fn header(path: &Path) -> io::Result<Header> {
    let mut header = Header::new_gnu();
    header.set_metadata(&fs::symlink_metadata(path)?);
    header.set_uid(0);
    header.set_gid(0);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_work_directory_becomes_one_private_archive() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("checkpoint")).unwrap();
        fs::write(dir.path().join("checkpoint/pages-1.img"), [7; 9000]).unwrap();
        fs::write(dir.path().join("config.dump"), "{}").unwrap();
        pack(dir.path(), "archive.tar", &|| Ok(())).unwrap();
        let path = dir.path().join("archive.tar");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(
            names,
            ["checkpoint/", "checkpoint/pages-1.img", "config.dump"]
        );
        assert_eq!(sorted(dir.path()).unwrap(), ["archive.tar"]);
    }

    #[test]
    fn packing_ends_when_it_is_to() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.dump"), "{}").unwrap();
        let stopped = || Err(io::ErrorKind::TimedOut.into());
        let error = pack(dir.path(), "archive.tar", &stopped).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
