//! What ADD gave, in the words of another version of the specification.
//!
//! A result is kept as the JSON it came as: what later versions or a plugin's
//! own habits add reaches the next plugin and DEL unchanged, but for what the
//! version spoken there does not know.
//!
//! Source: CNI specification 0.3.1, 0.4.0, 1.0.0 and 1.1.0, section "Result":
//! 1.0 dropped `ips[].version`, 1.1 added the fields below.

use crate::spec::{CniResult, VERSIONS};
use serde_json::{Map, Value};

/// What 1.1 knows of an interface and 1.0 does not.
const INTERFACE_FIELDS_1_1: [&str; 3] = ["mtu", "socketPath", "pciID"];

/// What 1.1 knows of a route and 1.0 does not.
const ROUTE_FIELDS_1_1: [&str; 5] = ["mtu", "advmss", "priority", "table", "scope"];

/// Why what a plugin answered is no result.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// Not even an object.
    #[error("it is no JSON object")]
    NoObject,
    /// An error, though the plugin said by its exit status that all went well.
    #[error("it is an error, code {0}")]
    Error(u64),
    /// Said in the words of a version that is not known.
    #[error("its cniVersion is {0}")]
    Version(String),
    /// A field is not as the specification has it.
    #[error("{0}")]
    Shape(serde_json::Error),
}

/// Checks that `answer` is a result, and gives it in the words of `version`, one
/// of [`VERSIONS`]. One that names no version is taken to be said in `version`.
///
/// # Errors
/// The first thing that no result has.
pub fn convert(answer: Value, version: &str) -> Result<Value, ResultError> {
    let Value::Object(mut result) = answer else {
        return Err(ResultError::NoObject);
    };
    if let (Some(code), true) = (
        result.get("code").and_then(Value::as_u64),
        result.contains_key("msg"),
    ) {
        return Err(ResultError::Error(code));
    }
    match result.get("cniVersion") {
        None | Some(Value::Null) => {}
        Some(Value::String(said)) if said.is_empty() || VERSIONS.contains(&&**said) => {}
        Some(other) => return Err(ResultError::Version(other.to_string())),
    }
    let said = result.get("cniVersion").and_then(Value::as_str);
    let said = said.filter(|said| !said.is_empty()).unwrap_or(version);
    // A field that its version does not know may have any value, and means nothing.
    let (said_1_1, wanted_1_1) = (said == "1.1.0", version == "1.1.0");
    // Some write null for what is empty.
    result.retain(|_, value| !value.is_null());
    result.insert("cniVersion".into(), version.into());
    let old = version.starts_with("0.");
    for list in ["interfaces", "ips", "routes"] {
        for object in objects(&mut result, list) {
            object.retain(|_, value| !value.is_null());
        }
    }
    for ip in objects(&mut result, "ips") {
        if old {
            let family = match ip.get("address").and_then(Value::as_str) {
                Some(address) if address.contains(':') => "6",
                _ => "4",
            };
            ip.entry("version").or_insert_with(|| family.into());
        } else {
            ip.remove("version");
        }
    }
    let check = |result: &Map<String, Value>| {
        serde_json::from_value::<CniResult>(Value::Object(result.clone()))
            .map(drop)
            .map_err(ResultError::Shape)
    };
    if said_1_1 {
        check(&result)?;
    }
    if !(said_1_1 && wanted_1_1) {
        let lists = [
            ("interfaces", &INTERFACE_FIELDS_1_1[..]),
            ("routes", &ROUTE_FIELDS_1_1[..]),
        ];
        for (list, fields) in lists {
            for object in objects(&mut result, list) {
                object.retain(|field, _| !fields.contains(&&**field));
            }
        }
    }
    check(&result)?;
    Ok(Value::Object(result))
}

/// The objects in the array `list`.
fn objects<'a>(
    result: &'a mut Map<String, Value>,
    list: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    let items = result.get_mut(list).and_then(Value::as_array_mut);
    items.into_iter().flatten().filter_map(Value::as_object_mut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn a_field_of_a_later_version_means_nothing_in_an_earlier_one() {
        let result = |version: &str| {
            json!({ "cniVersion": version, "ips": [],
                "interfaces": [{ "name": "eth0", "sandbox": "/n", "mtu": "much" }] })
        };
        let converted = convert(result("1.0.0"), "1.1.0").unwrap();
        assert_eq!(
            converted["interfaces"],
            json!([{ "name": "eth0", "sandbox": "/n" }])
        );
        for version in VERSIONS {
            assert!(convert(result("1.1.0"), version).is_err(), "{version}");
        }
    }

    fn latest() -> Value {
        json!({ "cniVersion": "1.1.0", "own": { "kept": true },
            "interfaces": [{ "name": "eth0", "sandbox": "/n", "mtu": 1400, "pciID": "0000:00:1f.6" }],
            "ips": [{ "address": "10.0.0.2/24" }, { "address": "fd00::2/64", "interface": 0 }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.0.0.1", "mtu": 1400, "table": 5 }],
            "dns": {} })
    }

    #[test]
    fn older_versions_get_what_they_know() {
        let one = convert(latest(), "1.0.0").unwrap();
        assert_eq!(one["cniVersion"], "1.0.0");
        assert_eq!(
            one["interfaces"],
            json!([{ "name": "eth0", "sandbox": "/n" }])
        );
        assert_eq!(
            one["routes"],
            json!([{ "dst": "0.0.0.0/0", "gw": "10.0.0.1" }])
        );
        assert_eq!(one["own"]["kept"], true);
        for old in ["0.3.0", "0.3.1", "0.4.0"] {
            let result = convert(latest(), old).unwrap();
            let ips = result["ips"].as_array().unwrap();
            assert_eq!(
                (&ips[0]["version"], &ips[1]["version"]),
                (&json!("4"), &json!("6"))
            );
        }
    }

    #[test]
    fn newer_versions_do_not_get_what_was_dropped() {
        let old = convert(latest(), "0.3.1").unwrap();
        let new = convert(old, "1.1.0").unwrap();
        assert_eq!(new["ips"], latest()["ips"]);
        assert_eq!(new["cniVersion"], "1.1.0");
    }

    #[test]
    fn what_is_no_result_says_why() {
        for (answer, expected) in [
            (json!(7), "no JSON object"),
            (json!(null), "no JSON object"),
            (json!({ "code": 11, "msg": "later" }), "an error, code 11"),
            (json!({ "cniVersion": "2.0.0" }), "cniVersion is \"2.0.0\""),
            (json!({ "cniVersion": 1 }), "cniVersion is 1"),
            (json!({ "ips": 7 }), "invalid type"),
            (
                json!({ "ips": [{ "address": "10.0.0.300/24" }] }),
                "10.0.0.300",
            ),
            (json!({ "ips": [7] }), "invalid type"),
        ] {
            let error = convert(answer.clone(), "1.0.0").unwrap_err().to_string();
            assert!(error.contains(expected), "{answer}: {error}");
        }
        assert!(convert(json!({ "interfaces": null, "ips": null }), "1.0.0").is_ok());
    }

    proptest! {
        #[test]
        fn twice_is_once(from in 0..VERSIONS.len(), to in 0..VERSIONS.len()) {
            let said = convert(latest(), VERSIONS[from]).unwrap();
            let once = convert(said, VERSIONS[to]).unwrap();
            prop_assert_eq!(&convert(once.clone(), VERSIONS[to]).unwrap(), &once);
        }
    }
}
