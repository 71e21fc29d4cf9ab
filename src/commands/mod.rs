//! One file per command: settings from flags, one library call, the result printed.

use std::path::Path;

use anyhow::Result;

use crate::cli::{Cli, Command};
use crate::exit::Usage;

mod bench;
mod classifier;
mod completions;
mod dedup;
mod doctor;
mod evaluate;
mod export;
mod generate;
mod inspect;
mod report;
mod review;
mod run;
mod sql;
mod stats;
mod status;
mod tokenizer;
mod train;

/// A path of the command line that has to be there.
fn existing(path: &Path) -> Result<&Path, Usage> {
    if path.exists() { Ok(path) } else { Err(Usage(format!("{}: no such file or directory", path.display()))) }
}

/// Do what the command line asks for.
pub fn dispatch(cli: Cli) -> Result<()> {
    match &cli.command {
        Command::Run(args) => run::run(args, &cli.logging),
        Command::Train(args) => train::train(args, &cli.logging),
        Command::Status(args) => status::status(args),
        Command::Sql(args) => sql::sql(args),
        Command::Report(args) => report::report(args),
        Command::Review(args) => review::review(args),
        Command::Classifier(what) => classifier::classifier(what),
        Command::Dedup(args) => dedup::dedup(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Stats(args) => stats::stats(args),
        Command::Tokenizer(args) => tokenizer::tokenizer(args, &cli.logging),
        Command::Generate(args) => generate::generate(args),
        Command::Evaluate(args) => evaluate::evaluate(args),
        Command::Export(args) => export::export(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Bench { what } => bench::bench(what),
        Command::Completions { shell } => completions::completions(*shell),
    }
}
