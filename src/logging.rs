//! Logs go to stderr: `-q`, `-v`, `RUST_LOG`, `--log-format json`.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::cli::{LogFormat, Logging};
use crate::output;

/// Start the subscriber. `RUST_LOG` wins over `-q` and `-v`.
pub fn start(logging: &Logging) {
    // What all ranks of a training run would say alike is said by rank 0.
    let follows = std::env::var("RANK").is_ok_and(|rank| rank != "0");
    let level = match (logging.quiet || follows && logging.verbose == 0, logging.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info,datafusion=warn",
        (false, 2) => "debug,datafusion=info",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match logging.log_format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.with_ansi(output::colour(&io::stderr())).init(),
    }
}
