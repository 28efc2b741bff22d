//! What the tests run inside containers: looks at the process it is and at what
//! it can reach, and prints what it found. Static, std only, no unsafe.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

fn main() -> io::Result<()> {
    let args: Vec<_> = env::args().skip(1).collect();
    let arg = |n: usize| args.get(n).map_or("", String::as_str);
    match arg(0) {
        "status" => status(),
        "fds" => fds(),
        "env" => show_env(),
        "args" => show_args(),
        "eat" => eat(number(arg(1))),
        "spew" => spew(number(arg(1)), arg(2) == "stderr"),
        "talk" => talk(number(arg(1)) as u64, number(arg(2)) as u64),
        "serve" => serve(arg(1), arg(2)),
        "fetch" => fetch(arg(1)),
        "ports" => ports(arg(1)),
        "open" => open(arg(1)),
        "sleep" | "" => loop {
            thread::sleep(Duration::from_secs(3600));
        },
        other => Err(io::Error::other(format!("probe does not know {other:?}"))),
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| panic!("{text:?} is not a number"))
}

/// Who this process is: the lines of its status file that say so.
fn status() -> io::Result<()> {
    const WANTED: [&str; 11] = [
        "Uid", "Gid", "Groups", "NSpid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
        "NoNewPrivs", "Seccomp",
    ];
    for line in fs::read_to_string("/proc/self/status")?.lines() {
        let name = line.split(':').next().unwrap_or("");
        if WANTED.contains(&name) || name == "Umask" {
            println!("{line}");
        }
    }
    Ok(())
}

/// Every open descriptor and what it is, the one that lists them left out.
fn fds() -> io::Result<()> {
    let names: Vec<_> = fs::read_dir("/proc/self/fd")?.flatten().map(|e| e.path()).collect();
    for path in names {
        if let Ok(target) = fs::read_link(&path) {
            println!("{} {}", path.file_name().unwrap_or_default().display(), target.display());
        }
    }
    Ok(())
}

/// NAME=hex of the value: a value is bytes.
fn show_env() -> io::Result<()> {
    for (name, value) in env::vars_os() {
        let hex: String = value.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
        println!("{}={hex}", name.display());
    }
    Ok(())
}

/// The arguments after the first, one a line, then the working directory.
fn show_args() -> io::Result<()> {
    for arg in env::args_os().skip(2) {
        io::stdout().write_all(&arg.into_vec())?;
        println!();
    }
    println!("cwd {}", env::current_dir()?.display());
    Ok(())
}

/// Takes memory and touches every page of it, then waits.
fn eat(bytes: usize) -> io::Result<()> {
    let mut memory = vec![0u8; bytes];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    println!("ate {}", memory.len());
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn spew(bytes: usize, to_stderr: bool) -> io::Result<()> {
    let mut out: Box<dyn Write> =
        if to_stderr { Box::new(io::stderr()) } else { Box::new(io::stdout().lock()) };
    let block = [b'x'; 65536];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(block.len());
        out.write_all(&block[..n])?;
        left -= n;
    }
    out.flush()
}

/// Writes at least so many bytes in lines of 0 bytes to 1 MiB to both streams,
/// in an order that follows from the seed. `log_torture.rs` knows what comes.
fn talk(seed: u64, bytes: u64) -> io::Result<()> {
    let letters: Vec<u8> = (0..(1 << 20) + 26).map(|at| b'a' + (at % 26) as u8).collect();
    let mut random = seed.wrapping_mul(2).wrapping_add(1);
    let (mut counts, mut written) = ([0_u64; 2], 0);
    let (mut out, mut err) = (io::stdout().lock(), io::stderr());
    let mut text = Vec::new();
    while written < bytes {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let stream = (random >> 8 & 1) as usize;
        let length = match random >> 9 & 255 {
            0 => (random >> 20) % ((1 << 20) + 1),
            1..=16 => (random >> 20) % 20_000,
            17..=32 => 0,
            _ => (random >> 20) % 200,
        } as usize;
        let at = (counts[stream] % 26) as usize;
        text.clear();
        text.extend_from_slice(&letters[at..at + length]);
        text.push(b'\n');
        if length >= 32 {
            let name = format!("<{seed} {}>", counts[stream]);
            text[..name.len()].copy_from_slice(name.as_bytes());
        }
        match stream {
            0 => {
                out.write_all(&text)?;
                out.flush()?;
            }
            _ => err.write_all(&text)?,
        }
        counts[stream] += 1;
        written += text.len() as u64;
    }
    Ok(())
}

