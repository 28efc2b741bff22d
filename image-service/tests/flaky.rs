//! Registries in trouble, and many pulls at once: every pull ends in the right image or a clear
//! error in bounded time, and nothing that was verified is fetched again.

mod support;

use berth_image_service::progress::Progress;
use berth_image_service::registry::RegistryError;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::*;

/// Impatient enough for a test.
fn hasty() -> Node {
    Node::with(|settings| {
        settings.timeouts.no_progress = Duration::from_secs(2);
        settings.timeouts.document = Duration::from_secs(2);
        settings.timeouts.rate_window = Duration::from_millis(600);
        settings.timeouts.min_rate = 20_000;
    })
}

fn is_layer(picture: &Picture, request: &Request) -> bool {
    picture
        .layers
        .iter()
        .any(|l| request.path().ends_with(&**l))
}

/// One layer of noise, sent as it is.
fn large(seed: u32, bytes: usize) -> Picture {
    let tar = tar_of(&[("noise", &noise(seed, bytes))]);
    Picture::of(&[tar], "tar", json!({}))
}

fn start_of(request: &Request) -> usize {
    let range = request.header("range");
    range
        .strip_prefix("bytes=")
        .and_then(|range| range.strip_suffix('-'))
        .map_or(0, |from| from.parse().unwrap())
}

#[tokio::test]
async fn ten_cuts_cost_no_byte_twice() {
    let picture = large(1, 1_200_000);
    let size = picture.blobs[&picture.layers[0]].len();
    let sent: Arc<Mutex<Vec<(usize, usize)>>> = Arc::default();
    let (served, log) = (picture.clone(), Arc::clone(&sent));
    let server = Server::start(move |request| {
        let reply = serve(&served, request);
        if !is_layer(&served, request) {
            return reply;
        }
        let mut log = log.lock().unwrap();
        // Ten times a tenth at the most, then the rest.
        let count = if log.len() < 10 {
            reply.body.len().min(100_000)
        } else {
            reply.body.len()
        };
        log.push((start_of(request), count));
        reply.cut(count)
    });
    let node = hasty();
    let pulled = node.pull(&server.reference()).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    assert_eq!(pulled.bytes, size as u64);
    let sent = sent.lock().unwrap();
    assert_eq!(sent.len(), 11);
    let mut expected = 0;
    for (from, count) in &*sent {
        assert_eq!(*from, expected, "{sent:?}");
        expected += count;
    }
    assert_eq!(expected, size);
}

#[tokio::test]
async fn resets_cost_at_most_what_the_kernel_threw_away() {
    let picture = large(2, 1_200_000);
    let served = picture.clone();
    let resets = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let reply = serve(&served, request);
        if !is_layer(&served, request) || resets.fetch_add(1, Ordering::SeqCst) >= 10 {
            return reply;
        }
        let mut reply = reply.cut(100_000);
        // Until the client has read what came: a reset throws the rest away.
        reply.silence = Duration::ZERO;
        reply.reset = true;
        reply
    });
    let node = hasty();
    let pulled = node.pull(&server.reference()).await.unwrap();
    assert_eq!(pulled.image_id, picture.image_id);
    let starts: Vec<usize> = server
        .seen()
        .iter()
        .filter(|request| is_layer(&picture, request))
        .map(start_of)
        .collect();
    assert_eq!(starts.len(), 11);
    // Never back, and never further than what was sent.
    for pair in starts.windows(2) {
        assert!(
            pair[0] <= pair[1] && pair[1] <= pair[0] + 100_000,
            "{starts:?}"
        );
    }
}

/// What a host may do wrong, and what is said of it where nobody else can be asked.
type Trouble = (&'static str, fn(&Request, Reply) -> Reply, &'static str);

const TROUBLES: &[Trouble] = &[
    (
        "429 for an hour",
        |_, _| Reply::status(429).with("retry-after", "3600"),
        "too many requests",
    ),
    ("500", |_, _| Reply::status(500), "status 500"),
    (
        "503 for an hour",
        |_, _| Reply::status(503).with("retry-after", "3600"),
        "status 503",
    ),
    ("not there", |_, _| Reply::status(404), "not found"),
    (
        "another length",
        |_, reply| {
            let n = reply.body.len() as u64;
            reply.announcing(n + 1)
        },
        "manifest says",
    ),
    (
        "another content",
        |_, mut reply| {
            let n = reply.body.len();
            reply.body[n / 2] ^= 1;
            reply
        },
        "digest is",
    ),
    (
        "reset at once",
        |_, reply| {
            let mut reply = reply.cut(0);
            reply.reset = true;
            reply
        },
        "unreachable",
    ),
    (
        "a slow trickle",
        |_, mut reply| {
            reply.trickle = Some((100, Duration::from_millis(50)));
            reply
        },
        "of waiting",
    ),
    (
        "silence in the middle",
        |_, reply| {
            let n = reply.body.len() / 2;
            let mut reply = reply.cut(n);
            reply.silence = Duration::from_secs(8);
            reply
        },
        "of waiting",
    ),
    (
        "redirects without end",
        |request, _| Reply::status(307).with("location", request.target.clone()),
        "too many",
    ),
    (
        "a range that is another",
        |request, reply| {
            if start_of(request) > 0 {
                reply.with("content-range", "bytes 1-2/3")
            } else {
                reply.cut(5000)
            }
        },
        "answers with",
    ),
];

