//! Who may pull what from where: credentials, tokens, registries.conf, proxies, the policy, and
//! what `berth explain pull` says of all that.

mod support;

use base64::Engine as _;
use berth_image_service::auth::{AuthError, Credentials};
use berth_image_service::explain::explain;
use berth_image_service::hosts::Fallback;
use berth_image_service::pinned::Patterns;
use berth_image_service::progress::{Progress, Stage};
use berth_image_service::pull::Kind;
use berth_image_service::registry::RegistryError;
use rcgen::{KeyPair, SigningKey as _};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::*;

fn base64(bytes: impl AsRef<[u8]>) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
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

/// A registry that lets in who brings the newest token of its service, which gives "t0", "t1", …
/// as `answer` says.
fn token_registry(
    picture: Picture,
    answer: impl Fn(&Request, String) -> Reply + Send + Sync + 'static,
) -> (Server, Server) {
    let newest = Arc::new(AtomicUsize::new(usize::MAX));
    let given = Arc::clone(&newest);
    let tokens = Server::start(move |request| {
        let nth = given.load(Ordering::SeqCst).wrapping_add(1);
        let reply = answer(request, format!("t{nth}"));
        if reply.status == 200 {
            given.store(nth, Ordering::SeqCst);
        }
        reply
    });
    let realm = tokens.address;
    let registry = Server::start(move |request| {
        let newest = newest.load(Ordering::SeqCst);
        if request.header("authorization") == format!("Bearer t{newest}") {
            return serve(&picture, request);
        }
        Reply::status(401).with(
            "www-authenticate",
            format!("Bearer realm=\"http://{realm}/token\",service=\"reg\",scope=\"repository:a/b:pull\""),
        )
    });
    (registry, tokens)
}

fn given(token: String, seconds: u64) -> Reply {
    Reply::ok(json!({"token": token, "expires_in": seconds}).to_string())
}

#[tokio::test]
async fn tokens_are_kept_across_pulls_and_by_credentials() {
    let (registry, tokens) = token_registry(Picture::small("kept"), |_, token| given(token, 300));
    let node = Node::new();
    let me = credentials();
    node.pull_as(&registry.reference(), Some(me.clone()))
        .await
        .unwrap();
    assert_eq!(tokens.seen().len(), 1);
    // The tag again: neither challenged nor a new token.
    let before = registry.seen().len();
    node.pull_as(&registry.reference(), Some(me.clone()))
        .await
        .unwrap();
    assert_eq!(
        (tokens.seen().len(), registry.seen().len() - before),
        (1, 1)
    );
    // Others do not ride on it.
    let other = Credentials {
        password: "another".into(),
        ..me.clone()
    };
    for stranger in [None, Some(other)] {
        let before = registry.seen().len();
        node.pull_as(&registry.reference(), stranger).await.unwrap();
        let first = &registry.seen()[before];
        assert_eq!(first.header("authorization"), "");
    }
    assert_eq!(tokens.seen().len(), 3);
}

#[tokio::test]
async fn a_token_that_is_about_to_expire_is_fetched_anew_without_a_challenge() {
    let (registry, tokens) = token_registry(Picture::small("short"), |_, token| given(token, 1));
    let node = Node::new();
    node.pull(&registry.reference()).await.unwrap();
    let refused = registry.count(|request| request.header("authorization").is_empty());
    assert_eq!(refused, 1, "only the first request is without a token");
    assert!(tokens.seen().len() > 1);
}

#[tokio::test]
async fn a_service_that_speaks_oauth_only_is_posted_to() {
    let (registry, tokens) = token_registry(Picture::small("oauth"), |request, token| {
        if request.method == "POST" {
            given(token, 300)
        } else {
            Reply::status(405)
        }
    });
    let node = Node::new();
    node.pull_as(&registry.reference(), Some(credentials()))
        .await
        .unwrap();
    let asked = tokens.seen();
    let methods: Vec<&str> = asked.iter().map(|request| &*request.method).collect();
    assert_eq!(methods, ["GET", "POST"]);
    let said = query(&asked[1]);
    assert_eq!(
        (&*said["grant_type"], &*said["username"]),
        ("password", USER)
    );
    assert_eq!((&*said["password"], &*said["service"]), (PASSWORD, "reg"));
}

