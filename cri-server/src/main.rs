//! `berth`: the daemon that speaks CRI, and the command line beside it.
#![forbid(unsafe_code)]
#![allow(dead_code)]

mod config;
mod convert;

fn main() {
    print!("{}", config::Config::default().to_commented_toml());
}
