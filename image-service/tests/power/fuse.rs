//! A disk that remembers: a FUSE file system with one file, which keeps every write and every
//! flush in their order. What a power cut would have left can be made of it.
//!
//! Source: linux/fuse.h, protocol 7.31.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

const IN_HEADER: usize = 40;
/// Largest write that is taken, in bytes.
const MAX_WRITE: u32 = 128 << 10;
/// The one file's inode; 1 is the root.
const DISK: u64 = 2;
const NAME: &[u8] = b"disk";

/// What happened to the disk.
pub enum Event {
    Write { offset: usize, data: Vec<u8> },
    Flush,
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    log: Vec<Event>,
    recording: bool,
}

/// The mounted file system; everything is gone when it is dropped.
pub struct Disk {
    point: PathBuf,
    state: Arc<Mutex<State>>,
    server: Option<JoinHandle<()>>,
}

impl Disk {
    /// One of `bytes`, at the empty directory `point`.
    pub fn mount(point: &Path, bytes: usize) -> Disk {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("disk", point, "fuse", flags, Some(options.as_c_str())).unwrap();
        let state = Arc::new(Mutex::new(State {
            content: vec![0; bytes],
            ..State::default()
        }));
        let server = {
            let state = Arc::clone(&state);
            thread::spawn(move || serve(device, &state))
        };
        Disk {
            point: point.into(),
            state,
            server: Some(server),
        }
    }

    pub fn path(&self) -> PathBuf {
        self.point.join("disk")
    }

    /// Forgets what was, and remembers what comes; gives the content of now.
    pub fn record(&self) -> Vec<u8> {
        let mut state = self.state.lock().unwrap();
        state.log.clear();
        state.recording = true;
        state.content.clone()
    }

    /// How many events there were so far.
    pub fn events(&self) -> usize {
        self.state.lock().unwrap().log.len()
    }

    /// Everything since [`Disk::record`].
    pub fn log(&self) -> Vec<Event> {
        let mut state = self.state.lock().unwrap();
        state.recording = false;
        std::mem::take(&mut state.log)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(&self.point, flags);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(mut device: File, state: &Mutex<State>) {
    let mut request = vec![0; MAX_WRITE as usize + 4096];
    // It ends with ENODEV once the file system is unmounted.
    while let Ok(length) = device.read(&mut request) {
        let request = &request[..length];
        let opcode = u32_at(request, 4);
        let unique = u64_at(request, 8);
        let node = u64_at(request, 16);
        let body = &request[IN_HEADER..];
        let answer = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => Ok(init(body)),
            LOOKUP if body.strip_suffix(b"\0") == Some(NAME) => Ok(entry(state)),
            LOOKUP => Err(ENOENT),
            GETATTR | SETATTR => Ok([&u64s(&[3600, 0])[..], &attributes(node, state)].concat()),
            OPEN => Ok(u64s(&[1, 0])),
            READ => {
                let state = state.lock().unwrap();
                let from = (u64_at(body, 8) as usize).min(state.content.len());
                let to = (from + u32_at(body, 16) as usize).min(state.content.len());
                Ok(state.content[from..to].to_vec())
            }
            WRITE => {
                let offset = u64_at(body, 8) as usize;
                let data = &body[40..];
                let mut state = state.lock().unwrap();
                let end = offset + data.len();
                state.content[offset..end].copy_from_slice(data);
                if state.recording {
                    let data = data.to_vec();
                    state.log.push(Event::Write { offset, data });
                }
                Ok(u64s(&[data.len() as u64]))
            }
            FSYNC => {
                let mut state = state.lock().unwrap();
                if state.recording {
                    state.log.push(Event::Flush);
                }
                Ok(Vec::new())
            }
            RELEASE | FLUSH => Ok(Vec::new()),
            _ => Err(ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
        reply.extend_from_slice(&error.to_le_bytes());
        reply.extend_from_slice(&unique.to_le_bytes());
        reply.extend_from_slice(&body);
        // Whoever asked may have been killed meanwhile.
        let _ = device.write(&reply);
    }
}

fn init(body: &[u8]) -> Vec<u8> {
    let mut reply = Vec::new();
    for number in [7, 31, u32_at(body, 8), 0] {
        reply.extend_from_slice(&number.to_le_bytes());
    }
    for number in [16u16, 12] {
        reply.extend_from_slice(&number.to_le_bytes());
    }
    reply.extend_from_slice(&MAX_WRITE.to_le_bytes());
    reply.resize(64, 0);
    reply
}

fn entry(state: &Mutex<State>) -> Vec<u8> {
    let head = u64s(&[DISK, 0, 3600, 3600, 0]);
    [&head[..], &attributes(DISK, state)].concat()
}

fn attributes(node: u64, state: &Mutex<State>) -> Vec<u8> {
    let size = state.lock().unwrap().content.len() as u64;
    let (size, mode) = if node == DISK {
        (size, 0o100600u32)
    } else {
        (0, 0o040700)
    };
    let mut reply = u64s(&[node, size, size / 512, 0, 0, 0]);
    for number in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        reply.extend_from_slice(&number.to_le_bytes());
    }
    reply
}

fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