#[tokio::test]
async fn a_token_for_another_scope_is_told_as_that() {
    let tokens = Server::start(|_| given("elsewhere".into(), 300));
    let realm = tokens.address;
    let registry = Server::start(move |_| {
        let challenge = format!(
            "Bearer realm=\"http://{realm}/\",scope=\"repository:a/b:pull\",error=\"insufficient_scope\""
        );
        Reply::status(401).with("www-authenticate", challenge)
    });
    let node = Node::new();
    let error = node.pull(&registry.reference()).await.unwrap_err();
    let RegistryError::Unauthorized { source, .. } = registry_error(&error) else {
        panic!("{}", chain(&*error));
    };
    assert!(matches!(source, Some(AuthError::Useless { .. })));
    assert!(chain(&*error).contains("another scope"));
    assert!(registry.seen().len() <= 2);
}

#[tokio::test]
async fn a_manifest_that_is_here_opens_nothing_to_who_may_not_pull_it() {
    let registry = DockerRegistry::start(true);
    let picture = Picture::small("private");
    registry.push("a", "1", &picture);
    let node = Node::new();
    let name = format!("{}/a@{}", registry.address, picture.digest());
    node.pull_as(&name, Some(credentials())).await.unwrap();
    let error = node.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthorized, "{}", chain(&*error));
    assert_eq!(
        node.pull_as(&name, Some(credentials()))
            .await
            .unwrap()
            .bytes,
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_somebody_else_is_fetching_opens_nothing_either() {
    let picture = Picture::small("private");
    let (served, asked) = (picture.clone(), Arc::new(AtomicUsize::new(0)));
    let (go, begun) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&asked));
    let may = Arc::clone(&go);
    let server = Server::start(move |request| {
        if request.header("authorization").is_empty() {
            return Reply::status(401).with("www-authenticate", "Basic realm=\"x\"");
        }
        if request.path().contains("/manifests/") && asked.fetch_add(1, Ordering::SeqCst) == 0 {
            wait_for("the other pull", || may.load(Ordering::SeqCst) == 1);
        }
        serve(&served, request)
    });
    let node = Node::new();
    let name = format!("{}/a@{}", server.address, picture.digest());
    let first = node.pull_as(&name, Some(credentials()));
    let second = async {
        wait_for("the first pull", || begun.load(Ordering::SeqCst) == 1);
        node.pull(&name).await
    };
    let release = async {
        wait_for("both to ask", || {
            let running = node.service.running_pulls();
            let asking = |(_, progress): &&(String, Progress)| progress.stage() == Stage::Manifest;
            running.iter().filter(asking).count() == 2
        });
        go.store(1, Ordering::SeqCst);
    };
    let (first, second, ()) = tokio::join!(first, second, release);
    first.unwrap();
    let error = second.unwrap_err();
    assert_eq!(error.kind(), Kind::Unauthorized, "{}", chain(&*error));
}

#[tokio::test]
async fn the_nodes_own_credentials_count_where_the_pull_has_none_and_for_mirrors() {
    let registry = DockerRegistry::start(true);
    let picture = Picture::small("own");
    registry.push("a", "1", &picture);
    let name = format!("{}/a:1", registry.address);
    let node = Node::new();
    assert!(node.refused(&name).await.contains("unauthorized"));
    let entry = json!({"auth": base64(format!("{USER}:{PASSWORD}"))});
    // Read live.
    node.write(
        "auth.json",
        &json!({"auths": {&registry.address: entry}}).to_string(),
    );
    assert_eq!(node.pull(&name).await.unwrap().image_id, picture.image_id);

    // As a mirror of another registry, whose credentials the pull brings.
    node.service.remove(&name).await.unwrap();
    let text = format!(
        "fallback = \"never\"\n[host.\"http://{}\"]",
        registry.address
    );
    node.hosts_toml("registry.example", &text);
    let foreign = Credentials {
        password: "of-the-registry".into(),
        ..credentials()
    };
    let mirrored = node.pull_as("registry.example/a:1", Some(foreign)).await;
    assert_eq!(mirrored.unwrap().image_id, picture.image_id);

    node.write("auth.json", "{\"auths\": \"secret-text\"}");
    let error = node.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Configuration);
    let said = chain(&*error);
    assert!(
        said.contains("auth.json") && !said.contains("secret-text"),
        "{said}"
    );
}

