//! How fast a layer is unpacked, beside GNU tar on the same archive.
//!
//! unpack_speed ARCHIVE DIRECTORY [ROUNDS]
//!
//! ARCHIVE is a tar file, plain or compressed with gzip or zstd. DIRECTORY is on
//! the file system to measure; what is made in it is removed again. Prints the
//! median of the rounds, in milliseconds, MB/s of archive and entries/s.

use berth_image_service::digest::Digest;
use berth_image_service::layer::{Ingest, Store};
use berth_image_service::unpack::Compression;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(archive), Some(directory)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: unpack_speed ARCHIVE DIRECTORY [ROUNDS]");
        return ExitCode::from(2);
    };
    let rounds = arguments
        .next()
        .and_then(|text| text.to_str()?.parse().ok())
        .unwrap_or(3);
    match measure(Path::new(&archive), Path::new(&directory), rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("unpack_speed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(
    archive: &Path,
    directory: &Path,
    rounds: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut file = File::open(archive)?;
    let mut start = [0; 4];
    file.read_exact(&mut start)?;
    let compression = Compression::of_magic(&start);
    file.seek(SeekFrom::Start(0))?;
    let mut plain: Box<dyn Read> = match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Compression::Zstd => Box::new(zstd::Decoder::new(file)?),
    };
    let mut hasher = Digest::sha256(b"").hasher();
    let mut bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = plain.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        bytes += count as u64;
    }
    let diff_ids = [hasher.finish()];
    let mut inodes = 0;
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..rounds {
        let place = Removed(directory.join(format!("unpack-speed-{}", std::process::id())));
        let store = Store::open(&place.0)?;
        rustix::fs::sync();
        let begun = Instant::now();
        let ingest = Ingest {
            diff_ids: &diff_ids,
            parents: None,
            compression,
            limit_bytes: None,
        };
        inodes = store
            .unpack(&store.lease(), ingest, File::open(archive)?)?
            .inodes;
        ours.push(begun.elapsed());
        drop(place);

        let place = Removed(directory.join(format!("unpack-speed-{}", std::process::id())));
        std::fs::create_dir(&place.0)?;
        rustix::fs::sync();
        let begun = Instant::now();
        let status = Command::new("tar")
            .args(["--numeric-owner", "--same-owner", "-p", "--xattrs", "-C"])
            .arg(&place.0)
            .arg("-xf")
            .arg(archive)
            .status()?;
        theirs.push(begun.elapsed());
        if !status.success() {
            return Err("tar failed".into());
        }
    }
    for (who, times) in [("berth", &mut ours), ("tar", &mut theirs)] {
        let median = median(times);
        println!(
            "{who:6} {:8.1} ms {:8.1} MB/s {:9.0} inodes/s",
            median.as_secs_f64() * 1e3,
            bytes as f64 / 1e6 / median.as_secs_f64(),
            inodes as f64 / median.as_secs_f64(),
        );
    }
    Ok(())
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A directory that is removed when it goes out of scope.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
