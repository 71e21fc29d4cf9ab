//! `fulgurite export`

use anyhow::Result;

use crate::cli::Export;
use crate::commands::existing;
use crate::commands::generate::tokenizer_of;
use crate::output;

/// Write a checkpoint in the published layout.
pub fn export(args: &Export) -> Result<()> {
    let directory = train::locate(existing(&args.checkpoint)?)?;
    let tokenizer = tokenizer_of(&directory, args.tokenizer.as_deref())?;
    train::published::copy(&directory, &args.dir, Some(&tokenizer))?;
    Ok(output::line(format!("{}", args.dir.display()))?)
}
