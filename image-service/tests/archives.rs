//! Images in and out of archives: the same image, whatever the archive's shape; and archives
//! that lie.

mod support;

use berth_image_service::digest::Digest;
use berth_image_service::service::{ImportError, ImportOptions, Imported};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use support::{Node, Picture, Server, chain, gzip, tar_of};

fn picture(seed: &str) -> Picture {
    let lower = tar_of(&[("lower", seed.as_bytes()), ("dir/deep/file", b"deep")]);
    // It leans on the layer below: a parent directory that it does not have.
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o600);
    header.set_size(4);
    builder
        .append_data(&mut header, "dir/deep/other", &b"more"[..])
        .unwrap();
    let upper = builder.into_inner().unwrap();
    Picture::of(&[lower, upper], "gzip", json!({"Cmd": ["/x"]}))
}

/// A tar archive of files in this order.
fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        // Not by `set_path`, which refuses what the tests are about.
        let room = &mut header.as_gnu_mut().unwrap().name;
        room[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn oci(pictures: &[(&Picture, Value)]) -> Vec<(String, Vec<u8>)> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut entries = Vec::new();
    for (picture, annotations) in pictures {
        for (digest, bytes) in &picture.blobs {
            let hex = digest.strip_prefix("sha256:").unwrap();
            files.insert(format!("blobs/sha256/{hex}"), bytes.clone());
        }
        entries.push(json!({
            "mediaType": picture.media_type,
            "digest": picture.digest(),
            "size": picture.manifest.len(),
            "annotations": annotations,
        }));
    }
    let index = json!({"schemaVersion": 2, "manifests": entries});
    let mut files: Vec<_> = files.into_iter().collect();
    files.push(("./index.json".into(), index.to_string().into_bytes()));
    files.push((
        "oci-layout".into(),
        b"{\"imageLayoutVersion\":\"1.0.0\"}".to_vec(),
    ));
    files
}

fn named(name: &str) -> Value {
    json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"})
}

fn import(node: &Node, bytes: &[u8]) -> Result<Vec<Imported>, ImportError> {
    node.service.import(bytes, &ImportOptions::default())
}

fn assert_is(node: &Node, name: &str, picture: &Picture, seed: &str) {
    let image = node
        .service
        .find(name)
        .unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(image.id, picture.image_id);
    let mount = node.service.mount_image(&image.id).unwrap();
    let read = |file: &str| {
        fs::read_to_string(format!("/proc/self/fd/{}/{file}", mount.as_raw_fd())).unwrap()
    };
    assert_eq!(read("lower"), seed);
    assert_eq!(read("dir/deep/file"), "deep");
    assert_eq!(read("dir/deep/other"), "more");
}

fn leftovers(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.dir.path().join("images")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("import-")).collect()
}

#[test]
fn an_oci_archive_with_two_images_is_imported_plain_gzip_and_zstd() {
    let (a, b) = (picture("a"), picture("b"));
    let files = oci(&[
        (&a, named("docker.io/library/a:1")),
        (&b, named("registry.test/b:2")),
    ]);
    let plain = archive(&files);
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for bytes in [&plain, &gzip(&plain), &zstd] {
        let node = Node::new();
        let imported = import(&node, bytes).unwrap();
        assert_eq!(imported.len(), 2);
        assert_eq!(imported[0].names, ["docker.io/library/a:1"]);
        assert_is(&node, "a:1", &a, "a");
        assert_is(&node, "registry.test/b:2", &b, "b");
        // As if it had been pulled: a pod that names the digest finds it.
        assert_is(&node, &format!("registry.test/b@{}", b.digest()), &b, "b");
        assert_eq!(leftovers(&node), [""; 0]);
        let node = node.reopened();
        assert_is(&node, "a:1", &a, "a");
    }
}

fn docker_save(picture: &Picture, tags: &[&str]) -> Vec<(String, Vec<u8>)> {
    let config = picture.blobs[&picture.image_id].clone();
    let mut files = Vec::new();
    let mut layers = Vec::new();
    for (nth, layer) in picture.layers.iter().enumerate() {
        let name = format!("{nth}abc/layer.tar");
        let mut plain = Vec::new();
        let mut decoder = flate2::read::GzDecoder::new(&picture.blobs[layer][..]);
        std::io::Read::read_to_end(&mut decoder, &mut plain).unwrap();
        files.push((name.clone(), plain));
        layers.push(name);
    }
    files.push(("config.json".into(), config));
    let manifest = json!([{"Config": "config.json", "RepoTags": tags, "Layers": layers}]);
    files.push(("manifest.json".into(), manifest.to_string().into_bytes()));
    files
}

#[test]
fn what_docker_save_writes_is_imported() {
    let picture = picture("docker");
    let node = Node::new();
    let bytes = archive(&docker_save(&picture, &["app:1", "registry.test/app:2"]));
    let imported = import(&node, &bytes).unwrap();
    assert_eq!(imported.len(), 1);
    assert_eq!(
        imported[0].names,
        ["docker.io/library/app:1", "registry.test/app:2"]
    );
    assert_is(&node, "app:1", &picture, "docker");
    let image = node.service.find("app:1").unwrap();
    // No registry has seen this manifest.
    assert_eq!(image.repo_digests, [""; 0]);
}

