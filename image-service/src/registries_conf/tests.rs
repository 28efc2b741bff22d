//! registries.conf, key by key.

use super::*;
use proptest::prelude::*;

fn conf(text: &str) -> Result<RegistriesConf, String> {
    let mut conf = RegistriesConf::default();
    conf.apply(Path::new("/c/registries.conf"), text)
        .map_err(|error| error.to_string())?;
    Ok(conf)
}

fn matched(conf: &RegistriesConf, name: &str) -> Option<(String, usize)> {
    let reference: Reference = name.parse().unwrap();
    conf.registry(&reference)
        .map(|(registry, bytes)| (registry.prefix.clone(), bytes))
}

#[test]
fn the_longest_prefix_counts_and_ends_where_a_part_of_the_name_does() {
    let conf = conf(
        "[[registry]]\nprefix = \"a.b\"\n[[registry]]\nprefix = \"a.b/team\"\n\
         [[registry]]\nprefix = \"a.b/team/app:1\"\n[[registry]]\nprefix = \"*.b\"\n\
         [[registry]]\nlocation = \"c.d:5000/x/\"\n",
    )
    .unwrap();
    for (name, expected) in [
        ("a.b/x", Some(("a.b", 3))),
        ("a.b/team/app", Some(("a.b/team", 8))),
        ("a.b/team/app:1", Some(("a.b/team/app:1", 14))),
        ("a.b/teams/app", Some(("a.b", 3))),
        ("a.b:5000/x", Some(("*.b", 8))),
        ("z.y.b/x", Some(("*.b", 5))),
        ("b/x", None),
        ("zb.c/x", None),
        ("c.d:5000/x", Some(("c.d:5000/x", 10))),
        ("c.d/x", None),
    ] {
        let expected = expected.map(|(prefix, bytes)| (prefix.to_owned(), bytes));
        assert_eq!(matched(&conf, name), expected, "{name}");
    }
}

#[test]
fn every_key_is_read() {
    let conf = conf(
        "short-name-mode = \"disabled\"\ncredential-helpers = [\"containers-auth.json\"]\n\
         additional-layer-store-auth-helper = \"x\"\n\
         [[registry]]\nprefix = \"a.b/team\"\nlocation = \"C.d:5000/deep\"\ninsecure = true\n\
         [[registry.mirror]]\nlocation = \"m.n\"\npull-from-mirror = \"tag-only\"\n\
         [[registry.mirror]]\nlocation = \"o.p/q\"\ninsecure = true\n\
         [[registry]]\nprefix = \"x.y\"\nblocked = true\nmirror-by-digest-only = true\n\
         [[registry.mirror]]\nlocation = \"m.n\"\n",
    )
    .unwrap();
    let reference: Reference = "a.b/team/app".parse().unwrap();
    let (registry, bytes) = conf.registry(&reference).unwrap();
    let location = registry.location.as_ref().unwrap();
    assert_eq!((&*location.host, location.insecure), ("c.d:5000", true));
    let rest = &reference.name()[bytes..];
    assert_eq!(location.repository(rest), "deep/app");
    assert_eq!(registry.mirrors[0].pull_from, PullFrom::TagOnly);
    assert_eq!(registry.mirrors[0].location.repository(rest), "app");
    assert_eq!(registry.mirrors[1].location.repository(rest), "q/app");
    assert!(registry.mirrors[1].location.insecure);
    let (blocked, _) = conf.registry(&"x.y/z".parse().unwrap()).unwrap();
    assert!(blocked.blocked);
    assert_eq!(blocked.mirrors[0].pull_from, PullFrom::DigestOnly);
}

#[test]
fn short_names_mean_their_alias_or_what_is_searched() {
    let names = |conf: &RegistriesConf, name: &str| -> Vec<String> {
        let found = conf.references(name).unwrap();
        found.iter().map(ToString::to_string).collect()
    };
    let none = RegistriesConf::default();
    assert_eq!(names(&none, "b"), ["docker.io/library/b:latest"]);
    let aliases = conf(
        "unqualified-search-registries = [\"s.t\"]\n[aliases]\n\"b\" = \"q.r/x/b\"\n\"c/d\" = \"q.r/d\"\n",
    )
    .unwrap();
    assert_eq!(names(&aliases, "b:1"), ["q.r/x/b:1"]);
    assert_eq!(names(&aliases, "c/d"), ["q.r/d:latest"]);
    assert_eq!(names(&aliases, "e:1"), ["s.t/e:1"]);
    assert_eq!(names(&aliases, "f.g/b:1"), ["f.g/b:1"]);
    assert_eq!(
        names(&aliases, "docker.io/b"),
        ["docker.io/library/b:latest"]
    );
    let digest = format!("b@sha256:{}", "0".repeat(64));
    assert_eq!(names(&aliases, &digest), [format!("q.r/x/{digest}")]);
    let two = "unqualified-search-registries = [\"s.t\", \"u.v/w\"]\n";
    let error = conf(two).unwrap().references("e").unwrap_err().to_string();
    assert!(error.contains("s.t, u.v/w"), "{error}");
    let open = conf(&format!("{two}short-name-mode = \"permissive\"")).unwrap();
    assert_eq!(names(&open, "e"), ["s.t/e:latest", "u.v/w/e:latest"]);
}

