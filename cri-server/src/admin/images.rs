//! Images beyond CRI: archives, pruning, verification, and how far a pull is.

use crate::daemon::Daemon;
use crate::rpc;
use berth_image_service::disk;
use berth_image_service::layer::{Finding, Pace};
use berth_image_service::progress::LayerStage;
use berth_image_service::reference::Reference;
use berth_image_service::service::{ExportError, ImportError, ImportOptions, Verified};
use berth_proto::admin_v1 as admin;
use std::error::Error;
use std::io::{self, BufWriter, Read, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// A stream of answers.
pub type Answers<T> = ReceiverStream<Result<T, Status>>;

/// Messages between a stream and the thread that works on it.
const AHEAD: usize = 4;
/// Bytes of an archive in one message, well below what gRPC takes.
const EXPORT_BYTES: usize = 512 << 10;

/// How far the pull of one reference is; empty where none runs.
pub fn progress(
    daemon: &Daemon,
    request: &admin::PullProgressRequest,
) -> admin::PullProgressResponse {
    let Ok(reference) = request.reference.parse::<Reference>() else {
        return admin::PullProgressResponse::default();
    };
    let reference = reference.to_string();
    let pulls = daemon.images.service().running_pulls();
    let Some((_, progress)) = pulls.into_iter().find(|(name, _)| *name == reference) else {
        return admin::PullProgressResponse::default();
    };
    let missing = progress.missing_layers().into_iter();
    admin::PullProgressResponse {
        stage: progress.stage().name().to_owned(),
        layers: progress.layers(),
        layers_total: progress.layers_total(),
        missing: missing
            .map(|layer| admin::LayerProgress {
                digest: layer.digest.to_string(),
                bytes: layer.bytes,
                bytes_total: layer.bytes_total,
                stage: match layer.stage {
                    LayerStage::Waiting => "waiting",
                    LayerStage::Fetching => "fetching",
                    LayerStage::Done => "done",
                    LayerStage::Shared => "shared",
                }
                .to_owned(),
            })
            .collect(),
    }
}

/// The blocking end of a stream of bytes; a stream that breaks off is an error, not the end.
struct Received {
    chunks: mpsc::Receiver<io::Result<Vec<u8>>>,
    current: io::Cursor<Vec<u8>>,
}

impl Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.current.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = io::Cursor::new(chunk?),
                None => return Ok(0),
            }
        }
    }
}

/// Imports what the caller sends.
pub async fn import(
    daemon: Arc<Daemon>,
    mut stream: Streaming<admin::ImportImagesRequest>,
) -> Result<admin::ImportImagesResponse, Status> {
    let first = stream
        .message()
        .await?
        .ok_or_else(|| Status::invalid_argument("the request has no archive"))?;
    let options = ImportOptions {
        name: Some(first.name).filter(|name| !name.is_empty()),
    };
    let (chunks, received) = mpsc::channel(AHEAD);
    let service = daemon.images.service().clone();
    let dir = service.dir().to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let archive = Received {
            chunks: received,
            current: io::Cursor::new(first.data),
        };
        service.import(archive, &options)
    });
    loop {
        let chunk = match stream.message().await {
            Ok(Some(message)) => Ok(message.data),
            Ok(None) => break,
            Err(status) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                status.message().to_owned(),
            )),
        };
        let broken = chunk.is_err();
        // An importer that takes no more has failed, and says so itself.
        if chunks.send(chunk).await.is_err() || broken {
            break;
        }
    }
    drop(chunks);
    let imported = work
        .await
        .map_err(|_| Status::internal("the import broke off"))?
        .map_err(|error| {
            if disk::is_full(&error) {
                return full(&error, &dir);
            }
            Status::new(import_code(&error), rpc::chain(&error))
        })?;
    for image in &imported {
        tracing::info!(id = %image.image_id, names = ?image.names, "imported");
    }
    let images = imported.into_iter().map(|image| admin::ImportedImage {
        id: image.image_id,
        names: image.names,
    });
    Ok(admin::ImportImagesResponse {
        images: images.collect(),
    })
}

