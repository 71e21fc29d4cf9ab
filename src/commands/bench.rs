//! `fulgurite bench`

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Result, bail};
use train::bench::{AttentionShape, AttentionTime, CollectiveTime};
use train::device::{Device, DeviceChoice};
use train::parallel::{self, Collective, Meeting};

use crate::cli::{Bench, BenchAttention, BenchCollectives, BenchGenerate, BenchTrain};
use crate::exit::Usage;
use crate::source::Source;
use crate::{launch, output};

/// Measure what is asked for.
pub fn bench(what: &Bench) -> Result<()> {
    match what {
        Bench::Attention(args) => attention(args),
        Bench::Train(args) => training(args),
        Bench::Generate(args) => generation(args),
        Bench::Collectives(args) => collectives(args),
    }
}

/// Seconds that a rank waits for another.
const PATIENCE: Duration = Duration::from_secs(120);

/// What this process is a rank of, and its device, for the bench named `run`.
fn rank(run: &str, nproc: Option<usize>, device: &str) -> Result<(Arc<dyn Collective>, Device)> {
    let choice: DeviceChoice = device.parse().map_err(|e| Usage(format!("{e}")))?;
    let launch = launch::place(nproc)?;
    let choice = if launch.world > 1 { choice.for_rank(launch.local_rank) } else { choice };
    let device = choice.select()?;
    let meeting = Meeting { run, timeout: PATIENCE, stop: &AtomicBool::new(false) };
    Ok((parallel::connect(&launch, &meeting)?, device))
}

/// Tells the other ranks how it ended here.
fn left<T>(group: &dyn Collective, result: std::result::Result<T, train::Error>) -> Result<T> {
    group.leave(result.as_ref().err().map(ToString::to_string).as_deref());
    Ok(result?)
}

fn collectives(args: &BenchCollectives) -> Result<()> {
    if let Some(count) = args.nproc.filter(|&count| count > 1) {
        return launch::ranks(count);
    }
    let (group, device) = rank("bench collectives", args.nproc, &args.device)?;
    let speaks = group.rank() == 0;
    if speaks && !args.json {
        output::line("collective      values  ranks        bytes   time ms      GB/s  bus GB/s   checked  wrong")?;
    }
    let sizes: Vec<u64> = args.mib.iter().map(|mib| mib << 20).collect();
    let (mut printed, mut wrong) = (Ok(()), 0);
    let done = train::bench::collectives(&device, &group, &sizes, |time| {
        wrong += time.wrong;
        if speaks && printed.is_ok() {
            printed =
                if args.json { output::json(time) } else { output::line(collective_row(time)).map_err(Into::into) };
        }
    });
    left(group.as_ref(), done)?;
    printed?;
    if wrong > 0 {
        bail!("rank {}: {wrong} values are not what they have to be", group.rank());
    }
    Ok(())
}

fn collective_row(time: &CollectiveTime) -> String {
    format!(
        "{:<14} {:>7} {:>6} {:>12} {:>9.4} {:>9.1} {:>9.1} {:>9} {:>6}",
        time.collective,
        time.values,
        time.world,
        time.bytes,
        time.time_ms,
        time.gb_per_s,
        time.bus_gb_per_s,
        time.checked,
        time.wrong
    )
}

fn generation(args: &BenchGenerate) -> Result<()> {
    let mut config = train::ModelConfig::named(&args.size).ok_or_else(|| Usage(format!("no size {:?}", args.size)))?;
    if config.vocab_size == 0 {
        config.vocab_size = 2048;
    }
    let choice: DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
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
    if let Some(count) = args.nproc.filter(|&count| count > 1) {
        return launch::ranks(count);
    }
    let text = format!(
        "batch = {}\nsequence_length = {}\ngradient_accumulation = {}\n[model]\nsize = {:?}\n",
        args.batch, args.length, args.accumulate, args.size
    );
    let mut config: train::TrainConfig = Source::of("the bench's settings", text, &args.set).parse()?;
    if config.model.vocab_size == 0 {
        // The small sizes take theirs from a tokenizer.
        config.model.vocab_size = 2048;
    }
    let (group, device) = rank("bench train", args.nproc, &args.device)?;
    let time = left(group.as_ref(), train::bench::training(&device, &config, &group, args.steps))?;
    if group.rank() > 0 {
        return Ok(());
    }
    if args.json {
        return output::json(&time);
    }
    let mfu = time.mfu.map_or(String::new(), |mfu| format!(", MFU {:.1} %", 100.0 * mfu));
    let memory = time.memory_bytes.zip(time.memory_before_bytes).map_or(String::new(), |(after, before)| {
        let states = time.state_bytes.map_or(String::new(), |states| format!(", {} of states", output::bytes(states)));
        format!(", {} of device memory, {} before the first step{states}", output::bytes(after), output::bytes(before))
    });
    output::line(format!(
        "{} parameters, {} tokens a step: {:.2} ms, {} tokens/s{mfu}{memory}; loss {:.4} to {:.4}",
        output::thousands(time.parameters as u64),
        output::thousands(time.tokens_per_step),
        time.step_ms,
        output::thousands(time.tokens_per_s as u64),
        time.loss[0],
        time.loss[1],
    ))?;
    if let Some(communication) = &time.communication {
        output::line(format!(
            "{} ranks, sharding {}: {:.2} ms of collectives, {:.2} ms of them waited for ({:.0} % hidden)",
            time.world,
            time.sharding.name(),
            communication.total_ms,
            communication.exposed_ms,
            100.0 * communication.hidden(),
        ))?;
    }
    if !time.kernels.is_empty() {
        let mut rows = vec![["phase", "kernel", "calls", "ms a step"].map(String::from).to_vec()];
        // Collectives go on beside the rest, and who waits for one does nothing.
        let works = |phase: &str| phase != train::cuda::COMMUNICATION && phase != train::cuda::EXPOSED;
        let sum: f64 = time.kernels.iter().filter(|k| works(k.phase)).map(|kernel| kernel.total_ms).sum();
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
    let choice: DeviceChoice = args.device.parse().map_err(|e| Usage(format!("{e}")))?;
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
