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
        "serve" => serve(arg(1), arg(2)),
        "fetch" => fetch(arg(1)),
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
