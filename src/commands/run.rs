//! `fulgurite run`

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use pipeline::manifest::replace_file;
use pipeline::status::summaries;
use pipeline::{RunContext, RunOptions, Runner, StagePlan, Verify, up_to};
use train::device::DeviceChoice;

use crate::cli::{self, Logging, Run};
use crate::commands::{generate, status};
use crate::exit::Usage;
use crate::output;
use crate::recipe::Recipe;
use crate::source::Source;
use crate::{plan, progress, stop};

/// Run a recipe, or say what there is to do.
pub fn run(args: &Run, logging: &Logging) -> Result<()> {
    let source = Source::read(&args.recipe, &args.set)?;
    let recipe = Recipe::load(&source)?;
    let dir = args.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&recipe.name));
    let stop = stop::on_signal()?;
    let mut options = RunOptions { stop: stop.clone(), observer: progress::observer(logging), ..RunOptions::new() };
    options.threads = args.threads.map_or(options.threads, usize::from);
    options.memory_limit_bytes = args.memory_limit.map_or(options.memory_limit_bytes, |n| n as usize);
    options.verify = match args.verify {
        cli::Verify::Checksums => Verify::Checksums,
        cli::Verify::Sizes => Verify::Sizes,
    };
    // The linear algebra of the CPU backend runs on this pool; results do not depend on its size.
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global().context("thread pool")?;
    let threads = options.threads;
    let device: DeviceChoice = args.device.parse().map_err(|e: train::Error| Usage(e.to_string()))?;
    if recipe.train.is_some() && !args.dry_run {
        // A device that is not there is told before hours of curation, not after.
        device.select().map_err(|e| Usage(e.to_string()))?;
    }
    let stages = plan::stages(&recipe, &dir, device).map_err(|e| source.explain(e))?;
    let until = args.until.as_deref();
    // A wrong name is told before a directory is made for the run.
    up_to(&stages, until)?;
    if args.dry_run {
        let runner = Runner::new(RunContext::look(&dir, options)?, stages).map_err(|e| source.explain(e))?;
        let plan = runner.plan(until).map_err(|e| source.explain(e))?;
        return dry_run(&plan, &dir, args.json);
    }
    let runner = Runner::new(RunContext::new(&dir, options)?, stages).map_err(|e| source.explain(e))?;
    replace_file(&dir.join("recipe.toml"), recipe.resolved()?.as_bytes())?;
    runtime(Some(threads))?.block_on(runner.run(until)).map_err(|e| source.explain(e))?;
    drop(runner);
    finish(args, &recipe, &dir, &stop)
}

fn dry_run(stages: &[StagePlan], dir: &Path, json: bool) -> Result<()> {
    if json {
        return output::json(&serde_json::json!({ "run_dir": dir.display().to_string(), "stages": stages }));
    }
    let mut rows = vec![vec!["stage".to_string(), "plan".into()]];
    rows.extend(stages.iter().map(|s| vec![s.stage.clone(), s.status.to_string()]));
    Ok(output::line(output::table(&rows))?)
}

/// The result: what every stage did, and what the model writes.
fn finish(args: &Run, recipe: &Recipe, dir: &Path, stop: &AtomicBool) -> Result<()> {
    let stages = summaries(dir)?;
    let trained = stages.iter().any(|s| s.stage == "train" && s.state == pipeline::StageState::Done);
    let mut samples = Vec::new();
    if let Some(sample) =
        recipe.sample.as_ref().filter(|_| trained && args.until.as_deref().is_none_or(|u| u == "train"))
    {
        samples = generate::samples(&dir.join("train"), sample, &args.device, stop)?;
    }
    if args.json {
        let dir = dir.display().to_string();
        return output::json(&serde_json::json!({ "run_dir": dir, "stages": stages, "samples": samples }));
    }
    output::line(status::table(&stages))?;
    for stage in &stages {
        for note in stage.notes.iter().filter_map(|n| n.get("summary")).filter_map(|s| s.as_str()) {
            output::line(format!("\n{}: {note}", stage.stage))?;
        }
    }
    for sample in samples {
        output::line(format!("\n{}{}", sample.prompt, sample.text))?;
    }
    Ok(())
}

/// The threads that execute plans.
pub fn runtime(threads: Option<usize>) -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = threads {
        builder.worker_threads(threads);
    }
    builder.enable_all().build().context("starting threads")
}