/// Answers every TCP connection on a port with a text and the peer's address.
fn serve(port: &str, text: &str) -> io::Result<()> {
    let port: u16 = port.parse().expect("a port");
    let listener =
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("listening");
    for stream in listener.incoming() {
        let mut stream = stream?;
        let peer = stream.peer_addr()?.ip();
        let _ = writeln!(stream, "{text} {peer}");
    }
    Ok(())
}

/// Connects, as soon as somebody listens, and prints all that comes.
fn fetch(address: &str) -> io::Result<()> {
    let address = address.to_socket_addrs()?.next().expect("an address");
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => break stream,
            Err(err) if Instant::now() > deadline => return Err(err),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    print!("{text}");
    Ok(())
}

/// Tries to open a path for reading and for writing; says how each went.
fn open(path: &str) -> io::Result<()> {
    let read = fs::File::open(path).and_then(|mut f| f.read(&mut [0u8; 64]));
    let write = fs::OpenOptions::new().append(true).open(path);
    let show = |error: Option<io::Error>| match error {
        None => "ok".to_owned(),
        Some(error) => format!("{:?}", error.kind()),
    };
    println!("read {} write {}", show(read.err()), show(write.err()));
    Ok(())
}

/// Listens for ever; the first byte of each connection says what becomes of it:
///
/// - `e`: what comes is sent back, to the end;
/// - `c`: what comes is counted, and the number sent once it has ended;
/// - `b`: broken (reset) as soon as there is more than was read;
/// - `s`: nothing is read any more, until it is reset;
/// - `x` and a length of 8 bytes: as much of [`noise`] is sent while what comes is summed up,
///   and the sum follows.
fn ports(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("listening");
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(err) = serve_one(stream) {
                println!("broken: {err}");
            }
        });
    }
    Ok(())
}

fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    let mut what = [0];
    stream.read_exact(&mut what)?;
    match what[0] {
        b'e' => {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length => stream.write_all(&buffer[..length])?,
                }
            }
        }
        b'c' => {
            let count = io::copy(&mut stream, &mut io::sink())?;
            stream.write_all(count.to_string().as_bytes())
        }
        b'b' => {
            // What is closed unread is reset.
            stream.peek(&mut what)?;
            Ok(())
        }
        b's' => loop {
            // Reading would find what waits to be read first.
            if let Some(err) = stream.take_error()? {
                return Err(err);
            }
            thread::sleep(Duration::from_millis(20));
        },
        b'x' => {
            let mut length = [0; 8];
            stream.read_exact(&mut length)?;
            let length = u64::from_le_bytes(length);
            let mut reading = stream.try_clone()?;
            let sum = thread::spawn(move || sum_of(&mut reading));
            noise(length, |piece| stream.write_all(piece))?;
            let sum = sum.join().expect("summing up does not panic")?;
            stream.write_all(&sum.to_le_bytes())
        }
        other => Err(io::Error::other(format!("{other} is nothing to be done"))),
    }
}

/// `length` bytes that repeat only after 2^64 words, in pieces.
fn noise(length: u64, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let (mut state, mut left) = (0x9e37_79b9_7f4a_7c15u64, length);
    let mut piece = vec![0; 64 << 10];
    while left > 0 {
        for word in piece.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let now = left.min(piece.len() as u64);
        each(&piece[..now as usize])?;
        left -= now;
    }
    Ok(())
}

/// FNV-1a over words of 8 bytes, the last one filled up with zeros.
fn sum_of(from: &mut impl Read) -> io::Result<u64> {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    let mut buffer = vec![0; 64 << 10];
    let mut filled = 0;
    loop {
        let read = from.read(&mut buffer[filled..])?;
        filled += read;
        let whole = if read == 0 { filled.next_multiple_of(8) } else { filled / 8 * 8 };
        if read == 0 {
            buffer[filled..whole].fill(0);
        }
        for word in buffer[..whole].chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            sum = (sum ^ word).wrapping_mul(0x100_0000_01b3);
        }
        if read == 0 {
            return Ok(sum);
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}
