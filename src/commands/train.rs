//! `fulgurite train`

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use train::config::Precision;
use train::device::DeviceChoice;
use train::estimate::{Estimate, Gpu, estimate};
use train::job::{Job, Options};
use train::parallel::{self, Launch, Meeting};
use train::run::Outcome;
use train::scaling::{self, Scaling};

use crate::cli::{Logging, Train};
use crate::exit::Usage;
use crate::live::Live;
use crate::recipe::check_name;
use crate::source::Source;
use crate::{launch, output, stop};

/// Train, continue, or say what it would take.
pub fn train(args: &Train, logging: &Logging) -> Result<()> {
    let source = Source::read(&args.config, &args.set)?;
    let mut job: Job = source.parse()?;
    job.train.schedule = job.train.schedule.resolved(job.train.steps);
    let choice: DeviceChoice = args.device.parse().map_err(|e: train::Error| Usage(e.to_string()))?;
    check_name(&job.name).map_err(|reason| source.refuse_key("name", &reason))?;
    if args.estimate {
        let ranks = args.nproc.map(|ranks| ranks as usize);
        return tell(&job, choice, ranks, args.json).map_err(|e| explain(&source, e));
    }
    let nproc = args.nproc.map(|ranks| ranks as usize);
    if let Some(ranks) = nproc.filter(|ranks| *ranks > 1) {
        return launch::ranks(ranks);
    }
    let place = launch::place(nproc)?;
    let trained = rank(args, &source, &job, choice, &place, logging);
    match place.world {
        1 => trained,
        world => trained.with_context(|| format!("rank {} of {world}", place.rank)),
    }
}

/// What one rank does; where there is one, all of it.
fn rank(
    args: &Train,
    source: &Source,
    job: &Job,
    choice: DeviceChoice,
    place: &Launch,
    logging: &Logging,
) -> Result<()> {
    let choice = if place.world > 1 { choice.for_rank(place.local_rank) } else { choice };
    let device = choice.select().map_err(|e| Usage(e.to_string()))?;
    let directory = args.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&job.name));
    let leads = place.rank == 0;
    let _lock = leads.then(|| claim(&directory, job)).transpose()?;
    let stop = stop::on_signal()?;
    let run = std::path::absolute(&directory).with_context(|| directory.display().to_string())?.display().to_string();
    let timeout = Duration::from_secs(args.rank_timeout_s);
    let group = match parallel::connect(place, &Meeting { run: &run, timeout, stop: stop.as_ref() }) {
        Err(train::Error::Interrupted) => {
            tracing::info!("{}: nothing was begun", train::Error::Interrupted);
            return ended();
        }
        met => met?,
    };
    let mut live = if leads { Live::new(job.train.steps, logging) } else { Live::quiet(job.train.steps) };
    let options = Options {
        directory: &directory,
        device: &device,
        group: &group,
        profile_steps: args.profile,
        stop: stop.as_ref(),
    };
    let outcome = job.run(&options, &mut |metrics| live.show(metrics)).map_err(|e| explain(source, e))?;
    let last = live.finish();
    let (path, finished) = match &outcome {
        Outcome::Finished(path) => (path, true),
        Outcome::Stopped(path) => (path, false),
    };
    if leads && args.json {
        output::json(&serde_json::json!({ "finished": finished, "checkpoint": path, "metrics": last }))?;
    } else if leads {
        output::line(path.display().to_string())?;
    }
    if finished { Ok(()) } else { ended() }
}

/// The end of a run that was stopped. What a scheduler stops is saved and goes on later: no failure.
fn ended() -> Result<()> {
    if stop::by_person() { Err(pipeline::Error::Interrupted.into()) } else { Ok(()) }
}

/// Makes the directory of a run its own, as long as the file is open, and writes its settings there.
fn claim(directory: &Path, job: &Job) -> Result<File> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    // Two processes would remove each other's checkpoints.
    let lock = pipeline::lock(directory)?;
    let resolved = toml::to_string_pretty(job).context("the settings as TOML")?;
    pipeline::manifest::replace_file(&directory.join("train.toml"), resolved.as_bytes())?;
    Ok(lock)
}

/// A setting's error with the line that sets it.
fn explain(source: &Source, error: train::Error) -> anyhow::Error {
    match error {
        train::Error::Config { key, reason } if key == "tokens" => source.refuse_key(&key, &reason).into(),
        train::Error::Config { key, reason } => source.refuse_key(&format!("train.{key}"), &reason).into(),
        other => other.into(),
    }
}

