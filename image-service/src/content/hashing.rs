//! Hashing beside the reader: the bytes of a large blob are digested on a thread of their own,
//! so that whoever reads them has time for decompression.

use crate::digest::{Digest, Hasher, Mismatch};
use std::mem;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

/// Bytes handed over at once; a blob that is shorter is hashed where it is read.
const BATCH_BYTES: usize = 256 << 10;
/// Batches that wait; with those being filled and hashed at most five are in memory.
const BATCHES_AHEAD: usize = 3;

/// A hasher that moves to a thread of its own with its first full batch.
pub(crate) struct Aside {
    batch: Vec<u8>,
    state: State,
}

enum State {
    Here(Hasher),
    Away {
        batches: SyncSender<Vec<u8>>,
        spent: Receiver<Vec<u8>>,
        thread: JoinHandle<Hasher>,
    },
    /// Between the two.
    Moving,
}

impl Aside {
    pub(crate) fn new(hasher: Hasher) -> Aside {
        Aside {
            batch: Vec::new(),
            state: State::Here(hasher),
        }
    }

    /// Takes the next bytes in; waits where the thread is behind.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = BATCH_BYTES - self.batch.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.batch.extend_from_slice(now);
            bytes = later;
            if self.batch.len() == BATCH_BYTES {
                self.hand_over();
            }
        }
    }

    fn hand_over(&mut self) {
        if matches!(self.state, State::Here(_)) {
            self.state = move_away(mem::replace(&mut self.state, State::Moving));
        }
        match &mut self.state {
            State::Here(hasher) => {
                hasher.update(&self.batch);
                self.batch.clear();
            }
            State::Away { batches, spent, .. } => {
                let empty = spent
                    .try_recv()
                    .unwrap_or_else(|_| Vec::with_capacity(BATCH_BYTES));
                let full = mem::replace(&mut self.batch, empty);
                // The thread ends only once the sender is gone.
                let _ = batches.send(full);
            }
            State::Moving => {}
        }
    }

    /// Compares the digest of everything taken in.
    ///
    /// # Errors
    /// [`Mismatch`] with both digests.
    pub(crate) fn verify(mut self, expected: &Digest) -> Result<(), Mismatch> {
        let mut hasher = match mem::replace(&mut self.state, State::Moving) {
            State::Here(hasher) => hasher,
            State::Away {
                batches, thread, ..
            } => {
                drop(batches);
                match thread.join() {
                    Ok(hasher) => hasher,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            State::Moving => expected.hasher(),
        };
        hasher.update(&self.batch);
        hasher.verify(expected)
    }
}

/// Starts the thread; without one the hasher stays where it is.
fn move_away(state: State) -> State {
    let State::Here(hasher) = state else {
        return state;
    };
    let (batches, received) = mpsc::sync_channel::<Vec<u8>>(BATCHES_AHEAD);
    let (give_back, spent) = mpsc::sync_channel(BATCHES_AHEAD + 2);
    let kept = hasher.clone();
    let thread = thread::Builder::new()
        .name("blob-hash".into())
        .spawn(move || {
            let mut hasher = hasher;
            for mut batch in received {
                hasher.update(&batch);
                batch.clear();
                let _ = give_back.try_send(batch);
            }
            hasher
        });
    match thread {
        Ok(thread) => State::Away {
            batches,
            spent,
            thread,
        },
        Err(_) => State::Here(kept),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_the_same_wherever_it_is_made() {
        for length in [
            0,
            1,
            BATCH_BYTES - 1,
            BATCH_BYTES,
            BATCH_BYTES + 1,
            3_000_001,
        ] {
            let bytes: Vec<u8> = (0..length).map(|n| (n * 7 % 251) as u8).collect();
            let digest = Digest::sha256(&bytes);
            let mut aside = Aside::new(digest.hasher());
            for part in bytes.chunks(70_001) {
                aside.update(part);
            }
            aside.verify(&digest).unwrap();
            let mut aside = Aside::new(digest.hasher());
            aside.update(&bytes);
            aside.update(b"more");
            aside.verify(&digest).unwrap_err();
        }
    }
}
