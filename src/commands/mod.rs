//! One file per command: settings from flags, one library call, the result printed.

use anyhow::Result;

use crate::cli::{Cli, Command};

mod completions;
mod doctor;
mod evaluate;
mod export;
mod generate;
mod inspect;
mod report;
mod run;
mod sql;
mod status;

/// Do what the command line asks for.
pub fn dispatch(cli: Cli) -> Result<()> {
    match &cli.command {
        Command::Run(args) => run::run(args, &cli.logging),
        Command::Status(args) => status::status(args),
        Command::Sql(args) => sql::sql(args),
        Command::Report(args) => report::report(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Generate(args) => generate::generate(args),
        Command::Evaluate(args) => evaluate::evaluate(args),
        Command::Export(args) => export::export(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Completions { shell } => completions::completions(*shell),
    }
}
