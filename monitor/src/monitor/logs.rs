//! The loggers of containers, seen from the waiting loop.

use super::*;

impl Monitor {
    pub(super) fn start_logger(
        &self,
        launch: &proto::Launch,
        sources: Vec<(Stream, OwnedFd)>,
        gate: OwnedFd,
    ) -> Result<OwnedFd, Failed> {
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        match clone::fork(clone::Options::default()).step("clone", "logger")? {
            Forked::Child => {
                let mut keep = vec![theirs.as_raw_fd(), gate.as_raw_fd()];
                keep.extend(sources.iter().map(|(_, fd)| fd.as_raw_fd()));
                let line_bytes = match launch.log_line_bytes {
                    0 => self.options.line_bytes,
                    bytes => (bytes as usize).min(log::MAX_LINE_BYTES),
                };
                let path = launch.log_path.clone();
                process::child(keep, move || {
                    let _ = rustix::thread::set_name(c"berth-log");
                    Logger {
                        path,
                        line_bytes,
                        control: theirs,
                        gate,
                        streams: sources,
                    }
                    .run()
                })
            }
            Forked::Parent { .. } => Ok(ours),
        }
    }

    pub(super) fn reopen_log(&mut self, asker: Asker, id: &str) -> Answer {
        let container = self
            .containers
            .get_mut(id)
            .ok_or_else(|| Refused::NotFound(id.to_owned()))?;
        let Some(logger) = &mut container.logger else {
            return Err(Failed::new("reopen log", id, Errno::SRCH).into());
        };
        status::send(&logger.control, &Note::Reopen).step("reopen log", id)?;
        logger.reopens.push(asker);
        Ok(None)
    }

    pub(super) fn hear_logger(&mut self, id: &str) {
        loop {
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            let Some(logger) = &mut container.logger else {
                return;
            };
            let heard = status::receive(&logger.control);
            let (asker, outcome) = match heard {
                Heard::Nothing => return,
                Heard::End => {
                    self.lose_logger(id);
                    return;
                }
                Heard::Note(note) => {
                    // Answers come in the order of the orders.
                    if logger.reopens.is_empty() {
                        if let (Phase::Starting(starting), Note::Failed(failed)) =
                            (&mut container.phase, note)
                        {
                            starting.log_failed = Some(failed);
                        }
                        continue;
                    }
                    let asker = logger.reopens.remove(0);
                    match note {
                        Note::Failed(failed) => (asker, Err(failed)),
                        _ => (asker, Ok(())),
                    }
                }
            };
            match outcome {
                Ok(()) => self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new()),
                Err(failed) => self.fail(asker, failed),
            }
        }
    }

    /// The logger has ended. One that drained a container lets its exit go on;
    /// one that could not open its file has told so, and init will too.
    pub(super) fn lose_logger(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        // While it starts, why there is no log is still to be read.
        if matches!(container.phase, Phase::Starting(_)) {
            if let Some(logger) = &container.logger {
                let _ = epoll::delete(&self.epoll, &logger.control);
            }
            return;
        }
        let Some(logger) = container.logger.take() else {
            return;
        };
        self.sources.remove(&logger.token);
        for asker in logger.reopens {
            self.fail(asker, Failed::new("reopen log", id, Errno::SRCH));
        }
        if let Some(container) = self.containers.get(id)
            && let Phase::Draining { end, .. } = container.phase
        {
            self.record(id, end);
        }
    }
}