#[tokio::test]
async fn registries_conf_is_read_live_and_says_where_names_are_served() {
    let picture = Picture::small("moved");
    let (mirror, inside) = (
        Server::start(|_| Reply::status(404)),
        Server::of(picture.clone()),
    );
    let node = Node::new();
    let conf = |more: &str| {
        format!(
            "[[registry]]\nprefix = \"registry.example/team\"\nlocation = \"{}/deep/team\"\n{more}\
             [[registry.mirror]]\nlocation = \"{}/m\"\n",
            inside.name(),
            mirror.name()
        )
    };
    node.write("registries.conf", &conf(""));
    let name = "registry.example/team/app:1";
    let pulled = node.pull(name).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert!(mirror.count(|r| r.path().starts_with("/v2/m/app/")) > 0);
    assert!(
        inside
            .seen()
            .iter()
            .all(|r| r.path().starts_with("/v2/deep/team/app/"))
    );
    let image = node.service.find(name).unwrap();
    assert_eq!(image.repo_tags, [name]);

    node.write("registries.conf", &conf("blocked = true\n"));
    let error = node.pull(name).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Configuration);
    assert!(
        chain(&*error).contains("is blocked by"),
        "{}",
        chain(&*error)
    );

    node.write("registries.conf", "\n[[registry]]\nprefxi = \"a.b\"\n");
    let said = chain(&*node.pull(name).await.unwrap_err());
    assert!(
        said.contains("registries.conf") && said.contains("line 3"),
        "{said}"
    );
}

#[tokio::test]
async fn short_names_are_found_under_what_they_were_asked_for_by() {
    let (empty, picture) = (
        Server::start(|_| Reply::status(404)),
        Picture::small("short"),
    );
    let second = Server::of(picture.clone());
    let node = Node::new();
    let searched = format!(
        "unqualified-search-registries = [\"{}\", \"{}\"]\n",
        empty.name(),
        second.name()
    );
    node.write("registries.conf", &searched);
    let said = node.refused("app:1").await;
    assert!(
        said.contains("short name") && said.contains(&second.name()),
        "{said}"
    );
    node.write(
        "registries.conf",
        &format!("{searched}short-name-mode = \"disabled\""),
    );
    node.pull("app:1").await.unwrap();
    let image = node.service.find("app:1").unwrap();
    assert_eq!(image.repo_tags, [format!("{}/app:1", second.name())]);
    let node = node.reopened();
    assert!(node.service.find("app:1").is_some());
    node.service.remove("app:1").await.unwrap();

    node.write(
        "registries.conf",
        &format!("[aliases]\n\"app\" = \"{}/x/y\"", second.name()),
    );
    node.pull("app:1").await.unwrap();
    assert!(second.count(|r| r.path().starts_with("/v2/x/y/")) > 0);
    assert!(node.service.find("app:1").is_some());
    assert!(node.service.find("app:2").is_none());
}

#[tokio::test]
async fn one_registry_may_have_a_proxy_of_its_own() {
    let picture = Picture::small("proxied");
    let served = picture.clone();
    let proxy = Server::start(move |request| {
        let mut request = request.clone();
        let Some(path) = request.target.strip_prefix("http://registry.example:5000") else {
            return Reply::status(502);
        };
        request.target = path.to_owned();
        serve(&served, &request)
    });
    let node = Node::new();
    let text = format!(
        "server = \"http://registry.example:5000\"\nproxy = \"http://user:secret-word@{}\"",
        proxy.name()
    );
    node.hosts_toml("registry.example:5000", &text);
    let pulled = node.pull("registry.example:5000/a:1").await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    let expected = format!("Basic {}", base64("user:secret-word"));
    for request in proxy.seen() {
        assert_eq!(request.header("proxy-authorization"), expected);
    }
    let explained = explain(
        node.service.registries(),
        node.service.policy(),
        "registry.example:5000/a:1",
        None,
    )
    .await;
    let shown = format!("{explained:?}");
    assert!(
        shown.contains(&proxy.name()) && !shown.contains("secret-word"),
        "{shown}"
    );
}

