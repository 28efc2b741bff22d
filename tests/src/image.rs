//! Builds images: layers entry by entry, byte for byte as the test wants them,
//! also such that no honest tool would write.

use crate::sha256;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::sync::OnceLock;

/// The program of `programs/probe.rs`.
pub const PROBE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/probe"));

/// Which family of media types an image speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Oci,
    DockerSchema2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Format {
    fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::DockerSchema2 => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    fn index(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.index.v1+json",
            Self::DockerSchema2 => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::DockerSchema2 => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self, packing: Packing) -> &'static str {
        match (self, packing) {
            (Self::Oci, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Packing::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::DockerSchema2, Packing::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::DockerSchema2, Packing::Gzip) => {
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
            (Self::DockerSchema2, Packing::Zstd) => {
                "application/vnd.docker.image.rootfs.diff.tar.zstd"
            }
        }
    }
}

/// One tar entry. Names are bytes and are written as they are.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    pub data: Vec<u8>,
    /// PAX records; `SCHILY.xattr.NAME` is an extended attribute.
    pub pax: Vec<(String, Vec<u8>)>,
    /// The size in the header, where it is not the data's.
    pub claimed_size: Option<u64>,
}

/// Tar type flags. Source: POSIX pax, "ustar Interchange Format"; L and K are GNU's.
pub mod kind {
    pub const FILE: u8 = b'0';
    pub const HARD_LINK: u8 = b'1';
    pub const SYMLINK: u8 = b'2';
    pub const CHAR_DEVICE: u8 = b'3';
    pub const BLOCK_DEVICE: u8 = b'4';
    pub const DIRECTORY: u8 = b'5';
    pub const FIFO: u8 = b'6';
    pub const PAX: u8 = b'x';
    pub const GNU_LONG_NAME: u8 = b'L';
    pub const GNU_LONG_LINK: u8 = b'K';
}

/// 2023-11-14T22:13:20Z: images are the same whenever they are built.
pub const MTIME: u64 = 1_700_000_000;

impl Entry {
    pub fn new(kind: u8, name: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self {
            name: name.into(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: MTIME,
            link: Vec::new(),
            device: (0, 0),
            data: Vec::new(),
            pax: Vec::new(),
            claimed_size: None,
        }
    }

    #[must_use]
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    #[must_use]
    pub fn link(mut self, target: impl Into<Vec<u8>>) -> Self {
        self.link = target.into();
        self
    }

    #[must_use]
    pub fn data(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.data = data.into();
        self
    }

    #[must_use]
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.pax
            .push((format!("SCHILY.xattr.{name}"), value.to_vec()));
        self
    }

