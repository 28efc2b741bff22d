//! Pulls from registries that behave: what is fetched, listed, found and removed.

mod support;

use berth_image_service::auth::Credentials;
use berth_image_service::progress::{Progress, Stage};
use berth_image_service::registry::RegistryError;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::*;

#[tokio::test]
async fn an_image_is_pulled_by_tag_and_by_digest_and_removed_under_all_names() {
    let registry = DockerRegistry::start(false);
    let picture = Picture::small("one");
    registry.push("a/b", "1", &picture);
    let node = Node::new();
    let empty = node.service.fs_usage().used_bytes;
    let tag = format!("{}/a/b:1", registry.address);
    let digest = format!("{}/a/b@{}", registry.address, picture.digest());
    let progress = Progress::new();
    let pulled = node.service.pull(&tag, None, &progress).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert_eq!(progress.stage(), Stage::Done);
    assert_eq!((progress.layers(), progress.layers_total()), (1, 1));
    assert_eq!(progress.bytes(), progress.bytes_total());
    assert!(pulled.bytes > 0);

    let image = node.service.find(&tag).unwrap();
    assert_eq!(image.id, picture.image_id);
    assert_eq!(image.repo_tags, [&*tag]);
    assert_eq!(image.repo_digests, [&*digest]);
    assert_eq!((image.uid, &*image.username), (Some(1000), ""));
    assert_eq!(image.config.cmd, ["/bin/true"]);
    assert!(image.size_bytes > 0);
    assert!(node.service.fs_usage().used_bytes >= image.size_bytes);

    let again = node.pull(&digest).await.unwrap();
    assert_eq!(
        (again.image_id.as_str(), again.bytes),
        (&*picture.image_id, 0)
    );
    assert_eq!(node.service.list().len(), 1);
    for name in [&tag, &digest, &image.id, &image.id[7..], &image.id[7..19]] {
        assert!(node.service.find(name).is_some(), "{name}");
    }
    assert!(node.service.remove(&tag).await.unwrap());
    assert_eq!(node.service.list(), Vec::new());
    assert!(!node.service.remove(&digest).await.unwrap());
    assert!(node.service.find(&digest).is_none());
    assert!(!node.service.remove(&"0".repeat(64)).await.unwrap());
    assert!(!node.service.remove("?!").await.unwrap());
    assert_eq!(node.service.fs_usage().used_bytes, empty);
}

#[tokio::test]
async fn images_are_here_again_after_a_restart_and_a_damaged_record_costs_itself() {
    let registry = DockerRegistry::start(false);
    for name in ["one", "two"] {
        registry.push(name, "1", &Picture::small(name));
    }
    let node = Node::new();
    let name = |name: &str| format!("{}/{name}:1", registry.address);
    let one = node.pull(&name("one")).await.unwrap();
    node.pull(&name("two")).await.unwrap();
    let before = node.service.list();
    let node = node.reopened();
    assert_eq!(node.service.list(), before);

    let record = format!("images/records/{}.rec", &one.image_id[7..]);
    std::fs::write(node.dir.path().join(record), "damaged").unwrap();
    let node = node.reopened();
    assert!(node.service.find(&name("one")).is_none());
    assert!(node.service.find(&name("two")).is_some());
    let again = node.pull(&name("one")).await.unwrap();
    assert_eq!(again.image_id, one.image_id);
    // Its layers were not what was damaged.
    assert_eq!(again.bytes, 0);
    assert_eq!(node.service.list(), before);
}

#[tokio::test]
async fn every_packing_and_an_index_is_pulled() {
    let tars = [
        tar_of(&[("a", b"lower"), ("b", b"kept")]),
        tar_of(&[("a", b"upper"), (".wh.b", b"")]),
        tar_of(&[]),
        tar_of(&[]),
    ];
    for packing in ["gzip", "zstd", "tar"] {
        let picture = Picture::of(&tars, packing, json!({}));
        let server = Server::of(picture.clone().indexed());
        let node = Node::new();
        let pulled = node.pull(&server.reference()).await.unwrap();
        assert_eq!(pulled.image_id, picture.image_id);
        let image = node.service.find(&pulled.image_id).unwrap();
        assert_eq!(image.layers.len(), 4, "{packing}");
        assert_eq!(image.manifest_digest.to_string(), picture.digest());
        let index = picture.clone().indexed().digest();
        assert!(image.repo_digests[0].ends_with(&index));
        // The two empty layers are one.
        assert_eq!(server.count(|r| r.path().contains("/blobs/")), 3 + 1);
    }
}

