//! ImageFsInfo: what images and containers' writable layers take of the disk.

use crate::daemon::Daemon;
use berth_image_service::usage::FsUsage;
use berth_proto::runtime_v1 as cri;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::Status;

/// The layers' sizes are known from their records; writable layers are measured.
pub async fn image_fs_info(daemon: Arc<Daemon>) -> Result<cri::ImageFsInfoResponse, Status> {
    let images = daemon.images.clone();
    let (image, container) = tokio::task::spawn_blocking(move || images.usage())
        .await
        .map_err(|_| Status::internal("measuring the disk broke off"))?;
    Ok(cri::ImageFsInfoResponse {
        image_filesystems: vec![usage(image)],
        container_filesystems: vec![usage(container)],
    })
}

fn usage(usage: FsUsage) -> cri::FilesystemUsage {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    cri::FilesystemUsage {
        timestamp: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        fs_id: Some(cri::FilesystemIdentifier {
            mountpoint: usage.mountpoint.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(cri::UInt64Value {
            value: usage.used_bytes,
        }),
        inodes_used: Some(cri::UInt64Value {
            value: usage.inodes,
        }),
    }
}