    fn write(&self, out: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &self.pax {
                pax_record(&mut records, key, value);
            }
            Entry::new(kind::PAX, "PaxHeaders/0", 0o644)
                .data(records)
                .write(out);
        }
        for (long, kind) in [
            (&self.name, kind::GNU_LONG_NAME),
            (&self.link, kind::GNU_LONG_LINK),
        ] {
            if long.len() > 100 {
                let mut data = long.clone();
                data.push(0);
                Entry::new(kind, "././@LongLink", 0o644)
                    .data(data)
                    .write(out);
            }
        }
        let mut header = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8], room: usize| {
            let n = bytes.len().min(room);
            header[at..at + n].copy_from_slice(&bytes[..n]);
        };
        let octal = |value: u64, width: usize| format!("{value:0width$o}\0", width = width - 1);
        let size = self.claimed_size.unwrap_or(self.data.len() as u64);
        put(0, &self.name, 100);
        put(100, octal(self.mode.into(), 8).as_bytes(), 8);
        put(108, octal(self.uid.into(), 8).as_bytes(), 8);
        put(116, octal(self.gid.into(), 8).as_bytes(), 8);
        put(124, octal(size, 12).as_bytes(), 12);
        put(136, octal(self.mtime, 12).as_bytes(), 12);
        put(148, b"        ", 8);
        put(156, &[self.kind], 1);
        put(157, &self.link, 100);
        put(257, b"ustar\x0000", 8);
        put(329, octal(self.device.0.into(), 8).as_bytes(), 8);
        put(337, octal(self.device.1.into(), 8).as_bytes(), 8);
        let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(&self.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

/// "LENGTH KEY=VALUE\n", where the length counts itself.
fn pax_record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// A layer before it is packed.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    entries: Vec<Entry>,
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn entry(mut self, entry: Entry) -> Self {
        self.entries.push(entry);
        self
    }

    #[must_use]
    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.entry(Entry::new(kind::DIRECTORY, format!("{name}/"), mode))
    }

    #[must_use]
    pub fn file(self, name: &str, mode: u32, data: impl Into<Vec<u8>>) -> Self {
        self.entry(Entry::new(kind::FILE, name, mode).data(data))
    }

    #[must_use]
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(Entry::new(kind::SYMLINK, name, 0o777).link(target))
    }

    #[must_use]
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(Entry::new(kind::HARD_LINK, name, 0o755).link(target))
    }

    /// The mark that `name` of a lower layer is gone. Source: OCI image-spec, layer.md.
    #[must_use]
    pub fn whiteout(self, name: &str) -> Self {
        let (dir, base) = name.rsplit_once('/').map_or(("", name), |(d, b)| (d, b));
        let slash = if dir.is_empty() { "" } else { "/" };
        self.file(&format!("{dir}{slash}.wh.{base}"), 0o644, "")
    }

    /// The mark that nothing below `dir` of lower layers shows.
    #[must_use]
    pub fn opaque(self, dir: &str) -> Self {
        self.file(&format!("{dir}/.wh..wh..opq"), 0o644, "")
    }

    /// The tar archive.
    pub fn tar(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in &self.entries {
            entry.write(&mut out);
        }
        out.resize(out.len() + 1024, 0);
        out
    }
}

/// A blob and what a descriptor says of it. A test may make the two differ.
#[derive(Clone, Debug)]
pub struct Blob {
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    pub data: Vec<u8>,
}

impl Blob {
    pub fn new(media_type: &str, data: Vec<u8>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: sha256(&data),
            size: data.len() as u64,
            data,
        }
    }

    pub fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.size})
    }
}

pub fn pack(tar: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => tar.to_vec(),
        Packing::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(tar).expect("a Vec takes everything");
            encoder.finish().expect("a Vec takes everything")
        }
        Packing::Zstd => zstd::encode_all(tar, 1).expect("a Vec takes everything"),
    }
}

/// An image for one platform.
#[derive(Clone, Debug)]
pub struct Image {
    pub manifest: Blob,
    pub config: Blob,
    pub layers: Vec<Blob>,
    pub architecture: String,
}

/// How to make one.
pub struct Builder {
    format: Format,
    architecture: String,
    /// CRI never sees it; the image-spec calls it `config`.
    run: Value,
    layers: Vec<(Blob, String)>,
}

impl Image {
    /// # Panics
    /// Where this machine is neither amd64 nor arm64.
    pub fn builder(format: Format) -> Builder {
        Builder {
            format,
            architecture: native_architecture().to_owned(),
            run: json!({}),
            layers: Vec::new(),
        }
    }

    /// The config's digest: what CRI calls the image's ID.
    pub fn id(&self) -> &str {
        &self.config.digest
    }
}

pub fn native_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => panic!("the tests build no images for {other}"),
    }
}

impl Builder {
    #[must_use]
    pub fn layer(self, layer: &Layer, packing: Packing) -> Self {
        let tar = layer.tar();
        let diff_id = sha256(&tar);
        self.packed_layer(pack(&tar, packing), packing, diff_id)
    }

    /// A layer's bytes as they are, with the diff ID the config shall claim.
    #[must_use]
    pub fn packed_layer(mut self, data: Vec<u8>, packing: Packing, diff_id: String) -> Self {
        self.layers
            .push((Blob::new(self.format.layer(packing), data), diff_id));
        self
    }

