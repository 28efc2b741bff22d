//! What has come for one stream and was not taken yet. Bytes that are only to go on to a socket go
//! there at once while the socket takes them.

use bytes::{Buf as _, Bytes, BytesMut};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// How much may wait in one stream before its connection is read no further, in bytes.
/// Kubernetes' clients know no windows, so this is what keeps memory bounded.
pub const INBOX_BYTES: usize = 1 << 20;

/// Pieces shorter than this are copied together: one that is kept as it came keeps the
/// whole buffer it was read into.
const COPIED_BELOW: usize = 16 << 10;

/// The stream was broken off; what had come before is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has broken the stream off")]
pub struct Broken;

/// What became of bytes that were put in. The rest was forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// They wait here.
    pub kept: usize,
    /// They went through.
    pub through: usize,
}

/// Bytes for one stream. One task puts them in, one takes them out.
#[derive(Default)]
pub struct Inbox {
    state: Mutex<State>,
    readable: Notify,
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Bytes>,
    /// Short pieces, after all chunks.
    tail: BytesMut,
    bytes: usize,
    end: Option<End>,
    /// Nobody will read: what comes is forgotten.
    discard: bool,
    /// Whoever reads has nothing in hand and waits.
    waiting: bool,
    /// Where bytes go that whoever reads would only pass on.
    through: Option<Arc<TcpStream>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Orderly,
    Broken,
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts bytes in.
    pub fn push(&self, mut bytes: Bytes) -> Pushed {
        let mut state = self.state();
        if state.discard || state.end.is_some() {
            return Pushed::default();
        }
        let mut through = 0;
        if let Some(socket) = state.passes() {
            // Whoever reads is spared a wake-up, and the bytes another processor's cache. What the
            // socket refuses, for whatever reason, is for whoever reads.
            through = socket.try_write(&bytes).unwrap_or(0);
            bytes.advance(through);
            if bytes.is_empty() {
                return Pushed { kept: 0, through };
            }
        }
        let kept = bytes.len();
        state.bytes += kept;
        if bytes.len() < COPIED_BELOW {
            state.tail.extend_from_slice(&bytes);
            if state.tail.len() >= COPIED_BELOW {
                let tail = state.tail.split().freeze();
                state.chunks.push_back(tail);
            }
        } else {
            if !state.tail.is_empty() {
                let tail = state.tail.split().freeze();
                state.chunks.push_back(tail);
            }
            state.chunks.push_back(bytes);
        }
        drop(state);
        self.readable.notify_one();
        Pushed { kept, through }
    }

    /// Bytes go to `socket` from now on, as long as none wait here and somebody waits in
    /// [`Inbox::read`]; with `None` they no longer do. Whoever reads sends the rest there, and is
    /// told of an end.
    pub fn pass(&self, socket: Option<Arc<TcpStream>>) {
        self.state().through = socket;
    }

    /// The socket that bytes go through to now. Only a push or an end changes that.
    pub fn socket(&self) -> Option<Arc<TcpStream>> {
        self.state().passes().cloned()
    }

    /// Whether as much waits here as may.
    pub fn is_full(&self) -> bool {
        self.state().bytes >= INBOX_BYTES
    }

    /// No more will come.
    pub fn end(&self) {
        self.state().end.get_or_insert(End::Orderly);
        self.readable.notify_one();
    }

    /// No more will come, and what waits is lost. Gives how much that was.
    pub fn break_off(&self) -> usize {
        let mut state = self.state();
        if state.end == Some(End::Orderly) && state.bytes == 0 {
            return 0;
        }
        state.end = Some(End::Broken);
        let lost = state.forget();
        drop(state);
        self.readable.notify_one();
        lost
    }

    /// Forgets what waits and what will come. Gives how much was waiting.
    pub fn discard(&self) -> usize {
        let mut state = self.state();
        state.discard = true;
        state.forget()
    }

    /// What came next; `None` at the orderly end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The stream was broken off.
    pub async fn read(&self) -> Result<Option<Bytes>, Broken> {
        loop {
            let readable = self.readable.notified();
            {
                let mut state = self.state();
                let tail = |state: &mut State| {
                    (!state.tail.is_empty()).then(|| state.tail.split().freeze())
                };
                if let Some(bytes) = state.chunks.pop_front().or_else(|| tail(&mut state)) {
                    state.bytes -= bytes.len();
                    state.waiting = false;
                    return Ok(Some(bytes));
                }
                match state.end {
                    Some(End::Orderly) => return Ok(None),
                    Some(End::Broken) => return Err(Broken),
                    None => state.waiting = true,
                }
            }
            readable.await;
        }
    }
}

