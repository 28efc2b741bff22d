//! What a node makes of registries: many pulls at once, registries in trouble, the files that say
//! where to pull from, and which images are trusted.

use base64::Engine as _;
use berth_proto::runtime_v1::{self as cri, AuthConfig};
use berth_tests::http::{Response, Server};
use berth_tests::image::Blob;
use berth_tests::node::spec;
use berth_tests::registry::{Access, PASSWORD, USER};
use berth_tests::{Format, Image, Layer, Node, Packing, Registry};
use rcgen::{KeyPair, SigningKey as _};
use serde_json::json;
use std::collections::BTreeMap;
use tonic::Code;

/// Bytes that do not compress.
fn noise(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let word = || {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word)
        .take(count / 4)
        .flatten()
        .collect()
}

fn image(content: &str) -> Image {
    let layer = Layer::new().file("content", 0o644, content);
    Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build()
}

/// How often each layer of `images` was sent by `registry`, by its access log.
fn downloads(registry: &Registry, images: &[Image]) -> BTreeMap<String, usize> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for blob in images.iter().flat_map(|image| &image.layers) {
        counts.insert(blob.digest.clone(), 0);
    }
    for (what, status) in registry.accesses() {
        let digest = what
            .strip_prefix("GET ")
            .and_then(|w| w.rsplit_once("/blobs/"));
        if let (Some((_, digest)), 200 | 206) = (digest, status)
            && let Some(count) = counts.get_mut(digest)
        {
            *count += 1;
        }
    }
    counts
}

#[test]
fn twenty_pulls_at_once_download_each_layer_once() {
    let node = Node::start();
    let shared: Vec<Layer> = (0..4)
        .map(|n| Layer::new().file(&format!("shared-{n}"), 0o644, noise(n + 1, 1 << 20)))
        .collect();
    let images: Vec<Image> = (0..20)
        .map(|n| {
            let own = Layer::new().file("own", 0o644, format!("{}", n / 2));
            let builder = Image::builder(Format::Oci);
            (0..4)
                .fold(builder, |builder, at| {
                    builder.layer(&shared[(at + n) % 4], Packing::Gzip)
                })
                .layer(&own, Packing::Gzip)
                .run("Labels", json!({"n": n.to_string()}))
                .build()
        })
        .collect();
    let names: Vec<String> = images
        .iter()
        .enumerate()
        .map(|(n, image)| node.push(&format!("crowd/{n}"), "1", image))
        .collect();
    let calls = names
        .iter()
        .map(|name| {
            let (mut client, name) = (node.images(), name.clone());
            async move {
                let request = cri::PullImageRequest {
                    image: Some(spec(&name)),
                    ..Default::default()
                };
                client.pull_image(request).await
            }
        })
        .collect();
    for (answer, image) in node.wait_all(calls).into_iter().zip(&images) {
        assert_eq!(answer.unwrap().image_ref, image.id());
    }
    let counts = downloads(node.registry(), &images);
    // Four shared layers, and ten that two images have each.
    assert_eq!(counts.len(), 14);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
}

/// A registry with one image whose layer is answered by `layer`.
fn flaky(
    node: &Node,
    image: &Image,
    layer: impl Fn(usize, &[u8], usize) -> Response + Send + Sync + 'static,
) -> Server {
    let (manifest, config) = (image.manifest.clone(), image.config.clone());
    let (digest, data) = (image.layers[0].digest.clone(), image.layers[0].data.clone());
    let asked = std::sync::atomic::AtomicUsize::new(0);
    Server::start(&node.host, move |request| {
        if request.target.contains("/manifests/") {
            return Response::new(200, &manifest.media_type, manifest.data.clone())
                .header("docker-content-digest", &manifest.digest);
        }
        match request
            .target
            .rsplit_once("/blobs/")
            .map(|(_, digest)| digest)
        {
            Some(wanted) if wanted == config.digest => {
                Response::new(200, "application/json", config.data.clone())
            }
            Some(wanted) if wanted == digest => {
                let nth = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let from = request
                    .headers
                    .get("range")
                    .and_then(|range| {
                        range
                            .strip_prefix("bytes=")?
                            .strip_suffix('-')?
                            .parse()
                            .ok()
                    })
                    .unwrap_or(0);
                layer(nth, &data, from)
            }
            _ => Response::not_found(),
        }
    })
    .unwrap()
}

fn from(data: &[u8], start: usize, count: usize) -> Response {
    let end = data.len().min(start + count);
    let status = if start > 0 { 206 } else { 200 };
    let mut response = Response::new(status, "application/octet-stream", &data[start..end]);
    response.claimed_length = Some(data.len() - start);
    if start > 0 {
        let range = format!("bytes {start}-{}/{}", data.len() - 1, data.len());
        return response.header("content-range", &range);
    }
    response
}

