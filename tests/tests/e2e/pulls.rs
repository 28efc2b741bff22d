//! Getting an image: formats, platforms, credentials, HTTPS, mirrors, failures.

use berth_proto::runtime_v1::{self as cri, AuthConfig};
use berth_tests::http::{Response, Server};
use berth_tests::image::{index, native_architecture};
use berth_tests::node::spec;
use berth_tests::registry::{Access, IDENTITY_TOKEN, PASSWORD, USER};
use berth_tests::{Format, Image, Layer, Node, Packing, Registry};
use tonic::Code;

fn image(content: &str) -> Image {
    let layer = Layer::new().file("content", 0o644, content);
    Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build()
}

/// "127.0.0.1:PORT/REPOSITORY:TAG" at another instance over the same data.
fn at(registry: &Registry, repository: &str, tag: &str) -> String {
    format!("{}:{tag}", registry.name(repository))
}

fn password() -> AuthConfig {
    AuthConfig {
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
        ..Default::default()
    }
}

#[test]
fn every_packing_of_a_layer_is_understood() {
    let node = Node::start();
    for (format, packing) in [
        (Format::Oci, Packing::Plain),
        (Format::Oci, Packing::Gzip),
        (Format::Oci, Packing::Zstd),
        (Format::DockerSchema2, Packing::Plain),
        (Format::DockerSchema2, Packing::Gzip),
        (Format::DockerSchema2, Packing::Zstd),
    ] {
        let text = format!("{format:?} {packing:?}");
        let layer = Layer::new().file("packing", 0o644, text.as_str());
        let image = Image::builder(format).base().layer(&layer, packing).build();
        let reference = node.push("packing", &text.replace(' ', "-").to_lowercase(), &image);
        assert_eq!(node.pull(&reference).unwrap(), image.id(), "{text}");
        let pod = node.run_pod(&node.fresh("pod"));
        node.base_image();
        let mut config = pod.container(&["cat", "/packing"]);
        config.image = Some(spec(&reference));
        assert_eq!(pod.output_as(config).trim_end(), text);
        pod.remove();
    }
}

#[test]
fn an_index_gives_the_image_of_this_machine_wherever_it_stands() {
    let node = Node::start();
    let foreign = if native_architecture() == "amd64" {
        "arm64"
    } else {
        "amd64"
    };
    for format in [Format::Oci, Format::DockerSchema2] {
        let build = |architecture: &str| {
            let layer = Layer::new().file("for", 0o644, architecture);
            Image::builder(format)
                .architecture(architecture)
                .layer(&layer, Packing::Gzip)
                .build()
        };
        let (native, other, third) = (build(native_architecture()), build(foreign), build("s390x"));
        let index = index(format, &[&other, &native, &third]);
        let tag = format!("{format:?}").to_lowercase();
        let reference = node
            .registry()
            .push_index("many/platforms", &tag, &[&other, &native, &third], &index)
            .unwrap();
        assert_eq!(node.pull(&reference).unwrap(), native.id());
        let digests = node.image(&reference).unwrap().repo_digests;
        let by_index = format!(
            "{}@{}",
            node.registry().name("many/platforms"),
            index.digest
        );
        assert!(digests.contains(&by_index), "{digests:?}");
    }
}

#[test]
fn an_index_without_this_machine_says_which_platforms_there_are() {
    let node = Node::start();
    let image = Image::builder(Format::Oci).architecture("s390x").build();
    let index = index(Format::Oci, &[&image]);
    let reference = node
        .registry()
        .push_index("elsewhere", "1", &[&image], &index)
        .unwrap();
    let err = node.pull(&reference).unwrap_err();
    assert!(err.message().contains("s390x"), "{err}");
    assert_eq!(node.image(&reference), None);
}

#[test]
fn a_registry_behind_a_password_lets_in_whoever_shows_it() {
    let node = Node::start();
    let image = image("basic");
    node.push("private", "1", &image);
    let registry = node.another_registry(Access::Basic);
    node.trust_plain_http(&registry);
    let reference = at(&registry, "private", "1");
    assert_eq!(
        node.pull_with(&reference, Some(password())).unwrap(),
        image.id()
    );
}

#[test]
fn credentials_may_come_as_one_base64_text() {
    use base64::Engine as _;
    let node = Node::start();
    let image = image("auth field");
    node.push("private", "1", &image);
    let registry = node.another_registry(Access::Basic);
    node.trust_plain_http(&registry);
    let auth = AuthConfig {
        auth: base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}")),
        ..Default::default()
    };
    let reference = at(&registry, "private", "1");
    assert_eq!(node.pull_with(&reference, Some(auth)).unwrap(), image.id());
}