    /// The base layer, built and packed once per process.
    #[must_use]
    pub fn base(mut self) -> Self {
        let (data, diff_id) = base_layer();
        let blob = Blob::new(self.format.layer(Packing::Gzip), data.clone());
        self.layers.push((blob, diff_id.clone()));
        self.run["Env"] = json!(["PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        self
    }

    /// One key of the image's `config`: "Env", "Entrypoint", "Cmd", "User" ...
    #[must_use]
    pub fn run(mut self, key: &str, value: Value) -> Self {
        self.run[key] = value;
        self
    }

    #[must_use]
    pub fn architecture(mut self, architecture: &str) -> Self {
        self.architecture = architecture.to_owned();
        self
    }

    pub fn build(self) -> Image {
        let diff_ids: Vec<_> = self.layers.iter().map(|(_, id)| id.clone()).collect();
        let config = json!({
            "created": "2023-11-14T22:13:20Z",
            "architecture": self.architecture,
            "os": "linux",
            "config": self.run,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = Blob::new(self.format.config(), config.to_string().into_bytes());
        let layers: Vec<Blob> = self.layers.into_iter().map(|(blob, _)| blob).collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.format.manifest(),
            "config": config.descriptor(),
            "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
        });
        let manifest = Blob::new(self.format.manifest(), manifest.to_string().into_bytes());
        Image {
            manifest,
            config,
            layers,
            architecture: self.architecture,
        }
    }
}

/// An index of images for several platforms, in this order.
pub fn index(format: Format, images: &[&Image]) -> Blob {
    let manifests: Vec<_> = images
        .iter()
        .map(|image| {
            let mut descriptor = image.manifest.descriptor();
            descriptor["platform"] = json!({"architecture": image.architecture, "os": "linux"});
            descriptor
        })
        .collect();
    let index = json!({
        "schemaVersion": 2,
        "mediaType": format.index(),
        "manifests": manifests,
    });
    Blob::new(format.index(), index.to_string().into_bytes())
}

/// Names in the base image's passwd and group.
pub const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    alice:x:1000:1000:Alice:/home/alice:/bin/sh\n\
    nobody:x:65534:65534:nobody:/:/bin/false\n";
pub const GROUP: &str = "root:x:0:\ndaemon:x:1:\nalice:x:1000:\nstaff:x:50:alice\n\
    builders:x:2000:alice,daemon\nnobody:x:65534:\n";

/// Debian's static busybox and our probe.
fn base_layer() -> &'static (Vec<u8>, String) {
    static BASE: OnceLock<(Vec<u8>, String)> = OnceLock::new();
    BASE.get_or_init(|| {
        let busybox = fs::read("/bin/busybox")
            .expect("/bin/busybox is needed: make setup installs busybox-static");
        let mut layer = Layer::new();
        for dir in [
            "bin", "dev", "etc", "home", "proc", "sys", "usr", "usr/bin", "var", "www",
        ] {
            layer = layer.dir(dir, 0o755);
        }
        layer = layer
            .entry(Entry::new(kind::DIRECTORY, "home/alice/", 0o700).owner(1000, 1000))
            .dir("root", 0o700)
            .dir("tmp", 0o1777)
            .file("bin/busybox", 0o755, busybox)
            .file("bin/probe", 0o755, PROBE)
            .file("bin/setuid-probe", 0o4755, PROBE)
            .file("etc/passwd", 0o644, PASSWD)
            .file("etc/group", 0o644, GROUP)
            .file("etc/hostname", 0o644, "")
            .file("www/index.html", 0o644, "served from the image\n");
        for applet in APPLETS.split_ascii_whitespace() {
            layer = layer.hard_link(&format!("bin/{applet}"), "bin/busybox");
        }
        let tar = layer.tar();
        (pack(&tar, Packing::Gzip), sha256(&tar))
    })
}

/// What the tests call; all of busybox's would be 280 hard links in every unpack.
const APPLETS: &str = "sh cat echo ls id hostname head tail grep sleep true false kill ps wget \
    httpd nc mount umount touch mkdir rm ln stat env pwd printf dd yes unshare chown chmod mknod \
    ip ping sysctl test wc seq sort readlink od df usleep date tr cut nproc setsid";
