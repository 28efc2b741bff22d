//! GetContainerEvents: what happens to containers and sandboxes from now on.
//!
//! Each listener has a bounded number of events waiting for it; one that falls
//! behind is told so by DATA_LOSS and has to list and listen again.

use crate::convert::answer;
use crate::daemon::Daemon;
use crate::metrics::Metrics;
use berth_proto::runtime_v1 as cri;
use berth_sandbox::events::{Deaf, Event, EventKind, Listener};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;

/// Events on their way to the client, beyond those that wait for it.
const IN_FLIGHT: usize = 16;

/// The stream of one client.
pub struct Events(mpsc::Receiver<Result<cri::ContainerEventResponse, Status>>);

impl Stream for Events {
    type Item = Result<cri::ContainerEventResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// Listens for a client until it goes.
pub fn get_container_events(daemon: &Daemon) -> Events {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    let listener = daemon.sandboxes.listen();
    tokio::spawn(pass_on(listener, sender, daemon.metrics.clone()));
    Events(receiver)
}

async fn pass_on(
    mut listener: Listener,
    client: mpsc::Sender<Result<cri::ContainerEventResponse, Status>>,
    metrics: Metrics,
) {
    loop {
        let next = tokio::select! {
            next = listener.next() => next,
            () = client.closed() => return,
        };
        let message = match next {
            Ok(event) => Ok(response(&event)),
            Err(Deaf::Over) => return,
            Err(behind @ Deaf::Behind { missed }) => {
                metrics.events_missed(missed);
                tracing::warn!(missed, "a client did not keep up with the events");
                Err(Status::data_loss(behind.to_string()))
            }
        };
        let over = message.is_err();
        if client.send(message).await.is_err() || over {
            return;
        }
    }
}

fn response(event: &Event) -> cri::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => cri::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    let statuses = event.containers.iter();
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: event.pod.as_ref().map(|pod| answer::pod_status(pod)),
        containers_statuses: statuses
            .map(|container| answer::container_status(container))
            .collect(),
    }
}
