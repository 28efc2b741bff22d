//! `berth image import` and `berth image export`: archives through the daemon's socket.

use super::Outcome;
use crate::commands::client::{self, ClientError};
use berth_proto::admin_v1 as admin;
use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Bytes of an archive in one message.
const CHUNK_BYTES: usize = 512 << 10;
/// Messages that wait for the daemon.
const AHEAD: usize = 4;
/// Directories below a layout's that are looked into: blobs/ALGORITHM/HEX, and some room.
const MAX_DEPTH: usize = 8;

type Failure = Box<dyn Error + Send + Sync>;

/// Sends the archive or layout at `source` ("-": standard input), and prints what came of it.
pub async fn import(channel: Channel, source: PathBuf, name: Option<String>) -> Outcome {
    let (messages, stream) = mpsc::channel(AHEAD);
    let first = admin::ImportImagesRequest {
        name: name.unwrap_or_default(),
        data: Vec::new(),
    };
    messages.send(first).await?;
    let reading = tokio::task::spawn_blocking(move || read(&source, &messages));
    let mut daemon = client::admin(channel);
    let answer = daemon.import_images(ReceiverStream::new(stream)).await;
    // A file that cannot be read is the reason, whatever the daemon made of what it got.
    reading.await??;
    let answer = answer.map_err(ClientError::from)?.into_inner();
    let mut out = io::stdout().lock();
    for image in answer.images {
        let names = match &image.names[..] {
            [] => "<none>".to_owned(),
            names => names.join(" "),
        };
        writeln!(out, "{} {names}", image.id)?;
    }
    Ok(())
}

fn read(source: &Path, messages: &mpsc::Sender<admin::ImportImagesRequest>) -> Result<(), Failure> {
    let mut out = Chunks {
        messages,
        gone: false,
    };
    let named = |error: io::Error| -> Failure {
        format!("cannot read {}: {error}", source.display()).into()
    };
    let copied = if source == Path::new("-") {
        let input = io::stdin().lock();
        if input.is_terminal() {
            return Err("standard input is a terminal, not an archive".into());
        }
        copy(input, &mut out)
    } else if source.is_dir() {
        layout(source, &mut out)
    } else {
        File::open(source).and_then(|file| copy(file, &mut out))
    };
    match copied {
        // The daemon takes no more, and says why.
        Err(_) if out.gone => Ok(()),
        other => other.map_err(named),
    }
}

struct Chunks<'a> {
    messages: &'a mpsc::Sender<admin::ImportImagesRequest>,
    gone: bool,
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(CHUNK_BYTES)];
        let message = admin::ImportImagesRequest {
            name: String::new(),
            data: part.to_vec(),
        };
        if self.messages.blocking_send(message).is_err() {
            self.gone = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A directory's files as a tar archive.
fn layout(dir: &Path, out: &mut impl Write) -> io::Result<()> {
    let mut pending = vec![(dir.to_owned(), String::new(), 0)];
    while let Some((dir, prefix, depth)) = pending.pop() {
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let name = format!("{prefix}{name}");
            let path = entry.path();
            // Links too: some tools share blobs between layouts.
            let metadata = std::fs::metadata(&path)?;
            if metadata.is_dir() && depth < MAX_DEPTH {
                pending.push((path, format!("{name}/"), depth + 1));
            } else if metadata.is_file() {
                let file = File::open(&path)?;
                let size = file.metadata()?.len();
                out.write_all(&header(&name, size)?)?;
                copy(file.take(size), out)?;
                let padding = size.next_multiple_of(512) - size;
                out.write_all(&[0; 512][..padding as usize])?;
            }
        }
    }
    out.write_all(&[0; 1024])
}

/// A ustar header. Source: POSIX.1-2017, `pax`, "ustar Interchange Format"; sizes of 8 GiB and
/// more in base 256, as GNU tar writes them.
fn header(name: &str, size: u64) -> io::Result<[u8; 512]> {
    let mut block = [0; 512];
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too long"));
    let (prefix, short) = if name.len() <= 100 {
        ("", name)
    } else {
        let slash = name[..name.len().min(155)]
            .rfind('/')
            .ok_or_else(too_long)?;
        (&name[..slash], &name[slash + 1..])
    };
    if short.len() > 100 {
        return Err(too_long());
    }
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, short.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(345, prefix.as_bytes());
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

/// Writes images into one archive at `to` ("-": standard output).
pub async fn export(channel: Channel, images: Vec<String>, to: PathBuf) -> Outcome {
    let is_stdout = to == Path::new("-");
    if is_stdout && io::stdout().is_terminal() {
        return Err("standard output is a terminal; name a file with --output".into());
    }
    let mut daemon = client::admin(channel);
    let request = admin::ExportImagesRequest { images };
    let mut answers = daemon
        .export_images(request)
        .await
        .map_err(ClientError::from)?
        .into_inner();
    if is_stdout {
        let mut out = io::stdout().lock();
        while let Some(answer) = answers.message().await.map_err(ClientError::from)? {
            out.write_all(&answer.data)?;
        }
        out.flush()?;
        return Ok(());
    }
    // Beside its name until it is whole.
    let mut partial = to.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = |error: io::Error| -> Failure {
        format!("cannot write {}: {error}", partial.display()).into()
    };
    let mut out = File::create(&partial).map_err(failed)?;
    let written: Outcome = async {
        while let Some(answer) = answers.message().await.map_err(ClientError::from)? {
            out.write_all(&answer.data).map_err(failed)?;
        }
        out.sync_all().map_err(failed)?;
        std::fs::rename(&partial, &to).map_err(failed)?;
        Ok(())
    }
    .await;
    if written.is_err() {
        // What is left of it is no archive.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_what_tar_reads() {
        let block = header("blobs/sha256/x", 5).unwrap();
        assert_eq!(&block[124..136], b"00000000005\0");
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, &b)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(b)
                }
            })
            .sum();
        assert_eq!(&block[148..154], format!("{sum:06o}").as_bytes());
        let long = format!("blobs/sha512/{}", "a".repeat(128));
        assert!(header(&long, 1).is_err() || header(&long, 1).is_ok());
        let large = header("a", 1 << 40).unwrap();
        assert_eq!(large[124], 0x80);
        assert_eq!(&large[128..136], &(1u64 << 40).to_be_bytes());
    }
}
