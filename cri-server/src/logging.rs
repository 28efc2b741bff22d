//! The daemon's own log, on standard error, where systemd's journal picks it up.

use crate::config::{LogFormat, LogLevel};
use std::io::IsTerminal as _;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry};

/// Overrides the configured level, in tracing's own syntax.
const VARIABLE: &str = "BERTH_LOG";

/// Changes the level while the daemon runs.
pub struct Handle(reload::Handle<EnvFilter, Registry>);

fn filter(level: LogLevel) -> EnvFilter {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => EnvFilter::builder()
            .with_default_directive(level.into())
            .parse_lossy(text),
        _ => {
            // Below debug, the libraries' own steps are noise even to who debugs Berth.
            let quiet = ["h2", "hyper", "hyper_util", "tower", "rustls", "reqwest"];
            quiet.iter().fold(
                EnvFilter::default().add_directive(level.into()),
                |filter, name| match format!("{name}=warn").parse() {
                    Ok(directive) => filter.add_directive(directive),
                    Err(_) => filter,
                },
            )
        }
    }
}

/// Begins logging; also panics are logged from here on.
pub fn init(level: LogLevel, format: LogFormat) -> Handle {
    let (filter, handle) = reload::Layer::new(filter(level));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    // Fails only when something logs already, which nothing does.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::force_capture();
        tracing::error!(%panic, %backtrace, "panic: a bug in Berth");
    }));
    Handle(handle)
}

impl Handle {
    /// From now on at this level.
    pub fn set_level(&self, level: LogLevel) {
        // Fails only when the subscriber is gone, and it lives as long as the process.
        let _ = self.0.reload(filter(level));
    }
}
