//! What the monitor and a container's logger say to each other.
//!
//! One datagram of a SOCK_SEQPACKET pair each. Orders that are answered carry a
//! number, which the answer repeats.
//!
//! ```text
//! to the logger                                  from it
//! 'C' + descriptor   the console's master        'D' number          done
//! 'R' number         open the file again         'F' number failed   it was not (0: the first opening)
//! 'A' number Attach  + 1 to 3 descriptors        'X' Detached        a client is gone
//! 'E'                the container has ended     'W'                 all that it wrote is in the file
//! ```

use crate::status::{self, Datagram, Failed};
use berth_proto::monitor_v1 as proto;
use berth_sys::Errno;
use prost::Message as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// To the logger.
#[derive(Debug)]
pub enum Order {
    /// The master of the container's console.
    Console(OwnedFd),
    /// Open the file again.
    Reopen(u32),
    /// Pass streams on to a client.
    Attach(u32, proto::Attach, Vec<OwnedFd>),
    /// The container has ended: drain and go.
    Finish,
}

/// From the logger.
#[derive(Debug, PartialEq)]
pub enum Word {
    /// An order was carried out.
    Done(u32),
    /// One was not. Number 0: the log could not be opened at all.
    Failed(u32, Failed),
    /// A client is attached no longer.
    Detached(proto::Detached),
    /// Everything the container wrote is in the file.
    Drained,
}

/// What was heard.
#[derive(Debug)]
pub enum Heard<T> {
    /// This.
    Said(T),
    /// Nothing for now.
    Nothing,
    /// Nobody is there any more.
    End,
}

impl Order {
    /// Sends it without waiting.
    ///
    /// # Errors
    /// EPIPE when the logger is gone, EAGAIN when it hangs and does not read.
    pub fn send(&self, socket: impl AsFd) -> Result<(), Errno> {
        let (bytes, fds): (Vec<u8>, Vec<BorrowedFd<'_>>) = match self {
            Order::Console(fd) => (b"C".to_vec(), vec![fd.as_fd()]),
            Order::Reopen(number) => (numbered(b'R', *number), Vec::new()),
            Order::Attach(number, attach, fds) => {
                let mut bytes = numbered(b'A', *number);
                bytes.extend(attach.encode_to_vec());
                (bytes, fds.iter().map(AsFd::as_fd).collect())
            }
            Order::Finish => (b"E".to_vec(), Vec::new()),
        };
        status::send_datagram(socket, &bytes, &fds)
    }

    /// Takes one without waiting; what cannot be read is passed over.
    pub fn receive(socket: impl AsFd) -> Heard<Order> {
        receive(socket, |bytes, mut fds| match bytes {
            b"C" => fds.pop().map(Order::Console),
            b"E" => Some(Order::Finish),
            [b'R', rest @ ..] => Some(Order::Reopen(number(rest)?.0)),
            [b'A', rest @ ..] => {
                let (number, rest) = number(rest)?;
                Some(Order::Attach(
                    number,
                    proto::Attach::decode(rest).ok()?,
                    fds,
                ))
            }
            _ => None,
        })
    }
}

impl Word {
    /// Sends it without waiting.
    ///
    /// # Errors
    /// EPIPE when the monitor is gone, EAGAIN when it does not read.
    pub fn send(&self, socket: impl AsFd) -> Result<(), Errno> {
        let bytes = match self {
            Word::Done(number) => numbered(b'D', *number),
            Word::Failed(number, failed) => {
                let mut bytes = numbered(b'F', *number);
                bytes.extend(status::encode_failed(failed));
                bytes
            }
            Word::Detached(detached) => {
                let mut bytes = b"X".to_vec();
                bytes.extend(detached.encode_to_vec());
                bytes
            }
            Word::Drained => b"W".to_vec(),
        };
        status::send_datagram(socket, &bytes, &[])
    }

    /// Takes one without waiting; what cannot be read is passed over.
    pub fn receive(socket: impl AsFd) -> Heard<Word> {
        receive(socket, |bytes, _| match bytes {
            b"W" => Some(Word::Drained),
            [b'D', rest @ ..] => Some(Word::Done(number(rest)?.0)),
            [b'F', rest @ ..] => {
                let (number, rest) = number(rest)?;
                Some(Word::Failed(number, status::decode_failed(rest)?))
            }
            [b'X', rest @ ..] => Some(Word::Detached(proto::Detached::decode(rest).ok()?)),
            _ => None,
        })
    }
}

fn receive<T>(socket: impl AsFd, decode: impl Fn(&[u8], Vec<OwnedFd>) -> Option<T>) -> Heard<T> {
    loop {
        match status::receive_datagram(&socket) {
            Datagram::Nothing => return Heard::Nothing,
            Datagram::End => return Heard::End,
            Datagram::Bytes(bytes, fds) => {
                if let Some(said) = decode(&bytes, fds) {
                    return Heard::Said(said);
                }
            }
        }
    }
}

fn numbered(tag: u8, number: u32) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend(number.to_le_bytes());
    bytes
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_words_arrive_as_they_were_sent() {
        let (a, b) = status::pair().unwrap();
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let attach = proto::Attach {
            attach_id: "x".into(),
            stdout_fd: Some(1),
            ..Default::default()
        };
        Order::Console(null()).send(&a).unwrap();
        Order::Reopen(7).send(&a).unwrap();
        Order::Attach(8, attach.clone(), vec![null(), null(), null()])
            .send(&a)
            .unwrap();
        Order::Finish.send(&a).unwrap();
        assert!(matches!(Order::receive(&b), Heard::Said(Order::Console(_))));
        assert!(matches!(Order::receive(&b), Heard::Said(Order::Reopen(7))));
        match Order::receive(&b) {
            Heard::Said(Order::Attach(8, got, fds)) => assert_eq!((got, fds.len()), (attach, 3)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(Order::receive(&b), Heard::Said(Order::Finish)));

        let words = [
            Word::Done(3),
            Word::Failed(4, Failed::new("open log", "/x", Errno::NOENT)),
            Word::Detached(proto::Detached {
                attach_id: "x".into(),
                ..Default::default()
            }),
            Word::Drained,
        ];
        for word in words {
            word.send(&b).unwrap();
            match Word::receive(&a) {
                Heard::Said(got) => assert_eq!(got, word),
                other => panic!("{other:?}"),
            }
        }
        for nonsense in [&b"?"[..], b"D1", b"F", b"X\xff", b""] {
            let _ = status::send_datagram(&b, nonsense, &[]);
        }
        assert!(matches!(Word::receive(&a), Heard::Nothing | Heard::End));
        drop(b);
    }
}