fn import_code(error: &ImportError) -> Code {
    match error {
        ImportError::Archive(_)
        | ImportError::TooManyFiles { .. }
        | ImportError::NoIndex
        | ImportError::Index { .. }
        | ImportError::Missing { .. }
        | ImportError::Wrong { .. }
        | ImportError::Manifest { .. }
        | ImportError::NoImage { .. }
        | ImportError::Name(_)
        | ImportError::OneName { .. } => Code::InvalidArgument,
        ImportError::Unpack { .. } => Code::FailedPrecondition,
        ImportError::Io { .. } | ImportError::Layers(_) | ImportError::Record(_) => Code::Internal,
    }
}

/// What a full disk is to the caller.
pub fn full(error: &(dyn Error + 'static), dir: &std::path::Path) -> Status {
    Status::resource_exhausted(format!("{}; {}", rpc::chain(error), disk::describe(dir)))
}

/// Sends what is written to it.
struct Sender(mpsc::Sender<Result<admin::ExportImagesResponse, Status>>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(EXPORT_BYTES)];
        let answer = admin::ExportImagesResponse {
            data: part.to_vec(),
        };
        self.0
            .blocking_send(Ok(answer))
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the caller hung up"))?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Exports images to the caller.
pub fn export(
    daemon: Arc<Daemon>,
    request: admin::ExportImagesRequest,
) -> Answers<admin::ExportImagesResponse> {
    let (answers, stream) = mpsc::channel(AHEAD);
    let service = daemon.images.service().clone();
    tokio::task::spawn_blocking(move || {
        let out = BufWriter::with_capacity(EXPORT_BYTES, Sender(answers.clone()));
        if let Err(error) = service.export(&request.images, out) {
            let code = match &error {
                ExportError::NoImage { .. } => Code::NotFound,
                ExportError::NotKept { .. } => Code::FailedPrecondition,
                ExportError::Io(_) => Code::DataLoss,
            };
            // Nobody is there to hear it where the caller hung up.
            let _ = answers.blocking_send(Err(Status::new(code, rpc::chain(&error))));
        }
    });
    ReceiverStream::new(stream)
}

/// Removes what no container has.
pub async fn prune(
    daemon: Arc<Daemon>,
    request: admin::PruneImagesRequest,
) -> Result<admin::PruneImagesResponse, Status> {
    let service = daemon.images.service().clone();
    let pruned = tokio::task::spawn_blocking(move || service.prune(request.all))
        .await
        .map_err(|_| Status::internal("pruning broke off"))?;
    Ok(admin::PruneImagesResponse {
        images: pruned.images,
        bytes: pruned.bytes,
    })
}

/// What is damaged; with `read` everything is read for it.
pub fn verify(
    daemon: Arc<Daemon>,
    request: admin::VerifyImagesRequest,
) -> Answers<admin::VerifyImagesResponse> {
    let (answers, stream) = mpsc::channel(AHEAD);
    let service = daemon.images.service().clone();
    tokio::task::spawn_blocking(move || {
        let (layers, images) = service.not_whole();
        for what in layers {
            let known = admin::VerifyImagesResponse {
                what,
                verdict: "damaged".to_owned(),
                why: "was found before, and is fetched again with the next pull that needs it"
                    .to_owned(),
                images: images.clone(),
                bytes: 0,
            };
            if answers.blocking_send(Ok(known)).is_err() {
                return;
            }
        }
        if request.read {
            service.verify(&mut Pace::full(), &mut |verified| {
                answers.blocking_send(Ok(answer(verified))).is_ok()
            });
        }
    });
    ReceiverStream::new(stream)
}

fn answer(verified: Verified) -> admin::VerifyImagesResponse {
    let (verdict, why, bytes) = match verified.finding {
        Finding::Whole { bytes } => ("whole", String::new(), bytes),
        Finding::Damaged(damage) => ("damaged", damage.to_string(), 0),
        Finding::Unknown => (
            "unknown",
            "it was unpacked by a version that kept nothing to compare it with".to_owned(),
            0,
        ),
        Finding::Gone => ("damaged", "is not what its name says".to_owned(), 0),
    };
    admin::VerifyImagesResponse {
        what: verified.what,
        verdict: verdict.to_owned(),
        why,
        images: verified.images,
        bytes,
    }
}
