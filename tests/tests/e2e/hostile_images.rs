//! Images that lie or attack. Each is refused with an error that says why,
//! nothing of it can be seen afterwards, nothing was written outside, and the
//! daemon is up.

use berth_tests::http::{Response, Server};
use berth_tests::image::{Blob, Entry, kind, pack};
use berth_tests::{Format, Image, Layer, Node, Packing, eventually, sha256};
use serde_json::{Value, json};
use std::path::Path;
use tonic::Status;

/// Pulls it and expects to be refused; the error.
#[track_caller]
fn refused(node: &Node, image: &Image) -> Status {
    let reference = node.push("hostile", &node.fresh("v"), image);
    refused_reference(node, &reference)
}

#[track_caller]
fn refused_reference(node: &Node, reference: &str) -> Status {
    let err = node
        .pull(reference)
        .expect_err("a hostile image was pulled");
    assert_eq!(node.image(reference), None, "half an image is there");
    assert_eq!(node.list_images(), []);
    assert!(!err.message().is_empty());
    no_crumbs(node);
    err
}

/// Whatever was being unpacked is gone again, also from the disk.
#[track_caller]
fn no_crumbs(node: &Node) {
    eventually("the space is free", || {
        let images = node.image_fs();
        (images.used_bytes?.value < 256 << 10).then_some(())
    });
}

fn with_layer(layer: &Layer) -> Image {
    Image::builder(Format::Oci)
        .layer(layer, Packing::Gzip)
        .build()
}

/// A layer that tries to write `escaped` somewhere outside of itself: it may be
/// refused, or taken with the entry held inside. The file must not come to be.
#[track_caller]
fn cannot_escape(node: &Node, layer: &Layer, outside: &Path) {
    let reference = node.push("hostile", &node.fresh("v"), &with_layer(layer));
    match node.pull(&reference) {
        Ok(_) => node.remove_image(&reference).unwrap(),
        Err(err) => {
            assert!(!err.message().is_empty());
            assert_eq!(node.image(&reference), None);
        }
    }
    assert!(!outside.exists(), "{} was written", outside.display());
    assert!(node.is_running());
}

/// Many parents: from any folder it leads to the root of the machine.
fn up() -> String {
    "../".repeat(24)
}

#[test]
fn a_name_with_parents_cannot_leave_the_layer() {
    let node = Node::start();
    let target = node.root().join("escaped-by-parents");
    let name = format!("{}{}", up(), target.strip_prefix("/").unwrap().display());
    cannot_escape(&node, &Layer::new().file(&name, 0o644, "x"), &target);
    let name = format!(
        "a/b/{}{}",
        up(),
        target.strip_prefix("/").unwrap().display()
    );
    cannot_escape(
        &node,
        &Layer::new().dir("a/b", 0o755).file(&name, 0o644, "x"),
        &target,
    );
}

#[test]
fn an_absolute_name_cannot_leave_the_layer() {
    let node = Node::start();
    let target = node.root().join("escaped-absolute");
    let name = target.display().to_string();
    cannot_escape(&node, &Layer::new().file(&name, 0o644, "x"), &target);
}

#[test]
fn a_symlink_does_not_lead_a_later_entry_outside() {
    let node = Node::start();
    let target = node.root().join("escaped-by-symlink");
    let root = node.root().display().to_string();
    let absolute = Layer::new()
        .symlink("out", &root)
        .file("out/escaped-by-symlink", 0o644, "x");
    cannot_escape(&node, &absolute, &target);
    let relative = format!("{}{}", up(), root.trim_start_matches('/'));
    let relative =
        Layer::new()
            .symlink("out", &relative)
            .file("out/escaped-by-symlink", 0o644, "x");
    cannot_escape(&node, &relative, &target);
    let chained = Layer::new()
        .symlink("first", &root)
        .symlink("second", "first")
        .file("second/escaped-by-symlink", 0o644, "x");
    cannot_escape(&node, &chained, &target);
}

#[test]
fn a_symlink_of_a_lower_layer_does_not_lead_an_upper_one_outside() {
    let node = Node::start();
    let target = node.root().join("escaped-from-above");
    let lower = Layer::new().symlink("out", &node.root().display().to_string());
    let upper = Layer::new().file("out/escaped-from-above", 0o644, "x");
    let image = Image::builder(Format::Oci)
        .layer(&lower, Packing::Gzip)
        .layer(&upper, Packing::Gzip)
        .build();
    let reference = node.push("hostile", "layers", &image);
    _ = node.pull(&reference);
    assert!(!target.exists());
}

