//! `fulgurite bench`

use anyhow::Result;
use train::bench::{AttentionShape, AttentionTime};

use crate::cli::{Bench, BenchAttention};
use crate::exit::Usage;
use crate::output;

/// Measure what is asked for.
pub fn bench(what: &Bench) -> Result<()> {
    match what {
        Bench::Attention(args) => attention(args),
    }
}

fn attention(args: &BenchAttention) -> Result<()> {
    let shapes = args.shapes.iter().map(|text| shape(text, args.width)).collect::<Result<Vec<_>, Usage>>()?;
    let choice: train::device::DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
    let device = choice.select()?;
    if !args.json {
        output::line("  B   H       T  pass       time ms  floor ms  ratio   TB/s")?;
    }
    let mut printed = Ok(());
    train::bench::attention(&device, &shapes, args.document_tokens, args.silu, |time| {
        if printed.is_ok() {
            printed = if args.json { output::json(time) } else { output::line(row(time)).map_err(Into::into) };
        }
    })?;
    printed
}

fn row(time: &AttentionTime) -> String {
    let AttentionShape { rows, heads, tokens, .. } = time.shape;
    format!(
        "{rows:>3} {heads:>3} {tokens:>7}  {:<8} {:>9.4} {:>9.4} {:>6.2} {:>6.2}",
        time.pass,
        time.time_ms,
        time.floor_ms,
        time.time_ms / time.floor_ms,
        time.achieved_tb_per_s
    )
}

fn shape(text: &str, width: usize) -> Result<AttentionShape, Usage> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[rows, heads, tokens]) => Ok(AttentionShape { rows, heads, tokens, width }),
        _ => Err(Usage(format!("--shape {text}: not rows,heads,tokens such as 4,32,2048"))),
    }
}
