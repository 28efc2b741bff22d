//! The CRI ImageService: one file per verb.

mod image_fs_info;
mod image_status;
mod list_images;
mod pull_image;
mod remove_image;

pub use pull_image::SIGNATURE_VALIDATION_FAILED;

use crate::daemon::Daemon;
use crate::rpc::to_the_end;
use crate::runtime::chunks::Pieces;
use berth_image_service::image::Image;
use berth_proto::runtime_v1 as cri;
use cri::image_service_server::ImageService;
use std::sync::Arc;
use tonic::{Request, Response, Status, async_trait};

/// The service on the socket.
pub struct Images {
    daemon: Arc<Daemon>,
}

impl Images {
    /// The service of this daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

/// An image as CRI shows it; its spec names what was asked for.
fn to_cri(image: &Image) -> cri::Image {
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid: image.uid.map(|value| cri::Int64Value { value }),
        username: image.username.clone(),
        spec: Some(cri::ImageSpec {
            image: image.id.clone(),
            ..Default::default()
        }),
        pinned: image.pinned,
    }
}

#[async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        let work = async move { Ok(list_images::list_images(&daemon, &request)) };
        to_the_end(&self.daemon.metrics, "ListImages", work).await
    }

    type StreamImagesStream = Pieces<cri::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        let work = async move { Ok(list_images::stream_images(&daemon, &request)) };
        to_the_end(&self.daemon.metrics, "StreamImages", work).await
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        let work = async move { Ok(image_status::image_status(&daemon, &request)?) };
        to_the_end(&self.daemon.metrics, "ImageStatus", work).await
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let work = pull_image::pull_image(self.daemon.clone(), request.into_inner());
        to_the_end(&self.daemon.metrics, "PullImage", work).await
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let work = remove_image::remove_image(self.daemon.clone(), request.into_inner());
        to_the_end(&self.daemon.metrics, "RemoveImage", work).await
    }

    async fn image_fs_info(
        &self,
        _request: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let work = image_fs_info::image_fs_info(self.daemon.clone());
        to_the_end(&self.daemon.metrics, "ImageFsInfo", work).await
    }
}