#[test]
fn a_file_is_not_written_through_a_symlink_of_its_name() {
    let node = Node::start();
    let victim = node.root().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let layer = Layer::new()
        .symlink("name", &victim.display().to_string())
        .file("name", 0o644, "overwritten");
    let reference = node.push("hostile", "overwrite", &with_layer(&layer));
    _ = node.pull(&reference);
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn a_hard_link_does_not_reach_a_file_of_the_host() {
    use std::os::unix::fs::MetadataExt;
    let node = Node::start();
    let victim = node.root().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let inside = victim.display().to_string();
    for target in [
        inside.clone(),
        format!("{}{}", up(), inside.trim_start_matches('/')),
    ] {
        let layer = Layer::new()
            .hard_link("stolen", &target)
            .file("stolen", 0o644, "overwritten");
        let reference = node.push("hostile", &node.fresh("v"), &with_layer(&layer));
        _ = node.pull(&reference);
        let layer = Layer::new()
            .symlink("out", &node.root().display().to_string())
            .hard_link("stolen", "out/victim");
        let reference = node.push("hostile", &node.fresh("v"), &with_layer(&layer));
        _ = node.pull(&reference);
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::metadata(&victim).unwrap().nlink(), 1);
    }
}

#[test]
fn a_whiteout_does_not_remove_a_file_of_the_host() {
    let node = Node::start();
    let victim = node.root().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    let root = node.root().display().to_string();
    for layer in [
        Layer::new().symlink("out", &root).whiteout("out/victim"),
        Layer::new().file(
            &format!("{}{}/.wh.victim", up(), root.trim_start_matches('/')),
            0o644,
            "",
        ),
        Layer::new().symlink("out", &root).opaque("out"),
        Layer::new().dir("a", 0o755).file("a/.wh...", 0o644, ""),
        Layer::new().dir("a", 0o755).file("a/.wh..", 0o644, ""),
        Layer::new().dir("a", 0o755).file("a/.wh.", 0o644, ""),
    ] {
        let reference = node.push("hostile", &node.fresh("v"), &with_layer(&layer));
        _ = node.pull(&reference);
        assert!(victim.exists());
        assert!(node.is_running());
    }
}

#[test]
fn a_layer_whose_bytes_are_not_its_digest_is_refused() {
    let node = Node::start();
    let layer = Layer::new().file("file", 0o644, "expected");
    let image = with_layer(&layer);
    let reference = node.push("hostile", "digest", &image);
    // As long as the right one, so that only the digest can tell.
    let mut other = image.layers[0].data.clone();
    let last = other.len() - 20;
    other[last] ^= 0xff;
    node.registry()
        .corrupt(&image.layers[0].digest, &other)
        .unwrap();
    let err = refused_reference(&node, &reference);
    assert!(err.message().contains(&image.layers[0].digest), "{err}");
}

#[test]
fn a_config_whose_bytes_are_not_its_digest_is_refused() {
    let node = Node::start();
    let image = with_layer(&Layer::new().file("file", 0o644, "x"));
    let reference = node.push("hostile", "config", &image);
    let config = String::from_utf8(image.config.data.clone()).unwrap();
    let other = config.replace("linux", "xunil");
    node.registry()
        .corrupt(&image.config.digest, other.as_bytes())
        .unwrap();
    let err = refused_reference(&node, &reference);
    assert!(err.message().contains(&image.config.digest), "{err}");
}

#[test]
fn a_manifest_whose_bytes_are_not_its_digest_is_refused() {
    let node = Node::start();
    let image = with_layer(&Layer::new().file("file", 0o644, "x"));
    let server = fake(&node, &image, |_, response| response);
    let host = format!("127.0.0.1:{}", server.port);
    let wrong = sha256(b"something else");
    let err = refused_reference(&node, &format!("{host}/some/thing@{wrong}"));
    assert!(err.message().contains(&wrong), "{err}");
}

