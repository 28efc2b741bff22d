//! Things that never answer: who waits for them, and who must not.

use berth_proto::runtime_v1 as cri;
use berth_tests::{Node, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use tonic::Code;

/// A file system whose server never says anything: whoever looks anything up in
/// it waits, as for a dead file server. Dropping it lets everybody go.
struct Silent {
    server: Option<File>,
    path: PathBuf,
}

impl Silent {
    fn mount(path: &Path) -> Self {
        fs::create_dir(path).unwrap();
        let server = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        mount(
            Some("silent"),
            path,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        Self {
            server: Some(server),
            path: path.to_owned(),
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        drop(self.server.take());
        umount2(&self.path, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_volume_that_hangs_holds_neither_its_pod_nor_anybody_else() {
    let node = Node::start();
    let silent = Silent::mount(&node.root().join("silent"));
    let pod = node.run_pod("stuck");
    let sibling = pod.start(&["sleep", "1000"]);
    let mut config = pod.container(&["sleep", "1000"]);
    config.mounts.push(cri::Mount {
        container_path: "/data".into(),
        host_path: silent.path.join("inside").to_string_lossy().into_owned(),
        ..Default::default()
    });
    let container = pod.create(config);
    let mut runtime = node.runtime();
    let request = cri::StartContainerRequest {
        container_id: container.id.clone(),
    };
    let start = node.spawn(async move { runtime.start_container(request).await });
    eventually("the start is in a stage that says what it does", || {
        let operations = node.operations().operations;
        operations
            .iter()
            .any(|o| o.kind == "StartContainer" && o.stage == "plan")
            .then_some(())
    });

    assert_eq!(sibling.exec(&["echo", "on"]), "on\n");
    assert_eq!(node.containers(None).len(), 2);
    let other = node.run_pod("other");
    other.remove();

    pod.try_stop().unwrap();
    assert_eq!(container.status().exit_code, 128);
    pod.try_remove().unwrap();
    // Only what waits for the file system itself is left waiting.
    drop(silent);
    let error = node.wait(async { start.await.unwrap() }).unwrap_err();
    assert_ne!(error.code(), Code::Unknown, "{error}");
}