#[tokio::test]
async fn nothing_falls_back_to_the_registry_where_that_is_forbidden() {
    let (mirror, origin) = (
        Server::start(|_| Reply::status(404)),
        Server::of(Picture::small("o")),
    );
    let node = Node::with(|settings| settings.fallback = Fallback::Never);
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n",
        origin.name(),
        mirror.name()
    );
    // The server is the registry itself.
    node.hosts_toml(&origin.name(), &text);
    assert!(
        node.refused(&origin.reference())
            .await
            .contains("not found")
    );
    assert!(origin.seen().is_empty());
    node.hosts_toml(&origin.name(), &format!("fallback = \"origin\"\n{text}"));
    node.pull(&origin.reference()).await.unwrap();
}

/// `picture` with a signature by `pair` under the name `named`, as cosign writes it.
fn signed(picture: &Picture, pair: &KeyPair, named: &str) -> Picture {
    let payload = json!({"critical": {
        "identity": {"docker-reference": named},
        "image": {"docker-manifest-digest": picture.digest()},
        "type": "cosign container image signature"}, "optional": null})
    .to_string();
    let signature = base64(pair.sign(payload.as_bytes()).unwrap());
    let mut with = Picture::default();
    let mut layer = with.add(
        "application/vnd.dev.cosign.simplesigning.v1+json",
        payload.into_bytes(),
    );
    layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
    let config = with.add("application/vnd.oci.image.config.v1+json", b"{}".to_vec());
    with.media_type = "application/vnd.oci.image.manifest.v1+json".into();
    with.manifest = json!({
        "schemaVersion": 2, "mediaType": with.media_type, "config": config, "layers": [layer],
    })
    .to_string()
    .into_bytes();
    with
}

fn policy(scope: &str, requirement: serde_json::Value) -> String {
    json!({"default": [{"type": "insecureAcceptAnything"}],
        "transports": {"docker": {scope: [requirement]}}})
    .to_string()
}

#[tokio::test]
async fn the_policy_is_checked_at_the_pull_and_again_at_each_use() {
    let registry = DockerRegistry::start(false);
    let (pair, stranger) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let node = Node::new();
    let key = |pair: &KeyPair| {
        let path = node.dir.path().join("key.pub");
        std::fs::write(&path, pair.public_key_pem()).unwrap();
        path
    };
    let host = registry.address.as_str();
    let (plain, good) = (Picture::small("plain"), Picture::small("good"));
    let (forged, other) = (Picture::small("forged"), Picture::small("other"));
    for (name, picture) in [
        ("plain", &plain),
        ("good", &good),
        ("forged", &forged),
        ("other", &other),
    ] {
        registry.push(&format!("team/{name}"), "1", picture);
    }
    let push = |name: &str, picture: &Picture, pair: &KeyPair, named: &str| {
        let tag = format!("{}.sig", picture.digest().replace(':', "-"));
        registry.push(&format!("team/{name}"), &tag, &signed(picture, pair, named));
    };
    push("good", &good, &pair, &format!("{host}/team/good"));
    push("forged", &forged, &stranger, &format!("{host}/team/forged"));
    push("other", &other, &pair, &format!("{host}/team/plain"));

    // Without a policy everything is accepted.
    let name = |name: &str| format!("{host}/team/{name}:1");
    node.pull(&name("plain")).await.unwrap();
    node.service.remove(&name("plain")).await.unwrap();

    let wanted = json!({"type": "sigstoreSigned", "keyPath": key(&pair)});
    node.write(
        "policy.json",
        &policy(&format!("{host}/team"), wanted.clone()),
    );
    for (image, expected) in [
        ("plain", "the image has none"),
        ("forged", "by another key"),
        ("other", "for the name"),
    ] {
        let error = node.pull(&name(image)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Untrusted);
        let said = chain(&*error);
        assert!(said.contains(expected), "{image}: {said}");
        assert!(node.service.find(&name(image)).is_none());
    }
    let pulled = node.pull(&name("good")).await.unwrap();
    assert_eq!(pulled.image_id, good.image_id);

    // What is here is checked against what its pull kept, also after a restart.
    let node = node.reopened();
    let image = node.service.find(&name("good")).unwrap();
    let by = |asked: &[&str]| node.service.check_use(&image, asked);
    by(&[&name("good"), &image.id]).unwrap();
    by(&["", &image.id]).unwrap();
    let rotated = json!({"type": "sigstoreSigned", "keyPath": key_of(&node, &stranger)});
    node.write("policy.json", &policy(&format!("{host}/team"), rotated));
    assert_eq!(by(&["", &image.id]).unwrap_err().kind(), Kind::Untrusted);
    node.write("policy.json", &policy(host, json!({"type": "reject"})));
    let said = by(&[&name("good")]).unwrap_err().to_string();
    assert!(said.contains("rejects") && said.contains(host), "{said}");
    assert_eq!(
        node.pull(&name("good")).await.unwrap_err().kind(),
        Kind::Untrusted
    );
    node.write("policy.json", "{");
    assert_eq!(
        by(&[&name("good")]).unwrap_err().kind(),
        Kind::Configuration
    );
    assert_eq!(
        node.pull(&name("good")).await.unwrap_err().kind(),
        Kind::Configuration
    );
    node.write(
        "policy.json",
        &policy("elsewhere.example", json!({"type": "reject"})),
    );
    by(&[&name("good")]).unwrap();
}