#[test]
fn a_layer_that_docker_save_links_to_is_found() {
    let picture = picture("linked");
    let node = Node::new();
    let mut files = docker_save(&picture, &["app:1"]);
    let (name, content) = files.remove(1);
    files.insert(0, ("store/layer.tar".into(), content));
    let mut bytes = archive(&files);
    bytes.truncate(bytes.len() - 1024);
    let mut builder = tar::Builder::new(bytes);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder
        .append_link(&mut header, &name, "../store/layer.tar")
        .unwrap();
    import(&node, &builder.into_inner().unwrap()).unwrap();
    assert_is(&node, "app:1", &picture, "linked");
}

#[test]
fn a_name_can_be_given_to_one_image_and_not_to_two() {
    let (a, b) = (picture("a"), picture("b"));
    let options = ImportOptions {
        name: Some("given.test/name:9".into()),
    };
    let node = Node::new();
    let one = archive(&oci(&[(&a, json!({}))]));
    let imported = node.service.import(&one[..], &options).unwrap();
    assert_eq!(imported[0].names, ["given.test/name:9"]);
    assert_is(&node, "given.test/name:9", &a, "a");
    let two = archive(&oci(&[(&a, json!({})), (&b, json!({}))]));
    let error = node.service.import(&two[..], &options).unwrap_err();
    assert!(matches!(error, ImportError::OneName { count: 2 }));
}

#[test]
fn an_index_for_several_machines_gives_ours() {
    let picture = picture("ours").indexed();
    let node = Node::new();
    import(&node, &archive(&oci(&[(&picture, named("a.test/a:1"))]))).unwrap();
    assert_is(&node, "a.test/a:1", &picture, "ours");
    assert_is(
        &node,
        &format!("a.test/a@{}", picture.digest()),
        &picture,
        "ours",
    );
}