fn tell(job: &Job, choice: DeviceChoice, ranks: Option<usize>, json: bool) -> std::result::Result<(), train::Error> {
    let mut config = job.train.clone();
    if config.model.vocab_size == 0 {
        return Err(train::Error::Config {
            key: "model.vocab_size".into(),
            reason: "an estimate needs a number here; the training run itself takes that of the tokens".into(),
        });
    }
    config.schedule = config.schedule.resolved(config.steps);
    config.validate()?;
    if config.precision == Precision::Float32 {
        return Err(train::Error::Config {
            key: "precision".into(),
            reason: "estimates are of the step in bf16 on a GPU; \"auto\" is that where there is one".into(),
        });
    }
    let told = estimate(&config, gpu(choice)?);
    let scaling = ranks.map(|ranks| scaling::estimate(&config, &told.gpu, ranks)).transpose()?;
    let printed = match (json, &scaling) {
        (false, _) => print(&told).and_then(|()| scaling.as_ref().map_or(Ok(()), print_scaling)),
        (true, None) => output::json(&told),
        (true, Some(ranks)) => output::json(&Both { alone: &told, scaling: ranks }),
    };
    printed.map_err(|error| train::Error::Input(error.to_string()))
}

/// The estimate of one GPU, and beside it that of several.
#[derive(serde::Serialize)]
struct Both<'a> {
    #[serde(flatten)]
    alone: &'a Estimate,
    scaling: &'a Scaling,
}

/// The GPU that was asked for, the first of this machine, or the one that estimates stand for.
fn gpu(choice: DeviceChoice) -> std::result::Result<Gpu, train::Error> {
    let index = match choice {
        DeviceChoice::Cuda(index) => {
            choice.select()?;
            index
        }
        _ if train::device::cuda_devices().is_ok_and(|count| count > 0) => 0,
        _ => return Ok(Gpu::h200()),
    };
    Ok(train::estimate::gpu_at(index as u32).unwrap_or_else(Gpu::h200))
}

fn print(told: &Estimate) -> Result<()> {
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    output::line(format!(
        "{} parameters; weights {}, gradients {}, optimizer {}",
        output::thousands(told.parameters),
        gib(told.weight_bytes),
        gib(told.gradient_bytes),
        gib(told.optimizer_bytes)
    ))?;
    output::line(format!(
        "{} tokens a step, {:.3} GFLOP a token; expected on one {} ({} of memory):",
        output::thousands(told.tokens_per_step),
        told.flops_per_token / 1e9,
        told.gpu.name,
        gib(told.gpu.memory_bytes)
    ))?;
    let head = ["activation checkpointing", "activations", "peak", "fits", "ms a step", "tokens/s", "MFU"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(told.variants.iter().map(|variant| {
        use train::config::Recompute;
        vec![
            match variant.activation_checkpointing {
                Recompute::None => "none".to_string(),
                Recompute::Full => "full".to_string(),
                Recompute::Every { every } => format!("every {every}"),
            },
            gib(variant.activation_bytes),
            gib(variant.peak_bytes),
            if variant.peak_bytes < told.gpu.memory_bytes { "yes" } else { "no" }.to_string(),
            format!("{:.1}", 1e3 * variant.step_s),
            output::thousands(variant.tokens_per_s as u64),
            format!("{:.1} %", 100.0 * variant.mfu),
        ]
    }));
    Ok(output::line(output::table(&rows))?)
}

fn print_scaling(scaling: &Scaling) -> Result<()> {
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_string();
    let shared = match scaling.tensor_ranks {
        1 => String::new(),
        ranks => format!(", where {ranks} share each block"),
    };
    output::line(format!("\nof each of {} ranks{shared}:", scaling.ranks))?;
    let head = [
        "sharding",
        "weights, gradients, moments",
        "ZeRO's formula",
        "peak",
        "fits",
        "sent a step",
        "largest that fits",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(scaling.modes.iter().map(|mode| {
        vec![
            mode.sharding.name().to_string(),
            gib(mode.state_bytes),
            gib(mode.zero_bytes),
            gib(mode.peak_bytes),
            yes(mode.fits),
            gib(mode.sent_bytes),
            mode.largest_model.unwrap_or("none").to_string(),
        ]
    }));
    output::line(output::table(&rows))?;
    let links = &scaling.links;
    output::line(format!(
        "\nwith {:.0} GB/s between {} GPUs of a host, {:.0} % of it reached, and {:.0} GB/s a GPU between hosts, {:.0} % of it \
         reached (a model of the step, not a measurement; that a collective costs {:.0} µs and takes {:.0} % of the speed of what \
         is computed beside it, and that GPUs are {:.1} % apart, is fitted to steps of two and four H200 of one host):",
        links.host_bandwidth / 1e9,
        links.gpus_per_host,
        100.0 * links.host_reached,
        links.network_bandwidth / 1e9,
        100.0 * links.network_reached,
        1e6 * links.call_s,
        100.0 * links.slowed,
        100.0 * links.uneven
    ))?;
    let head = ["GPUs", "sharding", "fits", "tokens a step", "ms a step", "ms waiting", "tokens/s", "of one GPU's"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(scaling.scales.iter().map(|scale| {
        vec![
            scale.ranks.to_string(),
            scale.sharding.name().to_string(),
            yes(scale.fits),
            output::thousands(scale.tokens_per_step),
            format!("{:.1}", 1e3 * scale.step_s),
            format!("{:.1}", 1e3 * scale.exposed_s),
            output::thousands(scale.tokens_per_s as u64),
            format!("{:.1} %", 100.0 * scale.efficiency),
        ]
    }));
    Ok(output::line(output::table(&rows))?)
}
