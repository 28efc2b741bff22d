//! Clients: accepting them, their requests in turn, replies that never block.

use super::*;

/// Clients at a time: a daemon, its predecessor, and some tools.
const MAX_CONNECTIONS: usize = 64;

/// How long it waits before it looks for clients again when there are too many
/// or too few descriptors.
const CROWDED: Duration = Duration::from_millis(200);

/// Requests taken from one client before others have their turn.
const REQUESTS_PER_TURN: usize = 16;

impl Monitor {
    pub(super) fn accept(&mut self) {
        loop {
            if self.connections.len() >= MAX_CONNECTIONS {
                return self.pause_accepting();
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return,
                // No descriptors or memory: not to be asked again at once.
                Err(_) => return self.pause_accepting(),
            };
            let own = rustix::process::geteuid();
            let trusted = rustix::net::sockopt::socket_peercred(&socket)
                .is_ok_and(|peer| peer.uid.is_root() || peer.uid == own);
            if !trusted || self.ending.is_some() {
                continue;
            }
            let token = self.token(Source::Connection);
            if watch(&self.epoll, &socket, token).is_err() {
                self.sources.remove(&token);
                continue;
            }
            self.connections.insert(token, Connection::new(socket));
        }
    }

    /// Leaves further clients waiting in the kernel's queue for a while.
    pub(super) fn pause_accepting(&mut self) {
        let data = epoll::EventData::new_u64(self.listener_token);
        let _ = epoll::modify(
            &self.epoll,
            &self.listener,
            data,
            epoll::EventFlags::empty(),
        );
        self.accept_again = Some(Instant::now() + CROWDED);
    }

    pub(super) fn go_on_accepting(&mut self) {
        if self.accept_again.take().is_some() {
            let data = epoll::EventData::new_u64(self.listener_token);
            let _ = epoll::modify(&self.epoll, &self.listener, data, epoll::EventFlags::IN);
        }
    }

    pub(super) fn serve(&mut self, token: u64) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(connection) = self.connections.get_mut(&token) else {
                return;
            };
            let next = connection.flush().and_then(|()| connection.next());
            match next {
                Ok(Some(incoming)) => self.handle(token, incoming),
                Ok(None) => break,
                Err(why) => {
                    if !matches!(why, Dropped::Closed) {
                        complain("connection", &why);
                    }
                    self.drop_connection(token);
                    return;
                }
            }
        }
        self.rewatch(token);
    }

    /// Waits for room only while replies wait for it.
    pub(super) fn rewatch(&mut self, token: u64) {
        let Some(connection) = self.connections.get(&token) else {
            return;
        };
        let mut flags = epoll::EventFlags::IN;
        flags.set(epoll::EventFlags::OUT, connection.is_waiting());
        let data = epoll::EventData::new_u64(token);
        let _ = epoll::modify(&self.epoll, connection.socket(), data, flags);
    }

    /// Forgets a client. Its execs end with it: nobody would take their output.
    pub(super) fn drop_connection(&mut self, token: u64) {
        self.sources.remove(&token);
        self.connections.remove(&token);
        self.go_on_accepting();
        for exec in self.execs.values().filter(|exec| exec.connection == token) {
            exec.kill(libc::SIGKILL);
        }
    }

    pub(super) fn reply(&mut self, asker: Asker, body: ReplyBody, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&asker.connection) else {
            return;
        };
        let reply = proto::Reply {
            id: asker.request,
            body: Some(body),
        };
        match connection.send(&reply, fds) {
            Ok(()) => self.rewatch(asker.connection),
            Err(why) => {
                complain("reply", &why);
                self.drop_connection(asker.connection);
            }
        }
    }

    pub(super) fn fail(&mut self, asker: Asker, failed: Failed) {
        self.reply(asker, ReplyBody::Failure(failed.into_proto()), Vec::new());
    }

    pub(super) fn handle(&mut self, connection: u64, incoming: Incoming) {
        let Incoming { request, fds } = incoming;
        let asker = Asker {
            connection,
            request: request.id,
        };
        let done = match request.body {
            Some(Body::Hello(hello)) => {
                if let Some(connection) = self.connections.get_mut(&connection) {
                    connection.events = hello.events;
                }
                let hello = proto::HelloReply {
                    protocol: proto::PROTOCOL,
                    features: proto::feature::BASE
                        | proto::feature::ATTACH
                        | proto::feature::OCI_RUNTIME
                        | proto::feature::HOOKS
                        | proto::feature::VOLUMES,
                    pod_id: self.options.pod.clone(),
                    pid: std::process::id() as i32,
                    version: env!("CARGO_PKG_VERSION").into(),
                };
                self.reply(asker, ReplyBody::Hello(hello), Vec::new());
                return;
            }
            Some(Body::Inspect(_)) => {
                let state = self.state();
                self.reply(asker, ReplyBody::State(state), Vec::new());
                return;
            }
            Some(Body::MakeNamespaces(request)) => self.make_namespaces(asker, request),
            Some(Body::Launch(launch)) => self.launch(asker, launch, fds),
            Some(Body::Exec(exec)) => self.exec(asker, exec, fds),
            Some(Body::ReopenLog(request)) => self.reopen_log(asker, &request.container_id),
            Some(Body::Attach(attach)) => self.attach(asker, attach, fds),
            Some(Body::Signal(signal)) => self.signal(&signal).map(Some),
            Some(Body::CallOff(request)) => {
                self.call_off(&request.container_id);
                Ok(Some(()))
            }
            Some(Body::ResizeTty(resize)) => self.resize(&resize).map(Some),
            Some(Body::Forget(forget)) => self.forget(&forget.container_id).map(Some),
            Some(Body::Shutdown(_)) => self.shutdown().map(Some),
            None => Err(Refused::Failed(Failed::new(
                "request",
                "unknown",
                Errno::NOSYS,
            ))),
        };
        match done {
            Ok(None) => {}
            Ok(Some(())) => self.reply(asker, ReplyBody::Done(proto::Done {}), Vec::new()),
            Err(Refused::Failed(failed)) => self.fail(asker, failed),
            Err(Refused::NotFound(what)) => {
                let failure = proto::Failure {
                    stage: "find".into(),
                    errno: Errno::NOENT.raw_os_error(),
                    detail: what,
                    not_found: true,
                };
                self.reply(asker, ReplyBody::Failure(failure), Vec::new());
            }
        }
    }
}
