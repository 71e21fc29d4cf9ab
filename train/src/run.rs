//! The step loop: batches in, a trained model, checkpoints and metrics out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{self, Checkpoint, State};
use crate::config::TrainConfig;
use crate::optimizer::AdamW;
use crate::schedule::learning_rate;
use crate::{Batch, Error, Model, files};

/// Where batches come from. The step alone determines a batch.
pub trait BatchSource {
    /// The batch of step `step`, counted from 0: `batch · gradient_accumulation` rows of
    /// `sequence_length + 1` tokens.
    ///
    /// # Errors
    /// What keeps the source from making the batch; [`Error::Batch`] carries a foreign reason.
    fn batch(&mut self, step: u64) -> Result<Batch, Error>;

    /// What a checkpoint keeps of the source.
    fn state(&self) -> Value;

    /// Continues at step `step` with the state that a checkpoint kept.
    ///
    /// # Errors
    /// When the state belongs to another source, for example to other data.
    fn resume(&mut self, state: &Value, step: u64) -> Result<(), Error>;
}

/// What a run needs besides its batches.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The settings.
    pub config: &'a TrainConfig,
    /// The device that trains.
    pub device: &'a Device,
    /// Gets `metrics.jsonl` and `checkpoints/`; a run that was stopped continues from there.
    pub directory: &'a Path,
    /// Copied into every checkpoint.
    pub tokenizer: Option<&'a Path>,
    /// Rows that are not trained on, for the evaluation.
    pub held_out: Option<&'a Batch>,
    /// Once true, the run saves a checkpoint after the current step and returns.
    pub stop: &'a AtomicBool,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean cross-entropy of the step's batch in nats, before its update.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Predicted tokens of all steps so far.
    pub tokens: u64,
    /// Predicted tokens per second since the line before, or since this process began to train.
    pub tokens_per_s: f64,
    /// Mean cross-entropy on the held-out rows after the step, where it was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done; the last checkpoint.
    Finished(PathBuf),
    /// The stop flag was set; the checkpoint to continue from.
    Stopped(PathBuf),
}

/// Directory of the checkpoints in the directory of a run.
pub const CHECKPOINTS: &str = "checkpoints";
/// Name of the metrics in the directory of a run.
pub const METRICS: &str = "metrics.jsonl";

/// Trains, from the newest checkpoint of the run's directory that verifies or from fresh weights.
/// `on_step` gets the metrics of every step, written to the file or not.
///
/// On the CPU a run that was killed and continued has the losses and weights of one that was not,
/// bit for bit, for any number of threads.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit each other or the checkpoint, [`Error::Io`] and
/// [`Error::Format`] for files, [`Error::NonFinite`] when the loss or the gradient is no number,
/// and what the source gives.
pub fn train(run: &Run<'_>, source: &mut dyn BatchSource, on_step: &mut dyn FnMut(&Metrics)) -> Result<Outcome, Error> {
    let config = run.config;
    config.validate()?;
    let directory = run.directory.join(CHECKPOINTS);
    fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
    checkpoint::prune(&directory, 0)?;

    let mut saved = None;
    let (mut model, mut optimizer, mut step, mut tokens) = match checkpoint::load_newest(&directory, run.device)? {
        Some(found) => {
            let Checkpoint { path, model, mut optimizer, state } = found;
            if *model.config() != config.model {
                let reason = format!("{} has another model", path.display());
                return Err(Error::config("model", reason));
            }
            source.resume(&state.loader, state.step)?;
            optimizer.configure(&config.optimizer);
            saved = Some((state.step, path));
            (model, optimizer, state.step, state.tokens)
        }
        None => {
            let model = Model::new(&config.model, config.seed, run.device)?;
            let optimizer = AdamW::new(&config.optimizer, &model);
            (model, optimizer, 0, 0)
        }
    };
    let mut metrics_file = MetricsFile::open(&run.directory.join(METRICS), step)?;

    let mut since = (Instant::now(), tokens);
    loop {
        let stopped = run.stop.load(Ordering::Relaxed);
        let done = step >= config.steps;
        let every = config.checkpoint_every_steps;
        let due = every > 0 && step > 0 && step.is_multiple_of(every);
        let newest = saved.as_ref().map(|(step, _)| *step);
        if (stopped || done || due) && newest != Some(step) {
            metrics_file.sync()?;
            let state = State { step, tokens, loader: source.state(), config: config.clone() };
            let path = checkpoint::save(&directory, &model, &optimizer, &state, run.tokenizer)?;
            checkpoint::prune(&directory, config.keep_checkpoints)?;
            saved = Some((step, path));
        }
        if let (true, Some((_, path))) = (stopped || done, &saved) {
            metrics_file.sync()?;
            return Ok(match done {
                true => Outcome::Finished(path.clone()),
                false => Outcome::Stopped(path.clone()),
            });
        }

        let batch = source.batch(step)?;
        let rate = config.optimizer.peak_learning_rate;
        let rate = learning_rate(&config.schedule, rate, config.steps, step);
        let (loss, grad_norm) = take_step(config, &mut model, &mut optimizer, &batch, rate, step)?;
        step += 1;
        tokens += (batch.rows() * batch.length) as u64;

        let last = step == config.steps;
        let at = |every: u64| every > 0 && (step.is_multiple_of(every) || last);
        let held_out_loss = match run.held_out {
            Some(rows) if at(config.evaluation.every_steps) => Some(model.loss(rows, config.batch)?),
            _ => None,
        };
        let metrics = Metrics {
            step,
            loss,
            learning_rate: rate,
            grad_norm,
            tokens,
            tokens_per_s: (tokens - since.1) as f64 / since.0.elapsed().as_secs_f64(),
            held_out_loss,
        };
        on_step(&metrics);
        if at(config.log_every_steps) || held_out_loss.is_some() {
            metrics_file.write(&metrics)?;
            since = (Instant::now(), tokens);
        }
    }
}

