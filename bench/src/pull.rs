//! Cold pulls: an image that a runtime does not have, from a registry on this machine, and how
//! far that is from what the machine can do at all.

use crate::{Runtime, Times, milliseconds};
use anyhow::{Context as _, Result, bail};
use berth_proto::runtime_v1 as cri;
use flate2::read::GzDecoder;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What is to be pulled.
#[derive(clap::Args, Clone)]
pub struct Pull {
    /// The image's layers, gzip, one file each in this directory: what the machine needs at least
    /// for them is measured as well.
    #[arg(long)]
    layers: Option<PathBuf>,
    /// Where files may be written for that: the file system the runtimes use.
    #[arg(long, default_value = "/var/tmp")]
    scratch: PathBuf,
}

fn spec(image: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec {
        image: image.into(),
        ..Default::default()
    })
}

/// One pull of an image that is not there, and its removal.
pub async fn time(runtime: &mut Runtime, image: &str, options: &Pull) -> Result<Times> {
    remove(runtime, image).await?;
    settle(&options.scratch).await?;
    let request = cri::PullImageRequest {
        image: spec(image),
        ..Default::default()
    };
    let begin = Instant::now();
    runtime.images.pull_image(request).await?;
    let took = milliseconds(begin);
    let begin = Instant::now();
    remove(runtime, image).await?;
    Ok(vec![
        ("cold pull", took),
        ("RemoveImage", milliseconds(begin)),
    ])
}

async fn remove(runtime: &mut Runtime, image: &str) -> Result<()> {
    let request = cri::RemoveImageRequest { image: spec(image) };
    runtime.images.remove_image(request).await?;
    Ok(())
}

/// What the last pull and removal still do in the background must not count for the next: waits
/// until nothing is freed or taken any more on the file system of `scratch`, and all is written.
async fn settle(scratch: &Path) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(1);
    let until = Instant::now() + Duration::from_secs(300);
    let taken = || -> Result<_> {
        let stat = nix::sys::statvfs::statvfs(scratch)
            .with_context(|| format!("cannot look at {}", scratch.display()))?;
        Ok((stat.blocks_free(), stat.files_free()))
    };
    loop {
        let before = taken()?;
        tokio::task::spawn_blocking(|| Command::new("sync").status()).await??;
        tokio::time::sleep(QUIET).await;
        if taken()? == before {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("{} does not come to rest", scratch.display());
        }
    }
}

/// Prints the least this machine needs for the layers: the slower of decompressing and hashing
/// them on all processors, and of writing their files with tar; and the ratio to it.
pub fn limit(options: &Pull, medians: &[(String, f64)]) -> Result<()> {
    let Some(dir) = &options.layers else {
        return Ok(());
    };
    let mut layers: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    layers.sort();
    // Also from the page cache, as the registry's answers come.
    for layer in &layers {
        io::copy(&mut File::open(layer)?, &mut io::sink())?;
    }
    let mut digesting = Vec::new();
    let mut writing = Vec::new();
    for _ in 0..3 {
        digesting.push(digest_all(&layers)?);
        writing.push(write_all(&layers, &options.scratch)?);
    }
    let digesting = median(&mut digesting);
    let writing = median(&mut writing);
    let limit = digesting.max(writing);
    println!("decompress and hash, all processors  {digesting:9.1} ms");
    println!("tar -x of the uncompressed layers    {writing:9.1} ms");
    for (name, median) in medians {
        println!("{name}: {:.2} of the limit's speed", limit / median);
    }
    if let [(_, ours), (_, theirs)] = medians {
        println!("ratio: {:.2}", theirs / ours);
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn digest_all(layers: &[PathBuf]) -> Result<f64> {
    let queue = Mutex::new(layers.to_vec());
    let workers = std::thread::available_parallelism()?.get();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let work = || -> io::Result<()> {
            loop {
                let next = queue.lock().map_or(None, |mut queue| queue.pop());
                let Some(layer) = next else {
                    return Ok(());
                };
                let packed = fs::read(layer)?;
                Sha256::digest(&packed);
                let mut plain = GzDecoder::new(&packed[..]);
                let mut hasher = Sha256::new();
                let mut buffer = vec![0; 256 << 10];
                loop {
                    match plain.read(&mut buffer)? {
                        0 => break,
                        count => hasher.update(&buffer[..count]),
                    }
                }
                hasher.finalize();
            }
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            match thread.join() {
                Ok(done) => done?,
                Err(_) => bail!("a worker panicked"),
            }
        }
        Ok(())
    })?;
    Ok(milliseconds(begin))
}

fn write_all(layers: &[PathBuf], scratch: &Path) -> Result<f64> {
    let dir = tempfile::tempdir_in(scratch)?;
    let mut plain = Vec::new();
    for (nth, layer) in layers.iter().enumerate() {
        let path = dir.path().join(format!("{nth}.tar"));
        let mut out = File::create(&path)?;
        io::copy(&mut GzDecoder::new(File::open(layer)?), &mut out)?;
        out.flush()?;
        plain.push(path);
    }
    let into = dir.path().join("files");
    fs::create_dir(&into)?;
    let begin = Instant::now();
    for archive in &plain {
        let status = Command::new("tar")
            .args(["--numeric-owner", "--same-owner", "-p", "-C"])
            .arg(&into)
            .arg("-xf")
            .arg(archive)
            .stdin(Stdio::null())
            .status()?;
        if !status.success() {
            bail!("tar: {status}");
        }
    }
    Ok(milliseconds(begin))
}
