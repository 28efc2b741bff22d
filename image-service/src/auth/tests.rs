//! Challenges, scopes, tokens.

use super::*;
use proptest::prelude::*;

fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
    Challenge::Bearer {
        realm: realm.into(),
        service: service.map(Into::into),
        scope: scope.map(Into::into),
    }
}

#[test]
fn challenges_are_read_as_the_rfc_writes_them() {
    for (header, expected) in [
        ("Basic realm=\"x\"", vec![Challenge::Basic]),
        (
            "Bearer realm=\"https://a/t\",service=\"s\",scope=\"repository:a/b:pull,push\"",
            vec![bearer(
                "https://a/t",
                Some("s"),
                Some("repository:a/b:pull,push"),
            )],
        ),
        (
            "bearer Realm = \"https://a\" , service=s, Basic realm=\"b\"",
            vec![bearer("https://a", Some("s"), None), Challenge::Basic],
        ),
        ("Negotiate, Basic", vec![Challenge::Basic]),
        ("Bearer realm=\"a\\\"b\"", vec![bearer("a\"b", None, None)]),
        ("Bearer service=\"s\"", vec![]),
        ("Bearer realm=\"open", vec![]),
        ("", vec![]),
    ] {
        assert_eq!(parse_challenges(header), expected, "{header}");
    }
}

proptest! {
    #[test]
    fn no_challenge_makes_the_parser_panic(text in "(Bearer |Basic )?[a-z=\",\\\\ é]{0,40}") {
        let _ = parse_challenges(&text);
    }
}

#[test]
fn scopes_are_merged_by_resource() {
    for (challenged, expected) in [
        (None, vec!["repository:a/b:pull"]),
        (Some(""), vec!["repository:a/b:pull"]),
        (Some("repository:a/b:pull"), vec!["repository:a/b:pull"]),
        (
            Some("repository:a/b:push,pull repository:c:pull repository:a/b:delete"),
            vec!["repository:a/b:delete,pull,push", "repository:c:pull"],
        ),
        (
            Some("registry:catalog:* openid openid"),
            vec!["repository:a/b:pull", "registry:catalog:*", "openid"],
        ),
    ] {
        assert_eq!(merge_scopes("a/b", challenged), expected);
    }
}

#[test]
fn what_is_remembered_has_a_bound_and_is_by_credentials() {
    let tokens = Arc::new(Tokens::default());
    let url = Url::parse("https://a.b").unwrap();
    let authorizer = |holder: Holder, repository: &str| {
        let helpers = Helpers::in_path();
        Authorizer::new(Arc::clone(&tokens), helpers, holder, &url, repository)
    };
    let known = |expires| Known {
        value: HeaderValue::from_static("Bearer x"),
        expires,
        challenges: vec![Challenge::Basic],
    };
    let mine = authorizer(
        Holder::Secret(Secret::Bearer("s".into()), SecretSource::Pull),
        "c",
    );
    *tokens.entry(mine.door.clone()).known() = Some(known(None));
    assert!(mine.known().0.is_some());
    assert!(authorizer(Holder::Nobody, "c").known().0.is_none());
    let other = Holder::Secret(Secret::Bearer("t".into()), SecretSource::Pull);
    assert!(authorizer(other, "c").known().0.is_none());
    *tokens.entry(mine.door.clone()).known() = Some(known(Some(Instant::now())));
    assert_eq!(mine.known(), (None, vec![Challenge::Basic]));
    for n in 0..2 * MAX_KNOWN {
        let _ = authorizer(Holder::Nobody, &n.to_string()).known();
    }
    assert!(tokens.0.lock().unwrap().len() <= MAX_KNOWN);
}

#[test]
fn a_token_is_found_under_both_names() {
    assert_eq!(
        parse_token(br#"{"token":"a"}"#),
        Some(("a".into(), UNSAID_LIFE))
    );
    assert_eq!(
        parse_token(br#"{"token":"","access_token":"b","expires_in":7}"#),
        Some(("b".into(), Duration::from_secs(7)))
    );
    assert_eq!(parse_token(br#"{"expires_in":3}"#), None);
    assert_eq!(parse_token(b"<html>"), None);
}