/// Serves `picture`, every layer in trouble.
fn troubled(picture: &Picture, trouble: fn(&Request, Reply) -> Reply) -> Server {
    let picture = picture.clone();
    Server::start(move |request| {
        let mut reply = serve(&picture, request);
        if is_layer(&picture, request) {
            let headers = std::mem::take(&mut reply.headers);
            reply = trouble(request, reply);
            if reply
                .headers
                .iter()
                .all(|(name, _)| name != "content-range")
            {
                reply.headers.extend(headers);
            }
        }
        reply
    })
}

#[tokio::test]
async fn every_trouble_of_the_only_host_is_a_clear_error_in_bounded_time() {
    let picture = large(3, 200_000);
    for (name, trouble, said) in TROUBLES {
        let server = troubled(&picture, *trouble);
        let node = hasty();
        let begun = Instant::now();
        let error = node.refused(&server.reference()).await;
        assert!(error.contains(said), "{name}: {error}");
        assert!(
            begun.elapsed() < Duration::from_secs(12),
            "{name}: {:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test]
async fn with_every_trouble_of_a_mirror_the_image_comes_from_the_next_host() {
    let picture = large(4, 200_000);
    let size = picture.blobs[&picture.layers[0]].len();
    for (name, trouble, _) in TROUBLES {
        let (mirror, origin) = (troubled(&picture, *trouble), Server::of(picture.clone()));
        let node = hasty();
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]",
            origin.name(),
            mirror.name()
        );
        node.hosts_toml("registry.example", &text);
        let begun = Instant::now();
        let pulled = node.pull("registry.example/a").await.unwrap();
        assert_eq!(pulled.image_id, picture.image_id, "{name}");
        assert_eq!(pulled.bytes, size as u64, "{name}");
        assert!(
            begun.elapsed() < Duration::from_secs(12),
            "{name}: {:?}",
            begun.elapsed()
        );
    }
}

#[tokio::test]
async fn a_stalled_layer_goes_on_at_the_next_host_from_where_it_is() {
    let picture = large(5, 200_000);
    let half = picture.blobs[&picture.layers[0]].len() / 2;
    let served = picture.clone();
    let mirror = Server::start(move |request| {
        let reply = serve(&served, request);
        if !is_layer(&served, request) {
            return reply;
        }
        let mut reply = reply.cut(half);
        reply.silence = Duration::from_secs(10);
        reply
    });
    let origin = Server::of(picture.clone());
    let node = hasty();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]",
        origin.name(),
        mirror.name()
    );
    node.hosts_toml("registry.example", &text);
    let begun = Instant::now();
    node.pull("registry.example/a").await.unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    let asked = origin.seen();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(start_of(&asked[0]), half);

    // It is set aside: the next pull asks the registry first.
    node.service.remove("registry.example/a").await.unwrap();
    let before = mirror.seen().len();
    node.pull("registry.example/a").await.unwrap();
    assert_eq!(mirror.seen().len(), before);
}

