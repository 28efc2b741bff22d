//! What we compile is CRI v1 and nothing else: the descriptor and the list in
//! `data/cri-v1.tsv` are compared row by row, in both directions.
#![cfg(feature = "grpc")]

use berth_proto::{DESCRIPTORS, runtime_v1};
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet,
};
use std::collections::BTreeSet;

const LIST: &str = include_str!("data/cri-v1.tsv");

/// One row of the list: kind, parent, number, label, type, name.
type Row = [String; 6];

fn listed() -> BTreeSet<Row> {
    let mut lines = LIST.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(
        lines.next(),
        Some("kind\tparent\tnumber\tlabel\ttype\tname")
    );
    let mut rows = BTreeSet::new();
    for line in lines {
        let mut cells: Vec<_> = line.split('\t').map(str::to_owned).collect();
        cells.resize(6, String::new());
        let row: Row = cells.try_into().expect("six cells");
        assert!(rows.insert(row), "twice in the list: {line}");
    }
    rows
}

fn runtime_file() -> FileDescriptorProto {
    let set = FileDescriptorSet::decode(DESCRIPTORS).expect("the descriptors decode");
    let mut files = set
        .file
        .into_iter()
        .filter(|file| file.package() == "runtime.v1");
    let file = files.next().expect("runtime.v1 is compiled in");
    assert!(files.next().is_none(), "runtime.v1 is one file");
    assert!(file.dependency.is_empty(), "runtime.v1 imports nothing");
    assert!(file.extension.is_empty());
    file
}

/// A type's name as the list writes it: the last part of ".runtime.v1.X.Y".
fn short(full: &str) -> String {
    full.rsplit('.').next().unwrap_or_default().to_owned()
}

fn row(kind: &str, parent: &str, number: &str, label: &str, kind_of: &str, name: &str) -> Row {
    [kind, parent, number, label, kind_of, name].map(str::to_owned)
}

fn scalar(kind: Type) -> &'static str {
    match kind {
        Type::Double => "double",
        Type::Float => "float",
        Type::Int64 => "int64",
        Type::Uint64 => "uint64",
        Type::Int32 => "int32",
        Type::Fixed64 => "fixed64",
        Type::Fixed32 => "fixed32",
        Type::Bool => "bool",
        Type::String => "string",
        Type::Bytes => "bytes",
        Type::Uint32 => "uint32",
        Type::Sfixed32 => "sfixed32",
        Type::Sfixed64 => "sfixed64",
        Type::Sint32 => "sint32",
        Type::Sint64 => "sint64",
        Type::Group | Type::Message | Type::Enum => unreachable!("has a name of its own"),
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()),
        other => scalar(other).to_owned(),
    }
}

fn field_row(message: &DescriptorProto, field: &FieldDescriptorProto) -> Row {
    let entry = message
        .nested_type
        .iter()
        .filter(|nested| {
            nested
                .options
                .as_ref()
                .is_some_and(|options| options.map_entry())
        })
        .find(|nested| nested.name() == short(field.type_name()));
    let repeated = field.label() == Label::Repeated;
    let (label, kind) = if let Some(entry) = entry {
        assert!(repeated, "a map is repeated on the wire");
        let [key, value] = &entry.field[..] else {
            panic!("a map entry has two fields")
        };
        ("", format!("map<{},{}>", type_of(key), type_of(value)))
    } else if field
        .options
        .as_ref()
        .is_some_and(|options| options.deprecated())
    {
        assert!(!repeated);
        ("deprecated", type_of(field))
    } else if repeated {
        ("repeated", type_of(field))
    } else if field.proto3_optional() {
        ("optional", type_of(field))
    } else if let Some(index) = field.oneof_index {
        let oneof = message.oneof_decl[index as usize].name();
        return row(
            "field",
            message.name(),
            &field.number().to_string(),
            &format!("oneof {oneof}"),
            &type_of(field),
            field.name(),
        );
    } else {
        ("", type_of(field))
    };
    row(
        "field",
        message.name(),
        &field.number().to_string(),
        label,
        &kind,
        field.name(),
    )
}

