//! `fulgurite evaluate`

use anyhow::{Context, Result};

use crate::cli::Evaluate;
use crate::commands::existing;
use crate::exit::Usage;
use crate::output;

/// Print the loss of a published model on given ids.
pub fn evaluate(args: &Evaluate) -> Result<()> {
    let model = existing(&args.model)?;
    let text = std::fs::read_to_string(&args.ids).map_err(|e| Usage(format!("{}: {e}", args.ids.display())))?;
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&text)
        .map_err(|e| Usage(format!("{}: not a list of lists of token ids: {e}", args.ids.display())))?;
    let result = train::evaluate(&train::locate(model)?, &sequences).with_context(|| args.ids.display().to_string())?;
    if args.json {
        return output::json(&result);
    }
    Ok(output::line(format!("loss {:.6} nats per token over {} tokens", result.loss, result.tokens))?)
}
