//! A layer between the network and the unpacking: chunks from an async sender to a blocking
//! reader, and what is wrong with them.

use crate::content::{BadBlob, VerifyingReader};
use bytes::Bytes;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

pub(super) enum Chunk {
    Bytes(Bytes),
    /// The body ended as it should. A channel that closes without it was cut.
    End,
}

/// The blocking end of a download, which begins with the first read.
pub(super) struct Chunks {
    begin: Option<oneshot::Sender<()>>,
    received: mpsc::Receiver<Chunk>,
    current: Bytes,
    ended: bool,
}

impl Chunks {
    pub fn new(begin: oneshot::Sender<()>, received: mpsc::Receiver<Chunk>) -> Chunks {
        Chunks {
            begin: Some(begin),
            received,
            current: Bytes::new(),
            ended: false,
        }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(begin) = self.begin.take() {
            let _ = begin.send(());
        }
        while self.current.is_empty() && !self.ended {
            match self.received.blocking_recv() {
                Some(Chunk::Bytes(bytes)) => self.current = bytes,
                Some(Chunk::End) => self.ended = true,
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the download was cut",
                    ));
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

/// Keeps what is wrong with the blob: the unpacking wraps the reader's error in its own.
pub(super) struct Judged<R> {
    pub inner: VerifyingReader<R>,
    pub verdict: Arc<Mutex<Option<BadBlob>>>,
}

impl<R: Read> Read for Judged<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            if !error.get_ref().is_some_and(|inner| inner.is::<BadBlob>()) {
                return error;
            }
            let kind = error.kind();
            let text = error.to_string();
            if let Some(bad) = error
                .into_inner()
                .and_then(|e| e.downcast::<BadBlob>().ok())
            {
                let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
                verdict.get_or_insert(*bad);
            }
            io::Error::new(kind, text)
        })
    }
}