#[test]
fn a_layer_cut_ten_times_is_continued_and_no_byte_comes_twice() {
    let node = Node::start();
    let layer = Layer::new().file("noise", 0o644, noise(7, 3 << 20));
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Plain)
        .build();
    let size = image.layers[0].data.len();
    let server = flaky(&node, &image, move |nth, data, start| {
        from(data, start, if nth < 10 { size / 11 } else { size })
    });
    let reference = format!("127.0.0.1:{}/cut:1", server.port);
    assert_eq!(node.pull(&reference).unwrap(), image.id());
    let starts: Vec<usize> = server
        .seen()
        .iter()
        .filter(|request| request.target.ends_with(&image.layers[0].digest))
        .map(|request| match request.headers.get("range") {
            Some(range) => range["bytes=".len()..range.len() - 1].parse().unwrap(),
            None => 0,
        })
        .collect();
    let expected: Vec<usize> = (0..11).map(|nth| nth * (size / 11)).collect();
    assert_eq!(starts, expected);
}

#[test]
fn a_registry_in_trouble_is_told_in_the_kubelets_words() {
    type Answer = fn(usize, &[u8], usize) -> Response;
    let busy: Answer = |_, _, _| Response::new(429, "text/plain", "").header("retry-after", "600");
    let broken: Answer = |_, _, _| Response::new(500, "text/plain", "");
    let turning: Answer = |_, _, _| Response::new(307, "text/plain", "").header("location", "");
    let wrong: Answer = |_, data, _| Response::new(200, "x/y", vec![b'x'; data.len()]);
    let long: Answer = |_, data, start| {
        let mut response = from(data, start, usize::MAX);
        response.claimed_length = Some(data.len() + 1);
        response
    };
    let unavailable = (Code::Unknown, "RegistryUnavailable: ");
    for (answer, (code, prefix)) in [
        (busy, unavailable),
        (broken, unavailable),
        (turning, unavailable),
        (wrong, (Code::DataLoss, "")),
        (long, (Code::DataLoss, "")),
    ] {
        let node = Node::start();
        let image = image("trouble");
        let server = flaky(&node, &image, answer);
        let begun = std::time::Instant::now();
        let reference = format!("127.0.0.1:{}/flaky:1", server.port);
        let error = node.pull(&reference).unwrap_err();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().starts_with(prefix), "{error:?}");
        assert!(begun.elapsed().as_secs() < 30);
        assert_eq!(node.list_images(), []);
    }
}

#[test]
fn registries_conf_and_the_nodes_credentials_are_read_live() {
    let node = Node::start();
    let image = image("inside");
    node.push("deep/team/app", "1", &image);
    let registry = node.another_registry(Access::Basic);
    let host = format!("127.0.0.1:{}", registry.port);
    let write = |name: &str, text: &str| {
        std::fs::write(node.root().join("etc").join(name), text).unwrap();
    };
    let conf = format!(
        "[[registry]]\nprefix = \"registry.invalid/team\"\nlocation = \"{host}/deep/team\"\n\
         [aliases]\n\"app\" = \"registry.invalid/team/app\"\n"
    );
    write("registries.conf", &conf);
    let name = "registry.invalid/team/app:1";
    let error = node.pull(name).unwrap_err();
    assert_eq!(error.code(), Code::Unauthenticated, "{error:?}");
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    write(
        "auth.json",
        &json!({"auths": {host: {"auth": auth}}}).to_string(),
    );
    assert_eq!(node.pull(name).unwrap(), image.id());
    assert_eq!(node.pull("app:1").unwrap(), image.id());
    assert_eq!(node.image("app:1").unwrap().repo_tags, [name]);

    std::fs::create_dir(node.root().join("etc/registries.conf.d")).unwrap();
    let blocked = "[[registry]]\nprefix = \"registry.invalid\"\nblocked = true\n";
    write("registries.conf.d/10.conf", blocked);
    let error = node.pull("registry.invalid/other:1").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains("is blocked by"), "{error:?}");
    write("registries.conf.d/10.conf", "blokced = true\n");
    let error = node.pull(name).unwrap_err();
    assert!(
        error.message().contains("10.conf") && error.message().contains("line 1"),
        "{error:?}"
    );
}

