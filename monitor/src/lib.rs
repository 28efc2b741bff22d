//! `berth-monitor`: one per pod, the parent of everything in it.
//!
//! ```text
//! berth-monitor --pod ID --listen-fd 3 [--line-bytes N]
//! berth-monitor --user-namespace                    (see `user_namespace`)
//! berth-monitor --hooks                             (see `hooks`)
//! berth-monitor --gate PROGRAM [ARGUMENT]...        (see `gate`)
//! ```
//!
//! It makes the pod's namespaces, launches containers and execs, reaps, keeps
//! the logs (through one logger per container) and writes exits down. Daemons
//! come and go; it answers whoever connects to its socket.
//!
//! Where to read: `monitor` is the waiting loop and all state. Everything else
//! runs in its children: `namespaces`, `init` (with `rootfs`, `beneath`,
//! `become_program`, `hooks`), `exec`, `log` (with `line`), `reaper`. `wire` is a
//! client's connection, `status` what children report.
#![forbid(unsafe_code)]

mod become_program;
mod beneath;
mod exec;
mod gate;
mod hooks;
mod init;
pub mod line;
pub mod log;
mod monitor;
mod namespaces;
mod oci_runtime;
mod reaper;
mod rootfs;
mod status;
mod user_namespace;
mod wire;

use std::process::ExitCode;

/// Runs the program: reads the command line, serves until the pod is gone.
pub fn main() -> ExitCode {
    if std::env::args().skip(1).eq(["--user-namespace"]) {
        return match user_namespace::hold() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("berth-monitor: cannot make a user namespace: {error}");
                ExitCode::FAILURE
            }
        };
    }
    if std::env::args().skip(1).eq(["--hold"]) {
        return hold();
    }
    if std::env::args().skip(1).eq(["--hooks"]) {
        return hooks::serve_daemon();
    }
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "--gate") {
        return gate::pass(arguments);
    }
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("berth-monitor: {why}");
            eprintln!("usage: berth-monitor --pod ID --listen-fd N [--line-bytes N]");
            return ExitCode::from(2);
        }
    };
    match monitor::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let errno = rustix::io::Errno::from_raw_os_error(error.errno);
            eprintln!("berth-monitor: {error}: {errno}");
            ExitCode::FAILURE
        }
    }
}

/// Does nothing until its stdin ends: the daemon holds a systemd scope open with it
/// while the scope is limited and entered.
fn hold() -> ExitCode {
    let mut byte = [0];
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut byte) {
            Ok(0) | Err(_) => return ExitCode::SUCCESS,
            Ok(_) => {}
        }
    }
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// The pod's ID.
    pub pod: String,
    /// The listening socket this process was started with.
    pub listen_fd: i32,
    /// Longest log line where a request says nothing, in bytes.
    pub line_bytes: usize,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut args = args;
        let (mut pod, mut listen_fd, mut line_bytes) = (None, None, log::DEFAULT_LINE_BYTES);
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} has no value"))?;
            let bad = |_| format!("{name} {value} is no number");
            match name.as_str() {
                "--pod" => pod = Some(value),
                "--listen-fd" => listen_fd = Some(value.parse().map_err(bad)?),
                "--line-bytes" => line_bytes = value.parse().map_err(bad)?,
                _ => return Err(format!("{name} is no option")),
            }
        }
        Ok(Options {
            pod: pod.ok_or("--pod is missing")?,
            listen_fd: listen_fd.ok_or("--listen-fd is missing")?,
            line_bytes: line_bytes.clamp(1, log::MAX_LINE_BYTES),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_or_refused() {
        let parse = |line: &str| Options::parse(line.split_whitespace().map(String::from));
        let options = parse("--pod web --listen-fd 3").unwrap();
        assert_eq!(
            (options.pod.as_str(), options.listen_fd, options.line_bytes),
            ("web", 3, 16384)
        );
        for bad in [
            "",
            "--pod web",
            "--pod",
            "--pod w --listen-fd x",
            "--what 1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
