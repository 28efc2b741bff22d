//! Images at the limits: very many layers, a very large one, one of very many files.
//!
//! Two of them are smaller here than what Berth is held to; the variables below make them whole.

use berth_tests::image::{Blob, pack};
use berth_tests::{Format, Image, Layer, Node, Packing};
use flate2::{Compression, write::GzEncoder};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::Write as _;

/// MiB in the large layer; 2048 is the figure that counts.
const LARGE_MIB: &str = "BERTH_LARGE_LAYER_MIB";
/// Files in the layer of many; 300000 is the figure that counts.
const MANY_FILES: &str = "BERTH_MANY_FILES";

fn variable(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn an_image_of_two_hundred_layers_runs() {
    let node = Node::start();
    let mut builder = Image::builder(Format::Oci).base();
    for nth in 0..199 {
        let layer = Layer::new().file(&format!("layers-{nth}"), 0o644, format!("{nth}"));
        builder = builder.layer(&layer, Packing::Gzip);
    }
    let reference = node.push("things/tall", "1", &builder.build());
    node.pull(&reference).unwrap();
    let pod = node.run_pod("tall");
    let command = [
        "sh",
        "-c",
        "ls -d /layers-* | wc -l; cat /layers-0 /layers-198",
    ];
    let output = pod.output_as(pod.container_of(&reference, &command));
    let words: Vec<&str> = output.split_whitespace().collect();
    assert_eq!(words, ["199", "0198"]);
}

/// A layer with one file of so many MiB, an eighth of it not compressible, and its diff ID.
fn large_layer(mib: usize) -> (Vec<u8>, String) {
    let head = {
        let tar = Layer::new().file("large", 0o644, "").tar();
        let mut head: [u8; 512] = tar[..512].try_into().unwrap();
        head[124..136].copy_from_slice(format!("{:011o}\0", mib << 20).as_bytes());
        head[148..156].copy_from_slice(b"        ");
        let sum: u32 = head.iter().map(|&byte| u32::from(byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        head
    };
    let mut hasher = Sha256::new();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        encoder.write_all(bytes).unwrap();
    };
    put(&head);
    let mut state = 1u64;
    let mut block = vec![0u8; 1 << 20];
    for nth in 0..mib {
        if nth % 8 == 0 {
            for word in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
        } else if nth % 8 == 1 {
            block.fill(0);
        }
        put(&block);
    }
    put(&[0; 1024]);
    let packed = encoder.finish().unwrap();
    (packed, format!("sha256:{}", hex::encode(hasher.finalize())))
}

fn status_kib(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
    number.unwrap_or_else(|| panic!("no {key} of {pid}"))
}

#[test]
fn a_large_layer_takes_no_more_memory_than_a_small_one() {
    let node = Node::start();
    let mib = variable(LARGE_MIB, 384);
    let (packed, diff_id) = large_layer(mib);
    let image = Image::builder(Format::Oci)
        .packed_layer(packed, Packing::Gzip, diff_id)
        .build();
    let reference = node.push("things/large", "1", &image);
    // What a daemon has that has pulled something.
    node.base_image();
    let pid = node.daemon_pid().unwrap();
    let before = status_kib(pid, "VmRSS");
    // The peak counts from now. Source: proc_pid_clear_refs(5).
    fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
    node.pull(&reference).unwrap();
    let peak = status_kib(pid, "VmHWM");
    let grown = peak.saturating_sub(before) / 1024;
    println!("a layer of {mib} MiB: the daemon grew by {grown} MiB");
    assert!(grown < 64, "{mib} MiB of layer took {grown} MiB");
    let layers = node.root().join("lib/images/layers");
    let stored = fs::read_dir(layers).unwrap().any(|entry| {
        let file = entry.unwrap().path().join("fs/large");
        fs::metadata(file).is_ok_and(|file| file.len() == (mib as u64) << 20)
    });
    assert!(stored);
}

#[test]
fn a_layer_of_very_many_small_files_is_unpacked() {
    let node = Node::start();
    let count = variable(MANY_FILES, 30_000);
    let mut layer = Layer::new();
    for nth in 0..count {
        if nth % 1000 == 0 {
            layer = layer.dir(&format!("many/{}", nth / 1000), 0o755);
        }
        layer = layer.file(
            &format!("many/{}/{nth}", nth / 1000),
            0o644,
            format!("{nth}"),
        );
    }
    let tar = Layer::new().dir("many", 0o755).tar();
    let tar = [&tar[..512], &layer.tar()].concat();
    let diff_id = berth_tests::sha256(&tar);
    let image = Image::builder(Format::Oci)
        .base()
        .packed_layer(pack(&tar, Packing::Gzip), Packing::Gzip, diff_id)
        .build();
    let reference = node.push("things/many", "1", &image);
    let begun = std::time::Instant::now();
    node.pull(&reference).unwrap();
    println!("{count} files: {:?}", begun.elapsed());
    let pod = node.run_pod("many");
    let last = count - 1;
    let path = format!("/many/{}/{last}", last / 1000);
    let command = ["sh", "-c", &format!("cat {path}; echo; ls /many | wc -l")];
    let output = pod.output_as(pod.container_of(&reference, &command));
    let words: Vec<String> = output.split_whitespace().map(str::to_owned).collect();
    assert_eq!(words, [last.to_string(), count.div_ceil(1000).to_string()]);
    let usage = node.image_fs();
    assert!(usage.inodes_used.unwrap().value >= count as u64);
}

#[test]
fn a_manifest_is_not_a_large_layer() {
    let node = Node::start();
    let mut image = Image::builder(Format::Oci)
        .layer(&Layer::new().file("x", 0o644, "y"), Packing::Gzip)
        .build();
    // Larger than any registry should take; ours takes it.
    let filler = "x".repeat(5 << 20);
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest.data).unwrap();
    manifest["annotations"] = json!({"filler": filler});
    image.manifest = Blob::new(
        &image.manifest.media_type,
        manifest.to_string().into_bytes(),
    );
    let Ok(reference) = node.registry().push("things/wordy", "1", &image) else {
        // A registry that refuses it is as good.
        return;
    };
    let status = node.pull(&reference).unwrap_err();
    assert!(
        status.message().contains("4194304") || status.message().contains("large"),
        "{status}"
    );
}
