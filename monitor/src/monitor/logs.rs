//! The loggers of containers, seen from the waiting loop.

use super::*;
use crate::log::order::{Heard, Order, Word};
use proto::detached::Reason;

/// A container's logger.
pub(super) struct LoggerProcess {
    pub(super) control: OwnedFd,
    pub(super) token: u64,
    /// Orders that are not answered yet, by number.
    orders: BTreeMap<u32, Asker>,
    last_order: u32,
    /// Attached clients: who asked.
    attached: BTreeMap<String, Asker>,
}

/// What a logger is started with, besides the request.
pub(super) struct LoggerStreams {
    /// The read ends of the container's output.
    pub(super) sources: Vec<(Stream, OwnedFd)>,
    /// The write end of its input.
    pub(super) stdin: Option<OwnedFd>,
    /// What lets init go on.
    pub(super) gate: OwnedFd,
}

impl LoggerProcess {
    pub(super) fn new(control: OwnedFd, token: u64) -> LoggerProcess {
        LoggerProcess {
            control,
            token,
            orders: BTreeMap::new(),
            last_order: 0,
            attached: BTreeMap::new(),
        }
    }

    /// Gives an order that is answered.
    fn order(
        &mut self,
        asker: Asker,
        id: &str,
        order: impl FnOnce(u32) -> Order,
    ) -> Result<(), Failed> {
        let number = self.last_order.wrapping_add(1).max(1);
        let sent = order(number).send(&self.control);
        // All has been written, and it is gone before the container is told as ended.
        if let Err(Errno::PIPE) = sent {
            return Err(Failed::new("container has ended", id, Errno::SRCH));
        }
        // EAGAIN: a hung disk keeps it from reading.
        sent.step("tell logger", id)?;
        self.last_order = number;
        self.orders.insert(number, asker);
        Ok(())
    }
}

impl Monitor {
    pub(super) fn start_logger(
        &self,
        launch: &proto::Launch,
        streams: LoggerStreams,
        page: &OwnedFd,
    ) -> Result<OwnedFd, Failed> {
        let (ours, theirs) = status::pair().step("socketpair", "")?;
        let page = page
            .try_clone()
            .map_err(|_| Failed::new("dup", "log counts", Errno::MFILE))?;
        match clone::fork(clone::Options::default()).step("clone", "logger")? {
            Forked::Child => {
                let LoggerStreams {
                    sources,
                    stdin,
                    gate,
                } = streams;
                let mut keep = vec![theirs.as_raw_fd(), gate.as_raw_fd(), page.as_raw_fd()];
                keep.extend(sources.iter().map(|(_, fd)| fd.as_raw_fd()));
                keep.extend(stdin.iter().map(AsRawFd::as_raw_fd));
                let line_bytes = match launch.log_line_bytes {
                    0 => self.options.line_bytes,
                    bytes => (bytes as usize).min(log::MAX_LINE_BYTES),
                };
                let console = launch.process.as_ref().is_some_and(|process| process.tty);
                let logger = Logger {
                    container_id: launch.container_id.clone(),
                    path: launch.log_path.clone(),
                    line_bytes,
                    policy: launch.log_policy.unwrap_or_default(),
                    control: theirs,
                    gate,
                    page,
                    streams: sources,
                    stdin,
                    stdin_once: launch.stdin_once,
                    console,
                    console_stdin: console && launch.stdin,
                };
                process::child(keep, move || {
                    let _ = rustix::thread::set_name(c"berth-log");
                    logger.run()
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
        logger.order(asker, id, Order::Reopen)?;
        Ok(None)
    }

    pub(super) fn attach(
        &mut self,
        asker: Asker,
        attach: proto::Attach,
        fds: Vec<OwnedFd>,
    ) -> Answer {
        let id = attach.container_id.clone();
        self.running(&id)?;
        let logger = self
            .containers
            .get_mut(&id)
            .and_then(|container| container.logger.as_mut())
            .ok_or_else(|| Failed::new("attach", &id, Errno::SRCH))?;
        let client = attach.attach_id.clone();
        let wanted = [attach.stdin_fd, attach.stdout_fd, attach.stderr_fd];
        if client.is_empty() || wanted == [None; 3] || fds.len() > status::MAX_FDS {
            return Err(Failed::invalid("attach", id).into());
        }
        if logger.attached.contains_key(&client) {
            return Err(Failed::new("attach", client, Errno::EXIST).into());
        }
        logger.order(asker, &id, |number| Order::Attach(number, attach, fds))?;
        logger.attached.insert(
            client,
            Asker {
                request: 0,
                ..asker
            },
        );
        Ok(None)
    }

    /// Gives the container's console to its logger.
    pub(super) fn give_console(&self, container: &Container) {
        if let (Some(console), Some(logger)) = (&container.console, &container.logger)
            && let Ok(copy) = console.try_clone()
        {
            let _ = Order::Console(copy).send(&logger.control);
        }
    }

    pub(super) fn hear_logger(&mut self, id: &str) {
        loop {
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            let Some(logger) = &mut container.logger else {
                return;
            };
            let word = match Word::receive(&logger.control) {
                Heard::Nothing => return,
                Heard::End => return self.lose_logger(id),
                Heard::Said(word) => word,
            };
            match word {
                Word::Done(number) => {
                    if let Some(asker) = logger.orders.remove(&number) {
                        self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new());
                    }
                }
                Word::Failed(number, failed) => {
                    if let Some(asker) = logger.orders.remove(&number) {
                        self.fail(asker, failed);
                    } else if let Phase::Starting(starting) = &mut container.phase {
                        starting.log_failed = Some(failed);
                    }
                }
                Word::Detached(detached) => {
                    if let Some(asker) = logger.attached.remove(&detached.attach_id) {
                        self.reply(asker, ReplyBody::Detached(detached), Vec::new());
                    }
                }
                Word::Drained => {
                    if let Phase::Draining { end, .. } = container.phase {
                        self.record(id, end);
                    }
                }
            }
        }
    }

    /// What a logger that could not open its file has said.
    pub(super) fn last_words(logger: &LoggerProcess) -> Option<Failed> {
        let mut why = None;
        while let Heard::Said(word) = Word::receive(&logger.control) {
            if let Word::Failed(0, failed) = word {
                why = Some(failed);
            }
        }
        why
    }

    /// The logger has ended. One that drained a container lets its exit go on;
    /// one that could not open its file has told so, and init will too.
    fn lose_logger(&mut self, id: &str) {
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
        for asker in logger.orders.into_values() {
            self.fail(asker, Failed::new("container has ended", id, Errno::SRCH));
        }
        for (attach_id, asker) in logger.attached {
            let detached = proto::Detached {
                container_id: id.to_owned(),
                attach_id,
                reason: Reason::Lost.into(),
            };
            self.reply(asker, ReplyBody::Detached(detached), Vec::new());
        }
        if let Some(container) = self.containers.get(id)
            && let Phase::Draining { end, .. } = container.phase
        {
            self.record(id, end);
        }
    }
}