#[tokio::test]
async fn retry_after_is_waited_for_in_seconds_and_as_a_date() {
    let picture = Picture::small("patience");
    for form in ["1", "date"] {
        let (calls, served) = (AtomicUsize::new(0), picture.clone());
        let server = Server::start(move |request| {
            if calls.fetch_add(1, Ordering::SeqCst) > 0 {
                return serve(&served, request);
            }
            let reply = Reply::status(429);
            match form {
                "date" => reply.with("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
                seconds => reply.with("retry-after", seconds),
            }
        });
        let node = Node::new();
        let begun = Instant::now();
        node.pull(&server.reference()).await.unwrap();
        let waited = begun.elapsed();
        if form == "1" {
            assert!(waited >= Duration::from_secs(1), "{waited:?}");
        }
        // Not as long as is waited for at most, however busy the machine.
        assert!(waited < Duration::from_secs(19), "{waited:?}");
    }
}

#[tokio::test]
async fn a_pull_that_failed_keeps_the_layers_it_verified() {
    let tars: Vec<Vec<u8>> = (0..3).map(|n| tar_of(&[("n", &[n])])).collect();
    let picture = Picture::of(&tars, "gzip", json!({}));
    let (served, broken) = (picture.clone(), Arc::new(AtomicUsize::new(1)));
    let is_broken = Arc::clone(&broken);
    let last = picture.layers[2].clone();
    let progress = Progress::new();
    let seen = progress.clone();
    let server = Server::start(move |request| {
        if request.path().ends_with(&*last) && is_broken.load(Ordering::SeqCst) == 1 {
            wait_for("the other layers", || seen.layers() == 2);
            return Reply::status(404);
        }
        serve(&served, request)
    });
    let node = Node::new();
    let reference = server.reference();
    let pull = node.service.pull(&reference, None, &progress);
    let error = pull.await.expect_err("a layer is missing");
    assert!(chain(&*error).contains("not found"));
    assert_eq!(node.service.list(), Vec::new());
    broken.store(0, Ordering::SeqCst);
    let before = server.seen().len();
    node.pull(&server.reference()).await.unwrap();
    let layers = server.seen()[before..]
        .iter()
        .filter(|request| is_layer(&picture, request))
        .count();
    assert_eq!(layers, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_pulls_at_once_fetch_each_layer_config_and_manifest_once() {
    let shared: Vec<Vec<u8>> = (0..4)
        .map(|n| tar_of(&[(&format!("shared-{n}"), &noise(n, 60_000))]))
        .collect();
    let pictures: Vec<Picture> = (0..20u32)
        .map(|n| {
            let mut tars = shared.clone();
            tars.rotate_left(n as usize % 4);
            // Half of the images come in pairs that share their last layer, too.
            tars.push(tar_of(&[("own", format!("{}", n / 2).as_bytes())]));
            Picture::of(&tars, "gzip", json!({"Labels": {"n": n.to_string()}}))
        })
        .collect();
    let served: BTreeMap<String, Picture> = pictures
        .iter()
        .enumerate()
        .map(|(n, picture)| (format!("/v2/image-{n}/"), picture.clone()))
        .collect();
    let server = Server::start(move |request| {
        let (_, picture) = served
            .iter()
            .find(|(prefix, _)| request.path().starts_with(&***prefix))
            .unwrap();
        let mut reply = serve(picture, request);
        // Long enough for all pulls to be under way.
        if request.path().contains("/blobs/") {
            reply.trickle = Some((30_000, Duration::from_millis(20)));
        }
        reply
    });
    let node = Node::new();
    let pulls = (0..20).map(|n| {
        let (service, name) = (
            node.service.clone(),
            format!("{}/image-{n}:1", server.name()),
        );
        tokio::spawn(async move {
            let progress = berth_image_service::progress::Progress::new();
            service.pull(&name, None, &progress).await
        })
    });
    let pulled = futures_util::future::join_all(pulls.collect::<Vec<_>>()).await;
    for (n, pulled) in pulled.into_iter().enumerate() {
        assert_eq!(pulled.unwrap().unwrap().image_id, pictures[n].image_id);
    }
    let mut blobs: BTreeMap<String, usize> = BTreeMap::new();
    for request in server.seen() {
        if let Some((_, digest)) = request.path().rsplit_once("/blobs/") {
            *blobs.entry(digest.to_owned()).or_default() += 1;
        }
    }
    // Four shared layers, ten own ones, twenty configs.
    assert_eq!(blobs.len(), 4 + 10 + 20);
    assert!(blobs.values().all(|count| *count == 1), "{blobs:?}");
    assert_eq!(node.service.list().len(), 20);
}

#[tokio::test]
async fn a_manifest_that_trickles_is_given_up() {
    let picture = Picture::small("slow");
    let served = picture.clone();
    let server = Server::start(move |request| {
        let mut reply = serve(&served, request);
        if request.path().contains("/manifests/") {
            reply.trickle = Some((1, Duration::from_millis(100)));
        }
        reply
    });
    let node = hasty();
    let begun = Instant::now();
    let error = node.pull(&server.reference()).await.unwrap_err();
    assert!(
        matches!(registry_error(&error), RegistryError::Slow { .. }),
        "{}",
        chain(&*error)
    );
    assert!(begun.elapsed() < Duration::from_secs(6));
}

#[tokio::test]
async fn two_hosts_that_both_lie_are_both_named_and_a_third_is_believed() {
    let picture = large(6, 100_000);
    let lies = |_: &Request, mut reply: Reply| {
        let n = reply.body.len();
        reply.body[n / 3] ^= 1;
        reply
    };
    let (one, two) = (troubled(&picture, lies), troubled(&picture, lies));
    let origin = Server::of(picture.clone());
    for with_origin in [false, true] {
        let node = hasty();
        let mut text = format!(
            "fallback = \"never\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
            one.name(),
            two.name()
        );
        if with_origin {
            text += &format!("[host.\"http://{}\"]\n", origin.name());
        }
        node.hosts_toml("registry.example", &text);
        if with_origin {
            let pulled = node.pull("registry.example/a").await.unwrap();
            assert_eq!(pulled.image_id, picture.image_id);
        } else {
            let said = node.refused("registry.example/a").await;
            assert!(
                said.contains("digest is") && said.contains(&two.name()),
                "{said}"
            );
        }
    }
}