/// One optimizer step. Gives the loss before it and the norm of the gradient.
fn take_step(
    config: &TrainConfig,
    model: &mut Model,
    optimizer: &mut AdamW,
    batch: &Batch,
    rate: f64,
    step: u64,
) -> Result<(f64, f64), Error> {
    let (rows, length) = (config.batch * config.gradient_accumulation, config.sequence_length);
    if batch.rows() != rows || batch.length != length {
        return Err(Error::Batch {
            step,
            reason: format!("{} rows of {} tokens, the settings say {rows} of {length}", batch.rows(), batch.length),
        });
    }
    let mut sum: Option<Vec<Tensor<2>>> = None;
    let loss = model.gradients(batch, config.batch, |part| {
        sum = Some(match sum.take() {
            None => part,
            Some(sum) => sum.into_iter().zip(part).map(|(a, b)| a + b).collect(),
        });
    })?;
    let finite = |what, value: f64| match value.is_finite() {
        true => Ok(value),
        false => Err(Error::NonFinite { step, what, value }),
    };
    finite("loss", loss)?;
    let norm = optimizer.step(model, sum.unwrap_or_default(), rate);
    Ok((loss, finite("gradient norm", norm)?))
}

/// `metrics.jsonl`, open for appending.
struct MetricsFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl MetricsFile {
    /// Opens the file and drops the lines after step `step`, which are about to be written again.
    fn open(path: &Path, step: u64) -> Result<Self, Error> {
        let mut kept = Vec::new();
        if path.exists() {
            let file = File::open(path).map_err(Error::io(path))?;
            for line in BufReader::new(file).split(b'\n') {
                let line = line.map_err(Error::io(path))?;
                // A line that was cut short belongs to a step after the checkpoint.
                let metrics: Result<Metrics, _> = serde_json::from_slice(&line);
                if metrics.is_ok_and(|metrics| metrics.step <= step) {
                    kept.extend(line);
                    kept.push(b'\n');
                }
            }
        }
        files::replace(path, |path| fs::write(path, &kept).map_err(Error::io(path)))?;
        let file = File::options().append(true).open(path);
        Ok(Self { path: path.to_owned(), writer: BufWriter::new(file.map_err(Error::io(path))?) })
    }

    fn write(&mut self, metrics: &Metrics) -> Result<(), Error> {
        let mut line = serde_json::to_vec(metrics).map_err(|error| Error::format(&self.path, error))?;
        line.push(b'\n');
        // Whole lines reach the file at once: others read it while the run goes on.
        let written = self.writer.write_all(&line).and_then(|()| self.writer.flush());
        written.map_err(Error::io(&self.path))
    }

    fn sync(&mut self) -> Result<(), Error> {
        let synced = self.writer.get_ref().sync_data();
        synced.map_err(Error::io(&self.path))
    }
}