#[test]
fn without_or_with_wrong_credentials_the_pull_is_refused_and_nothing_is_stored() {
    let node = Node::start();
    node.push("private", "1", &image("secret"));
    let registry = node.another_registry(Access::Basic);
    node.trust_plain_http(&registry);
    let reference = at(&registry, "private", "1");
    let wrong = AuthConfig {
        password: "wrong-password".to_owned(),
        ..password()
    };
    for auth in [None, Some(wrong)] {
        let err = node.pull_with(&reference, auth).unwrap_err();
        assert!(
            matches!(err.code(), Code::Unauthenticated | Code::PermissionDenied),
            "{err:?}"
        );
        assert!(!err.message().contains("wrong-password"), "{err}");
    }
    assert_eq!(node.list_images(), []);
}

#[test]
fn credentials_are_never_logged() {
    let node = Node::options().config("[log]\nlevel = \"trace\"\n").start();
    node.push("private", "1", &image("quiet"));
    let registry = node.another_registry(Access::Token);
    node.trust_plain_http(&registry);
    use base64::Engine as _;
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let reference = at(&registry, "private", "1");
    let identity = AuthConfig {
        identity_token: IDENTITY_TOKEN.to_owned(),
        ..Default::default()
    };
    let refused = AuthConfig {
        registry_token: "refused-token".to_owned(),
        ..Default::default()
    };
    let host = format!("127.0.0.1:{}", registry.port);
    node.hosts_toml(
        &host,
        &format!("server = \"http://{host}\"\n[header]\nx-key = \"header-secret\"\n"),
    );
    let file = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{encoded}\"}}}}}}");
    std::fs::write(node.root().join("etc/auth.json"), file).unwrap();
    for auth in [Some(password()), Some(identity), None] {
        node.pull_with(&reference, auth).unwrap();
        node.remove_image(&reference).unwrap();
    }
    let error = node.pull_with(&reference, Some(refused)).unwrap_err();
    let explained = node.berth(&["explain", "pull", &reference]);
    let told = format!(
        "{}{error:?}{}",
        node.log(),
        String::from_utf8_lossy(&explained.stdout)
    );
    for secret in [
        PASSWORD,
        &encoded,
        IDENTITY_TOKEN,
        "refused-token",
        "header-secret",
        // How every token of the service begins.
        "eyJ",
    ] {
        assert!(!told.contains(secret), "{secret} was told");
    }
}

#[test]
fn a_token_service_is_asked_with_the_password() {
    let node = Node::start();
    let image = image("token");
    node.push("group/private", "1", &image);
    let registry = node.another_registry(Access::Token);
    node.trust_plain_http(&registry);
    let reference = at(&registry, "group/private", "1");
    assert_eq!(
        node.pull_with(&reference, Some(password())).unwrap(),
        image.id()
    );
    assert!(!registry.token_requests().is_empty());
    let err = node
        .pull(&at(&registry, "group/private", "other"))
        .unwrap_err();
    assert!(
        matches!(err.code(), Code::Unauthenticated | Code::PermissionDenied),
        "{err:?}"
    );
}

#[test]
fn an_identity_token_is_exchanged_at_the_token_service() {
    let node = Node::start();
    let image = image("identity");
    node.push("private", "1", &image);
    let registry = node.another_registry(Access::Token);
    node.trust_plain_http(&registry);
    let auth = AuthConfig {
        identity_token: IDENTITY_TOKEN.to_owned(),
        ..Default::default()
    };
    let reference = at(&registry, "private", "1");
    assert_eq!(node.pull_with(&reference, Some(auth)).unwrap(), image.id());
}

#[test]
fn https_is_trusted_with_the_ca_of_hosts_toml() {
    let node = Node::start();
    let image = image("tls");
    node.push("secure", "1", &image);
    let registry = node.another_registry(Access::Tls);
    let host = format!("127.0.0.1:{}", registry.port);
    let ca = registry.ca.as_ref().unwrap().display();
    node.hosts_toml(
        &host,
        &format!("server = \"https://{host}\"\nca = \"{ca}\"\n"),
    );
    assert_eq!(
        node.pull(&at(&registry, "secure", "1")).unwrap(),
        image.id()
    );
}