#[test]
fn drop_ins_change_single_things_in_the_order_of_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let main = dir.path().join("registries.conf");
    assert_eq!(
        RegistriesConf::load(&main).unwrap(),
        RegistriesConf::default()
    );
    let more = dir.path().join("registries.conf.d");
    std::fs::create_dir(&more).unwrap();
    std::fs::write(
        &main,
        "unqualified-search-registries = [\"a.b\"]\n[[registry]]\nprefix = \"x.y\"\nblocked = true\n\
         [aliases]\n\"one\" = \"a.b/one\"\n\"two\" = \"a.b/two\"\n",
    )
    .unwrap();
    std::fs::write(more.join("20.conf"), "[[registry]]\nprefix = \"x.y\"\n").unwrap();
    std::fs::write(more.join("10.conf"), "[aliases]\n\"one\" = \"\"\n").unwrap();
    std::fs::write(more.join("30.conf.off"), "nonsense").unwrap();
    let conf = RegistriesConf::load(&main).unwrap();
    let (registry, _) = conf.registry(&"x.y/z".parse().unwrap()).unwrap();
    assert!(!registry.blocked);
    assert_eq!(registry.said_by, more.join("20.conf"));
    assert_eq!(conf.references("one").unwrap()[0].host(), "a.b");
    assert_eq!(conf.alias_said_by("one:1"), None);
    assert_eq!(conf.alias_said_by("two:1"), Some(&*main));
    std::fs::write(more.join("40.conf"), "\n\nblokced = true\n").unwrap();
    let error = RegistriesConf::load(&main).unwrap_err().to_string();
    assert!(
        error.contains("40.conf") && error.contains("line 3") && error.contains("blokced"),
        "{error}"
    );
}

#[test]
fn errors_name_the_file_and_the_line() {
    for (text, expected) in [
        ("\n\nregistyr = 1", "line 3: unknown field `registyr`"),
        (
            "[[registry]]\nprefix = \"a.b\"\nblokced = true",
            "line 3: unknown field `blokced`",
        ),
        (
            "[[registry]]\nprefix = \"a.b\"\n[[registry.mirror]]\nlocation = \"c.d\"\nx = 1",
            "line 5",
        ),
        ("[registries.search]\nregistries = []", "version 1"),
        ("\n[[registry]]\nblocked = true", "line 2: prefix"),
        ("[[registry]]\nprefix = \"*.\"", "\"*.\""),
        ("[[registry]]\nprefix = \"*.a.b/c\"", "and a domain"),
        ("[[registry]]\nlocation = \"a b\"", "line 1"),
        (
            "[[registry]]\nprefix = \"a.b\"\nlocation = \"c.d/x:1\"",
            "location",
        ),
        (
            "[[registry]]\nprefix = \"a.b\"\nlocation = \"u:p@c.d\"",
            "\"c.d\"",
        ),
        (
            "short-name-mode = \"strict\"",
            "line 1: short-name-mode \"strict\"",
        ),
        ("\n[aliases]\n\"a.b/c\" = \"d.e/f\"", "line 3"),
        ("[aliases]\n\"c\" = \"f\"", "with a registry"),
        ("[aliases]\n\"c\" = \"d.e/f:1\"", "tag"),
        ("unqualified-search-registries = [\"a b\"]", "\"a b\""),
        (
            "[[registry]]\nprefix = \"a.b\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"c.d\"\npull-from-mirror = \"all\"",
            "exclude each other",
        ),
        (
            "[[registry]]\nprefix = \"a.b\"\n[[registry.mirror]]\nlocation = \"c.d\"\npull-from-mirror = \"some\"",
            "\"some\"",
        ),
        ("= 1", "line 1"),
    ] {
        let error = conf(text).unwrap_err();
        assert!(
            error.contains("/c/registries.conf") && error.contains(expected),
            "{text}: {error}"
        );
    }
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text in "[a-z\\[\\]=\". \n-]{0,80}", name in "[a-z./:]{1,20}") {
        if let Ok(conf) = conf(&text) {
            let _ = conf.references(&name);
        }
    }
}
