//! Docker's config.json, and helpers that misbehave.

use super::*;

fn file(text: &str) -> AuthFile {
    AuthFile {
        path: "/c/auth.json".into(),
        raw: parse(Path::new("/c/auth.json"), text.as_bytes()).unwrap(),
        helpers: vec!["last".into()],
    }
}

fn password(file: &AuthFile, host: &str, repository: &str) -> String {
    match file.find(host, repository).unwrap() {
        Found::Secret(Secret::Basic { password, .. }, _) => password,
        Found::Secret(Secret::Identity(token) | Secret::Bearer(token), _) => token,
        Found::Ask { helpers, .. } => helpers.join(","),
        Found::Nothing => "nothing".into(),
    }
}

#[test]
fn the_most_specific_entry_counts() {
    let file = file(
        r#"{"auths": {
            "a.b": {"username": "u", "password": "host"},
            "a.b/team": {"username": "u", "password": "team"},
            "a.b/team/app": {"auth": "dTphcHA="},
            "https://c.d:5000/v2/": {"identitytoken": "id"},
            "e.f": {"registrytoken": "reg"},
            "*.g.h": {"username": "u", "password": "glob"},
            "x.g.h": {"username": "u", "password": "exact"},
            "https://index.docker.io/v1/": {"username": "u", "password": "hub"},
            "stored.example": {}},
          "credHelpers": {"helped.example": "own"}, "credsStore": "store", "HttpHeaders": {}}"#,
    );
    for (host, repository, expected) in [
        ("a.b", "x", "host"),
        ("A.b", "teams", "host"),
        ("a.b", "team", "team"),
        ("a.b", "team/other", "team"),
        ("a.b", "team/app", "app"),
        ("a.b:5000", "x", "store,last"),
        ("c.d:5000", "x", "id"),
        ("e.f", "x", "reg"),
        ("y.g.h", "x", "glob"),
        ("y.g.h:5000", "x", "glob"),
        ("x.g.h", "x", "exact"),
        ("z.y.g.h", "x", "store,last"),
        ("registry-1.docker.io", "library/x", "hub"),
        ("stored.example", "x", "store,last"),
        ("helped.example", "x", "own"),
    ] {
        assert_eq!(
            password(&file, host, repository),
            expected,
            "{host}/{repository}"
        );
    }
    let empty = AuthFile::load(Some(Path::new("/nonexistent/auth.json")), &[]).unwrap();
    assert_eq!(empty.find("a.b", "c").unwrap(), Found::Nothing);
}

#[test]
fn a_bad_file_is_told_without_its_content() {
    let error = parse(Path::new("/c/auth.json"), b"{\"auths\": \"secret\"}")
        .err()
        .unwrap();
    let error = error.to_string();
    assert!(
        error.contains("/c/auth.json") && !error.contains("secret"),
        "{error}"
    );
    let file = file(r#"{"auths": {"u:secret@a.b": {"auth": "%%secret"}}}"#);
    assert_eq!(password(&file, "a.b", "x"), "last");
    let file = self::file(r#"{"auths": {"a.b": {"auth": "%%secret"}}}"#);
    let error = file.find("a.b", "x").unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("a.b") && !text.contains("%%secret"), "{text}");
}

#[test]
fn labels_glob() {
    for (pattern, host, expected) in [
        ("*.a.b", "x.a.b", true),
        ("*.a.b", "a.b", false),
        ("*.a.b", "y.x.a.b", false),
        ("r*y.a.b", "registry.a.b", true),
        ("r*y*.a.b", "registry2.a.b", true),
        ("*.a.b:50", "x.a.b:50", true),
        ("*.a.b:50", "x.a.b:51", false),
        ("**.a", "x.a", true),
    ] {
        assert_eq!(globs(pattern, host), expected, "{pattern} {host}");
    }
    // Trying every place of every star would take for ever.
    assert!(!globs(&format!("{}y", "*x".repeat(40)), &"x".repeat(60)));
}

#[tokio::test]
async fn helpers_have_bounded_time_and_output() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        let path = dir.path().join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let answer = r#"read a; echo "{\"ServerURL\":\"$a\",\"Username\":\"$1\",\"Secret\":\"s-$a\"}""#;
    script("good", answer);
    script("token", r#"echo '{"Username":"<token>","Secret":"t"}'"#);
    script(
        "unknown",
        "echo 'credentials not found in native keychain'; exit 1",
    );
    script("fails", "echo secret-word >&2; echo secret-word; exit 3");
    script("noise", "exec head -c 1000000 /dev/zero");
    script("odd", "echo secret-word");
    script("hangs", "sleep 1000 & echo $! > ${0%/*}/pid; wait");
    let helpers = Helpers {
        dirs: vec!["/nonexistent".into(), dir.path().into()],
        timeout: Duration::from_secs(20),
    };
    let ask = async |name: &str, host: &str| {
        let asked = helpers.ask(&[name.to_owned()], host).await;
        asked.map(|found| found.map(|(secret, _)| secret))
    };
    let basic = |password: &str| Secret::Basic {
        username: "get".into(),
        password: password.into(),
    };
    assert_eq!(ask("good", "a.b").await.unwrap(), Some(basic("s-a.b")));
    assert_eq!(
        ask("good", "docker.io").await.unwrap(),
        Some(basic("s-https://index.docker.io/v1/"))
    );
    let token = Some(Secret::Identity("t".into()));
    assert_eq!(ask("token", "a.b").await.unwrap(), token);
    assert_eq!(ask("unknown", "a.b").await.unwrap(), None);
    for (name, expected) in [
        ("fails", "failed with"),
        ("noise", "64 KiB"),
        ("odd", "did not answer with"),
        ("absent", "cannot run"),
        ("../x", "not the name"),
    ] {
        let error = ask(name, "a.b").await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(
            text.contains(expected) && !text.contains("secret-word"),
            "{text}"
        );
    }
    let both = ["unknown".to_owned(), "token".to_owned()];
    let (_, source) = helpers.ask(&both, "a.b").await.unwrap().unwrap();
    assert_eq!(source.to_string(), "docker-credential-token");

    let hasty = Helpers {
        timeout: Duration::from_millis(500),
        ..helpers
    };
    let error = hasty.ask(&["hangs".to_owned()], "a.b").await.unwrap_err();
    assert!(error.to_string().contains("in time"), "{error}");
    if let Ok(pid) = std::fs::read_to_string(dir.path().join("pid")) {
        let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        // What it started is gone too, or waits for init to reap it.
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(
                std::time::Instant::now() < deadline,
                "the helper's child lives on"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
