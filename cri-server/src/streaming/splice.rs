//! Bytes that go from one socket to another without being looked at: the kernel hands their pages
//! on, by way of a pipe.
//!
//! Source: splice(2), pipe(7); it takes no page of a socket that it cannot give on.

use bytes::Bytes;
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::pipe::{PipeFlags, SpliceFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How much the pipe may hold, in bytes; where the kernel allows less, it is what it allows.
const BYTES: usize = 1 << 20;

/// On the way from one socket to another. One task fills and empties it.
pub struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pipe {
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        let (from, to) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The default is as good, only slower.
        let _ = rustix::pipe::fcntl_setpipe_size(&to, BYTES);
        Ok(Self { from, to })
    }

    /// Takes up to `most` bytes that have come on `socket`; 0 at its end. The pipe has to be empty.
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// The socket's.
    pub async fn fill(&self, socket: &TcpStream, most: usize) -> io::Result<usize> {
        socket
            .async_io(Interest::READABLE, || splice(socket, &self.to, most))
            .await
    }

    /// Sends `head` and then `bytes`, which the pipe holds. Dropping the future may lose some.
    ///
    /// # Errors
    /// The socket's.
    pub async fn empty(&self, socket: &TcpStream, head: &[u8], mut bytes: usize) -> io::Result<()> {
        let mut head = head;
        while !head.is_empty() {
            // They go out together.
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = socket
                .async_io(Interest::WRITABLE, || {
                    rustix::io::retry_on_intr(|| rustix::net::send(socket, head, flags))
                        .map_err(io::Error::from)
                })
                .await?;
            head = &head[sent..];
        }
        while bytes > 0 {
            let sent = socket
                .async_io(Interest::WRITABLE, || splice(&self.from, socket, bytes))
                .await?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes -= sent;
        }
        Ok(())
    }

    /// Sends what `socket` takes of `bytes` that the pipe holds, without waiting; the rest of them.
    ///
    /// # Errors
    /// The rest cannot be had.
    pub fn pour(&self, socket: &TcpStream, bytes: usize) -> io::Result<Bytes> {
        let mut left = bytes;
        while left > 0 {
            let once = || splice(&self.from, socket, left);
            match socket.try_io(Interest::WRITABLE, once) {
                Ok(sent) if sent > 0 => left -= sent,
                // Whoever writes what is kept finds out what is wrong.
                Ok(_) | Err(_) => break,
            }
        }
        let mut rest = vec![0; left];
        let mut at = 0;
        while at < left {
            match rustix::io::retry_on_intr(|| rustix::io::read(&self.from, &mut rest[at..]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => at += count,
            }
        }
        Ok(rest.into())
    }
}

fn splice(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    let moved = rustix::io::retry_on_intr(|| {
        rustix::pipe::splice(from.as_fd(), None, to.as_fd(), None, most, flags)
    });
    moved.map_err(|error: Errno| error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    async fn joined() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (here, there) = tokio::join!(TcpStream::connect(address), listener.accept());
        (here.unwrap(), there.unwrap().0)
    }

    #[tokio::test]
    async fn all_bytes_arrive_in_order_and_so_does_the_end() {
        let (mut writer, from) = joined().await;
        let (to, mut reader) = joined().await;
        let sent: Vec<u8> = (0..5_000_001_u32).map(|at| (at / 7) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move { writer.write_all(&sent).await });
        let between = tokio::spawn(async move {
            let pipe = Pipe::new().unwrap();
            loop {
                match pipe.fill(&from, 200_000).await.unwrap() {
                    0 => return,
                    bytes => pipe.empty(&to, &[], bytes).await.unwrap(),
                }
            }
        });
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        writing.await.unwrap().unwrap();
        between.await.unwrap();
    }

    #[tokio::test]
    async fn what_a_socket_does_not_take_comes_back() {
        let (mut writer, from) = joined().await;
        let (to, mut reader) = joined().await;
        let sent: Vec<u8> = (0..30_000_000_u32).map(|at| (at / 11) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move { writer.write_all(&sent).await });
        let pipe = Pipe::new().unwrap();
        let (mut passed, mut rest) = (0, Bytes::new());
        while rest.is_empty() {
            let bytes = pipe.fill(&from, 100_000).await.unwrap();
            assert!(bytes > 0, "30 MB fit into a socket that nobody reads");
            rest = pipe.pour(&to, bytes).unwrap();
            passed += bytes - rest.len();
        }
        let mut got = vec![0; passed];
        reader.read_exact(&mut got).await.unwrap();
        assert!(got == expected[..passed]);
        assert!(*rest == expected[passed..passed + rest.len()]);
        // The pipe is empty again.
        let bytes = pipe.fill(&from, 1000).await.unwrap();
        assert!(pipe.pour(&to, bytes).unwrap().is_empty());
        writing.abort();
    }

    #[tokio::test]
    async fn a_socket_that_nobody_reads_says_so() {
        let (mut writer, from) = joined().await;
        let (to, reader) = joined().await;
        reader.set_zero_linger().unwrap();
        drop(reader);
        writer.write_all(&[1; 100_000]).await.unwrap();
        let pipe = Pipe::new().unwrap();
        let outcome = loop {
            let bytes = pipe.fill(&from, 1000).await.unwrap();
            if let Err(error) = pipe.empty(&to, &[], bytes).await {
                break error.kind();
            }
        };
        let broke = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        assert!(broke.contains(&outcome), "{outcome:?}");
    }
}
