//! What waits to be written where lines may be dropped: a bounded queue and a
//! thread that writes, so that a slow or hung disk never stops the reading.

use super::file::{Flushed, LogFile};
use super::order::Word;
use super::tap;
use crate::status::Failed;
use berth_sys::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes that may wait before lines are dropped: a disk's hiccup of a hundred
/// milliseconds at tens of MiB/s.
const QUEUE_BYTES: usize = 4 << 20;

/// What is waiting is joined up to this, so that many small lines are one write.
const JOIN_BYTES: usize = 64 << 10;

/// Pause between two tries to write to a disk that was full.
pub const RETRY: Duration = Duration::from_millis(100);

/// The queue; the thread ends when it is told to and has written everything.
pub struct Queue(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    /// Bytes in the queue and in the writer's hands.
    bytes: usize,
    reopens: Vec<u32>,
    closing: bool,
    giving_up: bool,
    over: bool,
    /// Lines and bytes that were taken and could not be written.
    lost: (u64, u64),
}

impl Queue {
    /// Starts the thread. `control` is where it answers what it is ordered.
    ///
    /// # Errors
    /// EAGAIN when there are too many threads.
    pub fn start(file: LogFile, control: OwnedFd) -> Result<Queue, Failed> {
        let queue = Queue(Arc::new((Mutex::default(), Condvar::new())));
        let shared = Queue(queue.0.clone());
        std::thread::Builder::new()
            .name("log-writer".into())
            .stack_size(64 << 10)
            .spawn(move || shared.write(file, &control))
            .map_err(|_| Failed::new("start thread", "log writer", Errno::AGAIN))?;
        Ok(queue)
    }

    /// True when a read's worth of lines may be added.
    pub fn has_room(&self) -> bool {
        self.state().bytes < QUEUE_BYTES
    }

    /// Adds whole lines.
    pub fn add(&self, lines: &[u8]) {
        let mut state = self.state();
        state.bytes += lines.len();
        match state.lines.back_mut() {
            Some(last) if last.len() < JOIN_BYTES => last.extend_from_slice(lines),
            _ => state.lines.push_back(lines.to_vec()),
        }
        self.0.1.notify_all();
    }

    /// Has the file opened again; the thread answers.
    pub fn reopen(&self, number: u32) {
        self.state().reopens.push(number);
        self.0.1.notify_all();
    }

    /// Nothing more will be added.
    pub fn close(&self) {
        self.state().closing = true;
        self.0.1.notify_all();
    }

    /// What cannot be written is to be let go of.
    pub fn give_up(&self) {
        let mut state = self.state();
        state.closing = true;
        state.giving_up = true;
        self.0.1.notify_all();
    }

    /// True once everything is written or let go of, after [`Queue::close`].
    pub fn is_over(&self) -> bool {
        self.state().over
    }

    /// Lines and bytes that were added and are in no file; those of a thread
    /// that hangs too.
    pub fn lost(&self) -> (u64, u64) {
        let state = self.state();
        let mut lost = state.lost;
        if !state.over {
            for lines in &state.lines {
                let (lines, bytes) = tap::count(lines);
                lost = (lost.0 + lines, lost.1 + bytes);
            }
        }
        lost
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn write(self, mut file: LogFile, control: &OwnedFd) {
        // Bytes the file has taken over and not written yet.
        let mut taken = 0;
        loop {
            let stuck = taken > 0;
            let mut state = self.state();
            if stuck {
                // Also while it is closing: the disk decides.
                let wait = self.0.1.wait_timeout_while(state, RETRY, |state| {
                    state.reopens.is_empty() && !state.giving_up
                });
                state = wait.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                let wait = self.0.1.wait_while(state, |state| {
                    state.lines.is_empty() && state.reopens.is_empty() && !state.closing
                });
                state = wait.unwrap_or_else(PoisonError::into_inner);
                if state.lines.is_empty() && state.reopens.is_empty() {
                    state.over = true;
                    return;
                }
            }
            let giving_up = state.giving_up;
            let reopens = std::mem::take(&mut state.reopens);
            let next = state.lines.pop_front_if(|_| !stuck);
            drop(state);

            for number in reopens {
                let word = match file.reopen() {
                    Ok(()) => Word::Done(number),
                    Err(failed) => Word::Failed(number, failed),
                };
                let _ = word.send(control);
            }
            if let Some(mut lines) = next {
                taken = lines.len();
                file.add(&mut lines);
            }
            let flushed = file.flush();
            let mut state = self.state();
            match flushed {
                Flushed::All => {
                    state.bytes -= taken;
                    taken = 0;
                    if state.lines.is_empty() {
                        file.shrink();
                    }
                }
                Flushed::Stuck if giving_up => {
                    let mut rest = file.give_up();
                    for lines in state.lines.drain(..) {
                        rest.extend_from_slice(&lines);
                    }
                    state.lost = tap::count(&rest);
                    state.over = true;
                    return;
                }
                Flushed::Stuck => {}
            }
        }
    }
}
