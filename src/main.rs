//! The `fulgurite` program: parse, settings, one library call, exit code.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cli;
mod commands;
mod exit;
mod logging;
mod output;
mod plan;
mod progress;
mod recipe;
mod stop;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    logging::start(&cli.logging);
    exit::code(commands::dispatch(cli))
}
