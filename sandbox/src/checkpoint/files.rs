//! The small files of an archive, in their peers' words.

use crate::container::ContainerRecord;
use crate::pod::PodRecord;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt as _;

/// `config.dump`: which container of which image this was.
///
/// `now` is in nanoseconds since 1970.
pub fn config(container: &ContainerRecord, pod: &PodRecord, now: i64) -> Value {
    let runtime = match pod.spec.runtime_handler.as_str() {
        "" => "berth",
        handler => handler,
    };
    let asked = match container.spec.image.user_specified_image.as_str() {
        "" => &container.spec.image.image,
        named => named,
    };
    json!({
        "id": container.id.as_str(),
        "name": container.spec.name.name,
        "rootfsImage": asked,
        "rootfsImageRef": container.image.repo_digest,
        "rootfsImageName": asked,
        "runtime": runtime,
        "createdTime": rfc3339(container.created_at),
        "checkpointedTime": rfc3339(now),
        // Go's zero time: it was never restored.
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    })
}

/// Says in the spec whose it is, by the annotations that `checkpointctl` reads.
///
/// Source: containerd, `internal/cri/annotations`; checkpointctl,
/// `internal/container.go`.
pub fn annotate(spec: &mut Spec, container: &ContainerRecord, pod: &PodRecord) {
    let mut all = spec.annotations().clone().unwrap_or_default();
    let name = &pod.spec.name;
    let known = [
        ("container-type", "container"),
        ("container-name", container.spec.name.name.as_str()),
        ("image-name", container.spec.image.image.as_str()),
        ("sandbox-id", pod.id.as_str()),
        ("sandbox-name", name.name.as_str()),
        ("sandbox-namespace", name.namespace.as_str()),
        ("sandbox-uid", name.uid.as_str()),
    ];
    for (key, value) in known {
        all.insert(format!("io.kubernetes.cri.{key}"), value.to_owned());
    }
    spec.set_annotations(Some(all));
}

/// `bind.mounts`: what has to be there for a restore, and as what. What is not
/// there (any more) is left out.
pub fn bind_mounts(spec: &Spec) -> Value {
    let mounts = spec.mounts().iter().flatten();
    let binds = mounts.filter(|mount| mount.typ().as_deref() == Some("bind"));
    let found = binds.filter_map(|mount| {
        let source = mount.source().as_ref()?;
        let metadata = std::fs::metadata(source).ok()?;
        let kind = if metadata.is_dir() {
            "directory"
        } else {
            "file"
        };
        Some(json!({
            "source": source,
            "destination": mount.destination(),
            "file_type": kind,
            "permissions": metadata.mode() & 0o777,
        }))
    });
    Value::Array(found.collect())
}

/// `checkpoint/descriptors.json`: what the first process has as its streams.
/// Restorers put their own pipes in the place of the pipes named here.
pub fn descriptors(pid: i32) -> Value {
    let stream = |number: i32| {
        let target = std::fs::read_link(format!("/proc/{pid}/fd/{number}"));
        target.map_or_else(
            |_| "/dev/null".to_owned(),
            |target| target.to_string_lossy().into_owned(),
        )
    };
    json!([stream(0), stream(1), stream(2)])
}

/// Nanoseconds since 1970 as RFC 3339 in UTC, to the second.
pub fn rfc3339(nanoseconds: i64) -> String {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let mut year = 1970;
    let mut left = days;
    let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = |year: i64| if is_leap(year) { 366 } else { 365 };
    // A clock counts some decades, whatever its hand is on.
    while left < 0 {
        year -= 1;
        left += length(year);
    }
    while left >= length(year) {
        left -= length(year);
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < days {
            break;
        }
        left -= days;
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{:02}Z",
        left + 1,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_peers_read_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds * 1_000_000_000), text);
        }
    }

    #[test]
    fn only_what_is_mounted_from_somewhere_is_listed() {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/usr"},
                {"destination": "/gone", "type": "bind", "source": "/no/such/thing"},
            ],
        }))
        .unwrap();
        let listed = bind_mounts(&spec);
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed[0]["destination"], "/data");
        assert_eq!(listed[0]["file_type"], "directory");
    }
}