#[test]
fn https_under_an_unknown_ca_is_refused() {
    let node = Node::start();
    node.push("secure", "1", &image("tls"));
    let registry = node.another_registry(Access::Tls);
    let host = format!("127.0.0.1:{}", registry.port);
    node.hosts_toml(&host, &format!("server = \"https://{host}\"\n"));
    let err = node.pull(&at(&registry, "secure", "1")).unwrap_err();
    assert!(
        err.message().to_lowercase().contains("certificate"),
        "{err}"
    );
    assert_eq!(node.list_images(), []);
}

#[test]
fn https_under_an_unknown_ca_is_taken_where_hosts_toml_says_skip_verify() {
    let node = Node::start();
    let image = image("tls");
    node.push("secure", "1", &image);
    let registry = node.another_registry(Access::Tls);
    let host = format!("127.0.0.1:{}", registry.port);
    node.hosts_toml(
        &host,
        &format!("server = \"https://{host}\"\n[host.\"https://{host}\"]\nskip_verify = true\n"),
    );
    assert_eq!(
        node.pull(&at(&registry, "secure", "1")).unwrap(),
        image.id()
    );
}

#[test]
fn a_mirror_serves_a_host_that_cannot_be_reached() {
    let node = Node::start();
    let image = image("mirrored");
    node.push("library/thing", "1", &image);
    let mirror = node.registry().port;
    node.hosts_toml(
        "registry.invalid",
        &format!(
            "server = \"https://registry.invalid\"\n\
             [host.\"http://127.0.0.1:{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        ),
    );
    let reference = "registry.invalid/library/thing:1";
    assert_eq!(node.pull(reference).unwrap(), image.id());
    // It is known by the name that was asked for, not by the mirror's.
    assert_eq!(node.image(reference).unwrap().repo_tags, [reference]);
}

#[test]
fn the_default_mirror_serves_every_host_without_a_file_of_its_own() {
    let node = Node::start();
    let image = image("mirrored");
    node.push("library/thing", "1", &image);
    let mirror = node.registry().port;
    node.hosts_toml(
        "_default",
        &format!("[host.\"http://127.0.0.1:{mirror}\"]\n"),
    );
    assert_eq!(
        node.pull("registry.invalid/library/thing:1").unwrap(),
        image.id()
    );
    // A name without a host is Docker Hub's.
    assert_eq!(node.pull("thing:1").unwrap(), image.id());
    assert!(node.image("docker.io/library/thing:1").is_some());
}

#[test]
fn a_mirror_that_does_not_have_it_is_passed_over() {
    let node = Node::start();
    let image = image("origin");
    let reference = node.push("library/thing", "1", &image);
    let empty = Server::start(&node.host, |_| Response::not_found()).unwrap();
    let origin = format!("127.0.0.1:{}", node.registry().port);
    node.hosts_toml(
        &origin,
        &format!(
            "server = \"http://{origin}\"\n[host.\"http://127.0.0.1:{}\"]\n",
            empty.port
        ),
    );
    assert_eq!(node.pull(&reference).unwrap(), image.id());
    assert!(!empty.seen().is_empty(), "the mirror was asked first");
}

#[test]
fn credentials_of_the_origin_are_not_shown_to_a_mirror() {
    let node = Node::start();
    let image = image("private");
    node.push("private", "1", &image);
    let registry = node.another_registry(Access::Basic);
    let curious = Server::start(&node.host, |_| {
        Response::new(401, "text/plain", "who are you?")
            .header("www-authenticate", "Basic realm=\"curious\"")
    })
    .unwrap();
    let origin = format!("127.0.0.1:{}", registry.port);
    node.hosts_toml(
        &origin,
        &format!(
            "server = \"http://{origin}\"\n[host.\"http://127.0.0.1:{}\"]\n",
            curious.port
        ),
    );
    let auth = AuthConfig {
        server_address: origin.clone(),
        ..password()
    };
    assert_eq!(
        node.pull_with(&at(&registry, "private", "1"), Some(auth))
            .unwrap(),
        image.id()
    );
    for request in curious.seen() {
        assert_eq!(
            request.headers.get("authorization"),
            None,
            "{}",
            request.target
        );
    }
}

#[test]
fn a_host_nobody_listens_on_is_named_in_the_error() {
    let node = Node::start();
    node.hosts_toml("127.0.0.1:9", "server = \"http://127.0.0.1:9\"\n");
    let err = node.pull("127.0.0.1:9/some/thing:1").unwrap_err();
    assert!(err.message().contains("127.0.0.1:9"), "{err}");
}

#[test]
fn an_unknown_image_is_not_found() {
    let node = Node::start();
    let name = node.registry().name("no/such/image");
    let err = node.pull(&format!("{name}:1")).unwrap_err();
    assert_eq!(err.code(), Code::NotFound, "{err:?}");
    assert!(err.message().contains("no/such/image"), "{err}");
}

#[test]
fn a_pull_that_found_everything_downloads_no_layer_again() {
    let node = Node::start();
    let image = image("once");
    let reference = node.push("things/one", "v1", &image);
    node.pull(&reference).unwrap();
    // From now on the registry would serve rubbish for the layer.
    node.registry()
        .corrupt(&image.layers[0].digest, b"rubbish")
        .unwrap();
    assert_eq!(node.pull(&reference).unwrap(), image.id());
}

#[test]
fn an_image_that_shares_a_layer_does_not_download_it() {
    let node = Node::start();
    let shared = Layer::new().file("shared", 0o644, "shared");
    let own = Layer::new().file("own", 0o644, "own");
    let first = Image::builder(Format::Oci)
        .layer(&shared, Packing::Gzip)
        .build();
    let second = Image::builder(Format::Oci)
        .layer(&shared, Packing::Gzip)
        .layer(&own, Packing::Gzip)
        .build();
    let first_name = node.push("one", "1", &first);
    let second_name = node.push("two", "1", &second);
    node.pull(&first_name).unwrap();
    node.registry()
        .corrupt(&first.layers[0].digest, b"rubbish")
        .unwrap();
    assert_eq!(node.pull(&second_name).unwrap(), second.id());
}

#[test]
fn the_same_image_pulled_many_times_at_once_is_downloaded_once() {
    let node = Node::start();
    let image = image("single flight");
    let blobs: std::collections::BTreeMap<_, _> = image
        .layers
        .iter()
        .chain([&image.config])
        .map(|blob| (blob.digest.clone(), blob.data.clone()))
        .collect();
    let manifest = image.manifest.clone();
    let server = Server::start(&node.host, move |request| {
        if let Some(digest) = request.target.rsplit_once("/blobs/").map(|(_, d)| d) {
            return match blobs.get(digest) {
                Some(data) => Response::new(200, "application/octet-stream", data.clone()),
                None => Response::not_found(),
            };
        }
        if request.target.contains("/manifests/") {
            return Response::new(200, &manifest.media_type, manifest.data.clone())
                .header("docker-content-digest", &manifest.digest);
        }
        Response::new(200, "application/json", "{}")
    })
    .unwrap();
    let host = format!("127.0.0.1:{}", server.port);
    node.hosts_toml(&host, &format!("server = \"http://{host}\"\n"));
    let reference = format!("{host}/some/thing:1");
    let calls = (0..6)
        .map(|_| {
            let (mut images, reference) = (node.images(), reference.clone());
            async move {
                let request = cri::PullImageRequest {
                    image: Some(spec(&reference)),
                    ..Default::default()
                };
                images.pull_image(request).await
            }
        })
        .collect();
    for answer in node.wait_all(calls) {
        assert_eq!(answer.unwrap().image_ref, image.id());
    }
    let layer = format!("/blobs/{}", image.layers[0].digest);
    let downloads = server
        .seen()
        .iter()
        .filter(|request| request.method == "GET" && request.target.ends_with(&layer))
        .count();
    assert_eq!(downloads, 1);
}

#[test]
fn a_pull_whose_caller_hangs_up_runs_to_its_end() {
    let node = Node::start();
    let layer = Layer::new().file("big", 0o644, vec![b'y'; 24 << 20]);
    let image = Image::builder(Format::Oci)
        .layer(&layer, Packing::Gzip)
        .build();
    let reference = node.push("big", "1", &image);
    let mut images = node.images();
    let call = node.spawn({
        let reference = reference.clone();
        async move {
            let request = cri::PullImageRequest {
                image: Some(spec(&reference)),
                ..Default::default()
            };
            _ = images.pull_image(request).await;
        }
    });
    berth_tests::eventually("the pull is running or done", || {
        let running = node
            .operations()
            .operations
            .iter()
            .any(|o| o.kind == "PullImage");
        (running || node.image(&reference).is_some()).then_some(())
    });
    call.abort();
    berth_tests::eventually("the image is there", || node.image(&reference));
}