fn key_of(node: &Node, pair: &KeyPair) -> std::path::PathBuf {
    let path = node.dir.path().join("other.pub");
    std::fs::write(&path, pair.public_key_pem()).unwrap();
    path
}

#[tokio::test]
async fn a_signature_of_the_index_is_one_of_the_image() {
    let pair = KeyPair::generate().unwrap();
    let picture = Picture::small("indexed").indexed();
    let node = Node::new();
    let path = key_of(&node, &pair);
    let served = picture.clone();
    let signatures: Arc<std::sync::OnceLock<Picture>> = Arc::default();
    let with = Arc::clone(&signatures);
    let server = Server::start(move |request| {
        let signed = with.get().unwrap();
        if request.path().ends_with(".sig") {
            let wanted = picture_tag(&served);
            return if request.path().ends_with(&wanted) {
                Reply::ok(signed.manifest.clone()).with("content-type", signed.media_type.clone())
            } else {
                Reply::status(404)
            };
        }
        let found = serve(&served, request);
        if found.status == 404 {
            serve(signed, request)
        } else {
            found
        }
    });
    let named = format!("{}/a/b", server.name());
    signatures
        .set(signed(&picture, &pair, &named))
        .ok()
        .unwrap();
    let wanted = json!({"type": "sigstoreSigned", "keyPath": path});
    node.write("policy.json", &policy(&server.name(), wanted));
    let pulled = node.pull(&server.reference()).await.unwrap();
    assert_eq!(pulled.image_id, Picture::small("indexed").image_id);
}

fn picture_tag(picture: &Picture) -> String {
    format!("{}.sig", picture.digest().replace(':', "-"))
}

#[tokio::test]
async fn explaining_a_pull_names_every_host_and_fetches_nothing() {
    let picture = Picture::small("explained");
    let origin = Server::of(picture.clone());
    let mirror = Server::start(|_| {
        let mut reply = Reply::status(404);
        reply.body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such"}]}"#.to_vec();
        reply
    });
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let node = Node::new();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"https://{closed}\"]\nca = \"ca.pem\"\n\
         [host.\"http://push.example\"]\ncapabilities = [\"push\"]\n",
        origin.name(),
        mirror.name()
    );
    node.hosts_toml("registry.example", &text);
    let dir = node.dir.path().join("certs.d/registry.example");
    std::fs::write(dir.join("ca.pem"), &Ca::new().pem).unwrap();
    node.write(
        "auth.json",
        &json!({"auths": {origin.name(): {"auth": base64("u:secret-word")}}}).to_string(),
    );
    let look = async |name: &str| {
        explain(node.service.registries(), node.service.policy(), name, None).await
    };
    let found = look("registry.example/a/b:1").await;
    let [one] = &found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(one.reference, "registry.example/a/b:1");
    assert!(one.policy.contains("no policy file"), "{one:?}");
    let [first, second, third, fourth] = &one.hosts[..] else {
        panic!("{one:?}")
    };
    assert_eq!(first.url, format!("http://{}/v2/a/b", mirror.name()));
    assert!(
        first
            .said_by
            .ends_with("certs.d/registry.example/hosts.toml")
    );
    assert!(first.answer.contains("not found") && first.answer.contains("MANIFEST_UNKNOWN"));
    assert!(
        second.tls.contains("ca.pem") && second.answer.contains("unreachable"),
        "{second:?}"
    );
    assert!(third.answer.contains(&picture.digest()), "{third:?}");
    assert!(third.credentials.contains("auth.json"), "{third:?}");
    assert!(fourth.answer.starts_with("not asked"));
    assert!(!format!("{found:?}").contains("secret-word"));
    assert_eq!(origin.count(|r| r.path().contains("/blobs/")), 0);
    assert_eq!(node.service.list(), Vec::new());
    // What it found out counts for pulls: the dead host is asked last now.
    let again = look("registry.example/a/b:1").await;
    assert!(again[0].hosts[2].aside.contains("unreachable"), "{again:?}");

    node.write(
        "registries.conf",
        "[[registry]]\nprefix = \"registry.example\"\nblocked = true\n",
    );
    assert!(
        look("registry.example/a").await[0]
            .problem
            .contains("blocked")
    );
    node.write(
        "registries.conf",
        "[aliases]\n\"app\" = \"registry.example/x/app\"\n",
    );
    let alias = look("app:1").await;
    assert_eq!(alias[0].reference, "registry.example/x/app:1");
    assert!(alias[0].because.contains("registries.conf"), "{alias:?}");
    assert!(!look("A B").await[0].problem.is_empty());
}

