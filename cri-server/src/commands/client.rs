//! Talking to the running daemon.

use super::Outcome;
use crate::config::{Config, Layout, Overrides};
use crate::rpc::MESSAGE_BYTES;
use crate::socket;
use berth_proto::admin_v1::admin_client::AdminClient;
use berth_proto::runtime_v1 as cri;
use cri::image_service_client::ImageServiceClient;
use cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::future::Future;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// How long the daemon may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Why the daemon cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no daemon answers on {}; is `berth serve` running, and with this --root?", path.display())]
    Connect {
        path: PathBuf,
        source: tonic::transport::Error,
    },
    #[error("the daemon refused: {message}")]
    Refused { message: String },
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        let code = crate::metrics::code_name(status.code());
        Self::Refused {
            message: format!("{} ({code})", status.message()),
        }
    }
}

/// Runs a command's async part.
pub fn block_on(work: impl Future<Output = Outcome>) -> Outcome {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// A connection to the daemon of these places.
pub async fn connect(places: &Overrides) -> Result<Channel, Box<dyn Error + Send + Sync>> {
    let path = match &places.socket {
        // Then a broken configuration file is no reason not to ask.
        Some(path) => path.clone(),
        None => {
            let layout = Layout::find(places)?;
            layout.places(&Config::load(&layout)?).socket
        }
    };
    let connecting = path.clone();
    // The address is not used: the connector below knows the socket.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = connecting.clone();
            async move {
                let stream = socket::connect(&path)?;
                stream.set_nonblocking(true)?;
                Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::from_std(stream)?))
            }
        }))
        .await
        .map_err(|source| ClientError::Connect { path, source }.into())
}

/// The daemon's images.
pub fn images(channel: Channel) -> ImageServiceClient<Channel> {
    ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

/// The daemon's own service.
pub fn admin(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES)
}

/// `berth version`.
pub fn version(places: &Overrides) -> Outcome {
    println!("berth {}", env!("CARGO_PKG_VERSION"));
    block_on(async {
        let Ok(channel) = connect(places).await else {
            writeln!(std::io::stdout(), "daemon: does not answer")?;
            return Ok(());
        };
        let mut client = RuntimeServiceClient::new(channel);
        let answer = client
            .version(cri::VersionRequest::default())
            .await
            .map_err(ClientError::from)?;
        let version = answer.into_inner();
        writeln!(
            std::io::stdout(),
            "daemon: {} {}, CRI {}",
            version.runtime_name,
            version.runtime_version,
            version.runtime_api_version
        )?;
        Ok(())
    })
}
