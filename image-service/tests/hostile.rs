//! Registries that lie, stall and snoop: a clear error each, and nothing half there.

mod support;

use berth_image_service::digest::Digest;
use berth_image_service::registry::RegistryError;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::*;

fn is_layer(picture: &Picture, request: &Request) -> bool {
    picture
        .layers
        .iter()
        .any(|layer| request.path().ends_with(&**layer))
}

/// Serves `picture`, but every layer as `change` makes it.
fn with_layer(
    picture: &Picture,
    change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> Server {
    let picture = picture.clone();
    Server::start(move |request| {
        let reply = serve(&picture, request);
        if is_layer(&picture, request) {
            change(request, reply)
        } else {
            reply
        }
    })
}

/// A registry whose manifest is changed; its digest is that of the changed one.
fn with_manifest(change: impl Fn(&mut Value)) -> Server {
    let mut picture = Picture::small("changed");
    let mut manifest: Value = serde_json::from_slice(&picture.manifest).unwrap();
    change(&mut manifest);
    picture.manifest = manifest.to_string().into_bytes();
    let bytes = picture.manifest.clone();
    picture.add("", bytes);
    Server::of(picture)
}

fn nothing_unpacked(node: &Node) {
    let layers = node.dir.path().join("images/layers");
    wait_for("the end of what was half unpacked", || {
        std::fs::read_dir(&layers).unwrap().all(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            !name.starts_with("ingest-") && !name.starts_with("trash-") && name.len() < 64
        })
    });
}

#[tokio::test]
async fn a_layer_with_another_digest_is_refused() {
    let picture = Picture::small("right");
    let other = Picture::small("wrong");
    let wrong = other.blobs[&other.layers[0]].clone();
    let length = picture.blobs[&picture.layers[0]].len();
    assert_eq!(wrong.len(), length, "the test is about the digest only");
    let server = with_layer(&picture, move |_, _| Reply::ok(wrong.clone()));
    let node = Node::new();
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("the content's digest is"), "{said}");
    nothing_unpacked(&node);
}

#[tokio::test]
async fn a_layer_of_another_length_is_refused() {
    let picture = Picture::small("length");
    for change in [-1i64, 1, 1 << 40] {
        let server = with_layer(&picture, move |_, reply| {
            let length = reply.body.len() as i64 + change;
            reply.announcing(length as u64)
        });
        let node = Node::new();
        let said = node.refused(&server.reference()).await;
        assert!(
            said.contains("bytes long where the manifest says"),
            "{said}"
        );
        nothing_unpacked(&node);
    }
}

#[tokio::test]
async fn a_layer_that_is_always_cut_is_refused_and_one_cut_once_goes_on() {
    let noise: Vec<u8> = (0..300_000u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let picture = Picture::of(&[tar_of(&[("noise", &noise)])], "tar", json!({}));
    let cut = |reply: Reply| {
        let mut reply = reply.clone();
        reply.announced = Some(reply.body.len() as u64);
        reply.body.truncate(reply.body.len() / 2);
        reply
    };
    let always = picture.clone();
    let server = with_layer(&picture, move |_, _| {
        cut(Reply::ok(always.blobs[&always.layers[0]].clone()))
    });
    let node = Node::new();
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("unreachable"), "{said}");
    nothing_unpacked(&node);

    let all = Reply::ok(picture.blobs[&picture.layers[0]].clone());
    for ranges in [true, false] {
        let (served, all) = (AtomicUsize::new(0), all.clone());
        let server = with_layer(&picture, move |_, reply| {
            if served.fetch_add(1, Ordering::SeqCst) == 0 {
                return cut(reply);
            }
            if ranges { reply } else { all.clone() }
        });
        let node = Node::new();
        let pulled = node.pull(&server.reference()).await.unwrap();
        assert_eq!(pulled.image_id, picture.image_id);
        let continued = server.count(|r| r.header("range").starts_with("bytes="));
        assert_eq!(continued, 1);
    }
}

