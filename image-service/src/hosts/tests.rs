//! hosts.toml, key by key.

use super::*;

fn read_one(text: &str, registry: &str) -> Result<Vec<Host>, String> {
    parse(Path::new("/c/hosts.toml"), text, registry, Fallback::Origin)
        .map_err(|error| error.to_string())
}

fn urls(hosts: &[Host]) -> Vec<&str> {
    hosts.iter().map(|host| host.url.as_str()).collect()
}

#[test]
fn a_registry_nothing_is_said_about_is_asked_itself() {
    for (registry, url) in [
        ("registry.example", "https://registry.example/v2"),
        ("registry.example:5000", "https://registry.example:5000/v2"),
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("localhost", "http://localhost/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.3.2.1:5000", "http://127.3.2.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("[::1]", "http://[::1]/v2"),
        ("localhost:443", "https://localhost/v2"),
        ("localhost.example", "https://localhost.example/v2"),
    ] {
        let hosts = hosts(&[], registry, Fallback::Origin).unwrap();
        assert_eq!(urls(&hosts), [url]);
        assert!(hosts[0].pull && hosts[0].resolve && hosts[0].mirror_of.is_none());
    }
}

#[test]
fn every_key_is_read_and_the_order_is_the_files() {
    let text = r#"
        server = "https://registry.example"
        ca = "/abs/ca.pem"
        [host."https://z.example:5000/prefix"]
          capabilities = ["pull", "push"]
          ca = ["a.pem", "b.pem"]
          client = [["c.pem", "k.pem"]]
          dial_timeout = "1m0.5s"
          [host."https://z.example:5000/prefix".header]
            x-one = "1"
            x-two = ["2", "3"]
        [host."http://a.example"]
          skip_verify = true
          client = "both.pem"
        [host."m.example/v2/cache"]
          override_path = true
    "#;
    let hosts = read_one(text, "registry.example").unwrap();
    assert_eq!(
        urls(&hosts),
        [
            "https://z.example:5000/prefix/v2",
            "http://a.example/v2",
            "https://m.example/v2/cache",
            "https://registry.example/v2"
        ]
    );
    let z = &hosts[0];
    assert!(z.pull && !z.resolve);
    assert_eq!(z.tls.ca, [Path::new("/c/a.pem"), Path::new("/c/b.pem")]);
    assert_eq!(
        z.tls.client,
        Some(("/c/c.pem".into(), Some("/c/k.pem".into())))
    );
    assert_eq!(z.dial_timeout, Some(Duration::from_millis(60_500)));
    assert_eq!(z.headers.get_all("x-two").iter().count(), 2);
    assert_eq!(z.mirror_of.as_deref(), Some("registry.example"));
    assert!(!format!("{z:?}").contains("\"2\""));
    assert!(hosts[1].tls.skip_verify);
    assert_eq!(hosts[1].tls.client, Some(("/c/both.pem".into(), None)));
    assert_eq!(hosts[3].tls.ca, [Path::new("/abs/ca.pem")]);
    assert_eq!(hosts[3].mirror_of, None);
}

#[test]
fn without_a_server_the_registry_itself_is_last() {
    let hosts = read_one("[host.\"https://m.example\"]", "docker.io").unwrap();
    assert_eq!(
        urls(&hosts),
        ["https://m.example/v2", "https://registry-1.docker.io/v2"]
    );
    let hub = read_one("server = \"https://docker.io\"", "docker.io").unwrap();
    assert_eq!(urls(&hub), ["https://registry-1.docker.io/v2"]);
    assert_eq!(hub[0].mirror_of, None);
    let ca = read_one("ca = \"x.pem\"", "localhost:5000").unwrap();
    assert_eq!(urls(&ca), ["https://localhost:5000/v2"]);
}

#[test]
fn errors_name_the_file_and_the_key() {
    for (text, key) in [
        ("\nserve = \"x\"", "line 2: unknown field `serve`"),
        ("[host.\"https://a\"]\nskip_verfy = true", "skip_verfy"),
        ("[host.\"https://a\"]\nskip_verify = \"yes\"", "line 2"),
        ("[host.\"ftp://a\"]", "ftp://a"),
        ("[host.\"https://u:p@a\"]", "credentials"),
        ("[host.\"https://a?b=c\"]", "query"),
        ("[host.\"https://a\"]\ncapabilities = [\"pul\"]", "\"pul\""),
        (
            "[host.\"https://a\"]\ndial_timeout = \"soon\"",
            "dial_timeout",
        ),
        ("[host.\"https://a\"]\nclient = [\"a\", \"b\"]", "client"),
        ("[host.\"https://a\".header]\n\"a b\" = \"c\"", "a b"),
        (
            "[host.\"https://a\".header]\na = \"secret\\n\"",
            "header \"a\"",
        ),
        ("server = ", "line 1"),
        ("\nfallback = \"maybe\"", "line 2: fallback \"maybe\""),
        ("[host.\"https://a\"]\nfallback = \"never\"", "fallback"),
        (
            "\n[host.\"https://a\"]\nproxy = \"socks5://u:p@x\"",
            "line 2: host",
        ),
    ] {
        let error = read_one(text, "r.example").unwrap_err();
        assert!(
            error.contains("/c/hosts.toml") && error.contains(key),
            "{error}"
        );
        assert!(
            !error.contains("secret") && !error.contains("u:p"),
            "{error}"
        );
    }
}

#[test]
fn the_registry_itself_is_left_out_where_nothing_may_fall_back_to_it() {
    let all = |text: &str, fallback| {
        let path = Path::new("/c/hosts.toml");
        let hosts = parse(path, text, "r.example", fallback).unwrap();
        hosts
            .iter()
            .map(|host| host.url.to_string())
            .collect::<Vec<_>>()
    };
    let mirror = "[host.\"https://m.example\"]\n";
    let (m, r) = ("https://m.example/v2", "https://r.example/v2");
    assert_eq!(all(mirror, Fallback::Origin), [m, r]);
    assert_eq!(all(mirror, Fallback::Never), [m]);
    assert_eq!(
        all(&format!("fallback = \"never\"\n{mirror}"), Fallback::Origin),
        [m]
    );
    assert_eq!(
        all(&format!("fallback = \"origin\"\n{mirror}"), Fallback::Never),
        [m, r]
    );
    assert_eq!(all("fallback = \"never\"", Fallback::Origin), [r]);
    let other = format!("server = \"https://s.example\"\n{mirror}");
    assert_eq!(all(&other, Fallback::Never), [m, "https://s.example/v2"]);
}

#[test]
fn a_proxy_is_of_one_host() {
    let text = "proxy = \"direct\"\n[host.\"https://a\"]\nproxy = \"http://u:secret@p:3128\"\n[host.\"https://b\"]\n";
    let hosts = read_one(text, "r.example").unwrap();
    let proxies: Vec<_> = hosts
        .iter()
        .map(|host| format!("{:?}", host.proxy))
        .collect();
    assert_eq!(
        proxies,
        ["http://[redacted]@p:3128", "environment", "direct"]
    );
    assert!(!format!("{hosts:?}").contains("secret"));
}

#[test]
fn directories_are_found_by_host_and_port_and_read_live() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dirs = [
        one.path().join("absent"),
        one.path().into(),
        two.path().into(),
    ];
    let write = |dir: &Path, name: &str, server: &str| {
        std::fs::create_dir_all(dir.join(name)).unwrap();
        let text = format!("server = \"{server}\"");
        std::fs::write(dir.join(name).join("hosts.toml"), text).unwrap();
    };
    let ask = || urls(&hosts(&dirs, "r.example:5000", Fallback::Never).unwrap())[0].to_owned();
    assert_eq!(ask(), "https://r.example:5000/v2");
    write(two.path(), "_default", "http://d");
    assert_eq!(ask(), "http://d/v2");
    write(two.path(), "r.example:5000", "http://c");
    assert_eq!(ask(), "http://c/v2");
    write(one.path(), "r.example_5000_", "http://a");
    assert_eq!(ask(), "http://a/v2");
    write(one.path(), "r.example_5000_", "http://b");
    assert_eq!(ask(), "http://b/v2");
}

#[test]
fn dockers_files_count_where_there_is_no_hosts_toml() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("localhost:5000");
    std::fs::create_dir(&own).unwrap();
    assert_eq!(
        urls(&hosts(&[dir.path().into()], "localhost:5000", Fallback::Origin).unwrap()),
        ["http://localhost:5000/v2"]
    );
    for name in ["ca.crt", "us.cert", "us.key"] {
        std::fs::write(own.join(name), "").unwrap();
    }
    let hosts = hosts(&[dir.path().into()], "localhost:5000", Fallback::Origin).unwrap();
    assert_eq!(urls(&hosts), ["https://localhost:5000/v2"]);
    assert_eq!(hosts[0].tls.ca, [own.join("ca.crt")]);
    assert_eq!(
        hosts[0].tls.client,
        Some((own.join("us.cert"), Some(own.join("us.key"))))
    );
}

#[test]
fn durations_are_gos() {
    assert_eq!(parse_duration("200ms"), Some(Duration::from_millis(200)));
    assert_eq!(parse_duration("1h2m"), Some(Duration::from_secs(3720)));
    for bad in ["", "1", "s", "-1s", "1d", "1.2.3s", "é"] {
        assert_eq!(parse_duration(bad), None, "{bad}");
    }
}
