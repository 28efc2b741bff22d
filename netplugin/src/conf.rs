//! The directory of CNI configurations, read anew at each look.
//!
//! Nothing is remembered of it, so it may be absent, go, come back or be
//! replaced by a link to another at any time. The first valid file by name
//! counts. One that is not valid is passed over, but not while it is young: it
//! may be in the middle of being written, and what it will say goes before what
//! the files after it say.

use crate::spec::{ConfigError, NetworkList};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Largest configuration file that is read, in bytes: real ones have a few thousand.
const MAX_BYTES: u64 = 1 << 20;

/// How many files of a directory are looked at: real ones have one or two.
const MAX_FILES: usize = 1000;

/// For how long after its last change a file that is not valid may still be in
/// the middle of being written.
pub const SETTLING: Duration = Duration::from_secs(5);

/// What a directory of configurations holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The one that counts, and its file.
    pub network: Option<(PathBuf, NetworkList)>,
    /// Files that were looked at before it and are not valid, and why.
    pub problems: Vec<(PathBuf, LoadError)>,
    /// The names of networks that were passed over for not being the one wanted.
    pub others: Vec<String>,
}

/// Why a file gives no network.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// A pipe, a device, a directory.
    #[error("is no regular file")]
    NoFile,
    /// It is longer than any real one.
    #[error("is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// It says nothing valid.
    #[error("is not a CNI configuration: {0}")]
    Config(ConfigError),
    /// More files than are looked at.
    #[error("has more than {MAX_FILES} configurations")]
    TooMany,
}

/// The network that the directory `dir` configures: the first valid file by name
/// that ends in .conflist, .conf or .json and does not begin with a dot; with
/// `wanted` the first whose network has that name. A directory that is absent
/// configures none.
pub fn load(dir: &Path, wanted: Option<&str>) -> Loaded {
    let mut loaded = Loaded::default();
    let mut files = match list(dir) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return loaded,
        Err(error) => {
            loaded.problems.push((dir.into(), LoadError::Read(error)));
            return loaded;
        }
    };
    files.sort();
    if files.len() > MAX_FILES {
        loaded.problems.push((dir.into(), LoadError::TooMany));
        files.truncate(MAX_FILES);
    }
    for path in files {
        match read(&path) {
            Ok(list) if wanted.is_none_or(|wanted| wanted == list.name) => {
                loaded.network = Some((path, list));
                break;
            }
            Ok(list) => loaded.others.push(list.name),
            Err(error) => {
                let gone =
                    matches!(&error, LoadError::Read(e) if e.kind() == io::ErrorKind::NotFound);
                let young = is_young(&path);
                // Listed and gone is not there, unless it is a link that leads nowhere.
                if !gone || path.is_symlink() {
                    loaded.problems.push((path, error));
                }
                if young && wanted.is_none() {
                    break;
                }
            }
        }
    }
    loaded
}

fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let extension = path.extension().and_then(|extension| extension.to_str());
        if name.is_some_and(|name| !name.starts_with('.'))
            && matches!(extension, Some("conflist" | "conf" | "json"))
        {
            files.push(path);
        }
    }
    Ok(files)
}

fn is_young(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|about| about.modified());
    changed.is_ok_and(|changed| {
        // One from the future is not known to be old.
        let age = SystemTime::now()
            .duration_since(changed)
            .unwrap_or_default();
        age < SETTLING
    })
}

fn read(path: &Path) -> Result<NetworkList, LoadError> {
    // A pipe that nobody writes to must not hold who looks.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(file.map_err(|errno| LoadError::Read(errno.into()))?);
    if !file.metadata().map_err(LoadError::Read)?.is_file() {
        return Err(LoadError::NoFile);
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(LoadError::Read)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(LoadError::TooLong);
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| LoadError::Read(io::Error::new(io::ErrorKind::InvalidData, error)))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut list = NetworkList::parse(&text).map_err(LoadError::Config)?;
    if list.more_in_folder {
        add_plugins(&mut list, dir)?;
    }
    if list.plugins.is_empty() {
        let why = "is empty".into();
        return Err(LoadError::Config(ConfigError::Field {
            field: "plugins",
            why,
        }));
    }
    Ok(list)
}