#[tokio::test]
async fn pinned_images_are_shown_as_such() {
    let server = Server::of(Picture::small("pinned"));
    let pattern = format!("{}/a/*", server.name());
    let node = Node::with(|settings| settings.pinned = Patterns::new([pattern]));
    let pulled = node.pull(&server.reference()).await.unwrap();
    assert!(node.service.find(&pulled.image_id).unwrap().pinned);
    let node = node.reopened();
    assert!(!node.service.find(&pulled.image_id).unwrap().pinned);
}

#[tokio::test]
async fn a_token_service_that_wants_to_be_left_alone_is() {
    let calls = AtomicUsize::new(0);
    let busy = move |_: &Request, token: String| match calls.fetch_add(1, Ordering::SeqCst) {
        0 | 2 => Reply::status(429).with("retry-after", "1"),
        // Nearly over when it comes, so the next pull asks for another.
        _ => given(token, 1),
    };
    let (registry, tokens) = token_registry(Picture::small("busy"), busy);
    let node = Node::new();
    let begun = Instant::now();
    node.pull(&registry.reference()).await.unwrap();
    let waited = begun.elapsed();
    // Once for the challenge and once for the token that was to be renewed.
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
    assert!(tokens.seen().len() >= 4);

    let (registry, tokens) = token_registry(Picture::small("closed"), |_, _| {
        Reply::status(429).with("retry-after", "3600")
    });
    let said = node.pull(&registry.reference()).await.unwrap_err();
    assert!(chain(&*said).contains("status 429"), "{}", chain(&*said));
    assert_eq!(tokens.seen().len(), 1);
}

#[tokio::test]
async fn a_token_request_is_redirected_on_its_own_host_only() {
    let node = Node::new();
    let moved = |request: &Request, token: String| {
        assert_eq!(
            request.header("authorization"),
            format!("Basic {}", base64("berth:secret"))
        );
        match request.path() {
            "/token" => Reply::status(307).with("location", "/new/token?moved=1"),
            "/new/token" => given(token, 300),
            other => panic!("{other}"),
        }
    };
    let (registry, tokens) = token_registry(Picture::small("moved"), moved);
    node.pull_as(&registry.reference(), Some(credentials()))
        .await
        .unwrap();
    assert_eq!(tokens.seen().len(), 2);

    let thief = Server::start(|_| given("t0".into(), 300));
    let elsewhere = format!("http://{}/token", thief.address);
    for (location, why, most) in [
        (elsewhere.as_str(), "another host", 1),
        ("/token", "too many", 6),
        ("http://[", "no valid location", 1),
    ] {
        let location = location.to_owned();
        let (registry, tokens) = token_registry(Picture::small("lost"), move |_, _| {
            Reply::status(302).with("location", &*location)
        });
        for who in [None, Some(credentials())] {
            let before = tokens.seen().len();
            let said = node.pull_as(&registry.reference(), who).await.unwrap_err();
            assert!(chain(&*said).contains(why), "{}", chain(&*said));
            assert_eq!(tokens.seen().len() - before, most);
        }
    }
    assert_eq!(thief.seen().len(), 0);
}