#[tokio::test]
async fn a_moved_tag_leaves_the_old_image_its_digest() {
    let registry = DockerRegistry::start(false);
    let (old, new) = (Picture::small("old"), Picture::small("new"));
    let tag = format!("{}/a:1", registry.address);
    let node = Node::new();
    registry.push("a", "1", &old);
    node.pull(&tag).await.unwrap();
    registry.push("a", "1", &new);
    node.pull(&tag).await.unwrap();
    let check = |node: &Node| {
        assert_eq!(node.service.find(&tag).unwrap().id, new.image_id);
        let old = node.service.find(&old.image_id).unwrap();
        assert!(old.repo_tags.is_empty() && old.repo_digests.len() == 1);
    };
    check(&node);
    check(&node.reopened());
}

#[tokio::test]
async fn one_image_from_two_registries_is_one_image_with_all_names() {
    let (here, there) = (DockerRegistry::start(false), DockerRegistry::start(false));
    let picture = Picture::small("same");
    let node = Node::new();
    for registry in [&here, &there] {
        registry.push("a", "1", &picture);
        registry.push("a", "2", &picture);
        for tag in ["1", "2"] {
            let name = format!("{}/a:{tag}", registry.address);
            assert_eq!(node.pull(&name).await.unwrap().image_id, picture.image_id);
        }
    }
    let images = node.service.list();
    assert_eq!(images.len(), 1);
    assert_eq!(
        (images[0].repo_tags.len(), images[0].repo_digests.len()),
        (4, 2)
    );
    let name = format!("{}/a:2", there.address);
    assert!(node.service.remove(&name).await.unwrap());
    assert_eq!(node.service.list(), Vec::new());
}

#[tokio::test]
async fn a_layer_two_images_share_outlives_the_first() {
    let shared = tar_of(&[("shared", b"shared")]);
    let of = |own: &str| {
        let own = tar_of(&[(own, b"own")]);
        Picture::of(&[shared.clone(), own], "gzip", json!({}))
    };
    let (one, two) = (Server::of(of("one")), Server::of(of("two")));
    let node = Node::new();
    node.pull(&one.reference()).await.unwrap();
    let second = node.pull(&two.reference()).await.unwrap();
    let shared_digest = &of("one").layers[0];
    assert_eq!(two.count(|r| r.path().ends_with(&**shared_digest)), 0);
    node.service.remove(&one.reference()).await.unwrap();
    let node = node.reopened();
    assert!(node.service.find(&second.image_id).is_some());
    assert_eq!(node.pull(&two.reference()).await.unwrap().bytes, 0);
}

#[tokio::test]
async fn pulls_of_the_same_join_and_those_of_other_credentials_do_not() {
    let registry = DockerRegistry::start(true);
    registry.push("a", "1", &Picture::small("joined"));
    let node = Node::new();
    let name = format!("{}/a:1", registry.address);
    let pulls = (0..8).map(|_| node.pull_as(&name, Some(credentials())));
    let strangers = (0..2).map(|_| node.pull(&name));
    let (known, unknown) = tokio::join!(
        futures_util::future::join_all(pulls),
        futures_util::future::join_all(strangers)
    );
    assert!(known.iter().all(Result::is_ok));
    for error in unknown {
        let error = error.unwrap_err();
        assert!(matches!(
            registry_error(&error),
            RegistryError::Unauthorized { .. }
        ));
    }
}