#[test]
fn a_pull_is_explained_host_by_host() {
    let node = Node::start();
    let image = image("explained");
    node.push("library/thing", "1", &image);
    let mirror = node.registry().port;
    node.hosts_toml(
        "registry.invalid",
        &format!(
            "server = \"http://127.0.0.1:9\"\nproxy = \"direct\"\n\
             [host.\"http://127.0.0.1:{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        ),
    );
    let explain = |name: &str| {
        let output = node.berth(&["explain", "pull", name]);
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (good, text) = explain("registry.invalid/library/thing:1");
    assert!(good, "{text}");
    for expected in [
        "registry.invalid/library/thing:1".to_owned(),
        "no policy file".into(),
        format!("1. http://127.0.0.1:{mirror}/v2/library/thing"),
        "etc/certs.d/registry.invalid/hosts.toml".into(),
        format!("has it: {}", image.manifest.digest),
        "2. http://127.0.0.1:9/v2/library/thing".into(),
        "unreachable".into(),
    ] {
        assert!(text.contains(&expected), "{expected}: {text}");
    }
    assert_eq!(node.list_images(), []);
    // Without a daemon the program looks itself.
    node.stop_daemon();
    let (good, text) = explain("registry.invalid/library/thing:1");
    assert!(good && text.contains("has it"), "{text}");
    node.hosts_toml("registry.invalid", "skip_verfy = true");
    let (good, text) = explain("registry.invalid/library/thing:1");
    assert!(
        !good && text.contains("skip_verfy") && text.contains("line 1"),
        "{text}"
    );
}

/// Pushes a signature of `image` as cosign does.
fn sign(registry: &Registry, repository: &str, image: &Image, key: &KeyPair) {
    let payload = json!({"critical": {
        "identity": {"docker-reference": registry.name(repository)},
        "image": {"docker-manifest-digest": image.manifest.digest},
        "type": "cosign container image signature"}, "optional": null})
    .to_string();
    let signature = key.sign(payload.as_bytes()).unwrap();
    let signature = base64::engine::general_purpose::STANDARD.encode(signature);
    let payload = Blob::new(
        "application/vnd.dev.cosign.simplesigning.v1+json",
        payload.into_bytes(),
    );
    let config = Blob::new("application/vnd.oci.image.config.v1+json", b"{}".to_vec());
    let mut layer = payload.descriptor();
    layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": media_type,
        "config": config.descriptor(), "layers": [layer]});
    let manifest = Blob::new(media_type, manifest.to_string().into_bytes());
    for blob in [&payload, &config] {
        registry.push_blob(repository, blob).unwrap();
    }
    let tag = format!("{}.sig", image.manifest.digest.replace(':', "-"));
    registry.push_manifest(repository, &tag, &manifest).unwrap();
}

#[test]
fn unsigned_images_are_neither_pulled_nor_run_where_the_policy_wants_signatures() {
    let node = Node::start();
    let base = node.base_image();
    let key = KeyPair::generate().unwrap();
    let signed = Image::builder(Format::Oci)
        .base()
        .run("Labels", json!({"a": "b"}))
        .build();
    let good = node.push("team/good", "1", &signed);
    sign(node.registry(), "team/good", &signed, &key);
    let bad = node.push("team/bad", "1", &image("unsigned"));
    let doctor = node.berth(&["doctor"]);
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("signed or not"));

    std::fs::write(node.root().join("etc/team.pub"), key.public_key_pem()).unwrap();
    let wanted = json!({"type": "sigstoreSigned", "keyPath": node.root().join("etc/team.pub")});
    let scope = node.registry().name("team");
    let policy = |scopes: serde_json::Value| {
        let text = json!({"default": [{"type": "insecureAcceptAnything"}],
            "transports": {"docker": scopes}});
        std::fs::write(node.root().join("etc/policy.json"), text.to_string()).unwrap();
    };
    policy(json!({&scope: [wanted]}));
    let error = node.pull(&bad).unwrap_err();
    assert_eq!(error.code(), Code::Unknown, "{error:?}");
    assert!(
        error.message().starts_with("SignatureValidationFailed: "),
        "{error:?}"
    );
    let id = node.pull(&good).unwrap();
    let pod = node.run_pod(&node.fresh("signed"));
    let container = pod.create(pod.container_of(&good, &["true"]));
    drop(container);

    // What is here is judged by the policy of now, under whichever name it is asked for by.
    policy(json!({&scope: [{"type": "reject"}]}));
    for name in [good.as_str(), id.as_str()] {
        let error = pod
            .try_create(pod.container_of(name, &["true"]))
            .err()
            .unwrap();
        assert_eq!(error.code(), Code::Unknown, "{error:?}");
        assert!(
            error.message().starts_with("SignatureValidationFailed: "),
            "{error:?}"
        );
    }
    pod.create(pod.container_of(&base, &["true"]));
    pod.remove();
}

#[test]
fn images_are_streamed_pinned_and_pulled_for_any_handler() {
    let node = Node::options()
        .config("[images]\npinned = [\"*/keep/*\"]\n")
        .start();
    let mut ids = Vec::new();
    for name in ["keep/a", "drop/b", "drop/c"] {
        let reference = node.push(name, "1", &image(name));
        let mut client = node.images();
        let mut asked = spec(&reference);
        asked.runtime_handler = "some-handler".to_owned();
        let request = cri::PullImageRequest {
            image: Some(asked),
            auth: Some(AuthConfig::default()),
            ..Default::default()
        };
        let answer = node.wait(async move { client.pull_image(request).await });
        ids.push(answer.unwrap().image_ref);
    }
    let mut client = node.images();
    let streamed = node.wait(async move {
        let request = cri::StreamImagesRequest::default();
        let mut stream = client.stream_images(request).await?.into_inner();
        let mut images = Vec::new();
        while let Some(message) = stream.message().await? {
            images.extend(message.images);
        }
        Ok(tonic::Response::new(images))
    });
    let streamed = streamed.unwrap();
    assert_eq!(streamed, node.list_images());
    for image in &streamed {
        assert_eq!(image.pinned, image.id == ids[0], "{image:?}");
    }
}