#[test]
fn a_layer_whose_content_is_not_its_diff_id_is_refused() {
    let node = Node::start();
    let tar = Layer::new().file("file", 0o644, "x").tar();
    let wrong = sha256(b"another layer");
    let image = Image::builder(Format::Oci)
        .packed_layer(pack(&tar, Packing::Gzip), Packing::Gzip, wrong.clone())
        .build();
    let err = refused(&node, &image);
    assert!(err.message().contains(&wrong), "{err}");
}

#[test]
fn a_config_with_another_number_of_layers_is_refused() {
    let node = Node::start();
    let mut image = with_layer(&Layer::new().file("file", 0o644, "x"));
    let second = Blob::new(&image.layers[0].media_type, b"a second layer".to_vec());
    let mut manifest: Value = serde_json::from_slice(&image.manifest.data).unwrap();
    manifest["layers"]
        .as_array_mut()
        .unwrap()
        .push(second.descriptor());
    image.layers.push(second);
    image.manifest = Blob::new(
        &image.manifest.media_type.clone(),
        manifest.to_string().into_bytes(),
    );
    refused(&node, &image);
}

#[test]
fn a_layer_cut_off_in_the_middle_is_refused() {
    let node = Node::start();
    let tar = Layer::new().file("file", 0o644, vec![b'x'; 100_000]).tar();
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let whole = pack(&tar, packing);
        let half = whole[..whole.len() / 2].to_vec();
        let image = Image::builder(Format::Oci)
            .packed_layer(half, packing, sha256(&tar))
            .build();
        refused(&node, &image);
    }
}

#[test]
fn a_tar_cut_off_in_the_middle_is_refused_even_with_a_matching_diff_id() {
    let node = Node::start();
    let tar = Layer::new().file("file", 0o644, vec![b'x'; 100_000]).tar();
    let half = &tar[..50_000];
    let image = Image::builder(Format::Oci)
        .packed_layer(pack(half, Packing::Gzip), Packing::Gzip, sha256(half))
        .build();
    refused(&node, &image);
}

#[test]
fn a_layer_shorter_than_it_says_is_refused() {
    let node = Node::start();
    lies_about_size(&node, -1);
}

#[test]
fn a_layer_longer_than_it_says_is_refused() {
    let node = Node::start();
    lies_about_size(&node, 1);
}

/// The descriptor's size is off by `by`; the digest is right.
#[track_caller]
fn lies_about_size(node: &Node, by: i64) {
    let mut image = with_layer(&Layer::new().file("file", 0o644, "x"));
    let size = image.layers[0].size.checked_add_signed(-by).unwrap();
    let mut manifest: Value = serde_json::from_slice(&image.manifest.data).unwrap();
    manifest["layers"][0]["size"] = json!(size);
    image.manifest = Blob::new(
        &image.manifest.media_type.clone(),
        manifest.to_string().into_bytes(),
    );
    let server = fake(node, &image, |_, response| response);
    refused_reference(node, &format!("127.0.0.1:{}/some/thing:1", server.port));
}

#[test]
fn a_tar_entry_that_claims_more_than_there_is_is_refused() {
    let node = Node::start();
    for claim in [1 << 20, 1 << 32, 0o7_7777_7777] {
        let mut entry = Entry::new(kind::FILE, "file", 0o644).data("little");
        entry.claimed_size = Some(claim);
        refused(&node, &with_layer(&Layer::new().entry(entry)));
    }
}

