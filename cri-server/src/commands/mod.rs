//! The command line.

mod client;
mod config;
mod debug;
mod doctor;
mod explain;
mod image;
mod status;

use crate::config::Overrides;
use crate::pull_cgroup;
use crate::rpc::chain;
use clap::{Args, Parser, Subcommand};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

/// A Kubernetes container runtime: pods, containers and images behind CRI v1.
#[derive(Parser)]
#[command(name = "berth", version, max_term_width = 100)]
#[command(
    after_help = "The kubelet and crictl talk to the socket of `berth serve`, by default \
unix:///run/berth/berth.sock.\nEvery setting is explained by `berth config default`."
)]
struct Cli {
    #[command(flatten)]
    places: PlaceArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct PlaceArgs {
    /// Keep everything below DIR: DIR/etc (configuration), DIR/lib (images, records), DIR/run
    /// (socket). Without it: /etc/berth, /var/lib/berth, /run/berth
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Read this file alone instead of config.toml and conf.d/*.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The daemon's unix socket; wins over grpc.socket
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl From<PlaceArgs> for Overrides {
    fn from(places: PlaceArgs) -> Overrides {
        Overrides {
            root: places.root,
            config: places.config,
            socket: places.socket,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    ///
    /// Needs root. Runs in the foreground and logs to standard error. SIGTERM and SIGINT stop the
    /// daemon; containers and their logs go on and the next `berth serve` finds them. SIGHUP reads
    /// the log level again.
    Serve,
    /// Show what the daemon is doing now
    ///
    /// Lists running operations with their stage and how long they have been in it, and what is
    /// left to do in the background.
    Status,
    /// Look at this node: what keeps pods from running, or will
    ///
    /// Needs no daemon and changes nothing. Fails if a problem was found.
    Doctor(doctor::Options),
    /// Print or check the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Pull, list and remove images
    #[command(subcommand)]
    Image(image::Command),
    /// Show why the daemon does what it does
    #[command(subcommand)]
    Explain(explain::Command),
    /// Print versions: this program's and, where it answers, the daemon's
    Version,
    /// Write one layer of an image: what the daemon runs in images.pull_cgroup
    #[command(name = pull_cgroup::COMMAND, hide = true)]
    WriteLayer,
    /// For tests of Berth itself
    #[command(subcommand, hide = true)]
    Debug(debug::Command),
}

/// What a command may end with: any error, told with its causes.
type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let places = Overrides::from(cli.places);
    let outcome = match cli.command {
        Command::Serve => crate::serve::serve(&places).map_err(Into::into),
        Command::Status => status::status(&places),
        Command::Doctor(options) => doctor::doctor(&options, &places),
        Command::Config(command) => config::run(command, &places),
        Command::Image(command) => image::run(command, &places),
        Command::Explain(command) => explain::run(command, &places),
        Command::Version => client::version(&places),
        Command::WriteLayer => pull_cgroup::write_layer(),
        Command::Debug(command) => debug::run(command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Somebody's `head` has seen enough.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn places_may_stand_before_or_after_the_command() {
        for line in [
            ["berth", "--root", "/r", "serve"],
            ["berth", "serve", "--root", "/r"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.places.root, Some("/r".into()));
        }
    }
}