#[tokio::test]
async fn basic_credentials_work_in_every_form_they_come_in() {
    let registry = DockerRegistry::start(true);
    registry.push("a", "1", &Picture::small("basic"));
    let name = format!("{}/a:1", registry.address);
    let auth = Credentials {
        auth: "YmVydGg6c2VjcmV0".into(),
        ..Credentials::default()
    };
    let addressed = Credentials {
        server_address: registry.address.clone(),
        ..credentials()
    };
    for good in [credentials(), auth.clone(), addressed] {
        let node = Node::new();
        node.pull_as(&name, Some(good)).await.unwrap();
    }
    let wrong = Credentials {
        password: "wrong".into(),
        ..credentials()
    };
    let elsewhere = Credentials {
        server_address: "registry.example".into(),
        ..credentials()
    };
    for bad in [
        None,
        Some(wrong),
        Some(elsewhere),
        Some(Credentials::default()),
    ] {
        let node = Node::new();
        let error = node.pull_as(&name, bad).await.unwrap_err();
        assert!(matches!(
            registry_error(&error),
            RegistryError::Unauthorized { .. }
        ));
        assert!(!chain(&*error).contains("wrong") && !chain(&*error).contains(PASSWORD));
    }
    let damaged = Credentials {
        auth: "%%%".into(),
        ..Credentials::default()
    };
    let error = Node::new().pull_as(&name, Some(damaged)).await.unwrap_err();
    assert!(matches!(
        registry_error(&error),
        RegistryError::Credentials(_)
    ));
}

#[tokio::test]
async fn what_the_registry_does_not_have_is_not_found() {
    let registry = DockerRegistry::start(false);
    let node = Node::new();
    for name in ["a:1", &format!("a@sha256:{}", "0".repeat(64))] {
        let name = format!("{}/{name}", registry.address);
        let error = node.pull(&name).await.unwrap_err();
        assert!(matches!(
            registry_error(&error),
            RegistryError::NotFound { .. }
        ));
        assert!(
            chain(&*error).contains("MANIFEST_UNKNOWN"),
            "{}",
            chain(&*error)
        );
    }
    for name in ["", "A/B C", &"0".repeat(64)] {
        node.refused(name).await;
    }
}

