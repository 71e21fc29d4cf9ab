//! `fulgurite completions`

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::Cli;
use crate::output;

/// Print the completion script of `shell`.
pub fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fulgurite", &mut script);
    Ok(output::piece(&String::from_utf8(script)?)?)
}