fn enum_rows(rows: &mut Vec<Row>, name: &str, listed: &EnumDescriptorProto) {
    for value in &listed.value {
        rows.push(row(
            "enum",
            name,
            &value.number().to_string(),
            "",
            "",
            value.name(),
        ));
    }
}

fn compiled() -> BTreeSet<Row> {
    let file = runtime_file();
    let mut rows = Vec::new();
    for service in &file.service {
        for method in &service.method {
            assert!(!method.client_streaming(), "CRI has no client streaming");
            let stream = if method.server_streaming() {
                "stream"
            } else {
                ""
            };
            let signature = format!(
                "{} -> {}",
                short(method.input_type()),
                short(method.output_type())
            );
            rows.push(row(
                "rpc",
                service.name(),
                "",
                stream,
                &signature,
                method.name(),
            ));
        }
    }
    for message in &file.message_type {
        if message.field.is_empty() {
            rows.push(row("message", message.name(), "", "", "", ""));
        }
        for field in &message.field {
            rows.push(field_row(message, field));
        }
        for nested in &message.nested_type {
            let map = nested
                .options
                .as_ref()
                .is_some_and(|options| options.map_entry());
            assert!(
                map,
                "{} inside {} is not a map entry",
                nested.name(),
                message.name()
            );
        }
        for nested in &message.enum_type {
            enum_rows(
                &mut rows,
                &format!("{}.{}", message.name(), nested.name()),
                nested,
            );
        }
    }
    for listed in &file.enum_type {
        enum_rows(&mut rows, listed.name(), listed);
    }
    let count = rows.len();
    let rows: BTreeSet<_> = rows.into_iter().collect();
    assert_eq!(rows.len(), count, "a row is compiled in twice");
    rows
}

#[test]
fn the_compiled_descriptor_is_the_list() {
    let (listed, compiled) = (listed(), compiled());
    let missing: Vec<_> = listed
        .difference(&compiled)
        .map(|row| row.join(" | "))
        .collect();
    let extra: Vec<_> = compiled
        .difference(&listed)
        .map(|row| row.join(" | "))
        .collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "in the list only:\n{}\nin the descriptor only:\n{}",
        missing.join("\n"),
        extra.join("\n")
    );
}

#[test]
fn the_list_has_43_rpcs_of_which_seven_stream() {
    let rpcs: Vec<_> = listed().into_iter().filter(|row| row[0] == "rpc").collect();
    assert_eq!(rpcs.len(), 43);
    let streaming: Vec<_> = rpcs
        .iter()
        .filter(|row| row[3] == "stream")
        .map(|row| &row[5])
        .collect();
    assert_eq!(streaming.len(), 7, "{streaming:?}");
}

#[test]
fn an_environment_value_is_bytes() {
    let value = runtime_v1::KeyValue {
        key: "K".into(),
        value: vec![0xff, 0xfe],
    };
    let wire = value.encode_to_vec();
    assert_eq!(
        runtime_v1::KeyValue::decode(&wire[..]).unwrap().value,
        [0xff, 0xfe]
    );
}

#[test]
fn debug_output_hides_credentials() {
    let auth = runtime_v1::AuthConfig {
        username: "hidden-user".into(),
        password: "hidden-password".into(),
        auth: "hidden-auth".into(),
        server_address: "registry.test".into(),
        identity_token: "hidden-identity".into(),
        registry_token: "hidden-registry".into(),
    };
    let request = runtime_v1::PullImageRequest {
        image: Some(runtime_v1::ImageSpec {
            image: "registry.test/a:b".into(),
            ..Default::default()
        }),
        auth: Some(auth.clone()),
        sandbox_config: None,
    };
    for text in [
        format!("{auth:?}"),
        format!("{auth:#?}"),
        format!("{request:?}"),
        format!("{request:#?}"),
        format!("{:?}", tonic::Request::new(request.clone())),
    ] {
        assert!(!text.contains("hidden"), "{text}");
        assert!(text.contains("registry.test"), "{text}");
        assert!(text.contains("[redacted]"), "{text}");
    }
    let empty = format!("{:?}", runtime_v1::AuthConfig::default());
    assert!(
        !empty.contains("[redacted]"),
        "what is not there is not shown as hidden: {empty}"
    );
}
