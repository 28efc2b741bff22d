use super::*;
use crate::oci::tests::Sample;
use std::fs;

fn files(content: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let root = tempfile::tempdir().unwrap();
    let dirs = vec![root.path().join("etc"), root.path().join("run")];
    for dir in &dirs {
        fs::create_dir(dir).unwrap();
    }
    for (name, text) in content {
        fs::write(root.path().join(name), text).unwrap();
    }
    (root, dirs)
}

fn one(device: &str, edits: &str) -> String {
    format!(
        r#"{{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","devices":[{{"name":"{device}","containerEdits":{edits}}}]}}"#
    )
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn devices_of_a_yaml_file_get_common_edits_once() {
    let yaml = "\
cdiVersion: 0.6.0
kind: vendor.com/gpu
containerEdits:
  env:
  - DRIVER=1
devices:
- name: '0'
  containerEdits:
    deviceNodes:
    - path: /dev/gpu0
      hostPath: /dev/null
      permissions: rw
- name: \"1\"
  containerEdits:
    deviceNodes:
    - path: /dev/gpu1
      type: c
      major: 195
      minor: 1
";
    let (_root, dirs) = files(&[("etc/gpu.yaml", yaml), ("etc/notes.txt", "no CDI")]);
    let asked = names(&["vendor.com/gpu=0", "vendor.com/gpu=1", "vendor.com/gpu=0"]);
    let Edits(edits) = resolve(&dirs, &asked).unwrap();
    assert_eq!(edits.len(), 3, "{edits:?}");
    assert_eq!(edits[0].env, ["DRIVER=1"]);
    let null = &edits[1].device_nodes[0];
    assert_eq!(
        (null.kind.as_deref(), null.major, null.minor),
        (Some("c"), Some(1), Some(3))
    );
    assert_eq!(null.file_mode, Some(0o666));
    assert_eq!(edits[2].device_nodes[0].major, Some(195));
}

#[test]
fn later_directories_win_and_equals_are_ambiguous() {
    let (early, late) = (
        one("0", r#"{"env":["A=early"]}"#),
        one("0", r#"{"env":["A=late"]}"#),
    );
    let (_root, dirs) = files(&[("etc/a.json", &early), ("run/a.json", &late)]);
    let Edits(edits) = resolve(&dirs, &names(&["vendor.com/gpu=0"])).unwrap();
    assert_eq!(edits[0].env, ["A=late"]);

    let (_root, dirs) = files(&[("etc/a.json", &early), ("etc/b.json", &late)]);
    let error = resolve(&dirs, &names(&["vendor.com/gpu=0"])).unwrap_err();
    assert!(matches!(error, CdiError::Ambiguous { .. }), "{error}");
}

#[test]
fn a_bad_file_costs_only_its_own_devices_and_is_named() {
    let good = one("0", r#"{"env":["A=1"]}"#);
    let (_root, dirs) = files(&[("etc/a.json", &good), ("etc/bad.json", r#"{"kind":3}"#)]);
    assert!(resolve(&dirs, &names(&["vendor.com/gpu=0"])).is_ok());
    let error = resolve(&dirs, &names(&["vendor.com/gpu=7"]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("gpu=7") && error.contains("bad.json"),
        "{error}"
    );
}

#[test]
fn what_is_not_done_here_is_refused_by_name() {
    let cases = [
        (r#"{"intelRdt":{"closID":"a"}}"#, "RDT"),
        (
            r#"{"netDevices":[{"hostInterfaceName":"eth9","name":"net0"}]}"#,
            "eth9",
        ),
    ];
    for (edits, said) in cases {
        let (_root, dirs) = files(&[("etc/a.json", &one("0", edits))]);
        let error = resolve(&dirs, &names(&["vendor.com/gpu=0"])).unwrap_err();
        assert!(matches!(error, CdiError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[test]
fn texts_that_are_no_cdi_files_are_refused() {
    let device = |edits: &str| one("0", edits);
    let bad = [
        String::new(),
        "[]".to_owned(),
        "a: [b".to_owned(),
        one("-", "{}"),
        one("0", "{}").replace("0.6.0", "9.0.0"),
        one("0", "{}").replace("0.6.0", "0.6"),
        one("0", "{}").replace("vendor.com/gpu", "gpu"),
        one("0", "{}").replace("\"devices\"", "\"device\""),
        device(r#"{"what":1}"#),
        device(r#"{"env":["=x"]}"#),
        device(r#"{"env":["x"]}"#),
        device(r#"{"deviceNodes":[{"path":"dev/x"}]}"#),
        device(r#"{"deviceNodes":[{"path":"/dev/../etc"}]}"#),
        device(r#"{"deviceNodes":[{"path":"/dev/x","type":"x"}]}"#),
        device(r#"{"deviceNodes":[{"path":"/dev/x","permissions":"rx"}]}"#),
        device(r#"{"mounts":[{"hostPath":"","containerPath":"/x"}]}"#),
        device(r#"{"mounts":[{"hostPath":"/x","containerPath":"/"}]}"#),
        device(r#"{"hooks":[{"hookName":"now","path":"/x"}]}"#),
        // Nested without end.
        format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("a: {}", "{a: ".repeat(50_000)),
    ];
    for text in bad {
        let head: String = text.chars().take(80).collect();
        assert!(parse(&text).is_err(), "{head}");
    }
}

#[test]
fn edits_change_the_spec_where_they_should() {
    let edits = r#"{"env":["LANG=de","GPU=1"],"additionalGids":[44,0,7],
        "deviceNodes":[{"path":"/dev/gpu","hostPath":"/dev/zero","permissions":"r"}],
        "mounts":[{"hostPath":"/usr/lib/gpu","containerPath":"/gpu","options":["ro","nosuid"]}]}"#;
    let (_root, dirs) = files(&[("run/a.json", &one("0", edits))]);
    let edits = resolve(&dirs, &names(&["vendor.com/gpu=0"])).unwrap();
    let mut built = Sample::new().build().unwrap();
    apply(&edits, &mut built);

    let process = built.spec.process().clone().unwrap();
    let env = process.env().clone().unwrap();
    assert!(
        env.contains(&"LANG=de".to_owned()) && env.contains(&"GPU=1".to_owned()),
        "{env:?}"
    );
    assert!(!env.contains(&"LANG=C".to_owned()));
    let raw: Vec<_> = built
        .raw_env
        .iter()
        .map(|v| String::from_utf8(v.clone()).unwrap())
        .collect();
    assert_eq!(raw, env);
    assert_eq!(process.user().additional_gids(), &Some(vec![100, 7, 44]));

    let linux = built.spec.linux().clone().unwrap();
    let devices = linux.devices().clone().unwrap();
    let gpu = devices
        .iter()
        .find(|device| device.path() == Path::new("/dev/gpu"))
        .unwrap();
    assert_eq!(
        (gpu.major(), gpu.minor(), gpu.uid(), gpu.gid()),
        (1, 5, Some(1000), Some(100))
    );
    let rules = crate::oci::device_rules(&built.spec);
    let last = rules.last().unwrap();
    assert_eq!(
        (last.major, last.minor, last.access.as_str()),
        (Some(1), Some(5), "r")
    );

    let mounts = built.spec.mounts().clone().unwrap();
    let mount = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new("/gpu"))
        .unwrap();
    let options = mount.options().clone().unwrap();
    assert_eq!(options, ["ro", "nosuid", "rbind"]);
}

#[test]
fn annotations_name_devices_too() {
    let annotations = |value: &str| {
        BTreeMap::from([
            ("cdi.k8s.io/plugin_x".to_owned(), value.to_owned()),
            ("other".to_owned(), "a".to_owned()),
        ])
    };
    let asked = from_annotations(&annotations("vendor.com/gpu=0, vendor.com/net=all")).unwrap();
    assert_eq!(asked, ["vendor.com/gpu=0", "vendor.com/net=all"]);
    assert!(from_annotations(&annotations("gpu")).is_err());
    assert!(from_annotations(&annotations("")).is_err());
}
