//! `fulgurite tokenizer`

use std::path::Path;

use anyhow::{Context, Result};
use pipeline::manifest::replace_file;

use crate::cli::{Logging, Run, Tokenizer, TokenizerCommand};
use crate::commands::run;
use crate::exit::Usage;
use crate::output;
use crate::recipe::Recipe;
use crate::source::Source;

/// Train a tokenizer: the part of a run that ends with it.
pub fn tokenizer(args: &Tokenizer, logging: &Logging) -> Result<()> {
    let TokenizerCommand::Train(args) = &args.command;
    if args.run.until.is_some() {
        return Err(Usage("--until: a training of a tokenizer ends with the stage tokenizer".into()).into());
    }
    let source = Source::read(&args.run.recipe, &args.run.set)?;
    let recipe = Recipe::load(&source)?;
    if recipe.tokenize.is_none() {
        return Err(source.refuse("add a [tokenize] table (it may be empty): it says what to train").into());
    }
    run::run(&Run { until: Some("tokenizer".into()), ..args.run.clone() }, logging)?;
    if args.run.dry_run {
        return Ok(());
    }
    let dir = args.run.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.name));
    let trained = tokenize::tokenizer_path(&dir);
    let mut path = &trained;
    if let Some(output) = &args.output {
        let json = std::fs::read(&trained).with_context(|| trained.display().to_string())?;
        replace_file(output, &json)?;
        path = output;
    }
    match args.run.json {
        true => Ok(()),
        false => Ok(output::line(format!("\n{}", path.display()))?),
    }
}
