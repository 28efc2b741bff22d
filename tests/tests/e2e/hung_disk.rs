//! A file system on which files can be made but not written: a write is never
//! answered, as by a dead file server.
//!
//! Source: linux/fuse.h, protocol 7.31.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const CREATE: u32 = 35;
/// Inode and mode of every file.
const FILE: (u64, u32) = (2, 0o100_644);

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// Longest request the kernel may send, in bytes.
const REQUEST_BYTES: usize = 1 << 20;

/// Mounted until dropped; then whoever waits for it gets an error.
pub struct HungDisk {
    path: PathBuf,
    written: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl HungDisk {
    pub fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        mount(
            Some("hung"),
            path,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        let written = Arc::new(AtomicBool::new(false));
        let seen = written.clone();
        let server = std::thread::spawn(move || serve(device, &seen));
        Self {
            path: path.to_owned(),
            written,
            server: Some(server),
        }
    }

    /// Somebody waits for a write.
    pub fn is_written_to(&self) -> bool {
        self.written.load(Ordering::SeqCst)
    }
}

impl Drop for HungDisk {
    fn drop(&mut self) {
        // Forced: requests that wait are failed, and the server reads its end.
        let _ = umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(mut device: File, written: &AtomicBool) {
    let mut request = vec![0; REQUEST_BYTES];
    // ENODEV once it is unmounted.
    while let Ok(count) = device.read(&mut request) {
        let request = &request[..count];
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let unique = &request[8..16];
        let answer = match word(4) {
            INIT => Ok(init()),
            LOOKUP => Err(ENOENT),
            GETATTR => {
                let file = word(16) == 2;
                let (inode, mode) = if file { FILE } else { (1, 0o040_755) };
                Ok([vec![0; 16], attributes(inode, mode)].concat())
            }
            CREATE => Ok([entry(), opened()].concat()),
            WRITE => {
                written.store(true, Ordering::SeqCst);
                continue;
            }
            // FORGET and BATCH_FORGET want no answer.
            2 | 42 => continue,
            _ => Err(ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut reply = length.to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(unique);
        reply.extend(body);
        // One that was given up meanwhile is not there any more.
        let _ = device.write(&reply);
    }
}

/// struct fuse_init_out: version 7.31, writes of 128 KiB, nothing special.
fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for word in [7_u32, 31, 0, 0, 0, 128 << 10, 1, 0] {
        body.extend(word.to_ne_bytes());
    }
    body.resize(64, 0);
    body
}

/// struct fuse_entry_out of file 2, good for an hour.
fn entry() -> Vec<u8> {
    let mut body = Vec::new();
    for long in [2_u64, 0, 3600, 3600] {
        body.extend(long.to_ne_bytes());
    }
    body.extend(0_u64.to_ne_bytes());
    body.extend(attributes(FILE.0, FILE.1));
    body
}

/// struct fuse_open_out with FOPEN_DIRECT_IO: nothing is cached.
fn opened() -> Vec<u8> {
    let mut body = 7_u64.to_ne_bytes().to_vec();
    body.extend(1_u32.to_ne_bytes());
    body.extend(0_u32.to_ne_bytes());
    body
}

/// struct fuse_attr.
fn attributes(inode: u64, mode: u32) -> Vec<u8> {
    let mut body = inode.to_ne_bytes().to_vec();
    body.resize(60, 0);
    body.extend(mode.to_ne_bytes());
    body.extend(1_u32.to_ne_bytes());
    body.resize(88, 0);
    body
}