#[tokio::test]
async fn a_registry_that_falls_silent_is_given_up() {
    let picture = Picture::small("silent");
    let server = with_layer(&picture, |_, mut reply| {
        reply.announced = Some(reply.body.len() as u64);
        reply.body.truncate(10);
        reply.silence = Duration::from_secs(8);
        reply
    });
    let node = Node::new();
    let begun = Instant::now();
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("no answer in time"), "{said}");
    // Two seconds, and as many when it was continued.
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    nothing_unpacked(&node);
}

#[tokio::test]
async fn a_wrong_diff_id_is_refused() {
    let mut picture = Picture::small("diff");
    let config = picture.blobs[&picture.image_id].clone();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["rootfs"]["diff_ids"][0] = json!(Digest::sha256(b"other"));
    let config = picture.add(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().into_bytes(),
    );
    let mut manifest: Value = serde_json::from_slice(&picture.manifest).unwrap();
    manifest["config"] = config;
    picture.manifest = manifest.to_string().into_bytes();
    let server = Server::of(picture);
    let node = Node::new();
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("diff ID"), "{said}");
    nothing_unpacked(&node);
}

#[tokio::test]
async fn a_manifest_that_is_not_what_was_asked_for_is_refused() {
    let (asked, other) = (Picture::small("asked"), Picture::small("other"));
    let name = asked.digest();
    let served = other.clone();
    let server = Server::start(move |request| {
        let mut request = request.clone();
        request.target = request.target.replace(&name, "1");
        serve(&served, &request)
    });
    let node = Node::new();
    let reference = format!("{}/a@{}", server.name(), asked.digest());
    let said = node.refused(&reference).await;
    assert!(said.contains("the content's digest is"), "{said}");
}

#[tokio::test]
async fn a_manifest_that_cannot_be_used_is_refused_by_name() {
    let artifact = json!({"mediaType": "application/vnd.oci.empty.v1+json",
        "digest": Digest::sha256(b"{}"), "size": 2});
    for (server, expected) in [
        (
            with_manifest(|m| m["mediaType"] = json!("application/x-odd")),
            "x-odd",
        ),
        (with_manifest(|m| m["schemaVersion"] = json!(1)), "schema 1"),
        (
            with_manifest(|m| m["layers"][0]["mediaType"] = json!("application/x-layer")),
            "x-layer",
        ),
        (
            with_manifest(|m| m["config"] = artifact.clone()),
            "not a container image",
        ),
        (
            with_manifest(|m| m["manifests"] = json!([])),
            "both layers and manifests",
        ),
        (
            with_manifest(|m| m["layers"] = json!([])),
            "0 layers, the config 1 diff IDs",
        ),
        (
            with_manifest(|m| m["layers"][0]["digest"] = json!("md5:00")),
            "manifest is not valid",
        ),
        (
            with_manifest(|m| m["config"]["size"] = json!(3)),
            "more than the 3 bytes",
        ),
        (
            Server::start(|_| Reply::ok("not json")),
            "manifest is not valid",
        ),
    ] {
        let node = Node::new();
        let said = node.refused(&server.reference()).await;
        assert!(said.contains(expected), "{said}");
        nothing_unpacked(&node);
    }
}

#[tokio::test]
async fn a_giant_manifest_is_not_read() {
    for announced in [None, Some(1 << 40)] {
        let server = Server::start(move |request| {
            let mut reply = Reply::ok(vec![
                b' ';
                if request.method == "HEAD" { 0 } else { 5 << 20 }
            ]);
            if request.method == "GET" {
                reply.announced = announced;
            }
            reply
        });
        let node = Node::new();
        let error = node.pull(&server.reference()).await.unwrap_err();
        assert!(
            matches!(registry_error(&error), RegistryError::TooLarge { .. }),
            "{}",
            chain(&*error)
        );
    }
}

