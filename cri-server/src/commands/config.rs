//! `berth config`: the defaults explained, and the files checked.

use super::Outcome;
use crate::config::{Config, Layout, Overrides};
use clap::Subcommand;
use std::io::Write as _;

#[derive(Subcommand)]
pub enum Command {
    /// Print every setting with its default, unit and explanation, as a file that can be used
    Default,
    /// Check all configuration files; the first mistake is told with its file and line
    Check,
}

/// Runs `berth config …`.
pub fn run(command: Command, places: &Overrides) -> Outcome {
    let mut out = std::io::stdout().lock();
    match command {
        Command::Default => {
            write!(out, "{}", Config::default().to_commented_toml())?;
        }
        Command::Check => {
            let layout = Layout::find(places)?;
            let config = Config::load(&layout)?;
            let files = layout.config_files()?;
            if files.is_empty() {
                writeln!(
                    out,
                    "no configuration files below {}: the defaults apply",
                    layout.etc.display()
                )?;
            }
            for file in files {
                writeln!(out, "{}: good", file.display())?;
            }
            writeln!(out, "socket: {}", layout.places(&config).socket.display())?;
        }
    }
    Ok(())
}
