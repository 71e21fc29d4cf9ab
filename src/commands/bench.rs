//! `fulgurite bench`

use anyhow::Result;
use train::bench::{AttentionShape, AttentionTime};

use crate::cli::{Bench, BenchAttention, BenchGenerate, BenchTrain};
use crate::exit::Usage;
use crate::output;
use crate::source::Source;

/// Measure what is asked for.
pub fn bench(what: &Bench) -> Result<()> {
    match what {
        Bench::Attention(args) => attention(args),
        Bench::Train(args) => training(args),
        Bench::Generate(args) => generation(args),
    }
}

fn generation(args: &BenchGenerate) -> Result<()> {
    let mut config = train::ModelConfig::named(&args.size).ok_or_else(|| Usage(format!("no size {:?}", args.size)))?;
    if config.vocab_size == 0 {
        config.vocab_size = 2048;
    }
    let choice: train::device::DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
    let device = choice.select()?;
    if !args.json {
        output::line(" rows   context   read tok/s    tokens/s  state bytes  device memory")?;
    }
    let mut printed = Ok(());
    train::bench::generation(&device, &config, &args.rows, &args.context, args.tokens, |time| {
        if printed.is_ok() {
            let memory = time.memory_bytes.map_or(String::new(), output::bytes);
            printed = if args.json {
                output::json(time)
            } else {
                output::line(format!(
                    "{:>5} {:>9} {:>12.0} {:>11.1} {:>12} {:>14}",
                    time.rows, time.context, time.read_tokens_per_s, time.tokens_per_s, time.state_bytes, memory
                ))
                .map_err(Into::into)
            };
        }
    })?;
    printed
}

fn training(args: &BenchTrain) -> Result<()> {
    let text = format!(
        "batch = {}\nsequence_length = {}\ngradient_accumulation = {}\n[model]\nsize = {:?}\n",
        args.batch, args.length, args.accumulate, args.size
    );
    let mut config: train::TrainConfig = Source::of("the bench's settings", text, &args.set).parse()?;
    if config.model.vocab_size == 0 {
        // The small sizes take theirs from a tokenizer.
        config.model.vocab_size = 2048;
    }
    let choice: train::device::DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
    let time = train::bench::training(&choice.select()?, &config, args.steps)?;
    if args.json {
        return output::json(&time);
    }
    let mfu = time.mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
    let memory =
        time.memory_bytes.map_or(String::new(), |bytes| format!(", {} of device memory", output::bytes(bytes)));
    output::line(format!(
        "{} parameters, {} tokens a step: {:.2} ms, {} tokens/s{mfu}{memory}; loss {:.4} to {:.4}",
        output::thousands(time.parameters as u64),
        output::thousands(time.tokens_per_step),
        time.step_ms,
        output::thousands(time.tokens_per_s as u64),
        time.loss[0],
        time.loss[1],
    ))?;
    if !time.kernels.is_empty() {
        let mut rows = vec![["phase", "kernel", "calls", "ms a step"].map(String::from).to_vec()];
        let sum: f64 = time.kernels.iter().map(|kernel| kernel.total_ms).sum();
        rows.extend(time.kernels.iter().take(args.kernels).map(|kernel| {
            vec![
                kernel.phase.to_string(),
                kernel.name.clone(),
                kernel.count.to_string(),
                format!("{:.3}", kernel.total_ms),
            ]
        }));
        rows.push(vec!["all".into(), String::new(), String::new(), format!("{sum:.3}")]);
        output::line(output::table(&rows))?;
    }
    Ok(())
}

fn attention(args: &BenchAttention) -> Result<()> {
    let shapes = args.shapes.iter().map(|text| shape(text, args.width)).collect::<Result<Vec<_>, Usage>>()?;
    let choice: train::device::DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
    let device = choice.select()?;
    if !args.json {
        output::line("  B   H       T  pass       time ms  floor ms  ratio   TB/s")?;
    }
    let mut printed = Ok(());
    train::bench::attention(&device, &shapes, args.document_tokens, args.silu, args.float16, |time| {
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