#[test]
fn something_that_is_no_tar_is_refused() {
    let node = Node::start();
    let noise: Vec<u8> = (0..4096u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let image = Image::builder(Format::Oci)
        .packed_layer(pack(&noise, Packing::Gzip), Packing::Gzip, sha256(&noise))
        .build();
    refused(&node, &image);
}

#[test]
fn something_that_is_no_gzip_is_refused() {
    let node = Node::start();
    let tar = Layer::new().file("file", 0o644, "x").tar();
    let image = Image::builder(Format::Oci)
        .packed_layer(
            b"certainly no gzip stream".to_vec(),
            Packing::Gzip,
            sha256(&tar),
        )
        .build();
    refused(&node, &image);
}

#[test]
fn a_bomb_of_pax_headers_is_refused() {
    let node = Node::start();
    let mut entry = Entry::new(kind::FILE, "file", 0o644);
    entry.pax.push(("comment".to_owned(), vec![b'x'; 64 << 20]));
    refused(&node, &with_layer(&Layer::new().entry(entry)));
}

#[test]
fn a_connection_that_breaks_each_time_is_an_error_that_names_the_layer() {
    let node = Node::start();
    let image = with_layer(&Layer::new().file("file", 0o644, vec![b'x'; 100_000]));
    let digest = image.layers[0].digest.clone();
    let server = fake(&node, &image, move |target, mut response| {
        if target.ends_with(&digest) {
            response.claimed_length = Some(response.body.len());
            response.body.truncate(response.body.len() / 2);
        }
        response
    });
    let err = refused_reference(&node, &format!("127.0.0.1:{}/some/thing:1", server.port));
    assert!(err.message().contains(&image.layers[0].digest), "{err}");
}

#[test]
fn a_registry_that_answers_with_errors_is_quoted() {
    let node = Node::start();
    let server = Server::start(&node.host, |_| {
        let body = r#"{"errors":[{"code":"TEAPOT","message":"short and stout"}]}"#;
        Response::new(418, "application/json", body)
    })
    .unwrap();
    let host = format!("127.0.0.1:{}", server.port);
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    let err = refused_reference(&node, &format!("{host}/some/thing:1"));
    assert!(err.message().contains("418"), "{err}");
}

#[test]
fn a_manifest_that_is_no_json_is_refused() {
    manifest_is_refused(Blob::new(
        "application/vnd.oci.image.manifest.v1+json",
        b"{\"schemaVersion\": 2, ".to_vec(),
    ));
}

#[test]
fn a_manifest_of_a_kind_nobody_knows_is_refused() {
    manifest_is_refused(Blob::new("application/x-unheard-of", b"{}".to_vec()));
}

#[test]
fn a_manifest_of_the_first_docker_schema_is_refused() {
    let manifest = json!({
        "schemaVersion": 1, "name": "some/thing", "tag": "1", "architecture": "amd64",
        "fsLayers": [], "history": [],
    });
    manifest_is_refused(Blob::new(
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
        manifest.to_string().into_bytes(),
    ));
}

#[test]
fn a_manifest_of_many_megabytes_is_refused() {
    let padding = "x".repeat(32 << 20);
    manifest_is_refused(Blob::new(
        "application/vnd.oci.image.manifest.v1+json",
        json!({"schemaVersion": 2, "padding": padding})
            .to_string()
            .into_bytes(),
    ));
}

#[test]
fn a_digest_that_is_a_path_is_refused() {
    let node = Node::start();
    let mut image = with_layer(&Layer::new().file("file", 0o644, "x"));
    for digest in [
        "sha256:../../../../tmp/x",
        "../../x",
        "sha256:",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
    ] {
        let mut manifest: Value = serde_json::from_slice(&image.manifest.data).unwrap();
        manifest["layers"][0]["digest"] = json!(digest);
        image.manifest = Blob::new(
            &image.manifest.media_type.clone(),
            manifest.to_string().into_bytes(),
        );
        let server = fake(&node, &image, |_, response| response);
        refused_reference(&node, &format!("127.0.0.1:{}/some/thing:1", server.port));
    }
}

#[track_caller]
fn manifest_is_refused(manifest: Blob) {
    let node = Node::start();
    let mut image = with_layer(&Layer::new());
    image.manifest = manifest;
    let server = fake(&node, &image, |_, response| response);
    refused_reference(&node, &format!("127.0.0.1:{}/some/thing:1", server.port));
}

/// A registry that has one image under every name, and changes each answer as
/// it is told. Known to the node as plain HTTP.
fn fake(
    node: &Node,
    image: &Image,
    change: impl Fn(&str, Response) -> Response + Send + Sync + 'static,
) -> Server {
    let image = image.clone();
    let server = Server::start(&node.host, move |request| {
        let target = request.target.as_str();
        let response = if target.contains("/manifests/") {
            Response::new(200, &image.manifest.media_type, image.manifest.data.clone())
        } else if let Some((_, digest)) = target.rsplit_once("/blobs/") {
            let blob = image
                .layers
                .iter()
                .chain([&image.config])
                .find(|b| b.digest == digest);
            match blob {
                Some(blob) => Response::new(200, "application/octet-stream", blob.data.clone()),
                None => Response::not_found(),
            }
        } else {
            Response::new(200, "application/json", "{}")
        };
        change(target, response)
    })
    .unwrap();
    let host = format!("127.0.0.1:{}", server.port);
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    server
}