#[tokio::test]
async fn https_needs_the_ca_that_hosts_toml_names() {
    let ca = Ca::new();
    let picture = Picture::small("https");
    let served = picture.clone();
    let server = Server::start_with(Some(ca.server.clone()), move |r| serve(&served, r));
    let host = format!("localhost:{}", server.address.port());
    let name = format!("{host}/a:1");
    let node = Node::new();
    node.hosts_toml(&host, &format!("server = \"https://{host}\""));
    let error = node.pull(&name).await.unwrap_err();
    assert!(
        matches!(registry_error(&error), RegistryError::Tls { .. }),
        "{}",
        chain(&*error)
    );

    // Without a restart: the file is read at every pull.
    let dir = node.dir.path().join("certs.d").join(&host);
    std::fs::write(dir.join("ca.pem"), &ca.pem).unwrap();
    node.hosts_toml(
        &host,
        &format!("server = \"https://{host}\"\nca = \"ca.pem\""),
    );
    assert_eq!(node.pull(&name).await.unwrap().image_id, picture.image_id);

    node.service.remove(&name).await.unwrap();
    node.hosts_toml(&host, "skip_verify = true");
    assert_eq!(node.pull(&name).await.unwrap().image_id, picture.image_id);

    node.service.remove(&name).await.unwrap();
    node.hosts_toml(&host, "ca = \"absent.pem\"");
    assert!(node.refused(&name).await.contains("absent.pem"));
    std::fs::write(dir.join("absent.pem"), "not pem").unwrap();
    assert!(node.refused(&name).await.contains("absent.pem"));
    node.hosts_toml(&host, "skip_verfy = true");
    let said = node.refused(&name).await;
    assert!(
        said.contains("hosts.toml") && said.contains("skip_verfy"),
        "{said}"
    );
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_the_registry_when_it_fails() {
    let picture = Picture::small("mirrored");
    let (origin, mirror) = (Server::of(picture.clone()), Server::of(picture.clone()));
    let empty = Server::start(|_| Reply::status(404));
    let broken = Server::start(|_| Reply::status(500));
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hosts = |mirrors: &[String]| {
        let mut text = format!("server = \"http://{}\"\n", origin.name());
        for mirror in mirrors {
            text += &format!("[host.\"http://{mirror}/deep\"]\n");
            text += "capabilities = [\"pull\", \"resolve\"]\n";
            text += &format!("[host.\"http://{mirror}/deep\".header]\nx-key = \"k\"\n");
        }
        text
    };
    let node = Node::new();
    node.hosts_toml("registry.example", &hosts(&[mirror.name()]));
    let pulled = node.pull("registry.example/a/b").await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert!(origin.seen().is_empty());
    for request in mirror.seen() {
        assert!(request.path().starts_with("/deep/v2/a/b/"), "{request:?}");
        assert!(
            request.target.ends_with("?ns=registry.example"),
            "{request:?}"
        );
        assert_eq!(request.header("x-key"), "k");
    }
    let image = node.service.find("registry.example/a/b").unwrap();
    assert_eq!(image.repo_tags, ["registry.example/a/b:latest"]);

    let node = Node::new();
    let bad = [empty.name(), broken.name(), closed.to_string()];
    node.hosts_toml("_default", &hosts(&bad));
    node.pull("registry.example/a/b").await.unwrap();
    assert!(origin.count(|r| r.path().starts_with("/v2/a/b/")) > 0);
    assert!(origin.count(|r| r.target.contains("ns=") && r.path().contains("deep")) == 0);

    let node = Node::new();
    node.hosts_toml("registry.example", "capabilities = [\"push\"]");
    assert!(
        node.refused("registry.example/a/b")
            .await
            .contains("capability")
    );
}

#[tokio::test]
async fn a_tag_that_did_not_move_costs_one_small_request() {
    let server = Server::of(Picture::small("still"));
    let node = Node::new();
    node.pull(&server.reference()).await.unwrap();
    let before = server.seen().len();
    node.pull(&server.reference()).await.unwrap();
    let after = &server.seen()[before..];
    assert_eq!(after.len(), 1, "{after:?}");
    assert_eq!(after[0].method, "HEAD");
}

/// A registry that lets in who brings the token its own service gives.
fn token_registry(
    picture: Picture,
    service: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> (Server, Server) {
    let tokens = Server::start(service);
    let realm = tokens.address;
    let registry = Server::start(move |request| {
        if request.header("authorization") == "Bearer the-token" {
            return serve(&picture, request);
        }
        Reply::status(401).with(
            "www-authenticate",
            format!("Bearer realm=\"http://{realm}/token\",service=\"reg\",scope=\"repository:a/b:pull\""),
        )
    });
    (registry, tokens)
}

fn query(request: &Request) -> BTreeMap<String, String> {
    let text = match &*request.method {
        "POST" => String::from_utf8(request.body.clone()).unwrap(),
        _ => request.target.split_once('?').unwrap().1.to_owned(),
    };
    url::form_urlencoded::parse(text.as_bytes())
        .into_owned()
        .collect()
}

#[tokio::test]
async fn tokens_are_fetched_once_for_strangers_users_and_identity_tokens() {
    let identity = Credentials {
        identity_token: "id&t".into(),
        ..Credentials::default()
    };
    let tars = [
        tar_of(&[("a", b"1")]),
        tar_of(&[("b", b"2")]),
        tar_of(&[("c", b"3")]),
    ];
    for credentials in [None, Some(credentials()), Some(identity)] {
        let (registry, tokens) = token_registry(Picture::of(&tars, "gzip", json!({})), |_| {
            Reply::ok("{\"token\": \"the-token\", \"expires_in\": 300}")
        });
        let node = Node::new();
        node.pull_as(&registry.reference(), credentials.clone())
            .await
            .unwrap();
        let asked = tokens.seen();
        assert_eq!(asked.len(), 1, "{asked:?}");
        let said = query(&asked[0]);
        assert_eq!(
            (&*said["service"], &*said["scope"]),
            ("reg", "repository:a/b:pull")
        );
        match credentials {
            None => assert_eq!(asked[0].header("authorization"), ""),
            Some(c) if c.identity_token.is_empty() => {
                assert_eq!(asked[0].header("authorization"), "Basic YmVydGg6c2VjcmV0");
            }
            Some(_) => {
                assert_eq!(
                    (&*asked[0].method, &*said["refresh_token"]),
                    ("POST", "id&t")
                );
                assert_eq!(said["grant_type"], "refresh_token");
            }
        }
        assert_eq!(registry.count(|r| r.header("authorization").is_empty()), 1);
    }
}

#[tokio::test]
async fn a_registry_token_is_sent_as_it_is() {
    let (registry, tokens) = token_registry(Picture::small("token"), |_| Reply::status(500));
    let credentials = Credentials {
        registry_token: "the-token".into(),
        ..Credentials::default()
    };
    let node = Node::new();
    node.pull_as(&registry.reference(), Some(credentials))
        .await
        .unwrap();
    assert!(tokens.seen().is_empty());
}

#[tokio::test]
async fn a_refusing_or_broken_token_service_is_told() {
    for (reply, expected) in [
        (Reply::status(401), "refused with status 401"),
        (Reply::ok("{}"), "without a token"),
        (Reply::ok("<html>"), "without a token"),
        (Reply::ok(vec![b' '; 2 << 20]), "without a token"),
        (
            Reply::status(302).with("location", "http://127.0.0.1:1/"),
            "leads to another host",
        ),
        (Reply::ok("{\"token\": \"wrong\"}"), "unauthorized"),
        (Reply::ok("{\"token\": \"a\\nb\"}"), "without a token"),
    ] {
        let (registry, _tokens) = token_registry(Picture::small("t"), move |_| reply.clone());
        let node = Node::new();
        let said = node.refused(&registry.reference()).await;
        assert!(said.contains(expected), "{said}");
    }
}

#[tokio::test]
async fn dockers_manifests_are_pulled_from_a_real_registry() {
    let registry = DockerRegistry::start(false);
    let picture = Picture::small("docker").dockerised();
    registry.push("library/a", "1", &picture);
    let node = Node::new();
    let name = format!("{}/library/a:1", registry.address);
    let pulled = node.pull(&name).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    let image = node.service.find(&name).unwrap();
    assert_eq!(image.manifest_digest.to_string(), picture.digest());
}

#[tokio::test]
async fn a_token_that_expires_during_a_pull_is_fetched_again() {
    let tars = [tar_of(&[("a", b"1")]), tar_of(&[("b", b"2")])];
    let picture = Picture::of(&tars, "gzip", json!({}));
    let tokens = Server::start({
        let given = AtomicUsize::new(0);
        move |_| {
            let nth = given.fetch_add(1, Ordering::SeqCst);
            Reply::ok(format!("{{\"access_token\": \"t{nth}\"}}"))
        }
    });
    let realm = tokens.address;
    let served = picture.clone();
    let registry = Server::start(move |request| {
        let is_blob = request.path().contains("/blobs/");
        let good = if is_blob { "Bearer t1" } else { "Bearer t0" };
        if request.header("authorization") == good {
            return serve(&served, request);
        }
        let challenge = format!("Bearer realm=\"http://{realm}/\"");
        Reply::status(401).with("www-authenticate", challenge)
    });
    let node = Node::new();
    let pulled = node.pull(&registry.reference()).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert_eq!(tokens.seen().len(), 2);
}

#[tokio::test]
async fn a_running_pull_can_be_watched_and_goes_on_without_its_caller() {
    let picture = Picture::small("watched");
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let served = picture.clone();
    let server = Server::start(move |request| {
        if request.path().contains(&served.layers[0]) {
            // Ends with the test's end of the channel, whatever becomes of the test.
            let _ = held.lock().unwrap().recv();
        }
        serve(&served, request)
    });
    let node = Node::new();
    let progress = Progress::new();
    let (service, reference) = (node.service.clone(), server.reference());
    let watched = progress.clone();
    let caller = tokio::spawn(async move { service.pull(&reference, None, &watched).await });
    while progress.stage() != Stage::Layers || progress.layers_total() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!((progress.layers(), progress.layers_total()), (0, 1));
    let running = node.service.running_pulls();
    assert_eq!(running.len(), 1);
    assert_eq!(running[0].0, server.reference());
    assert_eq!(node.service.list(), Vec::new());
    caller.abort();
    drop(release);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while node.service.list().is_empty() {
        assert!(
            std::time::Instant::now() < deadline,
            "the pull did not go on"
        );
        tokio::task::yield_now().await;
    }
    while progress.stage() != Stage::Done {
        tokio::task::yield_now().await;
    }
    assert_eq!(node.service.running_pulls().len(), 0);
}
