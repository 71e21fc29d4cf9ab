//! The `fulgurite` program: parse, settings, one library call, exit code.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cli;
mod commands;
mod exit;
mod launch;
mod live;
mod logging;
mod output;
mod plan;
mod progress;
mod recipe;
mod source;
mod stop;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    pipeline::allocator::keep_buffers();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    logging::start(&cli.logging);
    let format = cli.logging.log_format;
    exit::code(commands::dispatch(cli), format)
}
