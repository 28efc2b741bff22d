//! Images of a certain weight, for measuring pulls: files as images have them, compressible to
//! about two fifths, different in every run's every layer.

use crate::image::{Builder, Format, Image, Layer, Packing};

/// What an image is to weigh.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    pub name: &'static str,
    pub layers: usize,
    pub files_in_layer: usize,
    pub file_bytes: usize,
}

/// The images pulls are measured with: about 50 MiB compressed in 5 layers, 500 MiB in 10, and
/// one of 100,000 files.
pub const WEIGHTS: [Weight; 3] = [
    Weight {
        name: "50mib",
        layers: 5,
        files_in_layer: 1000,
        file_bytes: 26_000,
    },
    Weight {
        name: "500mib",
        layers: 10,
        files_in_layer: 1300,
        file_bytes: 100_000,
    },
    Weight {
        name: "100k-files",
        layers: 4,
        files_in_layer: 25_000,
        file_bytes: 700,
    },
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Bytes of which gzip leaves about two fifths: noise between words that come again.
fn content(random: &mut Random, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count + 64);
    while bytes.len() < count {
        let draw = random.next();
        if draw % 16 < 5 {
            bytes.extend_from_slice(&random.next().to_le_bytes());
            bytes.extend_from_slice(&random.next().to_le_bytes());
        } else {
            let word = draw >> 8 & 0xff;
            bytes.extend_from_slice(format!("word-{word:03}-of-a-library ").as_bytes());
        }
    }
    bytes.truncate(count);
    bytes
}

impl Weight {
    /// The image; `seed` makes it another one.
    pub fn image(&self, seed: u64) -> Image {
        let mut builder: Builder = Image::builder(Format::Oci);
        let mut random = Random(seed | 1);
        for nth in 0..self.layers {
            let mut layer = Layer::new();
            for file in 0..self.files_in_layer {
                if file % 50 == 0 {
                    layer = layer.dir(&format!("layer-{nth}-{}", file / 50), 0o755);
                }
                // Some are much larger than others.
                let bytes = match file % 10 {
                    0 => self.file_bytes * 5,
                    _ => self.file_bytes * 5 / 9,
                };
                let data = content(&mut random, bytes);
                layer = layer.file(&format!("layer-{nth}-{}/{file}", file / 50), 0o644, data);
            }
            builder = builder.layer(&layer, Packing::Gzip);
        }
        builder.build()
    }
}
