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
    let model = train::published::load(&directory, &train::device::DeviceChoice::Cpu.select()?)?;
    train::published::save(&model, &args.dir, Some(&tokenizer))?;
    Ok(output::line(format!("{}", args.dir.display()))?)
}