#[tokio::test]
async fn indexes_that_lead_nowhere_are_refused() {
    let mut other = Picture::small("platform");
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": other.media_type, "digest": other.digest(), "size": other.manifest.len(),
        "platform": {"os": "linux", "architecture": "s390x"},
    }]});
    other.manifest = index.to_string().into_bytes();
    let node = Node::new();
    let said = node.refused(&Server::of(other).reference()).await;
    assert!(said.contains("only for linux/s390x"), "{said}");

    let mut deep = Picture::small("deep");
    for _ in 0..4 {
        deep = deep.indexed();
    }
    let said = node.refused(&Server::of(deep).reference()).await;
    assert!(said.contains("nested indexes"), "{said}");
}

#[tokio::test]
async fn a_401_for_every_request_ends_soon() {
    for challenge in [
        "Basic realm=\"x\"",
        "Bearer realm=\"http://TOKENS/token\"",
        "Bearer realm=\"ftp://x/\"",
        "Bearer realm=\"\"",
        "Digest realm=\"x\"",
    ] {
        let tokens = Server::start(|_| Reply::ok("{\"token\": \"t\"}"));
        let challenge = challenge.replace("TOKENS", &tokens.name());
        let server =
            Server::start(move |_| Reply::status(401).with("www-authenticate", challenge.clone()));
        let node = Node::new();
        let error = node
            .pull_as(&server.reference(), Some(credentials()))
            .await
            .unwrap_err();
        assert!(
            matches!(registry_error(&error), RegistryError::Unauthorized { .. }),
            "{}",
            chain(&*error)
        );
        assert!(server.seen().len() <= 2, "{:?}", server.seen());
    }
}

#[tokio::test]
async fn a_redirect_to_another_host_gets_no_secret_and_its_content_is_taken() {
    let picture = Picture::small("redirected");
    let elsewhere = Server::of(picture.clone());
    let away = elsewhere.address;
    let served = picture.clone();
    let server = Server::start(move |request| {
        if request.header("authorization").is_empty() {
            return Reply::status(401).with("www-authenticate", "Basic realm=\"x\"");
        }
        if request.path().contains("/blobs/") {
            let to = format!("http://{away}{}?sig=secret-sig", request.path());
            return Reply::status(307).with("location", to);
        }
        serve(&served, request)
    });
    let node = Node::new();
    let text = format!(
        "server = \"http://{}\"\n[header]\nx-key = \"k\"",
        server.name()
    );
    node.hosts_toml(&server.name(), &text);
    let pulled = node
        .pull_as(&server.reference(), Some(credentials()))
        .await
        .unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert!(server.seen().iter().all(|r| r.header("x-key") == "k"));
    assert_eq!(elsewhere.seen().len(), 2);
    for request in elsewhere.seen() {
        assert_eq!(
            (request.header("authorization"), request.header("x-key")),
            ("", "")
        );
    }
}

#[tokio::test]
async fn redirects_that_never_end_or_lead_astray_are_refused() {
    for (location, expected) in [
        ("/again", "too many"),
        ("file:///etc/passwd", "something else than http"),
        ("http://", "no valid location"),
        ("", "too many"),
    ] {
        let server = Server::start(move |_| Reply::status(302).with("location", location));
        let node = Node::new();
        let said = node.refused(&server.reference()).await;
        assert!(said.contains(expected), "{location}: {said}");
    }
    let elsewhere = Server::start(|_| Reply::status(403));
    let away = elsewhere.address;
    let server = Server::start(move |_| {
        Reply::status(302).with("location", format!("http://{away}/x?sig=secret-sig"))
    });
    let node = Node::new();
    let said = node.refused(&server.reference()).await;
    assert!(
        said.contains("denied") && !said.contains("secret-sig"),
        "{said}"
    );
}