#[test]
fn archives_that_lie_are_refused_and_leave_nothing() {
    let picture = picture("liar");
    let whole = oci(&[(&picture, named("a.test/a:1"))]);
    let without = |part: &str| -> Vec<(String, Vec<u8>)> {
        let kept = whole.iter().filter(|(name, _)| !name.contains(part));
        kept.cloned().collect()
    };
    let hex = |digest: &str| digest.strip_prefix("sha256:").unwrap().to_owned();
    let swapped: Vec<(String, Vec<u8>)> = whole
        .iter()
        .map(|(name, content)| {
            let content = match name.contains(&hex(&picture.layers[0])) {
                true => gzip(b"something else"),
                false => content.clone(),
            };
            (name.clone(), content)
        })
        .collect();
    let mut wrong_diff_id = docker_save(&picture, &["a.test/a:1"]);
    wrong_diff_id[0].1 = tar_of(&[("other", b"content")]);
    let mut escaping = without("index.json");
    escaping.push(("../../../../tmp/index.json".into(), b"[]".to_vec()));
    // One manifest of many megabytes, named often.
    let mut wide = without("index.json");
    let mut padded = picture.manifest.clone();
    padded.resize(4 << 20, b' ');
    let digest = Digest::sha256(&padded);
    let entry = json!({"digest": digest, "size": padded.len()});
    let index = json!({"schemaVersion": 2, "manifests": vec![entry; 100]});
    wide.push((format!("blobs/sha256/{}", digest.hex()), padded));
    wide.push(("index.json".into(), index.to_string().into_bytes()));
    let mut long_name = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    long_name
        .append_data(&mut header, "x".repeat(5000), &b""[..])
        .unwrap();
    let long_name = long_name.into_inner().unwrap();
    let plain = archive(&whole);
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("nothing", Vec::new(), "neither an index.json"),
        ("no archive", vec![b'x'; 2000], "cannot be read"),
        ("cut", plain[..plain.len() / 2].to_vec(), "cannot be read"),
        (
            "no index",
            archive(&without("index.json")),
            "neither an index.json",
        ),
        (
            "no layer",
            archive(&without(&hex(&picture.layers[1]))),
            "has no blob",
        ),
        (
            "no config",
            archive(&without(&hex(&picture.image_id))),
            "has no blob",
        ),
        ("another layer", archive(&swapped), "is wrong"),
        ("another diff ID", archive(&wrong_diff_id), "diff ID"),
        ("escaping", archive(&escaping), ""),
        ("wide", archive(&wide), "are to be read"),
        ("long name", long_name, "longer than 4096"),
    ];
    for (what, bytes, said) in cases {
        let node = Node::new();
        let error = match import(&node, &bytes) {
            Ok(found) => panic!("{what}: {found:?}"),
            Err(error) => chain(&error),
        };
        assert!(error.contains(said), "{what}: {error}");
        assert_eq!(node.service.list(), [], "{what}");
        assert_eq!(leftovers(&node), [""; 0], "{what}");
        assert!(!std::path::Path::new("/tmp/index.json").exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exported_image_is_the_same_elsewhere_digest_included() {
    let picture = picture("travels").indexed();
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    node.pull(&server.reference()).await.unwrap();
    let mut bytes = Vec::new();
    node.service
        .export(&[server.reference()], &mut bytes)
        .unwrap();

    let elsewhere = Node::new();
    let imported = import(&elsewhere, &bytes).unwrap();
    assert_eq!(imported[0].names, [server.reference()]);
    assert_is(&elsewhere, &server.reference(), &picture, "travels");
    let by_digest = format!("{}/a/b@{}", server.name(), picture.digest());
    assert_is(&elsewhere, &by_digest, &picture, "travels");

    // A claim that no manifest in the archive proves is not believed.
    let forged = Digest::sha256(b"forged").to_string();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(text.contains(&picture.digest()));
    let files = retold(&bytes, &picture.digest(), &forged);
    let third = Node::new();
    import(&third, &archive(&files)).unwrap();
    let forged = format!("{}/a/b@{forged}", server.name());
    assert!(third.service.find(&forged).is_none());
}

/// The archive's files, with `old` in its index.json told as `new`.
fn retold(bytes: &[u8], old: &str, new: &str) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(bytes);
    let entries = archive.entries().unwrap();
    let files = entries.map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_string_lossy().into_owned();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        if name == "index.json" {
            let text = String::from_utf8(content).unwrap();
            content = text.replace(old, new).into_bytes();
        }
        (name, content)
    });
    files.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_of_a_damaged_layer_fails() {
    let picture = picture("broken");
    let server = Server::of(picture.clone());
    let node = Node::new();
    node.hosts_toml(
        &server.name(),
        &format!("server = \"http://{}\"\n", server.name()),
    );
    let id = node.pull(&server.reference()).await.unwrap().image_id;
    let layer = node.service.find(&id).unwrap().layers[0].to_string();
    let path = node.dir.path().join("images/layers").join(layer);
    fs::write(path.join("fs/lower"), "BROKEN").unwrap();
    let error = node.service.export(&[id], std::io::sink()).unwrap_err();
    assert!(chain(&error).contains("is damaged"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruning_leaves_what_is_tagged_or_used() {
    let node = Node::new();
    let one = |seed: &str, name: &str| archive(&oci(&[(&picture(seed), named(name))]));
    import(&node, &one("used", "a.test/x:1")).unwrap();
    let used = node.service.find("a.test/x:1").unwrap().id.clone();
    node.service.prepare("container", &used).unwrap();
    // The tag moves twice: the first two images have none any more.
    import(&node, &one("second", "a.test/x:1")).unwrap();
    import(&node, &one("third", "a.test/x:1")).unwrap();
    assert_eq!(node.service.list().len(), 3);
    let pruned = node.service.prune(false);
    assert_eq!(pruned.images.len(), 1);
    assert!(pruned.bytes > 0);
    assert!(node.service.find(&used).is_some());
    assert!(node.service.find("a.test/x:1").is_some());
    assert_eq!(node.service.prune(true).images.len(), 1);
    assert!(node.service.find("a.test/x:1").is_none());
    node.service.remove_container("container").unwrap();
    assert_eq!(node.service.prune(true).images, [used]);
    assert_eq!(node.service.list(), []);
}

const KILLED_DIR: &str = "BERTH_TEST_DIR";
const KILLED_ARCHIVE: &str = "BERTH_TEST_ARCHIVE";

/// What the child of the next test runs; alone it does nothing.
#[test]
fn the_import_that_is_killed() {
    let (Ok(dir), Ok(archive)) = (std::env::var(KILLED_DIR), std::env::var(KILLED_ARCHIVE)) else {
        return;
    };
    let service = Node::open(std::path::Path::new(&dir));
    let archive = fs::File::open(archive).unwrap();
    service.import(archive, &ImportOptions::default()).unwrap();
}

#[test]
fn an_import_killed_anywhere_leaves_nothing_and_is_repeated() {
    let picture = picture("killed");
    let bytes = archive(&oci(&[(&picture, named("a.test/a:1"))]));
    for point in [
        "import.spooled",
        "layer-renamed",
        "import.unpacked",
        "layers-synced",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.tar");
        fs::write(&path, &bytes).unwrap();
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_import_that_is_killed"])
            .env(KILLED_DIR, dir.path())
            .env(KILLED_ARCHIVE, &path)
            .env("BERTH_CRASH_AT", point)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(9), "not killed at {point}: {status}");
        let service = Node::open(dir.path());
        let node = Node { service, dir };
        assert_eq!(leftovers(&node), [""; 0], "{point}");
        assert_eq!(node.service.list(), [], "{point}");
        import(&node, &bytes).unwrap();
        assert_is(&node, "a.test/a:1", &picture, "killed");
    }
}
