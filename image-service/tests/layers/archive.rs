//! Archives byte for byte, right and wrong ones.

/// A tar archive being written.
#[derive(Clone, Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// One entry; what is not set is a regular file of root's, 0644, of 1970.
#[derive(Clone)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: u8,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub device: (u32, u32),
    pub data: Vec<u8>,
    /// What the header says, where it is not the truth.
    pub size: Option<u64>,
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    pub fn new(path: impl AsRef<[u8]>, kind: u8) -> Entry {
        Entry {
            path: path.as_ref().to_vec(),
            kind,
            link: Vec::new(),
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: 0,
            device: (0, 0),
            data: Vec::new(),
            size: None,
            pax: Vec::new(),
        }
    }

    pub fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Entry {
        self.pax.push((key.into(), value.as_ref().to_vec()));
        self
    }
}

impl Tar {
    pub fn new() -> Tar {
        Tar::default()
    }

    pub fn file(self, path: &str, data: &str) -> Tar {
        let mut entry = Entry::new(path, b'0');
        entry.data = data.into();
        self.entry(&entry)
    }

    pub fn dir(self, path: &str) -> Tar {
        self.entry(&Entry::new(path, b'5'))
    }

    pub fn symlink(self, path: &str, target: &str) -> Tar {
        let mut entry = Entry::new(path, b'2');
        entry.link = target.into();
        self.entry(&entry)
    }

    pub fn hard_link(self, path: &str, target: &str) -> Tar {
        let mut entry = Entry::new(path, b'1');
        entry.link = target.into();
        self.entry(&entry)
    }

    pub fn device(self, path: &str, major: u32, minor: u32) -> Tar {
        let mut entry = Entry::new(path, b'3');
        entry.device = (major, minor);
        self.entry(&entry)
    }

    pub fn entry(mut self, entry: &Entry) -> Tar {
        self.push(entry);
        self
    }

    pub fn push(&mut self, entry: &Entry) {
        let mut pax = entry.pax.clone();
        if entry.path.len() > 100 {
            pax.push((b"path".to_vec(), entry.path.clone()));
        }
        if entry.link.len() > 100 {
            pax.push((b"linkpath".to_vec(), entry.link.clone()));
        }
        if !pax.is_empty() {
            self.raw_header(&header(b"pax", b'x', records(&pax).len() as u64));
            self.padded(&records(&pax));
        }
        let mut block = header(
            &entry.path[..entry.path.len().min(100)],
            entry.kind,
            entry.size.unwrap_or(entry.data.len() as u64),
        );
        octal(&mut block[100..108], entry.mode.into());
        octal(&mut block[108..116], entry.uid);
        octal(&mut block[116..124], entry.gid);
        octal(&mut block[136..148], entry.mtime);
        let link = &entry.link[..entry.link.len().min(100)];
        block[157..157 + link.len()].copy_from_slice(link);
        octal(&mut block[329..337], entry.device.0.into());
        octal(&mut block[337..345], entry.device.1.into());
        self.raw_header(&block);
        self.padded(&entry.data.clone());
    }

    /// A header as it is, but for its checksum.
    pub fn raw_header(&mut self, block: &[u8; 512]) {
        let mut block = *block;
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        octal(&mut block[148..155], sum);
        self.bytes.extend_from_slice(&block);
    }

    pub fn padded(&mut self, data: &[u8]) {
        self.bytes.extend_from_slice(data);
        let rest = self.bytes.len().next_multiple_of(512) - self.bytes.len();
        self.bytes.extend(std::iter::repeat_n(0, rest));
    }

    /// With the end marker.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.extend([0; 1024]);
        bytes
    }

    pub fn bytes_without_end(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Takes what was written so far, for archives too long for memory.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

pub fn header(path: &[u8], kind: u8, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    block[..path.len()].copy_from_slice(path);
    octal(&mut block[100..108], 0o644);
    octal(&mut block[108..116], 0);
    octal(&mut block[116..124], 0);
    octal(&mut block[124..136], size);
    octal(&mut block[136..148], 0);
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block
}

pub fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    assert!(text.len() <= digits, "{value} does not fit");
    field[..digits].copy_from_slice(text.as_bytes());
    field[digits] = 0;
}

/// PAX records, each with the length of itself.
pub fn records(pax: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in pax {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length += 1;
        }
        bytes.extend(length.to_string().into_bytes());
        bytes.push(b' ');
        bytes.extend(key);
        bytes.push(b'=');
        bytes.extend(value);
        bytes.push(b'\n');
    }
    bytes
}
