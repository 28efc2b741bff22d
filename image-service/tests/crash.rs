//! A pull killed at every named point: the next start has the image whole or not at all, the
//! pull can be repeated, and after a removal nothing is left.

mod support;

use berth_image_service::pull::CRASH_POINTS;
use serde_json::json;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use support::*;

const DIR: &str = "BERTH_TEST_DIR";
const REFERENCE: &str = "BERTH_TEST_REFERENCE";

/// What the child of the sweep runs; alone it does nothing.
#[tokio::test]
async fn the_pull_that_is_killed() {
    let (Ok(dir), Ok(reference)) = (std::env::var(DIR), std::env::var(REFERENCE)) else {
        return;
    };
    let service = Node::open(Path::new(&dir));
    service
        .pull(&reference, None, &Default::default())
        .await
        .unwrap();
    service.settle().unwrap();
}

fn pull_in_child(dir: &Path, reference: &str, crash_at: &str) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_pull_that_is_killed"])
        .env(DIR, dir)
        .env(REFERENCE, reference)
        .env("BERTH_CRASH_AT", crash_at)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}

fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files(&path));
        } else {
            found.push(path.display().to_string());
        }
    }
    found
}

#[tokio::test]
async fn a_pull_killed_anywhere_is_repeated_and_undone() {
    let tars = [tar_of(&[("a", b"1")]), tar_of(&[("b", b"2")])];
    let picture = Picture::of(&tars, "gzip", json!({}));
    let store = [
        "layer-unpacked",
        "layer-renamed",
        "layer-blobs-synced",
        "layers-synced",
        "layers-marked",
    ];
    // From here on the pull was answered.
    let is_over =
        |point| ["pull_image.after_record", "layers-synced", "layers-marked"].contains(&point);
    for point in CRASH_POINTS.iter().chain(&store) {
        let server = Server::of(picture.clone());
        let dir = tempfile::tempdir().unwrap();
        let status = pull_in_child(dir.path(), &server.reference(), point);
        assert_eq!(status.signal(), Some(9), "not killed at {point}: {status}");

        let service = Node::open(dir.path());
        let node = Node { service, dir };
        let there = node.service.find(&server.reference()).is_some();
        assert_eq!(there, is_over(*point), "{point}");
        let again = node.pull(&server.reference()).await.unwrap();
        assert_eq!(again.image_id, picture.image_id);
        // What was unpacked and renamed before is not fetched twice.
        if is_over(point) || ["pull_image.before_record", "layer-blobs-synced"].contains(point) {
            assert_eq!(again.bytes, 0, "{point}");
        }
        assert!(node.service.remove(&server.reference()).await.unwrap());
        node.service.finish_removals();
        assert_eq!(files(node.dir.path()), Vec::<String>::new(), "{point}");
    }
}
