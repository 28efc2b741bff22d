//! `berth debug`: what the tests of Berth ask.

use super::Outcome;
use clap::Subcommand;
use std::io::Write as _;

#[derive(Subcommand)]
pub enum Command {
    /// Print the name of every point BERTH_CRASH_AT can name, one a line
    CrashPoints,
}

/// Runs `berth debug …`.
pub fn run(command: Command) -> Outcome {
    match command {
        Command::CrashPoints => {
            let mut out = std::io::stdout().lock();
            for point in crash_points() {
                writeln!(out, "{point}")?;
            }
            Ok(())
        }
    }
}

fn crash_points() -> impl Iterator<Item = &'static str> {
    let lists = [
        berth_sandbox::service::CRASH_POINTS,
        berth_image_service::pull::CRASH_POINTS,
        &berth_netplugin::CRASH_POINTS,
    ];
    lists.into_iter().flatten().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crash_point_has_a_name_of_its_own() {
        let mut points: Vec<_> = crash_points().collect();
        let count = points.len();
        points.sort_unstable();
        points.dedup();
        assert_eq!(points.len(), count);
    }
}
