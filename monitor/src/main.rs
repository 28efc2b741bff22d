//! The program `berth-monitor`; everything is in the library beside it, where
//! the fuzz targets reach it too.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    berth_monitor::main()
}