impl State {
    fn passes(&self) -> Option<&Arc<TcpStream>> {
        let passes = self.waiting && self.bytes == 0 && !self.discard && self.end.is_none();
        self.through.as_ref().filter(|_| passes)
    }

    fn forget(&mut self) -> usize {
        self.chunks.clear();
        self.tail = BytesMut::new();
        std::mem::take(&mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_out_in_order_whatever_their_sizes() {
        let inbox = Inbox::default();
        let mut expected = Vec::new();
        for (round, size) in [1, 20_000, 3, 16_384, 16_383, 5].into_iter().enumerate() {
            let piece = vec![round as u8; size];
            expected.extend_from_slice(&piece);
            let kept = piece.len();
            assert_eq!(inbox.push(piece.into()), Pushed { kept, through: 0 });
        }
        inbox.end();
        assert_eq!(inbox.push(Bytes::from_static(b"late")), Pushed::default());
        let mut got = Vec::new();
        while let Some(bytes) = inbox.read().await.unwrap() {
            got.extend_from_slice(&bytes);
        }
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_broken_stream_says_so_and_forgets() {
        let inbox = Inbox::default();
        inbox.push(vec![0; INBOX_BYTES].into());
        assert!(inbox.is_full());
        assert_eq!(inbox.break_off(), INBOX_BYTES);
        assert!(!inbox.is_full());
        assert_eq!(inbox.read().await, Err(Broken));
    }

    #[tokio::test]
    async fn what_nobody_wants_is_not_kept() {
        let inbox = Inbox::default();
        inbox.push(Bytes::from_static(b"abc"));
        assert_eq!(inbox.discard(), 3);
        assert_eq!(inbox.push(Bytes::from_static(b"def")), Pushed::default());
        inbox.end();
        assert_eq!(inbox.read().await, Ok(None));
    }

    #[tokio::test]
    async fn bytes_go_through_only_while_somebody_waits_and_none_are_left() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (socket, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (socket, mut far) = (Arc::new(socket.unwrap()), accepted.unwrap().0);
        let inbox = Inbox::default();
        inbox.pass(Some(socket));
        let pushed = |kept, through| Pushed { kept, through };
        assert_eq!(inbox.push(Bytes::from_static(b"ab")), pushed(2, 0));
        assert_eq!(inbox.read().await, Ok(Some(Bytes::from_static(b"ab"))));
        // It has these in hand now.
        assert_eq!(inbox.push(Bytes::from_static(b"cd")), pushed(2, 0));
        assert_eq!(inbox.read().await, Ok(Some(Bytes::from_static(b"cd"))));
        let mut reading = std::pin::pin!(inbox.read());
        assert!(at_once(reading.as_mut()).is_none());
        assert_eq!(inbox.push(Bytes::from_static(b"ef")), pushed(0, 2));
        // More than the socket takes.
        let much: Bytes = (0..30_000_000_u32)
            .map(|at| (at / 7) as u8)
            .collect::<Vec<_>>()
            .into();
        let Pushed { kept, through } = inbox.push(much.clone());
        assert!(through > 0 && kept > 0 && kept + through == much.len());
        // It stays behind what is left.
        let after: Bytes = vec![9; COPIED_BELOW].into();
        assert_eq!(inbox.push(after.clone()), pushed(COPIED_BELOW, 0));
        assert!(reading.await == Ok(Some(much.slice(through..))));
        assert_eq!(inbox.read().await, Ok(Some(after)));
        let mut went = vec![0; 2 + through];
        tokio::io::AsyncReadExt::read_exact(&mut far, &mut went)
            .await
            .unwrap();
        assert!(went[..2] == *b"ef" && went[2..] == much[..through]);
        let mut reading = std::pin::pin!(inbox.read());
        assert!(at_once(reading.as_mut()).is_none());
        inbox.pass(None);
        assert_eq!(inbox.push(Bytes::from_static(b"m")), pushed(1, 0));
    }

    /// What a future has at once.
    fn at_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
