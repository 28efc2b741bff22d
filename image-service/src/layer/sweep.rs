//! Removes directories in the background, one after the other.

use super::walk;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Removes names in one directory. What is still waiting when the process ends
/// is found by its name at the next start.
pub(crate) struct Sweeper(Arc<Shared>);

struct Shared {
    directory: OwnedFd,
    queue: Mutex<Queue>,
    idle: Condvar,
}

#[derive(Default)]
struct Queue {
    names: VecDeque<String>,
    /// A thread is at work; it ends when the queue is empty.
    running: bool,
}

impl Sweeper {
    pub(crate) fn new(directory: OwnedFd) -> Sweeper {
        Sweeper(Arc::new(Shared {
            directory,
            queue: Mutex::default(),
            idle: Condvar::new(),
        }))
    }

    /// Has `name` removed with everything below it. Returns at once.
    pub(crate) fn remove(&self, name: String) {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.names.push_back(name);
        if queue.running {
            return;
        }
        let shared = self.0.clone();
        let spawned = thread::Builder::new()
            .name("layer-sweep".into())
            .spawn(move || shared.work());
        match spawned {
            Ok(_) => queue.running = true,
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no thread to remove files; they stay until the next removal"
            ),
        }
    }

    /// Waits until nothing is left to remove.
    pub(crate) fn finish(&self) {
        let queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let _queue = self
            .0
            .idle
            .wait_while(queue, |queue| queue.running)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let name = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                match queue.names.pop_front() {
                    Some(name) => name,
                    None => {
                        queue.running = false;
                        self.idle.notify_all();
                        return;
                    }
                }
            };
            if let Err(error) = walk::remove(&self.directory, name.as_bytes()) {
                tracing::warn!(
                    name,
                    error = &error as &dyn std::error::Error,
                    "cannot remove; the next start tries again"
                );
            }
        }
    }
}