#[tokio::test]
async fn a_registry_in_trouble_is_asked_again_and_then_told() {
    for (status, expected) in [
        (500, "status 500"),
        (503, "status 503"),
        (403, "denied"),
        (418, "status 418"),
    ] {
        let server = Server::start(move |_| Reply::status(status));
        let node = Node::new();
        let said = node.refused(&server.reference()).await;
        assert!(said.contains(expected), "{said}");
    }
    let picture = Picture::small("recovered");
    let calls = AtomicUsize::new(0);
    let served = picture.clone();
    let server = Server::start(move |request| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::status(503),
        1 => Reply::status(429).with("retry-after", "0"),
        _ => serve(&served, request),
    });
    let node = Node::new();
    assert_eq!(
        node.pull(&server.reference()).await.unwrap().image_id,
        picture.image_id
    );

    let server = Server::start(|_| {
        let mut reply = Reply::status(429).with("retry-after", "3600");
        reply.body = br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#.to_vec();
        reply
    });
    let begun = Instant::now();
    let error = node.pull_as(&server.reference(), None).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(3));
    let RegistryError::TooManyRequests { retry_after, .. } = registry_error(&error) else {
        panic!("{}", chain(&*error));
    };
    assert_eq!(*retry_after, Some(Duration::from_secs(3600)));
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let address = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let node = Node::new();
    let error = node.pull(&format!("{address}/a:1")).await.unwrap_err();
    assert!(
        matches!(registry_error(&error), RegistryError::Unreachable { .. }),
        "{}",
        chain(&*error)
    );
}

#[tokio::test]
async fn a_lying_mirror_is_passed_over() {
    let (right, wrong) = (Picture::small("right"), Picture::small("wrong"));
    let bytes = wrong.blobs[&wrong.layers[0]].clone();
    let mirror = with_layer(&right, move |_, _| Reply::ok(bytes.clone()));
    let origin = Server::of(right.clone());
    let node = Node::new();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        origin.name(),
        mirror.name()
    );
    node.hosts_toml("registry.example", &text);
    let pulled = node.pull("registry.example/a").await.unwrap();
    assert_eq!(pulled.image_id, right.image_id);
    assert_eq!(origin.seen().len(), 1);
}

#[tokio::test]
async fn the_first_bad_layer_ends_the_pull_of_all() {
    let tars: Vec<Vec<u8>> = (0..6)
        .map(|n| tar_of(&[("n", format!("{n}").as_bytes())]))
        .collect();
    let picture = Picture::of(&tars, "gzip", json!({}));
    let first = picture.layers[0].clone();
    let server = with_layer(&picture, move |request, mut reply| {
        if request.path().ends_with(&*first) {
            return Reply::status(404);
        }
        reply.announced = Some(reply.body.len() as u64);
        reply.body.truncate(5);
        reply.silence = Duration::from_secs(20);
        reply
    });
    let node = Node::new();
    let begun = Instant::now();
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("not found"), "{said}");
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    nothing_unpacked(&node);
}

#[tokio::test]
async fn a_layer_that_says_it_is_too_large_is_refused_before_its_first_byte() {
    let tars = [
        tar_of(&[("small", b"s")]),
        tar_of(&[("large", &noise(1, 100_000))]),
    ];
    let picture = Picture::of(&tars, "gzip", json!({}));
    let server = Server::of(picture.clone());
    let node = Node::with(|settings| settings.max_layer_bytes = Some(50_000));
    let said = node.refused(&server.reference()).await;
    assert!(said.contains("larger than 50000 bytes"), "{said}");
    assert!(said.contains(&picture.layers[1]), "{said}");
    assert_eq!(server.count(|request| is_layer(&picture, request)), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_as_slow_as_it_may_be_holds_up_no_other_pull() {
    let slow = Picture::small("slow");
    let server = with_layer(&slow, |_, mut reply| {
        reply.trickle = Some((1, Duration::from_millis(200)));
        reply
    });
    let node = Node::with(|settings| settings.max_layers = 1);
    let progress = berth_image_service::progress::Progress::new();
    let (service, reference, seen) = (node.service.clone(), server.reference(), progress.clone());
    let pull = tokio::spawn(async move { service.pull(&reference, None, &seen).await.map(drop) });
    while progress.bytes() == 0 {
        assert!(!pull.is_finished());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let tars: Vec<Vec<u8>> = (0..3).map(|n| tar_of(&[("n", &[n])])).collect();
    let quick = Server::of(Picture::of(&tars, "gzip", json!({})));
    node.pull(&quick.reference()).await.unwrap();
    assert!(!pull.is_finished(), "the slow one was not slow");
    assert!(progress.bytes() < progress.bytes_total());
}
