//! The pipes and terminals of processes, without blocking a thread.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::termios::{LocalModes, SpecialCodeIndex};
use std::io;
use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::{Receiver, Sender};

/// How much of a process's output is taken at first, in bytes; what is busy gets more.
const LEAST_BYTES: usize = 8 << 10;

/// How much is taken at most: what a pipe of ours holds.
const MOST_BYTES: usize = 256 << 10;

/// One end of a pipe, or the master of a terminal, which has both.
pub struct Fd {
    receiver: Option<Receiver>,
    sender: Option<Sender>,
    terminal: bool,
}

impl Fd {
    /// Takes over an end of a pipe, or the master of a terminal.
    ///
    /// # Errors
    /// It is neither.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        let mode = flags & OFlags::RWMODE;
        if rustix::termios::isatty(&fd) {
            return Ok(Self {
                sender: Some(Sender::from_owned_fd_unchecked(fd.try_clone()?)?),
                receiver: Some(Receiver::from_owned_fd_unchecked(fd)?),
                terminal: true,
            });
        }
        let reads = mode == OFlags::RDONLY;
        let (receiver, sender) = if reads {
            (Some(Receiver::from_owned_fd(fd)?), None)
        } else {
            (None, Some(Sender::from_owned_fd(fd)?))
        };
        Ok(Self {
            receiver,
            sender,
            terminal: false,
        })
    }

    /// Reads into `buffer`; 0 at the end. A terminal that everybody has left has ended
    /// too. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(receiver) = &self.receiver else {
            return Err(Errno::BADF.into());
        };
        loop {
            receiver.readable().await?;
            match receiver.try_read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                    return Ok(0);
                }
                read => return read,
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// EPIPE (EIO of a terminal) when nobody reads any more.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(sender) = &self.sender else {
            return Err(Errno::BADF.into());
        };
        while !bytes.is_empty() {
            sender.writable().await?;
            match sender.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether it is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// What stands for the end of input at a terminal, where its program reads whole
    /// lines; `None` where it takes every key as it is.
    pub fn end_of_input(&self) -> Option<u8> {
        let terminal = self.receiver.as_ref().filter(|_| self.terminal)?;
        let modes = rustix::termios::tcgetattr(terminal).ok()?;
        let lines = modes.local_modes.contains(LocalModes::ICANON);
        lines.then(|| modes.special_codes[SpecialCodeIndex::VEOF])
    }
}

/// Where output is read into: small until it is busy.
pub struct Buffer(Vec<u8>);

impl Default for Buffer {
    fn default() -> Self {
        Self(vec![0; LEAST_BYTES])
    }
}

impl Buffer {
    /// All of it.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// The first `length` bytes.
    pub fn filled(&self, length: usize) -> &[u8] {
        &self.0[..length]
    }

    /// `length` bytes were read and are done with.
    pub fn done(&mut self, length: usize) {
        if length == self.0.len() && length < MOST_BYTES {
            self.0 = vec![0; (length * 4).min(MOST_BYTES)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pipe_ends_when_the_other_end_is_closed() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (reader, writer) = (Fd::new(reader).unwrap(), Fd::new(writer).unwrap());
        let sent = tokio::spawn(async move { writer.write_all(&[7; 1 << 20]).await });
        let (mut buffer, mut got) = (Buffer::default(), 0);
        loop {
            let read = reader.read(buffer.space()).await.unwrap();
            if read == 0 {
                break;
            }
            assert!(buffer.filled(read).iter().all(|byte| *byte == 7));
            buffer.done(read);
            got += read;
        }
        assert_eq!(got, 1 << 20);
        sent.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_pipe_that_nobody_reads_says_so() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let error = Fd::new(writer).unwrap().write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