/// The plugins of the folder named like the network, by file name, after those
/// in the list itself.
///
/// Source: libcni 1.3, `loadOnlyInlinedPlugins`.
fn add_plugins(list: &mut NetworkList, dir: &Path) -> Result<(), LoadError> {
    let dir = dir.join(&list.name);
    let mut files = match self::list(&dir) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A file of the network's name is something else.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(()),
        Err(error) => return Err(LoadError::Read(error)),
    };
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "conf")
    });
    files.sort();
    if files.len() > MAX_FILES {
        return Err(LoadError::TooMany);
    }
    for path in files {
        let text = std::fs::read_to_string(&path).map_err(LoadError::Read)?;
        let plugin = NetworkList::parse_plugin(&text).map_err(LoadError::Config)?;
        list.plugins.push(plugin);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn network(name: &str) -> String {
        format!(r#"{{"cniVersion":"1.0.0","name":"{name}","type":"a"}}"#)
    }

    fn age(path: &Path) {
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
    }

    fn found(dir: &Path, wanted: Option<&str>) -> Option<String> {
        load(dir, wanted).network.map(|(_, list)| list.name)
    }

    #[test]
    fn the_first_by_name_counts_and_its_kind_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(found(&dir.join("absent"), None), None);
        for (file, name) in [
            ("20.conf", "b"),
            ("10.json", "a"),
            ("30.conflist", "c"),
            ("00.txt", "x"),
            (".00.conf", "y"),
        ] {
            fs::write(dir.join(file), network(name)).unwrap();
        }
        assert_eq!(found(dir, None).as_deref(), Some("a"));
        assert_eq!(found(dir, Some("c")).as_deref(), Some("c"));
        assert_eq!(load(dir, Some("z")).others, ["a", "b", "c"]);
    }

    #[test]
    fn a_file_that_may_be_being_written_is_waited_for_and_one_that_is_wrong_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let (first, text) = (dir.join("10.conf"), network("first"));
        fs::write(dir.join("20.conf"), network("second")).unwrap();
        for end in [0, 1, text.len() - 1] {
            fs::write(&first, &text[..end]).unwrap();
            let loaded = load(dir, None);
            assert!(loaded.network.is_none(), "{end}");
            assert_eq!(loaded.problems[0].0, first);
            assert_eq!(found(dir, Some("second")).as_deref(), Some("second"));
        }
        age(&first);
        let loaded = load(dir, None);
        assert_eq!(loaded.network.unwrap().1.name, "second");
        assert_eq!(loaded.problems.len(), 1);
        fs::write(&first, &text).unwrap();
        assert_eq!(found(dir, None).as_deref(), Some("first"));
    }

    #[test]
    fn what_is_no_file_holds_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let pipe = dir.join("10.conf");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RWXU).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.join("11.conf")).unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.join("12.conf")).unwrap();
        fs::create_dir(dir.join("13.conf")).unwrap();
        fs::write(dir.join("14.conf"), vec![b' '; 2 << 20]).unwrap();
        fs::write(dir.join("15.conf"), [0xff]).unwrap();
        let said: Vec<String> = load(dir, Some("x"))
            .problems
            .iter()
            .map(|(path, why)| format!("{} {why}", path.file_name().unwrap().display()))
            .collect();
        let begins = [
            "10.conf is no regular file",
            "11.conf is no regular file",
            "12.conf cannot be read: No such file",
            "13.conf is no regular file",
            "14.conf is longer than 1048576 bytes",
            "15.conf cannot be read: invalid utf-8",
        ];
        assert_eq!(said.len(), begins.len(), "{said:?}");
        for (said, begin) in said.iter().zip(begins) {
            assert!(said.starts_with(begin), "{said}");
        }
    }

    #[test]
    fn the_directory_may_go_and_come_back_as_a_link() {
        let parent = tempfile::tempdir().unwrap();
        let (dir, other) = (parent.path().join("net.d"), parent.path().join("other"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("1.conf"), network("first")).unwrap();
        assert_eq!(found(&dir, None).as_deref(), Some("first"));
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(found(&dir, None), None);
        std::os::unix::fs::symlink(&other, &dir).unwrap();
        assert_eq!(found(&dir, None), None);
        fs::create_dir(&other).unwrap();
        fs::write(other.join("1.conf"), network("second")).unwrap();
        assert_eq!(found(&dir, None).as_deref(), Some("second"));
    }

    #[test]
    fn plugins_may_be_in_a_folder_of_the_networks_name() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let conflist = |more: &str| {
            let text =
                format!(r#"{{"cniVersion":"1.1.0","name":"n",{more}"plugins":[{{"type":"a"}}]}}"#);
            fs::write(dir.join("1.conflist"), text).unwrap();
            let (_, list) = load(dir, None).network.unwrap();
            list.plugins
                .iter()
                .map(|p| p["type"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(conflist(""), ["a"]);
        fs::create_dir(dir.join("n")).unwrap();
        fs::write(dir.join("n/2.conf"), r#"{"type":"c"}"#).unwrap();
        fs::write(dir.join("n/1.conf"), r#"{"type":"b"}"#).unwrap();
        assert_eq!(conflist(""), ["a", "b", "c"]);
        assert_eq!(conflist(r#""loadOnlyInlinedPlugins":true,"#), ["a"]);
    }
}
